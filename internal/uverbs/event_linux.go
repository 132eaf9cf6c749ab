package uverbs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// An EventFile is a descriptor from which the kernel's events are read, one record a read: a completion channel, or a
// context's asynchronous events. Each event goes to one waiter, which is a goroutine on the runtime's netpoller (Wait) or a
// thread in poll(2) (WaitThread).
type EventFile struct {
	device string
	op     string
	n      int      // the descriptor; it does not block
	f      *os.File // owns n. The runtime believes that it blocks, so it is not on the netpoller
	bell   int      // an eventfd that ends the WaitThread in progress
	bellF  *os.File // owns bell
	turn   chan struct{}

	closed      atomic.Bool
	failure     atomic.Pointer[error]
	interrupted atomic.Bool // the next WaitThread returns nothing
	nudged      atomic.Bool // the next Wait returns nothing

	parked atomic.Pointer[os.File] // a duplicate on the netpoller, from a Wait until many WaitThreads later; changed with turn held
	unused int                     // WaitThreads since the last Wait; guarded by turn

	buf [maxRecord]byte // Wait's: the caller's would be moved to the heap; guarded by turn

	// WaitThread's, which must not allocate; guarded by turn.
	raw    syscall.RawConn
	sleep  func(fd uintptr)
	record []byte // where the event goes
	got    int    // its length; 0: interrupted
	err    error
}

// maxRecord is the length of the longest event.
const maxRecord = asyncEventSize

// NewEventFile takes fd, and closes it also when it fails. op names what waits, in errors.
func NewEventFile(fd int, device, op string) (*EventFile, error) {
	e := &EventFile{device: device, op: op, n: fd, f: os.NewFile(uintptr(fd), op), turn: make(chan struct{}, 1)}
	var err error
	if e.bell, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		e.f.Close()
		return nil, fmt.Errorf("%s: %s: eventfd: %w (raise the limit on open files: ulimit -n)", device, op, err)
	}
	e.bellF = os.NewFile(uintptr(e.bell), "eventfd")
	e.sleep = e.sleepThread
	if e.raw, err = e.f.SyscallConn(); err == nil {
		err = errors.Join(unix.SetNonblock(fd, true), unix.SetNonblock(e.bell, true)) // only now: see f
	}
	if err != nil {
		e.f.Close()
		e.bellF.Close()
		return nil, fmt.Errorf("%s: %s: %w", device, op, err)
	}
	return e, nil
}

// Wait reads the next event into record, and returns its length; after Nudge, 0 and no error. It ends with ctx, with
// net.ErrClosed on Close, and with what Fail was given.
func (e *EventFile) Wait(ctx context.Context, record []byte) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	select {
	case e.turn <- struct{}{}:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	defer func() { <-e.turn }()
	if err := e.over(); err != nil {
		return 0, err // and the descriptor may be closed
	}
	if err := e.park(); err != nil {
		return 0, err
	}
	f := e.parked.Load()
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })
		defer func() {
			if !stop() {
				f.SetReadDeadline(time.Time{})
			}
		}()
	}
	for {
		if err := e.over(); err != nil {
			return 0, err
		}
		if e.nudged.Swap(false) {
			return 0, nil
		}
		n, err := f.Read(e.buf[:min(len(record), maxRecord)])
		switch {
		case err == nil:
			return copy(record, e.buf[:n]), nil
		case e.over() != nil:
			return 0, e.over()
		case ctx.Err() != nil:
			return 0, ctx.Err()
		case errors.Is(err, os.ErrDeadlineExceeded):
			f.SetReadDeadline(time.Time{}) // a nudge, or an earlier waiter's cancellation came late
			if err := ctx.Err(); err != nil {
				return 0, err // or this one's came just now, and its deadline has been taken off, too
			}
		default:
			return 0, e.readError(err)
		}
	}
}

// readError makes an error of the kernel's, which ends the file's reading once the device is gone.
func (e *EventFile) readError(err error) error {
	if errors.Is(err, unix.EIO) || errors.Is(err, io.EOF) {
		return &CmdError{Device: e.device, Op: e.op, Errno: unix.EIO}
	}
	return fmt.Errorf("%s: %s: %w", e.device, e.op, err)
}

// over is why waiting has ended for good, or nil.
func (e *EventFile) over() error {
	if e.closed.Load() {
		return net.ErrClosed
	}
	if p := e.failure.Load(); p != nil {
		return *p
	}
	return nil
}

// keepParked is how many WaitThreads in a row leave the duplicate on the netpoller. Each event then wakes the runtime for
// nothing; but to give it up and make it again costs more, in programs that use both ways to wait.
const keepParked = 16

// Park is what the first Wait does beforehand, and what can fail of it: for who waits where nobody hears of an error.
func (e *EventFile) Park() error {
	e.turn <- struct{}{}
	defer func() { <-e.turn }()
	return e.park()
}

// park puts the file on the netpoller. Called with turn held.
func (e *EventFile) park() error {
	e.unused = 0
	if e.parked.Load() != nil {
		return nil
	}
	n, err := unix.FcntlInt(uintptr(e.n), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %s: duplicate of the descriptor: %w (raise the limit on open files: ulimit -n)", e.device, e.op, err)
	}
	e.parked.Store(os.NewFile(uintptr(n), e.op))
	return nil
}

// unpark takes the file off the netpoller. Called with turn held.
func (e *EventFile) unpark() {
	if p := e.parked.Swap(nil); p != nil {
		p.Close()
	}
}

// WaitThread is Wait that sleeps in a system call on the calling thread, see driver.ThreadWaiter. It returns 0 and no
// error after Interrupt. It does not allocate.
func (e *EventFile) WaitThread(record []byte) (int, error) {
	e.turn <- struct{}{}
	if e.unused++; e.unused > keepParked {
		e.unpark()
	}
	e.record, e.got, e.err = record, 0, nil
	for e.got == 0 && e.err == nil && e.over() == nil && !e.interrupted.Swap(false) {
		if err := e.raw.Control(e.sleep); err != nil {
			e.err = err // closed
		}
	}
	n, err := e.got, e.err
	if n == 0 && e.over() != nil {
		err = e.over()
	}
	e.record = nil
	<-e.turn
	return n, err
}

// sleepThread sleeps until there is an event, which it reads, or the bell rings. Called with turn held.
func (e *EventFile) sleepThread(fd uintptr) {
	fds := [2]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(e.bell), Events: unix.POLLIN}}
	if _, err := unix.Poll(fds[:], -1); err != nil {
		if err != unix.EINTR { // the runtime preempts threads with signals
			e.err = fmt.Errorf("%s: %s: poll: %w", e.device, e.op, err)
		}
		return
	}
	if fds[1].Revents != 0 {
		var b [8]byte
		unix.Read(e.bell, b[:])
	}
	if fds[0].Revents == 0 {
		return
	}
	switch n, err := unix.Read(int(fd), e.record); {
	case err == nil && n > 0:
		e.got = n
	case err == nil:
		e.err = e.readError(io.EOF)
	case err != unix.EAGAIN && err != unix.EINTR:
		e.err = e.readError(err)
	}
}

var bellRing = []byte{1, 0, 0, 0, 0, 0, 0, 0}

// Interrupt ends the WaitThread in progress or, if there is none, the next one. It never blocks.
func (e *EventFile) Interrupt() {
	e.interrupted.Store(true)
	e.bellF.Write(bellRing)
}

// Nudge ends the Wait in progress or, if there is none, the next one. It never blocks.
func (e *EventFile) Nudge() {
	e.nudged.Store(true)
	e.wakeParked()
}

// Fail ends every wait, now and later, with err: the device has gone, which this descriptor will not say.
func (e *EventFile) Fail(err error) {
	e.failure.CompareAndSwap(nil, &err)
	e.wake()
}

// wake makes the one that waits look at over: whoever looked before will be woken, and whoever comes later looks first.
func (e *EventFile) wake() {
	e.bellF.Write(bellRing)
	e.wakeParked()
}

// wakeParked makes the Wait in progress look at over and nudged. A Wait that takes the deadline for one of old, and takes it off,
// looks at them afterwards.
func (e *EventFile) wakeParked() {
	if p := e.parked.Load(); p != nil {
		p.SetReadDeadline(time.Unix(1, 0))
	}
}

// Close ends every wait with net.ErrClosed, and closes the descriptor.
func (e *EventFile) Close() error {
	if e.closed.Swap(true) {
		return nil
	}
	e.wake()
	e.turn <- struct{}{}
	e.unpark()
	err := e.f.Close()
	e.bellF.Close()
	<-e.turn
	return err
}
