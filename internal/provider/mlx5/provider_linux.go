//go:build amd64 || arm64

package mlx5

import (
	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
)

// Provider finds ConnectX NICs.
func Provider() driver.Provider {
	return &uverbs.Provider{Kind: "mlx5", DriverID: abi.RDMA_DRIVER_MLX5, Tier: driver.TierHardware,
		MinABI: abi.MLX5_IB_UVERBS_ABI_VERSION, MaxABI: abi.MLX5_IB_UVERBS_ABI_VERSION, New: open}
}

func open(d *uverbs.Device) (driver.Context, error) {
	return begin(func(in, out []byte) (*uverbs.Context, error) { return uverbs.OpenContext(d, in, out) })
}

// OpenKernel makes the context of a device whose kernel the caller brings: an emulated one. It owns k, also if it fails. name is the
// device's.
func OpenKernel(k uverbs.Kernel, name string) (driver.Context, error) {
	return begin(func(in, out []byte) (*uverbs.Context, error) {
		return uverbs.NewContext(uverbs.NewFile(k, name, abi.RDMA_DRIVER_MLX5), in, out)
	})
}

// begin makes a context, which the kernel does by what make calls.
func begin(make func(in, out []byte) (*uverbs.Context, error)) (driver.Context, error) {
	req := contextRequest()
	var resp abi.Mlx5AllocUcontextResp
	c, err := make(uverbs.Bytes(&req), uverbs.Bytes(&resp))
	if err != nil {
		return nil, err
	}
	return newContext(c, &resp)
}
