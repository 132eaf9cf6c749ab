package uverbs

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// What sysfs alone tells, where the kernel (or who stands before it) has no netlink for RDMA devices.

// devices lists the devices that have character devices, sorted by name. Their indices in the kernel's list are not known.
func (h *host) devices() (list []Device) {
	entries, _ := os.ReadDir(h.class(classVerbs))
	for _, e := range entries {
		name := read(h.class(classVerbs, e.Name(), "ibdev"))
		if name == "" {
			continue // abi_version, which is no device
		}
		list = append(list, h.device(name))
	}
	slices.SortFunc(list, func(a, b Device) int { return strings.Compare(a.Name, b.Name) })
	return list
}

func (h *host) device(name string) Device {
	at := func(path ...string) string { return h.class(append([]string{"infiniband", name}, path...)...) }
	d := Device{Name: name, Firmware: read(at("fw_ver"))}
	kind, _, _ := strings.Cut(read(at("node_type")), ":") // "1: CA"
	n, _ := strconv.ParseUint(kind, 10, 8)
	d.NodeType = uint8(n)
	d.NodeGUID, _ = strconv.ParseUint(strings.ReplaceAll(read(at("node_guid")), ":", ""), 16, 64)
	ports, _ := os.ReadDir(at("ports"))
	d.Ports = uint32(len(ports))
	switch read(at("ports", "1", "link_layer")) {
	case "Ethernet":
		d.Protocol = "roce"
	case "InfiniBand":
		d.Protocol = "ib"
	}
	if d.NodeType == abi.RDMA_NODE_RNIC {
		d.Protocol = "iw"
	}
	d.DriverID, d.HasDriverID = h.driver(at("device", "driver"))
	h.chardev(&d)
	h.netDevs(&d)
	return d
}

// driver is the kernel driver that a link of sysfs names. Software devices have none there.
func (h *host) driver(link string) (id uint32, ok bool) {
	to, err := os.Readlink(link)
	if err != nil {
		return 0, false
	}
	switch filepath.Base(to) {
	case "mlx5_core":
		return abi.RDMA_DRIVER_MLX5, true
	case "mlx4_core":
		return abi.RDMA_DRIVER_MLX4, true
	}
	return 0, false
}
