package siw

import (
	"fmt"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
)

type provider struct{}

// Provider finds the kernel's software iWARP devices.
func Provider() driver.Provider { return provider{} }

func (provider) Name() string { return "siw" }

func (provider) Devices() ([]driver.Device, error) {
	all, err := uverbs.DevicesOf(abi.RDMA_DRIVER_SIW)
	var list []driver.Device
	for _, d := range all {
		list = append(list, device{d})
	}
	return list, err
}

type device struct{ uverbs.Device }

func (d device) Info() driver.DeviceInfo {
	return uverbs.Info(&d.Device, "siw", driver.TierKernelSoft)
}

func (d device) Open() (driver.Context, error) {
	if d.ABI != abi.SIW_ABI_VERSION {
		return nil, fmt.Errorf("%s: the kernel's siw driver has version %d of its interface, and this program knows %d", d.Name, d.ABI, abi.SIW_ABI_VERSION)
	}
	var resp abi.SiwUrespAllocCtx // of no use, but the driver insists
	c, err := uverbs.OpenContext(&d.Device, nil, uverbs.Bytes(&resp))
	if err != nil {
		return nil, err
	}
	return newContext(c), nil
}
