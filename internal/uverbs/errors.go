package uverbs

import (
	"errors"
	"fmt"
	"syscall"
)

// ErrRemoved is matched by the error of every command to a device that is gone.
var ErrRemoved = errors.New("device was removed")

// A CmdError is a command that the kernel refused. It matches its errno with errors.Is, and ErrRemoved if the device is
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
		return []error{e.Errno, ErrRemoved}
	}
	return []error{e.Errno}
}
