package uverbs

import (
	"fmt"
	"syscall"

	"github.com/ringside-rdma/ringside/internal/driver"
)

// A CmdError is a command that the kernel refused. It matches its errno with errors.Is, and driver.ErrDeviceRemoved if the device is
// gone.
type CmdError struct {
	Device string // "rxe0"
	Op     string // "reg_mr", as the specification of verbs names it
	Errno  syscall.Errno
	Hint   string // what to do, if that is known
}

func (e *CmdError) Error() string {
	s := fmt.Sprintf("%s: %s: %v", e.Device, e.Op, e.Errno)
	if e.Hint != "" {
		s += " (" + e.Hint + ")"
	}
	return s
}

func (e *CmdError) Unwrap() []error {
	if e.Errno == syscall.EIO {
		return []error{e.Errno, driver.ErrDeviceRemoved}
	}
	return []error{e.Errno}
}
