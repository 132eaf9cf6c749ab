package rdmacm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/ringside-rdma/ringside/internal/driver"
)

// Why an ID is done; see ID.Done. Others are driver.ErrDeviceRemoved, net.ErrClosed, *RejectedError and *EventError.
var (
	// ErrDisconnected: one of the two sides has ended the connection.
	ErrDisconnected = errors.New("disconnected")
	// ErrTimewaitExit: the connection has been over for long enough that its QP number can be used again.
	ErrTimewaitExit = errors.New("the connection is over, and its timewait as well")
)

// ErrAbandoned: an earlier wait of the ID was ended by its context, so that nobody knows what state the kernel has it in.
// It can only be closed.
var ErrAbandoned = errors.New("an earlier operation was abandoned: close this ID and take a new one")

// An OpError is an operation that failed: all errors of Channel, ID, Request and Listener are one. Err is an errno of the
// kernel, a *RejectedError, an *EventError, a sentinel, or the context's error.
type OpError struct {
	Op     string         // "resolve_addr", as the kernel names it; "connection" if it ended by itself
	Local  netip.AddrPort // as far as it is known
	Remote netip.AddrPort // as far as it is known
	Err    error
}

func (e *OpError) Error() string {
	s := "rdma_cm: " + e.Op
	switch {
	case e.Local.IsValid() && e.Remote.IsValid():
		s += fmt.Sprintf(" %v -> %v", e.Local, e.Remote)
	case e.Remote.IsValid():
		s += fmt.Sprintf(" -> %v", e.Remote)
	case e.Local.IsValid():
		s += fmt.Sprintf(" %v", e.Local)
	}
	s += ": " + e.Err.Error()
	if h := e.hint(); h != "" {
		s += " (" + h + ")"
	}
	return s
}

// Unwrap is Err. What the kernel says about IDs whose device has gone is driver.ErrDeviceRemoved as well.
func (e *OpError) Unwrap() []error {
	if errno, ok := e.Err.(syscall.Errno); ok && (errno == syscall.EIO || errno == syscall.ENXIO) {
		return []error{errno, driver.ErrDeviceRemoved}
	}
	return []error{e.Err}
}

// hint is what to do.
func (e *OpError) hint() string {
	errno, _ := e.Err.(syscall.Errno)
	binds := e.Op == "bind" || e.Op == "resolve_addr" || e.Op == "listen"
	switch {
	case e.Remote.Addr().IsLoopback() && e.Err != errClosed && e.Err != ErrDisconnected: // which can be, where the kernel is an emulated one
		return "the loopback address does not work with RDMA: take an interface's own address"
	case errno == syscall.EACCES && binds && e.Local.Port() > 0 && e.Local.Port() < 1024:
		return "ports below 1024 need CAP_NET_BIND_SERVICE; or this process has changed its credentials since it opened the channel"
	case errno == syscall.EACCES:
		return "this process has changed its user, group or capabilities since it opened the channel: open it afterwards"
	case binds && (errno == syscall.ENODEV || errno == syscall.EADDRNOTAVAIL):
		return "no RDMA device stands on that address: rdma link shows the devices and their net devices"
	case binds && errno == syscall.EADDRINUSE:
		return "another ID has that port"
	case errno == syscall.EINVAL && (e.Op == "connect" || e.Op == "accept" || e.Op == "reject"):
		return "out of order, the peer has gone, no such QP (iWARP), or too much private data: InfiniBand and RoCE carry " +
			"56 bytes with a request, 196 with its acceptance, 148 with its rejection"
	case errno == syscall.EINVAL:
		return "out of order: an address, then a route, then a connection"
	case errno == syscall.EIO || errno == syscall.ENXIO:
		return "the device was removed"
	case errno == syscall.ENOSYS:
		return "this kernel is too old for it"
	case errors.Is(e.Err, context.DeadlineExceeded):
		switch e.Op {
		case "resolve_addr":
			return "nobody answers for that address: is it routed over an RDMA device, and is the host up?"
		case "resolve_route":
			return "no answer about the path: is a subnet manager running?"
		case "connect", "accept":
			return "no answer from the peer: is its program still there, and does UDP port 4791 pass?"
		}
	}
	return ""
}

// A RejectedError is a peer, or a peer's kernel, that refused the connection. It matches syscall.ECONNREFUSED with
// errors.Is. One of Reason, SIDR and Errno is set.
type RejectedError struct {
	Reason Reason        // InfiniBand and RoCE, port space TCP
	SIDR   SIDRStatus    // port space UDP
	Errno  syscall.Errno // iWARP: ECONNREFUSED if nobody listens, ECONNRESET if the program said no
	// PrivateData came with the rejection, where it was a program's: as much as the message can carry on InfiniBand and
	// RoCE, where its own length is not known.
	PrivateData []byte
}

func (e *RejectedError) Error() string {
	switch {
	case e.Reason == ReasonInvalidServiceID || e.SIDR == SIDRUnsupported:
		return fmt.Sprintf("rejected: %s: nobody listens on that port and address", e.why())
	case e.Reason == ReasonStaleConnection:
		return fmt.Sprintf("rejected: %s: take a fresh QP", e.why())
	case e.Reason == ReasonInvalidGID:
		return fmt.Sprintf("rejected: %s: the peer's listener stands on another device or address", e.why())
	case e.ByPeer():
		return fmt.Sprintf("rejected by the program on the other side: %s", e.why())
	}
	return "rejected: " + e.why()
}

func (e *RejectedError) why() string {
	switch {
	case e.Reason != 0:
		return fmt.Sprintf("%v (reason %d)", e.Reason, uint16(e.Reason))
	case e.SIDR != 0:
		return fmt.Sprintf("%v (status %d)", e.SIDR, uint8(e.SIDR))
	case e.Errno != 0:
		return e.Errno.Error()
	}
	return "no reason given"
}

// ByPeer reports whether a program refused the connection, and not the system below it. A program that ends, or closes
// its listener, with the request unanswered counts as one.
func (e *RejectedError) ByPeer() bool {
	return e.Reason == ReasonConsumer || e.SIDR == SIDRRejected || e.Errno == syscall.ECONNRESET
}

// Data is PrivateData, for driver.CMRejection.
func (e *RejectedError) Data() []byte { return e.PrivateData }

func (e *RejectedError) Unwrap() []error {
	if e.Errno != 0 && e.Errno != syscall.ECONNREFUSED {
		return []error{syscall.ECONNREFUSED, e.Errno}
	}
	return []error{syscall.ECONNREFUSED}
}

// An EventError is an event by which the kernel says that an address, a route or a peer cannot be reached. It matches
// its errno and driver.ErrUnreachable.
type EventError struct {
	Event  EventType
	Status int32 // a negative errno of Linux
}

func (e *EventError) Error() string {
	what := [...]string{
		EventAddrError:    "the address cannot be resolved",
		EventRouteError:   "there is no route",
		EventConnectError: "the connection could not be made",
		EventUnreachable:  "the peer does not answer",
	}
	s := e.Event.String()
	if uint64(e.Event) < uint64(len(what)) && what[e.Event] != "" {
		s = what[e.Event]
	}
	switch errno := e.errno(); {
	case errno != 0:
		s += ": " + errno.Error()
	case e.Status != 0:
		s += fmt.Sprintf(": status %d", e.Status)
	}
	switch e.errno() {
	case syscall.ENODEV, syscall.EADDRNOTAVAIL:
		s += " (no RDMA device stands on the way to that address)"
	}
	return s
}

func (e *EventError) errno() syscall.Errno {
	if e.Status < 0 && e.Status > -4096 {
		return syscall.Errno(-e.Status)
	}
	return 0
}

func (e *EventError) Unwrap() []error {
	if errno := e.errno(); errno != 0 {
		return []error{errno, driver.ErrUnreachable}
	}
	return []error{driver.ErrUnreachable}
}

// errClosed is what everything of a closed object returns.
var errClosed = net.ErrClosed

// errWaiting: two operations of one ID at the same time.
var errWaiting = fmt.Errorf("another operation of this ID is still waiting: %w", driver.ErrBusy)
