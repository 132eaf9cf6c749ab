package verbs

import (
	"fmt"
	"net"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Errors to decide by, with errors.Is. An object that was closed answers with net.ErrClosed, what a device cannot do
// with errors.ErrUnsupported.
var (
	// ErrBusy: the object is still used by others that were made from it; close those first.
	ErrBusy = driver.ErrBusy
	// ErrQueueFull: the work queue has no room; poll completions, or ask for a deeper queue.
	ErrQueueFull = driver.ErrQueueFull
	// ErrState: the QP's state does not allow the operation.
	ErrState = driver.ErrState
	// ErrDeviceRemoved: the device has gone; its objects can only be closed.
	ErrDeviceRemoved = driver.ErrDeviceRemoved
	// ErrInvalidWR: a work request's fields do not fit together or exceed the QP's limits.
	ErrInvalidWR = driver.ErrInvalidWR
	// ErrUnreachable: the address names no device that can be reached.
	ErrUnreachable = driver.ErrUnreachable
)

// An OpError is the failure of a verb on a device.
type OpError struct {
	Op     string // the verb, as the kernel names it: "create_cq"
	Device string // "soft0"; empty if none was involved
	Err    error  // the cause: a sentinel such as ErrBusy, a syscall.Errno, or something that wraps one
}

func (e *OpError) Error() string {
	if e.Device == "" {
		return "verbs: " + e.Op + ": " + e.Err.Error()
	}
	return "verbs: " + e.Op + " on " + e.Device + ": " + e.Err.Error()
}

func (e *OpError) Unwrap() error { return e.Err }

// opErr wraps err, unless it is nil.
func opErr(op, device string, err error) error {
	if err == nil {
		return nil
	}
	return &OpError{Op: op, Device: device, Err: err}
}

// A WCError is a work request that ended badly. It unwraps to the completion's status, so that
// errors.Is(err, ib.WCRetryExceeded) works.
type WCError struct {
	Op string // what the request was for, in the words of whoever posted it; may be empty
	WC ib.WC  // the completion
}

func (e *WCError) Error() string {
	op := e.Op
	if op == "" {
		op = "work request"
	}
	s := fmt.Sprintf("verbs: %s (id %d, qp %d): %s", op, e.WC.ID, e.WC.QPN, e.WC.Status)
	if e.WC.VendorErr != 0 {
		s += fmt.Sprintf(" (vendor error %#x)", e.WC.VendorErr)
	}
	return s
}

func (e *WCError) Unwrap() error { return e.WC.Status }

// CheckWC returns nil if the request of wc succeeded, and a *WCError otherwise.
func CheckWC(op string, wc *ib.WC) error {
	if wc.Status == ib.WCSuccess {
		return nil
	}
	return &WCError{Op: op, WC: *wc}
}

// Made once, because the data path must not allocate.
var (
	errPollClosed = &OpError{Op: "poll_cq", Err: net.ErrClosed}
	errArmClosed  = &OpError{Op: "req_notify_cq", Err: net.ErrClosed}
)
