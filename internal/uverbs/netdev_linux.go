package uverbs

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/Mellanox/rdmamap"
)

// DevicesOfNetDev returns the names of the RDMA devices on a net device, sorted: several, if several drivers stand on it.
// The kernel tells it for net devices that ports stand on. For those above them, a VLAN or IPoIB interface, rdmamap looks
// through GID tables and GUIDs, and names one of the devices that match. None is ErrNoDevices.
func DevicesOfNetDev(ifname string) ([]string, error) {
	return devicesOfNetDev(ifname, Devices, rdmamap.GetRdmaDeviceForNetdevice)
}

func devicesOfNetDev(ifname string, devices func() ([]Device, error), byMap func(string) (string, error)) ([]string, error) {
	list, err := devices()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, d := range list {
		if slices.Contains(d.NetDevs, ifname) {
			names = append(names, d.Name)
		}
	}
	if len(names) > 0 {
		return names, nil
	}
	var name string
	if err := guard(func() (err error) { name, err = byMap(ifname); return }); err != nil {
		return nil, fmt.Errorf("%w on net device %s: %w", ErrNoDevices, ifname, err)
	}
	// GID tables have names of net devices in all network namespaces, and an "eth0" is in each: a device with Ethernet
	// ports, none of which stands on a net device of this namespace, was mistaken for that of another.
	i := slices.IndexFunc(list, func(d Device) bool { return d.Name == name })
	if i < 0 || len(list[i].NetDevs) == 0 && list[i].Protocol != protocolIB {
		return nil, fmt.Errorf("%w on net device %s: `rdma link add rxe0 type rxe netdev %[2]s` makes one, in software", ErrNoDevices, ifname)
	}
	return []string{name}, nil
}

// protocolIB is Device.Protocol of InfiniBand.
const protocolIB = "ib"

// CharDevices returns the paths of the character devices that belong to an RDMA device, sorted: what a container needs to
// be given to use it. These are those for verbs (uverbsN), for connections (rdma_cm, which is one for all devices), and for
// subnet management (umadN and issmN of each port), which only programs that do that need. The paths are udev's; that
// there is a node is checked for rdma_cm only. Nil: the device is not there, or user space cannot use it.
func CharDevices(rdmaDevice string) []string {
	return theHost.charDevices(rdmaDevice, rdmamap.GetRdmaCharDevices)
}

func (h *host) charDevices(rdmaDevice string, byMap func(string) []string) []string {
	var paths []string
	for _, class := range []string{classVerbs, classMAD, classCM} {
		// rdmamap stops at the first of each kind, and a device has one of subnet management for each port.
		for _, name := range h.chardevsOf(class, rdmaDevice) {
			paths = append(paths, filepath.Join(h.dev, name))
		}
	}
	if len(paths) == 0 {
		return nil // rdmamap answers with rdma_cm even for a device that does not exist
	}
	_ = guard(func() error { paths = append(paths, byMap(rdmaDevice)...); return nil })
	slices.Sort(paths)
	return slices.Compact(paths)
}

var errMap = errors.New("rdmamap has panicked")

// guard calls fn, which calls rdmamap. That slices what the kernel answers without a look at its length: a hardware address
// of an InfiniBand interface that is shorter than 12 bytes, a node GUID that is empty because the device is on its way out.
func guard(fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errMap, p)
		}
	}()
	return fn()
}
