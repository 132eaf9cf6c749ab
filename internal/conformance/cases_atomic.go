package conformance

import (
	"fmt"
	"math"
	"slices"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

var _ = addCases("atomics", ib.CapAtomic,
	testCase{name: "atomic/basic", run: func(c *C) { atomicsBasic(c) }},
	testCase{name: "atomic/misaligned", run: atomicMisaligned},
	testCase{name: "atomic/bad-length", run: atomicBadLength},
	testCase{name: "atomic/two-qps-at-once", run: atomicConcurrent},
	testCase{name: "atomic/both-sides-at-once", run: atomicBothSides},
	testCase{name: "atomic/compare-and-swap-lock", run: atomicLock},
)

func atomicsBasic(c *C, changes ...func(*linkOpts)) {
	l := c.pair(ib.RC, changes...)
	const at, old = 512, 64
	step := func(what string, wr ib.SendWR, op ib.WCOpcode, before, after uint64) {
		c.Helper()
		l.a.mem.canary()
		l.b.mem.canary()
		l.b.mem.write(at, wordBytes(before))
		l.a.post(wr)
		l.a.sent(want{ID: wr.ID, Op: op, Len: 8})
		if got := word(l.a.mem.read(old, 8)); got != before {
			c.Errorf("%s: old value %#x, want %#x", what, got, before)
		}
		if got := word(l.b.mem.read(at, 8)); got != after {
			c.Errorf("%s: new value %#x, want %#x", what, got, after)
		}
		l.a.mem.intactAround(what, old, 8)
		l.b.mem.intactAround(what, at, 8)
	}
	sge := l.a.mem.sges(old, 8)
	const x, y = 0x1122334455667788, 0xfedcba9876543210
	step("swap", wrCAS(1, sge, l.b.mem, at, x, y), ib.WCCompSwap, x, y)
	step("no swap", wrCAS(2, sge, l.b.mem, at, x, y), ib.WCCompSwap, x+1, x+1)
	step("no swap, upper half", wrCAS(3, sge, l.b.mem, at, x, y), ib.WCCompSwap, x^1<<63, x^1<<63)
	step("swap of zero", wrCAS(4, sge, l.b.mem, at, 0, 1), ib.WCCompSwap, 0, 1)
	step("add", wrAdd(5, sge, l.b.mem, at, 5), ib.WCFetchAdd, 37, 42)
	step("add across 32 bits", wrAdd(6, sge, l.b.mem, at, 1), ib.WCFetchAdd, math.MaxUint32, 1<<32)
	step("add wraps", wrAdd(7, sge, l.b.mem, at, 3), ib.WCFetchAdd, math.MaxUint64-1, 1)
	step("subtract", wrAdd(8, sge, l.b.mem, at, math.MaxUint64), ib.WCFetchAdd, 10, 9)
	step("add nothing", wrAdd(9, sge, l.b.mem, at, 0), ib.WCFetchAdd, x, x)
	// Some devices scatter the old value over several elements, others take only one.
	l.b.mem.write(at, wordBytes(x))
	if !c.refused(l.a.QP, wrAdd(10, []ib.SGE{l.a.mem.sge(0, 3), l.a.mem.sge(100, 5)}, l.b.mem, at, 0), ib.WCSuccess, ib.WCLocalLengthErr, ib.WCLocalQPOpErr) {
		if got := word(slices.Concat(l.a.mem.read(0, 3), l.a.mem.read(100, 5))); got != x && l.a.query().Attr.State == ib.RTS {
			c.Errorf("scattered old value %#x, want %#x", got, uint64(x))
		}
	}
	l.b.rcq.empty("atomics do not take a receive")
}

// IBA 9.9.3: an atomic whose address is not a multiple of 8 is an invalid request. rxe answers so;
// a library may refuse it at posting, where it knows as much.
func atomicMisaligned(c *C) {
	for _, off := range []int{1, 4, 7} {
		l := c.pair(ib.RC)
		l.b.mem.canary()
		if c.refused(l.a.QP, wrAdd(1, l.a.mem.sges(0, 8), l.b.mem, 64+off, 1), ib.WCRemoteInvalidReqErr) {
			c.note("a misaligned atomic is refused by PostSend")
			l.alive(c)
		} else {
			l.a.inState(ib.Err)
		}
		l.b.mem.is("target of a misaligned atomic", 64, 32, canaryByte)
	}
}

// The result of an atomic is 8 bytes.
func atomicBadLength(c *C) {
	for _, n := range []int{0, 4} {
		l := c.pair(ib.RC)
		l.b.mem.write(64, wordBytes(5))
		l.a.mem.canary()
		c.refused(l.a.QP, wrAdd(1, l.a.mem.sges(0, n), l.b.mem, 64, 1), ib.WCLocalLengthErr, ib.WCLocalQPOpErr, ib.WCLocalProtErr)
		l.a.mem.intact("result of a bad atomic")
		if got := word(l.b.mem.read(64, 8)); got != 5 {
			c.Errorf("after a bad atomic of %d bytes the word is %d, want 5", n, got)
		}
	}
}

const atomicBatch = 32

// adds returns a batch of FETCH_ADDs of 1, each with its own place for the old value.
func adds(e *end, to *Mem, at int) (wrs []ib.SendWR) {
	for i := range atomicBatch {
		wrs = append(wrs, wrAdd(uint64(i), e.mem.sges(8*i, 8), to, at, 1))
	}
	return wrs
}

// addAtOnce lets every end add 1 rounds*atomicBatch times to the same word, and checks that each old value was seen once.
func addAtOnce(c *C, target *Mem, at int, rounds int, ends ...*end) {
	c.severalGoroutines()
	c.Helper()
	target.write(at, wordBytes(0))
	got := make([]pumpResult, len(ends))
	errs := make([]error, len(ends))
	done := make(chan none)
	for i, e := range ends {
		go func() {
			defer func() { done <- none{} }()
			got[i], errs[i] = call(e.Side, opPump, pumpArgs{QP: e.H, CQ: e.scq.H, WRs: adds(e, target, at), Rounds: rounds,
				Collect: memRange{H: e.mem.H, N: 8 * atomicBatch}})
		}()
	}
	for range ends {
		<-done
	}
	var all []uint64
	for i := range ends {
		if errs[i] != nil || len(got[i].Bad) > 0 {
			c.Fatalf("initiator %d: %v %v", i, errs[i], got[i].Bad)
		}
		// One QP's operations are executed in order.
		if !slices.IsSorted(got[i].Words) {
			c.Errorf("initiator %d: the old values of its own additions are not in order", i)
		}
		all = append(all, got[i].Words...)
	}
	total := uint64(len(ends) * rounds * atomicBatch)
	if sum := word(target.read(at, 8)); sum != total {
		c.Errorf("after %d additions of 1 the word is %d", total, sum)
	}
	slices.Sort(all)
	for i, v := range all {
		if v != uint64(i) {
			c.Fatalf("old value %d was seen where %d is next: an addition was not atomic", v, i)
		}
	}
}

func atomicConcurrent(c *C) {
	l1, l2 := c.pair(ib.RC), c.pair(ib.RC)
	addAtOnce(c, l1.b.mem, 1024, 200, l1.a, l2.a)
}

// The target's own process adds through a loopback QP while the peer does.
func atomicBothSides(c *C) {
	l := c.pair(ib.RC)
	self := c.pairOn(c.B, c.B, c.opts(ib.RC))
	addAtOnce(c, l.b.mem, 4096-8, 200, l.a, self.a)
	lb := c.pair(ib.RC, func(o *linkOpts) { o.sliceMem = true })
	addAtOnce(c, lb.b.mem, 0, 20, l.a, self.a)
}

// Compare-and-swap from 0 to 1: of many that race, one wins.
func atomicLock(c *C) {
	c.severalGoroutines()
	l1, l2 := c.pair(ib.RC), c.pair(ib.RC)
	self := c.pairOn(c.B, c.B, c.opts(ib.RC))
	for round := range 20 {
		l1.b.mem.write(0, wordBytes(0))
		ends := []*end{l1.a, l2.a, self.a}
		done := make(chan error)
		wins := make([]int, len(ends))
		for i, e := range ends {
			go func() {
				var wrs []ib.SendWR
				for k := range 8 {
					wrs = append(wrs, wrCAS(uint64(k), e.mem.sges(1024+8*k, 8), l1.b.mem, 0, 0, uint64(100*i+k+1)))
				}
				r, err := call(e.Side, opPump, pumpArgs{QP: e.H, CQ: e.scq.H, WRs: wrs, Rounds: 1, Collect: memRange{H: e.mem.H, Off: 1024, N: 64}})
				for _, w := range r.Words {
					if w == 0 {
						wins[i]++
					}
				}
				if err == nil && len(r.Bad) > 0 {
					err = fmt.Errorf("initiator %d: %+v", i, r.Bad)
				}
				done <- err
			}()
		}
		for range ends {
			if err := <-done; err != nil {
				c.Fatal(err)
			}
		}
		winner := int(word(l1.b.mem.read(0, 8))-1) / 100
		if sum := wins[0] + wins[1] + wins[2]; sum != 1 || wins[winner] != 1 {
			c.Fatalf("round %d: wins %v, and the word says that %d won", round, wins, winner)
		}
	}
}
