package uverbs

import (
	"fmt"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Provider finds and opens the devices of one of the kernel's drivers. It is what the kernel's providers have in common, with what
// they differ in.
type Provider struct {
	Kind     string // "rxe"
	DriverID uint32 // of the kernel's driver: enum rdma_driver_id
	Tier     driver.Tier
	// The versions of the driver's own interface that the provider speaks.
	MinABI, MaxABI uint64
	// New opens a device of which the version was checked.
	New func(*Device) (driver.Context, error)
}

// Name implements driver.Provider.
func (p *Provider) Name() string { return p.Kind }

// Devices implements driver.Provider.
func (p *Provider) Devices() ([]driver.Device, error) {
	all, err := DevicesOf(p.DriverID)
	var list []driver.Device
	for i := range all {
		list = append(list, &device{p, all[i]})
	}
	return list, err
}

// A device is one of a provider's.
type device struct {
	p *Provider
	d Device
}

// Info implements driver.Device.
func (d *device) Info() driver.DeviceInfo {
	return driver.DeviceInfo{Name: d.d.Name, Provider: d.p.Kind, Tier: d.p.Tier, GUID: ib.GUID(d.d.NodeGUID), NetDevs: d.d.NetDevs, CharDevs: CharDevices(d.d.Name)}
}

// Open implements driver.Device.
func (d *device) Open() (driver.Context, error) {
	if p := d.p; d.d.ABI < p.MinABI || d.d.ABI > p.MaxABI {
		known := fmt.Sprint(p.MinABI)
		if p.MaxABI > p.MinABI {
			known = fmt.Sprintf("%d to %d", p.MinABI, p.MaxABI)
		}
		return nil, fmt.Errorf("%s: the kernel's %s driver has version %d of its interface, and this program knows %s", d.d.Name, p.Kind, d.d.ABI, known)
	}
	return d.p.New(&d.d)
}
