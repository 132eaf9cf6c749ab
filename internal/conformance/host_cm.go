package conformance

import (
	"context"
	"net/netip"

	"github.com/ringside-rdma/ringside/qp"
)

// What a side does to be connected by the connection manager.

type listenInfo struct {
	H    handle
	Addr netip.AddrPort
}

var opListen = newOp("rdma_listen", func(h *host, addr netip.AddrPort) (listenInfo, error) {
	c, err := h.context()
	if err != nil {
		return listenInfo{}, err
	}
	l, err := qp.Listen(c, addr, 0)
	if err != nil {
		return listenInfo{}, err
	}
	return listenInfo{h.add(l), l.Addr()}, nil
})

type cmArgs struct {
	QP            handle
	Listener      handle         // accept
	Local, Remote netip.AddrPort // dial
	Params        qp.CMParams
}

type cmInfo struct {
	H             handle
	PrivateData   []byte // dial: of the acceptance. accept: of the request
	Local, Remote netip.AddrPort
}

var opDial = newOp("rdma_connect", func(h *host, a cmArgs) (cmInfo, error) {
	return use(h, a.QP, func(q *qp.QP) (cmInfo, error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		conn, err := q.Dial(ctx, a.Local, a.Remote, a.Params)
		if err != nil {
			return cmInfo{}, err
		}
		return h.connected(a.QP, conn, conn.PrivateData()), nil
	})
})

var opAccept = newOp("rdma_accept", func(h *host, a cmArgs) (cmInfo, error) {
	l, err := get[*qp.Listener](h, a.Listener)
	if err != nil {
		return cmInfo{}, err
	}
	return use(h, a.QP, func(q *qp.QP) (cmInfo, error) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		r, err := l.Accept(ctx)
		if err != nil {
			return cmInfo{}, err
		}
		conn, err := r.Accept(ctx, q, a.Params)
		if err != nil {
			return cmInfo{}, err
		}
		return h.connected(a.QP, conn, r.PrivateData()), nil
	})
})

func (h *host) connected(q handle, conn *qp.CMConn, data []byte) cmInfo {
	n := h.add(conn)
	h.mu.Lock()
	h.conns[q] = n
	h.mu.Unlock()
	return cmInfo{n, data, conn.LocalAddr(), conn.RemoteAddr()}
}
