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

// emulatedDevice is a device of its own for each context.
type emulatedDevice struct{}

func (emulatedDevice) Info() driver.DeviceInfo {
	return driver.DeviceInfo{Name: emulated, Provider: "mlx5", Tier: driver.TierHardware}
}

func (emulatedDevice) Open() (driver.Context, error) {
	d, err := mlx5emu.NewDevice(mlx5emu.Config{Name: emulated, HostOnly: true})
	if err != nil {
		return nil, err
	}
	k, err := d.OpenKernel()
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return mlx5.OpenKernel(wholeDevice{k, d}, emulated)
}

// wholeDevice is the kernel of a device that ends with its only context.
type wholeDevice struct {
	*mlx5emu.Kernel
	d *mlx5emu.Device
}

func (w wholeDevice) Close() error { return errors.Join(w.Kernel.Close(), w.d.Close()) }

func init() {
	brought[emulated] = func() (*verbs.Context, error) { return verbs.OpenDriver(emulatedDevice{}) }
}

// TestConnectX runs the table on the emulated ConnectX: two devices, which meet as software NICs of one process do.
func TestConnectX(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("the packages of device and driver have tests of their own; with -device mlx5emu, TestInProcess does the same")
	}
	runTable(t, path{name: "emulated", devices: [2]string{emulated, emulated}})
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
