package uverbs

import "github.com/ringside-rdma/ringside/internal/driver"

// Absent is a Provider, by its name, on systems that do not have the kernel's driver: it finds nothing.
type Absent string

// Name implements driver.Provider.
func (a Absent) Name() string { return string(a) }

// Devices implements driver.Provider.
func (Absent) Devices() ([]driver.Device, error) { return nil, nil }
