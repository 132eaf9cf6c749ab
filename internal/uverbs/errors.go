package uverbs

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/ringside-rdma/ringside/internal/driver"
)

// Why there is no device to use. Errors of this package match these with errors.Is, and say in words what to do. The first
// two also match driver.ErrAbsent: nothing is broken.
var (
	// ErrNoSubsystem: the kernel knows nothing of RDMA.
	ErrNoSubsystem error = absence("this kernel has no RDMA subsystem: its module ib_core is not loaded (`modprobe ib_core`), or not built")
	// ErrNoDevices: there is no RDMA device, or none of the kind that was asked for.
	ErrNoDevices error = absence("no RDMA device")
	// ErrNoUserAccess: there are RDMA devices, but no character devices of them.
	ErrNoUserAccess = errors.New("no RDMA device can be used from user space")
	// ErrNoNode: the device's node is not in /dev, or is another's.
	ErrNoNode = errors.New("the device has no node")
	// ErrNoPermission: the node is not for this user.
	ErrNoPermission = errors.New("no permission for the device's node")
	// ErrOtherNetNS: the device belongs to another network namespace.
	ErrOtherNetNS = errors.New("the device is in another network namespace")
	// ErrCgroup: a control group forbids to open the device, or to open it once more.
	ErrCgroup = errors.New("a control group of this process forbids it")
)

// An absence is an error that is driver.ErrAbsent, too.
type absence string

func (a absence) Error() string        { return string(a) }
func (a absence) Is(target error) bool { return target == driver.ErrAbsent }

// An OpenError is a device that could not be opened. It matches its reason and its errno with errors.Is.
type OpenError struct {
	Device string // "rxe0"
	Path   string // of its node
	Errno  syscall.Errno
	Reason error  // ErrNoNode, ErrNoPermission, ErrOtherNetNS, ErrCgroup or driver.ErrDeviceRemoved
	Remedy string // what to do; may be empty
}

func (e *OpenError) Error() string {
	s := fmt.Sprintf("%s: open %s: %v (%v)", e.Device, e.Path, e.Reason, e.Errno)
	if e.Remedy != "" {
		s += ": " + e.Remedy
	}
	return s
}

func (e *OpenError) Unwrap() []error { return []error{e.Reason, e.Errno} }

// A CmdError is a command that the kernel refused; its text says what to do. It matches its errno with errors.Is,
// driver.ErrDeviceRemoved if the device is gone, and driver.ErrUnreachable if there is no way to a peer.
type CmdError struct {
	Device string // "rxe0"
	Op     string // "reg_mr", as the specification of verbs names it
	Errno  syscall.Errno
	Hint   string // what to do, if more is known than from the command and its errno

	path bool // the command had to find the way to a peer
}

func (e *CmdError) Error() string {
	s := fmt.Sprintf("%s: %s: %v", e.Device, e.Op, e.Errno)
	h := e.Hint
	if h == "" {
		h = hint(e.Device, e.Op, e.Errno)
	}
	if h != "" {
		s += " (" + h + ")"
	}
	return s
}

func (e *CmdError) Unwrap() []error {
	switch e.Errno {
	case syscall.EIO:
		return []error{e.Errno, driver.ErrDeviceRemoved}
	case syscall.EHOSTUNREACH, syscall.ENETUNREACH:
		return []error{e.Errno, driver.ErrUnreachable}
	case syscall.ETIMEDOUT, syscall.ENETDOWN: // no neighbour has answered in time, or the net device is down; of other commands the device
		if e.path {
			return []error{e.Errno, driver.ErrUnreachable}
		}
	}
	return []error{e.Errno}
}
