package conformance

import (
	"errors"
	"fmt"
	"time"

	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var _ = addCases("RNR and message length", 0,
	testCase{name: "rnr/no-retries", run: rnrNoRetries},
	testCase{name: "rnr/few-retries", run: rnrFewRetries},
	testCase{name: "rnr/write-imm", needs: ib.CapImm, run: rnrWriteImm},
	testCase{name: "rnr/waits-for-receive", run: rnrWaits},
	testCase{name: "rnr/keeps-order", run: rnrKeepsOrder},
	testCase{name: "rnr/each-way", run: rnrEachWay},
	testCase{name: "length/receive-too-small", run: receiveTooSmall},
	testCase{name: "length/receive-too-small-by-far", run: receiveTooSmallBig},
	testCase{name: "length/write-imm-needs-no-room", needs: ib.CapImm, run: writeImmNoRoom},
	testCase{name: "length/message-too-long", run: messageTooLong},
)

var _ = addCases("flush and recovery", 0,
	testCase{name: "flush/receives", run: flushReceives},
	testCase{name: "flush/sends", run: flushSends},
	testCase{name: "flush/post-in-err", run: postInErr},
	testCase{name: "flush/after-error", run: flushAfterError},
	testCase{name: "flush/reset-clears", run: resetClears},
	testCase{name: "flush/cycle", run: errCycle},
	testCase{name: "flush/peer-in-err", run: peerInErr},
	testCase{name: "flush/peer-not-connected", run: peerNotConnected},
	testCase{name: "flush/wrong-destination", run: wrongDestination},
)

var _ = addCases("state machine", 0,
	testCase{name: "state/transitions", run: stateTransitions},
	testCase{name: "state/attributes", run: stateAttributes},
	testCase{name: "state/bad-values", run: badValues},
	testCase{name: "state/post-refused", run: postRefused},
	testCase{name: "state/receive-in-init-and-rtr", run: receiveEarly},
	testCase{name: "state/access-changed-in-rts", run: accessChanged},
	testCase{name: "state/sqe", run: sendQueueError},
	testCase{name: "state/sqd", run: sendQueueDrain},
	testCase{name: "state/sqd-waits", run: sqdWaits},
)

// IBA 9.7.5.2.8: with an RNR retry count of 0 the first RNR NAK ends the request. The responder is not in error.
func rnrNoRetries(c *C) {
	l := c.pair(ib.RC, func(o *linkOpts) { o.rnrRetry = 0 })
	l.a.recv(9, l.a.mem.sge(0, 8))
	l.a.post(wrSend(1, l.a.mem.sge(0, 8)), unsigned(wrSend(2)), wrWrite(3, l.a.mem.sges(0, 8), l.b.mem, 0))
	l.a.sent(want{ID: 1, Status: ib.WCRNRRetryExceeded}, want{ID: 2, Status: ib.WCFlushErr}, want{ID: 3, Status: ib.WCFlushErr})
	l.a.flushed(l.a.rcq, 9)
	l.a.inState(ib.Err)
	l.b.staysIn(ib.RTS)
	l.b.rcq.empty("nothing was received")
}

// IBA 9.7.5.2.8: before each retry the requester waits for at least as long as the responder says, so three retries take three times that.
// A kernel's timer may be early by the tick that it was set in.
func rnrFewRetries(c *C) {
	const retries, timer, tick = 3, ib.RNRTimer(24), 10 * time.Millisecond // of 40.96 ms
	l := c.pair(ib.RC, func(o *linkOpts) { o.rnrRetry, o.minRNR = retries, timer })
	since := c.stopwatch()
	l.a.post(wrSend(1, l.a.mem.sge(0, 8)), wrSend(2))
	l.a.sent(want{ID: 1, Status: ib.WCRNRRetryExceeded}, want{ID: 2, Status: ib.WCFlushErr})
	if d := since(); d < retries*(timer.Duration()-tick) {
		c.Errorf("given up after %v: fewer than %d retries of %v each", d, retries, timer.Duration())
	}
	l.a.inState(ib.Err)
	l.b.staysIn(ib.RTS)
}

// A WRITE with immediate takes a receive. Without one nothing may be said to have arrived; the data may have.
func rnrWriteImm(c *C) {
	l := c.pair(ib.RC, func(o *linkOpts) { o.rnrRetry = 0 })
	wi := wrWrite(1, l.a.mem.sges(0, 8), l.b.mem, 0)
	wi.Opcode = ib.OpRDMAWriteWithImm
	l.a.post(wi)
	l.a.sent(want{ID: 1, Status: ib.WCRNRRetryExceeded})
	l.a.inState(ib.Err)
	l.b.staysIn(ib.RTS)
}

// With an RNR retry count of 7 a request waits for ever.
func rnrWaits(c *C) {
	l := c.pair(ib.RC)
	wi := wrWrite(2, l.a.mem.sges(0, 5000), l.b.mem, 20000)
	wi.Opcode, wi.Imm = ib.OpRDMAWriteWithImm, 77
	l.a.mem.fill(0, 5000, 6)
	l.a.post(wrSend(1, l.a.mem.sge(0, 5000)), wi)
	l.a.scq.empty("no receive is posted")
	c.sleep(3 * quiet)
	l.a.scq.empty("no receive is posted")
	l.b.recv(11, l.b.mem.sge(0, 5000))
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
	l.b.received(want{ID: 11, Op: ib.WCRecv, Len: 5000})
	l.b.mem.has("SEND that waited", 0, 5000, 6)
	l.a.scq.empty("the second has no receive")
	l.b.recv(12)
	l.a.sent(want{ID: 2, Op: ib.WCRDMAWrite, Len: anyLen})
	l.b.received(want{ID: 12, Op: ib.WCRecvRDMAWithImm, Len: 5000, Flags: ib.WCWithImm, Imm: 77})
	l.b.mem.has("WRITE with immediate that waited", 20000, 5000, 6)
}

// What is posted behind a request that waits must not overtake it.
func rnrKeepsOrder(c *C) {
	l := c.pair(ib.RC)
	l.b.mem.canary()
	l.a.mem.set(0, 64, 1)
	l.a.post(wrSend(1), wrWrite(2, l.a.mem.sges(0, 8), l.b.mem, 0), wrSend(3, l.a.mem.sge(0, 8)))
	c.sleep(quiet)
	l.b.mem.intact("a WRITE must not overtake a SEND that waits")
	l.b.recv(10)
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen}, want{ID: 2, Op: ib.WCRDMAWrite, Len: anyLen})
	l.b.mem.is("WRITE behind the SEND", 0, 8, 1)
	l.a.post(wrSend(4, l.a.mem.sge(0, 9)), wrSend(5, l.a.mem.sge(0, 10)))
	for i := range 3 {
		l.b.recv(uint64(20+i), l.b.mem.sge(100, 64))
	}
	l.a.sent(want{ID: 3, Op: ib.WCSend, Len: anyLen}, want{ID: 4, Op: ib.WCSend, Len: anyLen}, want{ID: 5, Op: ib.WCSend, Len: anyLen})
	l.b.received(want{ID: 10, Op: ib.WCRecv}, want{ID: 20, Op: ib.WCRecv, Len: 8}, want{ID: 21, Op: ib.WCRecv, Len: 9}, want{ID: 22, Op: ib.WCRecv, Len: 10})
}

// Both sides wait for the other's receive at once.
func rnrEachWay(c *C) {
	l := c.pair(ib.RC)
	for range 20 {
		l.a.post(wrSend(1, l.a.mem.sge(0, 8)))
		l.b.post(wrSend(2, l.b.mem.sge(0, 8)))
		l.a.recv(3, l.a.mem.sge(64, 8))
		l.b.recv(4, l.b.mem.sge(64, 8))
		l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
		l.b.sent(want{ID: 2, Op: ib.WCSend, Len: anyLen})
		l.a.received(want{ID: 3, Op: ib.WCRecv, Len: 8})
		l.b.received(want{ID: 4, Op: ib.WCRecv, Len: 8})
	}
}

// IBA 9.9.3: a message longer than its receive. The receive ends with a local length error, the sender's request with
// remote invalid request, and both QPs are in error. rxe says remote invalid request on both sides.
func receiveTooSmall(c *C) {
	for _, n := range []int{0, 10, 63} {
		l := c.pair(ib.RC)
		l.b.mem.canary()
		l.b.recv(7, l.b.mem.sge(room, n))
		l.b.recv(8, l.b.mem.sge(0, 64))
		l.a.recv(9, l.a.mem.sge(0, 64))
		l.a.post(wrSend(1, l.a.mem.sge(0, n+1)), wrSend(2))
		l.a.sent(want{ID: 1, Status: ib.WCRemoteInvalidReqErr}, want{ID: 2, Status: ib.WCFlushErr})
		l.a.flushed(l.a.rcq, 9)
		l.b.receivedOneOf(7, ib.WCLocalLengthErr, ib.WCRemoteInvalidReqErr)
		l.b.flushed(l.b.rcq, 8)
		l.a.inState(ib.Err)
		l.b.inState(ib.Err)
		l.b.mem.intactAround(fmt.Sprintf("receive of %d bytes", n), room, n)
	}
}

func receiveTooSmallBig(c *C) {
	l := c.pair(ib.RC, bigMem)
	l.b.mem.canary()
	l.b.recv(7, l.b.mem.sge(room, 10000), l.b.mem.sge(20000, 10000))
	l.a.post(wrSend(1, l.a.mem.sge(0, bigMessage)))
	l.a.sent(want{ID: 1, Status: ib.WCRemoteInvalidReqErr})
	l.b.receivedOneOf(7, ib.WCLocalLengthErr, ib.WCRemoteInvalidReqErr)
	l.b.mem.is("between the elements", room+10000, 20000-room-10000, canaryByte)
	l.b.mem.is("behind the elements", 30000, l.b.mem.n-30000, canaryByte)
}

// The receive that a WRITE with immediate takes is not written to, however small it is.
func writeImmNoRoom(c *C) {
	l := c.pair(ib.RC)
	l.b.mem.canary()
	l.b.recv(7, l.b.mem.sge(0, 1))
	wi := wrWrite(1, l.a.mem.sges(0, 5000), l.b.mem, room)
	wi.Opcode = ib.OpRDMAWriteWithImm
	l.a.mem.fill(0, 5000, 4)
	l.a.post(wi)
	l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen})
	l.b.received(want{ID: 7, Op: ib.WCRecvRDMAWithImm, Len: 5000, Flags: ib.WCWithImm})
	l.b.mem.has("WRITE", room, 5000, 4)
	l.b.mem.intactAround("WRITE", room, 5000)
}

// No region is that long, but its SGEs add up: 2^31 bytes are the most (IBA 9.7.2). The request fails where it is posted.
func messageTooLong(c *C) {
	l := c.pair(ib.RC)
	if l.a.Cap.MaxSendSGE < 3 {
		c.Skip("the device has fewer than 3 SGEs")
	}
	half := ib.SGE{Addr: l.a.mem.Addr, Length: 1 << 30, LKey: l.a.mem.LKey}
	l.b.recv(1, l.b.mem.sge(0, 64))
	l.b.mem.canary()
	c.refused(l.a.QP, wrSend(1, half, half, half), ib.WCLocalLengthErr, ib.WCLocalProtErr, ib.WCLocalQPOpErr)
	l.b.mem.intact("nothing was sent")
	l.b.rcq.empty("nothing was sent")
}

func flushReceives(c *C) {
	for _, typ := range c.types() {
		l := c.pair(typ)
		const n = 20
		ids := make([]uint64, n)
		for i := range n {
			ids[i] = uint64(i + 5)
			l.b.recv(ids[i], l.b.mem.sge(0, 64))
		}
		l.b.to(ib.Err)
		l.b.flushed(l.b.rcq, ids...)
		l.b.rcq.empty("all receives are flushed")
		l.b.inState(ib.Err)
	}
}

// types are the transports that the device has.
func (c *C) types() []ib.QPType {
	t := []ib.QPType{ib.RC}
	if c.streams {
		return t
	}
	if c.A.dev.Attr.Caps.Has(ib.CapUC) {
		t = append(t, ib.UC)
	}
	if c.A.dev.Attr.Caps.Has(ib.CapUD) {
		t = append(t, ib.UD)
	}
	return t
}

// unreliable skips a case that is about the types other than RC, if there is none.
func (c *C) unreliable() {
	c.Helper()
	if len(c.types()) == 1 {
		c.Skip(nothingToDo + ": no unreliable service")
	}
}

// Requests of every kind wait behind one that has no receive, and are flushed in order, unsignalled ones too.
func flushSends(c *C) {
	l := c.pair(ib.RC, func(o *linkOpts) { o.minRNR = 20 })
	l.b.mem.canary()
	wrs := []ib.SendWR{wrSend(0, l.a.mem.sge(0, 64)), unsigned(wrSend(1)), wrWrite(2, l.a.mem.sges(0, 64), l.b.mem, 0),
		wrRead(3, l.a.mem.sges(0, 64), l.b.mem, 0), unsigned(wrWrite(4, l.a.mem.sges(0, 64), l.b.mem, 0)), wrSend(5)}
	l.a.post(wrs...)
	c.sleep(quiet / 3)
	l.a.to(ib.Err)
	l.a.flushed(l.a.scq, 0, 1, 2, 3, 4, 5)
	l.a.scq.empty("all sends are flushed")
	l.b.mem.intact("flushed requests")
	// The peer knows nothing of it; a receive posted now stays.
	l.b.recv(1, l.b.mem.sge(0, 64))
	l.b.rcq.empty("a flushed SEND must not arrive")
	l.b.staysIn(ib.RTS)
}

// IBA 10.3.1.7: work requests posted in ERR are accepted and completed as flushed.
func postInErr(c *C) {
	for _, typ := range c.types() {
		l := c.pair(typ)
		l.a.to(ib.Err)
		for i := range 3 {
			id := uint64(i * 10)
			first, second := wrSend(id, l.a.mem.sge(0, 8)), unsigned(wrSend(id+1))
			if typ == ib.UD {
				ah := c.A.ah(c.B)
				first, second = udWR(id, ah, l.b, qkeyOfB, l.a.mem.sge(0, 8)), unsigned(udWR(id+1, ah, l.b, qkeyOfB))
			}
			l.a.post(first, second)
			l.a.flushed(l.a.scq, id, id+1)
			l.a.recv(id+2, l.a.mem.sge(0, 64))
			l.a.flushed(l.a.rcq, id+2)
		}
		l.a.staysIn(ib.Err)
	}
}

// What was done before the failing request has succeeded, the failing one comes with its status, the rest is flushed.
func flushAfterError(c *C) {
	l := c.pair(ib.RC)
	l.b.mem.canary()
	for i := range 3 {
		l.b.recv(uint64(50+i), l.b.mem.sge(64*i, 64))
	}
	bad := unsigned(wrOneSided(3, ib.OpRDMAWrite, l.a.mem.sges(0, 8), l.b.mem.Addr, l.b.mem.RKey^0x7700))
	l.a.post(wrSend(1, l.a.mem.sge(0, 8)), wrWrite(2, l.a.mem.sges(0, 8), l.b.mem, 4096), bad, wrSend(4), unsigned(wrSend(5)), wrRead(6, l.a.mem.sges(0, 8), l.b.mem, 0))
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen}, want{ID: 2, Op: ib.WCRDMAWrite, Len: anyLen}, want{ID: 3, Status: ib.WCRemoteAccessErr},
		want{ID: 4, Status: ib.WCFlushErr}, want{ID: 5, Status: ib.WCFlushErr}, want{ID: 6, Status: ib.WCFlushErr})
	l.b.received(want{ID: 50, Op: ib.WCRecv, Len: 8}, want{ID: 51, Status: ib.WCFlushErr}, want{ID: 52, Status: ib.WCFlushErr})
	l.a.scq.empty("each request completes once")
	l.b.rcq.empty("each receive completes once")
}

// RESET drops what is outstanding without completions (IBA 10.3.1.1), and the QP can be used again.
func resetClears(c *C) {
	o := c.opts(ib.RC)
	l := c.pairOn(c.A, c.B, o)
	for i := range 5 {
		l.a.recv(uint64(i), l.a.mem.sge(0, 64))
		l.b.recv(uint64(i), l.b.mem.sge(0, 64))
	}
	for range 5 {
		l.a.post(wrSend(1))
		l.b.post(wrSend(1))
	}
	for _, e := range []*end{l.a, l.b} {
		e.scq.wait(5)
		e.rcq.wait(5)
		e.recv(100, e.mem.sge(0, 64))
	}
	l.a.to(ib.Reset)
	l.b.to(ib.Reset)
	l.a.staysIn(ib.Reset)
	l.a.rcq.empty("RESET does not complete receives")
	c.connect(l, o)
	l.a.rcq.empty("nor does what comes after it")
	l.alive(c) // with the receive that is posted now, not with number 100
	// From ERR with sends that wait.
	l.a.post(wrSend(1), wrSend(2))
	l.a.to(ib.Err)
	l.b.to(ib.Err)
	l.a.flushed(l.a.scq, 1, 2)
	l.a.to(ib.Reset)
	l.b.to(ib.Reset)
	c.connect(l, o)
	l.alive(c)
	// From RTS with sends that wait: they are forgotten.
	l.a.post(wrSend(1), wrSend(2))
	l.a.to(ib.Reset)
	l.b.to(ib.Reset)
	l.a.scq.empty("RESET does not complete sends")
	c.connect(l, o)
	l.alive(c)
}

// Many times through an error and back, with other peers each time.
func errCycle(c *C) {
	o := c.opts(ib.RC)
	l, m := c.pairOn(c.A, c.B, o), c.pairOn(c.A, c.B, o)
	for range 15 {
		for _, x := range []link{l, m} {
			x.a.post(wrOneSided(1, ib.OpRDMAWrite, x.a.mem.sges(0, 8), 0, 0))
			x.a.sent(want{ID: 1, Status: ib.WCRemoteAccessErr})
			x.b.inState(ib.Err)
			x.a.to(ib.Reset)
			x.b.to(ib.Reset)
		}
		l.b, m.b = m.b, l.b
		c.connect(l, o)
		c.connect(m, o)
		l.alive(c)
		m.alive(c)
	}
}

// A peer in ERR answers nothing: retries, then a retry error.
func peerInErr(c *C) {
	for _, what := range []ib.QPState{ib.Err, ib.Reset} {
		l := c.pair(ib.RC, func(o *linkOpts) { o.retry = 1 })
		l.b.to(what)
		l.a.post(wrSend(1, l.a.mem.sge(0, 8)), wrSend(2))
		l.a.sentOneOf(1, ib.WCRetryExceeded, ib.WCFlushErr)
		l.a.flushed(l.a.scq, 2)
		l.a.inState(ib.Err)
		l.b.staysIn(what)
	}
}

// The destination exists, but is connected to another QP: it does not take messages from us. A packet does not say which QP
// sent it, so what keeps strangers out is that they do not know the PSN (IBA 9.7.1): this one is a long way behind.
func peerNotConnected(c *C) {
	o := c.opts(ib.RC)
	o.retry = 1
	l := c.pairOn(c.A, c.B, o)
	stranger := c.end(c.A, o, nil, nil, 0)
	l.b.recv(1, l.b.mem.sge(0, 64))
	l.b.mem.canary()
	stranger.toInit(o, 0)
	stranger.toRTR(o, l.b)
	attr, mask := stranger.rtsAttr(o)
	attr.SQPSN = l.a.psn().Add(-1 << 20)
	stranger.modify(attr, mask)
	stranger.mem.set(0, 64, 1)
	stranger.post(wrSend(5, stranger.mem.sge(0, 8)), wrWrite(6, stranger.mem.sges(0, 8), l.b.mem, 0))
	stranger.sentOneOf(5, ib.WCRetryExceeded, ib.WCFlushErr)
	stranger.flushed(stranger.scq, 6)
	l.b.mem.intact("messages of a stranger")
	l.b.rcq.empty("messages of a stranger")
	l.b.staysIn(ib.RTS)
	// The receive is still there for the right peer.
	l.a.post(wrSend(7, l.a.mem.sge(0, 3)))
	l.b.received(want{ID: 1, Op: ib.WCRecv, Len: 3})
}

// No such QP: refused when the path is set up, or a retry error at the first request.
func wrongDestination(c *C) {
	o := c.opts(ib.RC)
	o.retry = 1
	e, other := c.end(c.A, o, nil, nil, 0), c.end(c.B, o, nil, nil, 0)
	if err := other.destroy(); err != nil {
		c.Fatal(err)
	}
	e.toInit(o, 0)
	attr, mask := e.rtrAttr(o, other)
	if err := e.tryModify(attr, mask); err != nil {
		if !errors.Is(err, verbs.ErrUnreachable) {
			c.Fatalf("to RTR with a QPN that does not exist: %v, want ErrUnreachable or success", err)
		}
		c.note("a QPN that does not exist is refused on the way to RTR")
		return
	}
	e.toRTS(o)
	e.post(wrSend(1, e.mem.sge(0, 8)))
	e.sentOneOf(1, ib.WCRetryExceeded)
}

// illegal fails the test unless the change is refused as a transition that the table does not have.
func (e *end) illegal(what string, attr ib.QPAttr, mask ib.QPAttrMask) {
	e.c.Helper()
	was := e.query().Attr.State
	err := e.tryModify(attr, mask)
	if !errors.Is(err, errTransition) || !errors.Is(err, verbs.ErrState) {
		e.c.Errorf("%s: %v; want a *qp.StateError that matches ErrState", what, err)
	}
	if now := e.query().Attr.State; now != was {
		e.c.Errorf("%s: state went from %v to %v", what, was, now)
	}
}

// IBA 10.3.1, figure 123 and table 91.
func stateTransitions(c *C) {
	for _, typ := range c.types() {
		o := c.opts(typ)
		o.noConnect = true
		l := c.pairOn(c.A, c.B, o)
		e := l.a
		full := map[ib.QPState]func() (ib.QPAttr, ib.QPAttrMask){
			ib.RTR: func() (ib.QPAttr, ib.QPAttrMask) { return e.rtrAttr(o, l.b) },
			ib.RTS: func() (ib.QPAttr, ib.QPAttrMask) { return e.rtsAttr(o) },
			ib.SQD: func() (ib.QPAttr, ib.QPAttrMask) { return ib.QPAttr{State: ib.SQD}, ib.AttrState },
			ib.SQE: func() (ib.QPAttr, ib.QPAttrMask) { return ib.QPAttr{State: ib.SQE}, ib.AttrState },
		}
		not := func(targets ...ib.QPState) {
			c.Helper()
			now := e.query().Attr.State
			for _, to := range targets {
				attr, mask := full[to]()
				e.illegal(fmt.Sprintf("%v %v -> %v", typ, now, to), attr, mask)
			}
		}
		e.staysIn(ib.Reset)
		not(ib.RTR, ib.RTS, ib.SQD, ib.SQE)
		e.toInit(o, 1)
		not(ib.RTS, ib.SQD, ib.SQE)
		e.toInit(o, 1) // once more
		l.b.toInit(o, 2)
		e.toRTR(o, l.b)
		not(ib.SQD, ib.SQE)
		l.b.toRTR(o, e)
		e.toRTS(o)
		not(ib.RTR, ib.SQE)
		e.to(ib.Err)
		not(ib.RTR, ib.RTS, ib.SQD, ib.SQE)
		e.to(ib.Err)
		e.to(ib.Reset)
		e.toInit(o, 1)
		e.to(ib.Err)
		e.to(ib.Reset)
		e.to(ib.Reset)
	}
}

func stateAttributes(c *C) {
	for _, typ := range c.types() {
		o := c.opts(typ)
		o.noConnect = true
		l := c.pairOn(c.A, c.B, o)
		missing := func(attr ib.QPAttr, mask ib.QPAttrMask, need ...ib.QPAttrMask) {
			c.Helper()
			for _, n := range need {
				l.a.illegal(fmt.Sprintf("%v to %v without %v", typ, attr.State, n), attr, mask&^n)
			}
		}
		if typ == ib.UD {
			missing(ib.QPAttr{State: ib.Init, Port: 1, QKey: 5}, ib.AttrState|ib.AttrPort|ib.AttrPKeyIndex|ib.AttrQKey, ib.AttrPort, ib.AttrPKeyIndex, ib.AttrQKey)
			l.a.illegal("UD to INIT with access rights", ib.QPAttr{State: ib.Init, Port: 1, QKey: 5}, ib.AttrState|ib.AttrPort|ib.AttrPKeyIndex|ib.AttrQKey|ib.AttrAccess)
		} else {
			missing(ib.QPAttr{State: ib.Init, Port: 1}, ib.AttrState|ib.AttrPort|ib.AttrPKeyIndex|ib.AttrAccess, ib.AttrPort, ib.AttrPKeyIndex, ib.AttrAccess)
			l.a.illegal("to INIT with a Q_Key", ib.QPAttr{State: ib.Init, Port: 1, QKey: 5}, ib.AttrState|ib.AttrPort|ib.AttrPKeyIndex|ib.AttrQKey|ib.AttrAccess)
		}
		l.a.toInit(o, 1)
		l.b.toInit(o, 2)
		attr, mask := l.a.rtrAttr(o, l.b)
		if typ != ib.UD {
			missing(attr, mask, ib.AttrAV, ib.AttrPathMTU, ib.AttrDestQPN, ib.AttrRQPSN)
		}
		if typ == ib.RC {
			missing(attr, mask, ib.AttrMaxDestRdAtomic, ib.AttrMinRNRTimer)
		} else {
			l.a.illegal("to RTR with an RNR timer", attr, mask|ib.AttrMinRNRTimer)
		}
		l.a.toRTR(o, l.b)
		attr, mask = l.a.rtsAttr(o)
		missing(attr, mask, ib.AttrSQPSN)
		if typ == ib.RC {
			missing(attr, mask, ib.AttrAckTimeout, ib.AttrRetryCount, ib.AttrRNRRetry, ib.AttrMaxRdAtomic)
		} else {
			l.a.illegal("to RTS with a retry count", attr, mask|ib.AttrRetryCount)
		}
		l.a.illegal("to RTS with an address", attr, mask|ib.AttrAV)
		l.a.toRTS(o)
		l.a.illegal("wrong current state", ib.QPAttr{State: ib.RTS, CurState: ib.SQD}, ib.AttrState|ib.AttrCurState)
		l.a.modify(ib.QPAttr{State: ib.RTS, CurState: ib.RTS}, ib.AttrState|ib.AttrCurState)
	}
}

// Values that no device can do are refused, and the QP stays where it is.
func badValues(c *C) {
	o := c.opts(ib.RC)
	o.noConnect = true
	l := c.pairOn(c.A, c.B, o)
	bad := func(what string, attr ib.QPAttr, mask ib.QPAttrMask) {
		c.Helper()
		was := l.a.query().Attr.State
		if err := l.a.tryModify(attr, mask); err == nil {
			c.Errorf("%s is accepted", what)
			l.a.to(ib.Reset)
			l.a.toInit(o, 0)
		} else if now := l.a.query().Attr.State; now != was {
			c.Errorf("%s: %v, but the state went from %v to %v", what, err, was, now)
		}
	}
	init := ib.AttrState | ib.AttrPort | ib.AttrPKeyIndex | ib.AttrAccess
	bad("port 0", ib.QPAttr{State: ib.Init}, init)
	bad("a port that is not there", ib.QPAttr{State: ib.Init, Port: uint8(c.A.dev.Attr.Ports + 1)}, init)
	bad("a P_Key index that is not there", ib.QPAttr{State: ib.Init, Port: 1, PKeyIndex: uint16(max(c.A.dev.Port.PKeyTable, 1))}, init)
	l.a.toInit(o, 0)
	attr, mask := l.a.rtrAttr(o, l.b)
	for what, f := range inOrder(map[string]func(*ib.QPAttr){
		"an MTU code of 0":      func(a *ib.QPAttr) { a.PathMTU = 0 },
		"an MTU code of 6":      func(a *ib.QPAttr) { a.PathMTU = 6 },
		"a GID index too large": func(a *ib.QPAttr) { a.AH.SGIDIndex = c.A.dev.Port.GIDTable + 1 },
		"a negative GID index":  func(a *ib.QPAttr) { a.AH.SGIDIndex = -1 },
	}) {
		b := attr
		f(&b)
		bad(what, b, mask)
	}
	l.b.toInit(o, 0)
	l.a.toRTR(o, l.b)
}

// IBA 10.8.2 and 10.3.1: sends are refused before RTS, receives in RESET.
func postRefused(c *C) {
	for _, typ := range c.types() {
		o := c.opts(typ)
		o.noConnect = true
		l := c.pairOn(c.A, c.B, o)
		noSend := func() {
			c.Helper()
			if n, err := l.a.tryPost(wrSend(1), wrSend(2)); n != 0 || !errors.Is(err, verbs.ErrState) {
				c.Errorf("%v: post_send in %v: %d accepted, %v; want 0 and ErrState", typ, l.a.query().Attr.State, n, err)
			}
		}
		noSend()
		if n, err := l.a.tryRecv(ib.RecvWR{}); n != 0 || !errors.Is(err, verbs.ErrState) {
			c.Errorf("%v: post_recv in RESET: %d accepted, %v; want 0 and ErrState", typ, n, err)
		}
		l.a.toInit(o, 1)
		l.b.toInit(o, 2)
		noSend()
		l.a.toRTR(o, l.b)
		noSend()
		l.a.scq.empty("refused sends")
		if n, err := l.a.tryPost(); n != 0 {
			c.Errorf("an empty list of sends: %d, %v", n, err)
		}
	}
}

// Receives posted in INIT are used from RTR on; the peer may be in RTS before.
func receiveEarly(c *C) {
	o := c.opts(ib.RC)
	o.noConnect = true
	l := c.pairOn(c.A, c.B, o)
	l.a.toInit(o, 0)
	l.b.toInit(o, 0)
	l.b.recv(1, l.b.mem.sge(0, 64))
	l.b.rcq.empty("a receive in INIT")
	l.a.toRTR(o, l.b)
	l.a.toRTS(o)
	l.b.toRTR(o, l.a)
	l.b.recv(2, l.b.mem.sge(64, 64))
	l.a.post(wrSend(7, l.a.mem.sge(0, 5)), wrSend(8, l.a.mem.sge(0, 6)))
	l.b.received(want{ID: 1, Op: ib.WCRecv, Len: 5}, want{ID: 2, Op: ib.WCRecv, Len: 6})
	l.a.sent(want{ID: 7, Op: ib.WCSend, Len: anyLen}, want{ID: 8, Op: ib.WCSend, Len: anyLen})
	l.b.toRTS(o)
	l.alive(c)
}

// A QP's rights can be changed while it works.
func accessChanged(c *C) {
	l := c.pair(ib.RC)
	l.a.post(wrWrite(1, l.a.mem.sges(0, 8), l.b.mem, 0))
	l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen})
	l.b.modify(ib.QPAttr{State: ib.RTS, Access: ib.AccessRemoteRead}, ib.AttrState|ib.AttrAccess)
	l.a.post(wrRead(2, l.a.mem.sges(0, 8), l.b.mem, 0))
	l.a.sent(want{ID: 2, Op: ib.WCRDMARead, Len: 8})
	l.b.mem.canary()
	l.a.post(wrWrite(3, l.a.mem.sges(0, 8), l.b.mem, 0))
	l.a.sentOneOf(3, ib.WCRemoteAccessErr, ib.WCRemoteInvalidReqErr)
	l.b.mem.intact("WRITE after the right was taken away")
}

// IBA 10.3.1.5: in SQD requests are accepted and held, receives go on; RTS lets them go.
func sendQueueDrain(c *C) {
	l := c.pair(ib.RC)
	if err := l.a.tryModify(ib.QPAttr{State: ib.SQD, SQDNotify: true}, ib.AttrState|ib.AttrSQDNotify); err != nil {
		if c.A.dev.Provider == "soft" {
			c.Fatal(err)
		}
		c.Log(err)
		c.Skip("the device has no SQD")
	}
	if ev := c.A.event(ib.EventSQDrained); ev.QPN != l.a.QPN {
		c.Errorf("event of QP %#x, want %#x", ev.QPN, l.a.QPN)
	}
	l.b.mem.canary()
	l.a.mem.set(0, 64, 1)
	l.b.recv(1, l.b.mem.sge(1000, 64))
	l.a.post(wrSend(1, l.a.mem.sge(0, 8)), wrWrite(2, l.a.mem.sges(0, 8), l.b.mem, 0))
	c.sleep(quiet)
	l.a.scq.empty("requests in SQD")
	l.b.mem.intact("requests in SQD")
	l.a.recv(3, l.a.mem.sge(100, 8))
	l.b.post(wrSend(4, l.b.mem.sge(0, 8)))
	l.a.received(want{ID: 3, Op: ib.WCRecv, Len: 8})
	l.b.sent(want{ID: 4, Op: ib.WCSend, Len: anyLen})
	l.a.staysIn(ib.SQD)
	l.a.to(ib.RTS)
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen}, want{ID: 2, Op: ib.WCRDMAWrite, Len: anyLen})
	l.b.received(want{ID: 1, Op: ib.WCRecv, Len: 8})
	l.b.mem.is("WRITE after SQD", 0, 8, 1)
	l.alive(c)
}

// The event comes when what was under way has ended, not before; SQD to ERR flushes what is held.
func sqdWaits(c *C) {
	l := c.pair(ib.RC)
	l.a.post(wrSend(1, l.a.mem.sge(0, 8))) // waits for a receive
	c.sleep(quiet / 3)
	if err := l.a.tryModify(ib.QPAttr{State: ib.SQD, SQDNotify: true}, ib.AttrState|ib.AttrSQDNotify); err != nil {
		if c.A.dev.Provider == "soft" {
			c.Fatal(err)
		}
		c.Log(err)
		c.Skip("the device has no SQD")
	}
	c.A.noEvent("a request is still under way")
	l.a.post(wrSend(2))
	l.b.recv(1, l.b.mem.sge(0, 64))
	l.b.recv(2, l.b.mem.sge(0, 64))
	c.A.event(ib.EventSQDrained)
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
	l.b.received(want{ID: 1, Op: ib.WCRecv, Len: 8})
	l.a.scq.empty("a request posted in SQD")
	l.a.to(ib.Err)
	l.a.flushed(l.a.scq, 2)
}

// IBA 10.3.1.6: an error of a UD or UC QP's own send puts it into SQE: the sends behind it are flushed, receives go on,
// and Modify takes it back to RTS. Devices without that state go to ERR (rxe, mlx5).
func sendQueueError(c *C) {
	c.unreliable()
	for _, typ := range c.types() {
		if typ == ib.RC {
			continue
		}
		l := c.pair(typ)
		l.a.recv(7, l.a.mem.sge(0, 1000))
		bad := l.a.mem.sge(0, 8)
		bad.LKey ^= 0x7700
		send := func(from, to *end, id uint64, sges ...ib.SGE) ib.SendWR {
			if typ == ib.UD {
				return udWR(id, from.Side.ah(to.Side), to, map[*end]ib.QKey{l.a: 0x1111, l.b: qkeyOfB}[to], sges...)
			}
			return wrSend(id, sges...)
		}
		l.a.post(send(l.a, l.b, 1, bad), send(l.a, l.b, 2))
		l.a.sent(want{ID: 1, Status: ib.WCLocalProtErr}, want{ID: 2, Status: ib.WCFlushErr})
		switch s := l.a.query().Attr.State; s {
		case ib.Err:
			c.note("%v: the QP goes to ERR instead of SQE", typ)
			l.a.flushed(l.a.rcq, 7)
			continue
		case ib.SQE:
		default:
			c.Fatalf("%v: state %v, want SQE or ERR", typ, s)
		}
		l.b.post(send(l.b, l.a, 3, l.b.mem.sge(0, 8)))
		n := 8
		if typ == ib.UD {
			n += ib.GRHLen
		}
		l.a.received(want{ID: 7, Op: ib.WCRecv, Len: n})
		l.a.post(send(l.a, l.b, 4))
		l.a.flushed(l.a.scq, 4)
		l.a.modify(ib.QPAttr{State: ib.RTS, CurState: ib.SQE}, ib.AttrState|ib.AttrCurState)
		l.b.recv(8, l.b.mem.sge(0, 1000))
		l.a.post(send(l.a, l.b, 5, l.a.mem.sge(0, 8)))
		l.a.sent(want{ID: 5, Op: ib.WCSend, Len: anyLen})
		l.b.received(want{ID: 8, Op: ib.WCRecv, Len: n})
	}
}
