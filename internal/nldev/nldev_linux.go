package nldev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/netlink"
)

// A Conn asks the RDMA subsystem, with the eyes of the network namespace that it was dialled in. It is not safe for
// concurrent use. Errors of its methods match the errno that the kernel answered with.
type Conn struct {
	nl *netlink.Conn
	// what sends m, and calls fn for each answer. Tests have their own.
	get, dump func(m netlink.Message, fn func(body []byte)) error
}

// Dial opens a connection. A kernel without the RDMA subsystem is unix.EPROTONOSUPPORT.
func Dial() (*Conn, error) {
	nl, err := netlink.Dial(unix.NETLINK_RDMA)
	if err != nil {
		return nil, err
	}
	return &Conn{nl: nl, get: nl.Get, dump: nl.Dump}, nil
}

// Close closes the connection.
func (c *Conn) Close() error { return c.nl.Close() }

func request(op uint16) netlink.Message {
	return netlink.NewMessage(abi.RDMA_NL_NLDEV<<10|op, 0, nil)
}

// Devices lists the devices, sorted by name, without their character devices and net devices.
func (c *Conn) Devices() ([]Device, error) {
	var list []Device
	var bad error
	err := c.dump(request(abi.RDMA_NLDEV_CMD_GET), func(body []byte) {
		d, err := parseDevice(body)
		list, bad = append(list, d), errors.Join(bad, err)
	})
	if err := errors.Join(err, bad); err != nil {
		return nil, fmt.Errorf("list of RDMA devices: %w", err)
	}
	slices.SortFunc(list, func(a, b Device) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

// Chardev fills in the character device of d for user space verbs, with the number of its driver. It makes the kernel
// load the module ib_uverbs. A device without one is left as it is, and an errno says so: which one depends on the kernel.
func (c *Conn) Chardev(d *Device) error {
	m := request(abi.RDMA_NLDEV_CMD_GET_CHARDEV).U32(abi.RDMA_NLDEV_ATTR_DEV_INDEX, d.Index).
		Text(abi.RDMA_NLDEV_ATTR_CHARDEV_TYPE, "uverbs")
	var bad error
	err := c.get(m, func(body []byte) { bad = errors.Join(bad, parseChardev(d, body)) })
	if err := errors.Join(err, bad); err != nil {
		return fmt.Errorf("character device of %s: %w", d.Name, err)
	}
	return nil
}

// NetDevs fills in the net devices of d. That there are none, or none that this network namespace may see, is no error.
func (c *Conn) NetDevs(d *Device) error {
	var names []string
	var bad error
	err := c.dump(request(abi.RDMA_NLDEV_CMD_PORT_GET).U32(abi.RDMA_NLDEV_ATTR_DEV_INDEX, d.Index), func(body []byte) {
		name, err := parsePort(body)
		if bad = errors.Join(bad, err); name != "" && !slices.Contains(names, name) {
			names = append(names, name)
		}
	})
	if err := errors.Join(err, bad); err != nil {
		return fmt.Errorf("ports of %s: %w", d.Name, err)
	}
	d.NetDevs = names
	return nil
}

// System asks for what holds for all devices.
func (c *Conn) System() (System, error) {
	var s System
	var bad error
	err := c.get(request(abi.RDMA_NLDEV_CMD_SYS_GET), func(body []byte) { bad = errors.Join(bad, parseSystem(&s, body)) })
	if err := errors.Join(err, bad); err != nil {
		return System{}, fmt.Errorf("properties of the RDMA subsystem: %w", err)
	}
	return s, nil
}

// AddLink makes a software device called name of a driver ("rxe", "siw") on a net device, as `rdma link add` does. The
// process needs CAP_NET_ADMIN in the initial user namespace. The error says what to do.
func (c *Conn) AddLink(name, driver, netdev string) error {
	err := c.nl.Do(addLinkMessage(name, driver, netdev))
	switch {
	case errors.Is(err, unix.EINVAL):
		err = fmt.Errorf("%w: is the module of %s loaded?", err, driver)
	case errors.Is(err, unix.EEXIST):
		err = fmt.Errorf("%w: `rdma link delete %s` removes what has the name now", err, name)
	}
	if err != nil {
		return fmt.Errorf("add RDMA link %s (%s on %s): %w", name, driver, netdev, err)
	}
	return nil
}

// RemoveLink removes a software device, as `rdma link delete` does. That there is none is no error. It waits until nobody
// has the device open: the drivers rxe and siw cannot take it away from a process.
func (c *Conn) RemoveLink(name string) error {
	list, err := c.Devices()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(list, func(d Device) bool { return d.Name == name })
	if i < 0 {
		return nil
	}
	if err := c.nl.Do(removeLinkMessage(list[i].Index)); err != nil {
		return fmt.Errorf("remove RDMA link %s: %w", name, err)
	}
	return nil
}

func addLinkMessage(name, driver, netdev string) netlink.Message {
	return request(abi.RDMA_NLDEV_CMD_NEWLINK).Text(abi.RDMA_NLDEV_ATTR_DEV_NAME, name).
		Text(abi.RDMA_NLDEV_ATTR_LINK_TYPE, driver).Text(abi.RDMA_NLDEV_ATTR_NDEV_NAME, netdev)
}

func removeLinkMessage(index uint32) netlink.Message {
	return request(abi.RDMA_NLDEV_CMD_DELLINK).U32(abi.RDMA_NLDEV_ATTR_DEV_INDEX, index)
}

// parseDevice reads an answer to RDMA_NLDEV_CMD_GET. Attributes that it does not know are left out, as in every later
// kernel there are more.
func parseDevice(body []byte) (Device, error) {
	var d Device
	err := netlink.Attributes(body, func(typ uint16, v []byte) {
		switch typ {
		case abi.RDMA_NLDEV_ATTR_DEV_INDEX:
			d.Index, d.HasIndex = u32(v), len(v) == 4
		case abi.RDMA_NLDEV_ATTR_DEV_NAME:
			d.Name = text(v)
		case abi.RDMA_NLDEV_ATTR_PORT_INDEX:
			d.Ports = u32(v)
		case abi.RDMA_NLDEV_ATTR_FW_VERSION:
			d.Firmware = text(v)
		case abi.RDMA_NLDEV_ATTR_NODE_GUID:
			d.NodeGUID = u64(v)
		case abi.RDMA_NLDEV_ATTR_DEV_NODE_TYPE:
			d.NodeType = u8(v)
		case abi.RDMA_NLDEV_ATTR_DEV_PROTOCOL:
			d.Protocol = text(v)
		}
	})
	if err == nil && d.Name == "" {
		err = errors.New("netlink: an RDMA device without a name")
	}
	return d, err
}

// parseChardev reads an answer to RDMA_NLDEV_CMD_GET_CHARDEV.
func parseChardev(d *Device, body []byte) error {
	return netlink.Attributes(body, func(typ uint16, v []byte) {
		switch typ {
		case abi.RDMA_NLDEV_ATTR_CHARDEV_NAME:
			d.Chardev = text(v)
		case abi.RDMA_NLDEV_ATTR_CHARDEV_ABI:
			d.ABI = u64(v)
		case abi.RDMA_NLDEV_ATTR_CHARDEV: // the kernel's own encoding, which is not that of stat
			n := u64(v)
			d.Major, d.Minor = uint32(n>>8)&0xfff, uint32(n&0xff|n>>12&0xfff00)
		case abi.RDMA_NLDEV_ATTR_UVERBS_DRIVER_ID: // u32 on the wire, whatever the header's comment says
			d.DriverID, d.HasDriverID = u32(v), len(v) == 4
		}
	})
}

// parsePort reads the net device in an answer to RDMA_NLDEV_CMD_PORT_GET, which is about one port.
func parsePort(body []byte) (netdev string, err error) {
	err = netlink.Attributes(body, func(typ uint16, v []byte) {
		if typ == abi.RDMA_NLDEV_ATTR_NDEV_NAME {
			netdev = text(v)
		}
	})
	return netdev, err
}

// parseSystem reads an answer to RDMA_NLDEV_CMD_SYS_GET.
func parseSystem(s *System, body []byte) error {
	return netlink.Attributes(body, func(typ uint16, v []byte) {
		switch typ {
		case abi.RDMA_NLDEV_SYS_ATTR_NETNS_MODE:
			s.NetNSExclusive = len(v) == 1 && v[0] == 0
		case abi.RDMA_NLDEV_SYS_ATTR_COPY_ON_FORK:
			s.CopyOnFork = u8(v) != 0
		}
	})
}

func text(v []byte) string { return strings.TrimRight(string(v), "\x00") }

// Numbers of the wrong length are zero: the kernel does not send them.
func u8(v []byte) uint8 {
	if len(v) != 1 {
		return 0
	}
	return v[0]
}

func u32(v []byte) uint32 {
	if len(v) != 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(v)
}

func u64(v []byte) uint64 {
	if len(v) != 8 {
		return 0
	}
	return binary.NativeEndian.Uint64(v)
}
