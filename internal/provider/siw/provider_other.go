//go:build !linux

package siw

import "github.com/ringside-rdma/ringside/internal/driver"

type provider struct{}

// Provider finds nothing: software iWARP is part of Linux.
func Provider() driver.Provider { return provider{} }

func (provider) Name() string { return "siw" }

func (provider) Devices() ([]driver.Device, error) { return nil, nil }
