//go:build linux

package main

import (
	"os"

	"github.com/ringside-rdma/ringside/internal/nldev"
)

// An rdmaLink is a software RDMA device on a network device.
type rdmaLink struct {
	name   string // rxe0
	driver string // rxe or siw
	netdev string // veth0
}

// add makes the device, as `rdma link add` does.
func (l rdmaLink) add(c *nldev.Conn) error { return c.AddLink(l.name, l.driver, l.netdev) }

// remove removes the device. That it is not there is no error.
func (l rdmaLink) remove(c *nldev.Conn) error { return c.RemoveLink(l.name) }

// deviceNames returns the RDMA devices as sysfs has them, sorted.
func deviceNames() []string {
	entries, _ := os.ReadDir("/sys/class/infiniband") // no folder: no module, no device
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
