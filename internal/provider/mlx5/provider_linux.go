//go:build amd64 || arm64

package mlx5

import (
	"fmt"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
)

type provider struct{}

// Provider finds ConnectX NICs.
func Provider() driver.Provider { return provider{} }

func (provider) Name() string { return "mlx5" }

func (provider) Devices() ([]driver.Device, error) {
	all, err := uverbs.DevicesOf(abi.RDMA_DRIVER_MLX5)
	var list []driver.Device
	for _, d := range all {
		list = append(list, device{d})
	}
	return list, err
}

type device struct{ uverbs.Device }

func (d device) Info() driver.DeviceInfo {
	return uverbs.Info(&d.Device, "mlx5", driver.TierHardware)
}

func (d device) Open() (driver.Context, error) {
	if d.ABI != abi.MLX5_IB_UVERBS_ABI_VERSION {
		return nil, fmt.Errorf("%s: the kernel's mlx5 driver has version %d of its interface, and this program knows %d", d.Name, d.ABI,
			abi.MLX5_IB_UVERBS_ABI_VERSION)
	}
	req := contextRequest()
	var resp abi.Mlx5AllocUcontextResp
	c, err := uverbs.OpenContext(&d.Device, uverbs.Bytes(&req), uverbs.Bytes(&resp))
	if err != nil {
		return nil, err
	}
	return newContext(c, &resp)
}
