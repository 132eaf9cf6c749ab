package rdmacm

import (
	"context"
	"net/netip"
	"sync"
)

// DefaultBacklog is how many requests wait for Accept if Listen is not told.
const DefaultBacklog = 128

// A Listener takes requests for a port. It is safe for concurrent use.
type Listener struct {
	id    *ID
	queue chan *Request

	mu     sync.Mutex
	closed bool // nothing goes into queue any more
}

// A Request is the passive end of a connection that a peer asks for. It has to be answered with Accept or Reject, or
// closed. Until Accept the kernel reports nothing about it: a peer that has given up is noticed by Accept failing.
type Request struct {
	*ID
	Conn ConnParam // port space TCP: the peer's
	UD   UDParam   // port space UDP: only its PrivateData
}

// Listen makes a bound ID a listener. Up to backlog requests wait for Accept, and as many in the kernel if they come fast
// (0: DefaultBacklog; the kernel's own limit is the sysctl net.rdma_ucm.max_backlog); further ones are rejected. The ID
// belongs to the Listener then: close that.
func (id *ID) Listen(backlog int) (*Listener, error) {
	if backlog <= 0 {
		backlog = DefaultBacklog
	}
	backlog = min(backlog, 1<<16)
	l := &Listener{id: id, queue: make(chan *Request, backlog)}
	id.mu.Lock()
	if id.listener != nil {
		id.mu.Unlock()
		return nil, id.fail("listen", errWaiting)
	}
	id.listener = l // before the command: a request may be here before its return
	id.mu.Unlock()
	if err := id.do(listen(id.num, uint32(backlog))); err != nil {
		id.mu.Lock()
		id.listener = nil
		id.mu.Unlock()
		return nil, err
	}
	_, _ = id.QueryAddr() // which port it is, for Addr and errors
	return l, nil
}

// request takes a request that the kernel reports for a listener. It reports whether somebody has the new ID now.
func (id *ID) request(ev *event) bool {
	id.mu.Lock()
	l := id.listener
	id.mu.Unlock()
	if l == nil {
		return false
	}
	var r Request
	var err error
	if id.ps == UDP {
		// The kernel leaves the rest of the union as it was, or zero.
		r.UD.PrivateData = ev.udPrivateData()
	} else if r.Conn, err = ev.conn(); err != nil {
		return false
	}
	if r.ID, err = id.ch.register(id.ps); err != nil {
		return false
	}
	r.ID.num = ev.id
	l.mu.Lock()
	if !l.closed {
		select {
		case l.queue <- &r:
			l.mu.Unlock()
			return true
		default:
		}
	}
	l.mu.Unlock()
	_ = r.ID.Close()
	return true
}

// Accept waits for a request. It ends with the context, with net.ErrClosed on Close, and with driver.ErrDeviceRemoved if
// the listener's device goes.
func (l *Listener) Accept(ctx context.Context) (*Request, error) {
	select {
	case <-l.id.done:
		return nil, l.fail()
	case <-ctx.Done():
		return nil, l.id.fail("accept", ctx.Err())
	default:
	}
	select {
	case r := <-l.queue:
		_, _ = r.QueryAddr() // for the errors to come; that the peer or the device has gone shows later
		return r, nil
	case <-ctx.Done():
		return nil, l.id.fail("accept", ctx.Err())
	case <-l.id.done:
		return nil, l.fail()
	}
}

func (l *Listener) fail() error {
	l.id.mu.Lock()
	cause := l.id.cause
	l.id.mu.Unlock()
	return l.id.fail("accept", cause)
}

// Addr is the address that it listens on, with the port that the kernel has chosen if it had to.
func (l *Listener) Addr() netip.AddrPort {
	l.id.mu.Lock()
	defer l.id.mu.Unlock()
	return l.id.local
}

// ID is the listener's own ID, for QueryAddr.
func (l *Listener) ID() *ID { return l.id }

// Close ends the listener. Requests that nobody has accepted are rejected; those that Accept has returned go on. It may be
// called again.
func (l *Listener) Close() error { return l.id.Close() }

// drain closes the requests that wait.
func (l *Listener) drain() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	for {
		select {
		case r := <-l.queue:
			_ = r.Close()
		default:
			return
		}
	}
}

// Accept answers the request with this side's QP, which must be in RTS (on iWARP: exist), and waits until the peer has
// confirmed; it is ErrDisconnected if the peer has ended the connection before that arrived. For datagrams there is nothing
// to wait for. If it fails, the request can only be closed.
func (r *Request) Accept(ctx context.Context, p ConnParam) error {
	limit := MaxPrivateData
	if r.ps == UDP {
		limit = MaxUDPAcceptData
	}
	c, err := accept(r.num, r.uid, &p, limit)
	if err != nil {
		return r.fail("accept", err)
	}
	if r.ps == UDP {
		return r.do(c)
	}
	_, err = r.perform(ctx, c, EventEstablished, EventEstablished)
	return err
}
