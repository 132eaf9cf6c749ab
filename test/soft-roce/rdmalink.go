//go:build linux

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/ringside-rdma/ringside/internal/netlink"
	"golang.org/x/sys/unix"
)

// The RDMA subsystem's netlink interface, include/uapi/rdma/rdma_netlink.h.
const (
	rdmaNLDEV = 5 // RDMA_NL_NLDEV: the client that has devices

	nldevGet     = 1 // RDMA_NLDEV_CMD_GET
	nldevNewLink = 3 // RDMA_NLDEV_CMD_NEWLINK
	nldevDelLink = 4 // RDMA_NLDEV_CMD_DELLINK

	nldevDevIndex = 1  // RDMA_NLDEV_ATTR_DEV_INDEX
	nldevDevName  = 2  // RDMA_NLDEV_ATTR_DEV_NAME
	nldevNDevName = 51 // RDMA_NLDEV_ATTR_NDEV_NAME
	nldevLinkType = 65 // RDMA_NLDEV_ATTR_LINK_TYPE
)

func nldev(op uint16) uint16 { return rdmaNLDEV<<10 | op }

func newLinkMessage(l rdmaLink) netlink.Message {
	return netlink.NewMessage(nldev(nldevNewLink), 0, nil).
		Text(nldevDevName, l.name).Text(nldevLinkType, l.driver).Text(nldevNDevName, l.netdev)
}

func delLinkMessage(index uint32) netlink.Message {
	return netlink.NewMessage(nldev(nldevDelLink), 0, nil).U32(nldevDevIndex, index)
}

// An rdmaLink is a software RDMA device on a network device.
type rdmaLink struct {
	name   string // rxe0
	driver string // rxe or siw
	netdev string // veth0
}

// add makes the device, as `rdma link add` does.
func (l rdmaLink) add(c *netlink.Conn) error {
	err := c.Do(newLinkMessage(l))
	switch {
	case errors.Is(err, unix.EINVAL):
		err = fmt.Errorf("%w: is the module of %s loaded?", err, l.driver)
	case errors.Is(err, unix.EEXIST):
		err = fmt.Errorf("%w: `rdma link delete %s` removes what has the name now", err, l.name)
	}
	if err != nil {
		return fmt.Errorf("add RDMA link %s (%s on %s): %w", l.name, l.driver, l.netdev, err)
	}
	return nil
}

// remove removes the device. That it is not there is no error.
func (l rdmaLink) remove(c *netlink.Conn) error {
	indices, err := rdmaDevices(c)
	if err != nil {
		return err
	}
	index, ok := indices[l.name]
	if !ok {
		return nil
	}
	if err := c.Do(delLinkMessage(index)); err != nil {
		return fmt.Errorf("remove RDMA link %s: %w", l.name, err)
	}
	return nil
}

// rdmaDevices returns the index of each RDMA device.
func rdmaDevices(c *netlink.Conn) (map[string]uint32, error) {
	devices := map[string]uint32{}
	var bad error
	err := c.Dump(netlink.NewMessage(nldev(nldevGet), 0, nil), func(body []byte) {
		var name string
		var index uint32
		err := netlink.Attributes(body, func(typ uint16, value []byte) {
			switch {
			case typ == nldevDevName:
				name = strings.TrimRight(string(value), "\x00")
			case typ == nldevDevIndex && len(value) == 4:
				index = binary.NativeEndian.Uint32(value)
			}
		})
		devices[name], bad = index, errors.Join(bad, err)
	})
	if err = errors.Join(err, bad); err != nil {
		return nil, fmt.Errorf("list RDMA devices: %w", err)
	}
	return devices, nil
}

// deviceNames returns the RDMA devices as sysfs has them, sorted.
func deviceNames() []string {
	entries, _ := os.ReadDir("/sys/class/infiniband") // no folder: no module, no device
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
