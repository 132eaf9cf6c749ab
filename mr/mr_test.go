package mr

import (
	"bytes"
	"errors"
	"math"
	"net"
	"runtime"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver/drivertest"
	"github.com/ringside-rdma/ringside/internal/life"
	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// must returns v, or ends the test.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func newPD(t testing.TB, options ...func(*drivertest.Device)) (*verbs.PD, *drivertest.Device) {
	t.Helper()
	dev := drivertest.New("fake0")
	for _, o := range options {
		o(dev)
	}
	ctx := must(verbs.OpenDriver(dev))
	pd := must(ctx.AllocPD())
	regions, _ := mem.Live()
	t.Cleanup(func() {
		if err := errors.Join(pd.Close(), ctx.Close()); err != nil {
			t.Error(err)
		}
		if l := dev.Live(); len(l) != 0 {
			t.Errorf("left open: %v", l)
		}
		if now, _ := mem.Live(); now != regions {
			t.Errorf("%d mappings left", now-regions)
		}
		pins.Range(func(any, any) bool { t.Error("a slice is still pinned"); return true })
	})
	return pd, dev
}

// panics returns the value that f panics with.
func panics(t *testing.T, f func()) (v any) {
	t.Helper()
	defer func() {
		if v = recover(); v == nil {
			t.Error("no panic")
		}
	}()
	f()
	return nil
}

func TestAllocAndRegister(t *testing.T) {
	pd, _ := newPD(t)
	slice := make([]byte, 100, 200)
	for name, m := range map[string]*MR{
		"Alloc":        must(Alloc(pd, 100, ib.AccessLocalWrite|ib.AccessRemoteWrite)),
		"AllocOptions": must(AllocOptions(pd, 100, ib.AccessLocalWrite|ib.AccessRemoteWrite, Options{Populate: true, NoHuge: true, OnNode: true, Name: "test"})),
		"Register":     must(Register(pd, slice, ib.AccessLocalWrite|ib.AccessRemoteWrite)),
	} {
		if m.Len() != 100 || len(m.Bytes()) != 100 || cap(m.Bytes()) != 100 || m.PD() != pd {
			t.Errorf("%s: %d bytes of %d", name, len(m.Bytes()), cap(m.Bytes()))
		}
		cfg := m.drv.(*drivertest.MR).Config
		if &cfg.Mem[0] != &m.Bytes()[0] || cfg.Access != m.Access() || (cfg.FD < 0) != (name == "Register" || runtime.GOOS != "linux") {
			t.Errorf("%s: the device got %+v", name, cfg)
		}
		if m.Addr() != addrOf(m.Bytes()) || m.LKey() != m.drv.LKey() || m.RKey() != m.drv.RKey() {
			t.Errorf("%s: %#x %d %d", name, m.Addr(), m.LKey(), m.RKey())
		}
		if s := m.SGE(10, 90); s != (ib.SGE{Addr: m.Addr() + 10, Length: 90, LKey: m.LKey()}) {
			t.Errorf("%s: %+v", name, s)
		}
		if k := m.RemoteRange(1, 2); k != (RemoteKey{Addr: m.Addr() + 1, Len: 2, RKey: m.RKey(), Access: ib.AccessRemoteWrite}) {
			t.Errorf("%s: %v", name, k)
		}
		if k := m.Remote(); k.Len != 100 {
			t.Errorf("%s: %v", name, k)
		}
		if err := pd.Close(); !errors.Is(err, verbs.ErrBusy) {
			t.Errorf("PD closed: %v", err)
		}
		for range 2 {
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		}
		if m.Bytes() != nil {
			t.Error("closed region has bytes")
		}
	}
}

func TestZeroBased(t *testing.T) {
	pd, _ := newPD(t)
	m := must(Alloc(pd, 100, ib.AccessRemoteRead|ib.AccessZeroBased))
	defer m.Close()
	if m.Addr() != 0 || m.SGE(5, 1).Addr != 5 || m.RemoteRange(7, 1).Addr != 7 || m.Remote().Access != ib.AccessRemoteRead {
		t.Error(m.Addr(), m.SGE(5, 1), m.RemoteRange(7, 1))
	}
}

func TestRefused(t *testing.T) {
	pd, dev := newPD(t)
	testutil.CheckLeaks(t)
	for _, access := range []ib.Access{ib.AccessRemoteWrite, ib.AccessRemoteAtomic, 1 << 30} {
		if _, err := Alloc(pd, 10, access); err == nil {
			t.Errorf("access %s", access)
		}
		if _, err := Register(pd, make([]byte, 1), access); err == nil {
			t.Errorf("access %s", access)
		}
	}
	for _, n := range []int{0, -1, math.MaxInt} {
		if _, err := Alloc(pd, n, 0); err == nil {
			t.Errorf("%d bytes", n)
		}
	}
	if _, err := Register(pd, nil, 0); err == nil {
		t.Error("nil slice")
	}
	bad := errors.New("too many regions")
	dev.Fail("reg_mr", bad)
	if _, err := Alloc(pd, 10, ib.AccessLocalWrite); !errors.Is(err, bad) || !strings.Contains(err.Error(), "10 bytes, local-write") {
		t.Error(err)
	}
	if _, err := Register(pd, make([]byte, 10), 0); !errors.Is(err, bad) {
		t.Error(err)
	}
	dev.Fail("reg_mr", nil)
	ctx := must(verbs.OpenDriver(drivertest.New("fake1")))
	closed := must(ctx.AllocPD())
	closed.Close()
	ctx.Close()
	if _, err := Alloc(closed, 10, 0); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if _, err := Register(closed, make([]byte, 10), 0); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if _, err := NewPool(closed, PoolConfig{}); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if _, err := NewWindow(closed); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// A region that cannot be closed, because a window is bound to it, keeps its memory.
func TestBusyRegionStaysMapped(t *testing.T) {
	pd, dev := newPD(t)
	m := must(Alloc(pd, 100, 0))
	dev.Fail("close_mr", verbs.ErrBusy)
	if err := m.Close(); !errors.Is(err, verbs.ErrBusy) {
		t.Error(err)
	}
	m.Bytes()[99] = 1
	dev.Fail("close_mr", nil)
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

func TestRangesPanicLikeSlices(t *testing.T) {
	pd, _ := newPD(t)
	m := must(Alloc(pd, 100, 0))
	defer m.Close()
	w := must(NewWindow(pd))
	defer w.Close()
	p := must(NewPool(pd, PoolConfig{}))
	defer p.Close()
	buf := must(p.Get(100))
	defer buf.Release()
	n := buf.Cap()
	for _, f := range []func(off, n int){func(off, n int) { buf.SGE(off, n) }, func(off, n int) { buf.RemoteRange(off, n) }} {
		for _, c := range [][2]int{{0, 0}, {n, 0}, {0, n}, {n - 1, 1}} {
			f(c[0], c[1])
		}
		for _, c := range [][2]int{{-1, 1}, {0, -1}, {0, n + 1}, {n, 1}, {1, n}, {n + 1, 0}, {math.MaxInt, 1}, {1, math.MaxInt}} {
			if _, ok := panics(t, func() { f(c[0], c[1]) }).(runtime.Error); !ok {
				t.Errorf("a buffer's %v: no runtime.Error", c)
			}
		}
	}
	for _, c := range [][2]int{{-1, 1}, {0, -1}, {0, 101}, {101, 0}, {100, 1}, {1, 100}, {math.MaxInt, 1}, {1, math.MaxInt}, {math.MaxInt, math.MaxInt}, {math.MinInt, math.MinInt}} {
		for _, f := range []func(){func() { m.SGE(c[0], c[1]) }, func() { m.RemoteRange(c[0], c[1]) }, func() { w.BindWR(m, c[0], c[1], 0) }} {
			if _, ok := panics(t, f).(runtime.Error); !ok {
				t.Errorf("%v: no runtime.Error", c)
			}
		}
	}
	for _, c := range [][2]int{{0, 0}, {100, 0}, {0, 100}, {99, 1}} {
		m.SGE(c[0], c[1])
		m.RemoteRange(c[0], c[1])
		w.BindWR(m, c[0], c[1], 0)
	}
	k := RemoteKey{Addr: 1000, Len: 100, RKey: 5}
	for _, c := range [][2]uint64{{101, 0}, {0, 101}, {math.MaxUint64, 1}, {1, math.MaxUint64}, {math.MaxUint64, math.MaxUint64}} {
		panics(t, func() { k.Slice(c[0], c[1]) })
		if k.Contains(c[0], c[1]) {
			t.Errorf("contains %v", c)
		}
	}
	if s := k.Slice(10, 90); s != (RemoteKey{Addr: 1010, Len: 90, RKey: 5}) || !k.Contains(10, 90) {
		t.Error(s)
	}
}

// What is registered is not collected, nor does it move, although only the region knows it.
func TestRegisterPins(t *testing.T) {
	pd, _ := newPD(t)
	m := must(Register(pd, bytes.Repeat([]byte{7}, 1000), 0))
	defer m.Close()
	addr := m.Addr()
	for range 3 {
		runtime.GC()
	}
	if addr != addrOf(m.Bytes()) || m.Bytes()[999] != 7 {
		t.Error("moved")
	}
	// Memory that is not Go's own can be registered, too.
	r := must(mem.Alloc(100, mem.Options{}))
	defer r.Close()
	m2 := must(Register(pd, r.Bytes(), 0))
	m2.Close()
}

func TestSGEDoesNotAllocate(t *testing.T) {
	pd, _ := newPD(t)
	m := must(Alloc(pd, 100, 0))
	defer m.Close()
	w := must(NewWindow(pd))
	defer w.Close()
	var s ib.SGE
	var wr ib.SendWR
	b := make([]byte, 0, RemoteKeySize)
	if n := testing.AllocsPerRun(100, func() {
		s = m.SGE(1, 2)
		wr = w.BindWR(m, 1, 2, ib.AccessRemoteRead)
		b, _ = m.Remote().AppendBinary(b[:0])
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	_, _ = s, wr
}

func TestWindow(t *testing.T) {
	pd, _ := newPD(t)
	m := must(Alloc(pd, 1000, ib.AccessLocalWrite|ib.AccessMWBind))
	defer m.Close()
	w := must(NewWindow(pd))
	first := w.RKey()
	if first&0xff != 0xfe {
		t.Fatalf("the test wants a key that wraps: %#x", first)
	}
	keys := map[ib.RKey]bool{}
	for range 256 {
		wr := w.BindWR(m, 100, 50, ib.AccessRemoteWrite)
		b := wr.Bind
		if wr.Opcode != ib.OpBindMW || b.MRLKey != m.LKey() || b.Addr != m.Addr()+100 || b.Length != 50 || b.Access != ib.AccessRemoteWrite || b.Window != w.drv.Handle() {
			t.Fatalf("%+v %+v", wr, b)
		}
		if b.RKey>>8 != first>>8 || b.RKey != w.RKey() {
			t.Fatalf("key %#x is not the window's %#x", b.RKey, first)
		}
		keys[b.RKey] = true
		if r := w.Remote(); r != (RemoteKey{Addr: b.Addr, Len: 50, RKey: b.RKey, Access: ib.AccessRemoteWrite}) {
			t.Fatal(r)
		}
		if inv := w.InvalidateWR(); inv.Opcode != ib.OpLocalInv || inv.InvalidateRKey != b.RKey {
			t.Fatalf("%+v", inv)
		}
	}
	if len(keys) != 256 {
		t.Errorf("%d different keys", len(keys))
	}
	for range 2 {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestWindowUnsupported(t *testing.T) {
	plain, _ := newPD(t, func(d *drivertest.Device) { d.NoOptions = true })
	if _, err := NewWindow(plain); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
}

func TestLeakedRegionStaysPinned(t *testing.T) {
	leaks := make(chan life.Leak, 10)
	defer life.OnLeak(life.OnLeak(func(l life.Leak) { leaks <- l }))
	var addr uint64
	func() {
		pd := must(must(verbs.OpenDriver(drivertest.New("leaky0"))).AllocPD())
		addr = must(Register(pd, make([]byte, 10000), 0)).Addr()
	}()
	testutil.Eventually(t, "region reported", func() bool {
		runtime.GC()
		for {
			select {
			case l := <-leaks:
				if l.Kind == "mr.MR" {
					return true
				}
			default:
				return false
			}
		}
	})
	found := false
	pins.Range(func(k, _ any) bool {
		p := k.(*pin)
		found = found || addrOf(p.b) == addr
		p.unpin() // the fake device does not write
		return true
	})
	if !found {
		t.Error("the array of a leaked region was let go")
	}
}
