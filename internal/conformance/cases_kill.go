//go:build unix

package conformance

import (
	"errors"
	"slices"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var _ = addCases("death of a peer", 0,
	testCase{name: "kill/target-of-sends", twoProcesses: true, run: func(c *C) { killTarget(c, ib.OpSend) }},
	testCase{name: "kill/target-of-writes", twoProcesses: true, run: func(c *C) { killTarget(c, ib.OpRDMAWrite) }},
	testCase{name: "kill/target-of-reads", twoProcesses: true, run: func(c *C) { killTarget(c, ib.OpRDMARead) }},
	testCase{name: "kill/target-of-atomics", needs: ib.CapAtomic, twoProcesses: true, run: func(c *C) { killTarget(c, ib.OpAtomicFetchAdd) }},
	testCase{name: "kill/target-of-slice-reads", twoProcesses: true, run: func(c *C) { killTarget(c, ib.OpRDMARead, sliceMem) }},
	testCase{name: "kill/target-of-slice-writes", twoProcesses: true, run: func(c *C) { killTarget(c, ib.OpRDMAWrite, sliceMem) }},
	testCase{name: "kill/initiator-of-sends", twoProcesses: true, run: func(c *C) { killInitiator(c, ib.OpSend) }},
	testCase{name: "kill/initiator-of-writes", twoProcesses: true, run: func(c *C) { killInitiator(c, ib.OpRDMAWrite) }},
	testCase{name: "kill/initiator-of-reads", twoProcesses: true, run: func(c *C) { killInitiator(c, ib.OpRDMARead) }},
	testCase{name: "kill/initiator-of-atomics", needs: ib.CapAtomic, twoProcesses: true, run: func(c *C) { killInitiator(c, ib.OpAtomicFetchAdd) }},
	testCase{name: "kill/initiator-of-slice-writes", twoProcesses: true, run: func(c *C) { killInitiator(c, ib.OpRDMAWrite, sliceMem) }},
	testCase{name: "kill/while-a-send-waits", twoProcesses: true, run: killWhileWaiting},
	testCase{name: "kill/idle", twoProcesses: true, run: killIdle},
	testCase{name: "kill/sleeping-receiver", twoProcesses: true, run: killSleepingReceiver},
	testCase{name: "kill/unreliable", twoProcesses: true, run: killUnreliable},
	testCase{name: "kill/srq", needs: ib.CapSRQ, twoProcesses: true, run: killSRQ},
	testCase{name: "kill/before-connect", twoProcesses: true, run: killBeforeConnect},
	testCase{name: "kill/many-times", twoProcesses: true, run: killManyTimes},
	testCase{name: "kill/many-qps", twoProcesses: true, run: killManyQPs},
)

var _ = addCases("passive targets", 0,
	testCase{name: "passive/target-stopped", twoProcesses: true, run: targetStopped},
)

// kill ends the process of a side, as kill -9 does.
func (s *Side) kill() { s.remote.kill() }

// diedWell checks the completions of requests that a peer's death has ended: some succeeded, then one says that the peer
// does not answer, or was flushed if the death was seen between two requests; then the rest is flushed.
func (c *C) diedWell(wcs []ib.WC) {
	c.Helper()
	i := 0
	for i < len(wcs) && wcs[i].Status == ib.WCSuccess {
		i++
	}
	if i == len(wcs) {
		return
	}
	switch s := wcs[i].Status; {
	case s == ib.WCRetryExceeded, s == ib.WCFlushErr:
	case c.cmOnly() && (s == ib.WCLocalQPOpErr || s == ib.WCGeneralErr): // the connection's end is noticed in the middle of a request
	case (s == ib.WCRemoteAccessErr || s == ib.WCRemoteOpErr) && c.A.dev.Provider != "soft":
		// A kernel that clears up behind a dead process takes its objects one by one: its regions may go before its QPs. Then
		// a WRITE finds no region, and a SEND a receive that cannot be written to.
		c.note("the first request after the peer's death ends with %q", s)
	default:
		c.Errorf("the first request after the peer's death ends with %q, want %q", s, ib.WCRetryExceeded)
	}
	if wcs[i].Status == ib.WCFlushErr && !c.A.seesDeath() && !c.cmOnly() {
		c.Errorf("the first request after the peer's death was only flushed")
	}
	for _, wc := range wcs[i+1:] {
		if wc.Status != ib.WCFlushErr {
			c.Errorf("a request behind the first that failed ends with %q, want flushed", wc.Status)
		}
	}
	if !slices.IsSortedFunc(wcs, func(a, b ib.WC) int { return int(a.ID) - int(b.ID) }) {
		c.Errorf("completions are out of order: %+v", wcs)
	}
}

// failsSoon posts wr until it fails for the peer's death. Memory of a dead process that is mapped still can be reached
// until the death was noticed.
func (e *end) failsSoon(wr ib.SendWR) {
	e.c.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		e.post(wr)
		if e.sentOneOf(wr.ID, e.c.afterDeath()...) != ib.WCSuccess {
			return
		}
	}
	e.c.Fatalf("%s: requests succeed %v after the peer's death", e.name, patience)
}

// afterDeath is how a request to a dead peer may end.
func (c *C) afterDeath() []ib.WCStatus {
	s := []ib.WCStatus{ib.WCRetryExceeded, ib.WCFlushErr, ib.WCSuccess}
	if c.cmOnly() {
		s = append(s, ib.WCLocalQPOpErr)
	}
	return s
}

// death checks that a survivor's end is of no use any more, but does everything that it must: sends fail, receives are
// flushed, objects can be closed.
func (c *C) death(e *end, receives ...uint64) {
	c.Helper()
	e.failsSoon(wrSend(501))
	e.post(wrSend(502))
	e.flushed(e.scq, 502)
	e.inState(ib.Err)
	e.flushed(e.rcq, receives...)
	for _, err := range []error{e.destroy(), e.mem.close()} {
		if err != nil {
			c.Error(err)
		}
	}
}

func killTarget(c *C, op ib.Opcode, changes ...func(*linkOpts)) {
	ch := do(c.B, opChannel, none{})
	rcq := c.B.cqOn(256, ch)
	l := c.pair(ib.RC, append(changes, func(o *linkOpts) { o.rcqB, o.retry, o.minRNR = rcq, 2, 1 })...)
	l.a.recv(1, l.a.mem.sge(0, 64))
	l.a.recv(2, l.a.mem.sge(0, 64))
	receiving := c.startReceiving(l.b, ch)
	r := c.rand()
	go func() {
		time.Sleep(time.Duration(r.IntN(30_000)) * time.Microsecond)
		c.B.kill()
	}()
	got, err := call(c.A, opPump, pumpArgs{QP: l.a.H, CQ: l.a.scq.H, WRs: stream(l.a, l.b, op)})
	if err != nil {
		c.Fatalf("after %d rounds: %v", got.Rounds, err)
	}
	c.Logf("%d rounds of %v before the peer died", got.Rounds, op)
	c.diedWell(got.Bad)
	<-receiving
	c.death(l.a, 1, 2)
}

// streamFromB lets B send to A in the background until B is killed. The function that it returns waits until that was the end of it: a
// stream that has ended by itself was none when the peer died.
func (l link) streamFromB(op ib.Opcode) (killed func()) {
	c := l.a.c
	var got pumpResult
	var err error
	done := make(chan none)
	go func() {
		defer close(done)
		got, err = call(l.b.Side, opPump, pumpArgs{QP: l.b.H, CQ: l.b.scq.H, WRs: stream(l.b, l.a, op)})
	}()
	return func() {
		c.Helper()
		<-done
		if c.cmOnly() && op == ib.OpSend { // a message that comes before its receive ends the connection
			return
		}
		if !errors.Is(err, errPeerGone) {
			c.Errorf("the stream of %v ended before the peer did, after %d rounds: %v %+v", op, got.Rounds, err, got.Bad)
		}
	}
}

func killInitiator(c *C, op ib.Opcode, changes ...func(*linkOpts)) {
	ch := do(c.A, opChannel, none{})
	rcq := c.A.cqOn(256, ch)
	l := c.pair(ib.RC, append(changes, func(o *linkOpts) { o.rcqA, o.retryA = rcq, 2 })...)
	other := c.pairOn(c.A, c.A, c.opts(ib.RC))
	if op == ib.OpSend {
		receiving := c.startReceiving(l.a, ch)
		defer func() {
			// Its receives are flushed, or it waits in vain on a device that does not tell.
			<-receiving
		}()
	}
	r := c.rand()
	streaming := l.streamFromB(op)
	time.Sleep(time.Duration(1000+r.IntN(30_000)) * time.Microsecond)
	c.B.kill()
	streaming()
	// What the peer has left half done must not hold up anybody: this end fails in bounded time, its memory can be used
	// and withdrawn, and other QPs work on.
	if op != ib.OpSend {
		c.death(l.a)
	} else {
		l.a.failsSoon(wrSend(501))
		l.a.inState(ib.Err)
	}
	other.alive(c)
}

func killWhileWaiting(c *C) {
	l := c.pair(ib.RC, func(o *linkOpts) { o.retry = 2 })
	l.a.recv(7, l.a.mem.sge(0, 64))
	l.a.post(wrSend(0, l.a.mem.sge(0, 64)), unsigned(wrSend(1)), wrWrite(2, l.a.mem.sges(0, 64), l.b.mem, 0))
	time.Sleep(quiet)
	c.B.kill()
	l.a.sentOneOf(0, ib.WCRetryExceeded, ib.WCRNRRetryExceeded)
	l.a.flushed(l.a.scq, 1, 2)
	l.a.flushed(l.a.rcq, 7)
	l.a.inState(ib.Err)
}

// seesDeath reports whether the side notices the other's death without asking it: the software NIC does, on its own host.
func (s *Side) seesDeath() bool { return s.dev.Provider == "soft" && !s.dev.Net }

func killIdle(c *C) {
	l := c.pair(ib.RC, func(o *linkOpts) { o.retry = 2 })
	l.alive(c)
	for i := range 5 {
		l.a.recv(uint64(i), l.a.mem.sge(0, 64))
	}
	c.B.kill()
	if c.A.seesDeath() || c.cmOnly() {
		// The software NIC sees deaths on its host and says so without being asked, and so does TCP. How soon is measured elsewhere, on a
		// machine that has nothing else to do: `ringside-bench -only kill`.
		l.a.flushed(l.a.rcq, 0, 1, 2, 3, 4)
		l.a.inState(ib.Err)
		c.death(l.a)
		return
	}
	c.death(l.a, 0, 1, 2, 3, 4)
}

// A receiver that sleeps on its completion channel is woken.
func killSleepingReceiver(c *C) {
	ch := do(c.A, opChannel, none{})
	rcq := c.A.cqOn(64, ch)
	l := c.pair(ib.RC, func(o *linkOpts) { o.rcqA, o.retry = rcq, 2 })
	l.a.recv(1, l.a.mem.sge(0, 64))
	rcq.arm(false)
	done := make(chan error, 1)
	go func() {
		_, err := call(c.A, opChannelWait, waitArgs{ch, patience})
		done <- err
	}()
	time.Sleep(quiet)
	c.B.kill()
	if !c.A.seesDeath() && !c.cmOnly() {
		l.a.post(wrSend(1))
	}
	if err := <-done; err != nil {
		c.Fatal(err)
	}
	l.a.flushed(rcq, 1)
}

func killUnreliable(c *C) {
	c.unreliable()
	for _, typ := range c.types() {
		if typ == ib.RC {
			continue
		}
		if c.B.gone() {
			c.restart()
		}
		l := c.pair(typ)
		wr := wrSend(1, l.a.mem.sge(0, 64))
		if typ == ib.UD {
			wr = udWR(1, c.A.ah(c.B), l.b, qkeyOfB, l.a.mem.sge(0, 64))
		}
		l.b.recv(1, l.b.mem.sge(0, 1000))
		l.a.post(wr)
		l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
		c.B.kill()
		// Datagrams go to nowhere with success; a UC QP may know better.
		for i := range 20 {
			wr.ID = uint64(i)
			l.a.post(wr)
			l.a.sentOneOf(wr.ID, ib.WCSuccess, ib.WCRetryExceeded, ib.WCFlushErr)
			time.Sleep(quiet / 5)
		}
		if typ == ib.UD {
			l.a.staysIn(ib.RTS)
			self := c.pairOn(c.A, c.A, c.opts(ib.UD)).a
			self.recv(3, self.mem.sge(0, 1000))
			l.a.post(udWR(2, c.A.ah(c.A), self, 0x1111, l.a.mem.sge(0, 64)))
			l.a.sent(want{ID: 2, Op: ib.WCSend, Len: anyLen})
			self.received(want{ID: 3, Op: ib.WCRecv, Len: ib.GRHLen + 64})
		}
	}
}

// The SRQ of a survivor keeps its receives for other QPs.
func killSRQ(c *C) {
	srq := do(c.A, opSRQ, srqArgs{c.A.pd, 32, 1})
	rcq := c.A.cq(256)
	with := func(o *linkOpts) { o.srqA, o.rcqA, o.retry = srq, rcq, 2 }
	l := c.pair(ib.RC, with)
	o := c.opts(ib.RC)
	with(&o)
	other := c.pairOn(c.A, c.A, o)
	for i := range 4 {
		c.A.srqRecv(srq, ib.RecvWR{ID: uint64(i), SGEs: l.a.mem.sges(0, 64)})
	}
	l.b.post(wrSend(1))
	l.a.received(want{ID: 0, Op: ib.WCRecv})
	c.B.kill()
	l.a.failsSoon(wrSend(1))
	l.a.inState(ib.Err)
	if c.A.saysLastWQE() {
		if ev := c.A.event(ib.EventLastWQEReached); ev.QPN != l.a.QPN {
			c.Errorf("event of QP %#x, want %#x", ev.QPN, l.a.QPN)
		}
	}
	rcq.empty("receives of an SRQ are not flushed")
	other.b.post(wrSend(2))
	other.a.received(want{ID: 1, Op: ib.WCRecv})
}

func killBeforeConnect(c *C) {
	o := c.opts(ib.RC)
	o.retry = 2
	o.noConnect = true
	l := c.pairOn(c.A, c.B, o)
	l.a.toInit(o, 0)
	l.b.toInit(o, 0)
	c.B.kill()
	attr, mask := l.a.rtrAttr(o, l.b)
	if err := l.a.tryModify(attr, mask); err != nil {
		if !errors.Is(err, verbs.ErrUnreachable) {
			c.Errorf("to RTR with a dead peer: %v; want ErrUnreachable, or success", err)
		}
		l.a.staysIn(ib.Init)
		return
	}
	l.a.toRTS(o)
	l.a.post(wrSend(1, l.a.mem.sge(0, 8)))
	l.a.sentOneOf(1, ib.WCRetryExceeded)
}

// restart gives side B a new process.
func (c *C) restart() {
	c.Helper()
	p, err := startPeer(c.B.remote.namespace)
	if err != nil {
		c.Fatal(err)
	}
	c.peers = append(c.peers, p)
	c.Cleanup(p.kill)
	c.B.remote, c.B.listener, c.B.spare = p, nil, nil
	c.B.dev = do(c.B, opOpen, c.B.opened)
	c.B.pd = do(c.B, opPD, none{})
}

// One process survives many others, and goes on with the next.
func killManyTimes(c *C) {
	r := c.rand()
	ops := []ib.Opcode{ib.OpSend, ib.OpRDMAWrite, ib.OpRDMARead}
	for round := range 6 {
		if round > 0 {
			c.restart()
		}
		l := c.pair(ib.RC, func(o *linkOpts) { o.retryA = 2 })
		l.alive(c)
		for range 30 {
			l.a.recv(0, l.a.mem.sge(32<<10, 1000))
		}
		op := ops[round%len(ops)]
		streaming := l.streamFromB(op)
		time.Sleep(time.Duration(r.IntN(5000)) * time.Microsecond)
		c.B.kill()
		streaming()
		l.a.failsSoon(wrWrite(501, l.a.mem.sges(0, 8), l.b.mem, 0))
		l.a.inState(ib.Err)
		for _, err := range []error{l.a.destroy(), l.a.mem.close()} {
			if err != nil {
				c.Error(err)
			}
		}
	}
}

func killManyQPs(c *C) {
	const n = 40
	type run struct {
		l    link
		got  pumpResult
		err  error
		done chan none
	}
	r := c.rand()
	runs := make([]*run, n)
	for i := range runs {
		l := c.pair(ib.RC, func(o *linkOpts) { o.retry, o.cqEntries = 2, 64 })
		l.a.recv(1, l.a.mem.sge(0, 8))
		runs[i] = &run{l: l, done: make(chan none)}
	}
	for i, x := range runs {
		op := []ib.Opcode{ib.OpRDMAWrite, ib.OpRDMARead}[i%2]
		go func() {
			defer close(x.done)
			x.got, x.err = call(c.A, opPump, pumpArgs{QP: x.l.a.H, CQ: x.l.a.scq.H, WRs: stream(x.l.a, x.l.b, op), Seed: uint64(i + 1)})
		}()
	}
	time.Sleep(time.Duration(r.IntN(20_000)) * time.Microsecond)
	c.B.kill()
	for i, x := range runs {
		<-x.done
		if x.err != nil {
			c.Fatalf("QP %d: %v", i, x.err)
		}
		c.diedWell(x.got.Bad)
		x.l.a.inState(ib.Err)
		x.l.a.flushed(x.l.a.rcq, 1)
	}
}

// A target whose process does not run takes one-sided requests, and messages into receives that it has posted.
func targetStopped(c *C) {
	if !c.A.seesDeath() || c.streams {
		c.Skip(nothingToDo + ": the target is the kernel, the adapter, or a process that has to answer packets")
	}
	l := c.pair(ib.RC)
	l.alive(c)
	for i := range 4 {
		l.b.recv(uint64(i), l.b.mem.sge(4096*i, 4096))
	}
	l.b.mem.write(40000, wordBytes(1))
	l.a.mem.fill(0, 4096, 5)
	// The first request to a region may need the target's help to map it.
	l.a.post(wrWrite(1, l.a.mem.sges(0, 8), l.b.mem, 20000))
	l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen})
	pid := c.B.dev.PID
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		c.Fatal(err)
	}
	wake := func() { syscall.Kill(pid, syscall.SIGCONT) }
	defer wake()
	for range 10 {
		l.a.post(wrWrite(1, l.a.mem.sges(0, 4096), l.b.mem, 20000), wrRead(2, l.a.mem.sges(8192, 4096), l.b.mem, 20000), wrAdd(3, l.a.mem.sges(16384, 8), l.b.mem, 40000, 1))
		l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen}, want{ID: 2, Op: ib.WCRDMARead, Len: 4096}, want{ID: 3, Op: ib.WCFetchAdd, Len: 8})
		l.a.mem.has("READ from a stopped process", 8192, 4096, 5)
	}
	for i := range 4 {
		l.a.post(wrSend(uint64(i), l.a.mem.sge(0, 4096)))
		l.a.sent(want{ID: uint64(i), Op: ib.WCSend, Len: anyLen})
	}
	time.Sleep(400 * time.Millisecond) // long enough to be taken for dead by mistake
	l.a.staysIn(ib.RTS)
	wake()
	for i := range 4 {
		l.b.received(want{ID: uint64(i), Op: ib.WCRecv, Len: 4096})
		l.b.mem.has("message that came meanwhile", 4096*i, 4096, 5)
	}
	if v := word(l.b.mem.read(40000, 8)); v != 11 {
		c.Errorf("after 10 additions to 1 the word is %d", v)
	}
	l.alive(c)
}
