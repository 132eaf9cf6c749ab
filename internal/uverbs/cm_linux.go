package uverbs

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/rdmacm"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The kernel's connection manager, for the contexts of all kernel devices: driver.ConnManager. It knows queue pairs by their
// numbers only; what has to be done to them is done here. iWARP is different: there the kernel moves the queue pair itself, and
// the provider's has a method Moved.

// A movedQP is a queue pair that the kernel takes to RTS, and to Err, by itself.
type movedQP interface {
	// Moved says that the kernel has moved the queue pair to RTS, or that it can only have ended in Err. Outstanding requests
	// are flushed when it returns from the latter.
	Moved(ib.QPState)
}

// A connManager is a context's part of the connection manager. The zero value is ready; the kernel's file is opened on first use.
type connManager struct {
	mu        sync.Mutex
	ch        *rdmacm.Channel               // guarded by mu
	over      error                         // guarded by mu: why no more can be begun; nil while it can
	accepting map[driver.QP]*rdmacm.Request // guarded by mu: whose peer has yet to confirm
}

func (m *connManager) channel() (*rdmacm.Channel, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over != nil {
		return nil, m.over
	}
	if m.ch == nil {
		ch, err := rdmacm.Open()
		if err != nil {
			return nil, err
		}
		m.ch = ch
	}
	return m.ch, nil
}

func (m *connManager) close() {
	if ch := m.end(net.ErrClosed); ch != nil {
		ch.Close()
	}
}

// fail ends all listeners, connections, and waits, because of cause. The kernel does not do it where it knows of no device of theirs, as
// with listeners on a wildcard address, and does it late where it lets go of uverbs first.
func (m *connManager) fail(cause error) {
	if ch := m.end(cause); ch != nil {
		ch.Fail(cause)
	}
}

func (m *connManager) end(cause error) *rdmacm.Channel {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.over = cause
	return m.ch
}

// awaits remembers that q's peer has yet to confirm r, until the result is called.
func (m *connManager) awaits(q driver.QP, r *rdmacm.Request) (done func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.accepting == nil {
		m.accepting = map[driver.QP]*rdmacm.Request{}
	}
	m.accepting[q] = r
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.accepting, q)
	}
}

// commEst hears that q has received its first message: the peer's confirmation may have been lost.
func (m *connManager) commEst(q driver.QP) {
	m.mu.Lock()
	r := m.accepting[q]
	m.mu.Unlock()
	if r != nil {
		go r.NotifyEstablished() // the events' goroutine must not wait for the kernel; if it fails, the confirmation has come
	}
}

// newID makes an ID of the context's channel.
func (c *Context) newID() (*rdmacm.ID, error) {
	ch, err := c.cm.channel()
	if err != nil {
		return nil, err
	}
	return ch.NewID(rdmacm.TCP)
}

// takes checks that the connection manager has chosen this context's device for an ID.
func (c *Context) takes(a *rdmacm.Addr) error {
	mine := c.guid == 0 || a.NodeGUID == c.guid
	if a.HasDeviceIndex && c.index != nil {
		mine = a.DeviceIndex == *c.index // of several devices on one net device, some drivers give all one GUID
	}
	if !a.Bound || mine {
		return nil
	}
	other := fmt.Sprintf("the RDMA device with index %d", a.DeviceIndex)
	if !a.HasDeviceIndex { // of an old kernel, or an emulated one
		other = fmt.Sprintf("the RDMA device with node GUID %v", a.NodeGUID)
	}
	if list, err := Devices(); err == nil {
		for i := range list {
			named := ib.GUID(list[i].NodeGUID) == a.NodeGUID
			if a.HasDeviceIndex && list[i].HasIndex {
				named = list[i].Index == a.DeviceIndex
			}
			if named {
				other = list[i].Name
			}
		}
	}
	return &otherDeviceError{c.device, other, a.Local.Addr()}
}

// An otherDeviceError is an address that the connection manager takes to another device.
type otherDeviceError struct {
	device, other string
	local         netip.Addr
}

func (e *otherDeviceError) Error() string {
	return fmt.Sprintf("the connection manager takes %s for the address %v, not %s: it goes by the local address, and of several RDMA devices "+
		"on one net device takes the one that was made first. Open %[1]s, use an address of %[3]s's net device, or, if they share one, "+
		"give %[3]s a net device of its own", e.other, e.local, e.device)
}

func (e *otherDeviceError) Unwrap() error { return driver.ErrUnreachable }

// CMListen implements driver.ConnManager.
func (c *Context) CMListen(addr netip.AddrPort, backlog int) (driver.CMListener, error) {
	var l *rdmacm.Listener
	err := portRetry(addr.Port(), func() error {
		id, err := c.newID()
		if err != nil {
			return err
		}
		if l, err = c.listen(id, addr, backlog); err != nil {
			id.Close()
		}
		return err
	})
	if err != nil {
		return nil, c.explainNet(err)
	}
	return &cmListener{c, l}, nil
}

func (c *Context) listen(id *rdmacm.ID, addr netip.AddrPort, backlog int) (*rdmacm.Listener, error) {
	if err := id.Bind(addr); err != nil {
		return nil, err
	}
	a, err := id.QueryAddr()
	if err != nil {
		return nil, err
	}
	if err := c.takes(&a); err != nil {
		return nil, err
	}
	return id.Listen(backlog)
}

type cmListener struct {
	c *Context
	l *rdmacm.Listener
}

func (l *cmListener) Addr() netip.AddrPort { return l.l.Addr() }
func (l *cmListener) Close() error         { return l.l.Close() }

// Accept returns the next request for this device: a listener on a wildcard address hears of those for all.
func (l *cmListener) Accept(ctx context.Context) (driver.CMRequest, error) {
	for {
		r, err := l.l.Accept(ctx)
		if err != nil {
			return nil, err
		}
		a, err := r.QueryAddr()
		if err == nil {
			err = l.c.takes(&a)
		}
		if err != nil { // of another device, or the peer has gone
			r.Close()
			continue
		}
		return &cmRequest{c: l.c, r: r, addr: a}, nil
	}
}

type cmRequest struct {
	c    *Context
	r    *rdmacm.Request
	addr rdmacm.Addr
}

func (r *cmRequest) PrivateData() []byte             { return r.r.Conn.PrivateData }
func (r *cmRequest) LocalAddr() netip.AddrPort       { return r.addr.Local }
func (r *cmRequest) RemoteAddr() netip.AddrPort      { return r.addr.Remote }
func (r *cmRequest) Reject(privateData []byte) error { return r.r.Reject(privateData) }
func (r *cmRequest) Close() error                    { return r.r.Close() }

// Accept implements driver.CMRequest.
func (r *cmRequest) Accept(ctx context.Context, q driver.QP, p *driver.CMParam) (driver.CMConn, error) {
	id := r.r.ID
	err := r.c.cmInit(ctx, id, q, p)
	want := connParam(q, p)
	want.InitiatorDepth = min(want.InitiatorDepth, r.r.Conn.InitiatorDepth) // what the peer serves
	want.ResponderResources = min(want.ResponderResources, r.r.Conn.ResponderResources)
	moved, byKernel := q.(movedQP)
	if err == nil && !byKernel {
		err = r.c.cmConnect(ctx, id, q, p)
	}
	if err != nil {
		id.Close()
		return nil, err
	}
	settled := r.c.cm.awaits(q, r.r)
	err = r.r.Accept(ctx, want)
	settled()
	if err != nil {
		id.Close()
		cmEnd(q)
		return nil, err
	}
	if byKernel {
		moved.Moved(ib.RTS)
	}
	return r.c.newConn(id, q, r.addr, nil), nil
}

// CMDial implements driver.ConnManager.
func (c *Context) CMDial(ctx context.Context, q driver.QP, src, dst netip.AddrPort, p *driver.CMParam) (driver.CMConn, error) {
	if err := connectable(q); err != nil { // before the network is bothered
		return nil, err
	}
	var conn *cmConn
	err := portRetry(src.Port(), func() error {
		id, err := c.newID()
		if err != nil {
			return err
		}
		if conn, err = c.dial(ctx, id, q, src, dst, p); err != nil {
			id.Close()
		}
		return err
	})
	if err != nil {
		return nil, c.explainNet(err)
	}
	return conn, nil
}

// maxPortTries bounds how often another port is tried. Where half of all are taken, as many are in vain once in 65,536 times.
const maxPortTries = 16

// portRetry calls f again, unless the port is one that was asked for, while it fails because of the one that the kernel has chosen.
//
// Over iWARP a connection of the connection manager's is one of TCP's, but the two have ports of their own: rdma_cm takes at random one
// that none of its IDs has (cma_alloc_any_port), whatever TCP does with it. Where a connection between the same addresses and ports is not
// over yet, as siw closes the socket in its own time when the ID has gone, TCP answers EADDRNOTAVAIL; where a socket of another kind has
// the port, EADDRINUSE. TCP itself looks for another port then (__inet_hash_connect); who uses librdmacm has to begin again, too.
func portRetry(port uint16, f func() error) error {
	for try := 1; ; try++ {
		err := f()
		if err == nil || port != 0 || try == maxPortTries || !portTaken(err) {
			return err
		}
	}
}

// portTaken reports whether it was the port that kept TCP from connecting or listening. Nothing has become of the queue pair then.
func portTaken(err error) bool {
	var op *rdmacm.OpError
	if !errors.As(err, &op) || op.Op != "connect" && op.Op != "listen" {
		return false
	}
	errno, ok := op.Err.(syscall.Errno) // else the kernel has said it of a connection later
	return ok && (errno == unix.EADDRNOTAVAIL || errno == unix.EADDRINUSE)
}

func (c *Context) dial(ctx context.Context, id *rdmacm.ID, q driver.QP, src, dst netip.AddrPort, p *driver.CMParam) (*cmConn, error) {
	if err := id.ResolveAddr(ctx, src, dst); err != nil {
		return nil, err
	}
	a, err := id.QueryAddr()
	if err != nil {
		return nil, err
	}
	if err := c.takes(&a); err != nil {
		return nil, err
	}
	if err := id.ResolveRoute(ctx); err != nil {
		return nil, err
	}
	if err := c.cmInit(ctx, id, q, p); err != nil {
		return nil, err
	}
	reply, err := id.Connect(ctx, connParam(q, p))
	if err != nil {
		if m, byKernel := q.(movedQP); byKernel && !portTaken(err) {
			m.Moved(ib.Err) // it may be there, and can be nowhere else for long
		}
		return nil, err
	}
	if m, byKernel := q.(movedQP); byKernel {
		m.Moved(ib.RTS)
	}
	if !reply.Established {
		err := c.cmConnect(ctx, id, q, p)
		if err == nil {
			err = id.Establish()
		}
		if err != nil {
			cmEnd(q)
			return nil, err
		}
	}
	return c.newConn(id, q, a, reply.Conn.PrivateData), nil
}

// connParam is p for the kernel.
func connParam(q driver.QP, p *driver.CMParam) rdmacm.ConnParam {
	return rdmacm.ConnParam{
		QPN: q.QPN(), PrivateData: p.PrivateData, SRQ: p.SRQ, ResponderResources: p.MaxDestRdAtomic, InitiatorDepth: p.MaxRdAtomic,
		RetryCount: p.RetryCount, RNRRetryCount: p.RNRRetry,
	}
}

// connectable returns why q cannot be connected in the state that it is in.
func connectable(q driver.QP) error {
	now, err := q.Query()
	if err == nil && now.State != ib.Reset && now.State != ib.Init {
		err = fmt.Errorf("%w, and has to be in RESET or INIT to be connected", driver.StateErr(now.State))
	}
	return err
}

// cmInit takes q to Init.
func (c *Context) cmInit(ctx context.Context, id *rdmacm.ID, q driver.QP, p *driver.CMParam) error {
	if err := connectable(q); err != nil {
		return err
	}
	now, err := q.Query()
	if err != nil {
		return err
	}
	attr, mask, err := id.InitQPAttr(ib.Init)
	if err != nil {
		return err
	}
	attr.Access = p.Access // the connection manager's word depends on what it has said to the peer
	if mask |= ib.AttrAccess; now.State == ib.Init && p.Access == 0 {
		mask &^= ib.AttrAccess
	}
	return q.Modify(ctx, &attr, mask)
}

// cmConnect takes q from Init to RTS. The peer is known.
func (c *Context) cmConnect(ctx context.Context, id *rdmacm.ID, q driver.QP, p *driver.CMParam) error {
	rtr, rtrMask, err := id.InitQPAttr(ib.RTR)
	if err != nil {
		return err
	}
	rtr.MaxDestRdAtomic = min(rtr.MaxDestRdAtomic, p.MaxDestRdAtomic)
	rtr.MinRNRTimer = p.MinRNRTimer // the connection manager's is the longest
	if err := q.Modify(ctx, &rtr, rtrMask); err != nil {
		return err
	}
	rts, rtsMask, err := id.InitQPAttr(ib.RTS)
	if err != nil {
		return err
	}
	rts.MaxRdAtomic = min(rts.MaxRdAtomic, p.MaxRdAtomic)
	return q.Modify(ctx, &rts, rtsMask)
}

// cmEnd moves q, which is connected or on its way there, to Err: what is posted flushes. If that fails, it is closed, or its
// device has gone.
func cmEnd(q driver.QP) {
	if m, byKernel := q.(movedQP); byKernel {
		m.Moved(ib.Err)
		return
	}
	q.Modify(context.Background(), &ib.QPAttr{State: ib.Err}, ib.AttrState)
}

// A cmID is what a connection needs of its rdmacm.ID.
type cmID interface {
	Disconnect() error
	Done() <-chan struct{}
	Err() error
	Close() error
}

type cmConn struct {
	id   cmID
	q    driver.QP
	addr rdmacm.Addr
	data []byte
	done chan struct{}
	err  error // valid once done is closed

	ending sync.Mutex // held by Disconnect and Close: behind Close, the queue pair may be another connection's
}

func (c *Context) newConn(id cmID, q driver.QP, a rdmacm.Addr, data []byte) *cmConn {
	n := &cmConn{id: id, q: q, addr: a, data: data, done: make(chan struct{})}
	go n.watch()
	return n
}

// watch waits for the end of the connection.
func (n *cmConn) watch() {
	defer close(n.done)
	<-n.id.Done()
	n.err = n.id.Err()
	cmEnd(n.q)
	if errors.Is(n.err, rdmacm.ErrDisconnected) {
		n.id.Disconnect() // the answer, without which the peer's kernel goes on asking. If it was this side, there is none to give
	}
}

func (n *cmConn) PrivateData() []byte        { return n.data }
func (n *cmConn) LocalAddr() netip.AddrPort  { return n.addr.Local }
func (n *cmConn) RemoteAddr() netip.AddrPort { return n.addr.Remote }
func (n *cmConn) Done() <-chan struct{}      { return n.done }

// Err implements driver.CMConn.
func (n *cmConn) Err() error {
	select {
	case <-n.done:
		return n.err
	default:
		return nil
	}
}

// Disconnect implements driver.CMConn.
func (n *cmConn) Disconnect() error {
	n.ending.Lock()
	defer n.ending.Unlock()
	return n.disconnect()
}

func (n *cmConn) disconnect() error {
	if n.over() {
		return nil
	}
	cmEnd(n.q)
	if err := n.id.Disconnect(); err != nil && !n.over() {
		return err
	}
	return nil
}

// over reports whether the connection's end is known.
func (n *cmConn) over() bool {
	select {
	case <-n.id.Done():
		return true
	default:
		return false
	}
}

// Close implements driver.CMConn. What the kernel says to the disconnect is no reason to keep the connection: it may know of an
// end, by the peer or with the device, of which the event has not come here yet.
func (n *cmConn) Close() error {
	n.ending.Lock()
	defer n.ending.Unlock()
	n.disconnect()
	err := n.id.Close()
	<-n.done
	return err
}
