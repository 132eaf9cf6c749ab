package softnic

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
)

// eventWaker is an eventfd: peers write to a duplicate of it, the sleeper parks on the runtime's netpoller.
type eventWaker struct {
	f       *os.File
	n       int           // the descriptor
	sleeper atomic.Int32  // waiters between their last look and their wake-up
	pending atomic.Bool   // a wake of this process that nobody has consumed yet
	turn    chan struct{} // held by the one waiter that reads
}

func newWaker() (waker, error) {
	n, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w (raise the limit on open files: ulimit -n)", err)
	}
	return &eventWaker{f: os.NewFile(uintptr(n), "eventfd"), n: n, turn: make(chan struct{}, 1)}, nil
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
	if w.pending.Swap(false) {
		return nil
	}
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, func() { w.f.SetReadDeadline(time.Unix(1, 0)) })
		defer func() {
			if !stop() {
				w.f.SetReadDeadline(time.Time{})
			}
		}()
	}
	var b [8]byte
	_, err := w.f.Read(b[:])
	switch {
	case err == nil:
		w.pending.Store(false) // who waits no longer leaves it to the next
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		w.f.SetReadDeadline(time.Time{}) // an earlier waiter's cancellation came late
		return nil
	case errors.Is(err, os.ErrClosed):
		return driver.ErrClosed
	}
	return err
}

func (w *eventWaker) close()  { w.f.Close() }
func (w *eventWaker) fd() int { return w.n }
