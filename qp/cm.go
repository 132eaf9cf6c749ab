package qp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/life"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Connections by IP address, through the system's connection manager (on Linux rdma_cm), or the software NIC's own, which speaks
// the same protocol: instead of exchanging numbers and calling Init and Connect, one side listens and the other dials.
//
//	l, err := qp.Listen(vctx, addr, 0)                      q, err := qp.New(pd, cfg)
//	req, err := l.Accept(ctx)                               // Init and post receives
//	q, err := qp.New(pd, cfg) // Init and post receives     conn, err := q.Dial(ctx, netip.AddrPort{}, addr, params)
//	conn, err := req.Accept(ctx, q, params)                 defer conn.Close()
//
// It is the only way on devices with ib.CapCMOnly, and the way to peers that speak it (librdmacm, NVMe over Fabrics).
//
// A software NIC can do it at the addresses of its host at which it has UDP port 4791, which of all processes and contexts there can
// be one for each address; at others it fails with verbs.ErrUnreachable and syscall.EADDRINUSE.

// CMParams is what one side wants of a connection. Zero fields take their defaults; what device, peer or wire cannot do is
// lowered: Query tells.
type CMParams struct {
	// PrivateData is for the program on the other side: up to 56 bytes with Dial and 196 with Accept on InfiniBand and RoCE, 255 on
	// iWARP. It is read during the call. The peer may get it with zeros at its end.
	PrivateData []byte
	// Access is what the peer may do through the queue pair, as in Init. Zero: what Init has said, and nothing without.
	Access ib.Access
	// MaxRdAtomic is how many RDMA READs and atomics of this side can be in flight, MaxDestRdAtomic how many of the peer's.
	// Default: 16, or the device's limit if that is lower; -1 means 0.
	MaxRdAtomic     int
	MaxDestRdAtomic int
	// RetryCount is how many times an unacknowledged packet is sent again, RNRRetry how many times the peer tries again when no
	// receive is posted here, MinRNRTimer how long it waits before that. The values are those of ConnectParams. RetryCount is what
	// the side says that dials. iWARP has none of them: there TCP sends again, and a message without a receive ends the connection.
	RetryCount  int
	RNRRetry    int
	MinRNRTimer time.Duration
}

// param is p for the driver.
func (p *CMParams) param(q *QP) (*driver.CMParam, error) {
	a, err := q.pd.Context().QueryDevice()
	if err != nil {
		return nil, err
	}
	d := &driver.CMParam{
		PrivateData: p.PrivateData, Access: p.Access, SRQ: q.srq != nil,
		MaxRdAtomic:     clamp(p.MaxRdAtomic, min(16, a.MaxQPInitRdAtom), a.MaxQPInitRdAtom),
		MaxDestRdAtomic: clamp(p.MaxDestRdAtomic, min(16, a.MaxQPRdAtomic), a.MaxQPRdAtomic),
		RetryCount:      clamp(p.RetryCount, ib.MaxRetry, ib.MaxRetry),
		RNRRetry:        clamp(p.RNRRetry, ib.RNRRetryForever, ib.MaxRetry),
		MinRNRTimer:     ib.RNRTimerFor(DefaultMinRNRTimer),
	}
	if p.MinRNRTimer != 0 {
		d.MinRNRTimer = ib.RNRTimerFor(p.MinRNRTimer)
	}
	return d, nil
}

// DefaultMinRNRTimer is CMParams' and ConnectParams' default.
const DefaultMinRNRTimer = 120 * time.Microsecond

// connManager returns the device's connection manager.
func connManager(c *verbs.Context, op string) (driver.ConnManager, error) {
	m, ok := c.Driver().(driver.ConnManager)
	if !ok {
		return nil, opErr(op, c.Name(), fmt.Errorf("the device has no connection manager: %w", errors.ErrUnsupported))
	}
	return m, nil
}

// A Listener takes requests for connections to one address of a device. It is safe for concurrent use; each request goes to one
// Accept.
type Listener struct {
	life life.Node
	drv  driver.CMListener
	ctx  *verbs.Context
}

// Listen listens on addr, which must be an address of the device's network interface, or unspecified; with port 0 the system
// chooses one, which Addr tells. Up to backlog requests wait for Accept (0: 128), and further ones are refused. It fails with
// errors.ErrUnsupported on devices without a connection manager, and with verbs.ErrUnreachable if the address is not the device's.
// An unspecified address stands, on the software NIC, for the addresses that the host has at that moment.
func Listen(c *verbs.Context, addr netip.AddrPort, backlog int) (*Listener, error) {
	const op = "rdma_listen"
	m, err := connManager(c, op)
	if err != nil {
		return nil, err
	}
	if backlog < 0 {
		return nil, opErr(op, c.Name(), fmt.Errorf("invalid backlog: %d", backlog))
	}
	l := &Listener{ctx: c}
	if err := l.life.Attach(c.Life()); err != nil {
		return nil, opErr(op, c.Name(), err)
	}
	if l.drv, err = m.CMListen(addr, backlog); err != nil {
		l.life.Abandon()
		return nil, opErr(op, c.Name(), err)
	}
	life.Watch(l, &l.life, "qp.Listener", c.Name())
	return l, nil
}

// Addr is the address that the listener has.
func (l *Listener) Addr() netip.AddrPort { return l.drv.Addr() }

// Accept waits for the next request. It ends with ctx, with net.ErrClosed on Close, and with verbs.ErrDeviceRemoved.
func (l *Listener) Accept(ctx context.Context) (*Request, error) {
	const op = "rdma_get_request"
	if l.life.Closed() {
		return nil, opErr(op, l.ctx.Name(), net.ErrClosed)
	}
	d, err := l.drv.Accept(ctx)
	if err != nil {
		return nil, opErr(op, l.ctx.Name(), err)
	}
	r := &Request{drv: d, ctx: l.ctx}
	if err := r.life.Attach(l.ctx.Life()); err != nil {
		d.Close()
		return nil, opErr(op, l.ctx.Name(), err)
	}
	life.Watch(r, &r.life, "qp.Request", l.ctx.Name())
	return r, nil
}

// Close ends the listener, and Accept calls in progress. Requests that wait are refused; those that Accept has returned are not
// concerned.
func (l *Listener) Close() error {
	return opErr("rdma_destroy_id", l.ctx.Name(), l.life.Close(l.drv.Close))
}

// A Request is a peer that wants to connect. Accept, Reject or Close ends it; of several calls the first counts, and later ones
// fail with net.ErrClosed.
type Request struct {
	life life.Node
	drv  driver.CMRequest
	ctx  *verbs.Context
}

// PrivateData is what the peer has sent along: on InfiniBand and RoCE as long as the message can carry, with zeros at its end.
// It is the caller's.
func (r *Request) PrivateData() []byte { return r.drv.PrivateData() }

// LocalAddr is the address that the peer has dialled.
func (r *Request) LocalAddr() netip.AddrPort { return r.drv.LocalAddr() }

// RemoteAddr is the peer's address.
func (r *Request) RemoteAddr() netip.AddrPort { return r.drv.RemoteAddr() }

// finish ends the request with f.
func (r *Request) finish(op string, f func() error) error {
	var err error
	ran := false
	r.life.Close(func() error { // never refused: a request has no children
		ran = true
		err = f()
		return nil
	})
	if !ran {
		err = net.ErrClosed
	}
	return opErr(op, r.ctx.Name(), err)
}

// Accept connects q, an RC queue pair of the listener's device in state Reset or Init, and takes it to RTS: what the peer sends at
// once needs receives that were posted before, in Init. It waits until the peer has confirmed; ctx bounds that. If it fails, q may
// be in any state: Reset it if the device can, or Close it.
//
// On iWARP the side that has dialled must send the first message.
func (r *Request) Accept(ctx context.Context, q *QP, p CMParams) (conn *CMConn, err error) {
	const op = "rdma_accept"
	if q.pd.Context() != r.ctx {
		return nil, opErr(op, r.ctx.Name(), errors.New("the queue pair belongs to another context"))
	}
	if r.life.Closed() {
		return nil, opErr(op, r.ctx.Name(), net.ErrClosed)
	}
	d, err := p.param(q)
	if err != nil {
		return nil, err
	}
	err = r.finish(op, func() error {
		conn, err = q.connected(func(dq driver.QP) (driver.CMConn, error) { return r.drv.Accept(ctx, dq, d) })
		if err != nil {
			r.drv.Close()
		}
		return err
	})
	return conn, err
}

// Reject refuses the request, with up to 148 bytes for the program on the other side (255 on iWARP), which gets them with the
// error of its Dial.
func (r *Request) Reject(privateData []byte) error {
	return r.finish("rdma_reject", func() error { return errors.Join(r.drv.Reject(privateData), r.drv.Close()) })
}

// Close refuses a request that was not answered. After an answer it does nothing.
func (r *Request) Close() error {
	return opErr("rdma_destroy_id", r.ctx.Name(), r.life.Close(r.drv.Close))
}

// A CMConn is a connection of a queue pair. It is safe for concurrent use. The queue pair cannot be closed before it, and is to be reset
// for something else behind Close only: on the kernel's devices the end of the connection takes it to Err whatever it is by then.
type CMConn struct {
	life life.Node
	drv  driver.CMConn
	q    *QP
}

// Dial connects q, an RC queue pair in state Reset or Init, with who listens on remote, and takes it to RTS. local is the address
// to dial from, of the device's network interface; the zero AddrPort leaves it to the routing table, and port 0 to the system.
// ctx bounds all of it; without a deadline the system gives up on a silent peer after about a minute, the software NIC after 7 s.
//
// A refusal matches syscall.ECONNREFUSED, and RejectData has what the peer has said to it; an address that cannot be reached, or
// that leads to another RDMA device, matches verbs.ErrUnreachable. After a failure q may be in any state: Reset it if the device
// can, or Close it. Over iWARP, Close of a queue pair whose Dial was ended by ctx may wait until TCP gives up on the peer.
//
// It fails with errors.ErrUnsupported on devices without a connection manager.
func (q *QP) Dial(ctx context.Context, local, remote netip.AddrPort, p CMParams) (*CMConn, error) {
	const op = "rdma_connect"
	m, err := connManager(q.pd.Context(), op)
	if err != nil {
		return nil, err
	}
	d, err := p.param(q)
	if err != nil {
		return nil, err
	}
	conn, err := q.connected(func(dq driver.QP) (driver.CMConn, error) { return m.CMDial(ctx, dq, local, remote, d) })
	return conn, q.err(op, err)
}

// connected makes the connection of q that connect makes.
func (q *QP) connected(connect func(driver.QP) (driver.CMConn, error)) (*CMConn, error) {
	if q.typ != ib.RC {
		return nil, fmt.Errorf("only RC queue pairs are connected so: %w", errors.ErrUnsupported)
	}
	c := &CMConn{q: q}
	if err := c.life.Attach(&q.life); err != nil {
		return nil, err
	}
	var err error
	if c.drv, err = connect(q.drv); err != nil {
		c.life.Abandon()
		return nil, err
	}
	life.Watch(c, &c.life, "qp.CMConn", q.pd.Context().Name())
	return c, nil
}

// RejectData returns what the peer has said to its refusal of a Dial, and whether err is one by the peer's program.
func RejectData(err error) (data []byte, ok bool) {
	var r driver.CMRejection
	if !errors.As(err, &r) || !r.ByPeer() {
		return nil, false
	}
	return r.Data(), true
}

// QP returns the queue pair.
func (c *CMConn) QP() *QP { return c.q }

// PrivateData is what the peer has sent with its acceptance; nil on the side that has accepted. On InfiniBand and RoCE it is as
// long as the message can carry, with zeros at its end. It is the caller's.
func (c *CMConn) PrivateData() []byte { return c.drv.PrivateData() }

// LocalAddr is this side's address.
func (c *CMConn) LocalAddr() netip.AddrPort { return c.drv.LocalAddr() }

// RemoteAddr is the peer's address.
func (c *CMConn) RemoteAddr() netip.AddrPort { return c.drv.RemoteAddr() }

// Done is closed when the connection is over: either side has disconnected, the peer's process has ended, or the device has gone.
// The queue pair is in Err then, and what was posted to it completes with ib.WCFlushErr. That a peer's host has vanished is
// noticed by requests that fail, not here; so is the end of a process that was the peer's software NIC, unless it has closed the
// connection.
func (c *CMConn) Done() <-chan struct{} { return c.drv.Done() }

// Err is nil until Done is closed, and says why then.
func (c *CMConn) Err() error { return c.q.err("connection", c.drv.Err()) }

// Disconnect ends the connection: the queue pair goes to Err, and the peer is told; requests that are to arrive must have completed
// before. It does not wait for the peer: Done does. It may be called again.
func (c *CMConn) Disconnect() error {
	if c.life.Closed() {
		return nil
	}
	return c.q.err("rdma_disconnect", c.drv.Disconnect())
}

// Close disconnects, unless that has happened, and frees the connection. The queue pair is left in Err, and can be closed.
func (c *CMConn) Close() error {
	return c.q.err("rdma_destroy_id", c.life.Close(c.drv.Close))
}
