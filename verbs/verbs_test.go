package verbs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/driver/drivertest"
	"github.com/ringside-rdma/ringside/internal/life"
	"github.com/ringside-rdma/ringside/internal/provider"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func TestMain(m *testing.M) { testutil.Main(m) }

func device(name, prov string, tier Tier) *drivertest.Device {
	d := drivertest.New(name)
	d.DeviceInfo.Provider, d.DeviceInfo.Tier = prov, driver.Tier(tier)
	return d
}

func entry(tier Tier, name string, err error, devs ...*drivertest.Device) provider.Entry {
	return provider.Entry{Tier: driver.Tier(tier), Provider: &drivertest.Provider{ProviderName: name, Devs: devs, Err: err}}
}

func TestOpenChoosesBestThatWorks(t *testing.T) {
	down := device("mlx5_0", "mlx5", TierHardware)
	down.PortState = ib.PortDown
	broken := device("mlx5_1", "mlx5", TierHardware)
	broken.OpenErr = syscall.EACCES
	table := []provider.Entry{
		entry(TierHardware, "mlx5", nil, down, broken),
		entry(TierHardware, "irdma", nil),
		entry(TierHardware, "efa", fmt.Errorf("%w: its module is not loaded", driver.ErrAbsent)),
		entry(TierKernelSoft, "rxe", errors.New("netlink is not allowed")),
		entry(TierSoft, "soft", nil, device("soft0", "soft", TierSoft), device("soft1", "soft", TierSoft)),
	}
	c, err := open(table, "", "")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	want := Choice{
		Device: DeviceInfo{Name: "soft0", Provider: "soft", Tier: TierSoft, GUID: 0x42},
		Reason: "the best device that works",
		Passed: []Passed{
			{Tier: TierHardware, Provider: "mlx5", Device: "mlx5_0", Reason: "no port is active: port 1 is DOWN"},
			{Tier: TierHardware, Provider: "mlx5", Device: "mlx5_1", Reason: "verbs: open_device on mlx5_1: permission denied"},
			{Tier: TierHardware, Provider: "irdma", Reason: "no device is present"},
			{Tier: TierHardware, Provider: "efa", Reason: "no device is present: its module is not loaded"},
			{Tier: TierKernelSoft, Provider: "rxe", Reason: "netlink is not allowed"},
		},
	}
	if d := cmp.Diff(want, c.Choice()); d != "" {
		t.Error(d)
	}
	if len(down.Live()) != 0 {
		t.Errorf("the device that was passed over is still open: %v", down.Live())
	}
	wantText := "soft0 (software NIC): the best device that works; not mlx5_0 (hardware): no port is active: port 1 is DOWN; " +
		"not mlx5_1 (hardware): verbs: open_device on mlx5_1: permission denied; not provider irdma (hardware): no device is present; " +
		"not provider efa (hardware): no device is present: its module is not loaded; not provider rxe (kernel software): netlink is not allowed"
	if got := c.Choice().String(); got != wantText {
		t.Errorf("got %s", got)
	}
	j, err := json.Marshal(c.Choice())
	if err != nil || !strings.Contains(string(j), `"tier":"software NIC"`) || !strings.Contains(string(j), `"device":"mlx5_0"`) {
		t.Errorf("%s, %v", j, err)
	}
	if c.Name() != "soft0" || c.Provider() != "soft" || c.Tier() != TierSoft {
		t.Error(c.Name(), c.Provider(), c.Tier())
	}
}

func TestOpenTakesHardwareFirst(t *testing.T) {
	table := []provider.Entry{ // the order of the table does not matter across tiers
		entry(TierSoft, "soft", nil, device("soft0", "soft", TierSoft)),
		entry(TierHardware, "mlx5", nil, device("mlx5_0", "mlx5", TierHardware)),
	}
	c, err := open(table, "", "")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.Name() != "mlx5_0" || len(c.Choice().Passed) != 0 {
		t.Error(c.Choice())
	}
}

func TestOpenTierWithoutProvider(t *testing.T) {
	c, err := open([]provider.Entry{entry(TierSoft, "soft", nil, device("soft0", "soft", TierSoft))}, "", "")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	want := []Passed{
		{Tier: TierHardware, Reason: "this build has no provider for such devices"},
		{Tier: TierKernelSoft, Reason: "this build has no provider for such devices"},
	}
	if d := cmp.Diff(want, c.Choice().Passed); d != "" {
		t.Error(d)
	}
}

func TestOpenByName(t *testing.T) {
	table := []provider.Entry{
		entry(TierHardware, "mlx5", errors.New("sysfs is not mounted"), device("mlx5_0", "mlx5", TierHardware)),
		entry(TierSoft, "soft", nil, device("soft0", "soft", TierSoft), device("soft1", "soft", TierSoft)),
	}
	for _, c := range []struct{ name, env, want, reason string }{
		{"soft1", "", "soft1", "named by the caller"},
		{"soft1", "mlx5_0", "soft1", "named by the caller"}, // the program knows better
		{"", "soft1", "soft1", "RINGSIDE_DEVICE=soft1"},
		{"", "soft", "soft0", "RINGSIDE_DEVICE=soft, first device of that provider"},
	} {
		x, err := open(table, c.name, c.env)
		if err != nil {
			t.Error(err)
			continue
		}
		if x.Name() != c.want || x.Choice().Reason != c.reason || x.Choice().Passed != nil {
			t.Errorf("%+v: %s", c, x.Choice())
		}
		x.Close()
	}
	_, err := open(table, "", "rxe0")
	if !errors.Is(err, ErrNoDevice) || !strings.Contains(err.Error(), "RINGSIDE_DEVICE=rxe0; there are mlx5_0, soft0, soft1") ||
		!strings.Contains(err.Error(), "sysfs is not mounted") {
		t.Error(err)
	}
	if _, err := open(nil, "", ""); !errors.Is(err, ErrNoDevice) {
		t.Error(err)
	}
	rxe := device("rxe0", "rxe", TierKernelSoft)
	rxe.DeviceInfo.NetDevs, rxe.DeviceInfo.CharDevs = []string{"eth0"}, []string{"/dev/infiniband/uverbs0"}
	devs, err := devices(append(table, entry(TierKernelSoft, "rxe", nil, rxe), entry(TierKernelSoft, "siw", driver.ErrAbsent)))
	if len(devs) != 4 || err == nil || !strings.Contains(err.Error(), "provider mlx5: sysfs is not mounted") ||
		strings.Contains(err.Error(), "siw") {
		t.Error(devs, err)
	}
	want := DeviceInfo{Name: "rxe0", Provider: "rxe", Tier: TierKernelSoft, GUID: 0x42, NetDevs: []string{"eth0"},
		CharDevs: []string{"/dev/infiniband/uverbs0"}}
	if d := cmp.Diff(want, devs[1]); d != "" {
		t.Error(d)
	}
}

func fake(t *testing.T) (*Context, *drivertest.Device) {
	t.Helper()
	d := drivertest.New("fake0")
	c, err := OpenDriver(d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if l := d.Live(); len(l) != 0 {
			t.Errorf("left open: %v", l)
		}
	})
	return c, d
}

// must returns v, or ends the test.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestClose(t *testing.T) {
	c, dev := fake(t)
	pd := must(c.AllocPD())
	ah := must(pd.NewAH(ib.AHAttr{}))
	ch := must(c.NewCompChannel())
	cq := must(c.NewCQ(CQConfig{Channel: ch}))
	busy := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, ErrBusy) {
			t.Errorf("Close of %s with children: %v", what, err)
		}
	}
	busy("context", c.Close())
	busy("pd", pd.Close())
	busy("channel", ch.Close())
	bad := errors.New("bad")
	dev.Fail("close_cq", bad)
	if err := cq.Close(); !errors.Is(err, bad) {
		t.Error(err)
	}
	if _, err := cq.Poll(nil); err != nil {
		t.Errorf("a CQ that could not be closed works no more: %v", err)
	}
	dev.Fail("close_cq", nil)
	for range 2 { // idempotent
		for _, f := range []func() error{ah.Close, cq.Close, ch.Close, pd.Close, c.Close} {
			if err := f(); err != nil {
				t.Error(err)
			}
		}
	}
	ctx := t.Context()
	for name, f := range map[string]func() error{
		"Poll":            func() error { _, err := cq.Poll(make([]ib.WC, 1)); return err },
		"Arm":             func() error { return cq.Arm(false) },
		"Resize":          func() error { return cq.Resize(10) },
		"Moderate":        func() error { return cq.Moderate(1, 0) },
		"Wait":            func() error { _, err := ch.Wait(ctx); return err },
		"NewAH":           func() error { _, err := pd.NewAH(ib.AHAttr{}); return err },
		"AllocPD":         func() error { _, err := c.AllocPD(); return err },
		"NewCQ":           func() error { _, err := c.NewCQ(CQConfig{}); return err },
		"NewCompChannel":  func() error { _, err := c.NewCompChannel(); return err },
		"AsyncEvent":      func() error { _, err := c.AsyncEvent(ctx); return err },
		"QueryPort":       func() error { _, err := c.QueryPort(1); return err },
		"GIDs":            func() error { _, err := c.GIDs(1); return err },
		"CQ with channel": func() error { _, err := c.NewCQ(CQConfig{Channel: ch}); return err },
	} {
		if err := f(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}

func TestFailedCreationLeavesNothing(t *testing.T) {
	c, dev := fake(t)
	pd := must(c.AllocPD())
	bad := errors.New("bad")
	for call, f := range map[string]func() error{
		"alloc_pd":       func() error { _, err := c.AllocPD(); return err },
		"create_cq":      func() error { _, err := c.NewCQ(CQConfig{}); return err },
		"create_channel": func() error { _, err := c.NewCompChannel(); return err },
		"create_ah":      func() error { _, err := pd.NewAH(ib.AHAttr{}); return err },
	} {
		dev.Fail(call, bad)
		err := f()
		var oe *OpError
		if !errors.Is(err, bad) || !errors.As(err, &oe) || oe.Device != "fake0" {
			t.Errorf("%s: %v", call, err)
		}
	}
	if err := pd.Close(); err != nil { // the failed AH is no child
		t.Error(err)
	}
}

func TestQueries(t *testing.T) {
	c, dev := fake(t)
	a := must(c.QueryDevice())
	dev.Fail("query_device", errors.New("asked again"))
	if b := must(c.QueryDevice()); a != b {
		t.Error("attributes changed")
	}
	if p := must(c.QueryPort(1)); p.State != ib.PortActive {
		t.Error(p)
	}
	if _, err := c.QueryPort(2); err == nil {
		t.Error("port 2 exists")
	}
	if g := must(c.GID(1, 2)); g != (ib.GID{15: 2}) {
		t.Error(g)
	}
	if _, err := c.GID(1, 1); err == nil || !strings.Contains(err.Error(), "no GID at index 1") {
		t.Error(err)
	}
	if p := must(c.CheckReach(t.Context(), ib.GID{15: 1})); p != "fake" {
		t.Error(p)
	}
	if _, err := c.CheckReach(t.Context(), ib.GID{}); !errors.Is(err, ErrUnreachable) {
		t.Error(err)
	}
	if c.Progress() {
		t.Error("progress")
	}
	c.Driver().(*drivertest.Context).Busy.Store(true)
	if !c.Progress() {
		t.Error("no progress")
	}
}

func TestDeviceWithoutOptions(t *testing.T) {
	d := drivertest.New("plain0")
	d.NoOptions = true
	c := must(OpenDriver(d))
	defer c.Close()
	cq := must(c.NewCQ(CQConfig{}))
	defer cq.Close()
	if err := cq.Resize(10); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
	if err := cq.Moderate(1, 0); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
	if _, err := c.CheckReach(t.Context(), ib.GID{}); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
	if c.Progress() {
		t.Error("progress")
	}
}

func TestCQ(t *testing.T) {
	c, _ := fake(t)
	for _, n := range []int{-1, 10001} {
		if _, err := c.NewCQ(CQConfig{Entries: n}); err == nil {
			t.Errorf("%d entries", n)
		}
	}
	cq := must(c.NewCQ(CQConfig{}))
	defer cq.Close()
	if cq.Entries() < 256 || cq.Context() != c || cq.Channel() != nil {
		t.Error(cq.Entries())
	}
	if err := cq.Resize(500); err != nil || cq.Entries() < 500 {
		t.Error(err, cq.Entries())
	}
	if err := cq.Resize(0); err == nil {
		t.Error("resized to nothing")
	}
	for _, m := range []struct {
		count  int
		period time.Duration
		ok     bool
	}{{10, 20 * time.Microsecond, true}, {0, 0, true}, {-1, 0, false}, {0, -1, false}, {101, 0, false}, {0, 101 * time.Microsecond, false}, {100, 100 * time.Microsecond, true}} {
		if err := cq.Moderate(m.count, m.period); (err == nil) != m.ok || errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("moderation %+v: %v", m, err)
		}
	}
	d := cq.Driver().(*drivertest.CQ)
	d.Push(ib.WC{ID: 1})
	d.Push(ib.WC{ID: 2})
	wcs := make([]ib.WC, 1)
	for id := uint64(1); id <= 2; id++ {
		if n, err := cq.Poll(wcs); n != 1 || err != nil || wcs[0].ID != id {
			t.Error(n, err, wcs)
		}
	}
	if n, err := cq.Poll(wcs); n != 0 || err != nil {
		t.Error(n, err)
	}
	if n := testing.AllocsPerRun(100, func() { cq.Poll(wcs); cq.Arm(false) }); n != 0 {
		t.Errorf("Poll and Arm allocate %v times", n)
	}
	overrun := errors.New("overrun")
	d.Break(overrun)
	if n, err := cq.Poll(wcs); n != 0 || !errors.Is(err, overrun) {
		t.Error(n, err)
	}
}

func TestCompChannel(t *testing.T) {
	c, _ := fake(t)
	other := must(OpenDriver(drivertest.New("fake1")))
	defer other.Close()
	ch := must(c.NewCompChannel())
	defer ch.Close()
	if _, err := other.NewCQ(CQConfig{Channel: ch}); err == nil {
		t.Error("a channel of another context was taken")
	}
	a, b := must(c.NewCQ(CQConfig{Channel: ch})), must(c.NewCQ(CQConfig{Channel: ch}))
	defer a.Close()
	a.Arm(false)
	b.Arm(false)
	b.Driver().(*drivertest.CQ).Push(ib.WC{})
	b.Close() // its event is dropped
	a.Driver().(*drivertest.CQ).Push(ib.WC{})
	if got := must(ch.Wait(t.Context())); got != a {
		t.Error("Wait returned another queue")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := ch.WaitThread(); ch.HasWaitThread() || !errors.Is(err, errors.ErrUnsupported) {
		t.Error("WaitThread on a device without it:", err)
	}
	if _, err := ch.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestCloseEndsWaiting(t *testing.T) {
	c, _ := fake(t)
	ch := must(c.NewCompChannel())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := ch.Wait(t.Context()); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
	ch.Close()
	wg.Wait()
	wg.Go(func() {
		if _, err := c.AsyncEvent(t.Context()); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
	c.Close()
	wg.Wait()
}

func TestAsyncEvents(t *testing.T) {
	c, _ := fake(t)
	cq := must(c.NewCQ(CQConfig{}))
	pd := must(c.AllocPD())
	q := must(pd.Driver().CreateQP(driver.QPConfig{}))
	defer q.Close()
	type object struct{ int }
	obj := &object{1}
	untrack := Track(c, q, obj)
	events := c.Driver().(*drivertest.Context).Events
	next := func(e driver.AsyncEvent) AsyncEvent {
		events <- e
		return must(c.AsyncEvent(t.Context()))
	}
	if e := next(driver.AsyncEvent{Type: ib.EventCQErr, CQ: cq.Driver()}); e.CQ != cq || e.Object != cq {
		t.Error(e)
	}
	e := next(driver.AsyncEvent{Type: ib.EventQPFatal, QP: q})
	if e.Object != obj || e.QPN != q.QPN() || !strings.Contains(e.String(), "QP fatal (qp ") {
		t.Error(e)
	}
	untrack()
	if e := next(driver.AsyncEvent{Type: ib.EventQPFatal, QP: q}); e.Object != nil || e.QPN != q.QPN() {
		t.Error(e)
	}
	if e := next(driver.AsyncEvent{Type: ib.EventPortErr, Port: 1}); e.Object != nil || e.String() != "port error (port 1)" {
		t.Error(e)
	}
	drv := cq.Driver()
	cq.Close()
	pd.Close()
	if e := next(driver.AsyncEvent{Type: ib.EventCQErr, CQ: drv}); e.CQ != nil || e.Object != nil {
		t.Error(e)
	}
	runtime.KeepAlive(obj)
}

func TestLeakedContextIsReported(t *testing.T) {
	leaks := make(chan life.Leak, 10)
	defer life.OnLeak(life.OnLeak(func(l life.Leak) { leaks <- l }))
	func() {
		c := must(OpenDriver(drivertest.New("leaky0")))
		must(c.NewCQ(CQConfig{}))
	}()
	want := map[string]bool{"verbs.Context": true, "verbs.CQ": true}
	testutil.Eventually(t, "both reported", func() bool {
		runtime.GC()
		select {
		case l := <-leaks:
			if l.Device != "leaky0" || !strings.Contains(l.At, "verbs_test.go:") { // not where the library made it
				t.Error(l)
			}
			delete(want, l.Kind)
		default:
		}
		return len(want) == 0
	})
}

func TestErrors(t *testing.T) {
	err := error(&OpError{Op: "create_cq", Device: "soft0", Err: syscall.ENOMEM})
	if err.Error() != "verbs: create_cq on soft0: cannot allocate memory" || !errors.Is(err, syscall.ENOMEM) {
		t.Error(err)
	}
	wc := ib.WC{ID: 7, QPN: 9, Status: ib.WCRNRRetryExceeded, VendorErr: 0x81}
	err = CheckWC("send", &wc)
	if !errors.Is(err, ib.WCRNRRetryExceeded) || errors.Is(err, ib.WCRetryExceeded) {
		t.Error(err)
	}
	if want := "verbs: send (id 7, qp 9): RNR retry counter exceeded: the peer has no receive posted (vendor error 0x81)"; err.Error() != want {
		t.Error(err)
	}
	wc.Status = ib.WCSuccess
	if err := CheckWC("send", &wc); err != nil {
		t.Error(err)
	}
	if s := Tier(9).String(); s != "Tier(9)" {
		t.Error(s)
	}
}
