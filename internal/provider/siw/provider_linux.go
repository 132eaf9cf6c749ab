package siw

import (
	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
)

// Provider finds the kernel's software iWARP devices.
func Provider() driver.Provider {
	return &uverbs.Provider{Kind: "siw", DriverID: abi.RDMA_DRIVER_SIW, Tier: driver.TierKernelSoft,
		MinABI: abi.SIW_ABI_VERSION, MaxABI: abi.SIW_ABI_VERSION, New: open}
}

func open(d *uverbs.Device) (driver.Context, error) {
	var resp abi.SiwUrespAllocCtx // of no use, but the driver insists
	c, err := uverbs.OpenContext(d, nil, uverbs.Bytes(&resp))
	if err != nil {
		return nil, err
	}
	return newContext(c), nil
}
