package udp

import (
	"errors"
	"math"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/softnic/readiness"
)

// A sysSocket is the socket's descriptor. It is none of the Go runtime's poller: see package readiness.
type sysSocket struct {
	fd    int   // -1: closed
	whole bool  // the network device does not take pieces
	hops  uint8 // the hop limit of what is sent, as far as the route does not say otherwise; 0: not known
	wait  *readiness.Waiter
}

func (y *sysSocket) open(a netip.AddrPort) (local netip.AddrPort, err error) {
	family := unix.AF_INET6
	if a.Addr().Is4() {
		family = unix.AF_INET
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return local, os.NewSyscallError("socket", err)
	}
	y.fd = fd
	defer func() {
		if err != nil {
			y.close()
		}
	}()
	if err := setOptions(fd, a.Addr().Is4()); err != nil {
		return local, os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Bind(fd, sockaddrOf(a)); err != nil {
		return local, os.NewSyscallError("bind", err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return local, os.NewSyscallError("getsockname", err)
	}
	switch n := name.(type) {
	case *unix.SockaddrInet4:
		local = netip.AddrPortFrom(netip.AddrFrom4(n.Addr), uint16(n.Port))
	case *unix.SockaddrInet6:
		local = netip.AddrPortFrom(a.Addr(), uint16(n.Port))
	}
	if a.Addr().Is4() {
		y.setHops(unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TTL))
	} else {
		y.setHops(unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS))
	}
	y.wait, err = readiness.New(fd)
	return local, err
}

func sockaddrOf(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	s := &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	if z := a.Addr().Zone(); z != "" {
		if dev, err := net.InterfaceByName(z); err == nil {
			s.ZoneId = uint32(dev.Index)
		}
	}
	return s
}

// busyPoll switches the polling of the device on: it is for how many microseconds who waits would do so. Nobody here waits in the
// socket; who does not wait looks once, whatever the number.
const busyPoll = 50

// setOptions makes a socket one that RoCEv2 can leave from.
func setOptions(fd int, v4 bool) error {
	// The system gives what it allows (net.core.rmem_max and wmem_max), and who may administer the network (CAP_NET_ADMIN) as
	// much as it asks for. What several peers send at once overruns Linux' usual 208 KiB.
	for _, b := range [...]struct{ force, ask int }{{unix.SO_RCVBUFFORCE, unix.SO_RCVBUF}, {unix.SO_SNDBUFFORCE, unix.SO_SNDBUF}} {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, b.force, bufferLen) != nil {
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, b.ask, bufferLen)
		}
	}
	unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1) // older systems do not have it
	// Who looks for packets and finds none polls the network device, if that has a queue to poll, instead of waiting for its
	// interrupt. For this, too, one has to be allowed to administer the network, unless net.core.busy_read is set for all.
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BUSY_POLL, busyPoll)
	if v4 {
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_RECVTOS, 1)
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	}
	unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS, 1)
	// rxe sends no checksum over IPv6 either.
	return errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO),
		unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_NO_CHECK6_RX, 1),
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1))
}

// room is how much the socket's buffer holds, as waiting counts; 0: not known.
func (y *sysSocket) room() (n int) {
	n, _ = unix.GetsockoptInt(y.fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	return n
}

func (y *sysSocket) setHops(n int, err error) {
	if err == nil && n > 0 && n <= math.MaxUint8 {
		y.hops = uint8(n)
	}
}

// allowECN has what is sent say that it can be marked.
func (y *sysSocket) allowECN(v4 bool) error {
	if v4 {
		return unix.SetsockoptInt(y.fd, unix.IPPROTO_IP, unix.IP_TOS, capable)
	}
	return unix.SetsockoptInt(y.fd, unix.IPPROTO_IPV6, unix.IPV6_TCLASS, capable)
}

// ipv6FlowInfo is IPV6_FLOWINFO of linux/in6.h, the option and its control message.
const ipv6FlowInfo = 11

// tellIP has what is received come with its hop limit, and its flow label, or no longer.
func (y *sysSocket) tellIP(v4 bool, on int) error {
	if v4 {
		return unix.SetsockoptInt(y.fd, unix.IPPROTO_IP, unix.IP_RECVTTL, on)
	}
	return errors.Join(unix.SetsockoptInt(y.fd, unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, on),
		unix.SetsockoptInt(y.fd, unix.IPPROTO_IPV6, ipv6FlowInfo, on))
}

// of makes the control messages for a traffic class and a hop limit (0: the socket's) of what the socket sends. What the socket's others have
// needs none.
func (c *ipControl) of(y *sysSocket, v4 bool, class, hops uint8) {
	k, h := -1, -1
	if class&^maskECN != 0 {
		k = int(class)
	}
	if hops != 0 && hops != y.hops {
		h = int(hops)
	}
	c.set(v4, k, h)
}

func (y *sysSocket) setDeadline(t time.Time) { y.wait.SetDeadline(t) }

// sleep waits until there are packets, or the deadline that was set. One goroutine at a time.
func (y *sysSocket) sleep() error { return y.wait.Wait(false) }

func (y *sysSocket) close() error {
	if y.fd < 0 {
		return net.ErrClosed
	}
	if y.wait != nil {
		y.wait.Close()
	}
	fd := y.fd
	y.fd = -1
	return unix.Close(fd)
}
