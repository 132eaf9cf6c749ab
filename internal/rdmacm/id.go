package rdmacm

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// An ID is one end of a connection, from its address on, or a listener. Methods may be called from any goroutine, but of
// those that wait (they have a context) only one at a time: a second one is refused with driver.ErrBusy. When its context
// ends a wait, the ID can only be closed: ErrAbandoned.
type ID struct {
	ch  *Channel
	ps  PortSpace
	uid uint64
	num uint32 // the kernel's; fixed before anybody has the ID

	done        chan struct{} // closed with cause set
	timewait    chan struct{}
	addrChanged chan struct{}
	gone        chan struct{} // closed when the kernel's ID is destroyed

	mu            sync.Mutex
	local, remote netip.AddrPort // for errors
	refs          int            // commands that the kernel is at, and one until Close. The last one destroys
	connecting    bool           // a CONNECT was made, and nothing has come of it yet
	closed        bool
	abandoned     bool
	wait          *waiter
	cause         error     // why done is closed
	destroyErr    error     // of DESTROY_ID; valid when gone is closed
	listener      *Listener // set by Listen
}

// A waiter is an operation that waits for an event.
type waiter struct {
	want EventType
	alt  EventType
	got  chan outcome  // of capacity 1
	ran  chan struct{} // closed when the command has returned
}

type outcome struct {
	ev  *event
	err error
}

// DefaultTimeout is how long the kernel tries to resolve an address or a route if the context has no deadline.
const DefaultTimeout = 30 * time.Second

// kernelTimeout is how long the kernel may try, in ms: a little longer than the context, so that it is the context that ends.
func kernelTimeout(ctx context.Context) uint32 {
	d := DefaultTimeout
	if t, ok := ctx.Deadline(); ok {
		d = max(time.Until(t), 0) + time.Second
	}
	return uint32(min(d.Milliseconds(), 1<<30))
}

// fail wraps an error of an operation.
func (id *ID) fail(op string, err error) error {
	if err == nil {
		return nil
	}
	id.mu.Lock()
	defer id.mu.Unlock()
	return &OpError{Op: op, Local: id.local, Remote: id.remote, Err: err}
}

// acquire keeps the kernel's number valid until release: a number that was destroyed is soon another ID's.
func (id *ID) acquire() error {
	id.mu.Lock()
	defer id.mu.Unlock()
	return id.acquireLocked()
}

func (id *ID) acquireLocked() error {
	if id.closed || errors.Is(id.cause, errClosed) {
		return errClosed
	}
	id.refs++
	return nil
}

func (id *ID) release() {
	id.mu.Lock()
	id.refs--
	last := id.refs == 0
	id.mu.Unlock()
	if last {
		id.destroyErr = id.ch.destroy(id.num)
		close(id.gone)
	}
}

// do runs a command that leads to no event.
func (id *ID) do(c *command) error {
	if err := id.acquire(); err != nil {
		return id.fail(c.op, err)
	}
	defer id.release()
	return id.fail(c.op, id.ch.k.do(c))
}

// perform runs a command and waits for the event want, or alt, that it leads to.
func (id *ID) perform(ctx context.Context, c *command, want, alt EventType) (*event, error) {
	if err := ctx.Err(); err != nil {
		return nil, id.fail(c.op, err)
	}
	w, err := id.begin(c, want, alt)
	if err != nil {
		return nil, id.fail(c.op, err)
	}
	if c.code == abi.RDMA_USER_CM_CMD_CONNECT {
		// siw makes its TCP connection inside of this command, which may take minutes.
		go id.run(c, w)
	} else {
		id.run(c, w)
	}
	o, came := id.outcome(ctx, w)
	id.mu.Lock()
	id.wait = nil
	if came {
		id.connecting = false
	} else {
		id.abandoned = true
	}
	id.mu.Unlock()
	return o.ev, id.fail(c.op, o.err)
}

// outcome waits for what comes of an operation. If the context or Close ends the wait, nothing has come yet.
func (id *ID) outcome(ctx context.Context, w *waiter) (o outcome, came bool) {
	select {
	case o = <-w.got:
	case <-id.done:
		select {
		case o = <-w.got: // the event came first, or is the reason
		default:
			return outcome{err: id.cause}, false
		}
	case <-ctx.Done():
		select {
		case o = <-w.got:
		default:
			return outcome{err: ctx.Err()}, false
		}
	}
	// The kernel holds events back while it is at the ID's command, so this takes no time. It lets Close be sure that no
	// command is left.
	<-w.ran
	return o, true
}

// begin claims the ID for an operation that waits.
func (id *ID) begin(c *command, want, alt EventType) (*waiter, error) {
	id.mu.Lock()
	defer id.mu.Unlock()
	switch {
	case id.closed:
		return nil, errClosed
	case id.cause != nil:
		return nil, id.cause
	case id.abandoned:
		return nil, ErrAbandoned
	case id.wait != nil:
		return nil, errWaiting
	}
	if err := id.acquireLocked(); err != nil {
		return nil, err
	}
	id.connecting = c.code == abi.RDMA_USER_CM_CMD_CONNECT // again false when its outcome is known
	w := &waiter{want: want, alt: alt, got: make(chan outcome, 1), ran: make(chan struct{})}
	id.wait = w
	return w, nil
}

// run runs a command that leads to an event. Its own failure is the outcome.
func (id *ID) run(c *command, w *waiter) {
	err := id.ch.k.do(c)
	if err != nil {
		w.give(outcome{err: err})
	}
	id.release()
	close(w.ran)
}

// give hands the outcome over, if it is the first.
func (w *waiter) give(o outcome) {
	select {
	case w.got <- o:
	default:
	}
}

// handle takes an event from the channel's goroutine.
func (id *ID) handle(ev *event) {
	id.mu.Lock()
	defer id.mu.Unlock()
	switch ev.kind {
	case EventAddrError, EventRouteError: // the ID can still try another
		if id.wait != nil {
			id.wait.give(outcome{err: ev.failure(id.ps)})
		}
	case EventConnectError, EventUnreachable, EventRejected:
		// Of a connection that exists: the peer's address has moved to another host, says UNREACHABLE.
		id.overLocked(ev.failure(id.ps))
	case EventDisconnected:
		id.overLocked(ErrDisconnected)
	case EventDeviceRemoval:
		id.overLocked(driver.ErrDeviceRemoved)
	case EventTimewaitExit:
		closeOnce(id.timewait)
		id.overLocked(ErrTimewaitExit)
	case EventAddrChange:
		closeOnce(id.addrChanged)
	default:
		if w := id.wait; w != nil && (ev.kind == w.want || ev.kind == w.alt) {
			w.give(outcome{ev: ev})
		}
	}
}

// overLocked ends the connection, and with it the operation that waits, because of an event.
func (id *ID) overLocked(cause error) {
	if id.wait != nil {
		id.wait.give(outcome{err: cause})
	}
	id.endLocked(cause)
}

// closeOnce closes c. The ID's lock is held.
func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

func (id *ID) end(cause error) {
	id.mu.Lock()
	defer id.mu.Unlock()
	id.endLocked(cause)
}

func (id *ID) endLocked(cause error) {
	if id.cause == nil {
		id.cause = cause
		close(id.done)
	}
}

// Done is closed when the connection is over, or the ID of no more use: the peer or this side has disconnected, the device
// has gone, the ID was closed. Err says which. The ID still has to be closed; a QP has to be moved to Err by its owner.
func (id *ID) Done() <-chan struct{} { return id.done }

// Err is nil until Done is closed, and then why: it matches ErrDisconnected, ErrTimewaitExit, driver.ErrDeviceRemoved,
// driver.ErrUnreachable, net.ErrClosed, or is a *RejectedError.
func (id *ID) Err() error {
	id.mu.Lock()
	cause := id.cause
	id.mu.Unlock()
	return id.fail("connection", cause)
}

// TimewaitExit is closed when packets of a connection that is over cannot arrive any more, so that the number of its QP
// can be used again. Not if the ID is closed before.
func (id *ID) TimewaitExit() <-chan struct{} { return id.timewait }

// AddrChanged is closed when the net device below has got another hardware address, as it happens when a bond fails over.
// The connection goes on; whoever wants it to follow makes a new one.
func (id *ID) AddrChanged() <-chan struct{} { return id.addrChanged }

// Close destroys the ID: waits end with net.ErrClosed, a connection is torn down, a request that was not answered is
// rejected. After a Connect that nobody has answered the ID goes in the background: over iWARP the kernel destroys it when
// it has given up on the peer, and not before. It may be called again.
func (id *ID) Close() error {
	id.mu.Lock()
	if id.closed {
		id.mu.Unlock()
		return nil
	}
	id.closed = true
	connecting := id.connecting
	l := id.listener
	id.endLocked(errClosed)
	id.mu.Unlock()
	id.ch.forget(id.uid)
	if l != nil {
		l.drain()
	}
	if connecting {
		go id.release()
		return nil
	}
	id.release()
	<-id.gone
	return id.fail("destroy_id", id.destroyErr)
}

// Bind gives the ID a local address. With a wildcard address it can listen on all devices; port 0 lets the kernel choose.
// Active sides need it only to choose a port.
func (id *ID) Bind(a netip.AddrPort) error {
	c, err := bind(id.num, a)
	if err != nil {
		return &OpError{Op: "bind", Local: a, Err: err}
	}
	id.mu.Lock()
	id.local = a
	id.mu.Unlock()
	return id.do(c)
}

// ResolveAddr finds the device and the source address for a peer, and the peer's hardware address. src may be the zero
// AddrPort; with port 0 the kernel chooses one. The kernel tries until the context ends, at most DefaultTimeout without
// deadline. An error that matches driver.ErrUnreachable is the kernel's verdict, after which another address can be tried.
func (id *ID) ResolveAddr(ctx context.Context, src, dst netip.AddrPort) error {
	c, err := resolveAddr(id.num, src, dst, kernelTimeout(ctx))
	if err != nil {
		return &OpError{Op: "resolve_addr", Local: src, Remote: dst, Err: err}
	}
	id.mu.Lock()
	if src.IsValid() {
		id.local = src
	}
	id.remote = dst
	id.mu.Unlock()
	if _, err = id.perform(ctx, c, EventAddrResolved, EventAddrResolved); err == nil {
		_, _ = id.QueryAddr() // for the errors to come
	}
	return err
}

// ResolveRoute finds the way to the peer that ResolveAddr has found: on InfiniBand it asks the subnet manager. Timeouts are
// ResolveAddr's.
func (id *ID) ResolveRoute(ctx context.Context) error {
	_, err := id.perform(ctx, resolveRoute(id.num, kernelTimeout(ctx)), EventRouteResolved, EventRouteResolved)
	return err
}

// A Reply is the peer's answer to Connect.
type Reply struct {
	// Established is whether the connection is up: on iWARP, where the kernel has moved the QP to RTS, and for datagrams.
	// Otherwise, on InfiniBand and RoCE, the peer waits: move the QP through Init, RTR and RTS with InitQPAttr, and call
	// Establish; or Reject.
	Established bool
	Conn        ConnParam // port space TCP
	UD          UDParam   // port space UDP: the peer's QP
}

// Connect asks the peer that ResolveRoute has found the way to, and waits for its answer. A refusal is a *RejectedError; a
// peer that never answers matches driver.ErrUnreachable after the CM's own retries, about a minute, if the context does not
// end before. After either of these the ID can only be closed.
func (id *ID) Connect(ctx context.Context, p ConnParam) (*Reply, error) {
	limit := MaxPrivateData // what is too much for InfiniBand is not for iWARP: the kernel knows
	if id.ps == UDP {
		limit = MaxUDPConnectData
	}
	c, err := connect(id.num, &p, limit)
	if err != nil {
		return nil, id.fail("connect", err)
	}
	ev, err := id.perform(ctx, c, EventConnectResponse, EventEstablished)
	if err != nil {
		return nil, err
	}
	r := &Reply{Established: ev.kind == EventEstablished}
	if id.ps == UDP {
		r.UD, err = ev.ud()
	} else {
		r.Conn, err = ev.conn()
	}
	if err != nil {
		return nil, id.fail("connect", err)
	}
	return r, nil
}

// Establish completes a Connect whose reply was not Established: the peer is told that the QP is ready.
func (id *ID) Establish() error {
	c, err := accept(id.num, id.uid, nil, 0)
	if err != nil {
		return id.fail("establish", err)
	}
	return id.do(c)
}

// NotifyEstablished tells the kernel that the peer's first message has arrived on the QP (ib.EventCommEst) while the
// confirmation that Request.Accept waits for has not: it takes the message for it.
func (id *ID) NotifyEstablished() error { return id.do(notify(id.num, ib.EventCommEst)) }

// Reject refuses a request, or the answer of a peer, with up to MaxRejectData (MaxUDPRejectData, MaxPrivateData on iWARP)
// bytes for the program on the other side, and closes the ID.
func (id *ID) Reject(privateData []byte) error {
	limit := MaxPrivateData
	if id.ps == UDP {
		limit = MaxUDPRejectData
	}
	c, err := reject(id.num, privateData, limit)
	if err != nil {
		return id.fail("reject", err)
	}
	return errors.Join(id.do(c), id.Close())
}

// Disconnect ends the connection, or answers the peer that has ended it: until then, or Close, the peer's kernel goes on
// asking. Done is closed when the peer has answered, or does not. Move the QP to Err before.
func (id *ID) Disconnect() error { return id.do(disconnect(id.num)) }

// InitQPAttr returns what the QP has to be modified with to come to a state, Init, RTR or RTS: right after ResolveAddr only
// for Init, and then without access rights. The mask says what to set; on iWARP, for Init, the P_Key index is not in it.
func (id *ID) InitQPAttr(state ib.QPState) (ib.QPAttr, ib.QPAttrMask, error) {
	var resp abi.QPAttr
	if err := id.do(initQPAttr(id.num, state, &resp)); err != nil {
		return ib.QPAttr{}, 0, err
	}
	attr, mask, err := qpAttr(&resp, state)
	return attr, mask, id.fail("init_qp_attr", err)
}

// QueryAddr returns the ID's addresses and device.
func (id *ID) QueryAddr() (Addr, error) {
	var resp abi.CMQueryAddrResp
	if err := id.do(queryAddr(id.num, &resp)); err != nil {
		return Addr{}, err
	}
	a, err := addrOf(&resp)
	if err != nil {
		return Addr{}, id.fail("query_addr", err)
	}
	id.mu.Lock()
	if a.Local.IsValid() {
		id.local = a.Local
	}
	if a.Remote.IsValid() && !a.Remote.Addr().IsUnspecified() {
		id.remote = a.Remote
	}
	id.mu.Unlock()
	return a, nil
}

// SetTOS sets the type of service of the connection's packets, before ResolveRoute or Listen.
func (id *ID) SetTOS(tos uint8) error {
	return id.do(setOption("set_tos", id.num, abi.RDMA_OPTION_ID_TOS, []byte{tos}))
}

// SetReuseAddr lets the ID bind a port that another one with this option has, before Bind.
func (id *ID) SetReuseAddr(on bool) error {
	return id.do(setOption("set_reuseaddr", id.num, abi.RDMA_OPTION_ID_REUSEADDR, intValue(on)))
}

// SetAFOnly keeps a listener on an IPv6 wildcard address from taking IPv4, before Bind.
func (id *ID) SetAFOnly(on bool) error {
	return id.do(setOption("set_afonly", id.num, abi.RDMA_OPTION_ID_AFONLY, intValue(on)))
}

// SetAckTimeout sets the ACK timeout that InitQPAttr returns for RTS, before ResolveRoute. InfiniBand and RoCE have it, port
// space TCP.
func (id *ID) SetAckTimeout(t ib.AckTimeout) error {
	return id.do(setOption("set_ack_timeout", id.num, abi.RDMA_OPTION_ID_ACK_TIMEOUT, []byte{uint8(t)}))
}

func intValue(on bool) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(toByte(on))) }
