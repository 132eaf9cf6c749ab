//go:build amd64 || arm64

package conformance

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mlx5emu"
	"github.com/ringside-rdma/ringside/internal/provider/mlx5"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// emulated is the name of a device that this package makes: the driver for ConnectX on an emulated one in this process.
const emulated = "mlx5emu"

// emulatedIB is one whose link layer is InfiniBand.
const emulatedIB = "mlx5emu-ib"

// emulatedDevice is a device of its own for each context.
type emulatedDevice struct{ name string }

func (e emulatedDevice) Info() driver.DeviceInfo {
	return driver.DeviceInfo{Name: e.name, Provider: "mlx5", Tier: driver.TierHardware}
}

func (e emulatedDevice) Open() (driver.Context, error) {
	d, err := mlx5emu.NewDevice(mlx5emu.Config{Name: e.name, HostOnly: true, InfiniBand: e.name == emulatedIB})
	if err != nil {
		return nil, err
	}
	k, err := d.OpenKernel()
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return mlx5.OpenKernel(wholeDevice{k, d}, e.name)
}

// wholeDevice is the kernel of a device that ends with its only context.
type wholeDevice struct {
	*mlx5emu.Kernel
	d *mlx5emu.Device
}

func (w wholeDevice) Close() error { return errors.Join(w.Kernel.Close(), w.d.Close()) }

func init() {
	for _, name := range []string{emulated, emulatedIB} {
		brought[name] = func() (*verbs.Context, error) { return verbs.OpenDriver(emulatedDevice{name}) }
	}
}

// TestConnectX runs the table on the emulated ConnectX: two devices, which meet as software NICs of one process do.
func TestConnectX(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("the packages of device and driver have tests of their own; with -device mlx5emu, TestInProcess does the same")
	}
	runTable(t, path{name: "emulated", devices: [2]string{emulated, emulated}})
}

// TestConnectXInfiniBand runs a part of the table on two devices of that link layer, which know each other by their LIDs; PARTS=1, all of it.
func TestConnectXInfiniBand(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("the packages of device and driver have tests of their own; with -device mlx5emu-ib, TestInProcess does the same")
	}
	runTable(t, path{name: "infiniband", devices: [2]string{emulatedIB, emulatedIB}}.share(t, 4))
}

// TestConnectXProcesses runs a part of the table between two processes with an emulated ConnectX each; PARTS=1, all of it.
func TestConnectXProcesses(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("the packages of device and driver have tests of their own; with -device mlx5emu, TestProcesses does the same")
	}
	runTable(t, path{name: "emulated", twoProcesses: true, devices: [2]string{emulated, emulated}}.share(t, 8))
}

// TestConnectXModeration has events wait, by the whole way from a program to the device.
func TestConnectXModeration(t *testing.T) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	c, err := brought[emulated]()
	must(err)
	defer c.Close()
	pd, err := c.AllocPD()
	must(err)
	defer pd.Close()
	ch, err := c.NewCompChannel()
	must(err)
	defer ch.Close()
	cq, err := c.NewCQ(verbs.CQConfig{Channel: ch})
	must(err)
	defer cq.Close()
	gid, err := c.GID(1, 0)
	must(err)
	var qs [2]*qp.QP
	for i := range qs {
		qs[i], err = qp.New(pd, &qp.Config{SendCQ: cq})
		must(err)
		defer qs[i].Close()
		must(qs[i].Init(t.Context(), 1, 0))
	}
	for i, q := range qs {
		must(q.Connect(t.Context(), qp.ConnectParams{Remote: qp.Endpoint{GID: gid, QPN: qs[1-i].QPN()}}))
	}
	write := func() { // of nothing, which takes no memory
		t.Helper()
		n, err := qs[0].PostSend([]ib.SendWR{{Opcode: ib.OpRDMAWrite, Flags: ib.SendSignaled}})
		if n != 1 {
			t.Fatal(err)
		}
	}
	poll := func(n int) {
		t.Helper()
		testutil.Eventually(t, "completions", func() bool {
			k, err := cq.Poll(make([]ib.WC, n))
			must(err)
			n -= k
			return n == 0
		})
	}
	event := func(want bool) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
		if !want {
			ctx, cancel = context.WithTimeout(t.Context(), 20*time.Millisecond)
		}
		defer cancel()
		if _, err := ch.Wait(ctx); (err == nil) != want {
			t.Fatalf("an event is wanted: %t; %v", want, err)
		}
	}
	must(cq.Moderate(3, 0))
	must(cq.Arm(false))
	write()
	write()
	poll(2)
	event(false)
	write()
	event(true)
	poll(1)
	must(cq.Moderate(3, time.Millisecond))
	must(cq.Arm(false))
	began := time.Now()
	write()
	event(true)
	if d := time.Since(began); d < time.Millisecond {
		t.Errorf("the event came after %v", d)
	}
	poll(1)
	if err := cq.Moderate(1, 5*time.Millisecond); err == nil {
		t.Error("longer than the device can")
	}
}

// Whoever sends to a LID that no port has hears nothing.
func TestConnectXNoSuchLID(t *testing.T) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	c, err := brought[emulatedIB]()
	must(err)
	defer c.Close()
	pd, err := c.AllocPD()
	must(err)
	defer pd.Close()
	cq, err := c.NewCQ(verbs.CQConfig{})
	must(err)
	defer cq.Close()
	port, err := c.QueryPort(1)
	must(err)
	const lid = 0xbffe
	if port.LinkLayer != ib.LinkInfiniBand || port.LID == 0 || port.LID == lid {
		t.Fatalf("%+v", port)
	}
	completion := func(q *qp.QP, wr ib.SendWR, want ib.WCStatus) {
		t.Helper()
		wr.Flags = ib.SendSignaled
		if n, err := q.PostSend([]ib.SendWR{wr}); n != 1 {
			t.Fatal(err)
		}
		var wcs [1]ib.WC
		testutil.Eventually(t, "a completion", func() bool {
			n, err := cq.Poll(wcs[:])
			must(err)
			return n == 1
		})
		if wcs[0].Status != want {
			t.Errorf("%v, want %v", wcs[0].Status, want)
		}
	}
	rc, err := qp.New(pd, &qp.Config{SendCQ: cq})
	must(err)
	defer rc.Close()
	must(rc.Init(t.Context(), 1, 0))
	must(rc.Connect(t.Context(), qp.ConnectParams{Remote: qp.Endpoint{LID: lid, QPN: rc.QPN()}, AckTimeout: time.Millisecond, RetryCount: 1}))
	completion(rc, ib.SendWR{Opcode: ib.OpRDMAWrite}, ib.WCRetryExceeded)
	if a, err := rc.Query(); err != nil || a.DestQPN != rc.QPN() || a.AH.DLID != lid {
		t.Errorf("Query: %+v, %v", a, err)
	}
	ud, err := qp.New(pd, &qp.Config{Type: ib.UD, SendCQ: cq})
	must(err)
	defer ud.Close()
	must(ud.ActivateUD(t.Context(), 1, 0x1111, 0))
	ah, err := pd.NewAH(ib.AHAttr{DLID: lid, Port: 1})
	must(err)
	defer ah.Close()
	completion(ud, ib.SendWR{Opcode: ib.OpSend, AH: ah.Num(), RemoteQPN: ud.QPN(), RemoteQKey: 0x1111}, ib.WCSuccess)
}
