package mr_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// must returns v, or ends the test.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// loop is a pair of RC queue pairs of one PD on the software NIC, connected to each other: a is the initiator.
type loop struct {
	pd   *verbs.PD
	cq   *verbs.CQ
	a, b *qp.QP
}

func newLoop(t testing.TB) *loop {
	t.Helper()
	dev, err := verbs.Open("soft0")
	if err != nil {
		t.Fatal(err)
	}
	l := &loop{pd: must(dev.AllocPD()), cq: must(dev.NewCQ(verbs.CQConfig{}))}
	l.a, l.b = must(qp.New(l.pd, &qp.Config{SendCQ: l.cq})), must(qp.New(l.pd, &qp.Config{SendCQ: l.cq}))
	t.Cleanup(func() {
		for _, f := range []func() error{l.a.Close, l.b.Close, l.cq.Close, l.pd.Close, dev.Close} {
			if err := f(); err != nil {
				t.Error(err)
			}
		}
	})
	l.connect(t)
	return l
}

func (l *loop) connect(t testing.TB) {
	t.Helper()
	gid := must(l.pd.Context().GID(1, 0))
	for _, q := range []*qp.QP{l.a, l.b} {
		if err := errors.Join(q.Reset(t.Context()), q.Init(t.Context(), 1, ib.AccessRemote)); err != nil {
			t.Fatal(err)
		}
	}
	for _, q := range [][2]*qp.QP{{l.a, l.b}, {l.b, l.a}} {
		if err := q[0].Connect(t.Context(), qp.ConnectParams{Remote: qp.Endpoint{GID: gid, QPN: q[1].QPN()}}); err != nil {
			t.Fatal(err)
		}
	}
}

// reconnect mends what an access error has broken: both sides go to the error state (IBA 9.9.3).
func (l *loop) reconnect(t testing.TB) {
	t.Helper()
	testutil.Eventually(t, "both sides are in ERR", func() bool { return l.a.State() == ib.Err && l.b.State() == ib.Err })
	l.connect(t)
}

// do posts one request and returns how it ended.
func (l *loop) do(t testing.TB, wr ib.SendWR) error {
	t.Helper()
	wr.Flags |= ib.SendSignaled
	if n, err := l.a.PostSend([]ib.SendWR{wr}); n != 1 {
		t.Fatal(err)
	}
	return l.done(t)
}

func (l *loop) done(t testing.TB) error {
	t.Helper()
	wcs := make([]ib.WC, 1)
	testutil.Eventually(t, "completed", func() bool {
		n, err := l.cq.Poll(wcs)
		if err != nil {
			t.Fatal(err)
		}
		l.cq.Context().Progress()
		return n == 1
	})
	return verbs.CheckWC("request", &wcs[0])
}

// Allocated and registered memory are alike as source and as target.
func TestSoftRegions(t *testing.T) {
	l := newLoop(t)
	const access = ib.AccessLocalWrite | ib.AccessRemoteRead | ib.AccessRemoteWrite
	slice := make([]byte, 10000)
	for name, m := range map[string]*mr.MR{
		"Alloc":      must(mr.Alloc(l.pd, 10000, access)),
		"Register":   must(mr.Register(l.pd, slice, access)),
		"zero-based": must(mr.Alloc(l.pd, 10000, access|ib.AccessZeroBased)),
	} {
		t.Run(name, func(t *testing.T) {
			local := must(mr.Register(l.pd, bytes.Repeat([]byte("0123456789"), 1000), ib.AccessLocalWrite))
			key := m.RemoteRange(100, 9000)
			if err := l.do(t, ib.SendWR{Opcode: ib.OpRDMAWrite, SGEs: []ib.SGE{local.SGE(0, 9000)}, RemoteAddr: key.Addr, RKey: key.RKey}); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(m.Bytes()[100:9100], local.Bytes()[:9000]) || m.Bytes()[99] != 0 || m.Bytes()[9100] != 0 {
				t.Error("the write went astray")
			}
			clear(local.Bytes())
			if err := l.do(t, ib.SendWR{Opcode: ib.OpRDMARead, SGEs: []ib.SGE{local.SGE(5, 10)}, RemoteAddr: m.Remote().Slice(101, 10).Addr, RKey: m.RKey()}); err != nil {
				t.Fatal(err)
			}
			if s := string(local.Bytes()[5:15]); s != "1234567890" {
				t.Errorf("read %q", s)
			}
			if err := errors.Join(local.Close(), m.Close()); err != nil {
				t.Error(err)
			}
			// A closed region is out of reach.
			local = must(mr.Alloc(l.pd, 10, ib.AccessLocalWrite))
			defer local.Close()
			if err := l.do(t, ib.SendWR{Opcode: ib.OpRDMARead, SGEs: []ib.SGE{local.SGE(0, 10)}, RemoteAddr: key.Addr, RKey: key.RKey}); !errors.Is(err, ib.WCRemoteAccessErr) {
				t.Errorf("read from a closed region: %v", err)
			}
			l.reconnect(t)
		})
	}
}

func TestSoftWindow(t *testing.T) {
	l := newLoop(t)
	m := must(mr.Alloc(l.pd, 1000, ib.AccessLocalWrite|ib.AccessMWBind))
	local := must(mr.Alloc(l.pd, 100, ib.AccessLocalWrite))
	defer local.Close()
	w, err := mr.NewWindow(l.pd)
	if err != nil {
		testutil.SkipIfUnsupported(t, err)
		t.Fatal(err)
	}
	bind := func(access ib.Access) error {
		t.Helper()
		wr := w.BindWR(m, 100, 50, access)
		wr.Flags = ib.SendSignaled
		if n, err := l.b.PostSend([]ib.SendWR{wr}); n != 1 { // the target binds
			t.Fatal(err)
		}
		return l.done(t)
	}
	read := func(off uint64, n int) error {
		t.Helper()
		key := w.Remote()
		return l.do(t, ib.SendWR{Opcode: ib.OpRDMARead, SGEs: []ib.SGE{local.SGE(0, n)}, RemoteAddr: key.Addr + off, RKey: key.RKey})
	}
	copy(m.Bytes()[100:], "window")
	if err := bind(ib.AccessRemoteRead); err != nil {
		t.Fatal(err)
	}
	if err := read(0, 6); err != nil || string(local.Bytes()[:6]) != "window" {
		t.Errorf("%q, %v", local.Bytes()[:6], err)
	}
	if err := m.Close(); !errors.Is(err, verbs.ErrBusy) {
		t.Errorf("closed under a bound window: %v", err)
	}
	if err := read(45, 6); !errors.Is(err, ib.WCRemoteAccessErr) {
		t.Errorf("read past the window: %v", err)
	}
	l.reconnect(t)
	inv := w.InvalidateWR()
	inv.Flags = ib.SendSignaled
	if n, err := l.b.PostSend([]ib.SendWR{inv}); n != 1 {
		t.Fatal(err)
	}
	if err := l.done(t); err != nil {
		t.Fatal(err)
	}
	if err := read(0, 6); !errors.Is(err, ib.WCRemoteAccessErr) {
		t.Errorf("read through an invalidated window: %v", err)
	}
	l.reconnect(t)
	old := w.Remote()
	if err := bind(ib.AccessRemoteRead); err != nil {
		t.Fatal(err)
	}
	if old.RKey == w.RKey() {
		t.Error("the window has its old key again")
	}
	if err := read(0, 6); err != nil {
		t.Error(err)
	}
	if err := errors.Join(w.Close(), m.Close()); err != nil {
		t.Error(err)
	}
}

// A buffer goes round: from the pool through a send and a receive, and back.
func TestSoftPool(t *testing.T) {
	l := newLoop(t)
	p := must(mr.NewPool(l.pd, mr.PoolConfig{Poison: true}))
	for i := range 200 {
		out, in := must(p.Get(1+i*50)), must(p.Get(16<<10))
		for j := range out.Bytes() {
			out.Bytes()[j] = byte(i + j)
		}
		if _, err := l.b.PostRecv([]ib.RecvWR{{SGEs: []ib.SGE{in.SGE(0, in.Cap())}}}); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(l.do(t, ib.SendWR{Opcode: ib.OpSend, SGEs: []ib.SGE{out.SGE(0, out.Len())}}), l.done(t)); err != nil {
			t.Fatal(err)
		}
		in.SetLen(out.Len())
		if !bytes.Equal(in.Bytes(), out.Bytes()) {
			t.Fatalf("message %d arrived changed", i)
		}
		in.Release()
		out.Release()
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// A pool's buffers are registered once; getting and releasing one makes no system call.
func ExamplePool() {
	dev, err := verbs.Open("soft0")
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Close()
	pd := must(dev.AllocPD())
	defer pd.Close()
	pool := must(mr.NewPool(pd, mr.PoolConfig{Limit: 64 << 20}))
	defer pool.Close()

	b, err := pool.GetContext(context.Background(), 1000)
	if err != nil {
		log.Fatal(err)
	}
	n := copy(b.Bytes(), "a message")
	wr := ib.SendWR{Opcode: ib.OpSend, SGEs: []ib.SGE{b.SGE(0, n)}}
	// ... PostSend(wr), and when its completion was polled:
	b.Release()
	fmt.Println(wr.PayloadLen(), "bytes from a buffer of", b.Cap())
	// Output: 9 bytes from a buffer of 1024
}
