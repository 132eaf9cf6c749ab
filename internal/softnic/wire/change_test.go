package wire

import (
	"testing"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A connection that has become one with READs, or with more of them, does as many; and what has been answered can be asked for again.
func TestChange(t *testing.T) {
	n := newNetwork(t, 1, func(c *Config) { c.MaxRdAtomic, c.MaxDestRdAtomic = 0, 0 })
	a, b := n.nodes[0], n.nodes[1]
	first := a.req.nxt
	read := func(k int) {
		for i := range k {
			a.post(Request{Op: ib.OpAtomicFetchAdd, RKey: memKey, Len: 8, Addr: uint64(8 * i), CompareAdd: 1}, nil)
		}
		a.pump()
	}
	for _, depth := range []int{2, 100, 3, 0} {
		cfg := a.req.cfg
		cfg.MaxRdAtomic, cfg.MaxDestRdAtomic = depth, max(depth, 1)
		a.req.Change(cfg)
		b.resp.Change(cfg)
		at, most := a.req.nxt, 0
		n.drop = func(*node, *roce.Packet) bool { most = max(most, len(a.req.asks)); return false }
		done := len(a.done)
		read(50)
		n.run(n.ended)
		for i, st := range a.done[done:] {
			if st != ib.WCSuccess {
				t.Fatalf("with %d: request %d ends with %v", depth, i, st)
			}
		}
		if most != max(1, min(depth, 50)) {
			t.Errorf("with %d: %d were under way", depth, most)
		}
		// Executed once, and answered as it was.
		b.resp.outHead = b.resp.outTail
		b.resp.Receive(&roce.Packet{Opcode: roce.Op(roce.RC, roce.FetchAdd), PSN: at.Add(49), RKey: memKey, Addr: 8 * 49, Swap: 1})
		x := b.resp.at(b.resp.outHead)
		if b.resp.outTail-b.resp.outHead != 1 || x.psn != at.Add(49) || x.old != uint64(distance(first, at)/50) {
			t.Errorf("with %d: asked for again: %d answers, %+v", depth, b.resp.outTail-b.resp.outHead, x)
		}
		b.resp.outHead = b.resp.outTail
	}
	// What the newest of them have found is kept when there is room for fewer, or for more.
	cfg := b.resp.cfg
	for _, depth := range []int{100, 2} {
		cfg.MaxDestRdAtomic = depth
		b.resp.Change(cfg)
		b.resp.Receive(&roce.Packet{Opcode: roce.Op(roce.RC, roce.FetchAdd), PSN: a.req.nxt.Add(-1), RKey: memKey, Addr: 8 * 49, Swap: 1})
		if x := b.resp.at(b.resp.outHead); b.resp.outTail-b.resp.outHead != 1 || x.old != 3 {
			t.Errorf("kept %d: %d answers, %+v", depth, b.resp.outTail-b.resp.outHead, x)
		}
		b.resp.outHead = b.resp.outTail
	}
}
