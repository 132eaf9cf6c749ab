package perf

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// portOptions say which port and address of a device to use; zero chooses.
type portOptions struct {
	port     uint8
	gidIndex int // -1 chooses
	path     Path
	near     netip.Addr // of this host, where the peer reaches it
}

// A port is where queue pairs send from.
type port struct {
	num   uint8
	attr  ib.PortAttr
	index int
	gid   ib.GID
	udp   uint16 // where a software NIC receives for the GID; 0: it needs no telling
}

// choosePort finds the first active port, and the GID that peers are most likely to reach.
func choosePort(vctx *verbs.Context, opt portOptions) (port, error) {
	a, err := vctx.QueryDevice()
	if err != nil {
		return port{}, err
	}
	if int(opt.port) > a.Ports {
		return port{}, fmt.Errorf("%s has %d port(s): --ib-port %d does not exist", vctx.Name(), a.Ports, opt.port)
	}
	var down error
	for n := 1; n <= a.Ports; n++ {
		p := port{num: uint8(n)}
		if opt.port != 0 && opt.port != p.num {
			continue
		}
		if p.attr, err = vctx.QueryPort(p.num); err != nil {
			return port{}, err
		}
		if p.attr.State != ib.PortActive {
			down = fmt.Errorf("port %d of %s is %v, not ACTIVE: bring its link up, or choose another with --ib-port or --device", n, vctx.Name(), p.attr.State)
			continue
		}
		if err := p.chooseGID(vctx, opt); err != nil {
			return port{}, fmt.Errorf("port %d of %s: %w", n, vctx.Name(), err)
		}
		return p, nil
	}
	if down == nil {
		down = fmt.Errorf("%s has no port", vctx.Name())
	}
	return port{}, down
}

// chooseGID takes the GID with the wanted index, or the best one.
func (p *port) chooseGID(vctx *verbs.Context, opt portOptions) error {
	g, err := vctx.SourceGID(p.num, netip.Addr{})
	switch {
	case opt.gidIndex >= 0:
		g, err = gidAt(vctx, p.num, opt.gidIndex)
	case opt.path == PathUDP && err == nil && g.Type == ib.GIDSoft:
		g, err = vctx.SourceGIDOf(p.num, opt.near, ib.GIDRoCEv2)
	}
	if err != nil {
		return err
	}
	p.index, p.gid = g.Index, g.GID
	if g.MTU != 0 { // a software NIC's, on a network
		p.attr.ActiveMTU = min(p.attr.ActiveMTU, g.MTU)
		p.udp, err = vctx.UDPPort(p.num, g.Index)
	}
	return err
}

// gidAt returns the entry at an index.
func gidAt(vctx *verbs.Context, port uint8, index int) (ib.GIDEntry, error) {
	gids, err := vctx.GIDs(port)
	if err != nil {
		return ib.GIDEntry{}, err
	}
	for _, g := range gids {
		if g.Index == index {
			return g, nil
		}
	}
	return ib.GIDEntry{}, fmt.Errorf("there is no GID at index %d: ringside devices -v lists them", index)
}

// A lane is one queue pair of a bandwidth or rate test with its prepared work requests.
type lane struct {
	q  *qp.QP
	cm *qp.CMConn // nil: a connection manager has no part in it

	// Work requests to send, prepared once: wrs[i] is for slot i modulo the number of slots, and there is one batch
	// more of them than slots, so that any batch is a slice.
	wrs         []ib.SendWR
	pos         int    // the next slot
	outstanding int    // posted and not known to be complete
	unsignaled  int    // posted since the last signaled one
	left        int64  // still to be posted in this run
	sent        uint64 // ever

	credit []byte // the word in the own region that the peer writes how much may be sent into; nil: no limit
	limit  uint64 // as last read

	rwrs    []ib.RecvWR // prepared likewise
	rpos    int
	toPost  int    // receives to post again
	posted  uint64 // receives ever posted
	told    uint64 // of those, how many the peer knows of
	creditW []ib.SendWR
	word    []byte // inline source of creditW
}

// A side is one end of a test: queue pairs, memory and everything that the timed loop needs, made beforehand so that the
// loop allocates nothing. Its loop is for one goroutine; stop and halt may be called from others.
type side struct {
	spec   Spec
	server bool
	port   port
	psns   []ib.PSN

	pd       *verbs.PD
	mr       *mr.MR
	scq, rcq *verbs.CQ
	sch, rch *verbs.CompChannel
	lanes    []lane
	remote   mr.RemoteKey
	inline   bool // messages are sent inline
	byCM     bool // the device is connected by a connection manager only

	// The latency loops' own: one QP, one work request.
	q          *qp.QP
	wr         []ib.SendWR
	unsignaled int
	owed       int // signaled and not yet complete
	maxOwed    int
	seq        byte  // of the message that is sent or waited for next (write lat)
	last       *byte // the last byte of the message to send
	poll       *byte // and of the one that arrives

	wcs       []ib.WC
	creditWCs []ib.WC
	slotMask  int // spec.slots()-1 and spec.recvBatch(), which take a division to compute
	refillAt  int

	received uint64        // messages that the server has taken
	target   atomic.Uint64 // how many it has to take, once the client has said

	clk       clock
	rec       *recorder
	deadline  uint64 // on clk; 0: none
	yieldAt   uint64 // on clk: when the loop should yield again
	unyielded int    // what was posted since the clock was last looked at for that: messages and pages

	expired atomic.Bool // the duration is over: finish what is in flight, however long that takes, then end
	stopped atomic.Bool // the same, but within grace
	halted  atomic.Bool // end now: the peer is gone
	ctx     context.Context
	cancel  context.CancelFunc
	grace   time.Duration // how long to wait for what is in flight after stopped
	swait   waiter
	rwait   waiter
}

// errHalted ends a loop that was told to.
var errHalted = errors.New("the measurement was stopped")

const (
	// idleEvery is how many polls in a row may find nothing before a busy loop looks around: whether it was told to stop,
	// and whether somebody else needs the processor. A power of two; 4,096 polls are some 60 us.
	idleEvery = 4096
	// yieldAfter is how many such looks it takes until the operating system's scheduler is asked as well.
	yieldAfter = 16
	// adaptiveEvery is the same for the clock of adaptive polling.
	adaptiveEvery = 64
	// yieldEvery is how often a loop that is never idle yields: twice as often as the runtime's monitor asks for.
	yieldEvery = 5 * time.Millisecond
	// stopGrace is how long a stopped client waits for what it has in flight.
	stopGrace = 2 * time.Second
	// udpAckTimeout is between software NICs over UDP, where the peer is a process that a busy host may keep from running: with the
	// retries it may say nothing for two seconds, as over TCP.
	udpAckTimeout = 268 * time.Millisecond
	// pollBatch is how many completions a poll takes at most.
	pollBatch = 64
)

// newSide makes what one end of the test needs, up to queue pairs in state Init.
func newSide(vctx *verbs.Context, spec Spec, server bool, opt portOptions) (s *side, err error) {
	s = &side{spec: spec, server: server, wcs: make([]ib.WC, pollBatch), creditWCs: make([]ib.WC, creditDepth), grace: stopGrace}
	s.clk, _ = newClock(ClockMono) // which cannot fail; a client takes another before it measures
	s.slotMask, s.refillAt = spec.slots()-1, spec.recvBatch()
	s.target.Store(^uint64(0))
	s.ctx, s.cancel = context.WithCancel(context.Background())
	made := s // what is returned with an error is nil
	defer func() {
		if err != nil {
			made.close()
		}
	}()
	if s.port, err = choosePort(vctx, opt); err != nil {
		return nil, err
	}
	attr, err := vctx.QueryDevice()
	if err != nil {
		return nil, err
	}
	s.byCM = attr.Caps.Has(ib.CapCMOnly) && spec.Path != PathTCP
	if s.byCM && spec.Op == OpSend && spec.Kind != Lat && spec.Flow == FlowRNR {
		return nil, fmt.Errorf("%s ends a connection when a message finds no receive, which --flow rnr relies on: use --flow credit", vctx.Name())
	}
	access := ib.AccessLocalWrite | ib.AccessRemoteWrite
	if server && spec.Op == OpRead {
		access |= ib.AccessRemoteRead
	}
	if spec.Op == OpAtomic {
		if !attr.Caps.Has(ib.CapAtomic) {
			return nil, fmt.Errorf("%s cannot do atomics: %w", vctx.Name(), errors.ErrUnsupported)
		}
		if server {
			access |= ib.AccessRemoteAtomic
		}
	}
	if s.pd, err = vctx.AllocPD(); err != nil {
		return nil, err
	}
	if s.mr, err = mr.AllocOptions(s.pd, int(spec.regionSize()), access, mr.Options{Populate: true, Name: "perf"}); err != nil {
		return nil, fmt.Errorf("memory for %d QPs with messages of %d bytes: %w", spec.QPs, spec.Size, err)
	}
	for i := range s.mr.Bytes()[:spec.recvOff(0)] { // what is sent: anything but zeros, which might be special
		s.mr.Bytes()[i] = byte(i*7 + 1)
	}
	if spec.Poll != PollBusy {
		if s.sch, err = vctx.NewCompChannel(); err != nil {
			return nil, err
		}
		if s.rch, err = vctx.NewCompChannel(); err != nil {
			return nil, err
		}
	}
	sdepth, rdepth := spec.Depth, spec.recvDepth(server)
	if server && (spec.Op != OpSend && spec.Op != OpWrite || spec.Kind != Lat) {
		sdepth = creditDepth // a passive server sends nothing, a receiving one credits
	}
	if s.scq, err = vctx.NewCQ(verbs.CQConfig{Entries: sdepth * spec.QPs, Channel: s.sch}); err != nil {
		return nil, fmt.Errorf("completion queue for depth %d x %d QPs: %w", sdepth, spec.QPs, err)
	}
	if s.rcq, err = vctx.NewCQ(verbs.CQConfig{Entries: max(1, rdepth*spec.QPs), Channel: s.rch}); err != nil {
		return nil, fmt.Errorf("completion queue for %d receives x %d QPs: %w", rdepth, spec.QPs, err)
	}
	inline := spec.inlineWish()
	if spec.Inline == InlineAuto && inline > attr.MaxInline {
		inline = 0
	}
	s.inline = inline > 0 && (!server || spec.Kind == Lat)
	inline = max(inline, min(8, attr.MaxInline)) // credits
	s.lanes = make([]lane, spec.QPs)
	for i := range s.lanes {
		q, err := qp.New(s.pd, &qp.Config{Type: ib.RC, SendCQ: s.scq, RecvCQ: s.rcq, SendDepth: sdepth, RecvDepth: max(1, rdepth),
			SendSGE: 1, RecvSGE: 1, MaxInline: inline})
		if err != nil {
			return nil, fmt.Errorf("queue pair %d of %d, depth %d, inline %d: %w", i+1, spec.QPs, sdepth, inline, err)
		}
		s.lanes[i].q = q
		if err := q.Init(s.ctx, s.port.num, access&ib.AccessRemote); err != nil {
			return nil, err
		}
		s.psns = append(s.psns, qp.RandomPSN())
	}
	s.q = s.lanes[0].q
	s.swait = waiter{s: s, cq: s.scq, ch: s.sch, mode: spec.Poll}
	s.rwait = waiter{s: s, cq: s.rcq, ch: s.rch, mode: spec.Poll}
	return s, nil
}

// creditDepth is the send depth of a server that sends only credits.
const creditDepth = 16

// endpoint is what the peer has to know.
func (s *side) endpoint() (endpoint, error) {
	e := endpoint{gid: s.port.gid, lid: s.port.attr.LID, mtu: s.port.attr.ActiveMTU, udpPort: s.port.udp}
	for i := range s.lanes {
		e.qps = append(e.qps, qpAddr{s.lanes[i].q.QPN(), s.psns[i]})
	}
	key, err := s.mr.Remote().MarshalBinary()
	if err != nil {
		return e, err
	}
	if n := copy(e.buffer[:], key); n != len(key) || n != len(e.buffer) {
		return e, fmt.Errorf("a remote key has %d bytes, not %d", len(key), len(e.buffer))
	}
	return e, nil
}

// connect connects every queue pair to the peer's, posts the receives and prepares the work requests. streams are the queue pairs' TCP
// connections, which it takes over; nil: they have none.
func (s *side) connect(ctx context.Context, peer *endpoint, streams []*net.TCPConn) error {
	defer func() { closeAll(streams) }() // those that are not taken over
	patience := time.Duration(0)         // the default
	if peer.udpPort != 0 {
		patience = udpAckTimeout
	}
	return s.connectEach(peer, func(i int) error {
		if streams != nil {
			if err := s.lanes[i].q.UseStream(streams[i]); err != nil {
				return err
			}
			streams[i] = nil
		}
		return s.lanes[i].q.Connect(ctx, qp.ConnectParams{
			Remote:    qp.Endpoint{GID: peer.gid, LID: peer.lid, QPN: peer.qps[i].qpn, PSN: peer.qps[i].psn, UDPPort: peer.udpPort},
			LocalPSN:  s.psns[i],
			SGIDIndex: s.port.index,
			MTU:       min(s.port.attr.ActiveMTU, peer.mtu), AckTimeout: patience,
		})
	})
}

// connectEach is connect, by a function that connects the queue pair of a lane.
func (s *side) connectEach(peer *endpoint, one func(lane int) error) error {
	if len(peer.qps) != len(s.lanes) {
		return fmt.Errorf("the peer offers %d queue pairs for a test with %d", len(peer.qps), len(s.lanes))
	}
	if err := s.remote.UnmarshalBinary(peer.buffer[:]); err != nil {
		return err
	}
	if s.remote.Len < uint64(s.spec.regionSize()) {
		return fmt.Errorf("the peer's region has %d bytes: the test needs %d", s.remote.Len, s.spec.regionSize())
	}
	for i := range s.lanes {
		if err := one(i); err != nil {
			return fmt.Errorf("connecting queue pair %d of %d to %v: %w", i+1, len(s.lanes), peer.gid, err)
		}
		s.prepare(i)
		if err := s.fillReceives(&s.lanes[i]); err != nil {
			return err
		}
	}
	s.prepareLatency()
	return nil
}

// path is how the device reaches the peer.
func (s *side) path() string { return s.q.Path() }

// prepare makes the work requests of lane n.
func (s *side) prepare(n int) {
	l, spec := &s.lanes[n], &s.spec
	slots, slot := spec.slots(), spec.slotSize()
	mem := s.mr.Bytes()
	l.wrs = make([]ib.SendWR, slots+spec.Batch)
	for i := range l.wrs {
		off := spec.sendOff(n) + i%slots*slot
		wr := &l.wrs[i]
		wr.SGEs = []ib.SGE{s.mr.SGE(off, spec.Size)}
		wr.RKey = s.remote.RKey
		// A client writes into the server's receive area and reads from its send area.
		wr.RemoteAddr = s.remote.Addr + uint64(spec.recvOff(n)+i%slots*slot)
		switch spec.Op {
		case OpSend:
			wr.Opcode, wr.RKey, wr.RemoteAddr = ib.OpSend, 0, 0
		case OpWrite:
			wr.Opcode = ib.OpRDMAWrite
		case OpRead:
			wr.Opcode = ib.OpRDMARead
			wr.RemoteAddr = s.remote.Addr + uint64(off)
		case OpAtomic:
			wr.RemoteAddr = s.remote.Addr + uint64(spec.wordOff(n))
			if spec.Atomic == FetchAdd {
				wr.Opcode, wr.CompareAdd = ib.OpAtomicFetchAdd, 1
			} else {
				wr.Opcode, wr.CompareAdd, wr.Swap = ib.OpAtomicCmpSwap, 0, 0
			}
		}
		if s.inline {
			wr.SGEs, wr.Inline = nil, mem[off:off+spec.Size:off+spec.Size]
		}
		if spec.Poll != PollBusy {
			wr.Flags = ib.SendSolicited
		}
	}
	if r := spec.recvDepth(s.server); r > 0 {
		l.rwrs = make([]ib.RecvWR, slots+r)
		for i := range l.rwrs {
			l.rwrs[i] = ib.RecvWR{ID: uint64(n), SGEs: []ib.SGE{s.mr.SGE(spec.recvOff(n)+i%slots*slot, spec.Size)}}
		}
	}
	if spec.Op == OpSend && spec.Kind != Lat && spec.Flow == FlowCredit {
		off := spec.wordOff(n)
		if s.server {
			l.word = make([]byte, 8)
			wr := ib.SendWR{ID: uint64(n), Opcode: ib.OpRDMAWrite, Flags: ib.SendSignaled, RKey: s.remote.RKey, RemoteAddr: s.remote.Addr + uint64(off)}
			if l.q.Cap().MaxInline >= len(l.word) {
				wr.Inline = l.word
			} else {
				// Overwritten while an earlier write may still read it: the peer then sees the newer number early.
				l.word = mem[off : off+8]
				wr.SGEs = []ib.SGE{s.mr.SGE(off, 8)}
			}
			l.creditW = []ib.SendWR{wr}
		} else {
			l.credit = mem[off : off+8]
			l.limit = uint64(spec.recvDepth(true))
		}
	}
}

// prepareLatency makes what the latency loops use.
func (s *side) prepareLatency() {
	if s.spec.Kind != Lat {
		return
	}
	s.wr = s.lanes[0].wrs[:1:1]
	every := s.spec.SignalEvery
	if s.spec.Op == OpRead || s.spec.Op == OpAtomic {
		s.wr[0].Flags |= ib.SendSignaled
	}
	s.maxOwed = max(1, s.spec.Depth/every) - 1
	mem, n := s.mr.Bytes(), s.spec.Size
	s.last = &mem[s.spec.sendOff(0)+n-1]
	s.poll = &mem[s.spec.recvOff(0)+n-1]
	s.seq = 1
}

// fillReceives posts every receive of a lane.
func (s *side) fillReceives(l *lane) error {
	n := s.spec.recvDepth(s.server)
	if n == 0 {
		return nil
	}
	l.toPost, l.told = n, uint64(n) // the peer knows this number from the spec
	return s.repost(l, n)
}

// repost posts n of a lane's receives again.
func (s *side) repost(l *lane, n int) error {
	if _, err := l.q.PostRecv(l.rwrs[l.rpos : l.rpos+n]); err != nil {
		return err
	}
	l.rpos = (l.rpos + n) & s.slotMask
	l.toPost -= n
	l.posted += uint64(n)
	return nil
}

// expire ends the loop when what is in flight is done, stop also when the grace period is over; halt ends it at once.
func (s *side) expire() { s.expired.Store(true) }
func (s *side) stop()   { s.stopped.Store(true); s.cancel() }
func (s *side) halt()   { s.halted.Store(true); s.stop() }

// atomicSum adds up the words that an atomic test works on.
func (s *side) atomicSum() uint64 {
	var sum uint64
	for i := range s.lanes {
		sum += loadWord(s.mr.Bytes()[s.spec.wordOff(i):])
	}
	return sum
}

// close gives everything back, in the order that the objects need. Called once the loop has ended.
func (s *side) close() {
	s.cancel()
	for i := range s.lanes {
		if c := s.lanes[i].cm; c != nil {
			_ = c.Close()
		}
		if q := s.lanes[i].q; q != nil {
			_ = q.Close()
		}
	}
	for _, cq := range []*verbs.CQ{s.scq, s.rcq} {
		if cq != nil {
			_ = cq.Close()
		}
	}
	for _, ch := range []*verbs.CompChannel{s.sch, s.rch} {
		if ch != nil {
			_ = ch.Close()
		}
	}
	if s.mr != nil {
		s.last, s.poll = nil, nil
		_ = s.mr.Close()
	}
	if s.pd != nil {
		_ = s.pd.Close()
	}
}
