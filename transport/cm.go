package transport

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/ringside-rdma/ringside/internal/cmaddr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Devices with ib.CapCMOnly (iWARP) are connected by the system's connection manager. The bootstrap stays what it is; only
// the step that takes the queue pairs to RTS differs: the listener's answer has a port and a token, and the dialler makes a
// connection there that carries the token.

// cmToken tells the connection manager's requests apart. It is random: who knows it has read it in the handshake.
type cmToken [16]byte

// needsCM reports whether the poller's device is connected that way.
func (p *Poller) needsCM() bool { return p.attr.Caps.Has(ib.CapCMOnly) }

// The poller's sync region: peers read byte 0, and what is read of a peer's goes to syncSink.
const (
	syncSize = 64
	syncSink = 32
)

// A cmHub listens at one address for all connections of a poller.
type cmHub struct {
	l *qp.Listener

	mu      sync.Mutex
	waiting map[cmToken]chan *qp.Request
}

// hub returns the poller's hub at an address, which lives as long as the poller.
func (p *Poller) hub(a netip.Addr) (*cmHub, error) {
	p.hubMu.Lock()
	defer p.hubMu.Unlock()
	if h := p.hubs[a]; h != nil {
		return h, nil
	}
	l, err := qp.Listen(p.vctx, netip.AddrPortFrom(a, 0), 0)
	if err != nil {
		return nil, err
	}
	h := &cmHub{l: l, waiting: map[cmToken]chan *qp.Request{}}
	if p.hubs == nil {
		p.hubs = map[netip.Addr]*cmHub{}
	}
	p.hubs[a] = h
	p.hubWork.Go(h.serve)
	return h, nil
}

// closeHubs ends the hubs; no handshake is in progress any more.
func (p *Poller) closeHubs() error {
	p.hubMu.Lock()
	hubs := p.hubs
	p.hubs = nil
	p.hubMu.Unlock()
	var errs []error
	for _, h := range hubs {
		errs = append(errs, h.l.Close())
	}
	p.hubWork.Wait()
	return errors.Join(errs...)
}

func (h *cmHub) serve() {
	for {
		r, err := h.l.Accept(context.Background())
		if errors.Is(err, net.ErrClosed) || errors.Is(err, verbs.ErrDeviceRemoved) {
			return
		}
		if err != nil { // one request that could not be taken
			time.Sleep(time.Millisecond)
			continue
		}
		var t cmToken
		copy(t[:], r.PrivateData())
		if !h.pass(t, r) {
			r.Reject(nil)
		}
	}
}

// pass gives a request to who waits for it.
func (h *cmHub) pass(t cmToken, r *qp.Request) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	ch := h.waiting[t]
	if ch == nil {
		return false
	}
	delete(h.waiting, t) // once
	ch <- r
	return true
}

// A cmWait is a connection that is to come.
type cmWait struct {
	h     *cmHub
	token cmToken
	ch    chan *qp.Request // has room for the one request
}

func (h *cmHub) expect() *cmWait {
	w := &cmWait{h: h, ch: make(chan *qp.Request, 1)}
	rand.Read(w.token[:]) // never fails
	h.mu.Lock()
	h.waiting[w.token] = w.ch
	h.mu.Unlock()
	return w
}

// cancel ends the wait, and refuses a request that has come and was not taken. It may be called after accept.
func (w *cmWait) cancel() {
	w.h.mu.Lock()
	delete(w.h.waiting, w.token)
	w.h.mu.Unlock()
	select {
	case r := <-w.ch:
		r.Close()
	default:
	}
}

// describeCM adds to the hello where the connection manager finds this side.
func (c *Conn) describeCM(h *hello, near netip.Addr) error {
	a, err := cmaddr.Of(c.p.vctx, near)
	if err != nil {
		return refuse(RefusedResources, err, "%v", err)
	}
	h.Features |= featureCM
	h.Sync = c.p.sync.RemoteRange(0, 1)
	h.Sync.Access = ib.AccessRemoteRead
	h.GID = ib.GIDFromAddr(a)
	h.Devices[0].GID = h.GID
	return nil
}

// awaitCM makes the hello of a listener say where to dial.
func (c *Conn) awaitCM(mine *hello) (*cmWait, error) {
	h, err := c.p.hub(mine.GID.Addr())
	if err != nil {
		return nil, refuse(RefusedResources, err, "%v", err)
	}
	w := h.expect()
	mine.CMPort, mine.CMToken = h.l.Addr().Port(), w.token
	return w, nil
}

func (c *Conn) cmParams(mine, theirs *hello) qp.CMParams {
	return qp.CMParams{
		MaxRdAtomic: clampReads(min(mine.ReadsOut, theirs.ReadsIn)), MaxDestRdAtomic: clampReads(min(mine.ReadsIn, theirs.ReadsOut)),
	}
}

// acceptCM takes the connection that the peer makes.
func (c *Conn) acceptCM(ctx context.Context, w *cmWait, mine, theirs *hello) error {
	select {
	case r := <-w.ch:
		var err error
		if c.cm, err = r.Accept(ctx, c.q, c.cmParams(mine, theirs)); err != nil {
			return refuse(RefusedResources, err, "the queue pair cannot be connected: %v", err)
		}
		return nil
	case <-ctx.Done():
		return refuse(RefusedTimeout, ctx.Err(), "the connection of the devices did not come in time")
	}
}

// dialCM makes the connection that the peer waits for.
func (c *Conn) dialCM(ctx context.Context, mine, theirs *hello) error {
	p := c.cmParams(mine, theirs)
	p.PrivateData = theirs.CMToken[:]
	to := netip.AddrPortFrom(theirs.GID.Addr(), theirs.CMPort)
	var err error
	if c.cm, err = c.q.Dial(ctx, netip.AddrPortFrom(mine.GID.Addr(), 0), to, p); err == nil {
		err = c.greet()
	}
	if err != nil {
		code := RefusedResources
		if errors.Is(err, verbs.ErrUnreachable) {
			code = RefusedUnreachable
		}
		return refuse(code, err, "the queue pair cannot be connected to %v: %v", to, err)
	}
	return nil
}

// confirmCM waits until the peer's queue pair is connected as well. siw lets a message lie that comes before that is done, and
// all that are behind it, until another comes (siw_accept in siw_cm.c, which answers first and then has the socket served):
// hence another greeting.
func (c *Conn) confirmCM(t io.Reader) error {
	if _, err := readFrame(t, bootReady); err != nil {
		return err
	}
	if err := c.greet(); err != nil {
		return refuse(RefusedResources, err, "%v", err)
	}
	return nil
}

// greet sends a message that asks for nothing. The dialler's device has to send first (RFC 5044, section 7.1.2): this way, that
// does not depend on the program.
func (c *Conn) greet() error {
	var m [headerLen]byte
	makeHeader(msgCredit, flagLow, 0, 0).put(m[:])
	_, err := c.q.PostSend([]ib.SendWR{{Opcode: ib.OpSend, Inline: m[:]}})
	return err
}

// closeCM ends the connection manager's part, before the queue pair's.
func (c *Conn) closeCM() {
	if c.cm != nil {
		c.cm.Close() // the queue pair's own Close says what is wrong
	}
}
