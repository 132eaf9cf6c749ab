package softnic

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// crowd is queue pairs of one NIC on a CQ of theirs, each connected to one of a NIC that has room for everything.
type crowd struct {
	cq   *CQ
	a, b []*end
}

// newCrowd makes n pairs whose queues have 16 requests each.
func newCrowd(t testing.TB, na, nb *NIC, n, entries int, typ ib.QPType, shared bool) *crowd {
	t.Helper()
	x := &crowd{}
	in := func(nic *NIC, entries int, shared bool) (*CQ, driver.PD, driver.SRQ) {
		pd, err := nic.AllocPD()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { pd.Close() })
		cq, err := nic.CreateCQ(driver.CQConfig{Entries: entries})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cq.Close() })
		if !shared {
			return cq.(*CQ), pd, nil
		}
		srq, err := pd.(*PD).CreateSRQ(driver.SRQConfig{MaxWR: 16 * n})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { srq.Close() })
		return cq.(*CQ), pd, srq
	}
	cq, pda, srq := in(na, entries, shared)
	x.cq = cq
	other, pdb, _ := in(nb, 32*n, false)
	for range n {
		a := makeEndOn(t, na, pda, cq, endConfig{typ: typ, depth: 16, size: 64 << 10, srq: srq})
		t.Cleanup(a.close)
		b := makeEndOn(t, nb, pdb, other, endConfig{typ: typ, depth: 16, size: 64 << 10})
		t.Cleanup(b.close)
		if typ == ib.UD {
			a.ready()
			b.ready()
		} else {
			a.connect(b)
			b.connect(a)
		}
		x.a, x.b = append(x.a, a), append(x.b, b)
	}
	return x
}

// message has pair i's second side send to the first, which completes a receive there.
func (x *crowd) message(i int) {
	a, b := x.a[i], x.b[i]
	b.t.Helper()
	wr := []ib.RecvWR{{ID: uint64(i), SGEs: a.sge(0, 256)}}
	post := a.q.PostRecv
	if s := a.q.(*QP).srq; s != nil {
		post = s.PostRecv
	}
	if _, err := post(wr); err != nil {
		b.t.Fatal(err)
	}
	s := ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: b.sge(0, 8)}
	if b.q.(*QP).typ == ib.UD {
		ah, err := b.pd.CreateAH(ib.AHAttr{DGID: a.n.gid, Port: 1})
		if err != nil {
			b.t.Fatal(err)
		}
		defer ah.Close()
		s.AH, s.RemoteQPN, s.RemoteQKey = ah.Num(), a.q.QPN(), testQKey
	}
	b.send(s)
	if wc := b.poll(); wc.Status != ib.WCSuccess {
		b.t.Fatalf("%+v", wc)
	}
}

// write has pair i's first side write, which completes a request there.
func (x *crowd) write(i int) {
	a, b := x.a[i], x.b[i]
	a.t.Helper()
	q := a.q.(*QP)
	before := atomic.LoadUint32(&q.scTail)
	a.send(ib.SendWR{ID: uint64(i), Opcode: ib.OpRDMAWrite, Flags: ib.SendSignaled, SGEs: a.sge(0, 8), RemoteAddr: addrOf(b.buf), RKey: b.mr.RKey()})
	for end := time.Now().Add(10 * time.Second); atomic.LoadUint32(&q.scTail) == before; time.Sleep(10 * time.Microsecond) {
		if time.Now().After(end) {
			a.t.Fatal("the WRITE does not complete")
		}
	}
}

// A CQ holds as many completions as it has entries, whoever they are of; one more, and the next Poll says so, as do events.
func TestOverrun(t *testing.T) {
	paths(t, func(t *testing.T, na, nb *NIC) {
		for _, n := range []int{1, scanLimit, scanLimit + 1, 40} {
			t.Run(fmt.Sprintf("%d QPs", n), func(t *testing.T) {
				entries := 10*n + 3
				x := newCrowd(t, na, nb, n, entries, ib.RC, false)
				rnd := rand.New(rand.NewPCG(uint64(n), 1))
				perQP := make([][2]int, n) // outstanding completions of receives and sends
				queued := 0
				add := func() {
					for {
						i, kind := rnd.IntN(n), rnd.IntN(2)
						if perQP[i][kind] == 16 {
							continue
						}
						perQP[i][kind]++
						queued++
						if kind == 0 {
							x.message(i)
						} else {
							x.write(i)
						}
						return
					}
				}
				for range 30 {
					for queued < entries {
						add()
					}
					wcs := make([]ib.WC, 1+rnd.IntN(entries+3))
					got := x.cq.Poll(wcs)
					if got != min(len(wcs), queued) {
						t.Fatalf("Poll of %d returns %d of %d in %d entries: %v", len(wcs), got, queued, entries, x.cq.Err())
					}
					for _, wc := range wcs[:got] {
						kind := 0
						if wc.Opcode == ib.WCRDMAWrite {
							kind = 1
						}
						perQP[wc.ID][kind]--
						queued--
					}
				}
				for queued <= entries {
					add()
				}
				wantOverrun(t, x)
			})
		}
	})
}

// wantOverrun checks that the crowd's CQ has overrun, and that the program is told.
func wantOverrun(t *testing.T, x *crowd) {
	t.Helper()
	if got := x.cq.Poll(make([]ib.WC, 4)); got != -1 || !errors.Is(x.cq.Err(), errOverrun) {
		t.Fatalf("Poll returns %d, error %v", got, x.cq.Err())
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	told := map[any]ib.EventType{}
	for len(told) < 1+len(x.a) {
		e, err := x.a[0].n.AsyncEvent(ctx)
		if err != nil {
			t.Fatalf("events %v: %v", told, err)
		}
		switch e.Type {
		case ib.EventCQErr:
			told[e.CQ] = e.Type
		case ib.EventQPFatal:
			told[e.QP] = e.Type
		}
	}
	if told[x.cq] != ib.EventCQErr {
		t.Errorf("events %v", told)
	}
	for i, a := range x.a {
		if told[a.q] != ib.EventQPFatal || a.q.(*QP).State() != ib.Err {
			t.Errorf("QP %d: event %v, state %v", i, told[a.q], a.q.(*QP).State())
		}
	}
}

// Receives of a shared queue, and of datagrams, count as well.
func TestOverrunOfOthers(t *testing.T) {
	for name, c := range map[string]struct {
		typ    ib.QPType
		shared bool
	}{"SRQ": {ib.RC, true}, "UD": {ib.UD, false}} {
		t.Run(name, func(t *testing.T) {
			paths(t, func(t *testing.T, na, nb *NIC) {
				for _, n := range []int{1, scanLimit + 2} {
					t.Run(fmt.Sprintf("%d QPs", n), func(t *testing.T) {
						x := newCrowd(t, na, nb, n, 12, c.typ, c.shared)
						for range 3 {
							for i := range 12 {
								x.message(i % n)
							}
							if got := x.cq.Poll(make([]ib.WC, 20)); got != 12 {
								t.Fatalf("%d completions: %v", got, x.cq.Err())
							}
						}
						for i := range 13 {
							x.message(i % n)
						}
						wantOverrun(t, x)
					})
				}
			})
		})
	}
}

// Receives that have been completed are not counted again when the QP stops; those that have not been are.
func TestOverrunByFlush(t *testing.T) {
	for _, n := range []int{1, scanLimit + 1} {
		for _, more := range []int{0, 1} {
			t.Run(fmt.Sprintf("%d QPs, %d too many", n, more), func(t *testing.T) {
				nic := openNIC(t, false)
				x := newCrowd(t, nic, nic, n, 12, ib.RC, false)
				for range 8 {
					x.message(0)
				}
				for i := range 4 + more {
					x.a[0].recv(uint64(i), nil)
				}
				if err := x.a[0].q.Modify(context.Background(), &ib.QPAttr{State: ib.Err}, ib.AttrState); err != nil {
					t.Fatal(err)
				}
				if more > 0 {
					if got := x.cq.Poll(make([]ib.WC, 20)); got != -1 {
						t.Errorf("%d completions", got)
					}
					return
				}
				if got := x.cq.Poll(make([]ib.WC, 20)); got != 12 {
					t.Errorf("%d completions: %v", got, x.cq.Err())
				}
			})
		}
	}
}

// A CQ that is made larger, or whose QPs go, no longer counts, and one that is made smaller does: nothing is lost in between.
func TestOverrunChanges(t *testing.T) {
	nic := openNIC(t, false)
	const n = 12
	x := newCrowd(t, nic, nic, n, 1000, ib.RC, false)
	want := func(queued int) {
		t.Helper()
		for got := 0; got < queued; {
			k := x.cq.Poll(make([]ib.WC, 5))
			if k <= 0 {
				t.Fatalf("%d completions of %d: %v", got, queued, x.cq.Err())
			}
			got += k
		}
		if k := x.cq.Poll(make([]ib.WC, 5)); k != 0 {
			t.Fatalf("%d more", k)
		}
	}
	for _, entries := range []int{20, 1000, 24, 32 * n, 30} {
		for i := range 18 {
			x.message(i % n)
		}
		if got := x.cq.Poll(make([]ib.WC, 2)); got != 2 {
			t.Fatal(got)
		}
		if err := x.cq.Resize(entries); err != nil {
			t.Fatal(err)
		}
		want(16)
	}
	if err := x.cq.Resize(16); err != nil {
		t.Fatal(err)
	}
	for i := range 16 {
		x.message(i % n)
	}
	if err := x.cq.Resize(15); !errors.Is(err, driver.ErrBusy) {
		t.Errorf("resize below what is queued: %v", err)
	}
	// The completions of a QP that is reset are gone.
	if err := x.a[0].q.Modify(context.Background(), &ib.QPAttr{State: ib.Reset}, ib.AttrState); err != nil {
		t.Fatal(err)
	}
	x.message(1)
	x.message(2)
	want(16)
	for i := range 11 {
		x.message(1)
		if i == 5 {
			for _, a := range x.a[4:] { // four are left, with 128 completions at most
				if err := a.q.Close(); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	want(11)
}

// A peer that claims to have completed receives which nobody has posted does not break the CQ of others.
func TestOverrunByLiar(t *testing.T) {
	for _, shared := range []bool{false, true} {
		for _, n := range []int{1, scanLimit} {
			t.Run(fmt.Sprintf("shared=%v, %d honest QPs", shared, n), func(t *testing.T) {
				na, nb, nc := openNIC(t, true), openNIC(t, true), openNIC(t, true)
				if na.sharedE != nil {
					t.Skip(na.sharedE)
				}
				x := newCrowd(t, na, nb, n, 12, ib.RC, shared)
				c := newEnd(t, nc, endConfig{typ: ib.RC, depth: 16})
				a := makeEndOn(t, na, x.a[0].pd, x.cq, endConfig{typ: ib.RC, depth: 16, srq: driverSRQ(x.a[0])})
				t.Cleanup(a.close)
				a.connect(c)
				c.connect(a)
				in := a.q.(*QP).in.Load()
				for h := range in.mask + 1 {
					atomic.StoreUint64(&in.cqes[h*in.geo.cqeWords], uint64(h+1))
				}
				x.cq.ready.set(a.q.(*QP).rIdx)
				for i := range 12 {
					x.message(i % n)
				}
				got := 0
				for range 20 {
					k := x.cq.Poll(make([]ib.WC, 12))
					if k < 0 {
						t.Fatal(x.cq.Err())
					}
					got += k
				}
				if got != 12 {
					t.Errorf("%d completions", got)
				}
				for end := time.Now().Add(10 * time.Second); in.link.reason() == nil; time.Sleep(time.Millisecond) {
					if time.Now().After(end) {
						t.Fatal("the liar's link stays")
					}
				}
			})
		}
	}
}

func driverSRQ(e *end) driver.SRQ {
	if s := e.q.(*QP).srq; s != nil {
		return s
	}
	return nil
}

func TestBacklog(t *testing.T) {
	var b backlog
	rnd := rand.New(rand.NewPCG(1, 1))
	var want []int
	in := map[int]bool{}
	for n := 1; n < 200; n++ {
		b.grow(n)
		for range 5 {
			if k := rnd.IntN(n); rnd.IntN(5) < 3 {
				b.push(k)
				if !in[k] {
					in[k] = true
					want = append(want, k)
				}
			} else if k, ok := b.pop(); ok != (len(want) > 0) || ok && k != want[0] {
				t.Fatal(k, ok, want)
			} else if ok {
				delete(in, k)
				want = want[1:]
			}
		}
	}
}

// BenchmarkPoll is what a completion costs on a CQ of many QPs that has room for all of their completions, and on one that could overrun.
func BenchmarkPoll(b *testing.B) {
	for _, n := range []int{1, scanLimit, 40} {
		for _, entries := range []int{32 * n, 32*n - 1} {
			b.Run(fmt.Sprintf("qps=%d/room=%v", n, entries == 32*n), func(b *testing.B) {
				na, nb := openNIC(b, true), openNIC(b, true)
				x := newCrowd(b, na, nb, n, entries, ib.RC, false)
				for i := range n {
					x.write(i)
				}
				var wc [16]ib.WC
				for x.cq.Poll(wc[:]) > 0 {
				}
				var wrs [][]ib.SendWR
				for i, a := range x.a {
					wrs = append(wrs, []ib.SendWR{{Opcode: ib.OpRDMAWrite, Flags: ib.SendSignaled, SGEs: a.sge(0, 8), RemoteAddr: addrOf(x.b[i].buf), RKey: x.b[i].mr.RKey()}})
				}
				b.ReportAllocs()
				i := 0
				for b.Loop() {
					x.a[i].q.PostSend(wrs[i])
					if i++; i == n {
						i = 0
					}
					for x.cq.Poll(wc[:]) == 0 {
					}
				}
			})
		}
	}
}
