//go:build amd64 || arm64

package conformance

import (
	"errors"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mlx5emu"
	"github.com/ringside-rdma/ringside/internal/provider/mlx5"
	"github.com/ringside-rdma/ringside/verbs"
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
