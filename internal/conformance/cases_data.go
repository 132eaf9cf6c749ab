package conformance

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var _ = addCases("SEND, WRITE, READ on RC", 0,
	testCase{name: "rc/send", run: func(c *C) { sendSizes(c, ib.RC, false) }},
	testCase{name: "rc/send-imm", needs: ib.CapImm, run: func(c *C) { sendSizes(c, ib.RC, true) }},
	testCase{name: "rc/write", run: func(c *C) { writeSizes(c, ib.RC, false) }},
	testCase{name: "rc/write-imm", needs: ib.CapImm, run: func(c *C) { writeSizes(c, ib.RC, true) }},
	testCase{name: "rc/read", run: func(c *C) { readSizes(c) }},
	testCase{name: "rc/zero-length-needs-no-key", run: zeroLengthNoKey},
	testCase{name: "rc/loopback", run: loopback},
	testCase{name: "rc/self", run: selfConnected},
	testCase{name: "rc/path-mtu-of-each-size", run: eachMTU},
	testCase{name: "rc/send-order", run: sendOrder},
)

var _ = addCases("UC", ib.CapUC,
	testCase{name: "uc/send", run: func(c *C) { sendSizes(c, ib.UC, false) }},
	testCase{name: "uc/send-imm", run: func(c *C) { sendSizes(c, ib.UC, true) }},
	testCase{name: "uc/write", run: func(c *C) { writeSizes(c, ib.UC, false) }},
	testCase{name: "uc/write-imm", run: func(c *C) { writeSizes(c, ib.UC, true) }},
	testCase{name: "uc/opcodes-refused", run: ucRefused},
	testCase{name: "uc/no-receive-drops", run: ucNoReceive},
	testCase{name: "uc/receive-too-small", run: ucTooSmall},
	testCase{name: "uc/write-wrong-key-drops", run: ucWrongKey},
)

var _ = addCases("scatter, gather, inline", 0,
	testCase{name: "sge/gather-send-scatter-receive", run: func(c *C) { scatterGather(c) }},
	testCase{name: "sge/gather-write", run: gatherWrite},
	testCase{name: "sge/scatter-read", run: scatterRead},
	testCase{name: "sge/none", run: noSGE},
	testCase{name: "sge/too-many", run: tooManySGEs},
	testCase{name: "inline/sizes", run: inlineSizes},
	testCase{name: "inline/refused", run: inlineRefused},
)

var _ = addCases("ordinary slices", 0,
	testCase{name: "slice/send", run: func(c *C) { sendSizes(c, ib.RC, false, oddSliceMem) }},
	testCase{name: "slice/write-imm", needs: ib.CapImm, run: func(c *C) { writeSizes(c, ib.RC, true, sliceMem) }},
	testCase{name: "slice/write", run: func(c *C) { writeSizes(c, ib.RC, false, oddSliceMem) }},
	testCase{name: "slice/read", run: func(c *C) { readSizes(c, oddSliceMem) }},
	testCase{name: "slice/mixed", run: sliceMixed},
	testCase{name: "slice/scatter-gather", run: func(c *C) { scatterGather(c, sliceMem) }},
	testCase{name: "slice/atomics", needs: ib.CapAtomic, run: func(c *C) { atomicsBasic(c, sliceMem) }},
)

func sliceMem(o *linkOpts) { o.sliceMem = true }

// oddSliceMem has slices begin at any byte, as a program's may.
func oddSliceMem(o *linkOpts) {
	o.sliceMem, o.odd = true, true
	o.memAccess &^= ib.AccessRemoteAtomic
}

const bigMessage = 1<<20 + 3

// sizes are the message lengths where implementations change their ways: none, one byte, a word, around a cache line,
// around the MTU, and many packets.
// A message without acknowledgements must not be longer than what a socket of Linux holds by default.
func (c *C) sizes(typ ib.QPType) []int {
	mtu := min(c.A.dev.Port.ActiveMTU, c.B.dev.Port.ActiveMTU).Bytes()
	all := []int{0, 1, 8, 63, 64, 65, mtu - 1, mtu, mtu + 1, 64 << 10, bigMessage}
	if typ != ib.RC && (c.A.dev.Net || c.B.dev.Net) {
		return all[:len(all)-1]
	}
	return all
}

// room is the memory around a target, for canaries.
const room = 256

func bigMem(o *linkOpts) { o.memSize = bigMessage + 2*room }

func changed(f func(*linkOpts), more []func(*linkOpts)) []func(*linkOpts) {
	return append([]func(*linkOpts){f}, more...)
}

func sendSizes(c *C, typ ib.QPType, imm bool, changes ...func(*linkOpts)) {
	l := c.pair(typ, changed(bigMem, changes)...)
	for i, n := range c.sizes(typ) {
		id := uint64(i + 1)
		l.a.mem.fill(0, n, id)
		l.b.mem.canary()
		// The receive buffer has room for more than comes.
		l.b.recv(id, l.b.mem.sge(room, bigMessage))
		wr := wrSend(id, l.a.mem.sge(0, n))
		w := want{ID: id, Op: ib.WCRecv, Len: n}
		if imm {
			wr.Opcode, wr.Imm = ib.OpSendWithImm, immediates[i%len(immediates)]
			w.Flags, w.Imm = ib.WCWithImm, wr.Imm
		}
		l.a.post(wr)
		l.a.sent(want{ID: id, Op: ib.WCSend, Len: anyLen})
		l.b.received(w)
		what := fmt.Sprintf("SEND of %d bytes", n)
		l.b.mem.has(what, room, n, id)
		l.b.mem.intactAround(what, room, n)
		l.a.mem.has(what+": source", 0, n, id)
	}
	l.b.rcq.empty("after all messages")
}

var immediates = []uint32{0, 1, 0xdeadbeef, 0x80000000, math.MaxUint32, 0x01020304}

func writeSizes(c *C, typ ib.QPType, imm bool, changes ...func(*linkOpts)) {
	l := c.pair(typ, changed(bigMem, changes)...)
	for i, n := range c.sizes(typ) {
		id := uint64(i + 1)
		l.a.mem.fill(0, n, id)
		l.b.mem.canary()
		wr := wrWrite(id, l.a.mem.sges(0, n), l.b.mem, room)
		if imm {
			wr.Opcode, wr.Imm = ib.OpRDMAWriteWithImm, immediates[i%len(immediates)]
			l.b.recv(id) // takes no buffer
		}
		l.a.post(wr)
		l.a.sent(want{ID: id, Op: ib.WCRDMAWrite, Len: anyLen})
		if imm {
			l.b.received(want{ID: id, Op: ib.WCRecvRDMAWithImm, Len: n, Flags: ib.WCWithImm, Imm: wr.Imm})
		} else if typ != ib.RC {
			// The completion of an unreliable WRITE says that it was sent. What follows it on the same QP arrives after it.
			l.b.recv(id)
			l.a.post(wrSend(id))
			l.a.sent(want{ID: id, Op: ib.WCSend, Len: anyLen})
			l.b.received(want{ID: id, Op: ib.WCRecv})
		}
		what := fmt.Sprintf("WRITE of %d bytes", n)
		l.b.mem.has(what, room, n, id)
		l.b.mem.intactAround(what, room, n)
	}
	l.b.rcq.empty("after all writes")
}

func readSizes(c *C, changes ...func(*linkOpts)) {
	l := c.pair(ib.RC, changed(bigMem, changes)...)
	for i, n := range c.sizes(ib.RC) {
		id := uint64(i + 1)
		l.b.mem.fill(room, n, id)
		l.a.mem.canary()
		l.a.post(wrRead(id, l.a.mem.sges(room, n), l.b.mem, room))
		l.a.sent(want{ID: id, Op: ib.WCRDMARead, Len: n})
		what := fmt.Sprintf("READ of %d bytes", n)
		l.a.mem.has(what, room, n, id)
		l.a.mem.intactAround(what, room, n)
		l.b.mem.has(what+": source", room, n, id)
	}
	l.b.rcq.empty("READ does not take a receive")
}

// IBA C9-88 and 9.7.4.1: a zero-length RDMA request does not check the R_Key, nor is the address used.
func zeroLengthNoKey(c *C) {
	l := c.pair(ib.RC)
	l.a.post(wrOneSided(1, ib.OpRDMAWrite, nil, 0, 0), wrOneSided(2, ib.OpRDMARead, nil, 12345, 0xffffff00),
		wrOneSided(3, ib.OpRDMAWrite, l.a.mem.sges(0, 0), math.MaxUint64, 7))
	l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen}, want{ID: 2, Op: ib.WCRDMARead}, want{ID: 3, Op: ib.WCRDMAWrite, Len: anyLen})
	l.alive(c)
}

// Two QPs of one context.
func loopback(c *C) {
	for _, s := range []*Side{c.A, c.B} {
		l := c.pairOn(s, s, c.opts(ib.RC))
		l.alive(c)
		l.a.mem.fill(0, 4096, 77)
		l.a.post(wrWrite(1, l.a.mem.sges(0, 4096), l.b.mem, 8))
		l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen})
		l.b.mem.has("WRITE within a context", 8, 4096, 77)
	}
}

// A QP that is its own peer (IBA 9.2 allows it, and each adapter does it).
func selfConnected(c *C) {
	if c.streams {
		c.Skip(nothingToDo + ": a stream has two ends")
	}
	o := c.opts(ib.RC)
	e := c.end(c.A, o, nil, nil, 0)
	e.toInit(o, 0)
	e.toRTR(o, e)
	e.toRTS(o)
	e.mem.fill(0, 1000, 5)
	e.recv(2, e.mem.sge(2000, 1000))
	e.post(wrSend(1, e.mem.sge(0, 1000)), wrWrite(3, e.mem.sges(0, 1000), e.mem, 4000))
	e.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen}, want{ID: 3, Op: ib.WCRDMAWrite, Len: anyLen})
	e.received(want{ID: 2, Op: ib.WCRecv, Len: 1000})
	e.mem.has("SEND to itself", 2000, 1000, 5)
	e.mem.has("WRITE to itself", 4000, 1000, 5)
}

func eachMTU(c *C) {
	top := c.opts(ib.RC).mtu
	for mtu := ib.MTU256; mtu <= top; mtu++ {
		l := c.pair(ib.RC, func(o *linkOpts) { o.mtu = mtu })
		n := 5*mtu.Bytes() + 1
		l.a.mem.fill(0, n, uint64(mtu))
		l.b.mem.canary()
		l.b.recv(1, l.b.mem.sge(room, n))
		l.a.post(wrSend(1, l.a.mem.sge(0, n)))
		l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
		l.b.received(want{ID: 1, Op: ib.WCRecv, Len: n})
		l.b.mem.has("SEND", room, n, uint64(mtu))
		l.b.mem.intactAround("SEND", room, n)
		if got := l.a.query().Attr.PathMTU; got != mtu {
			c.Fatalf("Query says MTU %v, want %v", got, mtu)
		}
	}
}

// Messages of one QP are received in the order of posting, each by the next receive.
func sendOrder(c *C) {
	l := c.pair(ib.RC)
	const n = 48
	var wrs []ib.SendWR
	var sent, got []want
	for i := range n {
		id := uint64(i)
		l.b.recv(100+id, l.b.mem.sge(i*512, 512))
		l.a.mem.fill(i*512, i*10, id+1)
		wrs = append(wrs, wrSend(id, l.a.mem.sge(i*512, i*10)))
		sent = append(sent, want{ID: id, Op: ib.WCSend, Len: anyLen})
		got = append(got, want{ID: 100 + id, Op: ib.WCRecv, Len: i * 10})
	}
	l.a.post(wrs...)
	l.a.sent(sent...)
	l.b.received(got...)
	for i := range n {
		l.b.mem.has(fmt.Sprint("message ", i), i*512, i*10, uint64(i)+1)
	}
}

// refused posts a request that must not be done: either PostSend refuses it with ErrInvalidWR, or, as devices do that
// check it later, it completes with one of the statuses.
func (c *C) refused(q *QP, wr ib.SendWR, statuses ...ib.WCStatus) (atPost bool) {
	c.Helper()
	n, err := q.tryPost(wr)
	if err != nil {
		if n != 0 || !errors.Is(err, verbs.ErrInvalidWR) {
			c.Fatalf("post_send of a bad request: %d accepted, error %v; want 0 and ErrInvalidWR", n, err)
		}
		return true
	}
	if len(statuses) == 0 {
		c.Fatalf("post_send accepts a bad request")
	}
	q.oneOf(q.scq, "send", wr.ID, statuses)
	return false
}

// IBA table 38 and 10.8.2: UC has no READ, no atomics; SEND with invalidate has no UC opcode on the wire.
func ucRefused(c *C) {
	for _, op := range []ib.Opcode{ib.OpRDMARead, ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd, ib.OpSendWithInv} {
		l := c.pair(ib.UC)
		l.b.mem.canary()
		l.b.recv(1, l.b.mem.sge(0, 8))
		wr := ib.SendWR{ID: 5, Opcode: op, Flags: ib.SendSignaled, SGEs: l.a.mem.sges(0, 8), RemoteAddr: l.b.mem.Addr, RKey: l.b.mem.RKey, InvalidateRKey: l.b.mem.RKey}
		if c.refused(l.a.QP, wr, ib.WCLocalQPOpErr) {
			l.a.staysIn(ib.RTS)
		}
		l.b.mem.intact(op.String())
		l.b.rcq.empty(op.String())
	}
}

// settle waits until what was sent unreliably has arrived or is lost. A direct path delivers while it sends.
func (c *C) settle() {
	if c.A.dev.Port.LinkLayer != ib.LinkMemory || c.A.dev.Net {
		c.sleep(20 * quiet)
	}
}

// IBA 9.8.2.2.6: a UC responder without a receive drops the message; the requester knows nothing.
func ucNoReceive(c *C) {
	l := c.pair(ib.UC)
	l.a.post(wrSend(1, l.a.mem.sge(0, 100)))
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
	c.settle()
	l.b.recv(7, l.b.mem.sge(0, 100))
	l.b.rcq.empty("a dropped message must not come later")
	l.a.mem.fill(0, 50, 3)
	l.a.post(wrSend(2, l.a.mem.sge(0, 50)))
	l.a.sent(want{ID: 2, Op: ib.WCSend, Len: anyLen})
	l.b.received(want{ID: 7, Op: ib.WCRecv, Len: 50})
	l.b.mem.has("message after a dropped one", 0, 50, 3)
}

// A UC message that is longer than the receive is an error of class D or E (IBA 9.9.3): rxe drops it and keeps the
// receive, mlx5 ends the receive with a local length error.
func ucTooSmall(c *C) {
	l := c.pair(ib.UC)
	l.b.mem.canary()
	l.b.recv(7, l.b.mem.sge(room, 10))
	l.a.post(wrSend(1, l.a.mem.sge(0, 11)))
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
	c.settle()
	wcs := do(l.b.Side, opPoll, pollArgs{l.b.rcq.H, 1, quiet})
	l.b.mem.is("outside the receive buffer", room+10, 100, canaryByte)
	if len(wcs) == 0 {
		c.note("a UC message that is too long is dropped")
		l.a.post(wrSend(2, l.a.mem.sge(0, 10)))
		l.b.received(want{ID: 7, Op: ib.WCRecv, Len: 10})
		return
	}
	if wcs[0].ID != 7 || wcs[0].Status != ib.WCLocalLengthErr && !c.B.instead(ib.WCLocalLengthErr, wcs[0].Status) {
		c.Fatalf("receive completion %s, want id 7 and a local length error", showWC(wcs[0]))
	}
	c.note("a UC message that is too long ends the receive with %q", wcs[0].Status)
}

func ucWrongKey(c *C) {
	l := c.pair(ib.UC)
	l.b.mem.canary()
	l.a.post(wrOneSided(1, ib.OpRDMAWrite, l.a.mem.sges(0, 64), l.b.mem.Addr, l.b.mem.RKey^0x5500))
	l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen})
	c.settle()
	l.b.mem.intact("WRITE with a wrong rkey")
}

func scatterGather(c *C, changes ...func(*linkOpts)) {
	l := c.pair(ib.RC, changes...)
	if l.a.Cap.MaxSendSGE < 4 || l.b.Cap.MaxRecvSGE < 4 {
		c.Skip("the device has fewer than 4 SGEs")
	}
	a2, b2 := c.A.mem(c.A.pd, 8192, accessAll), c.B.mem(c.B.pd, 8192, accessAll)
	for round, cut := range [][2][4]int{
		{{10, 20, 30, 40}, {40, 30, 20, 10}},
		{{0, 1, 0, 99}, {1, 98, 1, 0}},
		{{100, 0, 0, 0}, {0, 0, 0, 100}},
		{{4000, 4000, 1, 3}, {1, 7000, 1000, 3}},
		{{7, 0, 64, 1}, {64, 0, 64, 64}}, // the receive is larger
	} {
		l.b.mem.canary()
		b2.canary()
		src := [4]*Mem{l.a.mem, a2, l.a.mem, a2}
		srcOff := [4]int{5000, 0, 0, 4095}
		dst := [4]*Mem{l.b.mem, b2, b2, l.b.mem}
		dstOff := [4]int{1, 8, 7150, 9001}
		var gather, scatter []ib.SGE
		var data []byte
		for i := range 4 {
			src[i].fill(srcOff[i], cut[0][i], uint64(round*10+i+1))
			g := src[i].sge(srcOff[i], cut[0][i])
			if g.Length == 0 {
				g = ib.SGE{} // an element without bytes needs neither key nor address
			}
			gather = append(gather, g)
			data = append(data, src[i].read(srcOff[i], cut[0][i])...)
			scatter = append(scatter, dst[i].sge(dstOff[i], cut[1][i]))
		}
		l.b.recv(2, scatter...)
		l.a.post(wrSend(1, gather...))
		l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
		l.b.received(want{ID: 2, Op: ib.WCRecv, Len: len(data)})
		rest := data
		for i := range 4 {
			n := min(cut[1][i], len(rest))
			if d := firstDifference(dst[i].read(dstOff[i], n), rest[:n]); d != "" {
				c.Fatalf("round %d, element %d of the receive: %s", round, i, d)
			}
			dst[i].is("after an element", dstOff[i]+n, 40, canaryByte)
			rest = rest[n:]
		}
	}
}

func gatherWrite(c *C) {
	l := c.pair(ib.RC)
	if l.a.Cap.MaxSendSGE < 3 {
		c.Skip("the device has fewer than 3 SGEs")
	}
	l.b.mem.canary()
	l.a.mem.fill(0, 6000, 9)
	l.a.post(wrWrite(1, []ib.SGE{l.a.mem.sge(0, 1), l.a.mem.sge(1, 4999), l.a.mem.sge(5000, 1000)}, l.b.mem, room))
	l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen})
	l.b.mem.has("gathered WRITE", room, 6000, 9)
	l.b.mem.intactAround("gathered WRITE", room, 6000)
}

func scatterRead(c *C) {
	l := c.pair(ib.RC)
	if l.a.Cap.MaxSendSGE < 3 || c.A.dev.Attr.MaxSGERead < 3 {
		c.Skip("the device has fewer than 3 SGEs for READs")
	}
	l.a.mem.canary()
	l.b.mem.fill(0, 6000, 9)
	l.a.post(wrRead(1, []ib.SGE{l.a.mem.sge(room, 5000), l.a.mem.sge(5000+room, 1), l.a.mem.sge(5001+room, 999)}, l.b.mem, 0))
	l.a.sent(want{ID: 1, Op: ib.WCRDMARead, Len: 6000})
	l.a.mem.has("scattered READ", room, 6000, 9)
	l.a.mem.intactAround("scattered READ", room, 6000)
}

// Requests without any element are messages of no bytes.
func noSGE(c *C) {
	l := c.pair(ib.RC)
	l.b.recv(1)
	l.b.recv(2)
	l.a.post(wrSend(1), wrOneSided(2, ib.OpRDMAWrite, nil, l.b.mem.Addr, l.b.mem.RKey), wrOneSided(3, ib.OpRDMARead, nil, l.b.mem.Addr, l.b.mem.RKey))
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen}, want{ID: 2, Op: ib.WCRDMAWrite, Len: anyLen}, want{ID: 3, Op: ib.WCRDMARead})
	l.b.received(want{ID: 1, Op: ib.WCRecv})
	if !c.hasOp(ib.OpRDMAWriteWithImm) {
		return
	}
	wi := wrOneSided(2, ib.OpRDMAWriteWithImm, nil, l.b.mem.Addr, l.b.mem.RKey)
	wi.Imm = 99
	l.a.post(wi)
	l.a.sent(want{ID: 2, Op: ib.WCRDMAWrite, Len: anyLen})
	l.b.received(want{ID: 2, Op: ib.WCRecvRDMAWithImm, Flags: ib.WCWithImm, Imm: 99})
}

func tooManySGEs(c *C) {
	l := c.pair(ib.RC)
	elements := func(m *Mem, n int) (s []ib.SGE) {
		for i := range n {
			s = append(s, m.sge(i, 1))
		}
		return s
	}
	good := ib.RecvWR{ID: 1, SGEs: l.b.mem.sges(0, 1)}
	if n, err := l.b.tryRecv(good, ib.RecvWR{ID: 2, SGEs: elements(l.b.mem, l.b.Cap.MaxRecvSGE+1)}, good); n != 1 || !errors.Is(err, verbs.ErrInvalidWR) {
		c.Fatalf("post_recv with too many SGEs in the second of 3: %d accepted, error %v; want 1 and ErrInvalidWR", n, err)
	}
	wr := wrSend(2, elements(l.a.mem, l.a.Cap.MaxSendSGE+1)...)
	if n, err := l.a.tryPost(wrSend(1, l.a.mem.sge(0, 1)), wr, wrSend(3)); n != 1 || !errors.Is(err, verbs.ErrInvalidWR) {
		c.Fatalf("post_send with too many SGEs in the second of 3: %d accepted, error %v; want 1 and ErrInvalidWR", n, err)
	}
	l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
	l.b.received(want{ID: 1, Op: ib.WCRecv, Len: 1})
	l.alive(c)
}

func (c *C) inlinePair() link {
	c.Helper()
	most := min(c.A.dev.Attr.MaxInline, c.B.dev.Attr.MaxInline) // what both ends can be asked for
	if most == 0 {
		c.Skip("the device has no inline data")
	}
	l := c.pair(ib.RC, func(o *linkOpts) { o.inline = most })
	if l.a.Cap.MaxInline < most {
		c.Fatalf("%d bytes of inline data granted, %d asked for", l.a.Cap.MaxInline, most)
	}
	return l
}

func inlineSizes(c *C) {
	l := c.inlinePair()
	sizes := []int{1, 7, 8, 9, 16, 63, 64, 65, l.a.Cap.MaxInline - 1, l.a.Cap.MaxInline}
	for i, n := range sizes {
		if n < 1 || n > l.a.Cap.MaxInline {
			continue
		}
		l.b.mem.canary()
		data := make([]byte, n)
		pattern(data, uint64(i+1))
		l.b.recv(1, l.b.mem.sge(room, n))
		send := ib.SendWR{ID: 1, Opcode: ib.OpSend, Flags: ib.SendSignaled, Inline: data}
		write := ib.SendWR{ID: 2, Opcode: ib.OpRDMAWriteWithImm, Flags: ib.SendSignaled, Inline: data, RemoteAddr: l.b.mem.Addr + 20000, RKey: l.b.mem.RKey, Imm: 4}
		got := []want{{ID: 1, Op: ib.WCRecv, Len: n}, {ID: 2, Op: ib.WCRecvRDMAWithImm, Len: n, Flags: ib.WCWithImm, Imm: 4}}
		if c.hasOp(write.Opcode) {
			l.b.recv(2)
		} else {
			write.Opcode, got = ib.OpRDMAWrite, got[:1]
		}
		l.a.post(send, write)
		clear(data) // the data was copied during PostSend
		l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen}, want{ID: 2, Op: ib.WCRDMAWrite, Len: anyLen})
		l.b.received(got...)
		l.b.mem.has("inline SEND", room, n, uint64(i+1))
		l.b.mem.has("inline WRITE", 20000, n, uint64(i+1))
		l.b.mem.is("after the inline SEND", room+n, 500, canaryByte)
		l.b.mem.is("after the inline WRITE", 20000+n, 500, canaryByte)
	}
}

func inlineRefused(c *C) {
	l := c.inlinePair()
	over := make([]byte, l.a.Cap.MaxInline+1)
	at := func(op ib.Opcode, data []byte, sges ...ib.SGE) ib.SendWR {
		return ib.SendWR{ID: 1, Opcode: op, Flags: ib.SendSignaled, Inline: data, SGEs: sges, RemoteAddr: l.b.mem.Addr, RKey: l.b.mem.RKey}
	}
	for name, wr := range inOrder(map[string]ib.SendWR{
		"SEND over MaxInline":  at(ib.OpSend, over),
		"WRITE over MaxInline": at(ib.OpRDMAWrite, over),
		"inline READ":          at(ib.OpRDMARead, over[:8]),
		"inline atomic":        at(ib.OpAtomicFetchAdd, over[:8]),
		"inline with SGEs":     at(ib.OpSend, over[:8], l.a.mem.sge(0, 8)),
	}) {
		if n, err := l.a.tryPost(wr); n != 0 || !errors.Is(err, verbs.ErrInvalidWR) {
			c.Errorf("%s: %d accepted, error %v; want 0 and ErrInvalidWR", name, n, err)
		}
	}
	l.alive(c)
}

// A transfer between both kinds of memory, in all four combinations.
func sliceMixed(c *C) {
	for _, aSlice := range []bool{false, true} {
		for _, bSlice := range []bool{false, true} {
			l := c.pair(ib.RC, func(o *linkOpts) { o.memSize = 0 })
			l.a.mem = &Mem{c.A, do(c.A, opMem, memArgs{PD: c.A.pd, Size: 20000, Access: accessAll, Slice: aSlice}), 20000}
			l.b.mem = &Mem{c.B, do(c.B, opMem, memArgs{PD: c.B.pd, Size: 20000, Access: accessAll, Slice: bSlice}), 20000}
			what := fmt.Sprintf("slices: %v, %v", aSlice, bSlice)
			l.a.mem.fill(0, 9999, 3)
			l.b.mem.canary()
			l.b.recv(1, l.b.mem.sge(room, 9999))
			l.a.post(wrSend(1, l.a.mem.sge(0, 9999)))
			l.a.sent(want{ID: 1, Op: ib.WCSend, Len: anyLen})
			l.b.received(want{ID: 1, Op: ib.WCRecv, Len: 9999})
			l.b.mem.has(what+": SEND", room, 9999, 3)
			l.b.mem.intactAround(what, room, 9999)
			l.b.mem.canary()
			l.a.post(wrWrite(2, l.a.mem.sges(0, 9999), l.b.mem, room))
			l.a.sent(want{ID: 2, Op: ib.WCRDMAWrite, Len: anyLen})
			l.b.mem.has(what+": WRITE", room, 9999, 3)
			l.b.mem.intactAround(what, room, 9999)
			l.a.mem.canary()
			l.a.post(wrRead(3, l.a.mem.sges(room, 9999), l.b.mem, room))
			l.a.sent(want{ID: 3, Op: ib.WCRDMARead, Len: 9999})
			l.a.mem.has(what+": READ", room, 9999, 3)
			l.a.mem.intactAround(what, room, 9999)
			// Memory that its owner changes by itself is seen as it is now.
			l.b.mem.fill(room, 9999, 4)
			l.a.post(wrRead(4, l.a.mem.sges(room, 9999), l.b.mem, room))
			l.a.sent(want{ID: 4, Op: ib.WCRDMARead, Len: 9999})
			l.a.mem.has(what+": READ of what the owner wrote", room, 9999, 4)
			l.a.mem.fill(0, 9999, 8)
			l.a.post(wrWrite(5, l.a.mem.sges(0, 9999), l.b.mem, room))
			l.a.sent(want{ID: 5, Op: ib.WCRDMAWrite, Len: anyLen})
			l.b.mem.has(what+": WRITE over what the owner wrote", room, 9999, 8)
		}
	}
}

func word(b []byte) uint64 { return binary.NativeEndian.Uint64(b) }

func wordBytes(v uint64) []byte { return binary.NativeEndian.AppendUint64(nil, v) }
