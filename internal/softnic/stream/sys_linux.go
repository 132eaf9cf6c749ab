package stream

import (
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/softnic/readiness"
)

// sysSocket is a descriptor of the connection that is none of the Go runtime's poller: see package readiness.
type sysSocket struct {
	fd     int // -1: closed
	waiter *readiness.Waiter
}

func open(c *net.TCPConn) (system, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	if e := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); e != nil {
		return nil, e
	}
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	w, err := readiness.New(fd)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	c.SetNoDelay(true) // packets leave when they are flushed
	c.Close()
	return &sysSocket{fd, w}, nil
}

// outcome is what a system call that does not wait has said.
func outcome(n int, errno unix.Errno) (int, error) {
	switch errno {
	case 0:
		return n, nil
	case unix.EAGAIN, unix.EINTR:
		return 0, nil
	case unix.EBADF:
		return 0, net.ErrClosed
	}
	return 0, errno
}

func (y *sysSocket) wait(room bool) error { return y.waiter.Wait(room) }

func (y *sysSocket) setDeadline(t time.Time) { y.waiter.SetDeadline(t) }

func (y *sysSocket) shutdown() { unix.Shutdown(y.fd, unix.SHUT_RDWR) }

func (y *sysSocket) close() error {
	if y.fd < 0 {
		return net.ErrClosed
	}
	y.waiter.Close()
	fd := y.fd
	y.fd = -1
	return unix.Close(fd)
}
