package uverbs

import (
	"context"
	"errors"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/internal/uverbs/uverbstest"
)

// newPipe is an EventFile whose kernel is the test.
func newPipe(t *testing.T) (*EventFile, int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	e, err := NewEventFile(p[0], "test0", "get_cq_event")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close(); unix.Close(p[1]) })
	return e, p[1]
}

func put(t *testing.T, fd int, b byte) {
	t.Helper()
	if _, err := unix.Write(fd, []byte{b, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Error(err)
	}
}

func TestEventWait(t *testing.T) {
	e, w := newPipe(t)
	var b [8]byte
	put(t, w, 1)
	if n, err := e.Wait(t.Context(), b[:]); n != 8 || err != nil || b[0] != 1 {
		t.Error(n, err, b)
	}
	go func() { time.Sleep(time.Millisecond); put(t, w, 2) }()
	if n, err := e.Wait(t.Context(), b[:]); n != 8 || err != nil || b[0] != 2 {
		t.Error(n, err, b)
	}
	// A context that ends does so without taking an event along, whenever it does.
	for i := range 200 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i%50)*time.Microsecond)
		if n, err := e.Wait(ctx, b[:]); n != 0 || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(n, err)
		}
		cancel()
	}
	put(t, w, 3)
	if n, err := e.WaitThread(b[:]); n != 8 || err != nil || b[0] != 3 {
		t.Error(n, err, b)
	}
	go func() { time.Sleep(time.Millisecond); put(t, w, 4) }()
	if n, err := e.WaitThread(b[:]); n != 8 || err != nil || b[0] != 4 {
		t.Error(n, err, b)
	}
	put(t, w, 5)
	if n, err := e.Wait(t.Context(), b[:]); n != 8 || err != nil || b[0] != 5 {
		t.Error(n, err, b)
	}
}

// lateContext ends while somebody asks whether it has.
type lateContext struct {
	context.Context
	end   context.CancelFunc
	armed atomic.Bool
}

func (c *lateContext) Err() error {
	err := c.Context.Err()
	if c.armed.Swap(false) {
		c.end()
		time.Sleep(20 * time.Millisecond) // for what goes on because of that
	}
	return err
}

// A context may end just when Wait takes off a deadline that meant somebody else: both are one deadline of the descriptor.
func TestEventWaitEndsBesideANudge(t *testing.T) {
	e, _ := newPipe(t)
	var b [8]byte
	for range 2 { // the first puts the file on the netpoller
		inner, cancel := context.WithCancel(t.Context())
		defer cancel()
		ctx := &lateContext{Context: inner, end: cancel}
		ended := make(chan error, 1)
		go func() {
			_, err := e.Wait(ctx, b[:])
			ended <- err
		}()
		testutil.Eventually(t, "it waits", func() bool { return e.parked.Load() != nil })
		ctx.armed.Store(true)
		e.wakeParked() // as a Nudge that was taken before it got this far
		select {
		case err := <-ended:
			if !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
		case <-time.After(testutil.Patience):
			t.Fatal("it goes on though its context has ended")
		}
	}
}

func TestEventNudge(t *testing.T) {
	e, w := newPipe(t)
	var b [8]byte
	for range 2 { // off and on the netpoller
		e.Nudge()
		if n, err := e.Wait(t.Context(), b[:]); n != 0 || err != nil {
			t.Error(n, err)
		}
	}
	// However a nudge meets a Wait, that ends.
	for i := range 1000 {
		go func() {
			for range i % 50 {
				runtime.Gosched()
			}
			e.Nudge()
		}()
		if n, err := e.Wait(t.Context(), b[:]); n != 0 || err != nil {
			t.Fatal(n, err)
		}
	}
	// Nudges cost no event.
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				e.Nudge()
				runtime.Gosched()
			}
		}
	})
	for i := range 1000 {
		put(t, w, byte(i))
		n, err := 0, error(nil)
		for n == 0 && err == nil {
			n, err = e.Wait(t.Context(), b[:])
		}
		if n != 8 || err != nil || b[0] != byte(i) {
			t.Fatal(n, err, b)
		}
	}
	close(stop)
	wg.Wait()
}

// Both ways to wait, in turn, cost no memory and keep the descriptor on the netpoller; one of them alone takes it off.
func TestEventAlternates(t *testing.T) {
	e, w := newPipe(t)
	var b [8]byte
	event := []byte{1, 0, 0, 0, 0, 0, 0, 0}
	ctx := context.Background()
	f := func() {
		for _, wait := range [](func() (int, error)){
			func() (int, error) { return e.Wait(ctx, b[:]) },
			func() (int, error) { return e.WaitThread(b[:]) },
			func() (int, error) { return e.WaitThread(b[:]) },
		} {
			if _, err := unix.Write(w, event); err != nil {
				t.Fatal(err)
			}
			if n, err := wait(); n != 8 || err != nil {
				t.Fatal(n, err)
			}
		}
	}
	f()
	if n := testing.AllocsPerRun(100, f); n != 0 {
		t.Errorf("%v allocations", n)
	}
	for range keepParked {
		put(t, w, 1)
		e.WaitThread(b[:])
	}
	if e.parked.Load() != nil {
		t.Error("the descriptor is on the netpoller still")
	}
	f()
}

func TestEventInterrupt(t *testing.T) {
	e, w := newPipe(t)
	var b [8]byte
	e.Interrupt() // before: the next one ends
	if n, err := e.WaitThread(b[:]); n != 0 || err != nil {
		t.Error(n, err)
	}
	for range 100 {
		go e.Interrupt()
		if n, err := e.WaitThread(b[:]); n != 0 || err != nil {
			t.Error(n, err)
		}
	}
	put(t, w, 1)
	if n, err := e.WaitThread(b[:]); n != 8 || err != nil {
		t.Error(n, err)
	}
	event := make([]byte, 8)
	if n := testing.AllocsPerRun(100, func() { unix.Write(w, event); e.WaitThread(b[:]) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Close and Fail end every wait, whichever kind, wherever it is.
func TestEventEnd(t *testing.T) {
	removed := &CmdError{Device: "test0", Op: "x", Errno: unix.EIO}
	for range 50 {
		for name, end := range map[string]func(*EventFile) error{
			"close": func(e *EventFile) error { e.Close(); return net.ErrClosed },
			"fail":  func(e *EventFile) error { e.Fail(removed); return driver.ErrDeviceRemoved },
		} {
			for _, thread := range []bool{false, true} {
				e, _ := newPipe(t)
				var wg sync.WaitGroup
				errs := make([]error, 3)
				for i := range errs {
					if thread && i > 0 {
						break
					}
					wg.Go(func() {
						var b [8]byte
						if thread {
							_, errs[i] = e.WaitThread(b[:])
						} else {
							_, errs[i] = e.Wait(context.Background(), b[:])
						}
					})
				}
				runtime.Gosched()
				want := end(e)
				wg.Wait()
				for i, err := range errs {
					if (!thread || i == 0) && !errors.Is(err, want) {
						t.Fatalf("%s, thread %t: %v", name, thread, err)
					}
				}
				if _, err := e.Wait(t.Context(), make([]byte, 8)); !errors.Is(err, want) {
					t.Fatalf("after %s: %v", name, err)
				}
				e.Close()
			}
		}
	}
}

// The kernel's end of file is the device's.
func TestEventEOF(t *testing.T) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	e, err := NewEventFile(p[0], "test0", "get_async_event")
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	unix.Close(p[1])
	if _, err := e.Wait(t.Context(), make([]byte, 8)); !errors.Is(err, driver.ErrDeviceRemoved) {
		t.Error(err)
	}
	if _, err := e.WaitThread(make([]byte, 8)); !errors.Is(err, driver.ErrDeviceRemoved) {
		t.Error(err)
	}
}

// newAsync is a context whose asynchronous events come from fd, which it takes.
func newAsync(t *testing.T, fd int) (*Context, error) {
	k := &uverbstest.Kernel{Method: func(id uint32, _ uverbstest.Attrs) syscall.Errno {
		if id == 0x00020000 { // QUERY_PORT
			return 0
		}
		return uverbstest.AsUsual
	}}
	k.Init(t, 1)
	unix.Close(k.Async[0])
	k.Async[0] = fd
	return NewContext(NewFile(k, "test0", 1), nil, nil)
}

// A context whose events cannot be waited for is not made.
func TestAsyncWithoutDescriptors(t *testing.T) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[1])
	e, _ := newPipe(t)
	e.Nudge()
	e.Wait(t.Context(), make([]byte, 8)) // the netpoller has its own descriptors
	var free [4]int                      // the kernel's pipe, of which one goes back; the bell; one too many
	for i := range free {
		fd, err := unix.FcntlInt(uintptr(p[1]), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		free[i] = fd
	}
	for _, fd := range free {
		unix.Close(fd)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(free[2]), Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	c, err := newAsync(t, p[0])
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, unix.EMFILE) {
		t.Error(err)
	}
	if _, err := unix.FcntlInt(uintptr(p[0]), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("the events' descriptor is left: %v", err)
	}
}

// What ends the events is said to who waits for them.
func TestAsyncUnreadable(t *testing.T) {
	fd, err := unix.Open("/", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	c, err := newAsync(t, fd)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
	defer cancel()
	if _, err := c.AsyncEvent(ctx); !errors.Is(err, unix.EISDIR) {
		t.Error(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.AsyncEvent(ctx); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}
