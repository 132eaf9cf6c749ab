package softnic

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
)

// eventWaker is an eventfd: peers write to a duplicate of it. The sleeper is a thread in poll(2), or a goroutine on the
// runtime's netpoller.
type eventWaker struct {
	// f is the descriptor n, and does not close it while somebody uses it. The runtime believes that it blocks, so it is
	// not on the netpoller, which would wake another thread whenever a sleeping one is woken.
	f       *os.File
	n       int
	sleeper atomic.Int32 // waiters between their last look and their wake-up
	pending atomic.Bool  // a wake that nobody has consumed yet
	closed  atomic.Bool
	turn    chan struct{} // held by the one waiter that reads; guards what follows

	parked  *os.File // a duplicate on the netpoller, from a wait until the next waitThread
	raw     syscall.RawConn
	poll    func(fd uintptr) // pollThread, made once so that nothing allocates
	pollErr error            // its result
}

func newWaker() (waker, error) {
	n, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w (raise the limit on open files: ulimit -n)", err)
	}
	w := &eventWaker{f: os.NewFile(uintptr(n), "eventfd"), n: n, turn: make(chan struct{}, 1)}
	w.poll = w.pollThread
	if w.raw, err = w.f.SyscallConn(); err == nil {
		err = unix.SetNonblock(n, true) // only now: see f
	}
	if err != nil {
		w.f.Close()
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return w, nil
}

var one = []byte{1, 0, 0, 0, 0, 0, 0, 0}

// wake makes the system call only if somebody sleeps.
func (w *eventWaker) wake() {
	w.pending.Store(true)
	if w.sleeper.Load() > 0 {
		w.f.Write(one)
	}
}

func (w *eventWaker) wait(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case w.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-w.turn }()
	w.sleeper.Add(1)
	defer w.sleeper.Add(-1)
	if w.closed.Load() {
		return driver.ErrClosed
	}
	if w.pending.Swap(false) {
		return nil
	}
	if err := w.park(); err != nil {
		return err
	}
	f := w.parked
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })
		defer func() {
			if !stop() {
				f.SetReadDeadline(time.Time{})
			}
		}()
	}
	var b [8]byte
	_, err := f.Read(b[:])
	switch {
	case w.closed.Load():
		return driver.ErrClosed
	case err == nil:
		w.pending.Store(false) // who waits no longer leaves it to the next
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		f.SetReadDeadline(time.Time{}) // an earlier waiter's cancellation came late
		return nil
	}
	return err
}

// park puts the eventfd on the netpoller. Called with turn held.
func (w *eventWaker) park() error {
	if w.parked != nil {
		return nil
	}
	n, err := unix.FcntlInt(uintptr(w.n), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("duplicate of an eventfd: %w (raise the limit on open files: ulimit -n)", err)
	}
	w.parked = os.NewFile(uintptr(n), "eventfd")
	return nil
}

// unpark takes the eventfd off the netpoller. Called with turn held.
func (w *eventWaker) unpark() {
	if w.parked != nil {
		w.parked.Close()
		w.parked = nil
	}
}

func (w *eventWaker) waitThread() error {
	w.turn <- struct{}{}
	w.unpark()
	w.sleeper.Add(1)
	for w.pollErr == nil && !w.pending.Swap(false) {
		if err := w.raw.Control(w.poll); err != nil {
			w.pollErr = err // closed
		}
	}
	w.sleeper.Add(-1)
	err := w.pollErr
	w.pollErr = nil
	if w.closed.Load() {
		err = driver.ErrClosed
	}
	<-w.turn
	return err
}

// pollThread sleeps until the eventfd is written to, and passes that on to pending. Called with turn held.
func (w *eventWaker) pollThread(fd uintptr) {
	fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(fds[:], -1); err != nil {
		if err != unix.EINTR { // the runtime preempts threads with signals
			w.pollErr = fmt.Errorf("poll: %w", err)
		}
		return
	}
	var b [8]byte
	switch _, err := unix.Read(int(fd), b[:]); err {
	case nil:
		w.pending.Store(true)
	case unix.EAGAIN, unix.EINTR: // a peer may have read it: it is shared
	default:
		w.pollErr = fmt.Errorf("read of an eventfd: %w", err)
	}
}

func (w *eventWaker) close() {
	w.closed.Store(true)
	for {
		w.f.Write(one) // again and again: a peer may read what was meant for our sleeper
		select {
		case w.turn <- struct{}{}:
			w.unpark()
			w.f.Close()
			<-w.turn
			return
		case <-time.After(time.Millisecond):
		}
	}
}

func (w *eventWaker) fd() int { return w.n }
