package mlx5emu

import (
	"fmt"
	"net/netip"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
)

// CMPort returns the connection manager at an address of the device's; see softnic.NIC. What it connects are the device's queue pairs,
// once their owner has modified them as was agreed.
func (d *Device) CMPort(a netip.Addr) (softnic.CMPort, error) {
	if d.cfg.HostOnly {
		return softnic.CMPort{}, fmt.Errorf("mlx5emu: %w: %s has no addresses of the host", driver.ErrUnreachable, d.cfg.Name)
	}
	return d.nic.CMPort(a)
}
