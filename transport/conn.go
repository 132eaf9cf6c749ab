package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Handler gets the messages of a connection. Its methods run on the polling goroutine, one at a time: they must not
// block or panic, and must not call anything that waits (Send, Alloc, Recv, Read, Close, Poller.Wait and so on). TryAlloc, Post,
// PostMore, Flush, Batch.Start, Message.Take, Release and Abort are allowed.
type Handler interface {
	// HandleMessage gets the next message; m is lent until it returns, see Message.Take.
	HandleMessage(c *Conn, m *Message)
	// HandleClose is called once, after the last message, with the reason; see Conn.Err.
	HandleClose(c *Conn, err error)
}

// An EOFHandler is a Handler that wants to know when the peer has called CloseWrite: no more messages come, but the
// peer may still receive.
type EOFHandler interface {
	HandleEOF(c *Conn)
}

// A Conn is a connection to a peer, that carries messages both ways in order, and one-sided operations. It is safe for
// concurrent use by any number of goroutines. Make one with Dial or Listener.Accept.
type Conn struct {
	p        *Poller
	cfg      *Config
	q        *qp.QP
	qpn      ib.QPN
	tcp      net.Conn
	sgid     int // index of the own GID
	udpSGID  int // and of the one for UDP, if that was offered
	viaUDP   bool
	viaTCP   bool
	noUDP    error        // why it was not offered, though it may be
	narrow   string       // what was found out about its path MTU, if it is less than the devices'
	udpTo    *ib.AHAttr   // with viaUDP: the peer
	udpQPN   ib.QPN       // its queue pair
	udpMTU   ib.MTU       // of the path
	cm       *qp.CMConn   // nil: the queue pair was connected by hand
	peerSync mr.RemoteKey // with cm: see Batch.seal
	peer     PeerInfo
	path     PathInfo

	idx    uint32
	gen    uint8
	idBase uint64 // idSend, with low zero
	cqNeed int

	maxMessage int
	eager      int // payload of the messages that we may send at once: the peer's slots
	inline     int // payload of the messages that travel inside the work request
	rndvMax    int

	snd   sendSide
	rcv   recvSide
	slots []Message // own receive slots; empty with a shared queue

	grantMu     sync.Mutex
	grants      map[*Grant]struct{} // that have not ended
	grantsEnded bool                // with the connection

	closeOnce sync.Once
	unrefOnce sync.Once
	failMu    sync.Mutex
	err       *CloseError // why it ended; guarded by failMu
	started   bool        // the handshake is done; guarded by failMu
	// cause is what the peer refused first; it is why the connection ends, unless the peer turns out to be dead. Written once.
	cause     atomic.Pointer[CloseError]
	ended     atomic.Bool // err is set
	done      chan struct{}
	tcpMu     sync.Mutex // writes
	tcpReader sync.WaitGroup
}

// PeerInfo is what the peer said of itself in the handshake.
type PeerInfo struct {
	Name        string
	PrivateData []byte
	Host        HostInfo
	Devices     []PeerDevice
}

// PeerDevice is a device of the peer's; the first is the one that the connection uses.
type PeerDevice struct {
	Provider string
	Name     string
	GID      ib.GID
}

// PathInfo says how a connection reaches its peer, and why not better.
type PathInfo struct {
	Rung     string // the path's name: "inproc", "shm", "udp", "tcp", "roce"
	Device   string // the local device
	Provider string
	SameHost bool // the peer is on this host
	// Reasons say why better paths or devices were not taken, one sentence each.
	Reasons []string
}

func (i PathInfo) String() string {
	s := fmt.Sprintf("%s over %s (%s)", i.Rung, i.Device, i.Provider)
	for _, r := range i.Reasons {
		s += "; " + r
	}
	return s
}

// Poller is what drives the connection.
func (c *Conn) Poller() *Poller { return c.p }

// PD is the protection domain that memory for the connection's one-sided operations is registered in.
func (c *Conn) PD() *verbs.PD { return c.p.pd }

// Path says how the peer is reached.
func (c *Conn) Path() PathInfo { return c.path }

// Peer is what the peer said of itself.
func (c *Conn) Peer() PeerInfo { return c.peer }

// LocalAddr is the bootstrap connection's own address.
func (c *Conn) LocalAddr() net.Addr { return c.tcp.LocalAddr() }

// RemoteAddr is the bootstrap connection's peer address.
func (c *Conn) RemoteAddr() net.Addr { return c.tcp.RemoteAddr() }

// MaxMessage is the length in bytes of the longest message, agreed with the peer.
func (c *Conn) MaxMessage() int { return c.maxMessage }

// EagerSize is the length in bytes of the longest message that is sent at once; longer ones go by rendezvous.
func (c *Conn) EagerSize() int { return c.eager }

// InlineSize is the length in bytes of the longest message that travels inside the work request.
func (c *Conn) InlineSize() int { return c.inline }

// MaxInline is the number of bytes that WriteBytes can write.
func (c *Conn) MaxInline() int { return c.snd.maxInline }

// Done is closed when the connection has ended and its resources are given back.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err is nil while the connection works, and then says why it ended: a *CloseError that matches ErrPeerClosed,
// ErrPeerDied, ErrProtocol, net.ErrClosed after a local Close, or the status of the failed operation.
func (c *Conn) Err() error {
	c.failMu.Lock()
	defer c.failMu.Unlock()
	if c.err == nil {
		return nil
	}
	return c.err
}

// newConn makes a connection's queue pair in state Init, with the receives posted. The reference to the poller is the
// caller's until the Conn has started.
func newConn(ctx context.Context, p *Poller, cfg *Config) (c *Conn, err error) {
	c = &Conn{p: p, cfg: cfg, done: make(chan struct{})}
	depth := 2*cfg.SendDepth + 2*cfg.RendezvousDepth + 32
	if p.attr.MaxQPWR > 0 {
		depth = min(depth, p.attr.MaxQPWR)
	}
	receives := c.rcv.size(cfg)
	if err := p.join(c, depth+receives); err != nil {
		return nil, err
	}
	c.idBase = makeID(idSend, c.gen, c.idx, 0)
	defer func() {
		if err != nil {
			c.discard()
			c = nil
		}
	}()
	qc := &qp.Config{Type: ib.RC, SendCQ: p.cq, SendDepth: depth, MaxInline: wantInline}
	if p.attr.MaxInline > 0 {
		qc.MaxInline = min(wantInline, p.attr.MaxInline)
	}
	if cfg.SharedReceive {
		if qc.SRQ, err = p.srq.join(p, receives, cfg.EagerSize); err != nil {
			return c, err
		}
		c.rcv.shared = receives
	} else {
		qc.RecvDepth = receives
	}
	if c.q, err = qp.New(p.pd, qc); err != nil {
		return c, err
	}
	c.qpn = c.q.QPN()
	if err := c.q.Init(ctx, 1, ib.AccessRemote); err != nil {
		return c, err
	}
	if cfg.SharedReceive {
		p.srq.bind(c)
	} else if err := c.fillRing(receives); err != nil {
		return c, err
	}
	return c, c.snd.init(c, depth)
}

// discard frees a connection that was never started. The peer may have sent already, if the queue pair was connected.
func (c *Conn) discard() {
	e := &CloseError{Err: net.ErrClosed}
	c.fail(e) // what has come is not read any more, nor answered
	if c.q != nil {
		c.quiesce(e)
	}
	c.closeCM()
	if c.q != nil {
		c.q.Close()
	}
	c.release(e)
}

// start begins service after the handshake: the peer may have sent already.
func (c *Conn) start() {
	c.tcpReader.Add(1)
	go c.watchPeer()
	c.failMu.Lock()
	c.started = true
	e := c.err
	c.failMu.Unlock()
	if e != nil {
		go c.teardown(e)
	}
}

// SetHandler makes h get the connection's messages from now on, those first that have come already. It may be called
// once, and not after Recv. If the connection has ended by then, h still gets what came before, and HandleClose.
func (c *Conn) SetHandler(h Handler) {
	c.p.Do(func() {
		r := &c.rcv
		if r.handler != nil {
			return
		}
		if r.closed { // too late for the poller to call it
			c.deliverQueued(h)
			h.HandleClose(c, c.Err())
			return
		}
		c.p.addDuties(1)
		c.deliverQueued(h)
		r.handler = h
		if r.eofSeen { // r.eof is not enough: messages before the EOS may still be read, and endOfStream comes after them
			if e, ok := h.(EOFHandler); ok {
				e.HandleEOF(c)
			}
		}
	})
}

// CloseWrite ends the sending side: what was accepted by Send and Post before still goes out, and then the peer's Recv
// returns io.EOF, or its HandleEOF is called. Messages can still be received, and one-sided operations done. It does not
// wait. A second call does nothing.
func (c *Conn) CloseWrite() error {
	s := &c.snd
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	if !s.closing {
		s.closing = true
		s.eosDue = true
		c.drainLocked()
		s.wakeAllLocked()
	}
	return nil
}

// Close ends the connection in an orderly way: it sends what was accepted before, waits until the peer's device has it
// (for at most Config.Linger), and frees everything. Operations in progress, here and at the peer's, end with an error;
// here it matches net.ErrClosed. The memory of one-sided operations is no longer touched when they return.
//
// Every Conn must be closed, also one that has ended by itself: until then it keeps its poller, and so the PD that the
// program's memory is registered in. The last Close of a poller that Dial or Listen made closes that, too; it fails with
// verbs.ErrBusy if memory registered in PD() is still open: close it, and call Close again. Close must not be called by a
// Handler: use Abort there, or another goroutine.
func (c *Conn) Close() error {
	c.closeOnce.Do(func() {
		if c.CloseWrite() == nil {
			ctx, cancel := context.WithTimeout(context.Background(), c.cfg.Linger)
			defer cancel()
			var w Waiter
			s := &c.snd
			s.mu.Lock()
			if c.idleLocked() || s.err != nil {
				w.Done()
			} else {
				s.drained = &w
			}
			s.mu.Unlock()
			if c.p.Wait(ctx, &w) != nil {
				s.mu.Lock()
				s.drained = nil
				s.mu.Unlock()
			}
		}
		c.fail(&CloseError{Err: net.ErrClosed})
	})
	<-c.done
	c.dropQueue()
	c.unrefOnce.Do(c.p.unretain)
	return c.p.closeUnused()
}

// Abort ends the connection at once; reason (which may be nil) is told to the peer. It does not wait: Done tells when
// the connection has ended. Close is still to be called. Handlers may call Abort.
func (c *Conn) Abort(reason error) {
	e := &CloseError{Err: net.ErrClosed}
	if reason != nil {
		e.Reason = reason.Error()
	}
	c.fail(e)
}

// fail ends the connection with a reason; the first one counts. It does not block, and may be called under any lock
// but failMu.
func (c *Conn) fail(err error) {
	var e *CloseError
	if !errors.As(err, &e) {
		e = &CloseError{Err: err}
	}
	c.failMu.Lock()
	first := c.err == nil
	if first {
		c.err = e
		c.ended.Store(true)
	}
	first = first && c.started // before, it is the handshake that cleans up
	c.failMu.Unlock()
	if first {
		go c.teardown(e)
	}
}

// teardown frees everything after fail. First the device loses access, then buffers change owners.
func (c *Conn) teardown(e *CloseError) {
	s := &c.snd
	s.mu.Lock()
	s.err = e
	s.mu.Unlock()
	c.sayGoodbye(e)
	c.quiesce(e)
	c.closeCM()
	if err := c.q.Close(); err != nil {
		c.failMu.Lock()
		if e.Reason == "" {
			c.err = &CloseError{Err: e.Err, Reason: "and the queue pair cannot be closed: " + err.Error(), Remote: false}
		}
		c.failMu.Unlock()
	}
	c.endGrants()
	c.tcp.Close()
	c.tcpReader.Wait()
	c.release(e)
	close(c.done)
}

// quiesce takes the device's access away, and handles what has arrived by then.
func (c *Conn) quiesce(e *CloseError) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	c.q.Fail(ctx) // nothing arrives any more; what has arrived is in the CQ
	cancel()
	ch := make(chan struct{})
	c.p.Do(func() {
		c.rcv.dropping = errors.Is(e.Err, net.ErrClosed)
		if !c.rcv.dropping || c.rcv.shared > 0 { // receives of the shared queue would go with the queue pair's completions
			c.p.drain() // deliver what came before the end
		}
		close(ch)
	})
	<-ch
}

// release gives back what the connection holds, after its queue pair was closed.
func (c *Conn) release(e *CloseError) {
	ch := make(chan struct{})
	c.p.Do(func() {
		c.p.part(c) // polls once more: completions still count, for what they say of buffers
		c.endSends(e)
		c.endReceives(e)
		if c.rcv.shared > 0 {
			c.p.srq.part(c, c.rcv.shared)
		}
		close(ch)
	})
	<-ch
}

// sayGoodbye tells the peer why, as far as it can be told without waiting long.
func (c *Conn) sayGoodbye(e *CloseError) {
	code := goodbyeError
	switch {
	case e.Remote:
		return // it was the peer who said it
	case errors.Is(e.Err, ErrPeerClosed):
		return
	case errors.Is(e.Err, ErrProtocol):
		code = goodbyeProtocol
	case errors.Is(e.Err, net.ErrClosed) && e.Reason == "":
		code = goodbyeClosed
	case errors.Is(e.Err, net.ErrClosed):
		code = goodbyeAborted
	}
	reason := e.Reason
	if code == goodbyeError {
		reason = e.Error()
	}
	c.tcpMu.Lock()
	defer c.tcpMu.Unlock()
	c.tcp.SetWriteDeadline(time.Now().Add(time.Second))
	c.tcp.Write(appendGoodbye(nil, code, reason)) // an error means that the peer is gone, which is what we tell it
}

// watchPeer reads the bootstrap connection, on which nothing comes any more but the peer's goodbye, and its end.
func (c *Conn) watchPeer() {
	defer c.tcpReader.Done()
	c.tcp.SetDeadline(time.Time{})
	code, reason, err := readGoodbye(c.tcp)
	if c.ended.Load() {
		return
	}
	end := &CloseError{Err: ErrPeerDied}
	switch {
	case err == nil && code == goodbyeClosed:
		end.Err = ErrPeerClosed
	case err == nil && code == goodbyeAborted:
		end = &CloseError{Err: ErrPeerClosed, Reason: reason, Remote: true}
	case err == nil && code == goodbyeProtocol:
		end = &CloseError{Err: ErrProtocol, Reason: reason, Remote: true}
	case err == nil:
		end = &CloseError{Err: ErrPeerClosed, Reason: reason, Remote: true}
	case errors.Is(err, ErrProtocol):
		errors.As(err, &end)
	case errors.Is(err, io.EOF):
		end.Reason = "its bootstrap connection ended without a goodbye"
	default:
		end.Reason = err.Error()
	}
	// What the peer sent before its end is in the CQ. It is handled first.
	c.p.Do(func() {
		c.p.drain()
		if cause := c.cause.Load(); cause != nil && err == nil {
			end = cause // the peer has noticed it
		}
		c.fail(end)
	})
}
