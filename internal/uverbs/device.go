package uverbs

import "errors"

// ErrNoSubsystem: the kernel knows nothing of RDMA.
var ErrNoSubsystem = errors.New("this kernel has no RDMA subsystem: its module ib_core is not loaded or not built")

// A Device is an RDMA device as the kernel describes it, before it is opened.
type Device struct {
	Name     string // "rxe0"
	Index    uint32 // of the kernel's list
	Ports    uint32 // numbered from 1
	NodeType uint8  // RDMA_NODE_*: 1 is a channel adapter, 4 an RNIC
	NodeGUID uint64
	Protocol string // "roce", "iw", "ib"
	Firmware string // empty for software devices

	Chardev     string // "uverbs0"; empty: it cannot be used from user space
	ABI         uint64 // version of the driver's interface
	DriverID    uint32 // enum rdma_driver_id
	HasDriverID bool   // false: the kernel does not tell
}

// Path is the device's node, by the name that udev gives it.
func (d *Device) Path() string { return "/dev/infiniband/" + d.Chardev }
