package softnic

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/udp"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A netPort is where the NIC meets a network: one address of the host, one UDP socket, and the connections that go through it.
//
// Whoever has work for it moves packets, one at a time (mu): a thread that posts sends what it has posted, one that polls a CQ
// receives, and when nobody has done either for a while, or somebody sleeps until a completion comes, a goroutine of the port's
// (drive) waits for packets and timers. Nobody waits for mu: who finds it taken leaves a note (again), which its holder reads
// after it has let go.
//
// mu comes before every lock of a QP but cfg, and a thread that has a QP's sq may only try to take it.
type netPort struct {
	nic    *NIC
	sock   socket
	mtu    int           // of the net device
	link   *link         // with nobody: gives out the blocks that the port itself writes to
	stream *streamSocket // what sock is, if the port is one end of a stream; nil: it meets a network

	again  atomic.Bool   // there is work that mu's holder may not have seen
	users  atomic.Int32  // QPs; without any, pollers stay away
	looks  atomic.Uint32 // times that somebody has polled, or has filled the socket; written with mu held
	attach sync.Once     // attachUDs
	wakeC  chan struct{} // for a drive that looks whether somebody polls
	ended  chan struct{} // drive has returned

	readyMu ring.SpinLock
	ready   []*wireQP // have something to send

	mu      sync.Mutex
	closed  bool
	qps     map[ib.QPN]*wireQP
	newest  map[peerQP]*wireQP // RC connections, by the peer's queue pair: the last to be made (older leads to those before it)
	uds     map[ib.QPN]*wireUD
	gsi     *gsi // queue pair 1; nil: nobody has used it
	timers  wheel
	wakeAt  time.Duration // what drive waits for at most; neverWake: nothing
	taken   []*wireQP     // what ready was swapped with
	touched []*wireQP     // have received something
	blocked []*wireQP     // could not send: the socket was full, or had been for too often
	retried []*wireQP     // what blocked was swapped with
	filled  int           // times that the socket was full in this turn
	putBack bool          // of blocked, there are some that the socket has room for
	recv    func(netip.AddrPort, *roce.Packet)
	conn    *wireQP       // of the packet that the socket has asked about (expect)
	ud      *wireUD       // the same
	mad     bool          // it is for queue pair 1
	owing   []*wireQP     // have an acknowledgement that waits for company
	owingAt time.Duration // since when, the first of them
	late    []*wireQP     // have something to acknowledge that the peer does not wait for, or have had
	lateAt  time.Duration // when late is to be looked at, if it is not empty
	now     time.Duration // of this turn, or this part of it
	putOff  int           // turns that timers have waited for packets that are left in the socket
	took    bool          // something that came in this turn was for somebody
	pkt     roce.Packet   // a datagram that is being sent

	probes   map[uint32]*probe // on their way, by number
	answerTo netPeer           // who has probed last
	answered time.Duration     // when the answers so far would all have been due

	congestion bool // connections slow down when they meet congestion

	drops  dropCounters
	left   connCounters // of connections that have ended
	faults *faults      // nil: none
}

const neverWake time.Duration = math.MaxInt64

// openPort opens the port at an address: at the standard UDP port, or at another if somebody has that.
func openPort(n *NIC, addr netip.Addr, mtu int) (*netPort, error) {
	sock, err := udp.Listen(netip.AddrPortFrom(addr, roce.Port))
	if errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.EACCES) {
		sock, err = udp.Listen(netip.AddrPortFrom(addr, 0))
	}
	if err != nil {
		return nil, fmt.Errorf("the software NIC cannot receive RoCEv2 packets at %v: %w", addr, err)
	}
	return startPort(n, sock, mtu)
}

// startPort makes the port of a socket, which it closes if it cannot.
func startPort(n *NIC, sock *udp.Socket, mtu int) (p *netPort, err error) {
	p = newNetPort(n, mtu, netLink(n))
	p.sock = &udpSocket{sock, time.Now()}
	p.recv, sock.Expect, sock.OnDrop = p.deliver, p.expect, p.tapNone
	if p.faults, err = n.portFaults(); err != nil {
		sock.Close()
		return nil, err
	}
	if p.congestion, err = congestionFromEnv(); err != nil {
		sock.Close()
		return nil, err
	}
	if p.congestion {
		sock.AllowECN()
	}
	if p.faults != nil {
		p.recv = func(src netip.AddrPort, pkt *roce.Packet) { p.faults.pass(src, pkt, sock.Received(), p.receive) }
	}
	go p.drive()
	return p, nil
}

func newNetPort(n *NIC, mtu int, l *link) *netPort {
	p := &netPort{nic: n, mtu: mtu, link: l, wakeC: make(chan struct{}, 1), ended: make(chan struct{}),
		qps: map[ib.QPN]*wireQP{}, newest: map[peerQP]*wireQP{}, uds: map[ib.QPN]*wireUD{}, wakeAt: neverWake}
	p.recv = p.receive
	return p
}

// netLink makes a link with nobody.
func netLink(n *NIC) *link {
	l := newLink(n, n.gid, pathInproc)
	l.full, l.net = !asymmetric(), true
	l.out = &nobody{l}
	return l
}

// nobody is the other end of a port's link: it has nothing to let go of.
type nobody struct{ l *link }

func (w *nobody) send(m ctl) error {
	if m.kind == ctlDisconnect {
		w.l.nic.later(func() { w.l.handle(&ctl{kind: ctlReleased, a: m.a, b: m.b}) })
	}
	return nil
}

func (w *nobody) close(error) {}

// close ends the port; no QP uses it any more.
func (p *netPort) close() {
	p.mu.Lock()
	p.closed = true
	if p.gsi != nil {
		p.gsi.engine.Close()
	}
	p.sock.Close()
	p.mu.Unlock()
	p.wake()
	<-p.ended
}

// submit has what w has to send sent: here and now, unless somebody else is at it.
func (p *netPort) submit(w *wireQP) {
	if !w.queued.Swap(true) {
		p.readyMu.Lock()
		p.ready = append(p.ready, w)
		p.readyMu.Unlock()
	}
	p.again.Store(true)
	p.run()
}

// run does what there is a note of.
func (p *netPort) run() {
	for p.again.Load() && p.mu.TryLock() {
		p.turn(false)
		p.mu.Unlock()
	}
}

// unlock lets go of mu, and does what others have left a note of meanwhile: they have not waited for mu.
func (p *netPort) unlock() {
	p.mu.Unlock()
	p.run()
}

// poll is what a poller does: it receives, too. It reports whether anything came.
func (p *netPort) poll() (some bool) {
	if !p.mu.TryLock() {
		return true
	}
	p.looks.Store(p.looks.Load() + 1)
	some = p.turn(true)
	p.unlock()
	return some
}

// wakePorts has the ports look whether somebody sleeps.
func (n *NIC) wakePorts() {
	if ports := n.netPorts.Load(); ports != nil {
		for _, p := range *ports {
			p.wake()
		}
	}
	if streams := n.streams.polled(); streams != nil {
		for _, p := range *streams {
			p.wake()
		}
	}
}

// pollPorts receives what there is at the ports that somebody uses, and reports whether there was anything.
func (n *NIC) pollPorts() (some bool) {
	if ports := n.netPorts.Load(); ports != nil {
		for _, p := range *ports {
			if p.users.Load() > 0 && p.poll() {
				some = true
			}
		}
	}
	if streams := n.streams.polled(); streams != nil {
		for _, p := range *streams {
			if p.poll() {
				some = true
			}
		}
	}
	return some
}

const (
	// maxBatches bounds how much one turn receives.
	maxBatches = 4
	// maxFilled bounds how much one turn sends beyond a socket's room for each connection: the answer to one READ can be 2 GiB, and so a
	// message of UC, and nothing is received, and no timer looked at, meanwhile.
	maxFilled = 8
	// maxPutOff bounds for how many turns timers wait for packets that are left in the socket: as many turns as a full one takes.
	maxPutOff = 64
)

// turn moves packets. Called with mu held.
//
// A timer is looked at only when the socket has been emptied, since what it waits for may lie there: who was away, or busy, for
// longer than a peer has to answer would send everything again, and be busy with that.
func (p *netPort) turn(receive bool) (some bool) {
	p.again.Store(false)
	if p.closed {
		return false
	}
	p.took, p.filled = false, 0
	p.now = p.sock.Now()
	p.sendReady()
	if len(p.late) > 0 && p.now >= p.lateAt {
		p.acknowledge(false)
	}
	if p.gsi != nil {
		p.gsi.expire()
	}
	timers, left := receive && p.timers.count > 0, false
	for i := 0; receive && i < maxBatches; i++ {
		if i > 0 {
			p.now = p.sock.Now()
		}
		n, more, err := p.sock.Receive(p.recv)
		if n == 0 && p.faults != nil && len(p.faults.held) > 0 {
			n = len(p.faults.held)
			p.faults.late(true, p.receive)
		}
		left = err == nil && n > 0
		if err != nil || n == 0 {
			break
		}
		some, receive = true, more
		for k, w := range p.touched {
			p.touched[k] = nil
			w.touched = false
			w.pump(true)
		}
		p.touched = p.touched[:0]
	}
	switch {
	case !timers:
	case left && p.putOff < maxPutOff:
		p.putOff++
	default:
		p.putOff = 0
		p.timers.due(p.now, (*wireQP).expire)
	}
	// What is for nobody has nobody post anything, and what somebody takes need not: a flood of either must not hold acknowledgements back.
	if !p.took || len(p.owing) > 0 && p.now-p.owingAt >= wire.LateAck {
		p.settle()
	}
	p.sock.Flush()
	if p.stream != nil && p.stream.Err() != nil {
		p.streamEnded()
		return some
	}
	p.wakeInTime()
	return some
}

// settle sends the acknowledgements that have waited for what the pollers were about to post because of what came: nothing was.
func (p *netPort) settle() {
	for i, w := range p.owing {
		p.owing[i] = nil
		w.owing = false
		w.pump(false)
	}
	p.owing = p.owing[:0]
}

// lately has what w has received acknowledged in a moment.
func (p *netPort) lately(w *wireQP) {
	w.lateAt = p.now + w.lateAck
	if len(p.late) == 0 || w.lateAt < p.lateAt {
		p.lateAt = w.lateAt
	}
	if !w.late {
		w.late = true
		p.late = append(p.late, w)
	}
}

// acknowledge sends the acknowledgements of late for which it is time, or will be before long; or all.
func (p *netPort) acknowledge(all bool) {
	left := p.late[:0]
	p.lateAt = neverWake
	for _, w := range p.late {
		if !all && w.lateAt != 0 && !w.dead && !w.lateEnough() {
			left = append(left, w)
			p.lateAt = min(p.lateAt, w.lateAt)
			continue
		}
		w.late = false
		if w.lateAt != 0 { // it has not left with something else
			w.lateAt = 0
			w.resp.Acknowledge()
			w.pump(false)
		}
	}
	clear(p.late[len(left):])
	p.late = left
}

// sendReady sends what was posted, and what the socket had no room for.
func (p *netPort) sendReady() {
	if len(p.blocked) > 0 {
		p.sock.Flush()
		p.blocked, p.retried, p.putBack = p.retried[:0], p.blocked, false
		for i, w := range p.retried {
			p.retried[i] = nil
			w.blocked = false
			w.pump(false)
		}
	}
	p.readyMu.Lock()
	p.ready, p.taken = p.taken[:0], p.ready
	p.readyMu.Unlock()
	for i, w := range p.taken {
		if i > 0 { // sending for many takes long: who is served late has the whole time for an answer, too
			p.now = p.sock.Now()
		}
		p.taken[i] = nil
		w.queued.Store(false)
		w.pump(false)
	}
}

// block notes that w could not send. It is pumped again with the next turn.
func (p *netPort) block(w *wireQP) {
	if !w.blocked {
		w.blocked = true
		p.blocked = append(p.blocked, w)
	}
}

// blockedRetry is when the port tries again to send what the socket had no room for, or what was to go with other packets, if
// nobody polls.
const blockedRetry = 200 * time.Microsecond

// wakeInTime has drive wake up for the next timer.
func (p *netPort) wakeInTime() {
	at := neverWake
	if p.timers.count > 0 {
		at = p.timers.first()
	}
	if len(p.late) > 0 {
		at = min(at, p.lateAt)
	}
	if p.gsi != nil {
		if d := p.gsi.engine.Deadline(); d != 0 {
			at = min(at, d)
		}
	}
	full := len(p.blocked) > 0 || p.sock.Queued() > 0
	if p.stream != nil && full {
		full = false
		if !p.stream.awaited { // drive is to wait for room, too
			p.stream.awaited = true
			at = p.now
		}
	}
	if full || len(p.owing) > 0 {
		at = min(at, p.now+blockedRetry)
	}
	if at < p.wakeAt {
		p.wakeAt = at
		p.sock.SetDeadline(at)
	}
}

// expect finds whom a packet is for, before its invariant CRC is looked at; false: for nobody. Called with mu held.
func (p *netPort) expect(src netip.AddrPort, pkt *roce.Packet) bool {
	if l := p.nic.taps.Load(); l != nil {
		return p.findTapped(*l, src, pkt)
	}
	return p.find(src, pkt)
}

// find is expect, unseen.
func (p *netPort) find(src netip.AddrPort, pkt *roce.Packet) bool {
	p.conn, p.ud, p.mad = nil, nil, false
	if pkt.PKey&0x7fff != roce.DefaultPKey&0x7fff {
		p.drops.PKey++
		return false
	}
	qpn := ib.QPN(pkt.DestQP)
	if pkt.Opcode.Service() == roce.Probes {
		return p.expectProbe(src, pkt)
	}
	if pkt.Opcode.Service() == roce.UD {
		p.ud = p.uds[qpn]
		p.mad = p.ud == nil && qpn == roce.GSIQP && p.gsiFor(src)
		if p.ud == nil && !p.mad {
			p.drops.NoQP++
			return false
		}
		return true
	}
	w := p.qps[qpn]
	if pkt.Opcode == roce.CNP && w != nil && w.addr == src.Addr() {
		p.conn = w
		return true
	}
	switch {
	case w == nil:
		p.drops.NoQP++
		return false
	case w.addr != src.Addr():
		p.drops.Source++
		return false
	case w.service != pkt.Opcode.Service():
		p.drops.Service++
		return false
	}
	p.conn = w
	return true
}

// receive takes one packet that was expected when it came, and comes later. Called with mu held.
func (p *netPort) receive(src netip.AddrPort, pkt *roce.Packet) {
	if p.expect(src, pkt) {
		p.deliver(src, pkt)
	}
}

// deliver takes the packet that expect has said yes to. Called with mu held.
func (p *netPort) deliver(src netip.AddrPort, pkt *roce.Packet) {
	p.took = true
	if l := p.nic.taps.Load(); l != nil {
		p.acceptTapped(*l, src, pkt)
		return
	}
	p.accept(src, pkt)
}

// accept is deliver, unseen.
func (p *netPort) accept(src netip.AddrPort, pkt *roce.Packet) {
	switch {
	case p.ud != nil:
		p.ud.receive(src, pkt)
		return
	case p.mad:
		p.receiveMAD(src, pkt)
		return
	case p.conn == nil:
		p.probed(src, pkt)
		return
	}
	w := p.conn
	if pkt.Opcode == roce.CNP {
		w.notified()
		return
	}
	w.receive(pkt)
	if w.older != nil && w.heard() {
		w.outdate()
	}
	if !w.touched {
		w.touched = true
		p.touched = append(p.touched, w)
	}
}

// How often drive looks whether the pollers still poll: less and less often.
const (
	restPause    = 200 * time.Microsecond
	restPauseMax = 2 * time.Millisecond
)

// drive moves packets when nobody else does.
func (p *netPort) drive() {
	defer close(p.ended)
	pause := time.NewTimer(0)
	defer pause.Stop()
	var looks uint32
	for {
		// Pollers are left alone. They are gone if none has looked for a while; or somebody sleeps.
		rest := restPause
		for now := p.looks.Load(); now != looks && p.nic.sleepers.Load() == 0; now = p.looks.Load() {
			looks = now
			pause.Reset(rest)
			rest = min(rest*3/2, restPauseMax)
			select {
			case <-p.wakeC:
			case <-pause.C:
			}
		}
		if !p.round() {
			return
		}
		looks = p.looks.Load()
		if p.sock.Wait() != nil {
			return
		}
	}
}

// round does all that there is to do now, and sets when there will be more. It reports whether the port is open.
func (p *netPort) round() bool {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return false
	}
	p.turn(true)
	p.settle()
	p.acknowledge(true) // to wake up for it again would cost more than it saves
	p.sock.Flush()
	p.wakeAt = neverWake
	p.now = p.sock.Now()
	p.sock.SetDeadline(neverWake)
	if s := p.stream; s != nil {
		s.awaited = len(p.blocked) > 0 || s.Queued() > 0
		s.AwaitRoom(s.awaited)
	}
	p.wakeInTime()
	if p.putBack { // nobody else is there to go on
		p.wakeAt = p.now
		p.sock.SetDeadline(p.now)
	}
	p.unlock()
	return true
}

// wake has drive look whether somebody sleeps.
func (p *netPort) wake() {
	select {
	case p.wakeC <- struct{}{}:
	default:
	}
}
