package cmemu

import (
	"encoding/binary"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	afIB = 27 // AF_IB

	sizeofSockaddrIn  = 16
	sizeofSockaddrIn6 = 28
	sizeofSockaddrIB  = 48
)

var native = binary.NativeEndian

// A sockaddr is a socket address of a client's. The zero value is none.
type sockaddr struct {
	family uint16
	ip     netip.Addr
	port   uint16
	scope  uint32
	ib     [sizeofSockaddrIB]byte // of family AF_IB: all of it
}

// familySize is the length of a family's addresses, as rdma_addr_size has it; 0: there are none.
func familySize(family uint16) int {
	switch family {
	case unix.AF_INET:
		return sizeofSockaddrIn
	case unix.AF_INET6:
		return sizeofSockaddrIn6
	case afIB:
		return sizeofSockaddrIB
	}
	return 0
}

// readSockaddr reads an address; false: it is of no family that there is here, or b is too short for it.
func readSockaddr(b []byte) (sockaddr, bool) {
	s := sockaddr{family: native.Uint16(b)}
	n := familySize(s.family)
	if n == 0 || n > len(b) {
		return s, false
	}
	s.port = binary.BigEndian.Uint16(b[2:])
	switch s.family {
	case unix.AF_INET:
		s.ip = netip.AddrFrom4([4]byte(b[4:8]))
	case unix.AF_INET6:
		s.ip = netip.AddrFrom16([16]byte(b[8:24]))
		s.scope = native.Uint32(b[24:])
	default:
		s.port = 0
		copy(s.ib[:], b)
	}
	return s, true
}

// sizedSockaddr reads an address whose length the client has said.
func sizedSockaddr(b []byte, n uint16) (sockaddr, syscall.Errno) {
	s, ok := readSockaddr(b)
	if !ok || familySize(s.family) != int(n) {
		return s, unix.EINVAL
	}
	return s, 0
}

// anyOf is a family's unspecified address.
func anyOf(family uint16) sockaddr {
	s := sockaddr{family: family, ip: netip.IPv4Unspecified()}
	if family == unix.AF_INET6 {
		s.ip = netip.IPv6Unspecified()
	}
	return s
}

// sockaddrOf is the address of a peer, or of ours, in a request.
func sockaddrOf(a netip.AddrPort) sockaddr {
	s := sockaddr{family: unix.AF_INET, ip: a.Addr().Unmap(), port: a.Port()}
	if !s.ip.Is4() {
		s.family = unix.AF_INET6
	}
	return s
}

// isAny reports whether the address is that of no particular interface.
func (s *sockaddr) isAny() bool {
	if s.family == afIB {
		return [16]byte(s.ib[8:24]) == [16]byte{}
	}
	return !s.ip.IsValid() || s.ip.IsUnspecified()
}

func (s *sockaddr) addrPort() netip.AddrPort { return netip.AddrPortFrom(s.ip, s.port) }

// put writes the address, and returns its length.
func (s *sockaddr) put(b []byte) int {
	n := familySize(s.family)
	if n == 0 {
		return 0
	}
	if s.family == afIB {
		copy(b, s.ib[:])
		native.PutUint16(b, s.family)
		return n
	}
	native.PutUint16(b, s.family)
	binary.BigEndian.PutUint16(b[2:], s.port)
	switch {
	case s.family == unix.AF_INET6 && s.ip.IsValid():
		a := s.ip.As16()
		copy(b[8:], a[:])
		native.PutUint32(b[24:], s.scope)
	case s.ip.IsValid():
		a := s.ip.As4()
		copy(b[4:], a[:])
	}
	return n
}

// gid is the address as a GID.
func (s *sockaddr) gid() (g [16]byte) {
	switch {
	case s.family == afIB:
		copy(g[:], s.ib[8:24])
	case s.ip.IsValid():
		g = s.ip.As16()
	}
	return g
}
