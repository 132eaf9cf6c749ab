package transport_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// postMore posts msg with PostMore.
func postMore(t *testing.T, c *transport.Conn, msg []byte) {
	t.Helper()
	b, err := c.Alloc(t.Context(), len(msg))
	if err != nil {
		t.Fatal(err)
	}
	copy(b.Bytes(), msg)
	if err := c.PostMore(b, len(msg)); err != nil {
		t.Fatal(err)
	}
}

// What is kept back goes out with Flush, Post and Close, and in its turn.
func TestPostMore(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	small, large := pattern(40, 1), pattern(3000, 2)         // inline, and in a slot
	for _, c := range [][2]*transport.Conn{{a, b}, {b, a}} { // what opens a connection on iWARP arrives before these, and with them
		if err := c[0].Send(t.Context(), small); err != nil {
			t.Fatal(err)
		}
		recvEqual(t, c[1], small)
	}
	for range 3 {
		postMore(t, a, small)
		postMore(t, a, large)
		postMore(t, a, small)
		if b.Poller().Poll() != 0 {
			t.Error("a message that was kept back has arrived")
		}
		if err := a.Flush(); err != nil {
			t.Fatal(err)
		}
		for _, want := range [][]byte{small, large, small} {
			recvEqual(t, b, want)
		}
		postMore(t, a, large)
		if err := a.Send(t.Context(), small); err != nil {
			t.Fatal(err)
		}
		recvEqual(t, b, large)
		recvEqual(t, b, small)
	}
	postMore(t, a, small)
	postMore(t, a, large)
	done := make(chan error, 1)
	go func() { done <- a.Close() }()
	recvEqual(t, b, small)
	recvEqual(t, b, large)
	if err := b.Recv(t.Context(), func(*transport.Message) error { return nil }); err != io.EOF {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := a.Flush(); err == nil {
		t.Error("Flush of a closed connection")
	}
}

// What is kept back goes out before anything waits for what the peer does with it, be it to return credits.
func TestPostMoreBeforeWaits(t *testing.T) {
	small, large := pattern(40, 1), pattern(20000, 2)
	for name, last := range map[string]func(t *testing.T, a *transport.Conn) error{
		"Post":     func(t *testing.T, a *transport.Conn) error { return a.Send(t.Context(), large) },
		"PostMore": func(t *testing.T, a *transport.Conn) error { postMore(t, a, large); return nil },
		"SendRegion": func(t *testing.T, a *transport.Conn) error {
			m := alloc(t, a, len(large), ib.AccessLocalWrite|ib.AccessRemoteRead)
			copy(m.Bytes(), large)
			return a.SendRegion(t.Context(), m, 0, len(large))
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := patience(t)
			a, b := transporttest.Pair(t, &transport.Config{RecvDepth: 8})
			for range 8 {
				postMore(t, a, small)
			}
			sent := make(chan error, 1)
			go func() { sent <- last(t, a) }()
			for i := range 9 {
				err := b.Recv(ctx, func(m *transport.Message) error {
					if want := [][]byte{small, large}[i/8]; !bytes.Equal(m.Bytes(), want) {
						t.Errorf("message %d differs", i)
					}
					return nil
				})
				if err != nil {
					t.Fatalf("message %d: %v", i, err)
				}
			}
			if err := <-sent; err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("Recv", func(t *testing.T) {
		a, b := transporttest.Pair(t, nil)
		b.SetHandler(newEcho(t))
		postMore(t, a, small)
		err := a.Recv(patience(t), func(m *transport.Message) error {
			if !bytes.Equal(m.Bytes(), small) {
				t.Error("the answer differs")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	})
}

// Everything that a connection sends, in a random mixture, arrives in order, over windows that are too small for it.
func TestPostMoreOrder(t *testing.T) {
	for _, cfg := range []*transport.Config{nil, {SendDepth: 3, RecvDepth: 2}, {SendDepth: 40, RecvDepth: 5, EagerSize: 512}} {
		a, b := transporttest.Pair(t, cfg)
		n := 3000
		if testing.Short() {
			n = 600
		}
		rng := rand.New(rand.NewPCG(1, 2))
		go func() {
			for i := range uint32(n) {
				size := 4 + rng.IntN([]int{60, 900, 20000}[rng.IntN(3)])
				buf, err := a.Alloc(context.Background(), size)
				if err != nil {
					t.Error(err)
					return
				}
				binary.LittleEndian.PutUint32(buf.Bytes(), i)
				fill(buf.Bytes()[4:], uint64(i))
				post := a.PostMore
				if rng.IntN(7) == 0 || int(i) == n-1 {
					post = a.Post
				}
				if err := post(buf, size); err != nil {
					t.Error(err)
					return
				}
				if rng.IntN(50) == 0 {
					a.Flush()
				}
			}
		}()
		for i := range uint32(n) {
			err := b.Recv(t.Context(), func(m *transport.Message) error {
				if got := binary.LittleEndian.Uint32(m.Bytes()); got != i {
					t.Fatalf("message %d came as number %d", got, i)
				}
				if string(m.Bytes()[4:]) != string(pattern(len(m.Bytes())-4, uint64(i))) {
					t.Fatalf("message %d is damaged", i)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// What a handler posts while more messages wait goes out together, and at the latest when they have been handled.
func TestHandlerCorks(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	b.SetHandler(newEcho(t))
	for round := range uint64(20) {
		for i := range uint64(50) {
			postMore(t, a, pattern(20+int(i), round*100+i))
		}
		if err := a.Flush(); err != nil {
			t.Fatal(err)
		}
		for i := range uint64(50) {
			recvEqual(t, a, pattern(20+int(i), round*100+i))
		}
	}
	if !b.HasCorked() {
		t.Error("no two replies went out together")
	}
}

// A connection that ends takes what is kept back with it.
func TestPostMoreAtTheEnd(t *testing.T) {
	testutil.CheckLeaks(t)
	for i := range 10 {
		a, b := transporttest.Pair(t, nil)
		postMore(t, a, pattern(40, 1))
		postMore(t, a, pattern(2000, 2))
		if i%2 == 0 {
			b.Abort(errors.New("enough"))
		} else {
			a.Abort(nil)
		}
		<-a.Done()
		if buf, err := a.TryAlloc(10); err == nil {
			if err := a.PostMore(buf, 10); err == nil {
				t.Error("PostMore on a connection that has ended")
			}
		}
		a.Flush()
		a.Close()
		b.Close()
	}
}

func TestPostMoreDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	a, b := transporttest.Pair(t, &transport.Config{PollMode: transport.Busy})
	nop := func(*transport.Message) error { return nil }
	msg, large := pattern(64, 1), pattern(2000, 1)
	exchange := func() {
		for i := range 8 {
			m := msg
			if i == 3 {
				m = large
			}
			postMore(t, a, m)
		}
		a.Flush()
		for range 8 {
			if err := b.Recv(context.Background(), nop); err != nil {
				t.Fatal(err)
			}
		}
	}
	// The count is of the whole process, where what other tests have left behind may still end. What a message costs shows each time.
	n := testing.AllocsPerRun(200, exchange)
	for i := 0; i < 3 && n > 0.1; i++ {
		n = testing.AllocsPerRun(200, exchange)
	}
	if n > 0.1 {
		t.Errorf("%v allocations for 8 messages", n)
	}
}
