package conformance

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

var _ = addCases("many QPs, random operations", 0,
	testCase{name: "random/one-qp", run: func(c *C) { randomOps(c, 1, 12, nil) }},
	testCase{name: "random/200-qps", run: func(c *C) { randomOps(c, 200, 3, nil) }},
	testCase{name: "random/slices", run: func(c *C) { randomOps(c, 20, 4, sliceMem) }},
	testCase{name: "random/shared-receives", needs: ib.CapSRQ, run: randomSRQ},
)

// Each link of a random case has an area of this layout on both sides. On the initiator's: what it sends, and where
// results come; on the target's: what is read, written and added to, and where messages come.
const (
	areaSrc    = 0
	areaSink   = 4096
	areaTarget = 0
	areaRecv   = 4096
	areaSize   = 16384
	opsInBatch = 12
	slotSize   = (areaSize - areaSink) / opsInBatch &^ 63 // of a result or a message
)

// model predicts one link.
type model struct {
	x, y       *end // initiator, target
	xoff, yoff int  // of the area in the sides' regions
	xmem, ymem []byte
	sends      []want // completions that must come
	recvs      []want
	index      int
	inline     int
	atomics    bool
	imms       bool
	readSGEs   int  // of a READ
	tornReads  bool // see C.tearsReads
	fences     bool // requests may have some; see Side.fencesStall
	lost       bool // see C.losesResults
}

// batch makes up a batch of requests, applies it to the model, and returns it with the receives it takes.
func (m *model) batch(r *rand.Rand, xm, ym *Mem) (wrs []ib.SendWR, recvs []ib.RecvWR) {
	m.sends, m.recvs = nil, nil
	n := 1 + r.IntN(opsInBatch)
	// What a READ or an atomic of this batch has touched may change only behind a fence (IBA 10.8.3.3).
	touched := make([]bool, areaSink)
	touch := func(off, n int) (before bool) {
		for i := off; i < off+n; i++ {
			before = before || touched[i]
		}
		return before
	}
	mark := func(off, n int) {
		for i := off; i < off+n; i++ {
			touched[i] = true
		}
	}
	acked := false // there is a request before that is only acknowledged
	for i := range n {
		id := uint64(m.index)<<16 | uint64(i)
		wr := ib.SendWR{ID: id}
		length := []int{0, 1, 8, 64, r.IntN(128), r.IntN(slotSize), r.IntN(slotSize)}[r.IntN(7)]
		src := areaSrc + r.IntN(areaSink-length+1)
		to := areaTarget + r.IntN(areaSink-length+1)
		slot := areaSink + i*slotSize
		data := m.xmem[src : src+length]
		fence := r.IntN(4) == 0 && m.fences
		gather := func() {
			if length > 0 && length <= m.inline && r.IntN(2) == 0 {
				wr.Inline = append([]byte(nil), data...)
				return
			}
			cut := 0
			if r.IntN(3) == 0 {
				cut = r.IntN(length + 1)
				wr.SGEs = append(wr.SGEs, xm.sge(m.xoff+src, cut))
			}
			wr.SGEs = append(wr.SGEs, xm.sge(m.xoff+src+cut, length-cut))
		}
		receive := func(w want, n int) {
			rid := uint64(m.index)<<16 | uint64(len(recvs))
			rwr := ib.RecvWR{ID: rid}
			if n >= 0 {
				// A receive may be larger than its message.
				room := min(n+r.IntN(20), slotSize)
				off := areaRecv + len(recvs)*slotSize
				cut := r.IntN(room + 1)
				rwr.SGEs = []ib.SGE{ym.sge(m.yoff+off, cut), ym.sge(m.yoff+off+cut, room-cut)}
				copy(m.ymem[off:], data)
			}
			w.ID = rid
			recvs = append(recvs, rwr)
			m.recvs = append(m.recvs, w)
		}
		remote := func(off int) { wr.RemoteAddr, wr.RKey = ym.Addr+uint64(m.yoff+off), ym.RKey }
		kind := r.IntN(8)
		switch {
		case kind >= 6 && !m.atomics:
			kind = 4
		case (kind == 1 || kind == 3) && !m.imms:
			kind--
		}
		if !m.fences && (kind == 2 || kind == 3 || kind >= 6) {
			at, n := to, length
			if kind >= 6 {
				at, n = min(to, areaSink-8)&^7, 8
			}
			if touch(at, n) {
				kind = 4 // what needs a fence is not done
			}
		}
		if m.lost && acked && kind >= 6 {
			kind = 4
		}
		acked = acked || kind < 4
		done := want{ID: id, Len: anyLen}
		switch kind {
		case 0, 1: // SEND, with immediate or not
			wr.Opcode, done.Op = ib.OpSend, ib.WCSend
			w := want{Op: ib.WCRecv, Len: length}
			if kind == 1 {
				wr.Opcode, wr.Imm = ib.OpSendWithImm, r.Uint32()
				w.Flags, w.Imm = ib.WCWithImm, wr.Imm
			}
			gather()
			receive(w, length)
		case 2, 3: // WRITE
			wr.Opcode, done.Op = ib.OpRDMAWrite, ib.WCRDMAWrite
			if kind == 3 {
				wr.Opcode, wr.Imm = ib.OpRDMAWriteWithImm, r.Uint32()
				receive(want{Op: ib.WCRecvRDMAWithImm, Len: length, Flags: ib.WCWithImm, Imm: wr.Imm}, -1)
			}
			gather()
			remote(to)
			fence = fence || touch(to, length)
			copy(m.ymem[to:], data)
		case 4, 5: // READ
			wr.Opcode, done.Op, done.Len = ib.OpRDMARead, ib.WCRDMARead, length
			cut := r.IntN(length + 1)
			if m.readSGEs < 2 {
				cut = 0
			}
			if at := ym.Addr + uint64(m.yoff+to); m.tornReads && length > 0 && length <= 64 && at>>12 != (at+uint64(length)-1)>>12 {
				if to -= 64; to < 0 {
					to += 128
				}
			}
			wr.SGEs = []ib.SGE{xm.sge(m.xoff+slot, cut), xm.sge(m.xoff+slot+cut, length-cut)}
			remote(to)
			mark(to, length)
			copy(m.xmem[slot:], m.ymem[to:to+length])
		case 6, 7: // atomics
			to = min(to, areaSink-8) &^ 7
			at := m.ymem[to : to+8]
			old := binary.NativeEndian.Uint64(at)
			wr.Opcode, done.Op, done.Len = ib.OpAtomicFetchAdd, ib.WCFetchAdd, 8
			wr.CompareAdd = r.Uint64()
			value := old + wr.CompareAdd
			if kind == 7 {
				wr.Opcode, done.Op = ib.OpAtomicCmpSwap, ib.WCCompSwap
				wr.Swap, value = r.Uint64(), old
				if r.IntN(2) == 0 {
					wr.CompareAdd, value = old, wr.Swap
				}
			}
			wr.SGEs = xm.sges(m.xoff+slot, 8)
			remote(to)
			fence = fence || touch(to, 8)
			mark(to, 8)
			copy(m.xmem[slot:], at)
			binary.NativeEndian.PutUint64(at, value)
		}
		if fence {
			wr.Flags |= ib.SendFence
		}
		if i == n-1 || r.IntN(2) == 0 {
			wr.Flags |= ib.SendSignaled
			m.sends = append(m.sends, done)
		}
		wrs = append(wrs, wr)
	}
	return wrs, recvs
}

// randomOps runs batches of random requests on links of which every second one goes from B to A, both sides at once, and
// compares completions and memory with the model after each round.
func randomOps(c *C, links, rounds int, change func(*linkOpts)) {
	r := c.rand()
	o := c.opts(ib.RC)
	if change != nil {
		change(&o)
	}
	o.depth, o.recvDepth, o.memSize, o.sges = opsInBatch, opsInBatch, 0, min(2, c.A.dev.Attr.MaxSGE)
	o.inline = min(64, c.A.dev.Attr.MaxInline)
	entries := min(links*opsInBatch*2+16, c.A.dev.Attr.MaxCQE)
	o.scqA, o.rcqA, o.scqB, o.rcqB = c.A.cq(entries), c.A.cq(entries), c.B.cq(entries), c.B.cq(entries)
	size := links * areaSize
	memA := &Mem{c.A, do(c.A, opMem, memArgs{PD: c.A.pd, Size: size, Access: accessAll, Slice: o.sliceMem}), size}
	memB := &Mem{c.B, do(c.B, opMem, memArgs{PD: c.B.pd, Size: size, Access: accessAll, Slice: o.sliceMem}), size}
	if memA.Addr%8 != 0 || memB.Addr%8 != 0 {
		c.Fatalf("regions at %#x and %#x are not aligned for atomics", memA.Addr, memB.Addr)
	}
	models := make([]*model, links)
	for i := range models {
		l := c.pairOn(c.A, c.B, o)
		m := &model{x: l.a, y: l.b, index: i, xoff: i * areaSize, yoff: i * areaSize, inline: min(l.a.Cap.MaxInline, l.b.Cap.MaxInline, o.inline),
			atomics: c.A.dev.Attr.Caps.Has(ib.CapAtomic), imms: c.hasOp(ib.OpSendWithImm), readSGEs: c.A.dev.Attr.MaxSGERead, tornReads: c.tearsReads(), fences: !c.A.fencesStall() && !c.B.fencesStall(), lost: c.losesResults(), xmem: make([]byte, areaSize), ymem: make([]byte, areaSize)}
		if i%2 == 1 {
			m.x, m.y = l.b, l.a
		}
		pattern(m.xmem, r.Uint64())
		pattern(m.ymem, r.Uint64())
		c.memOf(m.x, memA, memB).write(m.xoff, m.xmem)
		c.memOf(m.y, memA, memB).write(m.yoff, m.ymem)
		models[i] = m
	}
	type work struct {
		m     *model
		wrs   []ib.SendWR
		recvs []ib.RecvWR
	}
	for round := range rounds {
		var works []work
		count := map[*CQ]int{}
		for _, m := range models {
			w := work{m: m}
			w.wrs, w.recvs = m.batch(r, c.memOf(m.x, memA, memB), c.memOf(m.y, memA, memB))
			works = append(works, w)
			count[m.x.scq] += len(m.sends)
			count[m.y.rcq] += len(m.recvs)
		}
		order := r.Perm(len(works))
		errs := make(chan error, 2)
		for _, s := range []*Side{c.A, c.B} {
			c.beside(func() {
				for _, i := range order {
					w := works[i]
					if w.m.x.Side != s {
						continue
					}
					// Receives come before or after the messages: RNR makes up for it.
					late := i%3 == 0 && !s.fencesStall() && !c.cmOnly()
					if !late {
						if n, err := w.m.y.tryRecv(w.recvs...); err != nil {
							errs <- fmt.Errorf("link %d: %d of %d receives accepted: %w", i, n, len(w.recvs), err)
							return
						}
					}
					if n, err := w.m.x.tryPost(w.wrs...); err != nil {
						errs <- fmt.Errorf("link %d: %d of %d sends accepted: %w", i, n, len(w.wrs), err)
						return
					}
					if late {
						if n, err := w.m.y.tryRecv(w.recvs...); err != nil {
							errs <- fmt.Errorf("link %d: %d of %d receives accepted: %w", i, n, len(w.recvs), err)
							return
						}
					}
				}
				errs <- nil
			})
		}
		for range 2 {
			if err := <-errs; err != nil {
				c.Fatalf("round %d: %v", round, err)
			}
		}
		// Completions of one QP come in order; those of different QPs in any.
		type key struct {
			s   *Side
			qpn ib.QPN
			cq  *CQ
		}
		got := map[key][]ib.WC{}
		for _, cq := range []*CQ{o.scqA, o.rcqA, o.scqB, o.rcqB} {
			for _, wc := range cq.wait(count[cq]) {
				if wc.Status != ib.WCSuccess {
					c.Fatalf("round %d, %s: %s", round, cq.s.name, showWC(wc))
				}
				k := key{cq.s, wc.QPN, cq}
				got[k] = append(got[k], wc)
			}
		}
		for _, m := range models {
			c.compareWCs(round, m.index, "send", m.x, m.sends, got[key{m.x.Side, m.x.QPN, m.x.scq}])
			c.compareWCs(round, m.index, "receive", m.y, m.recvs, got[key{m.y.Side, m.y.QPN, m.y.rcq}])
		}
		for _, cq := range []*CQ{o.scqA, o.rcqA, o.scqB, o.rcqB} {
			if wcs := do(cq.s, opPoll, pollArgs{cq.H, 1, 0}); len(wcs) > 0 {
				c.Fatalf("round %d: unexpected completion %s", round, showWC(wcs[0]))
			}
		}
		for _, m := range models {
			m.x.settle(want{Op: ib.WCRDMAWrite})
		}
		sums := map[*Mem][][]byte{}
		for _, m := range []*Mem{memA, memB} {
			sums[m] = do(m.s, opMemSums, sumArgs{m.H, links, areaSize})
		}
		compare := func(m *model, what string, in *Mem, want []byte) {
			if sum := sha256.Sum256(want); bytes.Equal(sums[in][m.index], sum[:]) {
				return
			}
			c.Errorf("round %d, link %d (initiator %s), %s memory: %s", round, m.index, m.x.name, what, firstDifference(in.read(m.index*areaSize, areaSize), want))
		}
		for _, m := range models {
			compare(m, "initiator's", c.memOf(m.x, memA, memB), m.xmem)
			compare(m, "target's", c.memOf(m.y, memA, memB), m.ymem)
		}
		if c.Failed() {
			return
		}
	}
}

func (c *C) memOf(e *end, memA, memB *Mem) *Mem {
	if e.Side == c.A {
		return memA
	}
	return memB
}

func (c *C) compareWCs(round, link int, kind string, e *end, wants []want, got []ib.WC) {
	c.Helper()
	if len(wants) != len(got) {
		c.Fatalf("round %d, link %d: %d %s completions, want %d", round, link, len(got), kind, len(wants))
	}
	for i, w := range wants {
		if d := w.differs(e.Side, got[i], e.QPN); d != "" {
			c.Fatalf("round %d, link %d, %s completion %d of %d: %s", round, link, kind, i+1, len(wants), d)
		}
	}
}

// Many QPs take receives from one SRQ at the same time; every receive is used once, with the data of its message.
func randomSRQ(c *C) {
	const n, perRound, rounds = 16, 8, 6
	links, srq, rcq := c.srqPairs(n, n*perRound)
	buf := c.B.mem(c.B.pd, n*perRound*64, accessAll)
	for round := range rounds {
		var recvs []ib.RecvWR
		for i := range n * perRound {
			recvs = append(recvs, ib.RecvWR{ID: uint64(i), SGEs: buf.sges(i*64, 64)})
		}
		c.B.srqRecv(srq, recvs...)
		done := make(chan error, 2)
		for half := range 2 {
			c.beside(func() {
				var err error
				for i, l := range links {
					if i%2 != half || err != nil {
						continue
					}
					var wrs []ib.SendWR
					for k := range perRound {
						tag := wordBytes(uint64(i)<<32 | uint64(round)<<16 | uint64(k))
						_, err = call(c.A, opMemWrite, memRange{H: l.a.mem.H, Off: k * 64, Data: append(tag, tag...)})
						wrs = append(wrs, wrSend(uint64(k), l.a.mem.sge(k*64, 16)))
					}
					if err == nil {
						_, err = l.a.tryPost(wrs...)
					}
				}
				done <- err
			})
		}
		for range 2 {
			if err := <-done; err != nil {
				c.Fatal(err)
			}
		}
		used := map[uint64]bool{}
		next := map[ib.QPN]int{}
		data := []byte(nil)
		wcs := rcq.wait(n * perRound)
		data = buf.read(0, n*perRound*64)
		for _, wc := range wcs {
			if wc.Status != ib.WCSuccess || wc.ByteLen != 16 || used[wc.ID] {
				c.Fatalf("round %d: completion %s; receive used before: %v", round, showWC(wc), used[wc.ID])
			}
			used[wc.ID] = true
			tag := word(data[wc.ID*64:])
			i := int(tag >> 32)
			if i >= n || links[i].b.QPN != wc.QPN || int(tag&0xffff) != next[wc.QPN] || int(tag>>16&0xffff) != round || word(data[wc.ID*64+8:]) != tag {
				c.Fatalf("round %d: receive %d of QP %#x has message %#x; want number %d", round, wc.ID, wc.QPN, tag, next[wc.QPN])
			}
			next[wc.QPN]++
		}
		for _, l := range links {
			l.a.scq.wait(perRound)
		}
	}
}
