package conformance

import (
	"errors"

	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var _ = addCases("shared receive queues", ib.CapSRQ,
	testCase{name: "srq/shared-by-qps", run: srqShared},
	testCase{name: "srq/ud", needs: ib.CapUD, run: srqUD},
	testCase{name: "srq/full", run: srqFull},
	testCase{name: "srq/empty-is-rnr", run: srqEmpty},
	testCase{name: "srq/limit-event", run: srqLimit},
	testCase{name: "srq/last-wqe-reached", run: srqLastWQE},
	testCase{name: "srq/error-keeps-receives", run: srqErrorKeeps},
	testCase{name: "srq/qp-refuses-post-recv", run: srqNoPostRecv},
	testCase{name: "srq/bad-receive", run: srqBadReceive},
	testCase{name: "srq/other-domain", run: srqOtherDomain},
)

func (s *Side) srqRecv(srq handle, wrs ...ib.RecvWR) {
	s.c.Helper()
	if n, err := call(s, opSRQPostRecv, recvArgs{srq, wrs}); err != nil || n != len(wrs) {
		s.c.Fatalf("%s: post_srq_recv: %d of %d accepted: %v", s.name, n, len(wrs), err)
	}
}

// srqPairs makes pairs whose B sides share an SRQ and a receive CQ.
func (c *C) srqPairs(n, depth int, changes ...func(*linkOpts)) (links []link, srq handle, rcq *CQ) {
	c.Helper()
	srq = do(c.B, opSRQ, srqArgs{c.B.pd, depth, min(4, c.B.dev.Attr.MaxSRQSGE)})
	rcq = c.B.cq(256)
	for range n {
		links = append(links, c.pair(ib.RC, append(changes, func(o *linkOpts) { o.srqB, o.rcqB = srq, rcq })...))
	}
	return links, srq, rcq
}

// Receives are taken in the order of posting, by whichever QP has a message (IBA 10.2.9).
func srqShared(c *C) {
	links, srq, rcq := c.srqPairs(3, 64)
	buf := c.B.mem(c.B.pd, 64<<10, accessAll)
	buf.canary()
	const n = 30
	for i := range n {
		c.B.srqRecv(srq, ib.RecvWR{ID: uint64(i), SGEs: []ib.SGE{buf.sge(i*1024, 100), buf.sge(i*1024+512, 100)}})
	}
	for i := range n {
		l := links[i*7%3]
		l.a.mem.fill(0, 100+i, uint64(i+1))
		l.a.post(wrSend(uint64(i), l.a.mem.sge(0, 100+i)))
		l.a.sent(want{ID: uint64(i), Op: ib.WCSend, Len: anyLen})
		l.b.received(want{ID: uint64(i), Op: ib.WCRecv, Len: 100 + i})
		if d := firstDifference(append(buf.read(i*1024, 100), buf.read(i*1024+512, i)...), l.a.mem.read(0, 100+i)); d != "" {
			c.Fatalf("message %d: %s", i, d)
		}
		buf.is("behind the message", i*1024+512+i, 512-i, canaryByte)
	}
	if !c.hasOp(ib.OpRDMAWriteWithImm) {
		rcq.empty("all messages")
		return
	}
	// A WRITE with immediate takes one, too.
	c.B.srqRecv(srq, ib.RecvWR{ID: 99})
	wi := wrWrite(1, links[0].a.mem.sges(0, 10), links[0].b.mem, 0)
	wi.Opcode, wi.Imm = ib.OpRDMAWriteWithImm, 5
	links[0].a.post(wi)
	links[0].b.received(want{ID: 99, Op: ib.WCRecvRDMAWithImm, Len: 10, Flags: ib.WCWithImm, Imm: 5})
	rcq.empty("all messages")
}

func srqUD(c *C) {
	srq := do(c.B, opSRQ, srqArgs{c.B.pd, 16, 1})
	l := c.pair(ib.UD, func(o *linkOpts) { o.srqB = srq })
	c.B.srqRecv(srq, ib.RecvWR{ID: 1, SGEs: l.b.mem.sges(0, ib.GRHLen+100)}, ib.RecvWR{ID: 2, SGEs: l.b.mem.sges(1000, ib.GRHLen+100)})
	wr := wrSend(5, l.a.mem.sge(0, 100))
	wr.AH, wr.RemoteQPN, wr.RemoteQKey = c.A.ah(c.B), l.b.QPN, 0x2222
	l.a.mem.fill(0, 100, 8)
	l.a.post(wr)
	l.b.received(want{ID: 1, Op: ib.WCRecv, Len: ib.GRHLen + 100})
	l.b.mem.has("datagram", ib.GRHLen, 100, 8)
}

func srqFull(c *C) {
	links, srq, rcq := c.srqPairs(1, 8)
	l := links[0]
	wrs := make([]ib.RecvWR, 4096)
	n, err := call(c.B, opSRQPostRecv, recvArgs{srq, wrs})
	if n < 8 || n == len(wrs) || !errors.Is(err, verbs.ErrQueueFull) {
		c.Fatalf("%d receives accepted into an SRQ of 8, error %v; want all that fit and ErrQueueFull", n, err)
	}
	for range 3 {
		for range 2 {
			l.a.post(wrSend(1))
			l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
			rcq.wait(1)
		}
		c.B.srqRecv(srq, wrs[:2]...)
	}
	if k, err := call(c.B, opSRQPostRecv, recvArgs{srq, wrs[:1]}); k != 0 || !errors.Is(err, verbs.ErrQueueFull) {
		c.Fatalf("one more: %d accepted, %v", k, err)
	}
	if n, err := call(c.B, opSRQPostRecv, recvArgs{srq, []ib.RecvWR{{SGEs: make([]ib.SGE, c.B.dev.Attr.MaxSRQSGE+1)}}}); n != 0 || err == nil {
		c.Fatalf("a receive with too many SGEs: %d accepted, %v", n, err)
	}
}

func srqEmpty(c *C) {
	links, srq, _ := c.srqPairs(2, 16)
	links[0].a.post(wrSend(1, links[0].a.mem.sge(0, 8)))
	links[1].a.post(wrSend(2, links[1].a.mem.sge(0, 9)))
	nothingSent(c, links[0].a, links[1].a)
	c.B.srqRecv(srq, ib.RecvWR{SGEs: links[0].b.mem.sges(0, 64)}, ib.RecvWR{SGEs: links[0].b.mem.sges(0, 64)})
	links[0].a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
	links[1].a.sent(want{ID: 2, Op: ib.WCSend, Len: anyLen})
	none, _, _ := c.srqPairs(1, 16, func(o *linkOpts) { o.rnrRetry = 0 })
	none[0].a.post(wrSend(3))
	none[0].a.sent(want{ID: 3, Status: ib.WCRNRRetryExceeded})
}

// nothingSent checks that none of the ends has a completion yet.
func nothingSent(c *C, ends ...*end) {
	c.Helper()
	for _, e := range ends {
		e.scq.empty("no receive is posted")
	}
}

// IBA 10.2.9.3: one event when fewer receives are left than the limit, which then is disarmed.
func srqLimit(c *C) {
	links, srq, rcq := c.srqPairs(1, 32)
	l := links[0]
	for i := range 10 {
		c.B.srqRecv(srq, ib.RecvWR{ID: uint64(i)})
	}
	do(c.B, opSRQLimit, limitArgs{srq, 8})
	take := func(n int) {
		for range n {
			l.a.post(wrSend(1))
			l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
		}
		rcq.wait(n)
	}
	take(2) // 8 are left
	c.B.noEvent("as many receives as the limit")
	take(1)
	if ev := c.B.event(ib.EventSRQLimit); ev.Object != srq {
		c.Errorf("event of object %d, want the SRQ, %d", ev.Object, srq)
	}
	take(3)
	c.B.noEvent("the limit was disarmed by its event")
	do(c.B, opSRQLimit, limitArgs{srq, 3})
	take(1) // 3 are left
	c.B.noEvent("as many receives as the limit")
	take(1)
	c.B.event(ib.EventSRQLimit)
	do(c.B, opSRQLimit, limitArgs{srq, 2})
	do(c.B, opSRQLimit, limitArgs{srq, 0})
	take(2)
	c.B.noEvent("limit 0 is none")
	if _, err := call(c.B, opSRQLimit, limitArgs{srq, c.B.dev.Attr.MaxSRQWR + 1}); err == nil {
		c.Error("a limit above the SRQ's size was accepted")
	}
}

// IBA 11.6.3.1: a QP in error that takes no more from its SRQ says so; then it can be destroyed without losing receives.
func srqLastWQE(c *C) {
	links, srq, _ := c.srqPairs(2, 16)
	c.B.srqRecv(srq, ib.RecvWR{ID: 1}, ib.RecvWR{ID: 2})
	links[0].b.to(ib.Err)
	if ev := c.B.event(ib.EventLastWQEReached); ev.QPN != links[0].b.QPN {
		c.Errorf("event of QP %#x, want %#x", ev.QPN, links[0].b.QPN)
	}
	// By an error that the peer causes.
	l := links[1]
	l.a.post(wrOneSided(1, ib.OpRDMAWrite, l.a.mem.sges(0, 8), 0, 0))
	l.a.sent(want{ID: 1, Status: ib.WCRemoteAccessErr})
	if ev := c.B.event(ib.EventLastWQEReached); ev.QPN != l.b.QPN {
		c.Errorf("event of QP %#x, want %#x", ev.QPN, l.b.QPN)
	}
}

// Receives that no QP has taken stay in the SRQ when one of its QPs goes to error.
func srqErrorKeeps(c *C) {
	links, srq, rcq := c.srqPairs(2, 16)
	for i := range 4 {
		c.B.srqRecv(srq, ib.RecvWR{ID: uint64(10 + i), SGEs: links[0].b.mem.sges(0, 64)})
	}
	links[0].b.to(ib.Err)
	rcq.empty("receives of an SRQ are not flushed")
	if err := links[0].b.destroy(); err != nil {
		c.Fatal(err)
	}
	l := links[1]
	for i := range 4 {
		l.a.post(wrSend(uint64(i), l.a.mem.sge(0, i)))
		l.a.sent(want{ID: uint64(i), Op: ib.WCSend, Len: anyLen})
		l.b.received(want{ID: uint64(10 + i), Op: ib.WCRecv, Len: i})
	}
}

func srqNoPostRecv(c *C) {
	links, srq, _ := c.srqPairs(1, 16)
	l := links[0]
	if n, err := l.b.tryRecv(ib.RecvWR{}); n != 0 || !errors.Is(err, verbs.ErrInvalidWR) {
		c.Errorf("post_recv to a QP with an SRQ: %d accepted, %v; want 0 and ErrInvalidWR", n, err)
	}
	c.B.srqRecv(srq, ib.RecvWR{ID: 4})
	l.a.post(wrSend(1))
	l.b.received(want{ID: 4, Op: ib.WCRecv})
}

// A receive that is too small, or not writable, puts its QP in error; the SRQ and the other QPs go on.
func srqBadReceive(c *C) {
	links, srq, _ := c.srqPairs(3, 16)
	m := links[0].b.mem
	readOnly := c.B.mem(c.B.pd, 4096, 0)
	c.B.srqRecv(srq, ib.RecvWR{ID: 1, SGEs: m.sges(0, 4)}, ib.RecvWR{ID: 2, SGEs: readOnly.sges(0, 64)}, ib.RecvWR{ID: 3, SGEs: m.sges(0, 64)})
	links[0].a.post(wrSend(1, links[0].a.mem.sge(0, 8)))
	links[0].a.sent(want{ID: 1, Status: ib.WCRemoteInvalidReqErr})
	links[0].b.receivedOneOf(1, ib.WCLocalLengthErr, ib.WCRemoteInvalidReqErr)
	links[1].a.post(wrSend(1, links[1].a.mem.sge(0, 8)))
	links[1].a.sent(want{ID: 1, Status: ib.WCRemoteOpErr})
	links[1].b.receivedOneOf(2, ib.WCLocalProtErr, ib.WCLocalQPOpErr)
	links[0].b.inState(ib.Err)
	links[1].b.inState(ib.Err)
	links[2].a.post(wrSend(1, links[2].a.mem.sge(0, 8)))
	links[2].a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
	links[2].b.received(want{ID: 3, Op: ib.WCRecv, Len: 8})
}

// An SRQ belongs to a domain, and its receives are checked against that one (IBA 10.2.9.4).
func srqOtherDomain(c *C) {
	links, srq, _ := c.srqPairs(1, 16)
	other := c.B.mem(do(c.B, opPD, none{}), 4096, accessAll)
	other.canary()
	c.B.srqRecv(srq, ib.RecvWR{ID: 1, SGEs: other.sges(0, 64)})
	l := links[0]
	l.a.post(wrSend(1, l.a.mem.sge(0, 8)))
	l.a.sent(want{ID: 1, Status: ib.WCRemoteOpErr})
	l.b.receivedOneOf(1, ib.WCLocalProtErr, ib.WCLocalQPOpErr)
	other.intact("region of another domain")
}
