package rdmacm

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// Linux's numbers, on every system: they go into bytes that only Linux reads.
const (
	afINET  = 2
	afINET6 = 10

	sizeofSockaddrIn  = 16
	sizeofSockaddrIn6 = 28
)

// putSockaddr writes an address as a socket address. It returns its length, 0 for the zero AddrPort.
func putSockaddr(to *abi.SockaddrStorage, a netip.AddrPort) (uint16, error) {
	ip := a.Addr().Unmap()
	switch {
	case ip.Is4():
		s := abi.SockaddrIn{SinFamily: afINET, SinPort: abi.ToBE16(a.Port())}
		ip4 := ip.As4()
		s.SinAddr.SAddr = abi.BE32(binary.NativeEndian.Uint32(ip4[:]))
		return uint16(copy(bytesOf(to), bytesOf(&s))), nil
	case ip.Is6():
		s := abi.SockaddrIn6{Sin6Family: afINET6, Sin6Port: abi.ToBE16(a.Port())}
		s.Sin6Addr.In6U = ip.As16()
		scope, err := scopeOf(ip.Zone())
		if err != nil {
			return 0, err
		}
		s.Sin6ScopeID = scope
		return uint16(copy(bytesOf(to), bytesOf(&s))), nil
	}
	return 0, nil
}

// scopeOf is the index of the interface that a zone names.
func scopeOf(zone string) (uint32, error) {
	if zone == "" {
		return 0, nil
	}
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n), nil
	}
	ifi, err := net.InterfaceByName(zone)
	if err != nil {
		return 0, fmt.Errorf("zone %q of the address: %w", zone, err)
	}
	return uint32(ifi.Index), nil
}

// sockaddr reads a socket address of n bytes. Families other than the two of IP, and an address of the wrong length, are
// errors; no address at all is the zero AddrPort.
func sockaddr(from *abi.SockaddrStorage, n uint16) (netip.AddrPort, error) {
	switch {
	case n == 0:
		return netip.AddrPort{}, nil
	case from.SSFamily == afINET && n == sizeofSockaddrIn:
		var s abi.SockaddrIn
		copy(bytesOf(&s), bytesOf(from))
		var ip [4]byte
		binary.NativeEndian.PutUint32(ip[:], uint32(s.SinAddr.SAddr))
		return netip.AddrPortFrom(netip.AddrFrom4(ip), abi.FromBE16(s.SinPort)), nil
	case from.SSFamily == afINET6 && n == sizeofSockaddrIn6:
		var s abi.SockaddrIn6
		copy(bytesOf(&s), bytesOf(from))
		ip := netip.AddrFrom16(s.Sin6Addr.In6U)
		if s.Sin6ScopeID != 0 && !ip.Is4In6() {
			ip = ip.WithZone(zoneOf(s.Sin6ScopeID))
		}
		return netip.AddrPortFrom(ip.Unmap(), abi.FromBE16(s.Sin6Port)), nil
	}
	return netip.AddrPort{}, fmt.Errorf("rdma_cm: the kernel gave an address of family %d and %d bytes", from.SSFamily, n)
}

// zoneOf is the name of an interface, or its index if it has none any more.
func zoneOf(scope uint32) string {
	if ifi, err := net.InterfaceByIndex(int(scope)); err == nil {
		return ifi.Name
	}
	return strconv.FormatUint(uint64(scope), 10)
}
