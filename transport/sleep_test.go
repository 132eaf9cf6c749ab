package transport_test

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
)

// sleeper starts a goroutine that waits for w, and returns once it sleeps: in p's completion channel, unless the driver
// happens to be there.
func sleeper(t *testing.T, ctx context.Context, p *transport.Poller, w *transport.Waiter) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- p.Wait(ctx, w) }()
	testutil.Eventually(t, "a sleeper", func() bool { return p.Sleepers() == 1 })
	return done
}

func eventPoller(t *testing.T) *transport.Poller {
	t.Helper()
	transport.SleepInChannel(t)
	p, err := transport.NewPoller(transporttest.Context(t), &transport.PollerConfig{Mode: transport.Event})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// What ends a sleep in the completion channel besides a completion.
func TestChannelSleepEnds(t *testing.T) {
	t.Run("done by another goroutine", func(t *testing.T) {
		p := eventPoller(t)
		for range 20 {
			var w transport.Waiter
			done := sleeper(t, context.Background(), p, &w)
			w.Done()
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Run("context", func(t *testing.T) {
		p := eventPoller(t)
		for range 20 {
			ctx, cancel := context.WithCancel(t.Context())
			var w transport.Waiter
			done := sleeper(t, ctx, p, &w)
			cancel()
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
		}
	})
	t.Run("close", func(t *testing.T) {
		p := eventPoller(t)
		var w transport.Waiter
		done := sleeper(t, context.Background(), p, &w)
		if !p.Guarded() {
			t.Error("the first sleeper is not in the channel")
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Fatal(err)
		}
	})
}

// Waiters that sleep elsewhere while one guards the channel, and who is left when that one goes.
func TestGuardGoes(t *testing.T) {
	transport.SleepInChannel(t)
	a, b := transporttest.Pair(t, &transport.Config{PollMode: transport.Event})
	p := a.Poller()
	for i := range uint64(30) {
		var guard transport.Waiter
		guarding := sleeper(t, context.Background(), p, &guard)
		msg := pattern(100, i)
		got := make(chan error, 1)
		go func() {
			got <- a.Recv(context.Background(), func(m *transport.Message) error {
				if string(m.Bytes()) != string(msg) {
					return errors.New("differs")
				}
				return nil
			})
		}()
		if i%2 == 0 { // the guard leaves others asleep behind
			testutil.Eventually(t, "two sleepers", func() bool { return p.Sleepers() == 2 })
			guard.Done()
			if err := <-guarding; err != nil {
				t.Fatal(err)
			}
		}
		if err := b.Send(t.Context(), msg); err != nil {
			t.Fatal(err)
		}
		if err := <-got; err != nil {
			t.Fatal(err)
		}
		if i%2 != 0 {
			guard.Done()
			if err := <-guarding; err != nil {
				t.Fatal(err)
			}
		}
	}
}

// doneHandler completes a waiter for each message.
type doneHandler struct {
	w    atomic.Pointer[transport.Waiter]
	seen atomic.Int32
}

func (h *doneHandler) HandleMessage(*transport.Conn, *transport.Message) {
	if w := h.w.Swap(nil); w != nil {
		w.Done()
	}
	h.seen.Add(1)
}

func (h *doneHandler) HandleClose(*transport.Conn, error) {}

// The same when the one who guarded the channel handled what woke it, and found itself done.
func TestHandlerAfterGuardPolled(t *testing.T) {
	transport.SleepInChannel(t)
	a, b := transporttest.Pair(t, &transport.Config{PollMode: transport.Event})
	h := new(doneHandler)
	b.SetHandler(h)
	for i := range int32(10) {
		var w transport.Waiter
		h.w.Store(&w)
		done := sleeper(t, context.Background(), b.Poller(), &w)
		time.Sleep(20 * time.Millisecond) // the driver goes dormant
		for k := range int32(2) {
			if err := a.Send(t.Context(), []byte("x")); err != nil {
				t.Fatal(err)
			}
			testutil.Eventually(t, "the message is handled", func() bool { return h.seen.Load() == 2*i+k+1 })
			if k == 0 {
				if err := <-done; err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

// A connection with a handler is looked after when those who waited, and guarded the channel, have gone.
func TestHandlerAfterGuard(t *testing.T) {
	transport.SleepInChannel(t)
	a, b := transporttest.Pair(t, &transport.Config{PollMode: transport.Event})
	b.SetHandler(newEcho(t))
	for i := range uint64(20) {
		var w transport.Waiter
		done := sleeper(t, context.Background(), b.Poller(), &w)
		if i%2 == 0 {
			time.Sleep(time.Duration(i) * time.Millisecond) // long enough for the driver to go dormant, sometimes
		}
		w.Done()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		msg := pattern(64, i)
		if err := a.Send(t.Context(), msg); err != nil {
			t.Fatal(err)
		}
		recvEqual(t, a, msg)
	}
}
