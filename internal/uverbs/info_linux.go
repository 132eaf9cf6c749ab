package uverbs

import (
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Info describes a device of the list for a provider.
func Info(d *Device, provider string, tier driver.Tier) driver.DeviceInfo {
	return driver.DeviceInfo{Name: d.Name, Provider: provider, Tier: tier, GUID: ib.GUID(d.NodeGUID), NetDevs: d.NetDevs, CharDevs: CharDevices(d.Name)}
}
