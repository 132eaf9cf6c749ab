package uverbs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/netlink"
)

// Devices lists the RDMA devices that this process's network namespace shows, sorted by name: by netlink, and by sysfs
// where netlink does not tell. A kernel without the RDMA subsystem is ErrNoSubsystem.
func Devices() ([]Device, error) {
	c, err := netlink.Dial(unix.NETLINK_RDMA)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, ErrNoSubsystem
	}
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var list []Device
	var bad error
	err = c.Dump(nldevRequest(abi.RDMA_NLDEV_CMD_GET), func(body []byte) {
		d, err := parseDevice(body)
		list, bad = append(list, d), errors.Join(bad, err)
	})
	if err := errors.Join(err, bad); err != nil {
		return nil, fmt.Errorf("list of RDMA devices: %w", err)
	}
	for i := range list {
		d := &list[i]
		m := nldevRequest(abi.RDMA_NLDEV_CMD_GET_CHARDEV).U32(abi.RDMA_NLDEV_ATTR_DEV_INDEX, d.Index).
			Text(abi.RDMA_NLDEV_ATTR_CHARDEV_TYPE, "uverbs")
		if err := c.Get(m, func(body []byte) { bad = errors.Join(bad, parseChardev(d, body)) }); err != nil || d.Chardev == "" {
			chardevFromSysfs(d) // a device without a user interface has none there either
		}
	}
	if bad != nil {
		return nil, fmt.Errorf("character devices of RDMA devices: %w", bad)
	}
	slices.SortFunc(list, func(a, b Device) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

func nldevRequest(op uint16) netlink.Message {
	return netlink.NewMessage(abi.RDMA_NL_NLDEV<<10|op, 0, nil)
}

// parseDevice reads an answer to RDMA_NLDEV_CMD_GET. Attributes that it does not know are left out, as in every later
// kernel there are more.
func parseDevice(body []byte) (Device, error) {
	var d Device
	err := netlink.Attributes(body, func(typ uint16, v []byte) {
		switch typ {
		case abi.RDMA_NLDEV_ATTR_DEV_INDEX:
			d.Index = u32(v)
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
		case abi.RDMA_NLDEV_ATTR_UVERBS_DRIVER_ID: // u32 on the wire, whatever the header's comment says
			d.DriverID, d.HasDriverID = u32(v), len(v) == 4
		}
	})
}

// sysfs is where the kernel shows its devices; tests have their own.
var sysfs = "/sys"

// chardevFromSysfs looks for the character device of d.
func chardevFromSysfs(d *Device) {
	dir := filepath.Join(sysfs, "class/infiniband_verbs")
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if read(filepath.Join(dir, e.Name(), "ibdev")) != d.Name {
			continue
		}
		d.Chardev = e.Name()
		d.ABI, _ = strconv.ParseUint(read(filepath.Join(dir, e.Name(), "abi_version")), 10, 64)
		return
	}
}

func read(path string) string {
	b, _ := os.ReadFile(path)
	return strings.TrimSpace(string(b))
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
