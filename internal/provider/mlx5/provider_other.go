//go:build !linux || !(amd64 || arm64)

package mlx5

import (
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
)

// Provider finds nothing: ConnectX NICs are driven on Linux, on amd64 and arm64.
func Provider() driver.Provider { return uverbs.Absent("mlx5") }
