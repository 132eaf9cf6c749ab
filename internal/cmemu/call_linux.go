package cmemu

import (
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// A call is a command that is being executed.
type call struct {
	c     *Channel
	in    []byte // what follows the header: all of it, whatever that says
	inLen int    // what it says
	out   uint16 // room for the response
	file  func(fd int) (*Channel, bool)
}

// commands are what there is, by number.
var commands = [...]func(*call) syscall.Errno{
	abi.RDMA_USER_CM_CMD_CREATE_ID:     createID,
	abi.RDMA_USER_CM_CMD_DESTROY_ID:    destroyID,
	abi.RDMA_USER_CM_CMD_BIND_IP:       bindIP,
	abi.RDMA_USER_CM_CMD_RESOLVE_IP:    resolveIP,
	abi.RDMA_USER_CM_CMD_RESOLVE_ROUTE: resolveRoute,
	abi.RDMA_USER_CM_CMD_QUERY_ROUTE:   queryRoute,
	abi.RDMA_USER_CM_CMD_CONNECT:       connect,
	abi.RDMA_USER_CM_CMD_LISTEN:        listen,
	abi.RDMA_USER_CM_CMD_ACCEPT:        accept,
	abi.RDMA_USER_CM_CMD_REJECT:        reject,
	abi.RDMA_USER_CM_CMD_DISCONNECT:    disconnect,
	abi.RDMA_USER_CM_CMD_INIT_QP_ATTR:  initQPAttr,
	abi.RDMA_USER_CM_CMD_GET_EVENT:     getEvent,
	abi.RDMA_USER_CM_CMD_SET_OPTION:    setOption,
	abi.RDMA_USER_CM_CMD_NOTIFY:        notify,
	abi.RDMA_USER_CM_CMD_LEAVE_MCAST:   leaveMulticast,
	abi.RDMA_USER_CM_CMD_MIGRATE_ID:    migrateID,
	abi.RDMA_USER_CM_CMD_QUERY:         query,
	abi.RDMA_USER_CM_CMD_BIND:          bind,
	abi.RDMA_USER_CM_CMD_RESOLVE_ADDR:  resolveAddr,
	abi.RDMA_USER_CM_CMD_JOIN_MCAST:    joinMulticast,
}

const headerSize = 8

// Write executes one command: b is all that the client has written, header and payload, and on success, which is 0, all of it was
// taken. It never waits: GET_EVENT without an event is EAGAIN. file says which channel a file descriptor of the client's is, for
// MIGRATE_ID, and whether it is open; without, that is EBADF. One that is not open is ENOENT, and a file of another kind, for which the
// channel is nil, EINVAL.
func (c *Channel) Write(b []byte, file func(fd int) (*Channel, bool)) syscall.Errno {
	if len(b) < headerSize {
		return unix.EINVAL
	}
	h := structOf[abi.CMCmdHdr](b)
	if h.Cmd >= uint32(len(commands)) || headerSize+int(h.In) > len(b) {
		return unix.EINVAL
	}
	f := commands[h.Cmd]
	if f == nil {
		return unix.ENOSYS
	}
	return f(&call{c: c, in: b[headerSize:], inLen: int(h.In), out: h.Out, file: file})
}

// arg reads the command's argument. As the kernel does, it goes by what was written, not by the header; false: that is less.
func arg[T any](w *call) (T, bool) {
	var v T
	b := bytesOf(&v)
	return v, copy(b, w.in) == len(b)
}

// argFor is arg for a command whose response has size bytes.
func argFor[T any](w *call, size int) (T, syscall.Errno) {
	v, ok := arg[T](w)
	switch {
	case int(w.out) < size:
		return v, unix.ENOSPC
	case !ok:
		return v, unix.EINVAL
	}
	return v, 0
}

// argAtLeast reads an argument that has grown: of least bytes, by the header, the rest is zero.
func argAtLeast[T any](w *call, least int) (T, bool) {
	v := structOf[T](w.in[:w.inLen])
	return v, w.inLen >= least
}

func (w *call) write(va uint64, b []byte) syscall.Errno {
	if w.c.mem.WriteAt(b, va) != nil {
		return unix.EFAULT
	}
	return 0
}

// with executes a command of an ID, one at a time.
func (w *call) with(num uint32, f func(*id) syscall.Errno) syscall.Errno {
	m := w.c.m
	m.mu.Lock()
	x, errno := w.c.find(num)
	m.mu.Unlock()
	if errno != 0 {
		return errno
	}
	x.run.Lock()
	defer x.run.Unlock()
	m.mu.Lock()
	dead := x.dead
	m.mu.Unlock()
	if dead {
		return unix.ENOENT
	}
	return f(x)
}

// withDevice is with for commands that take an ID with a device.
func (w *call) withDevice(num uint32, f func(*id) syscall.Errno) syscall.Errno {
	return w.with(num, func(x *id) syscall.Errno {
		if x.at.dev == nil {
			return unix.EINVAL
		}
		return f(x)
	})
}

// find returns the channel's ID of a number. Called with m.mu held.
func (c *Channel) find(num uint32) (*id, syscall.Errno) {
	x := c.m.ids[num]
	switch {
	case x == nil:
		return nil, unix.ENOENT
	case x.ch != c:
		return nil, unix.EINVAL
	}
	return x, 0
}
