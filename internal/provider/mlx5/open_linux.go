//go:build amd64 || arm64

package mlx5

import (
	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
)

// OpenKernel makes the context of a device whose kernel the caller brings: an emulated one. It owns k, also if it fails. name is the
// device's.
func OpenKernel(k uverbs.Kernel, name string) (driver.Context, error) {
	req := contextRequest()
	var resp abi.Mlx5AllocUcontextResp
	c, err := uverbs.NewContext(uverbs.NewFile(k, name, abi.RDMA_DRIVER_MLX5), uverbs.Bytes(&req), uverbs.Bytes(&resp))
	if err != nil {
		return nil, err
	}
	return newContext(c, &resp)
}
