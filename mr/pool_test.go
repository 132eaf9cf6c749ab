package mr

import (
	"context"
	"errors"
	"math"
	"math/bits"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver/drivertest"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func newPool(t testing.TB, cfg PoolConfig) *Pool {
	t.Helper()
	pd, _ := newPD(t)
	p := must(NewPool(pd, cfg))
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func TestPoolClasses(t *testing.T) {
	p := newPool(t, PoolConfig{})
	for _, c := range []struct{ n, want int }{{0, 64}, {1, 64}, {64, 64}, {65, 128}, {128, 128}, {4096, 4096}, {4097, 8192}, {1 << 20, 1 << 20}} {
		b := must(p.Get(c.n))
		if b.Cap() != c.want || b.Len() != c.n || len(b.Bytes()) != c.n || cap(b.Bytes()) != c.want {
			t.Errorf("%d: len %d, cap %d, want %d", c.n, b.Len(), b.Cap(), c.want)
		}
		m, off := b.Region()
		if b.Cap() > 0 && &m.Bytes()[off] != &b.mem[0] || addrOf(b.mem)%uint64(min(b.Cap(), 4096)) != 0 {
			t.Errorf("%d: at %#x", c.n, addrOf(b.mem))
		}
		if s := b.SGE(1, c.want-1); s != (ib.SGE{Addr: addrOf(b.mem) + 1, Length: uint32(c.want - 1), LKey: m.LKey()}) {
			t.Errorf("%d: %+v", c.n, s)
		}
		if k := b.RemoteRange(0, c.want); k.Addr != addrOf(b.mem) || k.Len != uint64(c.want) || k.RKey != m.RKey() {
			t.Errorf("%d: %v", c.n, k)
		}
		b.SetLen(b.Cap())
		b.Bytes()[b.Cap()-1] = 1
		for _, f := range []func(){func() { b.SetLen(-1) }, func() { b.SetLen(b.Cap() + 1) }, func() { b.SGE(1, b.Cap()) }, func() { b.SGE(-1, 1) },
			func() { b.SGE(math.MaxInt, 2) }, func() { b.RemoteRange(1, b.Cap()) }, func() { b.RemoteRange(0, -1) }} {
			panics(t, f)
		}
		b.Release()
	}
	if _, err := p.Get(1<<20 + 1); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	if b := p.TryGet(1<<20 + 1); b != nil {
		t.Error("too large")
	}
	if b := p.TryGet(-1); b != nil {
		t.Error("negative")
	}
	if b := p.TryGet(0); b == nil || b.Len() != 0 || b.Cap() != 64 {
		t.Errorf("of nothing: %+v", b)
	} else {
		b.Release()
	}
	panics(t, func() { p.Get(-1) })
	if p.MaxBuffer() != 1<<20 {
		t.Error(p.MaxBuffer())
	}
}

func TestPoolBadConfig(t *testing.T) {
	pd, _ := newPD(t)
	for _, c := range []PoolConfig{{Limit: -1}, {Limit: 63}, {MaxBuffer: -1}, {MaxBuffer: 1<<30 + 1}, {SlabSize: -1}, {Access: 1 << 30}, {Access: ib.AccessRemoteWrite}} {
		if _, err := NewPool(pd, c); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}

// No two buffers share a byte, and each class keeps to its size.
func TestPoolBuffersAreDistinct(t *testing.T) {
	p := newPool(t, PoolConfig{Limit: 4 << 20, MaxBuffer: 1 << 16})
	at := map[uint64]bool{}
	var all []*Buffer
	for i := range 3000 {
		b, err := p.Get(1 << (i % 11))
		if errors.Is(err, ErrPoolExhausted) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		for a := addrOf(b.mem); a < addrOf(b.mem)+uint64(b.Cap()); a += 64 {
			if at[a] {
				t.Fatalf("%#x is handed out twice", a)
			}
			at[a] = true
		}
		all = append(all, b)
	}
	if s := p.Stats(); s.InUse != len(all) || s.Bytes > s.Limit || s.Slabs == 0 {
		t.Errorf("%+v, %d buffers", s, len(all))
	}
	for _, b := range all {
		b.Release()
	}
	if s := p.Stats(); s.InUse != 0 {
		t.Errorf("%+v", s)
	}
}

func TestPoolLimit(t *testing.T) {
	p := newPool(t, PoolConfig{Limit: 256 << 10, MaxBuffer: 64 << 10})
	var all []*Buffer
	for {
		b, err := p.Get(64 << 10)
		if err != nil {
			if !errors.Is(err, ErrPoolExhausted) || !strings.Contains(err.Error(), "PoolConfig.Limit") {
				t.Fatal(err)
			}
			break
		}
		all = append(all, b)
	}
	if len(all) != 4 {
		t.Fatalf("%d buffers of 64 KiB from 256 KiB", len(all))
	}
	if _, err := p.Get(1); !errors.Is(err, ErrPoolExhausted) {
		t.Error(err)
	}
	// A larger buffer is lent when the class of the right size cannot grow.
	all[3].Release()
	b := must(p.Get(100))
	if b.Cap() != 64<<10 || b.Len() != 100 {
		t.Error(b.Cap(), b.Len())
	}
	b.Release()
	if b = p.TryGet(100); b == nil || b.Cap() != 64<<10 {
		t.Error("TryGet found none")
	}
	b.Release()
	for _, b := range all[:3] {
		b.Release()
	}
}

func TestPoolDoubleRelease(t *testing.T) {
	for _, poison := range []bool{false, true} {
		p := newPool(t, PoolConfig{Poison: poison})
		a, b := must(p.Get(10)), must(p.Get(10))
		a.Release()
		if v := panics(t, a.Release); v != doubleRelease {
			t.Error(v)
		}
		b.Release()
		if v := panics(t, b.Release); v != doubleRelease {
			t.Error(v)
		}
		if s := p.Stats(); s.InUse != 0 {
			t.Errorf("%+v", s)
		}
	}
}

func TestPoolPoison(t *testing.T) {
	p := newPool(t, PoolConfig{Poison: true})
	b := must(p.Get(100))
	for _, v := range b.Bytes() {
		if v != poisonByte {
			t.Fatal("fresh memory looks useful")
		}
	}
	old := b.Bytes()
	copy(old, "payload")
	b.Release()
	if old[0] != poisonByte {
		t.Errorf("readable after Release: %q", old[:7])
	}
	old[50] = 1
	if v := panics(t, func() {
		for range 1000 {
			p.Get(100)
		}
	}); v == nil || !strings.Contains(v.(string), "byte 50 of 128 is 0x1") {
		t.Error(v)
	}
	for _, w := range *p.classes[1].words.Load() { // those that the loop has lost
		for i := range w.bufs {
			if b := &w.bufs[i]; w.free.Load()&b.bit == 0 {
				b.Release()
			}
		}
	}
}

func TestPoolClose(t *testing.T) {
	pd, dev := newPD(t)
	p := must(NewPool(pd, PoolConfig{}))
	b, c := must(p.Get(100)), must(p.Get(100_000))
	if err := p.Close(); !errors.Is(err, verbs.ErrBusy) || !strings.Contains(err.Error(), "2 buffers") {
		t.Error(err)
	}
	c.Release()
	must(p.Get(100_000)).Release() // still works
	if err := pd.Close(); !errors.Is(err, verbs.ErrBusy) {
		t.Error(err)
	}
	b.Release()
	dev.Fail("close_mr", verbs.ErrBusy)
	if err := p.Close(); !errors.Is(err, verbs.ErrBusy) {
		t.Error(err)
	}
	dev.Fail("close_mr", nil)
	for range 2 {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := p.Get(100); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if b := p.TryGet(100); b != nil {
		t.Error("a closed pool has buffers")
	}
	if _, err := p.GetContext(t.Context(), 100); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

func TestPoolNoAllocation(t *testing.T) {
	p := newPool(t, PoolConfig{})
	must(p.Get(100)).Release()
	if n := testing.AllocsPerRun(1000, func() {
		b, err := p.Get(100)
		if err != nil {
			panic(err)
		}
		b.SGE(0, 100)
		b.Release()
		p.TryGet(50).Release()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestPoolGetContext(t *testing.T) {
	p := newPool(t, PoolConfig{Limit: 64 << 10, MaxBuffer: 64 << 10})
	only := must(p.GetContext(t.Context(), 64<<10))
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("no patience")
	cancel(reason)
	if _, err := p.GetContext(ctx, 1); !errors.Is(err, reason) {
		t.Error(err)
	}
	if _, err := p.GetContext(t.Context(), 1<<20); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	var wg sync.WaitGroup
	for range 8 { // all with one buffer
		wg.Go(func() {
			for range 100 {
				b, err := p.GetContext(t.Context(), 1+rand.IntN(64<<10))
				if err != nil {
					t.Error(err)
					return
				}
				runtime.Gosched()
				b.Release()
			}
		})
	}
	only.Release()
	wg.Wait()
	if n := p.waiting.Load(); n != 0 || len(p.wait) != 0 {
		t.Errorf("%d waiters left", n)
	}
}

// A waiter whose context ends just as it is woken passes the wake-up on.
func TestPoolGetContextCancelRace(t *testing.T) {
	p := newPool(t, PoolConfig{Limit: 64 << 10, MaxBuffer: 64 << 10})
	for range 300 {
		only := must(p.Get(64 << 10))
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if b, err := p.GetContext(ctx, 1); err == nil {
				b.Release()
			}
		})
		wg.Go(func() {
			b, err := p.GetContext(t.Context(), 1)
			if err != nil {
				t.Error(err)
				return
			}
			b.Release()
		})
		wg.Go(cancel)
		only.Release()
		wg.Wait()
	}
}

// A Close that comes when the last buffer was released, and a waiter did not take it yet, ends the wait.
func TestPoolCloseEndsWaiting(t *testing.T) {
	pd, _ := newPD(t)
	for range 100 {
		p := must(NewPool(pd, PoolConfig{Limit: 64 << 10, MaxBuffer: 64 << 10}))
		only := must(p.Get(1))
		var wg sync.WaitGroup
		wg.Go(func() {
			b, err := p.GetContext(t.Context(), 64<<10)
			if err == nil {
				b.Release()
			} else if !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
		})
		testutil.Eventually(t, "waiting", func() bool { return p.waiting.Load() == 1 })
		only.Release()
		for errors.Is(p.Close(), verbs.ErrBusy) { // the waiter was faster
			runtime.Gosched()
		}
		wg.Wait()
	}
}

// Memory that one size has left is there for all others.
func TestPoolSizesTakeTurns(t *testing.T) {
	for _, c := range []struct {
		limit int
		sizes []int
	}{
		{1 << 20, []int{100_000, 600_000, 100_000, 1 << 20, 64, 1 << 20, 5000, 600_000}},
		{3 << 20, []int{5 << 19, 100, 3 << 20, 1 << 20, 3 << 20}}, // the largest class is no power of two
		{1<<20 + 100, []int{1<<20 + 64, 1, 1 << 20}},
		{64, []int{64, 0, 1}},
	} {
		p := newPool(t, PoolConfig{Limit: c.limit, MaxBuffer: 1 << 30, SlabSize: 4 << 20, Poison: true})
		if want := c.limit &^ 63; p.MaxBuffer() != want {
			t.Errorf("limit %d: MaxBuffer is %d, want %d", c.limit, p.MaxBuffer(), want)
		}
		for i, n := range c.sizes {
			b, err := p.Get(n)
			if err != nil {
				t.Fatalf("limit %d: %d bytes after %v: %v, %+v", c.limit, n, c.sizes[:i], err, p.Stats())
			}
			if b.Len() != n || b.Cap() < n || b.Cap() > c.limit {
				t.Errorf("limit %d: %d bytes: len %d, cap %d", c.limit, n, b.Len(), b.Cap())
			}
			b.SetLen(b.Cap())
			b.Bytes()[b.Cap()-1] = 1
			b.Release()
			if s := p.Stats(); s.Bytes > s.Limit || s.InUse != 0 {
				t.Fatalf("limit %d: %d bytes after %v: %+v", c.limit, n, c.sizes[:i], s)
			}
		}
		if _, err := p.Get(p.MaxBuffer() + 1); !errors.Is(err, ErrTooLarge) {
			t.Errorf("limit %d: more than MaxBuffer: %v", c.limit, err)
		}
	}
}

// Whatever sizes come, as long as there is room for what is in use there is a buffer when nothing else is, and no more than the
// limit is ever taken.
func TestPoolRandomSizes(t *testing.T) {
	rng := rand.New(rand.NewPCG(23, 1))
	for range 20 {
		limit := 64<<10 + rng.IntN(4<<20)
		p := newPool(t, PoolConfig{Limit: limit, MaxBuffer: 1 << 30, SlabSize: 64 << 10 << rng.IntN(5)})
		var held []*Buffer
		for range 200 {
			n := 1 + rng.IntN(1<<rng.IntN(bits.Len(uint(p.MaxBuffer()))))
			if rng.IntN(8) == 0 {
				n = p.MaxBuffer() - rng.IntN(1000)
			}
			b, err := p.Get(n)
			switch {
			case err == nil:
				held = append(held, b)
			case !errors.Is(err, ErrPoolExhausted) || len(held) == 0:
				t.Fatalf("limit %d: %d bytes: %v, %+v", limit, n, err, p.Stats())
			}
			if s := p.Stats(); s.Bytes > limit || s.InUse != len(held) {
				t.Fatalf("limit %d: %+v, %d held", limit, s, len(held))
			}
			if err != nil || rng.IntN(8) == 0 {
				for _, b := range held {
					b.Release()
				}
				held = held[:0]
			}
		}
		for _, b := range held {
			b.Release()
		}
	}
}

// What is in use stays, and so does the rest of its slab; what is given back is the oldest, and no more than needed.
func TestPoolGivesBackWhatIsFree(t *testing.T) {
	p := newPool(t, PoolConfig{Limit: 256 << 10, MaxBuffer: 128 << 10, SlabSize: 64 << 10})
	a, b, c := must(p.Get(100)), must(p.Get(1000)), must(p.Get(5000)) // a slab of 64 KiB each
	oldest := a.mr
	if s := p.Stats(); s.Bytes != 192<<10 || s.Slabs != 3 {
		t.Fatalf("%+v", s)
	}
	b.Release()
	if _, err := p.Get(129 << 10); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	large := must(p.Get(100_000)) // b's slab makes room
	if s := p.Stats(); s.Bytes != 256<<10 || s.Slabs != 3 || s.Returned != 1 || s.InUse != 3 {
		t.Fatalf("%+v", s)
	}
	a.Bytes()[99], c.Bytes()[4999] = 1, 1 // these are still there
	if _, err := p.Get(1000); err != nil {
		t.Error("c's class has free buffers to lend")
	}
	// Nothing is given back if that would not be enough.
	a.Release()
	if _, err := p.Get(128 << 10); !errors.Is(err, ErrPoolExhausted) {
		t.Error(err)
	}
	if s := p.Stats(); s.Returned != 1 {
		t.Errorf("given back for nothing: %+v", s)
	}
	if a = must(p.Get(100)); a.mr != oldest {
		t.Error("the slab was registered anew")
	}
	a.Release()
	c.Release()
	for _, w := range *p.classes[classFor(5000)].words.Load() { // the one that was lent above
		for i := range w.bufs {
			if b := &w.bufs[i]; w.free.Load()&b.bit == 0 {
				b.Release()
			}
		}
	}
	large.Release()
}

// A region that the program has made of a slab, or a device that does not let go of it, keeps it; the pool goes on.
func TestPoolSlabThatStays(t *testing.T) {
	pd, dev := newPD(t)
	p := must(NewPool(pd, PoolConfig{Limit: 128 << 10, MaxBuffer: 128 << 10}))
	b := must(p.Get(60_000))
	m, off := b.Region()
	sub := must(m.Sub(off, 100, 0))
	b.Release()
	if _, err := p.Get(128 << 10); !errors.Is(err, ErrPoolExhausted) {
		t.Error(err)
	}
	if err := sub.Close(); err != nil {
		t.Fatal(err)
	}
	dev.Fail("close_mr", verbs.ErrBusy)
	if _, err := p.Get(128 << 10); !errors.Is(err, ErrPoolExhausted) {
		t.Error(err)
	}
	dev.Fail("close_mr", nil)
	if s := p.Stats(); s.Returned != 0 || s.Bytes != 128<<10 || s.InUse != 0 {
		t.Errorf("%+v", s)
	}
	b = must(p.Get(60_000))
	b.Release()
	must(p.Get(128 << 10)).Release()
	if s := p.Stats(); s.Returned != 1 || s.Bytes != 128<<10 {
		t.Errorf("%+v", s)
	}
	// A buffer of a slab that was given back is a released one.
	if v := panics(t, b.Release); v != doubleRelease {
		t.Error(v)
	}
	panics(t, func() { _ = b.Bytes() })
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// A small Release can be what a large buffer waits for.
func TestPoolWaitForAnotherSize(t *testing.T) {
	p := newPool(t, PoolConfig{Limit: 1 << 20, MaxBuffer: 1 << 20})
	ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
	defer cancel()
	var small []*Buffer
	for {
		b, err := p.Get(100_000)
		if err != nil {
			break
		}
		small = append(small, b)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		b, err := p.GetContext(ctx, 600_000)
		if err != nil {
			t.Error(err, p.Stats())
			return
		}
		b.Release()
	})
	testutil.Eventually(t, "waiting", func() bool { return p.waiting.Load() == 1 })
	for _, b := range small {
		b.Release()
	}
	wg.Wait()
}

// One Release can be enough for several that wait, and for those behind one that it is not enough for.
func TestPoolReleaseWakesAll(t *testing.T) {
	p := newPool(t, PoolConfig{Limit: 2 << 20, MaxBuffer: 2 << 20, SlabSize: 64 << 10})
	ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
	defer cancel()
	first, second := must(p.Get(1<<20)), must(p.Get(1<<20))
	var wg sync.WaitGroup
	var all sync.WaitGroup // nobody releases before everybody has one
	wait := func(n int, together bool) {
		before := p.waiting.Load()
		wg.Go(func() {
			b, err := p.GetContext(ctx, n)
			if err != nil {
				t.Errorf("%d bytes: %v, %+v", n, err, p.Stats())
			}
			if together {
				all.Done()
				all.Wait()
			}
			if err == nil {
				b.Release()
			}
		})
		testutil.Eventually(t, "waiting", func() bool { return p.waiting.Load() == before+1 })
	}
	wait(2<<20, false) // not before the very end
	all.Add(4)
	for range 4 {
		wait(100_000, true)
	}
	first.Release()
	all.Wait()
	second.Release()
	wg.Wait()
}

// Every buffer has one owner at a time, and none is lost, whoever releases it.
func TestPoolConcurrent(t *testing.T) {
	p := newPool(t, PoolConfig{Limit: 1 << 20, MaxBuffer: 4096, Poison: true})
	passed := make(chan *Buffer, 64)
	var owners sync.Map
	own := func(b *Buffer) {
		if _, taken := owners.LoadOrStore(b, true); taken {
			t.Error("two owners")
		}
		b.SetLen(b.Cap())
		b.Bytes()[0] = 1
	}
	disown := func(b *Buffer) {
		owners.Delete(b)
		b.Release()
	}
	var producers, consumers sync.WaitGroup
	var got atomic.Int64
	for g := range 6 {
		producers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 1))
			for range 2000 {
				b, err := p.GetContext(t.Context(), 1+r.IntN(4096))
				if err != nil {
					t.Error(err)
					return
				}
				got.Add(1)
				own(b)
				if r.IntN(2) == 0 {
					passed <- b
				} else {
					disown(b)
				}
			}
		})
	}
	for range 2 {
		consumers.Go(func() {
			for b := range passed {
				disown(b)
			}
		})
	}
	stop := make(chan struct{})
	var closer sync.WaitGroup
	closer.Go(func() { // a Close that meets buffers in use changes nothing
		for {
			select {
			case <-stop:
				return
			default:
			}
			hold := p.TryGet(1)
			if hold == nil {
				runtime.Gosched()
				continue
			}
			if err := p.Close(); !errors.Is(err, verbs.ErrBusy) {
				t.Error(err)
			}
			hold.Release()
			runtime.Gosched()
		}
	})
	producers.Wait()
	close(passed)
	consumers.Wait()
	close(stop)
	closer.Wait()
	if s := p.Stats(); s.InUse != 0 || s.Bytes > s.Limit {
		t.Errorf("%+v after %d Gets", s, got.Load())
	}
}

func BenchmarkPool(b *testing.B) {
	pd := must(must(verbs.OpenDriver(drivertest.New("fake0"))).AllocPD())
	p := must(NewPool(pd, PoolConfig{}))
	defer p.Close()
	b.Run("one", func(b *testing.B) {
		for b.Loop() {
			x, _ := p.Get(1000)
			x.Release()
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				x, _ := p.Get(1000)
				x.Release()
			}
		})
	})
}
