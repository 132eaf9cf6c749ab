package transport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/ringside-rdma/ringside/internal/remedy"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Listener accepts connections at a TCP address. It is safe for concurrent use.
type Listener struct {
	cfg *Config
	p   *Poller
	tcp net.Listener

	ctx    context.Context // ends handshakes on Close
	cancel context.CancelFunc
	ready  chan *Conn
	work   sync.WaitGroup
	once   sync.Once
	dead   chan struct{}
	err    error // why accepting ended; written before dead is closed

	mu      sync.Mutex
	active  int
	streams streamHub
	waiting []*intake // handshakes whose hello has not come completely, oldest first
}

// intake is a TCP connection that has not said hello yet.
type intake struct {
	tcp     net.Conn
	evicted bool
}

// Listen announces at a TCP address such as "10.0.0.1:7000" or "127.0.0.1:0", on which peers meet; data goes through the
// device. ctx bounds the announcement only.
func Listen(ctx context.Context, addr string, cfg *Config) (*Listener, error) {
	cfg, err := cfg.populate()
	if err != nil {
		return nil, err
	}
	p, err := pollerFor(cfg)
	if err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	t, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		p.unref()
		return nil, fmt.Errorf("transport: %w", err)
	}
	l := &Listener{cfg: cfg, p: p, tcp: t, ready: make(chan *Conn), dead: make(chan struct{})}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.work.Go(l.serve)
	if gone := p.vctx.Removed(); gone != nil {
		l.work.Go(func() { l.endWith(gone) })
	}
	return l, nil
}

// endWith ends the listener with its device, on which no connection can be made any more. Whoever accepts hears of it, and may close what
// it has, which the kernel waits for, and look for another.
func (l *Listener) endWith(gone <-chan struct{}) {
	select {
	case <-gone:
		l.shut(fmt.Errorf("transport: listener on %s: %w", l.p.vctx.Name(), verbs.ErrDeviceRemoved))
	case <-l.dead:
	}
}

// Addr is the TCP address.
func (l *Listener) Addr() net.Addr { return l.tcp.Addr() }

// Poller drives the accepted connections.
func (l *Listener) Poller() *Poller { return l.p }

// Accept waits for the next connection whose handshake is complete. It ends with ctx, with an error that matches net.ErrClosed when the
// listener is closed, and with one that matches verbs.ErrDeviceRemoved when its device has gone.
func (l *Listener) Accept(ctx context.Context) (*Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	default:
	}
	select {
	case c := <-l.ready:
		return c, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-l.dead:
		return nil, l.err
	}
}

// Close ends the listener and the handshakes in progress; connections that were accepted go on.
func (l *Listener) Close() error {
	l.shut(fmt.Errorf("transport: listener: %w", net.ErrClosed))
	l.work.Wait()
	l.once.Do(l.p.unretain)
	return l.p.closeUnused()
}

func (l *Listener) shut(err error) {
	l.mu.Lock()
	if l.err == nil {
		l.err = err
		close(l.dead)
		l.cancel()
		l.tcp.Close()
		for _, in := range l.waiting {
			in.evicted = true
			in.tcp.SetReadDeadline(time.Unix(1, 0))
		}
	}
	l.mu.Unlock()
}

func (l *Listener) serve() {
	for delay := time.Duration(0); ; {
		t, err := l.tcp.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				l.shut(fmt.Errorf("transport: listener: %w", err))
				return
			}
			// Such as too many open files: that may pass.
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			select {
			case <-l.dead:
				return
			case <-time.After(delay):
			}
			continue
		}
		delay = 0
		in := &intake{tcp: t}
		t.SetDeadline(time.Now().Add(l.cfg.HandshakeTimeout)) // before admit: an eviction sets another
		if !l.admit(in) {
			t.Close()
			return
		}
		l.work.Add(1)
		go func() {
			defer l.work.Done()
			l.handshake(in)
		}()
	}
}

// admit counts a handshake in. With too many in progress, it evicts the oldest one that has not said hello yet, so that
// those who never do keep nobody out.
func (l *Listener) admit(in *intake) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return false
	}
	if l.active >= l.cfg.MaxHandshakes && len(l.waiting) > 0 {
		old := l.waiting[0]
		l.waiting = l.waiting[1:]
		old.evicted = true
		old.tcp.SetReadDeadline(time.Unix(1, 0))
		l.active--
	}
	l.active++
	l.waiting = append(l.waiting, in)
	return true
}

// greeted takes a handshake off the list of those that can be evicted, and reports whether it still was on it, and
// whether there is room to go on.
func (l *Listener) greeted(in *intake) (ok, room bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, w := range l.waiting {
		if w == in {
			l.waiting = append(l.waiting[:i], l.waiting[i+1:]...)
			break
		}
	}
	return !in.evicted, l.active <= l.cfg.MaxHandshakes
}

func (l *Listener) handshake(in *intake) {
	t := in.tcp
	kind, body, err := readAnyFrame(t)
	alive, room := l.greeted(in)
	if alive {
		defer func() {
			l.mu.Lock()
			l.active--
			l.mu.Unlock()
		}()
	}
	var c *Conn
	switch {
	case !alive && l.ctx.Err() != nil:
		err = refuse(RefusedClosed, nil, "the listener is closing")
	case !alive:
		err = refuse(RefusedBusy, nil, "%d handshakes are in progress, and this one was the slowest", l.cfg.MaxHandshakes)
	case err != nil:
	case kind == bootStream: // the handshake that it belongs to is counted already
		if err = l.streams.pass(t, body); err == nil {
			return
		}
	case kind != bootHello:
		err = refuse(RefusedProtocol, nil, "frame of kind %d, want %d", kind, bootHello)
	case !room:
		err = refuse(RefusedBusy, nil, "%d handshakes are in progress", l.cfg.MaxHandshakes)
	default:
		c, err = l.accept(t, body)
	}
	if err != nil {
		rejectAndClose(t, err)
		return
	}
	ctx, cancel := context.WithTimeout(l.ctx, l.cfg.HandshakeTimeout)
	defer cancel()
	select {
	case l.ready <- c:
	case <-ctx.Done():
		reason := "nobody accepts connections"
		if l.ctx.Err() != nil {
			reason = "the listener is closing"
		}
		c.Abort(errors.New(reason))
		c.Close()
	}
}

// rejectAndClose tells the peer why, and hangs up. What the peer has sent is read first, because closing with unread
// bytes resets the connection, and the reason would be lost.
func rejectAndClose(t net.Conn, err error) {
	var he *HandshakeError
	if !errors.As(err, &he) {
		he = refuse(RefusedResources, err, "%v", err)
	}
	if !he.Remote {
		t.SetDeadline(time.Now().Add(time.Second)) // wins over a deadline that has passed
		t.Write(appendReject(nil, he))
		if tc, ok := t.(*net.TCPConn); ok {
			tc.CloseWrite()
			var sink [4096]byte
			for total := 0; total < 1<<20; {
				n, err := t.Read(sink[:])
				if err != nil {
					break
				}
				total += n
			}
		}
	}
	t.Close()
}

// accept is the listener's half of the handshake, after the hello.
func (l *Listener) accept(t net.Conn, body []byte) (*Conn, error) {
	theirs, err := parseHello(body)
	if err != nil {
		return nil, refuse(RefusedProtocol, err, "hello: %v", err)
	}
	ctx, cancel := context.WithTimeout(l.ctx, l.cfg.HandshakeTimeout)
	defer cancel()
	stop := context.AfterFunc(l.ctx, func() { t.SetDeadline(time.Unix(1, 0)) }) // Close does not wait for silent peers
	defer stop()
	if err := l.p.retain(); err != nil {
		return nil, refuse(RefusedClosed, err, "%v", err)
	}
	c, mine, err := prepare(ctx, l.p, l.cfg, t, nearPeer(addrOf(t.LocalAddr()), theirs.GID.Addr()))
	if err != nil {
		l.p.unref()
		return nil, err
	}
	give := func(err error) (*Conn, error) {
		c.discard()
		l.p.unref()
		return nil, err
	}
	if err := c.choosePath(ctx, mine, theirs); err != nil {
		return give(err)
	}
	c.agreeOn(mine, theirs)
	var wait *cmWait
	var stream *streamWait
	switch {
	case l.p.needsCM():
		wait, err = c.awaitCM(mine)
		if err == nil {
			defer wait.cancel()
		}
	case c.viaTCP:
		stream = l.streams.expect()
		defer stream.cancel()
		mine.Features |= featureStream
		mine.Stream = stream.token
	default:
		err = c.connect(ctx, mine, theirs)
	}
	if err != nil {
		return give(err)
	}
	if _, err := t.Write(appendFrame(nil, bootAccept, mine.append(nil))); err != nil {
		return give(err)
	}
	if wait != nil || stream != nil {
		if wait != nil {
			err = c.acceptCM(ctx, wait, mine, theirs)
		} else {
			err = c.acceptStream(ctx, stream, mine, theirs)
		}
		if err != nil {
			return give(err)
		}
		if _, err := t.Write(appendFrame(nil, bootReady, nil)); err != nil {
			return give(err)
		}
	}
	if _, err := readFrame(t, bootReady); err != nil {
		return give(err)
	}
	if !stop() {
		return give(refuse(RefusedClosed, nil, "the listener is closing"))
	}
	t.SetDeadline(time.Time{})
	c.namePath()
	c.start()
	return c, nil
}

// Dial connects to a Listener. ctx and Config.HandshakeTimeout bound the handshake. A refusal matches ErrRefused and is
// a *HandshakeError with the reason.
func Dial(ctx context.Context, addr string, cfg *Config) (*Conn, error) {
	cfg, err := cfg.populate()
	if err != nil {
		return nil, err
	}
	caller := ctx
	ctx, cancel := context.WithTimeout(caller, cfg.HandshakeTimeout)
	defer cancel()
	var d net.Dialer
	t, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("transport: %w", err)
	}
	p, err := pollerFor(cfg)
	if err != nil {
		t.Close()
		return nil, err
	}
	c, err := dial(ctx, p, cfg, t)
	if err != nil {
		rejectAndClose(t, err)
		p.unref()
		var he *HandshakeError
		if cerr := caller.Err(); cerr != nil && !(errors.As(err, &he) && he.Remote) {
			err = fmt.Errorf("transport: dial %s: %w", addr, cerr)
		}
		return nil, err
	}
	return c, nil
}

func dial(ctx context.Context, p *Poller, cfg *Config, t net.Conn) (*Conn, error) {
	if dl, ok := ctx.Deadline(); ok {
		t.SetDeadline(dl)
	}
	stop := context.AfterFunc(ctx, func() { t.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c, mine, err := prepare(ctx, p, cfg, t, addrOf(t.LocalAddr()))
	if err != nil {
		return nil, err
	}
	give := func(err error) (*Conn, error) {
		c.discard()
		return nil, err
	}
	if _, err := t.Write(appendFrame(nil, bootHello, mine.append(nil))); err != nil {
		return give(err)
	}
	body, err := readFrame(t, bootAccept)
	if err != nil {
		return give(err)
	}
	theirs, err := parseHello(body)
	if err != nil {
		return give(refuse(RefusedProtocol, err, "hello: %v", err))
	}
	if err := c.followPath(ctx, mine, theirs); err != nil {
		return give(err)
	}
	c.agreeOn(mine, theirs)
	connect := c.connect
	switch {
	case p.needsCM():
		connect = c.dialCM
	case c.viaTCP:
		connect = c.dialStream
	}
	if err := connect(ctx, mine, theirs); err != nil {
		return give(err)
	}
	if p.needsCM() {
		if err := c.confirmCM(t); err != nil {
			return give(err)
		}
	}
	if _, err := t.Write(appendFrame(nil, bootReady, nil)); err != nil {
		return give(err)
	}
	if !stop() {
		return give(ctx.Err())
	}
	t.SetDeadline(time.Time{})
	c.namePath()
	c.start()
	return c, nil
}

// addrOf is the IP address of one end of a TCP connection.
func addrOf(a net.Addr) netip.Addr {
	if t, ok := a.(*net.TCPAddr); ok {
		return t.AddrPort().Addr()
	}
	return netip.Addr{}
}

// nearPeer is the own address that the peer has reached, unless its GID is of the other IP version.
func nearPeer(local, theirs netip.Addr) netip.Addr {
	if local.Unmap().Is4() == theirs.Unmap().Is4() {
		return local
	}
	return theirs
}

// prepare makes a connection and the hello that describes it. near is where the peer is, or from where it is reached.
func prepare(ctx context.Context, p *Poller, cfg *Config, t net.Conn, near netip.Addr) (*Conn, *hello, error) {
	gid, err := p.vctx.SourceGID(1, near)
	if err != nil {
		return nil, nil, refuse(RefusedResources, err, "%v", err)
	}
	port, err := p.vctx.QueryPort(1)
	if err != nil {
		return nil, nil, refuse(RefusedResources, err, "%v", err)
	}
	// A software NIC is reached through memory as well.
	if text := remedy.PortDown(1, &port, p.vctx.Choice().Device.NetDevs); text != "" && gid.Type != ib.GIDSoft {
		return nil, nil, refuse(RefusedUnreachable, verbs.ErrUnreachable, "device %s: %s", p.vctx.Name(), text)
	}
	c, err := newConn(ctx, p, cfg)
	if err != nil {
		code := RefusedResources
		if errors.Is(err, ErrNoRoom) {
			code = RefusedBusy
		}
		return nil, nil, refuse(code, err, "%v", err)
	}
	c.tcp, c.sgid = t, gid.Index
	host := thisHost()
	h := &hello{
		HostID: host.ID, PIDNS: host.PIDNS, MountNS: host.MountNS, UID: host.UID, PID: host.PID,
		GID: gid.GID, QPN: c.qpn, PSN: qp.RandomPSN(), MaxMessage: uint32(cfg.MaxMessage), Slot: uint32(cfg.EagerSize),
		Window: uint32(cfg.RecvDepth), Rendezvous: uint16(cfg.RendezvousDepth), MTU: port.ActiveMTU,
		ReadsOut: uint8(min(16, p.attr.MaxQPInitRdAtom)), ReadsIn: uint8(min(16, p.attr.MaxQPRdAtomic)), Port: 1, LID: port.LID,
		Devices: []PeerDevice{{Provider: p.vctx.Provider(), Name: p.vctx.Name(), GID: gid.GID}},
		Name:    cfg.Name, PrivateData: cfg.PrivateData,
	}
	if h.MTU.Bytes() == 0 {
		h.MTU = ib.MTU4096
	}
	if p.needsCM() {
		err = c.describeCM(h, near)
	} else {
		err = c.offerPaths(h, gid.Type, addrOf(t.LocalAddr()))
	}
	if err != nil {
		c.discard()
		return nil, nil, err
	}
	return c, h, nil
}

// agreeOn notes, with both hellos known, who the peer is and what both sides keep to.
func (c *Conn) agreeOn(mine, theirs *hello) {
	c.peerSync = theirs.Sync
	c.peer = PeerInfo{
		Name: theirs.Name, PrivateData: theirs.PrivateData, Devices: theirs.Devices,
		Host: HostInfo{ID: theirs.HostID, PIDNS: theirs.PIDNS, MountNS: theirs.MountNS, UID: theirs.UID, PID: theirs.PID},
	}
	c.agree(int(theirs.MaxMessage), int(theirs.Slot), int(theirs.Window), int(theirs.Rendezvous))
}

// udpAckTimeout is qp.ConnectParams.AckTimeout between software NICs: with its retries, a peer may say nothing for two seconds, as it may
// over TCP. The peer is a process, which a busy host may keep from running for longer than an adapter ever takes to answer. What is lost is
// found out long before, by how long answers take.
const udpAckTimeout = 268 * time.Millisecond

// connect takes the queue pair to the peer's.
func (c *Conn) connect(ctx context.Context, mine, theirs *hello) error {
	remote := qp.Endpoint{GID: theirs.GID, LID: theirs.LID, QPN: theirs.QPN, PSN: theirs.PSN}
	sgid, mtu, patience := c.sgid, min(mine.MTU, theirs.MTU), time.Duration(0)
	if c.viaUDP {
		remote.GID, remote.UDPPort = theirs.UDP.GID, theirs.UDP.Port
		sgid, mtu, patience = c.udpSGID, c.udpMTU, udpAckTimeout
	}
	err := c.q.Connect(ctx, qp.ConnectParams{
		Remote:   remote,
		LocalPSN: mine.PSN, SGIDIndex: sgid, MTU: mtu, AckTimeout: patience,
		MaxRdAtomic:     clampReads(min(mine.ReadsOut, theirs.ReadsIn)),
		MaxDestRdAtomic: clampReads(min(mine.ReadsIn, theirs.ReadsOut)),
	})
	if err != nil {
		code := RefusedResources
		if errors.Is(err, verbs.ErrUnreachable) {
			code = RefusedUnreachable
		}
		return refuse(code, err, "the queue pair cannot be connected: %v", err)
	}
	return nil
}

// namePath completes the path, which some devices know once they are connected.
func (c *Conn) namePath() {
	if p := c.q.Path(); p != "" {
		c.path.Rung = p
	}
	if c.path.Rung == "" {
		c.path.Rung = c.p.vctx.Provider()
	}
}

// clampReads turns a number of reads in flight into what qp.ConnectParams wants: there, 0 is the default.
func clampReads(n uint8) int {
	if n == 0 {
		return -1
	}
	return int(n)
}
