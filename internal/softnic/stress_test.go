package softnic

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// fewer is n, or a tenth of it where that is enough or all that there is time for.
func fewer(n int) int {
	if testing.Short() || raceEnabled {
		return n / 10
	}
	return n
}

// A CQ goes over from looking at every QP to a bitmap while messages arrive: none is missed.
func TestManyQPsOnACQ(t *testing.T) {
	paths(t, func(t *testing.T, na, nb *NIC) {
		const qps = 40
		cfg := endConfig{typ: ib.RC, depth: 128, size: 4096, private: true, cqEntries: 1 << 14}
		x0, y0 := makeEnd(t, na, cfg), makeEnd(t, nb, cfg)
		var mu sync.Mutex
		xs, ys := []*end{x0}, []*end{y0}
		x0.connect(y0)
		y0.connect(x0)
		var sent, got atomic.Int64
		var stop atomic.Bool
		var wg sync.WaitGroup
		wg.Go(func() { // the receiver sleeps between messages, by the book
			var wcs [16]ib.WC
			for {
				if err := y0.cq.Arm(false); err != nil {
					t.Error(err)
					return
				}
				for {
					n := y0.cq.Poll(wcs[:])
					if n <= 0 {
						break
					}
					for _, wc := range wcs[:n] {
						if wc.Status != ib.WCSuccess {
							t.Errorf("%+v", wc)
						}
						if wc.Opcode == ib.WCRecv {
							got.Add(1)
						}
					}
				}
				if stop.Load() && got.Load() == sent.Load() {
					return
				}
				ctx, cancel := context.WithTimeout(context.Background(), testutil.Patience)
				_, err := y0.ch.Wait(ctx)
				cancel()
				if err != nil && stop.Load() && got.Load() == sent.Load() {
					return
				}
				if err != nil {
					t.Errorf("asleep after %d of %d messages: %v", got.Load(), sent.Load(), err)
					return
				}
			}
		})
		rounds := fewer(300)
		wg.Go(func() {
			var wcs [16]ib.WC
			for r := 0; r < rounds || len(all(&mu, &xs)) < qps; r++ {
				list := all(&mu, &xs)
				for i, x := range list {
					mu.Lock()
					y := ys[i]
					mu.Unlock()
					y.recv(1, y.sge(0, 64))
					sent.Add(1)
					x.send(ib.SendWR{ID: 1, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: x.sge(0, 64)})
				}
				for n, end := 0, time.Now().Add(testutil.Patience); n < len(list); {
					if time.Now().After(end) {
						t.Errorf("%d of %d requests have completed", n, len(list))
						stop.Store(true)
						return
					}
					n += max(0, x0.cq.Poll(wcs[:]))
				}
				for end := time.Now().Add(testutil.Patience); got.Load() < sent.Load()-int64(qps) && time.Now().Before(end); {
					runtime.Gosched()
				}
				if t.Failed() {
					break
				}
			}
			stop.Store(true)
			// One more, so that the receiver wakes up and sees that it was the last.
			y0.q.PostRecv([]ib.RecvWR{{ID: 1, SGEs: y0.sge(0, 64)}})
			sent.Add(1)
			x0.send(ib.SendWR{ID: 1, Opcode: ib.OpSend, SGEs: x0.sge(0, 64)})
		})
		for range qps - 1 {
			x, y := makeEndOn(t, na, x0.pd, x0.cq, cfg), makeEndOn(t, nb, y0.pd, y0.cq, cfg)
			x.connect(y)
			y.connect(x)
			mu.Lock()
			xs, ys = append(xs, x), append(ys, y)
			mu.Unlock()
			time.Sleep(time.Millisecond)
		}
		wg.Wait()
		for i := len(xs) - 1; i >= 0; i-- {
			xs[i].close()
			ys[i].close()
		}
	})
}

func all(mu *sync.Mutex, list *[]*end) []*end {
	mu.Lock()
	defer mu.Unlock()
	return append([]*end(nil), *list...)
}

// Two thousand QPs on one CQ.
func TestTwoThousandQPs(t *testing.T) {
	a, b := openNIC(t, true), openNIC(t, true)
	if a.sharedE != nil {
		testutil.Skip(t, a.sharedE.Error())
	}
	qps := fewer(2000)
	cfg := endConfig{typ: ib.RC, depth: 2, size: 4096, private: true, cqEntries: 16000}
	xs, ys := make([]*end, qps), make([]*end, qps)
	for i := range qps {
		if i == 0 {
			xs[i], ys[i] = makeEnd(t, a, cfg), makeEnd(t, b, cfg)
		} else {
			xs[i], ys[i] = makeEndOn(t, a, xs[0].pd, xs[0].cq, cfg), makeEndOn(t, b, ys[0].pd, ys[0].cq, cfg)
		}
		xs[i].connect(ys[i])
		ys[i].connect(xs[i])
	}
	for round := range 3 {
		for i := range qps {
			ys[i].recv(uint64(i), ys[i].sge(0, 64))
			xs[i].send(ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: xs[i].sge(0, 64)})
		}
		seen := make([]bool, qps)
		for range qps {
			if wc := xs[0].poll(); wc.Status != ib.WCSuccess {
				t.Fatalf("%+v", wc)
			}
			wc := ys[0].poll()
			if wc.Status != ib.WCSuccess || seen[wc.ID] {
				t.Fatalf("round %d: %+v, twice: %v", round, wc, seen[wc.ID])
			}
			seen[wc.ID] = true
		}
	}
	for i := qps - 1; i >= 0; i-- {
		xs[i].close()
		ys[i].close()
	}
	if h := a.onlyLink(t).holds(); h.chunks > 16 {
		t.Errorf("%d chunks for %d QPs", h.chunks, qps)
	}
}

// Ping-pong between two sleepers: one wake-up that is lost ends it.
func TestNoWakeupIsLost(t *testing.T) {
	paths(t, func(t *testing.T, na, nb *NIC) {
		a, b := newEnd(t, na, endConfig{typ: ib.RC, depth: 16, size: 4096}), newEnd(t, nb, endConfig{typ: ib.RC, depth: 16, size: 4096})
		a.connect(b)
		b.connect(a)
		rounds := fewer(20000)
		var wg sync.WaitGroup
		side := func(e *end, first bool) {
			var wcs [4]ib.WC
			post := func() { e.q.PostRecv([]ib.RecvWR{{ID: 1, SGEs: e.sge(0, 64)}}) }
			send := func() {
				e.q.PostSend([]ib.SendWR{{ID: 2, Opcode: ib.OpSend, SGEs: e.sge(64, 8), Flags: ib.SendSolicited}})
			}
			if first {
				send()
			}
			for i := 0; i < rounds; {
				if err := e.cq.Arm(i%3 == 0); err != nil {
					t.Error(err)
					return
				}
				n := e.cq.Poll(wcs[:])
				if n == 0 {
					ctx, cancel := context.WithTimeout(context.Background(), testutil.Patience)
					_, err := e.ch.Wait(ctx)
					cancel()
					if err != nil {
						t.Errorf("round %d: %v", i, err)
						return
					}
					continue
				}
				for _, wc := range wcs[:n] {
					if wc.Status != ib.WCSuccess {
						t.Errorf("round %d: %+v", i, wc)
						return
					}
					i++
					post()
					if first && i == rounds {
						return
					}
					send()
				}
			}
		}
		for range 8 {
			a.recv(1, a.sge(0, 64))
			b.recv(1, b.sge(0, 64))
		}
		wg.Go(func() { side(a, true) })
		wg.Go(func() { side(b, false) })
		wg.Wait()
	})
}

// Waiters that give up do not take a wake-up with them.
func TestWaitersGiveUp(t *testing.T) {
	a, b := newEnd(t, openNIC(t, false), endConfig{typ: ib.RC, depth: 16, size: 4096}), newEnd(t, openNIC(t, false), endConfig{typ: ib.RC, depth: 16, size: 4096})
	a.connect(b)
	b.connect(a)
	for i := range fewer(2000) {
		if err := b.cq.Arm(false); err != nil {
			t.Fatal(err)
		}
		woken := make(chan error, 1)
		brief, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		var taken atomic.Bool // by the one that gives up
		wg.Go(func() {
			if _, err := b.ch.Wait(brief); err == nil {
				taken.Store(true)
			}
		})
		patient, stop := context.WithTimeout(context.Background(), testutil.Patience)
		go func() { _, err := b.ch.Wait(patient); woken <- err }()
		b.recv(1, b.sge(0, 64))
		go cancel()
		a.send(ib.SendWR{ID: 1, Opcode: ib.OpSend, SGEs: a.sge(0, 8)})
		wg.Wait()
		if taken.Load() {
			stop() // nothing is left for the other
		}
		if err := <-woken; err != nil && !taken.Load() {
			t.Fatalf("round %d: %v", i, err)
		}
		stop()
		if wc := b.poll(); wc.Status != ib.WCSuccess {
			t.Fatalf("%+v", wc)
		}
	}
}

// Several peers take from one shared receive queue at once, some slower than others, so that entries are lapped.
func TestPeersShareAReceiveQueue(t *testing.T) {
	for _, door := range []bool{false, true} {
		t.Run(fmt.Sprintf("shm=%v", door), func(t *testing.T) {
			n := openNIC(t, door)
			if door && n.sharedE != nil {
				testutil.Skip(t, n.sharedE.Error())
			}
			const peers = 3
			pd := allocPD(t, n)
			defer pd.Close()
			s := newTestSRQ(t, pd)
			defer s.Close()
			owner := makeEndOn(t, n, pd, mustCQ(t, n), endConfig{typ: ib.RC, depth: 8, size: 64 << 10, srq: s})
			defer owner.cq.Close()
			ends := []*end{owner}
			for range peers - 1 {
				ends = append(ends, makeEndOn(t, n, pd, owner.cq, endConfig{typ: ib.RC, depth: 8, size: 4096, srq: s}))
			}
			var from []*end
			for _, e := range ends {
				x := newEnd(t, openNIC(t, door), endConfig{typ: ib.RC, depth: 8, size: 64 << 10})
				x.connect(e)
				e.connect(x)
				from = append(from, x)
			}
			each := fewer(6000)
			var wg sync.WaitGroup
			for k, x := range from {
				wg.Go(func() {
					var wcs [8]ib.WC
					ended := 0
					for i := 0; ended < each; {
						if i < each && i-ended < 8 {
							word := word64At(x.buf, uint64(8*(i%8)))
							*word = uint64(k)<<32 | uint64(i)
							if m, _ := x.q.PostSend([]ib.SendWR{{ID: 1, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: x.sge(8*(i%8), 8)}}); m == 1 {
								i++
							}
						}
						for _, wc := range wcs[:max(0, x.cq.Poll(wcs[:]))] {
							if wc.Status != ib.WCSuccess {
								t.Errorf("peer %d: %+v", k, wc)
								return
							}
							ended++
						}
						if i%50 == 0 {
							runtime.Gosched()
						}
					}
				})
			}
			free := []int{}
			for slot := range 16 {
				free = append(free, slot)
			}
			next := make([]uint64, peers)
			if err := s.SetLimit(0); err != nil {
				t.Fatal(err)
			}
			var held []ib.WC // polled late, so that their entries are still in use when the ring comes round
			total := 0
			for end := time.Now().Add(3 * testutil.Patience); total < peers*each && !t.Failed(); {
				for len(free) > 0 {
					slot := free[0]
					if k, err := s.PostRecv([]ib.RecvWR{{ID: uint64(slot), SGEs: owner.sge(4096+64*slot, 64)}}); k != 1 {
						if !errors.Is(err, driver.ErrQueueFull) {
							t.Fatal(err)
						}
						break
					}
					free = free[1:]
				}
				var wcs [3]ib.WC
				held = append(held[:0], wcs[:max(0, owner.cq.Poll(wcs[:]))]...)
				for _, wc := range held {
					if wc.Status != ib.WCSuccess || wc.ByteLen != 8 {
						t.Fatalf("%+v", wc)
					}
					v := *word64At(owner.buf, 4096+64*wc.ID)
					k, i := v>>32, v&0xffffffff
					if k >= peers || i != next[k] {
						t.Fatalf("message %d of peer %d, want %v", i, k, next)
					}
					next[k]++
					free = append(free, int(wc.ID))
					total++
				}
				if time.Now().After(end) {
					t.Fatalf("%d of %d messages", total, peers*each)
				}
			}
			wg.Wait()
			if t.Failed() {
				return
			}
			// The limit is told once, when the queue falls below it.
			if err := s.SetLimit(1); err != nil {
				t.Fatal(err)
			}
			left := 16 - len(free)
			for range left {
				from[0].send(ib.SendWR{ID: 1, Opcode: ib.OpSend, SGEs: from[0].sge(0, 8)})
				owner.poll()
			}
			ctx, cancel := context.WithTimeout(context.Background(), testutil.Patience)
			defer cancel()
			for {
				e, err := n.AsyncEvent(ctx)
				if err != nil {
					t.Fatal(err)
				}
				if e.Type == ib.EventSRQLimit {
					break
				}
			}
			for i := len(ends) - 1; i >= 0; i-- {
				ends[i].q.Close()
				ends[i].close()
			}
		})
	}
}

// A queue pair is reset that holds a receive of a shared queue from before the ring came round: the others go on.
func TestResetBehindTheRing(t *testing.T) {
	paths(t, func(t *testing.T, na, n *NIC) {
		pd := allocPD(t, n)
		defer pd.Close()
		srq, err := pd.(*PD).CreateSRQ(driver.SRQConfig{MaxWR: 4, MaxSGE: 1})
		if err != nil {
			t.Fatal(err)
		}
		s := srq.(*SRQ)
		defer s.Close()
		var slow, fast, from, toSlow *end
		for _, p := range []struct{ to, from **end }{{&slow, &toSlow}, {&fast, &from}} {
			cq := mustCQ(t, n)
			defer cq.Close()
			*p.to = makeEndOn(t, n, pd, cq, endConfig{typ: ib.RC, depth: 8, size: 4096, srq: s})
			defer (*p.to).close()
			*p.from = newEnd(t, na, endConfig{typ: ib.RC, depth: 8, size: 4096})
			(*p.from).connect(*p.to)
			(*p.to).connect(*p.from)
		}
		post := func() {
			t.Helper()
			if _, err := s.PostRecv([]ib.RecvWR{{SGEs: fast.sge(0, 64)}}); err != nil {
				t.Fatal(err)
			}
		}
		message := func() {
			t.Helper()
			from.send(ib.SendWR{Opcode: ib.OpSend, SGEs: from.sge(0, 8)})
			if wc := fast.poll(); wc.Status != ib.WCSuccess {
				t.Fatalf("%+v", wc)
			}
		}
		for range 4 {
			post()
		}
		toSlow.send(ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: toSlow.sge(0, 8)})
		if wc := toSlow.poll(); wc.Status != ib.WCSuccess { // slow does not poll
			t.Fatalf("%+v", wc)
		}
		for range 5 { // the last one's entry would be the one that slow has
			message()
			post()
		}
		if err := slow.q.Modify(t.Context(), &ib.QPAttr{State: ib.Reset}, ib.AttrState); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			message()
		}
	})
}

func mustCQ(t testing.TB, n *NIC) driver.CQ {
	cq, err := n.CreateCQ(driver.CQConfig{Entries: 1024})
	if err != nil {
		t.Fatal(err)
	}
	return cq
}

// Both sides call each other at once, from several goroutines: one link comes of it.
func TestBothCallAtOnce(t *testing.T) {
	for i := range fewer(100) + 5 {
		a, b := openNIC(t, true), openNIC(t, true)
		if a.sharedE != nil {
			testutil.Skip(t, a.sharedE.Error())
		}
		var wg sync.WaitGroup
		for range 3 {
			for _, d := range [][2]*NIC{{a, b}, {b, a}} {
				wg.Go(func() {
					if path, err := d[0].CheckReach(context.Background(), d[1].gid); err != nil || path != pathShm {
						t.Errorf("round %d: %q, %v", i, path, err)
					}
				})
			}
		}
		wg.Wait()
		if t.Failed() {
			return
		}
		cfg := endConfig{typ: ib.RC, depth: 4, size: 4096, private: true}
		x, y := makeEnd(t, a, cfg), makeEnd(t, b, cfg)
		x.connect(y)
		y.connect(x)
		exchange(x, y)
		x.close()
		y.close()
	}
}
