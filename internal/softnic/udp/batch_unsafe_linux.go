package udp

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// message is struct mmsghdr of sendmmsg(2) and recvmmsg(2).
type message struct {
	hdr unix.Msghdr
	n   uint32
}

// sockaddr has room for struct sockaddr_in and sockaddr_in6, in words so that it is aligned for them.
type sockaddr [unix.SizeofSockaddrInet6 / 4]uint32

// batch is packets for one system call.
type batch struct {
	mem   []byte
	hdrs  []message
	iovs  []unix.Iovec
	names []sockaddr
	v4    bool
}

func (b *batch) init(n int, v4 bool) {
	*b = batch{mem: make([]byte, n*slotLen), hdrs: make([]message, n), iovs: make([]unix.Iovec, n), names: make([]sockaddr, n), v4: v4}
	for i := range b.hdrs {
		b.iovs[i].Base = &b.slot(i)[0]
		b.iovs[i].SetLen(slotLen)
		h := &b.hdrs[i].hdr
		h.Iov = &b.iovs[i]
		h.SetIovlen(1)
		// Safe: the array is of as many bytes as the length says, and lives as long as the header that points to it.
		h.Name = (*byte)(unsafe.Pointer(&b.names[i]))
		h.Namelen = uint32(unsafe.Sizeof(b.names[i]))
	}
}

func (b *batch) slot(i int) []byte { return b.mem[i*slotLen : (i+1)*slotLen : (i+1)*slotLen] }

// name is the bytes of an address.
func (b *batch) name(i int) []byte {
	// Safe: the bytes of an array.
	return unsafe.Slice((*byte)(unsafe.Pointer(&b.names[i])), unsafe.Sizeof(b.names[i]))
}

// set says how long packet i is, and where it goes.
func (b *batch) set(i, n int, to netip.AddrPort) {
	b.iovs[i].SetLen(n)
	name := b.name(i)
	binary.BigEndian.PutUint16(name[2:], to.Port())
	if b.v4 {
		binary.NativeEndian.PutUint16(name, unix.AF_INET)
		a := to.Addr().As4()
		copy(name[4:], a[:])
		b.hdrs[i].hdr.Namelen = unix.SizeofSockaddrInet4
		return
	}
	binary.NativeEndian.PutUint16(name, unix.AF_INET6)
	clear(name[4:8])
	a := to.Addr().As16()
	copy(name[8:], a[:])
	clear(name[24:])
	b.hdrs[i].hdr.Namelen = unix.SizeofSockaddrInet6
}

// get returns packet i, and where it came from.
func (b *batch) get(i int) ([]byte, netip.AddrPort) {
	name := b.name(i)
	var a netip.Addr
	if b.v4 {
		a = netip.AddrFrom4([4]byte(name[4:8]))
	} else {
		a = netip.AddrFrom16([16]byte(name[8:24])).Unmap()
	}
	return b.slot(i)[:min(b.hdrs[i].n, slotLen)], netip.AddrPortFrom(a, binary.BigEndian.Uint16(name[2:]))
}

// shift moves what is behind the first done of n packets to the front, and returns how many these are.
func (b *batch) shift(done, n int) int {
	if done > 0 {
		for i := done; i < n; i++ {
			copy(b.slot(i-done), b.slot(i)[:b.iovs[i].Len])
			b.names[i-done] = b.names[i]
			b.iovs[i-done].Len = b.iovs[i].Len
			b.hdrs[i-done].hdr.Namelen = b.hdrs[i].hdr.Namelen
		}
	}
	return n - done
}

// again reports whether the system will take more later.
func again(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EINTR)
}

// calls is what system calls are given, and give back: closures that are made once, since one a call would be garbage.
type calls struct {
	send, recv func(fd uintptr)
	first, n   int // packets to send
	done       int // packets sent or received
	errno      syscall.Errno
}

// The system calls do not wait, so that the runtime need not know of them: it would look for other work to do meanwhile, which
// costs more than they do.
func (s *Socket) prepare() {
	c := &s.calls
	c.send = func(fd uintptr) {
		// Safe: the headers point to memory of the batch, and there are n of them.
		r, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&s.tx.hdrs[c.first])), uintptr(c.n), unix.MSG_DONTWAIT, 0, 0)
		if c.done, c.errno = int(r), errno; errno != 0 {
			c.done = 0
		}
	}
	c.recv = func(fd uintptr) {
		// Safe: the headers point to memory of the batch.
		r, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&s.rx.hdrs[0])), uintptr(len(s.rx.hdrs)), unix.MSG_DONTWAIT, 0, 0)
		if c.done, c.errno = int(r), errno; errno != 0 {
			c.done = 0
		}
	}
}

// send sends n packets of s.tx from the first on, and returns how many are gone.
func (s *Socket) send(first, n int) (sent int, err error) {
	c := &s.calls
	c.first, c.n = first, n
	if s.sys.raw.Control(c.send) != nil {
		return 0, net.ErrClosed
	}
	if c.errno != 0 {
		err = c.errno
	}
	return c.done, err
}

// receive fills s.rx with what there is, and returns how many packets that is.
func (s *Socket) receive() (int, error) {
	c := &s.calls
	for i := range s.rx.hdrs[:s.dirty] { // the system has written to them
		s.rx.hdrs[i].hdr.Namelen = uint32(unsafe.Sizeof(sockaddr{}))
	}
	s.dirty = 0
	if s.sys.raw.Control(c.recv) != nil {
		return 0, net.ErrClosed
	}
	switch c.errno {
	case 0, unix.EAGAIN, unix.EINTR, unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH: // nothing, or news of what was sent
		s.dirty = c.done
		return c.done, nil
	}
	return 0, c.errno
}
