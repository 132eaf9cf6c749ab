package mlx5emu

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// What one client may have, so that it exhausts neither the process that emulates devices nor, of what a device has a number of, its other
// clients. All of it is more than programs have, and QUERY_DEVICE tells what it can tell.

// An objectKind is what sort of object a handle is for.
type objectKind int

const (
	objectPD objectKind = iota
	objectMR
	objectMW
	objectAH
	objectCQ
	objectQP
	objectSRQ
	objectUAR
	objectFlow
	objectKinds
)

// maxObjects are those of each kind that a context may have.
var maxObjects = [objectKinds]int{objectPD: 1 << 12, objectMR: 1 << 14, objectMW: 1 << 14, objectAH: 1 << 12, objectCQ: 1 << 12, objectQP: 1 << 12, objectSRQ: 1 << 10, objectUAR: maxDynamic,
	objectFlow: 1 << 10}

const (
	maxContexts   = 1 << 8    // of a device: each has descriptors, a thread and addresses of this process
	maxChannels   = 1 << 12   // of a context: each is a descriptor
	maxRecvMemory = 256 << 20 // bytes of receive queues of a context: the software NIC keeps about as much for them
	maxUnread     = 1 << 13   // events of a file that the client does not read: then the oldest go, as nobody will miss them
)

func kindOf(o object) objectKind {
	switch o.(type) {
	case *pd:
		return objectPD
	case *mr:
		return objectMR
	case *mw:
		return objectMW
	case *ah:
		return objectAH
	case *cq:
		return objectCQ
	case *qp:
		return objectQP
	case *srq:
		return objectSRQ
	case *flow:
		return objectFlow
	}
	return objectUAR
}

// takeRecvMemory accounts for n bytes of receive queues, if the client may have them.
func (c *Context) takeRecvMemory(n uint64) bool {
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	if c.recvMemory+n > maxRecvMemory {
		return false
	}
	c.recvMemory += n
	return true
}

func (c *Context) putRecvMemory(n uint64) {
	c.dev.mu.Lock()
	c.recvMemory -= n
	c.dev.mu.Unlock()
}

// room reports with ENOMEM, as drivers do, that the client has all that it may of a kind. Commands of the same client that are
// executed at the same time may each find that there is room for one.
func (c *Context) room(k objectKind) syscall.Errno {
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	if c.counts[k] >= maxObjects[k] {
		return unix.ENOMEM
	}
	return 0
}
