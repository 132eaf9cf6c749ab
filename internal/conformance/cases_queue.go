package conformance

import (
	"errors"
	"net"
	"slices"

	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var _ = addCases("signalling and queue limits", 0,
	testCase{name: "queue/unsignalled", run: unsignalled},
	testCase{name: "queue/signal-all", run: signalAll},
	testCase{name: "queue/slots-come-back", run: slotsComeBack},
	testCase{name: "queue/send-full", run: sendFull},
	testCase{name: "queue/receive-full", run: recvFull},
	testCase{name: "queue/granted", run: granted},
	testCase{name: "queue/over-the-limits", run: overTheLimits},
)

var _ = addCases("completion queues and events", 0,
	testCase{name: "cq/one-for-all", run: oneCQ},
	testCase{name: "cq/overrun", run: cqOverrun},
	testCase{name: "cq/resize", needs: ib.CapResizeCQ, run: cqResize},
	testCase{name: "cq/event-by-event", run: eventByEvent},
	testCase{name: "cq/solicited", run: solicited},
	testCase{name: "cq/error-is-solicited", run: errorIsSolicited},
	testCase{name: "cq/channel-of-two-cqs", run: channelOfTwo},
	testCase{name: "cq/no-lost-wake-up", run: noLostWakeUp},
	testCase{name: "cq/channel-close-ends-wait", run: channelClose},
)

var _ = addCases("lifetimes", 0,
	testCase{name: "life/in-use", run: inUse},
	testCase{name: "life/close-twice", run: closeTwice},
	testCase{name: "life/after-close", run: afterClose},
	testCase{name: "life/close-with-work-outstanding", run: closeWithWork},
	testCase{name: "life/peer-qp-destroyed", run: peerQPDestroyed},
)

func unsigned(wr ib.SendWR) ib.SendWR { wr.Flags &^= ib.SendSignaled; return wr }

// Unsignalled requests complete silently; the completion of one that is signalled comes after them.
func unsignalled(c *C) {
	l := c.pair(ib.RC)
	for i := range 10 {
		l.b.recv(uint64(i), l.b.mem.sge(0, 64))
	}
	var wrs []ib.SendWR
	for i := range 10 {
		wr := wrSend(uint64(i), l.a.mem.sge(0, i))
		if i%5 != 4 {
			wr = unsigned(wr)
		}
		wrs = append(wrs, wr)
	}
	l.a.post(wrs...)
	l.a.sent(want{ID: 4, Op: ib.WCSend, Len: anyLen}, want{ID: 9, Op: ib.WCSend, Len: anyLen})
	for i := range 10 {
		l.b.received(want{ID: uint64(i), Op: ib.WCRecv, Len: i})
	}
	l.a.scq.empty("unsignalled requests")
}

func signalAll(c *C) {
	l := c.pair(ib.RC, func(o *linkOpts) { o.signalAll = true })
	l.b.recv(1, l.b.mem.sge(0, 64))
	l.a.post(unsigned(wrSend(1)), unsigned(wrWrite(2, l.a.mem.sges(0, 8), l.b.mem, 0)), unsigned(wrRead(3, l.a.mem.sges(0, 8), l.b.mem, 0)))
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen}, want{ID: 2, Op: ib.WCRDMAWrite, Len: anyLen}, want{ID: 3, Op: ib.WCRDMARead, Len: 8})
}

// Many times the depth of the queue go through it when every last request of a batch is signalled.
func slotsComeBack(c *C) {
	l := c.pair(ib.RC, func(o *linkOpts) { o.depth, o.recvDepth = 16, 16 })
	depth := l.a.Cap.MaxSendWR
	wrs := make([]ib.SendWR, depth)
	for i := range wrs {
		wrs[i] = unsigned(wrWrite(uint64(i), l.a.mem.sges(0, 8), l.b.mem, 8*i))
	}
	wrs[depth-1].Flags |= ib.SendSignaled
	for range 50 {
		l.a.post(wrs...)
		l.a.sent(want{ID: uint64(depth - 1), Op: ib.WCRDMAWrite, Len: anyLen})
	}
	// The same for receives.
	recvs := make([]ib.RecvWR, l.b.Cap.MaxRecvWR)
	sends := make([]ib.SendWR, 0, depth)
	for range min(depth, len(recvs)) {
		sends = append(sends, wrSend(1))
	}
	for range 10 {
		if n, err := l.b.tryRecv(recvs[:len(sends)]...); err != nil {
			c.Fatalf("%d of %d receives accepted: %v", n, len(sends), err)
		}
		l.a.post(sends...)
		l.a.scq.wait(len(sends))
		l.b.rcq.wait(len(sends))
	}
}

// Requests wait for a receive that is not there (RNR, endless retries), so the queue fills up.
func sendFull(c *C) {
	l := c.pair(ib.RC, func(o *linkOpts) { o.depth, o.minRNR = 8, 12 })
	depth := l.a.Cap.MaxSendWR
	var wrs []ib.SendWR
	for i := range depth + 5 {
		wrs = append(wrs, wrSend(uint64(i)))
	}
	n, err := l.a.tryPost(wrs...)
	if n < depth || !errors.Is(err, verbs.ErrQueueFull) {
		c.Fatalf("%d of %d requests accepted into a queue of %d, error %v; want all that fit and ErrQueueFull", n, len(wrs), depth, err)
	}
	if k, err := l.a.tryPost(wrs[0]); k != 0 || !errors.Is(err, verbs.ErrQueueFull) {
		c.Fatalf("one more: %d accepted, %v", k, err)
	}
	for i := range n {
		l.b.recv(uint64(i))
	}
	var sent, got []want
	for i := range n {
		sent = append(sent, want{ID: uint64(i), Op: ib.WCSend, Len: anyLen})
		got = append(got, want{ID: uint64(i), Op: ib.WCRecv})
	}
	l.a.sent(sent...)
	l.b.received(got...)
	l.alive(c)
}

func recvFull(c *C) {
	l := c.pair(ib.RC, func(o *linkOpts) { o.recvDepth = 8 })
	depth := l.b.Cap.MaxRecvWR
	wrs := make([]ib.RecvWR, 4*depth+64)
	for i := range wrs {
		wrs[i].ID = uint64(i)
	}
	n, err := l.b.tryRecv(wrs...)
	if n < depth || n == len(wrs) || !errors.Is(err, verbs.ErrQueueFull) {
		c.Fatalf("%d of %d receives accepted into a queue of %d, error %v; want all that fit and ErrQueueFull", n, len(wrs), depth, err)
	}
	l.a.post(wrSend(1), wrSend(2))
	l.a.scq.wait(2)
	l.b.received(want{ID: 0, Op: ib.WCRecv}, want{ID: 1, Op: ib.WCRecv})
	if k, err := l.b.tryRecv(wrs[0], wrs[1], wrs[2]); k < 2 && err != nil {
		c.Fatalf("after two completions %d receives fit: %v", k, err)
	}
}

// What was granted is at least what was asked for, and Query says what was set.
func granted(c *C) {
	for _, typ := range []ib.QPType{ib.RC, ib.UC, ib.UD} {
		if typ == ib.UC && !c.A.dev.Attr.Caps.Has(ib.CapUC) || typ == ib.UD && !c.A.dev.Attr.Caps.Has(ib.CapUD) {
			continue
		}
		sges := min(3, c.A.dev.Attr.MaxSGE)
		inline := min(33, c.A.dev.Attr.MaxInline)
		o := c.opts(typ)
		o.depth, o.recvDepth, o.sges, o.inline = 37, 21, sges, inline
		l := c.pairOn(c.A, c.B, o)
		if g := l.a.Cap; g.MaxSendWR < 37 || g.MaxRecvWR < 21 || g.MaxSendSGE < sges || g.MaxRecvSGE < sges || g.MaxInline < inline {
			c.Errorf("%v: granted %+v, less than asked for", typ, g)
		}
		got := l.a.query().Attr
		if got.State != ib.RTS || got.Port != 1 || got.SQPSN > ib.MaxPSN {
			c.Errorf("%v: Query says %+v", typ, got)
		}
		if typ == ib.UD {
			if got.QKey != o.qkeyA {
				c.Errorf("UD: Query says Q_Key %#x, want %#x", got.QKey, o.qkeyA)
			}
			continue
		}
		if to := c.A.ahTo(c.B); got.DestQPN != l.b.QPN || got.PathMTU != o.mtu || got.AH.DGID != to.DGID || c.A.dev.Port.LinkLayer == ib.LinkInfiniBand && got.AH.DLID != to.DLID {
			c.Errorf("%v: Query says destination %#x, MTU %v, GID %v, LID %d; want %#x, %v, %v, %d", typ, got.DestQPN, got.PathMTU, got.AH.DGID, got.AH.DLID,
				l.b.QPN, o.mtu, to.DGID, to.DLID)
		}
		if typ == ib.RC {
			if got.RetryCount != o.retry || got.RNRRetry != o.rnrRetry || got.MinRNRTimer != o.minRNR || got.AckTimeout != 14 ||
				got.MaxRdAtomic < o.rdAtomic || got.MaxDestRdAtomic < o.destRdAtomic || got.Access&ib.AccessRemote != ib.AccessRemote {
				c.Errorf("RC: Query says %+v, set was %+v", got, o)
			}
		}
	}
}

func overTheLimits(c *C) {
	a := c.A.dev.Attr
	cq := c.A.cq(16)
	for name, cfg := range inOrder(map[string]qp.Config{
		"send depth": {Type: ib.RC, SendDepth: a.MaxQPWR + 1},
		"recv depth": {Type: ib.RC, RecvDepth: a.MaxQPWR + 1},
		"SGEs":       {Type: ib.RC, SendSGE: a.MaxSGE + 1},
		"inline":     {Type: ib.RC, MaxInline: max(a.MaxInline, 1<<16) + 1},
		"no type":    {Type: 77},
	}) {
		if q, err := c.A.tryQP(qpOpts{scq: cq, rcq: cq, cfg: cfg}); err == nil {
			c.Errorf("%s over the limit: a QP with %+v was made", name, q.Cap)
		}
	}
	if i, err := call(c.A, opCQ, cqArgs{Entries: a.MaxCQE + 1}); err == nil {
		c.Errorf("a CQ over the limit of %d entries was made: %d", a.MaxCQE, i.Entries)
	}
}

// One CQ for both queues of several QPs: QPN tells whose a completion is.
func oneCQ(c *C) {
	qa, qb := c.A.cq(256), c.B.cq(256)
	var links []link
	for range 3 {
		links = append(links, c.pair(ib.RC, func(o *linkOpts) { o.scqA, o.rcqA, o.scqB, o.rcqB = qa, qa, qb, qb }))
	}
	seenA, seenB := map[ib.QPN]int{}, map[ib.QPN]int{} // each device numbers its own
	for i, l := range links {
		l.a.recv(uint64(i), l.a.mem.sge(0, 64))
		l.b.recv(uint64(i), l.b.mem.sge(0, 64))
		l.a.post(wrSend(uint64(i), l.a.mem.sge(0, 10)))
		l.b.post(wrSend(uint64(i), l.b.mem.sge(0, 10)))
	}
	for _, q := range []struct {
		cq   *CQ
		seen map[ib.QPN]int
	}{{qa, seenA}, {qb, seenB}} {
		for _, wc := range q.cq.wait(6) {
			if wc.Status != ib.WCSuccess || wc.Opcode != ib.WCSend && wc.Opcode != ib.WCRecv {
				c.Fatalf("completion %s", showWC(wc))
			}
			q.seen[wc.QPN]++
		}
	}
	for _, l := range links {
		if seenA[l.a.QPN] != 2 || seenB[l.b.QPN] != 2 {
			c.Fatalf("completions by QPN: %v, %v", seenA, seenB)
		}
	}
}

// One completion more than a CQ holds breaks it: Poll says so, and an event comes (IBA 10.8.1, 11.6.3.2). Nine QPs are more than the
// software NIC looks at one by one.
func cqOverrun(c *C) {
	var broken []handle
	for _, qps := range []int{1, 9} {
		broken = append(broken, c.overrun(qps, broken))
	}
}

// overrun breaks a CQ of so many QPs; others have broken before.
func (c *C) overrun(qps int, before []handle) handle {
	c.Helper()
	small := c.A.cq(4)
	n := small.Entries + 16
	if c.A.dev.Provider == "siw" {
		n += 64 // what it has to spare
	}
	each := (n + qps - 1) / qps
	var links []link
	for range qps {
		links = append(links, c.pair(ib.RC, func(o *linkOpts) { o.rcqA = small; o.recvDepth = each; o.memSize = 0 }))
	}
	for _, l := range links {
		if _, err := l.a.tryRecv(make([]ib.RecvWR, each)...); err != nil {
			c.Fatal(err)
		}
	}
	for _, l := range links {
		l.a.to(ib.Err) // every receive completes
	}
	c.sleep(2 * quiet) // the completions come without being polled for
	var err error
	got := 0
	c.waitFor(quiet, func() bool {
		var wcs []ib.WC
		wcs, err = call(c.A, opPoll, pollArgs{small.H, 64, 0})
		got += len(wcs)
		return err != nil
	})
	switch {
	case c.A.dev.Provider == "rxe" && err == nil:
		c.note("Poll does not report an overrun")
	case err == nil:
		c.Errorf("after an overrun of a CQ of %d QPs Poll reports no error, but %d completions of %d", qps, got, qps*each)
	}
	ev := c.A.event(ib.EventCQErr)
	for slices.Contains(before, ev.Object) { // one for each completion
		ev = c.A.event(ib.EventCQErr)
	}
	if ev.Object != small.H {
		c.Errorf("the event is about object %d, want the CQ, %d", ev.Object, small.H)
	}
	return small.H
}

func cqResize(c *C) {
	l := c.pair(ib.RC, func(o *linkOpts) { o.cqEntries = 8 })
	const queued = 7
	for i := range queued {
		l.b.recv(uint64(i), l.b.mem.sge(0, 64))
		l.a.post(wrSend(uint64(i), l.a.mem.sge(0, i)))
	}
	l.a.scq.wait(queued)
	// All completions must have arrived before the queue is replaced, so that it is known what it must keep.
	c.sleep(quiet)
	resize := func(n int) (int, error) { return call(c.B, opResize, resizeArgs{l.b.rcq.H, n}) }
	if n, err := resize(100); err != nil || n < 100 {
		c.Fatalf("resize to 100: %d granted, %v", n, err)
	}
	l.b.received(want{ID: 0, Op: ib.WCRecv}, want{ID: 1, Op: ib.WCRecv, Len: 1})
	if n, err := resize(2); err == nil {
		if n < queued-2 {
			c.Fatalf("resize to 2 with %d queued succeeded and granted %d", queued-2, n)
		}
		c.note("resizing below what is queued rounds up to %d", n)
	}
	for i := 2; i < 4; i++ {
		l.b.received(want{ID: uint64(i), Op: ib.WCRecv, Len: i})
	}
	if n, err := resize(16); err != nil || n < 16 {
		c.Fatalf("resize to 16: %d granted, %v", n, err)
	}
	for i := 4; i < queued; i++ {
		l.b.received(want{ID: uint64(i), Op: ib.WCRecv, Len: i})
	}
	// Many more than the first size fit through it.
	for range 40 {
		l.alive(c)
	}
	if n, err := resize(0); err == nil {
		c.Errorf("resize to 0 entries: %d granted", n)
	}
}

// waitEvent waits for an event of cq on the channel.
func (s *Side) waitEvent(ch handle, cq *CQ) {
	s.c.Helper()
	h, err := call(s, opChannelWait, waitArgs{ch, patience})
	if err != nil {
		s.c.Fatalf("%s: no event: %v", s.name, err)
	}
	if h != cq.H {
		s.c.Fatalf("%s: event of CQ %d, want %d", s.name, h, cq.H)
	}
}

func (s *Side) noCQEvent(ch handle, what string) {
	s.c.Helper()
	if h, err := call(s, opChannelWait, waitArgs{ch, quiet}); !timedOut(err) {
		s.c.Fatalf("%s: %s: event of CQ %d, error %v; want none", s.name, what, h, err)
	}
}

// eventPair has a channel at B's receive CQ.
func (c *C) eventPair() (l link, ch handle) {
	c.Helper()
	ch = do(c.B, opChannel, none{})
	rcq := c.B.cqOn(64, ch)
	l = c.pair(ib.RC, func(o *linkOpts) { o.rcqB = rcq })
	for i := range 32 {
		l.b.recv(uint64(i), l.b.mem.sge(0, 64))
	}
	return l, ch
}

func (l link) message(flags ib.SendFlags) {
	l.a.c.Helper()
	wr := wrSend(1, l.a.mem.sge(0, 8))
	wr.Flags |= flags
	l.a.post(wr)
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
}

// Arm raises one event, for the next completion; without it there is none (IBA 11.4.2.2).
func eventByEvent(c *C) {
	c.severalGoroutines()
	l, ch := c.eventPair()
	l.message(0)
	l.b.rcq.wait(1)
	c.B.noCQEvent(ch, "a CQ that is not armed")
	for i := range 3 {
		l.b.rcq.arm(false)
		c.B.noCQEvent(ch, "nothing has come")
		l.message(0)
		c.B.waitEvent(ch, l.b.rcq)
		if i == 1 {
			l.message(0)
			l.message(0)
			l.b.rcq.wait(2)
		}
		l.b.rcq.wait(1)
		c.B.noCQEvent(ch, "one Arm, one event")
	}
	// A completion that comes while somebody waits.
	l.b.rcq.arm(false)
	done := make(chan error, 1)
	go func() {
		_, err := call(c.B, opChannelWait, waitArgs{ch, patience})
		done <- err
	}()
	c.sleep(quiet)
	l.message(0)
	if err := <-done; err != nil {
		c.Fatal(err)
	}
}

func solicited(c *C) {
	l, ch := c.eventPair()
	l.b.rcq.arm(true)
	l.message(0)
	l.b.rcq.wait(1)
	c.B.noCQEvent(ch, "a message that is not solicited")
	l.message(ib.SendSolicited)
	c.B.waitEvent(ch, l.b.rcq)
	l.b.rcq.wait(1)
	l.b.rcq.arm(true)
	wi := wrWrite(2, l.a.mem.sges(0, 8), l.b.mem, 0)
	if wi.Opcode = ib.OpRDMAWriteWithImm; !c.hasOp(wi.Opcode) {
		wi = wrSend(2)
	}
	l.a.post(wi)
	l.a.scq.wait(1)
	l.b.rcq.wait(1)
	c.B.noCQEvent(ch, "a WRITE with immediate that is not solicited")
	wi.Flags |= ib.SendSolicited
	l.a.post(wi)
	l.a.scq.wait(1)
	c.B.waitEvent(ch, l.b.rcq)
	// Arm for any completion covers Arm for solicited ones, in either order (IBA 11.4.2.2).
	l.b.rcq.wait(1)
	l.b.rcq.arm(false)
	l.b.rcq.arm(true)
	l.message(0)
	c.B.waitEvent(ch, l.b.rcq)
}

func errorIsSolicited(c *C) {
	l, ch := c.eventPair()
	l.b.rcq.arm(true)
	l.b.to(ib.Err)
	c.B.waitEvent(ch, l.b.rcq)
	for _, wc := range l.b.rcq.wait(32) {
		if wc.Status != ib.WCFlushErr {
			c.Fatalf("completion %s, want a flushed one", showWC(wc))
		}
	}
}

func channelOfTwo(c *C) {
	ch := do(c.B, opChannel, none{})
	scq, rcq := c.B.cqOn(64, ch), c.B.cqOn(64, ch)
	l := c.pair(ib.RC, func(o *linkOpts) { o.scqB, o.rcqB = scq, rcq })
	for range 10 {
		l.b.recv(1, l.b.mem.sge(0, 8))
		scq.arm(false)
		rcq.arm(false)
		l.message(0)
		c.B.waitEvent(ch, rcq)
		rcq.wait(1)
		l.b.post(wrWrite(1, l.b.mem.sges(0, 8), l.a.mem, 0))
		c.B.waitEvent(ch, scq)
		scq.wait(1)
	}
}

// The receiver sleeps between completions and the sender comes at odd times. A lost wake-up ends the case.
func noLostWakeUp(c *C) {
	c.severalGoroutines()
	const rounds, batch = 1500, 3
	ch := do(c.B, opChannel, none{})
	entries, receives := 512, 32
	if c.cmOnly() { // nothing keeps the sender from being faster
		entries, receives = 2*rounds*batch, rounds*batch
	}
	rcq := c.B.cqOn(entries, ch)
	l := c.pair(ib.RC, func(o *linkOpts) { o.rcqB, o.recvDepth = rcq, max(o.recvDepth, receives) })
	recvs := make([]ib.RecvWR, receives)
	for i := range recvs {
		recvs[i].SGEs = l.b.mem.sges(0, 8)
	}
	if n, err := l.b.tryRecv(recvs...); n != receives {
		c.Fatalf("%d of %d receives accepted: %v", n, receives, err)
	}
	var wrs []ib.SendWR
	for i := range batch {
		wrs = append(wrs, wrSend(uint64(i), l.a.mem.sge(0, 8)))
	}
	done := make(chan none)
	var got drainResult
	var err error
	go func() {
		defer close(done)
		got, err = call(c.B, opDrain, drainArgs{Channel: ch, CQs: []handle{rcq.H}, N: rounds * batch, QP: l.b.H, Recv: ib.RecvWR{SGEs: l.b.mem.sges(0, 8)}})
	}()
	sent, serr := call(c.A, opPump, pumpArgs{QP: l.a.H, CQ: l.a.scq.H, WRs: wrs, Rounds: rounds, Seed: c.seed()})
	<-done
	if serr != nil || len(sent.Bad) > 0 {
		c.Errorf("sender: %v %v", serr, sent.Bad)
	}
	if err != nil || len(got.Bad) > 0 || got.Completions != rounds*batch {
		c.Fatalf("receiver: %d of %d completions, %d events, bad ones %v: %v", got.Completions, rounds*batch, got.Events, got.Bad, err)
	}
	c.Logf("%d completions in %d events", got.Completions, got.Events)
}

func channelClose(c *C) {
	c.severalGoroutines()
	ch := do(c.B, opChannel, none{})
	done := make(chan error, 1)
	go func() {
		_, err := call(c.B, opChannelWait, waitArgs{ch, patience})
		done <- err
	}()
	c.sleep(quiet)
	c.B.mustClose(ch)
	if err := <-done; !errors.Is(err, net.ErrClosed) && !errors.Is(err, errNotThere) {
		c.Fatalf("Wait ended with %v, want net.ErrClosed", err)
	}
}

// inUse: a parent cannot go before its children.
func inUse(c *C) {
	s := c.A
	l := c.pair(ib.RC)
	busy := func(what string, err error) {
		c.Helper()
		if !errors.Is(err, verbs.ErrBusy) {
			c.Errorf("close of %s: %v, want ErrBusy", what, err)
		}
	}
	_, err := call(s, opCloseContext, none{})
	busy("a context with objects", err)
	busy("a PD with a QP and a region", s.close(s.pd))
	busy("the send CQ of a QP", s.close(l.a.scq.H))
	busy("the receive CQ of a QP", s.close(l.a.rcq.H))
	ch := do(s, opChannel, none{})
	cq := s.cqOn(4, ch)
	busy("a channel with a CQ", s.close(ch))
	s.mustClose(cq.H)
	s.mustClose(ch)
	pd := do(s, opPD, none{})
	m := s.mem(pd, 4096, accessAll)
	busy("a PD with a region", s.close(pd))
	s.mustClose(m.H)
	if s.dev.Attr.Caps.Has(ib.CapUD) {
		ah := do(s, opAH, ahArgs{pd, s.ahTo(c.B)})
		busy("a PD with an address handle", s.close(pd))
		s.mustClose(ah.H)
	}
	if s.dev.Attr.Caps.Has(ib.CapSRQ) {
		srq := do(s, opSRQ, srqArgs{pd, 16, 1})
		busy("a PD with an SRQ", s.close(pd))
		cq := s.cq(8)
		q := s.qp(qpOpts{pd: pd, scq: cq, rcq: cq, srq: srq, cfg: qp.Config{Type: ib.RC}})
		busy("an SRQ with a QP", s.close(srq))
		s.mustClose(q.H)
		s.mustClose(srq)
	}
	if s.dev.Attr.Caps.Has(ib.CapMW2) {
		w := do(s, opWindow, pd)
		busy("a PD with a window", s.close(pd))
		s.mustClose(w)
	}
	s.mustClose(pd)
	l.alive(c) // the refusals broke nothing
}

func closeTwice(c *C) {
	l := c.pair(ib.RC)
	ch := do(c.A, opChannel, none{})
	for _, h := range []handle{l.a.H, l.a.scq.H, l.a.rcq.H, l.a.mem.H, ch, c.A.pd} {
		do(c.A, opCloseTwice, h)
	}
}

func afterClose(c *C) {
	l := c.pair(ib.RC)
	closed := func(what string, err error) {
		c.Helper()
		if !errors.Is(err, net.ErrClosed) {
			c.Errorf("%s after Close: %v, want net.ErrClosed", what, err)
		}
	}
	do(c.A, opCloseTwice, l.a.H)
	_, err := l.a.tryPost(wrSend(1))
	closed("PostSend", err)
	_, err = l.a.tryRecv(ib.RecvWR{})
	closed("PostRecv", err)
	closed("Modify", l.a.tryModify(ib.QPAttr{State: ib.Err}, ib.AttrState))
	_, err = call(c.A, opQuery, l.a.H)
	closed("Query", err)
	do(c.A, opCloseTwice, l.a.scq.H)
	_, err = call(c.A, opPoll, pollArgs{l.a.scq.H, 1, 0})
	closed("Poll", err)
	_, err = call(c.A, opArm, armArgs{l.a.scq.H, false})
	closed("Arm", err)
}

// QPs, CQs and regions are closed while requests wait for a receive that never comes.
func closeWithWork(c *C) {
	for range 3 {
		l := c.pair(ib.RC, func(o *linkOpts) { o.minRNR = 20 })
		l.a.post(wrSend(1, l.a.mem.sge(0, 4096)), wrWrite(2, l.a.mem.sges(0, 4096), l.b.mem, 0))
		l.a.recv(1, l.a.mem.sge(0, 64))
		if err := l.a.destroy(); err != nil {
			c.Fatal(err)
		}
		if err := l.a.mem.close(); err != nil {
			c.Fatal(err)
		}
		c.A.mustClose(l.a.scq.H)
		c.A.mustClose(l.a.rcq.H)
	}
}

// The peer destroys its QP: nobody answers any more (IBA 9.9.2.1: retries, then a retry error).
func peerQPDestroyed(c *C) {
	l := c.pair(ib.RC, func(o *linkOpts) { o.retry = 1 })
	l.alive(c)
	l.a.recv(9, l.a.mem.sge(0, 64))
	if err := l.b.destroy(); err != nil {
		c.Fatal(err)
	}
	l.a.post(wrSend(1, l.a.mem.sge(0, 64)), wrWrite(2, l.a.mem.sges(0, 64), l.b.mem, 0))
	l.a.sentOneOf(1, ib.WCRetryExceeded, ib.WCFlushErr)
	l.a.flushed(l.a.scq, 2)
	l.a.flushed(l.a.rcq, 9)
	l.a.inState(ib.Err)
	// The region is there still, and can be closed.
	if err := l.b.mem.close(); err != nil {
		c.Fatal(err)
	}
}
