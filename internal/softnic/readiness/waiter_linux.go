package readiness

import (
	"errors"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Waiter waits for one descriptor, for one goroutine at a time; SetDeadline and Close are for any.
type Waiter struct {
	fd    int
	epoll *os.File
	look  syscall.RawConn
	ready func(fd uintptr) bool
	want  uint32        // what is waited for
	armed bool          // the epoll descriptor looks: what comes would wake somebody
	rest  func(uintptr) // has it look away
}

// New returns a Waiter for fd, which stays the caller's and is closed after the Waiter.
func New(fd int) (*Waiter, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	unix.SetNonblock(ep, true) // so that the runtime waits for it
	w := &Waiter{fd: fd, epoll: os.NewFile(uintptr(ep), "epoll")}
	if w.look, err = w.epoll.SyscallConn(); err != nil {
		w.epoll.Close()
		return nil, err
	}
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLONESHOT}); err != nil {
		w.epoll.Close()
		return nil, os.NewSyscallError("epoll_ctl", err)
	}
	events := make([]unix.EpollEvent, 1)
	w.ready = func(ep uintptr) bool {
		if !w.armed {
			w.armed = true
			if unix.EpollCtl(int(ep), unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: w.want | unix.EPOLLONESHOT}) != nil {
				return true
			}
		}
		n, _ := unix.EpollWait(int(ep), events, 0)
		w.armed = n == 0
		return n > 0
	}
	w.rest = func(ep uintptr) {
		w.armed = false
		unix.EpollCtl(int(ep), unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: unix.EPOLLONESHOT})
	}
	return w, nil
}

// SetDeadline bounds a Wait, also one that waits already; a zero time does not.
func (w *Waiter) SetDeadline(t time.Time) { w.epoll.SetReadDeadline(t) }

// Wait waits until the descriptor can be read, or, with room, written, or has failed. It ends with os.ErrDeadlineExceeded at the
// deadline, and with net.ErrClosed when the Waiter is closed.
func (w *Waiter) Wait(room bool) error {
	w.want = unix.EPOLLIN
	if room {
		w.want |= unix.EPOLLOUT
	}
	err := w.look.Read(w.ready)
	if w.armed { // the deadline has come
		w.look.Control(w.rest)
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return net.ErrClosed
	}
	return err
}

// Close ends a Wait that waits.
func (w *Waiter) Close() error { return w.epoll.Close() }
