package qp

import (
	"errors"
	"net"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ringside-rdma/ringside/internal/driver/drivertest"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func TestActivateRaw(t *testing.T) {
	q, dev := newRig(t).qp(t, ib.RawPacket)
	if err := q.ActivateRaw(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	want := []ib.QPAttrMask{ib.AttrState | ib.AttrPort, ib.AttrState, ib.AttrState}
	if d := cmp.Diff(want, dev.Mods); d != "" {
		t.Error(d)
	}
}

func TestSteer(t *testing.T) {
	r := newRig(t)
	q, _ := r.qp(t, ib.RawPacket)
	f := must(q.Steer(ib.FlowRule{Priority: 3}))
	if got, want := f.drv.(*drivertest.Flow).Rule, (ib.FlowRule{Port: 1, Priority: 3}); got != want || f.QP() != q {
		t.Errorf("%+v, want %+v", got, want)
	}
	if err := q.Close(); !errors.Is(err, verbs.ErrBusy) {
		t.Errorf("close before its rule: %v", err)
	}
	r.dev.Fail("close_flow", syscall.EBUSY)
	if err := f.Close(); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("%v", err)
	}
	r.dev.Fail("close_flow", nil)
	for range 2 {
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	r.dev.Fail("create_flow", syscall.EPERM)
	var oe *verbs.OpError
	if _, err := q.Steer(ib.FlowRule{}); !errors.As(err, &oe) || oe.Op != "create_flow" || !errors.Is(err, syscall.EPERM) {
		t.Errorf("%v", err)
	}
	r.dev.Fail("create_flow", nil)
	if _, err := q.Steer(ib.FlowRule{Kind: 9}); err == nil {
		t.Error("a rule that contradicts itself")
	}
	if err := q.Close(); err != nil { // the rules that were not made are not its children
		t.Fatal(err)
	}
	if _, err := q.Steer(ib.FlowRule{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	rc, _ := r.qp(t, ib.RC)
	if _, err := rc.Steer(ib.FlowRule{}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("RC: %v", err)
	}
}

func TestRawConfig(t *testing.T) {
	r := newRig(t)
	q := must(New(r.pd, &Config{Type: ib.RawPacket, SendCQ: r.cq, Loopback: true}))
	defer q.Close()
	if !q.drv.(*drivertest.QP).Config.Loopback {
		t.Error("no loopback")
	}
	srq := must(NewSRQ(r.pd, SRQConfig{}))
	defer srq.Close()
	if _, err := New(r.pd, &Config{Type: ib.RawPacket, SendCQ: r.cq, SRQ: srq}); err == nil {
		t.Error("with an SRQ")
	}
	if _, err := New(r.pd, &Config{SendCQ: r.cq, Loopback: true}); err == nil {
		t.Error("RC with Loopback")
	}
	bare := newRig(t, func(d *drivertest.Device) { d.NoOptions = true })
	if _, err := New(bare.pd, &Config{Type: ib.RawPacket, SendCQ: bare.cq}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("a device without: %v", err)
	}
}
