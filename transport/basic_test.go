package transport_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
)

// fill writes bytes that depend on the seed and the position.
func fill(b []byte, seed uint64) {
	x := seed*0x9e3779b97f4a7c15 + 1
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
}

func pattern(n int, seed uint64) []byte {
	b := make([]byte, n)
	fill(b, seed)
	return b
}

func recvEqual(t *testing.T, c *transport.Conn, want []byte) {
	t.Helper()
	err := c.Recv(t.Context(), func(m *transport.Message) error {
		if !bytes.Equal(m.Bytes(), want) {
			return fmt.Errorf("message of %d bytes differs from the one of %d that was sent", len(m.Bytes()), len(want))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func modes(t *testing.T, f func(t *testing.T, cfg *transport.Config)) {
	for _, m := range []transport.PollMode{transport.Adaptive, transport.Busy, transport.Event} {
		t.Run(m.String(), func(t *testing.T) { f(t, &transport.Config{PollMode: m}) })
	}
	t.Run("shared", func(t *testing.T) { f(t, &transport.Config{SharedReceive: true}) })
	t.Run("tiny", func(t *testing.T) {
		f(t, &transport.Config{SendDepth: 2, RecvDepth: 2, RendezvousDepth: 1, EagerSize: 256})
	})
}

func TestSizes(t *testing.T) {
	modes(t, func(t *testing.T, cfg *transport.Config) {
		cfg.MaxMessage = 1 << 20
		a, b := transporttest.Pair(t, cfg)
		in, eager := a.InlineSize(), a.EagerSize()
		for i, n := range []int{0, 1, 63, 64, 65, in - 1, in, in + 1, eager - 1, eager, eager + 1, 65536, 1<<20 - 1, 1 << 20} {
			msg := pattern(n, uint64(i))
			for _, d := range [][2]*transport.Conn{{a, b}, {b, a}} {
				if err := d[0].Send(t.Context(), msg); err != nil {
					t.Fatalf("send %d: %v", n, err)
				}
				recvEqual(t, d[1], msg)
			}
		}
		if err := a.Send(t.Context(), make([]byte, 1<<20+1)); !errors.Is(err, transport.ErrTooLarge) {
			t.Fatalf("a message over the maximum: %v", err)
		}
		if _, err := a.TryAlloc(1<<20 + 1); !errors.Is(err, transport.ErrTooLarge) {
			t.Fatalf("TryAlloc over the maximum: %v", err)
		}
		if _, err := a.Alloc(t.Context(), -1); !errors.Is(err, transport.ErrTooLarge) {
			t.Fatalf("Alloc(-1): %v", err)
		}
	})
}

func TestMaxMessageIsTheSmallerOne(t *testing.T) {
	a, b := transporttest.PairConfig(t, &transport.Config{MaxMessage: 1000, EagerSize: 512}, &transport.Config{MaxMessage: 5000, EagerSize: 4096})
	for _, c := range []*transport.Conn{a, b} {
		if c.MaxMessage() != 1000 || c.EagerSize() != 512 {
			t.Errorf("MaxMessage %d, EagerSize %d", c.MaxMessage(), c.EagerSize())
		}
	}
	for i, n := range []int{512, 513, 1000} {
		msg := pattern(n, uint64(i))
		if err := b.Send(t.Context(), msg); err != nil {
			t.Fatal(err)
		}
		recvEqual(t, a, msg)
	}
}

// TestBothWaysSlowReaders sends more than all windows hold, both ways at once, to readers that begin late and dawdle.
func TestBothWaysSlowReaders(t *testing.T) {
	modes(t, func(t *testing.T, cfg *transport.Config) {
		cfg.MaxMessage = 64 << 10
		a, b := transporttest.Pair(t, cfg)
		count := 600
		if testing.Short() || raceEnabled {
			count = 200
		}
		sizes := []int{8, 100, 300, 2000, 8192, 20000, 64 << 10}
		var wg sync.WaitGroup
		run := func(f func() error) {
			wg.Add(1)
			go func() {
				defer wg.Done()
				if err := f(); err != nil {
					t.Error(err)
				}
			}()
		}
		for _, d := range [][2]*transport.Conn{{a, b}, {b, a}} {
			run(func() error {
				for i := range count {
					msg := pattern(sizes[i%len(sizes)], uint64(i))
					binary.LittleEndian.PutUint64(msg, uint64(i))
					if err := d[0].Send(t.Context(), msg); err != nil {
						return fmt.Errorf("send %d: %w", i, err)
					}
				}
				return nil
			})
			run(func() error {
				time.Sleep(20 * time.Millisecond)
				for i := range count {
					if i%100 == 50 {
						time.Sleep(time.Millisecond)
					}
					want := pattern(sizes[i%len(sizes)], uint64(i))
					binary.LittleEndian.PutUint64(want, uint64(i))
					err := d[1].Recv(t.Context(), func(m *transport.Message) error {
						if !bytes.Equal(m.Bytes(), want) {
							return errors.New("differs, or came out of order")
						}
						return nil
					})
					if err != nil {
						return fmt.Errorf("receive %d: %w", i, err)
					}
				}
				return nil
			})
		}
		wg.Wait()
	})
}

// echo is a handler that sends everything back.
type echo struct {
	t      testing.TB
	closed chan error
	eof    atomic.Int32
}

func newEcho(t testing.TB) *echo { return &echo{t: t, closed: make(chan error, 1)} }

func (e *echo) HandleMessage(c *transport.Conn, m *transport.Message) {
	n := len(m.Bytes())
	b, err := c.TryAlloc(n)
	if err == nil {
		copy(b.Bytes(), m.Bytes())
		if err := c.Post(b, n); err != nil && c.Err() == nil && !errors.Is(err, transport.ErrWriteClosed) {
			e.t.Errorf("post: %v", err)
		}
		return
	}
	if !errors.Is(err, transport.ErrWouldBlock) {
		return
	}
	m.Take()
	go func() {
		defer m.Release()
		if b, err := c.Alloc(context.Background(), n); err == nil {
			copy(b.Bytes(), m.Bytes())
			c.Post(b, n)
		}
	}()
}
func (e *echo) HandleClose(c *transport.Conn, err error) { e.closed <- err }
func (e *echo) HandleEOF(c *transport.Conn)              { e.eof.Add(1) }

func TestHandlerEchoManyGoroutines(t *testing.T) {
	modes(t, func(t *testing.T, cfg *transport.Config) {
		a, b := transporttest.Pair(t, cfg)
		b.SetHandler(newEcho(t))
		workers, each := 16, 100
		if testing.Short() {
			each = 30
		}
		var sent, got sync.Map
		var wg sync.WaitGroup
		for w := range workers {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for i := range each {
					msg := pattern(16+(w*37+i*11)%1500, uint64(w*each+i))
					sent.Store(string(msg), true)
					if err := a.Send(t.Context(), msg); err != nil {
						t.Error(err)
						return
					}
					err := a.Recv(t.Context(), func(m *transport.Message) error {
						got.Store(string(m.Bytes()), true)
						return nil
					})
					if err != nil {
						t.Error(err)
						return
					}
				}
			}()
		}
		wg.Wait()
		n := 0
		got.Range(func(k, _ any) bool {
			n++
			if _, ok := sent.Load(k); !ok {
				t.Error("a message came back that was not sent")
				return false
			}
			return true
		})
		if n != workers*each {
			t.Errorf("%d different messages of %d came back", n, workers*each)
		}
	})
}

func TestHandlerGetsWhatCameBefore(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	for i := range 10 {
		if err := a.Send(t.Context(), []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	testutil.Eventually(t, "messages queued", func() bool { return b.Poller().Poll() == 0 })
	h := &collector{closed: make(chan error, 1)}
	b.SetHandler(h)
	for i := 10; i < 20; i++ {
		if err := a.Send(t.Context(), []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	testutil.Eventually(t, "20 messages", func() bool { return len(h.all()) == 20 })
	for i, m := range h.all() {
		if m[0] != byte(i) {
			t.Fatalf("message %d is %d", i, m[0])
		}
	}
	if err := b.Recv(t.Context(), nil); !errors.Is(err, transport.ErrHandlerSet) {
		t.Errorf("Recv beside a handler: %v", err)
	}
}

type collector struct {
	mu     sync.Mutex
	msgs   [][]byte
	closed chan error
}

func (h *collector) HandleMessage(c *transport.Conn, m *transport.Message) {
	h.mu.Lock()
	h.msgs = append(h.msgs, bytes.Clone(m.Bytes()))
	h.mu.Unlock()
}
func (h *collector) HandleClose(c *transport.Conn, err error) { h.closed <- err }
func (h *collector) all() [][]byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.msgs
}

func TestTakeHoldsTheWindow(t *testing.T) {
	for _, shared := range []bool{false, true} {
		a, b := transporttest.Pair(t, &transport.Config{RecvDepth: 4, SendDepth: 4, SharedReceive: shared})
		var held []*transport.Message
		for i := range 4 {
			if err := a.Send(t.Context(), pattern(100, uint64(i))); err != nil {
				t.Fatal(err)
			}
			b.Recv(t.Context(), func(m *transport.Message) error { held = append(held, m.Take()); return nil })
		}
		// The window is used up: further messages are queued at the sender, and do not reach b.
		for i := 4; i < 8; i++ {
			if err := a.Send(t.Context(), pattern(100, uint64(i))); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if err := b.Recv(ctx, func(*transport.Message) error { return nil }); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("a message beyond the window: %v", err)
		}
		cancel()
		// Each release lets one more in, although three are still held.
		for i := 4; i < 8; i++ {
			m := held[0]
			held = held[1:]
			if !bytes.Equal(m.Bytes(), pattern(100, uint64(i-4))) {
				t.Fatal("a taken message changed")
			}
			m.Release()
			b.Recv(t.Context(), func(m *transport.Message) error {
				if !bytes.Equal(m.Bytes(), pattern(100, uint64(i))) {
					t.Errorf("message %d differs", i)
				}
				held = append(held, m.Take())
				return nil
			})
		}
		for _, m := range held {
			m.Release()
		}
		func() {
			defer func() {
				if recover() == nil {
					t.Error("a second Release did not panic")
				}
			}()
			held[0].Release()
		}()
	}
}

func TestSendBufMisuse(t *testing.T) {
	a, _ := transporttest.Pair(t, nil)
	b, err := a.TryAlloc(10)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Post(b, 11); !errors.Is(err, transport.ErrTooLarge) {
		t.Errorf("posting more than was asked for: %v", err)
	}
	for name, f := range map[string]func(){"post": func() { a.Post(b, 1) }, "discard": b.Discard} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s of a buffer that is gone did not panic", name)
				}
			}()
			f()
		}()
	}
}

func TestCloseDeliversWhatWasSent(t *testing.T) {
	modes(t, func(t *testing.T, cfg *transport.Config) {
		a, b := transporttest.Pair(t, cfg)
		n := 30
		go func() {
			for i := range n {
				if err := a.Send(context.Background(), pattern(10+i*1000, uint64(i))); err != nil {
					t.Error(err)
				}
			}
			a.Close()
		}()
		for i := range n {
			recvEqual(t, b, pattern(10+i*1000, uint64(i)))
		}
		if err := b.Recv(t.Context(), func(*transport.Message) error { return nil }); err != io.EOF {
			t.Errorf("after the last message: %v", err)
		}
		<-b.Done()
		if err := b.Err(); !errors.Is(err, transport.ErrPeerClosed) {
			t.Errorf("b ended with %v", err)
		}
		if err := b.Send(t.Context(), []byte("x")); !errors.Is(err, transport.ErrPeerClosed) {
			t.Errorf("send to a closed peer: %v", err)
		}
		if err := a.Send(t.Context(), []byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("send after Close: %v", err)
		}
		if err := a.Recv(t.Context(), nil); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Recv after Close: %v", err)
		}
	})
}

func TestHalfClose(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	h := newEcho(t)
	b.SetHandler(h)
	for i := range 5 {
		if err := a.Send(t.Context(), pattern(3000*i, uint64(i))); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := a.Send(t.Context(), nil); !errors.Is(err, transport.ErrWriteClosed) {
		t.Errorf("send after CloseWrite: %v", err)
	}
	for i := range 5 {
		recvEqual(t, a, pattern(3000*i, uint64(i)))
	}
	testutil.Eventually(t, "HandleEOF", func() bool { return h.eof.Load() == 1 })
	if err := b.Send(t.Context(), []byte("still open")); err != nil {
		t.Fatal(err)
	}
	recvEqual(t, a, []byte("still open"))
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := a.Recv(t.Context(), func(*transport.Message) error { return nil }); err != io.EOF {
		t.Errorf("after the peer's Close: %v", err)
	}
	if err := <-h.closed; !errors.Is(err, net.ErrClosed) {
		t.Errorf("HandleClose: %v", err)
	}
}

func TestAbortReason(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	h := newEcho(t)
	b.SetHandler(h)
	a.Abort(errors.New("out of \x01 cheese"))
	err := <-h.closed
	var ce *transport.CloseError
	if !errors.Is(err, transport.ErrPeerClosed) || !errors.As(err, &ce) || !ce.Remote || ce.Reason != "out of ? cheese" {
		t.Errorf("b ended with %#v", err)
	}
	<-a.Done()
}

// TestCloseWhileBusy closes either end in the middle of traffic: every call ends.
func TestCloseWhileBusy(t *testing.T) {
	modes(t, func(t *testing.T, cfg *transport.Config) {
		cfg.Linger = 200 * time.Millisecond
		for round := range 6 {
			a, b := transporttest.Pair(t, cfg)
			if round%2 == 0 {
				b.SetHandler(newEcho(t))
			}
			var wg sync.WaitGroup
			for w := range 8 {
				wg.Add(1)
				go func() {
					defer wg.Done()
					for i := range 1 << 20 {
						if a.Send(context.Background(), pattern((w*i)%20000, 1)) != nil {
							return
						}
						if w < 4 && a.Recv(context.Background(), func(m *transport.Message) error { return nil }) != nil {
							return
						}
					}
				}()
			}
			time.Sleep(time.Duration(round) * time.Millisecond)
			if round%3 == 0 {
				b.Close()
			} else {
				a.Close()
			}
			wg.Wait()
			a.Close()
			b.Close()
		}
	})
}

func TestHeldPastClose(t *testing.T) {
	for _, shared := range []bool{false, true} {
		a, b := transporttest.Pair(t, &transport.Config{SharedReceive: shared})
		var held []*transport.Message
		for i, n := range []int{10, 600, 50000} {
			if err := a.Send(t.Context(), pattern(n, uint64(i))); err != nil {
				t.Fatal(err)
			}
			b.Recv(t.Context(), func(m *transport.Message) error { held = append(held, m.Take()); return nil })
		}
		buf, err := b.TryAlloc(5000)
		if err != nil {
			t.Fatal(err)
		}
		b.Close()
		fill(buf.Bytes(), 1) // the memory is still ours
		if err := b.Post(buf, 10); !errors.Is(err, net.ErrClosed) {
			t.Errorf("post after Close: %v", err)
		}
		for i, n := range []int{10, 600, 50000} {
			if !bytes.Equal(held[i].Bytes(), pattern(n, uint64(i))) {
				t.Error("a message held past Close changed")
			}
			held[i].Release()
		}
	}
}

func TestRecvContext(t *testing.T) {
	modes(t, func(t *testing.T, cfg *transport.Config) {
		a, b := transporttest.Pair(t, cfg)
		for range 20 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			if err := b.Recv(ctx, nil); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("Recv: %v", err)
			}
			cancel()
		}
		a.Send(t.Context(), []byte("x"))
		recvEqual(t, b, []byte("x"))
	})
}

// TestSendContext fills the window, so that senders wait, and ends their contexts: what was not sent stays unsent.
func TestSendContext(t *testing.T) {
	a, b := transporttest.Pair(t, &transport.Config{SendDepth: 4, RecvDepth: 4})
	for _, n := range []int{100, 4000, 20000} {
		sent := 0
		for {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			err := a.Send(ctx, pattern(n, uint64(sent)))
			cancel()
			if errors.Is(err, context.DeadlineExceeded) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			sent++
		}
		for i := range sent {
			recvEqual(t, b, pattern(n, uint64(i)))
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		if err := b.Recv(ctx, func(*transport.Message) error { return nil }); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("a message whose Send failed arrived: %v", err)
		}
		cancel()
	}
}

// slowHandler is in each message until it may go on.
type slowHandler struct {
	entered, goOn chan struct{}
	returned      atomic.Bool
}

func (h *slowHandler) HandleMessage(*transport.Conn, *transport.Message) {
	h.entered <- struct{}{}
	<-h.goOn
	h.returned.Store(true)
}

func (h *slowHandler) HandleClose(*transport.Conn, error) {}

// What is given to Do runs behind a handler that runs, and does not keep its giver.
func TestDoIsBetweenHandlers(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	h := &slowHandler{entered: make(chan struct{}), goOn: make(chan struct{})}
	b.SetHandler(h)
	if err := a.Send(t.Context(), []byte("hold on")); err != nil {
		t.Fatal(err)
	}
	<-h.entered
	behind := make(chan bool, 1)
	do := func() { b.Poller().Do(func() { behind <- h.returned.Load() }) }
	do()
	if len(behind) != 0 {
		t.Fatal("Do did not wait for the handler")
	}
	close(h.goOn)
	if !<-behind {
		t.Error("Do ran beside the handler")
	}
	do() // whether somebody polls or not
	<-behind
}
