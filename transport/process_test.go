package transport_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func init() {
	testutil.RegisterChild("echo", echoChild)
	testutil.RegisterChild("sink", sinkChild)
}

// longest is the longest message that children take.
const longest = 64 << 20

// fastEcho answers in the handler, and counts nothing.
type fastEcho struct{}

func (fastEcho) HandleMessage(c *transport.Conn, m *transport.Message) {
	b, err := c.TryAlloc(len(m.Bytes()))
	if err != nil {
		fmt.Fprintln(os.Stderr, "echo:", err)
		return
	}
	copy(b.Bytes(), m.Bytes())
	c.Post(b, len(m.Bytes()))
}
func (fastEcho) HandleClose(*transport.Conn, error) {}

// echoChild serves echo on a listener, in the mode args[0], until it is told to end or killed.
func echoChild(args []string) { serve(args, fastEcho{}) }

// sinkChild takes what comes.
func sinkChild(args []string) { serve(args, sink{}) }

type sink struct{}

func (sink) HandleMessage(*transport.Conn, *transport.Message) {}
func (sink) HandleClose(*transport.Conn, error)                {}

func serve(args []string, h transport.Handler) {
	mode, err := transport.ParsePollMode(args[0])
	if err == nil {
		err = serveMode(mode, h)
	}
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
}

func serveMode(mode transport.PollMode, h transport.Handler) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	l, err := transport.Listen(ctx, "127.0.0.1:0", &transport.Config{Device: transporttest.Device, PollMode: mode, MaxMessage: longest, Linger: time.Second, HandshakeTimeout: testutil.Patience})
	if err != nil {
		return err
	}
	defer l.Close()
	fmt.Println("listening", l.Addr())
	if mode == transport.Busy {
		go l.Poller().Run(ctx)
	}
	go func() {
		for {
			c, err := l.Accept(ctx)
			if err != nil {
				return
			}
			m, err := mr.Alloc(c.PD(), 1<<16, ib.AccessLocalWrite|ib.AccessRemote)
			if err != nil {
				fmt.Println("error", err)
				return
			}
			g, err := c.Grant(ctx, m, 0, 1<<16, ib.AccessRemote)
			if err != nil {
				fmt.Println("error", err)
				return
			}
			r, _ := g.Remote().MarshalBinary()
			c.Send(ctx, r)
			c.SetHandler(h)
		}
	}()
	<-testutil.ChildInput()
	return nil
}

// dialChild starts a child and connects to it; the child's first message is a grant of 64 KiB.
func dialChild(tb testing.TB, name string, mode transport.PollMode) (*testutil.Child, *transport.Conn, transport.Remote) {
	tb.Helper()
	child := testutil.StartChild(tb, name, mode.String())
	addr := strings.TrimPrefix(child.Expect("listening "), "listening ")
	addr = strings.TrimSpace(addr)
	c, err := transport.Dial(context.Background(), addr, &transport.Config{Device: transporttest.Device, PollMode: mode, MaxMessage: longest, Linger: time.Second, HandshakeTimeout: testutil.Patience})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	var r transport.Remote
	err = c.Recv(context.Background(), func(m *transport.Message) error { return r.UnmarshalBinary(m.Bytes()) })
	if err != nil {
		tb.Fatal(err)
	}
	return child, c, r
}

func benchModes(b *testing.B, f func(b *testing.B, mode transport.PollMode)) {
	for _, mode := range []transport.PollMode{transport.Busy, transport.Adaptive} {
		b.Run(mode.String(), func(b *testing.B) { f(b, mode) })
	}
}

// BenchmarkEcho is one 64-byte message there and back between two processes.
func BenchmarkEcho(b *testing.B) {
	benchModes(b, func(b *testing.B, mode transport.PollMode) {
		_, c, _ := dialChild(b, "echo", mode)
		msg := make([]byte, 64)
		ctx := context.Background()
		nop := func(*transport.Message) error { return nil }
		b.ReportAllocs()
		b.ResetTimer()
		for range b.N {
			if err := c.Send(ctx, msg); err != nil {
				b.Fatal(err)
			}
			if err := c.Recv(ctx, nop); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// caller keeps a number of echoes in flight from its handler.
type caller struct {
	left int
	msg  []byte
	w    transport.Waiter
}

func (h *caller) HandleMessage(c *transport.Conn, m *transport.Message) {
	h.left--
	if h.left == 0 {
		h.w.Done()
		return
	}
	if b, err := c.TryAlloc(len(h.msg)); err == nil {
		copy(b.Bytes(), h.msg)
		c.Post(b, len(h.msg))
	}
}
func (h *caller) HandleClose(c *transport.Conn, err error) { h.w.Fail(err) }

// BenchmarkEcho64InFlight keeps 64 messages of 64 bytes under way.
func BenchmarkEcho64InFlight(b *testing.B) {
	benchModes(b, func(b *testing.B, mode transport.PollMode) {
		_, c, _ := dialChild(b, "echo", mode)
		h := &caller{left: b.N + 64, msg: make([]byte, 64)}
		c.SetHandler(h)
		b.ReportAllocs()
		b.ResetTimer()
		for range 64 {
			if err := c.Send(context.Background(), h.msg); err != nil {
				b.Fatal(err)
			}
		}
		if err := c.Poller().Wait(context.Background(), &h.w); err != nil {
			b.Fatal(err)
		}
	})
}

// BenchmarkSend is the rate of messages one way.
func BenchmarkSend(b *testing.B) {
	for _, n := range []int{8, 64, 1024, 8192, 1 << 20} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			_, c, _ := dialChild(b, "sink", transport.Busy)
			msg := make([]byte, n)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				if err := c.Send(context.Background(), msg); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkOneSided are single operations, each waited for.
func BenchmarkOneSided(b *testing.B) {
	_, c, r := dialChild(b, "sink", transport.Adaptive)
	m, err := mr.Alloc(c.PD(), 1<<16, ib.AccessLocalWrite)
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	ctx := context.Background()
	for name, f := range map[string]func() error{
		"read8":    func() error { return c.Read(ctx, m.SGE(0, 8), r, 0) },
		"write8":   func() error { return c.Write(ctx, m.SGE(0, 8), r, 0) },
		"read4k":   func() error { return c.Read(ctx, m.SGE(0, 4096), r, 0) },
		"inline8":  func() error { return c.WriteBytes(ctx, m.Bytes()[:8], r, 0) },
		"fetchadd": func() error { _, err := c.FetchAdd(ctx, r, 0, 1); return err },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				if err := f(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestNoAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for _, mode := range []transport.PollMode{transport.Adaptive, transport.Busy} {
		t.Run(mode.String(), func(t *testing.T) {
			a, b := transporttest.Pair(t, &transport.Config{PollMode: mode})
			b.SetHandler(fastEcho{})
			ctx := t.Context()
			if onIWARP(t, a) {
				ctx = context.Background() // round trips that are slow enough to sleep in: with a context that can end, that allocates
			}
			nop := func(*transport.Message) error { return nil }
			region, err := mr.Alloc(b.PD(), 4096, ib.AccessLocalWrite|ib.AccessRemote)
			if err != nil {
				t.Fatal(err)
			}
			defer region.Close()
			local, err := mr.Alloc(a.PD(), 4096, ib.AccessLocalWrite)
			if err != nil {
				t.Fatal(err)
			}
			defer local.Close()
			for _, n := range []int{0, 64, 4096, 100 << 10} {
				msg := make([]byte, n)
				f := func() {
					if err := a.Send(ctx, msg); err != nil {
						t.Fatal(err)
					}
					if err := a.Recv(ctx, nop); err != nil {
						t.Fatal(err)
					}
				}
				for range 300 {
					f()
				}
				if got := testing.AllocsPerRun(300, f); got != 0 {
					t.Errorf("%d bytes there and back: %v allocations", n, got)
				}
			}
			r := region.Remote()
			batch := a.NewBatch(3)
			defer batch.Close()
			for name, f := range map[string]func() error{
				"read":  func() error { return a.Read(ctx, local.SGE(0, 64), r, 8) },
				"write": func() error { return a.Write(ctx, local.SGE(0, 64), r, 8) },
				"add":   func() error { _, err := a.FetchAdd(ctx, r, 8, 1); return err },
				"batch": func() error {
					batch.Reset()
					batch.Read(local.SGE(0, 8), r, 0)
					batch.Write(local.SGE(0, 8), r, 0)
					batch.FetchAdd(r, 16, 1)
					return batch.Do(ctx)
				},
			} {
				if !hasAtomics(t, a) && (name == "add" || name == "batch") {
					continue
				}
				if got := testing.AllocsPerRun(300, func() {
					if err := f(); err != nil {
						t.Fatal(err)
					}
				}); got != 0 {
					t.Errorf("%s: %v allocations", name, got)
				}
			}
		})
	}
}

// TestProcesses does a bit of everything with a peer in another process.
func TestProcesses(t *testing.T) {
	for _, mode := range []transport.PollMode{transport.Adaptive, transport.Busy, transport.Event} {
		t.Run(mode.String(), func(t *testing.T) {
			child, c, r := dialChild(t, "echo", mode)
			want := "shm"
			if path := os.Getenv("RINGSIDE_PATH"); path == string(transport.PathUDP) || path == string(transport.PathTCP) {
				want = path
			}
			if p := c.Path(); p.Provider == "soft" && p.Rung != want && runtime.GOOS == "linux" || !p.SameHost {
				t.Errorf("path %v", p)
			}
			if pid := c.Peer().Host.PID; int(pid) != child.PID() {
				t.Errorf("the peer says that its process is %d, and it is %d", pid, child.PID())
			}
			for i, n := range []int{0, 8, 64, 300, 5000, 8192, 8193, 300000} {
				msg := pattern(n, uint64(i))
				for range 3 {
					if err := c.Send(t.Context(), msg); err != nil {
						t.Fatal(err)
					}
					recvEqual(t, c, msg)
				}
			}
			m, err := mr.Alloc(c.PD(), 1<<16, ib.AccessLocalWrite)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			fill(m.Bytes()[:32768], 9)
			if err := c.Write(t.Context(), m.SGE(0, 32768), r, 0); err != nil {
				t.Fatal(err)
			}
			if err := c.Read(t.Context(), m.SGE(32768, 32768), r, 0); err != nil {
				t.Fatal(err)
			}
			if string(m.Bytes()[:32768]) != string(m.Bytes()[32768:]) {
				t.Error("read differs from what was written")
			}
			if err := c.WriteBytes(t.Context(), make([]byte, 8), r, 0); err != nil {
				t.Fatal(err)
			}
			if hasAtomics(t, c) {
				for i := range uint64(10) {
					if v, err := c.FetchAdd(t.Context(), r, 0, 3); err != nil || v != 3*i {
						t.Fatalf("FetchAdd: %d, %v", v, err)
					}
				}
				if v, err := c.CompareAndSwap(t.Context(), r, 0, 30, 77); err != nil || v != 30 {
					t.Fatalf("CompareAndSwap: %d, %v", v, err)
				}
				if err := c.Read(t.Context(), m.SGE(0, 8), r, 0); err != nil || binary.NativeEndian.Uint64(m.Bytes()) != 77 {
					t.Fatalf("after CompareAndSwap: %d, %v", binary.NativeEndian.Uint64(m.Bytes()), err)
				}
			}
			c.Close()
			child.Send("end")
			if err := child.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLongMessages sends messages as long as the default allows, and longer ones, to a peer in another process, and back.
func TestLongMessages(t *testing.T) {
	sizes := []int{16 << 20, longest}
	if testing.Short() || raceEnabled {
		sizes = sizes[:1]
	}
	for _, path := range allPaths(t) {
		t.Run(string(path), func(t *testing.T) {
			t.Setenv("RINGSIDE_PATH", string(path))
			_, c, _ := dialChild(t, "echo", transport.Adaptive)
			ctx, cancel := context.WithTimeout(t.Context(), 4*testutil.Patience) // a busy machine copies slowly
			defer cancel()
			for i, n := range sizes {
				msg := pattern(n, uint64(i))
				if err := c.Send(ctx, msg); err != nil {
					t.Fatalf("%d bytes: %v", n, err)
				}
				err := c.Recv(ctx, func(m *transport.Message) error {
					if !bytes.Equal(m.Bytes(), msg) {
						return errors.New("it differs")
					}
					return nil
				})
				if err != nil {
					t.Fatalf("%d bytes: %v", n, err)
				}
			}
			if err := c.Send(ctx, make([]byte, longest+1)); !errors.Is(err, transport.ErrTooLarge) {
				t.Error(err)
			}
		})
	}
}

// TestPeerKilled kills the peer in the middle of traffic: everything ends, with the reason.
func TestPeerKilled(t *testing.T) {
	for _, what := range []string{"echo", "flood", "onesided", "rendezvous"} {
		t.Run(what, func(t *testing.T) {
			name := "echo"
			if what == "flood" {
				name = "sink"
			}
			child, c, r := dialChild(t, name, transport.Adaptive)
			m, err := mr.Alloc(c.PD(), 1<<20, ib.AccessLocalWrite|ib.AccessRemoteRead)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := m.Close(); err != nil {
					t.Error(err)
				}
			}()
			time.AfterFunc(20*time.Millisecond, child.Kill)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			msg := make([]byte, 64)
			for err == nil {
				switch what {
				case "echo":
					if err = c.Send(ctx, msg); err == nil {
						err = c.Recv(ctx, func(*transport.Message) error { return nil })
					}
				case "flood":
					err = c.Send(ctx, msg)
				case "onesided":
					err = c.Write(ctx, m.SGE(0, 1<<16), r, 0)
				case "rendezvous":
					if err = c.SendRegion(ctx, m, 0, 1<<20); err == nil {
						err = c.Recv(ctx, func(*transport.Message) error { return nil })
					}
				}
			}
			<-c.Done()
			if errors.Is(err, context.DeadlineExceeded) || !errors.Is(c.Err(), transport.ErrPeerDied) {
				t.Errorf("the operation ended with %v, the connection with %v", err, c.Err())
			}
		})
	}
}
