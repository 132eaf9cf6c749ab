package seccomp

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/procmem"
)

// ErrWithdrawn means that nobody waits for the answer to a call any more: the caller was killed, or, before Linux 5.19, a signal
// has come, after which it makes the call again.
var ErrWithdrawn = errors.New("the caller has gone")

// A Listener receives the calls of a program and of all that it has started. Receive is for one goroutine; calls may be answered by
// any.
type Listener struct {
	fd   int
	stop [2]int // a pipe that Stop closes one end of

	stopOnce, closeOnce sync.Once
}

func newListener(fd int) (*Listener, error) {
	l := &Listener{fd: fd}
	if err := unix.Pipe2(l.stop[:], unix.O_CLOEXEC); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("a pipe: %w", err)
	}
	return l, nil
}

// ErrTaken means that the caller has a file of this number already.
var ErrTaken = errors.New("the file descriptor's number is taken")

// ErrLimit means that the caller may not have file descriptors of this number (RLIMIT_NOFILE).
var ErrLimit = errors.New("the file descriptor's number is over the limit")

// A Call is a system call that waits for an answer: exactly one of Continue, Return, Fail, Restart, ReturnFD and ReturnFDAt, of
// which the error is ErrWithdrawn if it came too late.
type Call struct {
	Number int // unix.SYS_*
	Args   [6]uint64
	TID    int // the thread that calls

	l  *Listener
	id uint64
}

// Receive waits for a call. It returns nil when nobody is left who could make one, or after Stop.
func (l *Listener) Receive() (*Call, error) {
	for {
		fds := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}, {Fd: int32(l.stop[0]), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			return nil, fmt.Errorf("waiting for calls: %w", err)
		}
		switch {
		case fds[1].Revents != 0:
			return nil, nil
		case fds[0].Revents&unix.POLLIN != 0:
		case fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0:
			return nil, nil
		default:
			continue
		}
		var n notif
		switch e := recvNotif(l.fd, &n); e {
		case 0:
			return &Call{Number: int(n.call), Args: n.args, TID: int(n.tid), l: l, id: n.id}, nil
		case unix.EINTR, unix.ENOENT: // ENOENT: the caller was gone before we had it
		default:
			return nil, fmt.Errorf("receiving a call: %w", e)
		}
	}
}

// Stop ends Receive, now and later. It may be called again, and while Receive waits.
func (l *Listener) Stop() { l.stopOnce.Do(func() { unix.Close(l.stop[1]) }) }

// Close gives the descriptors back, after Receive has ended and all calls that it has returned were answered. Calls that nobody has
// received, and that are made later, fail with ENOSYS. It may be called again.
func (l *Listener) Close() {
	l.Stop()
	l.closeOnce.Do(func() {
		unix.Close(l.fd)
		unix.Close(l.stop[0])
	})
}

// Valid reports whether the caller still waits, so that what was found out under its number is about it, and not about another that
// has the number since.
func (c *Call) Valid() bool { return idValid(c.l.fd, c.id) }

// Memory opens the memory of the caller. The caller of Memory closes it.
func (c *Call) Memory() (*procmem.Memory, error) {
	m, err := procmem.Open(c.TID)
	if !c.Valid() {
		if err == nil {
			m.Close()
		}
		return nil, ErrWithdrawn
	}
	return m, err
}

// Continue has the kernel do the call after all.
func (c *Call) Continue() error {
	return c.answer(response{id: c.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE})
}

// Return ends the call with the value v.
func (c *Call) Return(v int64) error { return c.answer(response{id: c.id, val: v}) }

// Fail ends the call with an errno.
func (c *Call) Fail(e syscall.Errno) error { return c.answer(response{id: c.id, err: -int32(e)}) }

// erestartsys is the kernel's ERESTARTSYS, which programs never see: what a call ends with that waits, if a signal comes.
const erestartsys = 512

// Restart ends the call for the sake of a signal: after that it begins anew, or fails with EINTR, as the program has it for the signal
// (SA_RESTART). The kernel must have told the calling thread of one, or to stop: if there is none, the program gets errno 512.
func (c *Call) Restart() error { return c.Fail(erestartsys) }

func (c *Call) answer(r response) error {
	switch e := sendResponse(c.l.fd, &r); e {
	case 0:
		return nil
	case unix.ENOENT, unix.EINPROGRESS: // EINPROGRESS: it is on its way back already
		return ErrWithdrawn
	default:
		return fmt.Errorf("answering a call: %w", e)
	}
}

// ReturnFD ends the call with a duplicate of fd in the caller, closed by execve if cloexec. The descriptor is there, and the call
// has returned it, or neither.
func (c *Call) ReturnFD(fd int, cloexec bool) error {
	_, err := c.add(addfd{flags: unix.SECCOMP_ADDFD_FLAG_SEND, src: uint32(fd)}, cloexec)
	return err
}

// ReturnFDAt is ReturnFD with the number that the descriptor gets. After ErrTaken and ErrLimit, the call still waits for an answer.
// What the caller does at the same time is not seen: if another thread of it, or another ReturnFDAt, takes the number between the
// look for that and the end of the call, its file is closed.
func (c *Call) ReturnFDAt(fd, number int, cloexec bool) error {
	var st unix.Stat_t
	if unix.Lstat(fmt.Sprintf("/proc/%d/fd/%d", c.TID, number), &st) == nil {
		return fmt.Errorf("%w: process %d, file %d", ErrTaken, c.TID, number)
	}
	a := addfd{flags: unix.SECCOMP_ADDFD_FLAG_SEND | unix.SECCOMP_ADDFD_FLAG_SETFD, src: uint32(fd), target: uint32(number)}
	_, err := c.add(a, cloexec)
	switch {
	case errors.Is(err, unix.EBUSY): // an open that has not ended yet
		return fmt.Errorf("%w: process %d, file %d", ErrTaken, c.TID, number)
	case errors.Is(err, unix.EBADF):
		return fmt.Errorf("%w: process %d, file %d", ErrLimit, c.TID, number)
	}
	return err
}

// AddFD makes a duplicate of fd in the caller, which still waits, and returns its number there.
func (c *Call) AddFD(fd int, cloexec bool) (int, error) {
	return c.add(addfd{src: uint32(fd)}, cloexec)
}

func (c *Call) add(a addfd, cloexec bool) (int, error) {
	a.id = c.id
	if cloexec {
		a.targetFlag = unix.O_CLOEXEC
	}
	switch n, e := addFD(c.l.fd, &a); e {
	case 0:
		return n, nil
	case unix.ENOENT, unix.EINPROGRESS:
		return -1, ErrWithdrawn
	default:
		return -1, fmt.Errorf("a descriptor for process %d: %w", c.TID, e)
	}
}

// String reads a string of the caller's that ends with a zero, of up to PATH_MAX bytes, as arguments that are paths have it. What
// is not there, or is longer, is cut: the kernel has an errno for it.
func (c *Call) String(va uint64) (string, error) {
	var b [unix.PathMax]byte
	n := 0
	for n < len(b) {
		k := min(len(b)-n, int(4096-(va+uint64(n))&4095)) // the next page may be nobody's
		local := []unix.Iovec{{Base: &b[n]}}
		local[0].SetLen(k)
		got, err := unix.ProcessVMReadv(c.TID, local, []unix.RemoteIovec{{Base: uintptr(va) + uintptr(n), Len: k}}, 0)
		if err != nil || got <= 0 {
			if errors.Is(err, unix.EPERM) {
				return "", fmt.Errorf("memory of process %d: %w: the system forbids tracing (kernel.yama.ptrace_scope must be 0 or 1)", c.TID, err)
			}
			break
		}
		if i := bytes.IndexByte(b[n:n+got], 0); i >= 0 {
			n += i
			break
		}
		n += got
	}
	if !c.Valid() {
		return "", ErrWithdrawn
	}
	return string(b[:n]), nil
}
