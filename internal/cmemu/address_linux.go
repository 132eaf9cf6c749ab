package cmemu

import (
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/roce"
)

// Addresses and routes: BIND, RESOLVE_ADDR, RESOLVE_ROUTE.

func bindIP(w *call) syscall.Errno {
	q, ok := arg[abi.CMBindIP](w)
	if !ok {
		return unix.EINVAL
	}
	a, ok := readSockaddr(bytesOf(&q.Addr))
	if !ok {
		return unix.EINVAL
	}
	return w.with(q.ID, func(x *id) syscall.Errno { return x.bind(a) })
}

func bind(w *call) syscall.Errno {
	q, ok := arg[abi.CMBind](w)
	if !ok || q.Reserved != 0 {
		return unix.EINVAL
	}
	a, errno := sizedSockaddr(bytesOf(&q.Addr), q.AddrSize)
	if errno != 0 {
		return errno
	}
	return w.with(q.ID, func(x *id) syscall.Errno { return x.bind(a) })
}

// is reports whether the ID is in a state. Only commands, of which there is one at a time, take it to another but for disconnected.
func (x *id) is(s state) bool {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	return x.state == s
}

// bind gives the ID an address, a device unless the address is any, and a port.
func (x *id) bind(a sockaddr) syscall.Errno {
	if !x.is(idle) {
		return unix.EINVAL
	}
	switch {
	case a.family == unix.AF_INET6 && a.ip.IsLinkLocalUnicast() && a.scope == 0:
		return unix.EINVAL
	case a.family != afIB && x.space == abi.RDMA_PS_IB:
		return unix.EPROTONOSUPPORT
	}
	var at place
	if !a.isAny() {
		if a.family == afIB { // RoCE has none
			return unix.ENODEV
		}
		var errno syscall.Errno
		if at, errno = x.m.placeAt(a.ip); errno != 0 {
			return errno
		}
	}
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	was := x.src
	x.src = a
	if !x.afOnlySet {
		x.afOnly = a.family == unix.AF_INET
	}
	if errno := x.m.takePort(x); errno != 0 {
		x.src = was
		return errno
	}
	x.at, x.state = at, addrBound
	x.dst.family = a.family
	return 0
}

func resolveIP(w *call) syscall.Errno {
	q, ok := arg[abi.CMResolveIP](w)
	if !ok {
		return unix.EINVAL
	}
	var src sockaddr
	if q.SrcAddr.Sin6Family != 0 {
		if src, ok = readSockaddr(bytesOf(&q.SrcAddr)); !ok {
			return unix.EINVAL
		}
	}
	dst, ok := readSockaddr(bytesOf(&q.DstAddr))
	if !ok {
		return unix.EINVAL
	}
	return w.with(q.ID, func(x *id) syscall.Errno { return x.resolve(src, dst) })
}

func resolveAddr(w *call) syscall.Errno {
	q, ok := arg[abi.CMResolveAddr](w)
	if !ok || q.Reserved != 0 {
		return unix.EINVAL
	}
	var src sockaddr
	var errno syscall.Errno
	if q.SrcSize != 0 {
		if src, errno = sizedSockaddr(bytesOf(&q.SrcAddr), q.SrcSize); errno != 0 {
			return errno
		}
	}
	dst, errno := sizedSockaddr(bytesOf(&q.DstAddr), q.DstSize)
	if errno != 0 {
		return errno
	}
	return w.with(q.ID, func(x *id) syscall.Errno { return x.resolve(src, dst) })
}

// resolve finds the address and the device that the peer is reached from. An ID that is bound keeps its own.
func (x *id) resolve(src, dst sockaddr) syscall.Errno {
	if !x.is(addrBound) {
		if src.family == 0 {
			src = anyOf(dst.family)
		}
		was := x.dst
		x.set(func() { x.dst = dst }) // which port is free depends on it
		if errno := x.bind(src); errno != 0 {
			x.set(func() { x.dst = was })
			return errno
		}
	}
	switch {
	case x.src.family != dst.family:
		return unix.EINVAL
	case dst.family == afIB, dst.isAny():
		return unix.ENODEV
	}
	from, errno := routeTo(x.src.ip, dst.ip, dst.scope)
	if errno != 0 {
		return errno
	}
	at := x.at
	if at.dev == nil {
		at, errno = x.m.placeAt(from)
	}
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	if x.ch.full() {
		return unix.ENOMEM
	}
	if errno == 0 && !at.Standard() && from != dst.ip { // nobody there would find us
		errno = unix.EADDRINUSE
	}
	if errno != 0 {
		return x.queueMore(eventAddrError, -int32(errno))
	}
	x.src.ip, x.dst, x.at, x.state = from, dst, at, addrResolved
	return x.queueMore(eventAddrResolved, 0)
}

// routeTo returns the address that the system would send from, which is from, if that is one.
func routeTo(from, to netip.Addr, scope uint32) (netip.Addr, syscall.Errno) {
	family := unix.AF_INET
	if to.Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return netip.Addr{}, errnoOf(err)
	}
	defer unix.Close(fd)
	if from.IsValid() && !from.IsUnspecified() {
		if err := unix.Bind(fd, unixAddr(from, 0, scope)); err != nil {
			return netip.Addr{}, errnoOf(err)
		}
	}
	if err := unix.Connect(fd, unixAddr(to, roce.Port, scope)); err != nil { // which sends nothing
		return netip.Addr{}, errnoOf(err)
	}
	name, err := unix.Getsockname(fd)
	switch n := name.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrFrom4(n.Addr), 0
	case *unix.SockaddrInet6:
		return netip.AddrFrom16(n.Addr), 0
	}
	return netip.Addr{}, errnoOf(os.NewSyscallError("getsockname", err))
}

func unixAddr(a netip.Addr, port int, scope uint32) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Port: port, Addr: a.As4()}
	}
	return &unix.SockaddrInet6{Port: port, ZoneId: scope, Addr: a.As16()}
}

func resolveRoute(w *call) syscall.Errno {
	q, ok := arg[abi.CMResolveRoute](w)
	if !ok {
		return unix.EINVAL
	}
	return w.withDevice(q.ID, func(x *id) syscall.Errno {
		if q.TimeoutMs == 0 {
			return unix.EINVAL
		}
		return x.takeRoute()
	})
}

// hopLimit is that of what is sent to other networks.
const hopLimit = 64

// takeRoute finds the path to the peer: RoCE has one.
func (x *id) takeRoute() syscall.Errno {
	p := path{mtu: x.at.MTU(), tclass: x.tos, hops: hopLimit, life: packetLife}
	p.flow = (uint32(x.src.port)*31 + uint32(x.dst.port)) & 0xfffff
	if t := x.ackTimeout; t != nil && *t != 0 {
		p.life = *t - 1
	}
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	if x.state != addrResolved {
		return unix.EINVAL
	}
	if errno := x.queueMore(eventRouteResolved, 0); errno != 0 {
		return errno
	}
	x.path, x.state = p, routeResolved
	return 0
}
