//go:build !linux

package rxe

import "github.com/ringside-rdma/ringside/internal/driver"

type provider struct{}

// Provider finds nothing: software RoCE is part of Linux.
func Provider() driver.Provider { return provider{} }

func (provider) Name() string { return "rxe" }

func (provider) Devices() ([]driver.Device, error) { return nil, nil }
