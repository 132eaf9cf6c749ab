package softnic

import (
	"context"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
)

func openWaker(t *testing.T) *eventWaker {
	t.Helper()
	w, err := newWaker()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.close)
	return w.(*eventWaker)
}

// asleep waits until somebody sleeps on the waker; a little later the thread does so in the kernel.
func asleep(t *testing.T, w *eventWaker) {
	t.Helper()
	testutil.Eventually(t, "a sleeper", func() bool { return w.sleeper.Load() > 0 })
}

// Both ways to sleep, in turn, are ended by this process and by a peer that writes to the descriptor.
func TestWakerWays(t *testing.T) {
	w := openWaker(t)
	for i := range 40 {
		done := make(chan error, 1)
		go func() {
			if i&1 == 0 {
				done <- w.waitThread()
			} else {
				done <- w.wait(t.Context())
			}
		}()
		asleep(t, w)
		if i&2 == 0 {
			w.wake()
		} else {
			wakeFD(w.fd())
		}
		if err := <-done; err != nil {
			t.Fatal(i, err)
		}
		if i&1 == 0 && w.parked != nil {
			t.Fatal("the netpoller still watches a descriptor that a thread sleeps on")
		}
	}
}

// A wake that comes before the sleep counts, once.
func TestWakerRemembers(t *testing.T) {
	w := openWaker(t)
	w.wake()
	w.wake()
	if err := w.waitThread(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.wait(ctx) }()
	asleep(t, w)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

// A peer may read the descriptor that it is to write to. Wakes get lost, but closing never hangs.
func TestWakerDrainedByPeer(t *testing.T) {
	for range 5 {
		w, err := newWaker()
		if err != nil {
			t.Fatal(err)
		}
		dup, err := unix.FcntlInt(uintptr(w.fd()), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			var b [8]byte
			for {
				select {
				case <-stop:
					return
				default:
					unix.Read(dup, b[:])
				}
			}
		}()
		done := make(chan error, 1)
		go func() { done <- w.waitThread() }()
		asleep(t, w.(*eventWaker))
		w.close()
		if err := <-done; !errors.Is(err, driver.ErrClosed) {
			t.Error("sleep in a closed waker:", err)
		}
		if err := w.waitThread(); !errors.Is(err, driver.ErrClosed) {
			t.Error("sleep in a closed waker:", err)
		}
		w.wake() // goes nowhere
		close(stop)
		<-stopped
		unix.Close(dup)
	}
}

func TestWaitThreadDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	w := openWaker(t)
	if n := testing.AllocsPerRun(100, func() {
		wakeFD(w.fd()) // as a peer: the way through poll and read
		if err := w.waitThread(); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
