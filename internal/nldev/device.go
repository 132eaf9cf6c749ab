// Package nldev speaks the RDMA subsystem's part of netlink (NETLINK_RDMA, client RDMA_NL_NLDEV): it lists devices with
// their character devices and net devices, and adds and removes the kernel's software devices. Its imports are few,
// because a machine's process 1 is linked with it (test/soft-roce).
package nldev

// A Device is an RDMA device as the kernel describes it, before it is opened.
type Device struct {
	Name     string // "rxe0"
	Index    uint32 // of the kernel's list, if HasIndex
	HasIndex bool   // false: the kernel has not been asked
	Ports    uint32 // numbered from 1
	NodeType uint8  // RDMA_NODE_*: 1 is a channel adapter, 4 an RNIC
	NodeGUID uint64
	Protocol string // "roce", "iw", "ib"
	Firmware string // empty for software devices

	// NetDevs are the net devices that the ports stand on, in the order of ports, each once: as far as they are in this
	// network namespace. InfiniBand ports stand on none.
	NetDevs []string

	Chardev     string // "uverbs0"; empty: it cannot be used from user space
	Major       uint32 // the numbers of its node; both zero: not known
	Minor       uint32
	ABI         uint64 // version of the driver's interface
	DriverID    uint32 // enum rdma_driver_id
	HasDriverID bool   // false: the kernel does not tell
}

// Path is the device's node, by the name that udev gives it.
func (d *Device) Path() string { return "/dev/infiniband/" + d.Chardev }

// A System is what the RDMA subsystem says of itself.
type System struct {
	// NetNSExclusive: a device belongs to one network namespace, and nobody outside of it can use it. Otherwise all share
	// all devices, which is how the kernel starts.
	NetNSExclusive bool
	// CopyOnFork: fork copies pages that a device may access, so that a child process does not take them away. Kernels
	// before 5.12 do not, and say nothing.
	CopyOnFork bool
}
