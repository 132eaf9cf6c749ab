package transport_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func head(typ, flags byte, credits uint16, arg uint32, body ...byte) []byte {
	b := []byte{typ, flags}
	b = binary.LittleEndian.AppendUint16(b, credits)
	b = binary.LittleEndian.AppendUint32(b, arg)
	return append(b, body...)
}

func rts(id uint32, addr, n uint64, rkey uint32) []byte {
	b := head(2, 0, 0, id)
	b = binary.LittleEndian.AppendUint64(b, addr)
	b = binary.LittleEndian.AppendUint64(b, n)
	b = binary.LittleEndian.AppendUint32(b, rkey)
	return binary.LittleEndian.AppendUint32(b, uint32(ib.AccessRemoteRead))
}

// TestHostilePeer sends what the protocol does not allow: the connection ends with the reason on both sides, and what was sent after that
// does not reach the application.
func TestHostilePeer(t *testing.T) {
	for name, c := range map[string]struct {
		frames [][]byte
		want   error
		text   string
	}{
		"empty":             {[][]byte{{}}, transport.ErrProtocol, "shorter"},
		"short":             {[][]byte{{1, 2, 3}}, transport.ErrProtocol, "shorter"},
		"type":              {[][]byte{head(77, 0, 0, 0)}, transport.ErrProtocol, "type 77"},
		"length":            {[][]byte{head(1, 0, 0, 5, 'x')}, transport.ErrProtocol, "5 bytes"},
		"too many credits":  {[][]byte{head(5, 0, 1, 0)}, transport.ErrProtocol, "credits"},
		"invented FIN":      {[][]byte{head(3, 0, 0, 3)}, transport.ErrProtocol, "not open"},
		"FIN out of range":  {[][]byte{head(3, 0, 0, 0xffff)}, transport.ErrProtocol, "not open"},
		"second EOS":        {[][]byte{head(6, 0, 0, 0), head(6, 0, 0, 0)}, transport.ErrProtocol, "second EOS"},
		"data after EOS":    {[][]byte{head(6, 0, 0, 0), head(1, 0, 0, 0)}, transport.ErrProtocol, "after EOS"},
		"RTS after EOS":     {[][]byte{head(6, 0, 0, 0), rts(1, 4096, 100, 5)}, transport.ErrProtocol, "after EOS"},
		"huge RTS":          {[][]byte{rts(1, 4096, 1<<40, 5)}, transport.ErrProtocol, "announces"},
		"RTS wraps":         {[][]byte{rts(1, 1<<64-10, 100, 5)}, transport.ErrProtocol, "RTS"},
		"RTS of nothing":    {[][]byte{rts(1, 4096, 0, 5)}, transport.ErrProtocol, "announces"},
		"RTS with bad rkey": {[][]byte{rts(1, 4096, 100, 0x12345678)}, ib.WCRemoteAccessErr, "rendezvous"},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := transporttest.Pair(t, nil)
			h := &countingEcho{echo: newEcho(t)}
			b.SetHandler(h)
			for _, f := range append(c.frames, head(1, 0, 0, 1, 'x')) {
				if err := a.PostRaw(f); err != nil {
					break // it has ended already
				}
			}
			err := <-h.closed
			if c.want == ib.WCRemoteAccessErr && onIWARP(t, b) { // where requests end without a reason
				c.want, c.text = transport.ErrPeerDied, ""
			}
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("b ended with %v", err)
			}
			if h.messages != 0 {
				t.Errorf("b got %d messages", h.messages)
			}
			<-a.Done()
			if a.Err() == nil || c.want == transport.ErrProtocol && !errors.Is(a.Err(), transport.ErrProtocol) {
				t.Errorf("a ended with %v", a.Err())
			}
		})
	}
}

// countingEcho counts what it is given.
type countingEcho struct {
	*echo
	messages int // for whoever has taken from closed
}

func (e *countingEcho) HandleMessage(c *transport.Conn, m *transport.Message) {
	e.messages++
	e.echo.HandleMessage(c, m)
}

// TestWindowIsEnforced: a peer that sends more than it has credits for has broken the protocol.
func TestWindowIsEnforced(t *testing.T) {
	for _, shared := range []bool{false, true} {
		for name, send := range map[string]func(ctx context.Context, a *transport.Conn, near *mr.MR, far transport.Remote) error{
			"data": func(ctx context.Context, a *transport.Conn, _ *mr.MR, _ transport.Remote) error {
				return a.Send(ctx, []byte("x"))
			},
			"RTS": func(ctx context.Context, a *transport.Conn, _ *mr.MR, _ transport.Remote) error {
				return a.Send(ctx, pattern(20000, 1))
			},
			"immediate": func(ctx context.Context, a *transport.Conn, near *mr.MR, far transport.Remote) error {
				return a.WriteImm(ctx, near.SGE(0, 8), far, 0, 1)
			},
		} {
			t.Run(fmt.Sprintf("%s/shared=%t", name, shared), func(t *testing.T) {
				ctx := patience(t)
				a, b := transporttest.Pair(t, &transport.Config{RecvDepth: 4, SharedReceive: shared})
				near := alloc(t, a, 8, ib.AccessLocalWrite)
				far := grant(t, b, alloc(t, b, 8, allAccess), 0, 8, ib.AccessRemoteWrite).Remote()
				a.ForgeCredits(3)
				var held []*transport.Message
				for range 4 {
					if err := a.Send(ctx, []byte("x")); err != nil {
						t.Fatal(err)
					}
					if err := b.Recv(ctx, func(m *transport.Message) error { held = append(held, m.Take()); return nil }); err != nil {
						t.Fatal(err)
					}
				}
				sent := make(chan error, 1)
				go func() { sent <- send(ctx, a, near, far) }()
				err := b.Recv(ctx, func(*transport.Message) error { return nil })
				if !errors.Is(err, transport.ErrProtocol) || !strings.Contains(err.Error(), "credit") {
					t.Errorf("a message beyond the window: %v", err)
				}
				<-sent
				for _, m := range held {
					m.Release()
				}
			})
		}
	}
}

// TestUnknownCancel: a cancel may cross the FIN that it would have caused.
func TestUnknownCancel(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	a.PostRaw(head(4, 0, 0, 77))
	a.Send(t.Context(), []byte("x"))
	recvEqual(t, b, []byte("x"))
}

// TestGarbage sends random frames for a while: the connection ends with a reason, on both sides, or it still works, as it does if the
// frames say nothing that counts.
func TestGarbage(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	pairs := 60
	if testing.Short() {
		pairs = 15
	}
	ended, works := 0, 0
	for i := range pairs {
		a, b := transporttest.Pair(t, nil)
		h := newEcho(t)
		b.SetHandler(h)
		frames := make([][]byte, 1+rng.IntN(50))
		for j := range frames {
			if i%2 == 0 {
				frames[j] = garbage(rng)
			} else {
				frames[j] = head(4, 0, 0, rng.Uint32()) // a cancel of a rendezvous that is over
			}
		}
		for _, f := range frames {
			if a.PostRaw(f) != nil {
				break
			}
		}
		ctx := patience(t)
		back := errors.New("it came back")
		err := a.Send(ctx, []byte("do you still work?"))
		for err == nil {
			err = a.Recv(ctx, func(m *transport.Message) error {
				if string(m.Bytes()) == "do you still work?" {
					return back
				}
				return nil // an answer to garbage
			})
		}
		if ctx.Err() != nil {
			t.Fatal("the connection neither works nor ends")
		}
		if err != back {
			for side, err := range map[string]error{"a": err, "b": <-h.closed} {
				var ce *transport.CloseError
				if !errors.As(err, &ce) || ce.Reason == "" || errors.Is(err, transport.ErrPeerDied) && !onIWARP(t, b) {
					t.Errorf("%s: ended with %v", side, err)
				}
			}
			ended++
		} else {
			works++
		}
		if err == back && i%2 == 0 && len(frames) > 10 {
			t.Errorf("the connection works after %d frames of garbage", len(frames))
		}
		a.Close()
		b.Close()
	}
	if ended == 0 || works == 0 {
		t.Errorf("%d connections have ended, %d work", ended, works)
	}
}

// garbage makes a frame whose type, and in half of the cases the length, may be right.
func garbage(rng *rand.Rand) []byte {
	f := make([]byte, 8+rng.IntN(60))
	for i := range f {
		f[i] = byte(rng.Uint32())
	}
	f[0], f[1] = byte(rng.IntN(8)), f[1]&3
	if rng.IntN(2) == 0 {
		binary.LittleEndian.PutUint32(f[4:], uint32(len(f)-8))
	}
	return f
}

// TestPoolExhausted receives more long messages than the poller has memory for, and none is lost.
func TestPoolExhausted(t *testing.T) {
	vctx := transporttest.Context(t)
	p, err := transport.NewPoller(vctx, &transport.PollerConfig{BufferLimit: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	a, b := transporttest.PairConfig(t, nil, &transport.Config{Poller: p})
	const count = 12
	for i := range count {
		go func() {
			if err := a.Send(context.Background(), append([]byte{byte(i)}, pattern(250000, uint64(i))...)); err != nil {
				t.Error(err)
			}
		}()
	}
	seen := map[byte]bool{}
	var held []*transport.Message
	for range count {
		err := b.Recv(t.Context(), func(m *transport.Message) error {
			i := m.Bytes()[0]
			if seen[i] || !bytes.Equal(m.Bytes()[1:], pattern(250000, uint64(i))) {
				t.Error("message differs, or came twice")
			}
			seen[i] = true
			held = append(held, m.Take())
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if len(held) == 3 {
			for _, m := range held {
				m.Release()
			}
			held = nil
		}
	}
	for _, m := range held {
		m.Release()
	}
	a.Close()
	b.Close()
}

// TestWaitersTakeTurns has many goroutines wait on one poller with all modes of finishing: none is forgotten.
func TestWaitersTakeTurns(t *testing.T) {
	modes(t, func(t *testing.T, cfg *transport.Config) {
		a, b := transporttest.Pair(t, cfg)
		near := alloc(t, a, 4096, ib.AccessLocalWrite)
		far := alloc(t, b, 4096, allAccess)
		r := grant(t, b, far, 0, 4096, ib.AccessRemote).Remote()
		atomics := hasAtomics(t, a)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for i := range 12 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					var err error
					what := i % 4
					if what == 1 && !atomics {
						what = 0
					}
					switch what {
					case 0:
						err = a.Read(context.Background(), near.SGE(i*64, 8), r, uint64(i*64))
					case 1:
						_, err = a.FetchAdd(context.Background(), r, uint64(i*64), 1)
					case 2: // often cancelled while asleep
						ctx, cancel := context.WithTimeout(context.Background(), time.Duration(n%200)*time.Microsecond)
						if err := a.Recv(ctx, func(*transport.Message) error { return nil }); !errors.Is(err, context.DeadlineExceeded) {
							t.Errorf("Recv: %v", err)
						}
						cancel()
					case 3: // completed by another goroutine than the polling one
						var w transport.Waiter
						go w.Done()
						err = a.Poller().Wait(context.Background(), &w)
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			}()
		}
		time.Sleep(150 * time.Millisecond)
		close(stop)
		wg.Wait()
	})
}

// TestRunDrives: with Run on one side and handlers on the other, everything else may sleep.
func TestRunDrives(t *testing.T) {
	for _, mode := range []transport.PollMode{transport.Adaptive, transport.Busy, transport.Event} {
		a, b := transporttest.Pair(t, &transport.Config{PollMode: mode})
		b.SetHandler(newEcho(t))
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan error, 1)
		go func() { ran <- b.Poller().Run(ctx) }()
		for i := range 200 {
			msg := pattern(64+i, uint64(i))
			if err := a.Send(t.Context(), msg); err != nil {
				t.Fatal(err)
			}
			recvEqual(t, a, msg)
			if i%50 == 0 {
				time.Sleep(2 * time.Millisecond) // all asleep
			}
		}
		cancel()
		if err := <-ran; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	}
}

// TestRegisteredSliceOneSided uses ordinary Go memory on both sides.
func TestRegisteredSliceOneSided(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	far, near := make([]byte, 5000), make([]byte, 5000)
	mf, err := mr.Register(b.PD(), far, ib.AccessLocalWrite|ib.AccessRemote)
	if err != nil {
		t.Fatal(err)
	}
	defer mf.Close()
	mn, err := mr.Register(a.PD(), near, ib.AccessLocalWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer mn.Close()
	fill(near, 4)
	if err := a.Write(t.Context(), mn.SGE(0, 5000), mf.Remote(), 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(far, near) {
		t.Error("differs")
	}
}
