package transport_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// These tests are about the memory for long messages, PollerConfig.BufferLimit: that there is little of it slows connections down,
// and never stops them.

func patience(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
	t.Cleanup(cancel)
	return ctx
}

// limited returns a poller with little memory for long messages.
func limited(t *testing.T, limit int) *transport.Poller {
	t.Helper()
	p, err := transport.NewPoller(transporttest.Context(t), &transport.PollerConfig{BufferLimit: limit})
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

func recvPattern(ctx context.Context, c *transport.Conn, n int, seed uint64) error {
	err := c.Recv(ctx, func(m *transport.Message) error {
		if !bytes.Equal(m.Bytes(), pattern(n, seed)) {
			return errors.New("it differs")
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("message of %d bytes: %w", n, err)
	}
	return nil
}

// TestBufferSizesTakeTurns: memory that messages of one size have left is there for all others, on both sides.
func TestBufferSizesTakeTurns(t *testing.T) {
	for _, c := range []struct {
		limit int
		sizes []int
	}{
		{1 << 20, []int{100_000, 600_000, 100_000, 10_000, 1 << 20, 600_000}},
		{3 << 20, []int{5 << 19, 100_000, 3 << 20}}, // no power of two
	} {
		t.Run(fmt.Sprint(c.limit), func(t *testing.T) {
			ctx := patience(t)
			a, b := transporttest.PairConfig(t, &transport.Config{Poller: limited(t, c.limit)}, &transport.Config{Poller: limited(t, c.limit)})
			for i, n := range c.sizes {
				for _, d := range [][2]*transport.Conn{{a, b}, {b, a}} {
					if err := d[0].Send(ctx, pattern(n, uint64(i))); err != nil {
						t.Fatalf("%d bytes after %v: %v", n, c.sizes[:i], err)
					}
					if err := recvPattern(ctx, d[1], n, uint64(i)); err != nil {
						t.Fatalf("after %v: %v", c.sizes[:i], err)
					}
				}
			}
		})
	}
}

// TestMaxMessageFitsBuffers: a message that could never be held is none that may be sent.
func TestMaxMessageFitsBuffers(t *testing.T) {
	p := limited(t, 1<<20)
	for name, f := range map[string]func(*transport.Config) error{
		"Listen": func(cfg *transport.Config) error {
			_, err := transport.Listen(t.Context(), "127.0.0.1:0", cfg)
			return err
		},
		"Dial": func(cfg *transport.Config) error {
			_, err := transport.Dial(t.Context(), "127.0.0.1:1", cfg)
			return err
		},
	} {
		err := f(&transport.Config{Poller: p, MaxMessage: 1<<20 + 1})
		if err == nil || !strings.Contains(err.Error(), "MaxMessage") || !strings.Contains(err.Error(), "BufferLimit") {
			t.Errorf("%s with messages of more than the poller can hold: %v", name, err)
		}
	}
	a, b := transporttest.PairConfig(t, nil, &transport.Config{Poller: p}) // 16 MiB by default, else
	if a.MaxMessage() != 1<<20 || b.MaxMessage() != 1<<20 {
		t.Errorf("messages of %d and %d bytes", a.MaxMessage(), b.MaxMessage())
	}
	if err := a.Send(t.Context(), make([]byte, 1<<20+1)); !errors.Is(err, transport.ErrTooLarge) {
		t.Error(err)
	}
	if err := a.Send(t.Context(), pattern(1<<20, 1)); err != nil {
		t.Fatal(err)
	}
	recvEqual(t, b, pattern(1<<20, 1))
}

// TestBothWaysLittleMemory sends messages of all sizes both ways at once, as fast as it goes. What has been sent must not
// take the memory that is needed to receive: both sides would wait for the other to read.
func TestBothWaysLittleMemory(t *testing.T) {
	const limit = 1 << 20
	for name, own := range map[string]bool{"two pollers": true, "one poller": false} {
		t.Run(name, func(t *testing.T) {
			ctx := patience(t)
			p := limited(t, limit)
			q := p
			if own {
				q = limited(t, limit)
			}
			a, b := transporttest.PairConfig(t, &transport.Config{Poller: p}, &transport.Config{Poller: q})
			count := 120
			if testing.Short() || raceEnabled {
				count = 40
			}
			size := func(i int) int {
				rng := rand.New(rand.NewPCG(uint64(i), 7))
				return 8 + rng.IntN(limit>>rng.IntN(8)) - rng.IntN(8)
			}
			var wg sync.WaitGroup
			for _, d := range [][2]*transport.Conn{{a, b}, {b, a}} {
				wg.Go(func() {
					for i := range count {
						if err := d[0].Send(ctx, pattern(size(i), uint64(i))); err != nil {
							t.Errorf("send %d: %v", i, err)
							return
						}
					}
				})
				wg.Go(func() {
					for i := range count {
						if err := recvPattern(ctx, d[1], size(i), uint64(i)); err != nil {
							t.Errorf("receive %d: %v", i, err)
							return
						}
					}
				})
			}
			wg.Wait()
		})
	}
}

// longCollector counts messages.
type longCollector struct {
	got    chan int
	closed chan error
}

func (h *longCollector) HandleMessage(_ *transport.Conn, m *transport.Message) {
	h.got <- len(m.Bytes())
}
func (h *longCollector) HandleClose(_ *transport.Conn, err error) { h.closed <- err }

// TestMemoryComesBackFromHandler: a handler's return gives back what the next message waits for.
func TestMemoryComesBackFromHandler(t *testing.T) {
	for _, shared := range []bool{false, true} {
		ctx := patience(t)
		a, b := transporttest.PairConfig(t, &transport.Config{SharedReceive: shared}, &transport.Config{Poller: limited(t, 1<<20), SharedReceive: shared})
		const count = 20
		h := &longCollector{make(chan int, count), make(chan error, 1)}
		b.SetHandler(h)
		for i := range count {
			if err := a.Send(ctx, pattern(600_000, uint64(i))); err != nil {
				t.Fatal(err)
			}
		}
		for i := range count {
			select {
			case <-h.got:
			case <-ctx.Done():
				t.Fatalf("%d of %d messages came", i, count)
			}
		}
	}
}

// TestMemoryComesBackFromClosed: what a connection leaves unread when it is closed is there for the others of its poller, which
// wait for it.
func TestMemoryComesBackFromClosed(t *testing.T) {
	for _, shared := range []bool{false, true} {
		for _, closer := range []string{"own", "peer"} {
			t.Run(fmt.Sprintf("shared=%t/%s", shared, closer), func(t *testing.T) {
				ctx := patience(t)
				p := limited(t, 1<<20)
				cfg := &transport.Config{Poller: p, SharedReceive: shared}
				far := &transport.Config{SharedReceive: shared}
				a1, b1 := transporttest.PairConfig(t, far, cfg)
				a2, b2 := transporttest.PairConfig(t, far, cfg)
				if err := a1.Send(ctx, pattern(600_000, 1)); err != nil {
					t.Fatal(err)
				}
				testutil.Eventually(t, "the memory is taken", func() bool { p.Poll(); return transport.Received(p) == 1 })
				if closer == "peer" {
					if err := a1.Send(ctx, pattern(700_000, 2)); err != nil { // waits behind the first one
						t.Fatal(err)
					}
				}
				if err := a2.Send(ctx, pattern(600_000, 3)); err != nil {
					t.Fatal(err)
				}
				testutil.Eventually(t, "the others wait", func() bool { p.Poll(); return transport.Stalled(b2) == 1 })
				switch closer {
				case "own":
					b1.Abort(errors.New("enough"))
				case "peer":
					a1.DropBootstrap()
					<-b1.Done()
					if err := recvPattern(ctx, b1, 600_000, 1); err != nil { // that had come before the end
						t.Fatal(err)
					}
				}
				if err := recvPattern(ctx, b2, 600_000, 3); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// TestMemoryComesBackFromCancelled: a message that waits for memory and is taken back holds nobody up.
func TestMemoryComesBackFromCancelled(t *testing.T) {
	ctx := patience(t)
	p := limited(t, 1<<20)
	cfg := &transport.Config{Poller: p}
	holder, held := transporttest.PairConfig(t, nil, cfg)
	a, b := transporttest.PairConfig(t, nil, cfg)
	if err := holder.Send(ctx, pattern(100_000, 1)); err != nil {
		t.Fatal(err)
	}
	var kept *transport.Message
	if err := held.Recv(ctx, func(m *transport.Message) error { kept = m.Take(); return nil }); err != nil {
		t.Fatal(err)
	}
	m, err := mr.Alloc(a.PD(), 1<<20, ib.AccessLocalWrite|ib.AccessRemoteRead)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	got := make(chan error, 1)
	go func() { got <- recvPattern(ctx, b, 100_000, 2) }()
	sending, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- a.SendRegion(sending, m, 0, 1<<20) }() // there is no room for it
	testutil.Eventually(t, "the message waits", func() bool { p.Poll(); return transport.Stalled(b) == 1 })
	if err := a.Send(ctx, pattern(100_000, 2)); err != nil { // for which there is
		t.Fatal(err)
	}
	testutil.Eventually(t, "the one behind it waits", func() bool { p.Poll(); return transport.Stalled(b) == 2 })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("SendRegion: %v", err)
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
	kept.Release()
}

// TestCloseWithQueuedMessages: Close closes the poller, and says if it cannot, also when messages that nobody has received keep it.
func TestCloseWithQueuedMessages(t *testing.T) {
	for _, shared := range []bool{false, true} {
		vctx, err := verbs.Open(transporttest.Device)
		if err != nil {
			t.Fatal(err)
		}
		l := listen(t, &transport.Config{Device: transporttest.Device})
		a, b := transporttest.Connect(t, l, &transport.Config{Context: vctx, SharedReceive: shared})
		m, err := mr.Alloc(a.PD(), 4096, ib.AccessLocalWrite)
		if err != nil {
			t.Fatal(err)
		}
		for i := range uint64(16) {
			if err := b.Send(t.Context(), pattern(40, i)); err != nil {
				t.Fatal(err)
			}
		}
		b.Close()
		<-a.Done()
		if err := a.Close(); !errors.Is(err, verbs.ErrBusy) {
			t.Errorf("Close before the memory's: %v", err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if err := a.Close(); err != nil {
			t.Errorf("Close after the memory's: %v", err)
		}
		if err := vctx.Close(); err != nil {
			t.Error(err)
		}
	}
}

// orderOfCalls notes what is called.
type orderOfCalls struct{ calls chan string }

func (h orderOfCalls) HandleMessage(*transport.Conn, *transport.Message) { h.calls <- "message" }
func (h orderOfCalls) HandleEOF(*transport.Conn)                         { h.calls <- "EOF" }
func (h orderOfCalls) HandleClose(*transport.Conn, error)                { h.calls <- "close" }

// TestEOFAfterWhatWaits: a handler that comes after the EOS, and before a message that waits for memory, hears of them in that order.
func TestEOFAfterWhatWaits(t *testing.T) {
	ctx := patience(t)
	p := limited(t, 1<<20)
	a, b := transporttest.PairConfig(t, nil, &transport.Config{Poller: p})
	for i := range uint64(2) {
		if err := a.Send(ctx, pattern(600_000, i)); err != nil {
			t.Fatal(err)
		}
	}
	var kept *transport.Message
	if err := b.Recv(ctx, func(m *transport.Message) error { kept = m.Take(); return nil }); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "a message waits", func() bool { p.Poll(); return transport.Stalled(b) == 1 })
	a.CloseWrite()
	testutil.Eventually(t, "the EOS is here", func() bool { p.Poll(); return transport.EOSCame(b) })
	h := orderOfCalls{make(chan string, 10)}
	b.SetHandler(h)
	kept.Release()
	for _, want := range []string{"message", "EOF", "close"} {
		select {
		case got := <-h.calls:
			if got != want {
				t.Errorf("%s comes, want %s", got, want)
			}
		case <-ctx.Done():
			t.Fatalf("%s does not come", want)
		}
		if want == "EOF" {
			a.Close()
		}
	}
}
