package rxe

import (
	"fmt"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
)

type provider struct{}

// Provider finds the kernel's software RoCE devices.
func Provider() driver.Provider { return provider{} }

func (provider) Name() string { return "rxe" }

func (provider) Devices() ([]driver.Device, error) {
	all, err := uverbs.DevicesOf(abi.RDMA_DRIVER_RXE)
	var list []driver.Device
	for _, d := range all {
		list = append(list, device{d})
	}
	return list, err
}

type device struct{ uverbs.Device }

// The versions of the driver's ABI that this package speaks: rdma_user_rxe.h says 2; 1 differs on 32-bit systems only.
const minABI, maxABI = 1, 2

func (d device) Info() driver.DeviceInfo {
	return uverbs.Info(&d.Device, "rxe", driver.TierKernelSoft)
}

func (d device) Open() (driver.Context, error) {
	if d.ABI < minABI || d.ABI > maxABI {
		return nil, fmt.Errorf("%s: the kernel's rxe driver has version %d of its interface, and this program knows %d to %d", d.Name, d.ABI, minABI, maxABI)
	}
	c, err := uverbs.OpenContext(&d.Device, nil, nil)
	if err != nil {
		return nil, err
	}
	return newContext(c), nil
}
