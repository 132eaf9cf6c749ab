//go:build amd64 || arm64

package mlx5

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// take is the device's: the slot at the front of the list, and the bytes of its elements.
func (s *fakeSRQ) take() (slot uint16, elements []byte) {
	slot = s.front
	b := s.mem[int(slot)*s.stride:][:s.stride]
	s.front = be.Uint16(b[2:])
	return slot, bytes.Clone(b[16:])
}

func (b *bench) newSRQ(cfg driver.SRQConfig) (*srq, *fakeSRQ) {
	b.t.Helper()
	s, err := b.pd.CreateSRQ(cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		if !s.(*srq).closed {
			b.close(s)
		}
	})
	return s.(*srq), b.k.srqs[s.(*srq).Handle]
}

func withSRQ(s driver.SRQ) func(*driver.QPConfig) {
	return func(cfg *driver.QPConfig) { cfg.SRQ = s }
}

// Receives go through the list in the order in which they were posted, whatever the order in which they complete; there are always
// as many as were granted.
func TestSRQ(t *testing.T) {
	versions(t, func(t *testing.T, b *bench) {
		s, k := b.newSRQ(driver.SRQConfig{MaxWR: 12, MaxSGE: 2})
		if s.MaxWR() != 15 || s.MaxSGE() != 3 || k.stride != 64 {
			t.Fatalf("%d receives of %d SGEs in slots of %d bytes", s.MaxWR(), s.MaxSGE(), k.stride)
		}
		b.with(ib.RC, withSRQ(s))
		if c := b.qp.Cap(); c.MaxRecvWR != 0 || len(b.kq.rq) != 0 || b.kq.srq != k {
			t.Errorf("the queue pair has a receive queue: %+v", c)
		}
		if n, err := b.qp.PostRecv([]ib.RecvWR{{}}); n != 0 || err != driver.ErrHasSRQ {
			t.Errorf("%d, %v", n, err)
		}
		rng := rand.New(rand.NewPCG(1, 2))
		next, expect := uint64(0), uint64(0)
		posted := 0
		held := map[uint16]uint64{} // slots that the device has taken
		for range 2000 {
			switch rng.IntN(3) {
			case 0:
				var wrs []ib.RecvWR
				for range rng.IntN(20) {
					next++
					wrs = append(wrs, ib.RecvWR{ID: next, SGEs: []ib.SGE{{Addr: next, Length: 5, LKey: 6}}})
				}
				n, err := s.PostRecv(wrs)
				room := s.MaxWR() - posted - len(held)
				if n != min(len(wrs), room) || (n < len(wrs)) != errors.Is(err, driver.ErrQueueFull) {
					t.Fatalf("%d of %d posted where %d have room: %v", n, len(wrs), room, err)
				}
				next -= uint64(len(wrs) - n)
				posted += n
				if got := be.Uint32(k.record); got != uint32(next)&0xffff {
					t.Fatalf("doorbell record %d, want %d", got, next)
				}
			case 1:
				if posted > 0 {
					slot, e := k.take()
					expect++
					want := be.AppendUint64(be.AppendUint64(be.AppendUint64(nil, 5<<32|6), expect), 0x100)
					if !bytes.Equal(e[:24], want) {
						t.Fatalf("slot %d is %x, want %x", slot, e, want)
					}
					held[slot] = expect
					posted--
				}
			case 2:
				for slot, id := range held { // any of them
					code := byte(cqeRecv)
					if id%5 == 0 {
						code = cqeRecvErr
					}
					c := b.kq.cqeOf(code, slot)
					c[55] = 5
					b.kc.add(c)
					if wc := b.poll(1)[0]; wc.ID != id || wc.QPN != b.qp.QPN() || (wc.Status == ib.WCSuccess) != (code == cqeRecv) {
						t.Fatalf("%+v, want ID %d", wc, id)
					}
					delete(held, slot)
					break
				}
			}
		}
		if next < 500 {
			t.Errorf("only %d receives", next)
		}
	})
}

// Slots that the device cannot have used end the completion queue.
func TestImpossibleSlots(t *testing.T) {
	for name, slot := range map[string]uint16{"not posted": 3, "not there": 16, "far away": 0xffff} {
		versions(t, func(t *testing.T, b *bench) {
			s, _ := b.newSRQ(driver.SRQConfig{MaxWR: 12, MaxSGE: 2})
			b.with(ib.RC, withSRQ(s))
			s.PostRecv([]ib.RecvWR{{ID: 1}, {ID: 2}})
			b.kc.add(b.kq.cqeOf(cqeRecv, slot))
			if n := b.cq.Poll(make([]ib.WC, 1)); n != -1 || !strings.Contains(b.cq.Err().Error(), "no receive is posted") {
				t.Errorf("%s: %d, %v", name, n, b.cq.Err())
			}
		})
	}
	t.Run("of another queue", func(t *testing.T) {
		b := bare(t, version0)
		s, _ := b.newSRQ(driver.SRQConfig{MaxWR: 12, MaxSGE: 2})
		b.with(ib.RC, withSRQ(s))
		s.PostRecv([]ib.RecvWR{{ID: 1}})
		c := b.kq.cqeOf(cqeRecv, 0)
		c[35]++
		b.kc.add(c)
		if n := b.cq.Poll(make([]ib.WC, 1)); n != -1 || !strings.Contains(b.cq.Err().Error(), "shared receive queue") {
			t.Errorf("%d, %v", n, b.cq.Err())
		}
	})
}

// A queue pair that is closed with receives complete gives their slots back.
func TestSlotsOfTheClosed(t *testing.T) {
	versions(t, func(t *testing.T, b *bench) {
		s, k := b.newSRQ(driver.SRQConfig{MaxWR: 7, MaxSGE: 1})
		for range 5 {
			if n, err := s.PostRecv(make([]ib.RecvWR, 7)); n != 7 {
				t.Fatal(n, err)
			}
			q := b.newQP(ib.RC, withSRQ(s))
			kq := b.k.qps[q.Handle]
			for range 7 {
				slot, _ := k.take()
				b.kc.add(kq.cqeOf(cqeRecv, slot))
			}
			b.close(q)
			b.poll(0)
		}
	})
}

func TestSRQLimits(t *testing.T) {
	b := bare(t)
	s, _ := b.newSRQ(driver.SRQConfig{MaxWR: 7, MaxSGE: 1})
	if err := s.SetLimit(3); err != nil || s.Limit() != 5 { // which the kernel says
		t.Errorf("%d, %v", s.Limit(), err)
	}
	for _, cfg := range []driver.SRQConfig{{MaxWR: 0, MaxSGE: 1}, {MaxWR: 32768, MaxSGE: 1}, {MaxWR: 1, MaxSGE: 32}, {MaxWR: 1, MaxSGE: -1}} {
		if _, err := b.pd.CreateSRQ(cfg); err == nil || !strings.Contains(err.Error(), "up to 32767, of up to 31") {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
	if n, err := s.PostRecv([]ib.RecvWR{{SGEs: make([]ib.SGE, 2)}}); n != 0 || err != driver.ErrTooManySGEs {
		t.Errorf("%d, %v", n, err)
	}
	// The handle of a closed queue may be another's.
	closed, _ := b.newSRQ(driver.SRQConfig{MaxWR: 7, MaxSGE: 1})
	b.close(closed)
	before := len(b.k.Commands)
	if err := closed.SetLimit(1); !errors.Is(err, driver.ErrClosed) || closed.Limit() != 0 || len(b.k.Commands) != before {
		t.Errorf("%v, commands %d", err, b.k.Commands[before:])
	}
	b = bare(t, func(k *fakeKernel) { k.resp.MaxSRQRecvWR = 0 })
	if a, err := b.c.QueryDevice(); err != nil || a.Caps.Has(ib.CapSRQ) {
		t.Errorf("%v, %v", a.Caps, err)
	}
}

// A shared queue can be closed as soon as the kernel has destroyed its last queue pair, whose completions are still there.
func TestSharedQueueClosedFirst(t *testing.T) {
	versions(t, func(t *testing.T, b *bench) {
		o, err := b.pd.CreateSRQ(driver.SRQConfig{MaxWR: 7, MaxSGE: 1})
		if err != nil {
			t.Fatal(err)
		}
		s, k := o.(*srq), b.k.srqs[o.(*srq).Handle]
		if n, err := s.PostRecv(make([]ib.RecvWR, 7)); n != 7 {
			t.Fatal(err)
		}
		q := b.newQP(ib.RC, withSRQ(s))
		for range 3 {
			slot, _ := k.take()
			b.kc.add(b.k.qps[q.Handle].cqeOf(cqeRecv, slot))
		}
		b.k.Tweak = func(cmd uint32, _, _ []byte) {
			if cmd == 27 {
				b.k.Mu.Unlock()
				b.close(s)
				b.k.Mu.Lock()
			}
		}
		b.close(q)
		b.k.Tweak = nil
		b.poll(0)
	})
}
