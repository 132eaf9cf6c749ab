package rxe

import (
	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
)

// Provider finds the kernel's software RoCE devices.
func Provider() driver.Provider {
	return &uverbs.Provider{Kind: "rxe", DriverID: abi.RDMA_DRIVER_RXE, Tier: driver.TierKernelSoft,
		MinABI: 1, MaxABI: 2, // rdma_user_rxe.h says 2; 1 differs on 32-bit systems only
		New: open}
}

func open(d *uverbs.Device) (driver.Context, error) {
	c, err := uverbs.OpenContext(d, nil, nil)
	if err != nil {
		return nil, err
	}
	return newContext(c), nil
}
