package qp

import (
	"context"
	"errors"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/driver/drivertest"
	"github.com/ringside-rdma/ringside/internal/life"
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

type rig struct {
	dev *drivertest.Device
	ctx *verbs.Context
	pd  *verbs.PD
	cq  *verbs.CQ
}

func newRig(t *testing.T, options ...func(*drivertest.Device)) *rig {
	t.Helper()
	r := &rig{dev: drivertest.New("fake0")}
	for _, o := range options {
		o(r.dev)
	}
	r.ctx = must(verbs.OpenDriver(r.dev))
	r.pd = must(r.ctx.AllocPD())
	r.cq = must(r.ctx.NewCQ(verbs.CQConfig{}))
	t.Cleanup(func() {
		for _, f := range []func() error{r.cq.Close, r.pd.Close, r.ctx.Close} {
			if err := f(); err != nil {
				t.Error(err)
			}
		}
		if l := r.dev.Live(); len(l) != 0 {
			t.Errorf("left open: %v", l)
		}
	})
	return r
}

func (r *rig) qp(t *testing.T, typ ib.QPType) (*QP, *drivertest.QP) {
	t.Helper()
	q := must(New(r.pd, &Config{Type: typ, SendCQ: r.cq}))
	t.Cleanup(func() { q.Close() })
	return q, q.drv.(*drivertest.QP)
}

func TestConfigDefaults(t *testing.T) {
	r := newRig(t)
	q := must(New(r.pd, &Config{SendCQ: r.cq}))
	defer q.Close()
	if q.Type() != ib.RC || q.RecvCQ() != r.cq || q.SendCQ() != r.cq || q.SRQ() != nil || q.PD() != r.pd || q.State() != ib.Reset {
		t.Error(q.Type(), q.State())
	}
	// The device of the tests has only 32 bytes of inline data.
	if d := cmp.Diff(ib.QPCap{MaxSendWR: 128, MaxRecvWR: 128, MaxSendSGE: 4, MaxRecvSGE: 1, MaxInline: 32}, q.Cap()); d != "" {
		t.Error(d)
	}
	srq := must(NewSRQ(r.pd, SRQConfig{}))
	defer srq.Close()
	q2 := must(New(r.pd, &Config{SendCQ: r.cq, SRQ: srq, SignalAll: true, MaxInline: 8}))
	defer q2.Close()
	if d := cmp.Diff(ib.QPCap{MaxSendWR: 128, MaxSendSGE: 4, MaxInline: 8}, q2.Cap()); d != "" {
		t.Error(d)
	}
	if c := q2.drv.(*drivertest.QP).Config; !c.SignalAll || c.SRQ != srq.drv || q2.SRQ() != srq {
		t.Errorf("%+v", c)
	}
}

func TestConfigRefused(t *testing.T) {
	r, other := newRig(t), newRig(t)
	plain := newRig(t, func(d *drivertest.Device) { d.NoOptions = true })
	srq := must(NewSRQ(r.pd, SRQConfig{}))
	defer srq.Close()
	for _, c := range []struct {
		r    *rig
		cfg  *Config
		want string
	}{
		{r, nil, "needs a SendCQ"},
		{r, &Config{}, "needs a SendCQ"},
		{r, &Config{SendCQ: other.cq}, "one context"},
		{r, &Config{SendCQ: r.cq, RecvCQ: other.cq}, "one context"},
		{other, &Config{SendCQ: other.cq, SRQ: srq}, "one context"},
		{r, &Config{SendCQ: r.cq, Type: 9}, "QPType(9)"},
		{r, &Config{SendCQ: r.cq, SendDepth: 1001}, "SendDepth 1001 exceeds the device's limit of 1000"},
		{r, &Config{SendCQ: r.cq, RecvDepth: 1001}, "RecvDepth 1001 exceeds"},
		{r, &Config{SendCQ: r.cq, SendSGE: 9}, "SendSGE 9 exceeds"},
		{r, &Config{SendCQ: r.cq, RecvSGE: 9}, "RecvSGE 9 exceeds"},
		{r, &Config{SendCQ: r.cq, MaxInline: 33}, "MaxInline 33 exceeds"},
		{r, &Config{SendCQ: r.cq, SendDepth: -1}, "invalid SendDepth"},
		{r, &Config{SendCQ: r.cq, SRQ: srq, RecvDepth: 1}, "must be zero with an SRQ"},
		{plain, &Config{SendCQ: plain.cq, Type: ib.UD}, "UD queue pairs: unsupported"},
		{plain, &Config{SendCQ: plain.cq, Type: ib.UC}, "UC queue pairs: unsupported"},
	} {
		q, err := New(c.r.pd, c.cfg)
		if err == nil {
			q.Close()
		}
		var oe *verbs.OpError
		if err == nil || !strings.Contains(err.Error(), c.want) || !errors.As(err, &oe) || oe.Device != "fake0" {
			t.Errorf("%+v: %v, want %q", c.cfg, err, c.want)
		}
	}
	bad := errors.New("bad")
	r.dev.Fail("create_qp", bad)
	if _, err := New(r.pd, &Config{SendCQ: r.cq}); !errors.Is(err, bad) {
		t.Error(err)
	}
}

func TestCloseOrder(t *testing.T) {
	r := newRig(t)
	srq := must(NewSRQ(r.pd, SRQConfig{}))
	q := must(New(r.pd, &Config{SendCQ: r.cq, SRQ: srq}))
	for what, f := range map[string]func() error{"SRQ": srq.Close, "CQ": r.cq.Close, "PD": r.pd.Close} {
		if err := f(); !errors.Is(err, verbs.ErrBusy) {
			t.Errorf("Close of %s: %v", what, err)
		}
	}
	if err := srq.SetLimit(7); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := errors.Join(q.Close(), srq.Close()); err != nil {
			t.Error(err)
		}
	}
	ctx := t.Context()
	for name, f := range map[string]func() error{
		"PostSend":     func() error { _, err := q.PostSend(make([]ib.SendWR, 1)); return err },
		"PostRecv":     func() error { _, err := q.PostRecv(make([]ib.RecvWR, 1)); return err },
		"SRQ.PostRecv": func() error { _, err := srq.PostRecv(make([]ib.RecvWR, 1)); return err },
		"SetLimit":     func() error { return srq.SetLimit(1) },
		"Modify":       func() error { return q.Init(ctx, 1, 0) },
		"Query":        func() error { _, err := q.Query(); return err },
		"Connect":      func() error { return q.Connect(ctx, ConnectParams{}) },
		"New":          func() error { _, err := New(r.pd, &Config{SendCQ: r.cq, SRQ: srq}); return err },
	} {
		if err := f(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
	if q.State() != ib.Err || q.Path() != "" || srq.Limit() != 0 {
		t.Error(q.State(), q.Path(), srq.Limit())
	}
}

func TestPostIsThin(t *testing.T) {
	r := newRig(t)
	q, _ := r.qp(t, ib.RC)
	wrs, rwrs := make([]ib.SendWR, 100), make([]ib.RecvWR, 100)
	if n, err := q.PostSend(wrs); n != 100 || err != nil {
		t.Error(n, err)
	}
	if n, err := q.PostSend(wrs); n != 28 || !errors.Is(err, verbs.ErrQueueFull) {
		t.Error(n, err)
	}
	if n, err := q.PostRecv(rwrs); n != 100 || err != nil {
		t.Error(n, err)
	}
	srq := must(NewSRQ(r.pd, SRQConfig{Depth: 100}))
	defer srq.Close()
	if n, err := srq.PostRecv(rwrs); n != 100 || err != nil {
		t.Error(n, err)
	}
	if n := testing.AllocsPerRun(100, func() {
		q.PostSend(wrs)
		q.PostRecv(rwrs)
		srq.PostRecv(rwrs)
	}); n != 0 {
		t.Errorf("posting allocates %v times", n)
	}
	q.Close()
	if n := testing.AllocsPerRun(100, func() { q.PostSend(wrs); q.PostRecv(rwrs) }); n != 0 {
		t.Errorf("posting on a closed queue pair allocates %v times", n)
	}
}

func TestSRQ(t *testing.T) {
	r := newRig(t)
	for _, c := range []SRQConfig{{Depth: -1}, {Depth: 2001}, {SGE: -1}, {SGE: 5}} {
		if _, err := NewSRQ(r.pd, c); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
	s := must(NewSRQ(r.pd, SRQConfig{}))
	defer s.Close()
	if s.Depth() != 1024 || s.SGE() != 1 {
		t.Error(s.Depth(), s.SGE())
	}
	if err := s.SetLimit(10); err != nil || s.Limit() != 10 {
		t.Error(err, s.Limit())
	}
	for _, n := range []int{-1, 1025} {
		if err := s.SetLimit(n); err == nil {
			t.Errorf("limit %d", n)
		}
	}
	r.ctx.Driver().(*drivertest.Context).Events <- driver.AsyncEvent{Type: ib.EventSRQLimit, SRQ: s.drv}
	if e := must(r.ctx.AsyncEvent(t.Context())); e.Object != s {
		t.Error(e)
	}
	plain := newRig(t, func(d *drivertest.Device) { d.NoOptions = true })
	if _, err := NewSRQ(plain.pd, SRQConfig{}); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
}

func TestConnect(t *testing.T) {
	r := newRig(t)
	q, d := r.qp(t, ib.RC)
	ctx := t.Context()
	if err := q.Connect(ctx, ConnectParams{}); !errors.Is(err, verbs.ErrState) {
		t.Errorf("connected from Reset: %v", err)
	}
	if err := q.Init(ctx, 1, ib.AccessRemoteRead); err != nil {
		t.Fatal(err)
	}
	if err := q.Connect(ctx, ConnectParams{
		Remote: Endpoint{GID: ib.GID{15: 1}, QPN: 77, PSN: 88}, LocalPSN: 99, AckTimeout: time.Second, RetryCount: -1, RNRRetry: 3,
		MaxRdAtomic: 2, MaxDestRdAtomic: 200,
	}); err != nil {
		t.Fatal(err)
	}
	want := []ib.QPAttrMask{ib.AttrState | initRC, ib.AttrState | rtrRC, ib.AttrState | rtsRC}
	if diff := cmp.Diff(want, d.Mods); diff != "" {
		t.Error(diff)
	}
	a := must(q.Query())
	if a.State != ib.RTS || a.SQPSN != 99 || a.AckTimeout.Duration() < time.Second || a.RetryCount != 0 || a.RNRRetry != 3 || a.MaxRdAtomic != 2 {
		t.Errorf("%+v", a)
	}
	if q.Path() != "fake" {
		t.Error(q.Path())
	}
	if err := q.Fail(ctx); err != nil || q.State() != ib.Err {
		t.Error(err, q.State())
	}
	if err := q.Reset(ctx); err != nil || q.State() != ib.Reset {
		t.Error(err, q.State())
	}

	uc, d := r.qp(t, ib.UC)
	if err := errors.Join(uc.Init(ctx, 1, 0), uc.Connect(ctx, ConnectParams{Remote: Endpoint{QPN: 1}})); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]ib.QPAttrMask{ib.AttrState | initRC, ib.AttrState | rtrUC, ib.AttrState | ib.AttrSQPSN}, d.Mods); diff != "" {
		t.Error(diff)
	}
	ud, d := r.qp(t, ib.UD)
	if err := ud.ActivateUD(ctx, 1, 0x1234, 5); err != nil || ud.State() != ib.RTS {
		t.Error(err)
	}
	if diff := cmp.Diff([]ib.QPAttrMask{ib.AttrState | initUD, ib.AttrState, ib.AttrState | ib.AttrSQPSN}, d.Mods); diff != "" {
		t.Error(diff)
	}
}

func TestConnectDefaults(t *testing.T) {
	r := newRig(t)
	q, d := r.qp(t, ib.RC)
	if err := q.Init(t.Context(), 1, 0); err != nil {
		t.Fatal(err)
	}
	// Stop at RTR, to see its attributes.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := q.Connect(ctx, ConnectParams{Remote: Endpoint{QPN: 77}}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	a := must(d.Query())
	if a.PathMTU != ib.MTU1024 || a.AH.HopLimit != 64 || a.MaxDestRdAtomic != 8 || a.MinRNRTimer.Duration() < 120*time.Microsecond {
		t.Errorf("%+v", a)
	}
	q2, d2 := r.qp(t, ib.RC)
	if err := errors.Join(q2.Init(t.Context(), 1, 0), q2.Connect(t.Context(), ConnectParams{})); err != nil {
		t.Fatal(err)
	}
	a = must(d2.Query())
	if a.RetryCount != 7 || a.RNRRetry != 7 || a.MaxRdAtomic != 4 || a.AckTimeout.Duration() < 67*time.Millisecond {
		t.Errorf("%+v", a)
	}
}

func TestRandomPSN(t *testing.T) {
	seen := map[ib.PSN]bool{}
	for range 100 {
		p := RandomPSN()
		if p > ib.MaxPSN {
			t.Fatal(p)
		}
		seen[p] = true
	}
	if len(seen) < 90 {
		t.Errorf("only %d different PSNs of 100", len(seen))
	}
}

func TestAsyncEventNamesQP(t *testing.T) {
	r := newRig(t)
	q, d := r.qp(t, ib.RC)
	r.ctx.Driver().(*drivertest.Context).Events <- driver.AsyncEvent{Type: ib.EventQPAccessErr, QP: d}
	if e := must(r.ctx.AsyncEvent(t.Context())); e.Object != q || e.QPN != q.QPN() {
		t.Error(e)
	}
}

func TestLeakIsReported(t *testing.T) {
	leaks := make(chan life.Leak, 10)
	defer life.OnLeak(life.OnLeak(func(l life.Leak) { leaks <- l }))
	func() {
		// Everything is dropped: a child keeps its parents.
		ctx := must(verbs.OpenDriver(drivertest.New("leaky0")))
		must(New(must(ctx.AllocPD()), &Config{SendCQ: must(ctx.NewCQ(verbs.CQConfig{}))}))
	}()
	testutil.Eventually(t, "queue pair reported", func() bool {
		runtime.GC()
		for {
			select {
			case l := <-leaks:
				if l.Kind == "qp.QP" {
					return true
				}
			default:
				return false
			}
		}
	})
}
