package softnic

import (
	"context"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// answered are requests with an answer of their own, on the peer's first 8 bytes.
func answered(a, b *end) map[string]ib.SendWR {
	wr := func(op ib.Opcode, sges []ib.SGE) ib.SendWR {
		return ib.SendWR{ID: 1, Opcode: op, Flags: ib.SendSignaled, SGEs: sges, RemoteAddr: addrOf(b.buf), RKey: b.mr.RKey(), CompareAdd: 1, Swap: 2}
	}
	flush := wr(ib.OpFlush, nil)
	flush.Flush = ib.Flush{Placement: ib.FlushGlobal, Length: 8}
	return map[string]ib.SendWR{"READ": wr(ib.OpRDMARead, a.sge(0, 8)), "READ of nothing": wr(ib.OpRDMARead, nil), "FETCH_ADD": wr(ib.OpAtomicFetchAdd, a.sge(0, 8)),
		"CMP_SWAP": wr(ib.OpAtomicCmpSwap, a.sge(0, 8)), "ATOMIC_WRITE": wr(ib.OpAtomicWrite, a.sge(0, 8)), "FLUSH": flush}
}

// Whatever the way to a peer, one without responder resources refuses what has an answer of its own as an invalid request, and fails with
// it; the rest it takes.
func TestNoResponderResources(t *testing.T) {
	refused := func(t *testing.T, na, nb *NIC, private bool, connect func(a, b *end)) {
		names := answered(newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, nb, endConfig{typ: ib.RC}))
		for name := range names {
			a, b := newEnd(t, na, endConfig{typ: ib.RC, size: 4096}), newEnd(t, nb, endConfig{typ: ib.RC, size: 4096, private: private, noResources: true})
			connect(a, b)
			a.buf[0] = 7
			a.send(ib.SendWR{ID: 2, Opcode: ib.OpRDMAWrite, Flags: ib.SendSignaled, SGEs: a.sge(0, 8), RemoteAddr: addrOf(b.buf), RKey: b.mr.RKey()})
			if wc := a.poll(); wc.Status != ib.WCSuccess || b.buf[0] != 7 {
				t.Fatalf("a WRITE: %+v", wc)
			}
			a.buf[0] = 9
			a.send(answered(a, b)[name])
			if wc := a.poll(); wc.Status != ib.WCRemoteInvalidReqErr || b.buf[0] != 7 || a.buf[0] != 9 {
				t.Errorf("%s: %+v, and the peer's first byte is %d", name, wc, b.buf[0])
			}
			testutil.Eventually(t, name+": the responder went to ERR", func() bool {
				nb.Progress()
				s, err := b.q.Query()
				return err == nil && s.State == ib.Err
			})
			ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
			for e := (driver.AsyncEvent{}); e.QP != b.q; {
				var err error
				if e, err = nb.AsyncEvent(ctx); err != nil {
					t.Fatal(err)
				}
				if e.QP == b.q && e.Type != ib.EventQPReqErr {
					t.Errorf("%s: event %v", name, e.Type)
				}
			}
			cancel()
		}
	}
	paths(t, func(t *testing.T, na, nb *NIC) {
		for _, private := range []bool{false, true} {
			refused(t, na, nb, private, func(a, b *end) { a.connect(b); b.connect(a) })
		}
	})
	t.Run("tcp", func(t *testing.T) {
		refused(t, openNIC(t, false), openNIC(t, false), false, func(a, b *end) { streamed(t, a, b) })
	})
}

// What a QP may have under way can be changed in SQD, from nothing too, and what the peer may; it holds for connections of all kinds.
func TestResourcesChanged(t *testing.T) {
	change := func(t *testing.T, a, b *end) {
		for _, e := range []*end{a, b} {
			for _, m := range []struct {
				attr ib.QPAttr
				mask ib.QPAttrMask
			}{{attr: ib.QPAttr{State: ib.SQD}}, {ib.QPAttr{State: ib.SQD, MaxRdAtomic: 4, MaxDestRdAtomic: 4}, ib.AttrMaxRdAtomic | ib.AttrMaxDestRdAtomic},
				{attr: ib.QPAttr{State: ib.RTS}}} {
				if err := e.q.Modify(t.Context(), &m.attr, ib.AttrState|m.mask); err != nil {
					t.Fatal(err)
				}
			}
		}
		for i := range 20 {
			for name, wr := range answered(a, b) {
				if name != "FLUSH" { // the region has no right for it
					a.send(wr)
				}
			}
			for range 5 {
				if wc := a.poll(); wc.Status != ib.WCSuccess {
					t.Fatalf("round %d: %+v", i, wc)
				}
			}
		}
	}
	cfg := endConfig{typ: ib.RC, size: 4096, noResources: true}
	paths(t, func(t *testing.T, na, nb *NIC) {
		a, b := newEnd(t, na, cfg), newEnd(t, nb, cfg)
		a.connect(b)
		b.connect(a)
		change(t, a, b)
	})
	t.Run("tcp", func(t *testing.T) {
		a, b := newEnd(t, openNIC(t, false), cfg), newEnd(t, openNIC(t, false), cfg)
		streamed(t, a, b)
		change(t, a, b)
	})
}

// Whoever sets the limit of a shared receive queue while another closes it does not look at memory that is gone.
func TestSRQLimitAfterClose(t *testing.T) {
	n, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	pd := allocPD(t, n)
	s := newTestSRQ(t, pd)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.SetLimit(5); err != driver.ErrClosed {
		t.Errorf("%v, want %v", err, driver.ErrClosed)
	}
	if err := pd.Close(); err != nil {
		t.Error(err)
	}
}
