//go:build !linux || !(amd64 || arm64)

package mlx5

import "github.com/ringside-rdma/ringside/internal/driver"

type provider struct{}

// Provider finds nothing: ConnectX NICs are driven on Linux, on amd64 and arm64.
func Provider() driver.Provider { return provider{} }

func (provider) Name() string { return "mlx5" }

func (provider) Devices() ([]driver.Device, error) { return nil, nil }
