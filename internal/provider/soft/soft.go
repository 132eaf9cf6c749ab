// Package soft makes the software NIC a provider: one device, "soft0", that is always there.
package soft

import (
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
)

type provider struct{}

// Provider returns the software NIC's provider.
func Provider() driver.Provider { return provider{} }

func (provider) Name() string { return "soft" }

func (provider) Devices() ([]driver.Device, error) { return []driver.Device{device{}}, nil }

type device struct{}

func (device) Info() driver.DeviceInfo {
	return driver.DeviceInfo{Name: "soft0", Provider: "soft", Tier: driver.TierSoft}
}

// Open makes a NIC: every context has its own, with its own GID.
func (device) Open() (driver.Context, error) {
	n, err := softnic.Open()
	if err != nil {
		return nil, err
	}
	return n, nil
}
