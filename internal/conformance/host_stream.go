package conformance

import (
	"net"
	"net/netip"

	"github.com/ringside-rdma/ringside/qp"
)

// Streams: two sides make a TCP connection, and give each QP one end.

var opStreamListen = newOp("listen for a stream", func(h *host, _ none) (listenInfo, error) {
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(localhost, 0)))
	if err != nil {
		return listenInfo{}, err
	}
	return listenInfo{h.add(l), l.Addr().(*net.TCPAddr).AddrPort()}, nil
})

var opStreamDial = newOp("dial a stream", func(h *host, to netip.AddrPort) (handle, error) {
	c, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(to))
	if err != nil {
		return 0, err
	}
	return h.add(c), nil
})

var opStreamAccept = newOp("accept a stream", func(h *host, listener handle) (handle, error) {
	return use(h, listener, func(l *net.TCPListener) (handle, error) {
		c, err := l.AcceptTCP()
		if err != nil {
			return 0, err
		}
		return h.add(c), nil
	})
})

type streamArgs struct{ QP, Stream handle }

var opUseStream = newOp("use_stream", func(h *host, a streamArgs) (none, error) {
	c, err := get[*net.TCPConn](h, a.Stream)
	if err != nil {
		return none{}, err
	}
	return use(h, a.QP, func(q *qp.QP) (none, error) {
		err := q.UseStream(c)
		if err == nil {
			h.mu.Lock()
			delete(h.objects, a.Stream)
			h.mu.Unlock()
		}
		return none{}, err
	})
})

// useStream gives the end one end of a stream, and keeps the other for its peer, unless the peer has done so for it.
func (e *end) useStream(to *end) {
	e.c.Helper()
	if e.stream == 0 {
		l := do(e.Side, opStreamListen, none{})
		to.stream = do(to.Side, opStreamDial, l.Addr)
		e.stream = do(e.Side, opStreamAccept, l.H)
		if err := e.Side.close(l.H); err != nil {
			e.c.Fatal(err)
		}
	}
	do(e.Side, opUseStream, streamArgs{e.H, e.stream})
	e.stream = 0
}
