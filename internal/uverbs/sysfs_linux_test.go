package uverbs

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ringside-rdma/ringside/internal/abi"
)

func TestDevicesFromSysfs(t *testing.T) {
	const nic = "sys/class/infiniband/mlx5_0/"
	h := newHost(t, map[string]string{
		"sys/class/infiniband_verbs/abi_version":         "6",
		"sys/class/infiniband_verbs/uverbs1/ibdev":       "mlx5_0",
		"sys/class/infiniband_verbs/uverbs1/abi_version": "1",
		"sys/class/infiniband_verbs/uverbs1/dev":         "231:193",
		"sys/class/infiniband_verbs/uverbs0/ibdev":       "siw0",
		"sys/class/infiniband_verbs/uverbs0/dev":         "231:192",
		"sys/class/infiniband/siw0/node_type":            "4: RNIC",
		"sys/class/infiniband/siw0/ports/1/link_layer":   "Ethernet",
		nic + "node_type":                                "1: CA", nic + "node_guid": "0002:c903:00ab:0001", nic + "fw_ver": "22.31.1014",
		nic + "ports/1/link_layer": "Ethernet", nic + "ports/1/gid_attrs/ndevs/0": "eth0", nic + "ports/2/link_layer": "Ethernet",
		"sys/class/net/eth0": "", "sys/bus/pci/drivers/mlx5_core": "", nic + "device/vendor": "0x15b3",
	})
	if err := os.Symlink("../../../../bus/pci/drivers/mlx5_core", filepath.Join(h.class("infiniband", "mlx5_0"), "device/driver")); err != nil {
		t.Fatal(err)
	}
	want := []Device{
		{Name: "mlx5_0", Ports: 2, NodeType: 1, NodeGUID: 0x0002c90300ab0001, Protocol: "roce", Firmware: "22.31.1014",
			NetDevs: []string{"eth0"}, Chardev: "uverbs1", Major: 231, Minor: 193, ABI: 1, DriverID: abi.RDMA_DRIVER_MLX5, HasDriverID: true},
		{Name: "siw0", Ports: 1, NodeType: 4, Protocol: "iw", Chardev: "uverbs0", Major: 231, Minor: 192},
	}
	if d := cmp.Diff(want, h.devices()); d != "" {
		t.Error(d)
	}
	if l := newHost(t, nil).devices(); len(l) > 0 {
		t.Errorf("without a sysfs there are %v", l)
	}
}
