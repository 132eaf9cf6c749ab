package verbs_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
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

func openSoft(t testing.TB) *verbs.Context {
	t.Helper()
	c, err := verbs.Open("soft0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// The software NIC is there on every system, and never a silent fallback.
func TestSoftIsAlwaysThere(t *testing.T) {
	devs, err := verbs.Devices()
	if err != nil {
		t.Error(err)
	}
	if !slices.ContainsFunc(devs, func(d verbs.DeviceInfo) bool { return d.Name == "soft0" && d.Tier == verbs.TierSoft }) {
		t.Fatalf("%+v", devs)
	}
	t.Setenv(verbs.EnvDevice, "")
	c, err := verbs.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.Tier() == verbs.TierSoft && len(c.Choice().Passed) == 0 {
		t.Error("nothing better was taken, and nobody says why")
	}
	t.Log(c.Choice())
	t.Setenv(verbs.EnvDevice, "soft")
	c2, err := verbs.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer c2.Close()
	if c2.Name() != "soft0" {
		t.Error(c2.Choice())
	}
}

func TestSoftAttributes(t *testing.T) {
	c := openSoft(t)
	a := must(c.QueryDevice())
	want := ib.CapMW2 | ib.CapSRQ | ib.CapAtomic | ib.CapAtomicGlobal | ib.CapUD | ib.CapUC | ib.CapResizeCQ
	if !a.Caps.Has(want) {
		t.Errorf("lacks %s", want&^a.Caps)
	}
	for name, n := range map[string]int{"Ports": a.Ports, "MaxQP": a.MaxQP, "MaxQPWR": a.MaxQPWR, "MaxSGE": a.MaxSGE, "MaxCQ": a.MaxCQ, "MaxCQE": a.MaxCQE,
		"MaxMR": a.MaxMR, "MaxPD": a.MaxPD, "MaxQPRdAtomic": a.MaxQPRdAtomic, "MaxQPInitRdAtom": a.MaxQPInitRdAtom, "MaxMW": a.MaxMW, "MaxAH": a.MaxAH,
		"MaxSRQ": a.MaxSRQ, "MaxSRQWR": a.MaxSRQWR, "MaxSRQSGE": a.MaxSRQSGE, "MaxInline": a.MaxInline} {
		if n <= 0 {
			t.Errorf("%s is %d", name, n)
		}
	}
	if p := must(c.QueryPort(1)); p.State != ib.PortActive || p.ActiveMTU.Bytes() == 0 || p.MaxMessage == 0 {
		t.Errorf("%+v", p)
	}
	if _, err := c.QueryPort(0); err == nil {
		t.Error("there is a port 0")
	}
	gid := must(c.GID(1, 0))
	if gid.IsZero() {
		t.Error("no GID")
	}
	if path := must(c.CheckReach(t.Context(), gid)); path == "" {
		t.Error("no path to itself")
	}
	if _, err := c.CheckReach(t.Context(), ib.GID{0xfd, 1, 2, 3}); !errors.Is(err, verbs.ErrUnreachable) {
		t.Error(err)
	}
}

// loopback connects two queue pairs of c.
func loopback(t testing.TB, c *verbs.Context, cq *verbs.CQ) (a, b *qp.QP) {
	t.Helper()
	pd := must(c.AllocPD())
	t.Cleanup(func() {
		if err := errors.Join(a.Close(), b.Close(), pd.Close()); err != nil {
			t.Error(err)
		}
	})
	a, b = must(qp.New(pd, &qp.Config{SendCQ: cq})), must(qp.New(pd, &qp.Config{SendCQ: cq}))
	gid := must(c.GID(1, 0))
	if err := errors.Join(a.Init(t.Context(), 1, 0), b.Init(t.Context(), 1, 0)); err != nil {
		t.Fatal(err)
	}
	for _, q := range [][2]*qp.QP{{a, b}, {b, a}} {
		if err := q[0].Connect(t.Context(), qp.ConnectParams{Remote: qp.Endpoint{GID: gid, QPN: q[1].QPN()}}); err != nil {
			t.Fatal(err)
		}
	}
	return a, b
}

func TestSoftCompChannel(t *testing.T) {
	c := openSoft(t)
	ch := must(c.NewCompChannel())
	t.Cleanup(func() { ch.Close() })
	cq := must(c.NewCQ(verbs.CQConfig{Channel: ch}))
	t.Cleanup(func() { cq.Close() })
	a, b := loopback(t, c, cq)
	wcs := make([]ib.WC, 4)
	for i := range 100 {
		if err := cq.Arm(false); err != nil {
			t.Fatal(err)
		}
		if n := must(cq.Poll(wcs)); n != 0 {
			t.Fatalf("%d completions from nowhere", n)
		}
		go func() {
			b.PostRecv([]ib.RecvWR{{}})
			a.PostSend([]ib.SendWR{{Opcode: ib.OpSend}})
		}()
		if got, err := ch.Wait(t.Context()); err != nil || got != cq {
			t.Fatal(i, got, err)
		}
		testutil.Eventually(t, "received", func() bool { return must(cq.Poll(wcs)) == 1 })
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := ch.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

func TestSoftResize(t *testing.T) {
	c := openSoft(t)
	cq := must(c.NewCQ(verbs.CQConfig{Entries: 4}))
	t.Cleanup(func() { cq.Close() })
	a, b := loopback(t, c, cq)
	b.PostRecv(make([]ib.RecvWR, 4))
	if n, err := a.PostSend([]ib.SendWR{{Opcode: ib.OpSend}, {Opcode: ib.OpSend}, {Opcode: ib.OpSend}, {Opcode: ib.OpSend}}); n != 4 {
		t.Fatal(err)
	}
	if err := cq.Resize(100); err != nil || cq.Entries() < 100 {
		t.Fatal(err, cq.Entries())
	}
	if err := cq.Moderate(1, 0); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
	left := 0
	testutil.Eventually(t, "all completions are left", func() bool {
		left += must(cq.Poll(make([]ib.WC, 10)))
		return left == 4
	})
}

// A queue that overruns says so in Poll and by an event.
func TestSoftOverrun(t *testing.T) {
	c := openSoft(t)
	cq := must(c.NewCQ(verbs.CQConfig{Entries: 1}))
	t.Cleanup(func() { cq.Close() })
	a, b := loopback(t, c, cq)
	// One message first: from then on the two know each other, and what is sent arrives at once.
	b.PostRecv([]ib.RecvWR{{}})
	a.PostSend([]ib.SendWR{{Opcode: ib.OpSend}})
	testutil.Eventually(t, "received", func() bool { return must(cq.Poll(make([]ib.WC, 1))) == 1 })
	for range cq.Entries() + 1 {
		b.PostRecv([]ib.RecvWR{{}})
		a.PostSend([]ib.SendWR{{Opcode: ib.OpSend}})
	}
	testutil.Eventually(t, "Poll fails", func() bool {
		_, err := cq.Poll(make([]ib.WC, 1))
		return err != nil
	})
	e, err := c.AsyncEvent(t.Context())
	if err != nil || e.Type != ib.EventCQErr || e.CQ != cq {
		t.Error(e, err)
	}
}

func ExampleOpen() {
	c, err := verbs.Open("soft0") // verbs.Open("") takes the best device
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	fmt.Println(c.Choice())
	port, err := c.QueryPort(1)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("port 1 is", port.State)
	// Output:
	// soft0 (software NIC): named by the caller
	// port 1 is ACTIVE
}

// The thread that waits is woken by a completion, by Interrupt, which is remembered, and by Close.
func TestSoftWaitThread(t *testing.T) {
	c := openSoft(t)
	ch := must(c.NewCompChannel())
	t.Cleanup(func() { ch.Close() })
	if !ch.HasWaitThread() {
		t.Fatal("the software NIC has no WaitThread")
	}
	cq := must(c.NewCQ(verbs.CQConfig{Channel: ch}))
	t.Cleanup(func() { cq.Close() })
	a, b := loopback(t, c, cq)
	wcs := make([]ib.WC, 4)
	for i := range 50 {
		ch.Interrupt()
		if got, err := ch.WaitThread(); got != nil || err != nil {
			t.Fatal(i, got, err)
		}
		if err := cq.Arm(false); err != nil {
			t.Fatal(err)
		}
		go func() {
			b.PostRecv([]ib.RecvWR{{}})
			a.PostSend([]ib.SendWR{{Opcode: ib.OpSend}})
		}()
		var got *verbs.CQ
		for got == nil { // an interrupt of before may come late
			var err error
			if got, err = ch.WaitThread(); err != nil {
				t.Fatal(i, err)
			}
		}
		if got != cq {
			t.Fatal("another queue")
		}
		testutil.Eventually(t, "received", func() bool { return must(cq.Poll(wcs)) == 1 })
	}
	idle := must(c.NewCompChannel())
	ended := make(chan error, 1)
	go func() {
		_, err := idle.WaitThread()
		ended <- err
	}()
	if err := idle.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}
