package main

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// perftest is a run of one of perftest's programs, ib_send_lat and its kin, as Debian 12 has them: one queue pair, and as many
// messages of one size as both sides were told. The defaults are those of the C programs.
type perftest struct {
	verb    string // send, write, read or atomic (FETCH_ADD)
	bw      bool   // bandwidth: only the client posts; else latency
	typ     ib.QPType
	server  string // host to connect to; empty: be the server
	port    int    // of TCP
	device  string
	ibPort  uint8
	gid     int // index
	mtu     int // bytes; 0: the port's. The smaller of both sides' is used
	size    int // bytes of a message
	iters   int
	txDepth int
	rxDepth int
	reads   int // RDMA READs and atomics in flight
	events  bool
	check   bool // compare what the peer sends or lets be read with what perftest has in its memory

	listener    net.Listener // these are as in pingPong
	beforeClose func()
}

// perftestPrograms are what the C programs are called without ib_.
var perftestPrograms = []string{"send_lat", "send_bw", "write_lat", "write_bw", "read_lat", "read_bw", "atomic_lat", "atomic_bw"}

// perftestDefaults returns nil if there is no such program.
func perftestDefaults(program string) *perftest {
	if !slices.Contains(perftestPrograms, program) {
		return nil
	}
	verb, kind, _ := strings.Cut(program, "_")
	o := &perftest{verb: verb, bw: kind == "bw", typ: ib.RC, port: 18515, ibPort: 1, gid: -1, size: 2, iters: 1000, txDepth: 1, rxDepth: 512, reads: 16}
	if o.bw {
		o.size, o.txDepth = 65536, 128
	}
	if verb == "atomic" {
		o.size = 8
	}
	if program == "write_bw" {
		o.iters = 5000
	}
	return o
}

func (o *perftest) program() string {
	if o.bw {
		return o.verb + "_bw"
	}
	return o.verb + "_lat"
}

// A perftestResult says what one side has seen.
type perftestResult struct {
	device, program string
	typ             ib.QPType
	path            string
	size            int
	iters           int
	lost            int // datagrams and messages over UC that did not come
	events          int // waits for completion events; 0 when polling
	checked         bool
	took            time.Duration // 0: the client has done it all
}

func (r perftestResult) String() string {
	s := fmt.Sprintf("%s: %s over %v: %d messages of %d bytes", r.device, r.program, r.typ, r.iters, r.size)
	if r.took != 0 {
		s += fmt.Sprintf(" in %.3f s, %.2f usec each", r.took.Seconds(), float64(r.took.Nanoseconds())/1e3/float64(r.iters))
	}
	if r.path != "" {
		s += ", by " + r.path
	}
	if r.lost > 0 {
		s += fmt.Sprintf(", %d lost", r.lost)
	}
	if r.events > 0 {
		s += fmt.Sprintf(", %d events", r.events)
	}
	if r.checked {
		s += ", all as it must be"
	}
	return s
}

// usable returns why the options cannot be used, or nil.
func (o *perftest) usable(port ib.PortAttr) error {
	switch {
	case o.verb == "atomic" && o.size != 8:
		return fmt.Errorf("atomics of %d bytes: there are only such of 8", o.size)
	case o.size < 1 || uint64(o.size) > min(uint64(port.MaxMessage), 8<<20):
		return fmt.Errorf("messages of %d bytes: 1 to 8 MiB can be exchanged", o.size)
	case o.check && o.size < 8:
		return fmt.Errorf("messages of %d bytes: it takes 8 to tell what the peer's memory must be (-c)", o.size)
	case o.mtu != 0 && ib.MTUFor(o.mtu).Bytes() != o.mtu:
		return fmt.Errorf("an MTU of %d bytes: there are 256, 512, 1024, 2048 and 4096", o.mtu)
	case o.iters < 1 || o.iters > 10_000_000:
		return fmt.Errorf("%d messages", o.iters)
	case o.txDepth < 1 || o.rxDepth < 1:
		return fmt.Errorf("queues of %d sends and %d receives", o.txDepth, o.rxDepth)
	case o.reads < 1 || o.reads > 255:
		return fmt.Errorf("%d READs in flight: there are 1 to 255", o.reads)
	case o.typ == ib.UD && o.verb != "send" || o.typ == ib.UC && (o.verb == "read" || o.verb == "atomic"):
		return fmt.Errorf("%s needs another transport service than %v", o.program(), o.typ)
	case o.events && o.verb == "write" && !o.bw:
		return fmt.Errorf("write_lat waits for memory to change, of which there are no events")
	}
	return nil
}

// run is one side of the test. It fails if anything did not arrive, or with check, not as it was sent. Datagrams and messages over UC
// may be lost, but not all of them.
func (o *perftest) run(ctx context.Context) (r perftestResult, err error) {
	var objects closers
	defer objects.closeAll(&err)
	if o.listener != nil {
		defer o.listener.Close()
	}
	if err := usable(o.port, o.ibPort); err != nil {
		return r, err
	}
	dev, port, gid, err := openPort(o.device, o.ibPort, o.gid, &objects)
	if err != nil {
		return r, err
	}
	if err := o.usable(port); err != nil {
		return r, err
	}
	s := &perfSide{o: o, ctx: ctx, dev: dev, talk: perftestTalk{client: o.server != ""}}
	if s.talk.client {
		s.talk.conn, err = dial(ctx, o.server, o.port)
	} else {
		s.talk.conn, err = accept(ctx, o.listener, o.port)
	}
	if err != nil {
		return r, err
	}
	defer s.talk.conn.Close()
	mtu, err := o.ownMTU(dev, port)
	if err != nil {
		return r, err
	}
	agreed, err := s.talk.introduce(perftestIntro{cycle: 4096, line: 64, mtu: mtu})
	if err != nil {
		return r, err
	}
	if o.typ == ib.UD && o.size > agreed.mtu.Bytes() {
		return r, fmt.Errorf("messages of %d bytes: a datagram has at most the MTU of %d", o.size, agreed.mtu.Bytes())
	}
	if err := s.open(port.LID, gid, agreed, &objects); err != nil {
		return r, err
	}
	if err := s.meet(agreed.mtu, &objects); err != nil {
		return r, err
	}
	start := time.Now()
	if err := s.work(); err != nil {
		return r, fmt.Errorf("after %d of %d sends and %d receives: %w", s.done, o.iters, s.received, err)
	}
	took := time.Since(start)
	if !s.talk.client && o.verb != "send" && (o.verb != "write" || o.bw) {
		took = 0
	}
	if err := s.part(took); err != nil {
		return r, err
	}
	if s.lost == o.iters {
		return r, fmt.Errorf("none of %d messages has come", o.iters)
	}
	r = perftestResult{dev.Name(), o.program(), o.typ, s.qp.Path(), o.size, o.iters, s.lost, s.cq.events, o.check, took}
	if o.beforeClose != nil {
		o.beforeClose()
	}
	return r, nil
}

// ownMTU is the largest MTU of this side.
func (o *perftest) ownMTU(dev *verbs.Context, port ib.PortAttr) (ib.MTU, error) {
	mtu := port.ActiveMTU
	gids, err := dev.GIDs(o.ibPort)
	if err != nil {
		return 0, err
	}
	for _, g := range gids {
		if g.Index == o.gid && g.MTU != 0 {
			mtu = g.MTU
		}
	}
	if o.mtu == 0 {
		return mtu, nil
	}
	if o.mtu > mtu.Bytes() {
		return 0, fmt.Errorf("an MTU of %d bytes: the port's is %d", o.mtu, mtu.Bytes())
	}
	return ib.MTUFor(o.mtu), nil
}

// perfSide is the state of a run.
type perfSide struct {
	o      *perftest
	ctx    context.Context
	dev    *verbs.Context
	talk   perftestTalk
	layout perftestLayout

	mem    *mr.MR // laid out as the C program's; behind it the slots that messages and results come into
	slots  int
	cq     *completions
	qp     *qp.QP
	ah     *verbs.AH // UD
	mine   perftestKeys
	theirs perftestKeys

	posted   int // receives, ever
	received int
	sent     int // work requests posted
	done     int // ... that are complete
	lost     int
	gone     chan error // a server of datagrams hears here that the client is done

	was     []byte // the own memory at the start
	content []byte // the peer's; nil: not known yet
	wrs     []ib.SendWR
	recvs   []ib.RecvWR
}

// gets reports whether the client gets something into slots.
func (o *perftest) gets() bool { return o.verb == "read" || o.verb == "atomic" }

func (s *perfSide) header() int {
	if s.o.typ == ib.UD {
		return ib.GRHLen
	}
	return 0
}

func (s *perfSide) slotAt(i int) int {
	return roundUp(s.layout.whole(), 64) + i%s.slots*roundUp(ib.GRHLen+s.o.size, 64)
}

// slot is what a message, its header included, or a result came into.
func (s *perfSide) slot(i int) []byte {
	at := s.slotAt(i)
	return s.mem.Bytes()[at : at+s.header()+s.o.size]
}

// window is where the peer reads or writes message i.
func (s *perfSide) window(i int) []byte {
	at := s.layout.half() + s.layout.at(i)
	return s.mem.Bytes()[at : at+s.o.size]
}

// open makes all objects.
func (s *perfSide) open(lid ib.LID, gid ib.GID, agreed perftestIntro, objects *closers) error {
	o := s.o
	s.layout = newPerftestLayout(o.size, agreed, o.bw)
	pd, err := s.dev.AllocPD()
	if err != nil {
		return err
	}
	objects.add(pd)
	access := map[string]ib.Access{"write": ib.AccessRemoteWrite, "read": ib.AccessRemoteRead, "atomic": ib.AccessRemoteAtomic}[o.verb]
	s.slots = min(o.iters, max(o.rxDepth, o.txDepth))
	s.mem, err = mr.Alloc(pd, s.slotAt(0)+s.slots*roundUp(ib.GRHLen+o.size, 64), ib.AccessLocalWrite|access)
	if err != nil {
		return err
	}
	objects.add(s.mem)
	s.fill()
	if s.cq, err = newCompletions(s.dev, o.txDepth+o.rxDepth, o.events, objects); err != nil {
		return err
	}
	s.qp, err = qp.New(pd, &qp.Config{Type: o.typ, SendCQ: s.cq.cq, SendDepth: o.txDepth, RecvDepth: o.rxDepth, SendSGE: 1})
	if err != nil {
		return err
	}
	objects.add(s.qp)
	s.mine = perftestKeys{at: qp.Endpoint{GID: gid, LID: lid, QPN: s.qp.QPN(), PSN: qp.RandomPSN()}, reads: 1, window: s.mem.Remote()}
	s.mine.window.Addr += uint64(s.layout.half())
	if o.gets() {
		a, err := s.dev.QueryDevice()
		if err != nil {
			return err
		}
		s.mine.reads = min(o.reads, a.MaxQPRdAtomic)
	}
	if o.typ == ib.UD {
		return s.qp.ActivateUD(s.ctx, o.ibPort, udKey, s.mine.at.PSN)
	}
	return s.qp.Init(s.ctx, o.ibPort, access)
}

// fill puts into the memory what the C program has there.
func (s *perfSide) fill() {
	b := s.mem.Bytes()[:s.layout.whole()]
	if s.o.verb == "write" && !s.o.bw {
		clear(b)
	} else {
		glibcRand(uint32(time.Now().Unix()), b)
	}
	s.was = slices.Clone(b)
}

// meet introduces the queue pairs to each other and connects this one. When it returns, both sides can be sent to.
func (s *perfSide) meet(mtu ib.MTU, objects *closers) (err error) {
	o := s.o
	times := 1
	if !o.bw && o.verb != "send" {
		times = 2
	}
	for range times {
		if s.theirs, err = s.talk.keys(s.mine); err != nil {
			return err
		}
	}
	if s.theirs.reads < 1 || s.theirs.reads > 255 {
		return fmt.Errorf("the peer takes %d READs at a time", s.theirs.reads)
	}
	if o.typ == ib.UD {
		s.ah, err = s.qp.PD().NewAH(ib.AHAttr{DGID: s.theirs.at.GID, SGIDIndex: max(o.gid, 0), HopLimit: 255, DLID: s.theirs.at.LID, Port: o.ibPort})
		if err == nil {
			objects.add(s.ah)
		}
	} else {
		err = s.qp.Connect(s.ctx, qp.ConnectParams{Remote: s.theirs.at, LocalPSN: s.mine.at.PSN, SGIDIndex: max(o.gid, 0), MTU: mtu,
			HopLimit: 255, AckTimeout: 67 * time.Millisecond, RetryCount: 7, RNRRetry: 7, MinRNRTimer: 640 * time.Microsecond,
			MaxRdAtomic: s.theirs.reads, MaxDestRdAtomic: s.mine.reads})
	}
	if err != nil {
		return err
	}
	times = 2
	if o.verb == "send" {
		times = 3 // the last of which says that the receives are posted
		if !o.bw || !s.talk.client {
			if err := s.postReceives(); err != nil {
				return err
			}
		}
	}
	for range times {
		if _, err := s.talk.keys(s.mine); err != nil {
			return err
		}
	}
	return nil
}

// part tells the peer that this side is done, and hears that the peer is.
func (s *perfSide) part(took time.Duration) error {
	o := s.o
	if o.verb == "write" && !o.bw {
		return nil // these just end
	}
	if s.gone != nil {
		if err := <-s.gone; err != nil {
			return err
		}
		if _, err := s.talk.conn.Write(s.mine.encode()); err != nil {
			return err
		}
	} else if _, err := s.talk.keys(s.mine); err != nil {
		return err
	}
	if !s.talk.client && o.check {
		if err := s.checkWindow(); err != nil {
			return err
		}
	}
	if o.bw && o.verb != "send" {
		mine := perftestReport{size: uint64(o.size), iters: uint64(o.iters)}
		if s.talk.client {
			mine.rate = float64(o.iters) / took.Seconds() / 1e6
			mine.avg = mine.rate * 1e6 * float64(o.size) / (1 << 20)
			mine.peak = mine.avg
		}
		theirs, err := s.talk.report(mine)
		if err != nil {
			return err
		}
		// An average of 0 is what a client says that could not find out its processor's clock, on a loaded host.
		if !s.talk.client && (theirs.size != uint64(o.size) || theirs.iters != uint64(o.iters) || !(theirs.avg >= 0)) {
			return fmt.Errorf("the client says %+v; this side was told of %d messages of %d bytes", theirs, o.iters, o.size)
		}
		if _, err := s.talk.keys(s.mine); err != nil {
			return err
		}
	}
	s.talk.bye()
	return nil
}
