package transport

import (
	"context"
	"fmt"
	"net"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs"
)

// dialUnready does a dialler's part of the handshake up to the ready frame, which it does not send. The queue pairs are connected.
func dialUnready(t *testing.T, ctx context.Context, p *Poller, addr string, cfg Config) *Conn {
	t.Helper()
	cfg.Poller = p
	full, err := cfg.populate()
	if err != nil {
		t.Fatal(err)
	}
	boot, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	c, mine, err := prepare(ctx, p, full, boot, addrOf(boot.LocalAddr()))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := boot.Write(appendFrame(nil, bootHello, mine.append(nil))); err != nil {
		t.Fatal(err)
	}
	body, err := readFrame(boot, bootAccept)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := parseHello(body)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.followPath(ctx, mine, theirs); err != nil {
		t.Fatal(err)
	}
	c.agreeOn(mine, theirs)
	connect := c.connect
	if c.viaTCP {
		connect = c.dialStream
	}
	if err := connect(ctx, mine, theirs); err != nil {
		t.Fatal(err)
	}
	return c
}

// queued counts the messages of the poller's connections that are there for Recv.
func queued(p *Poller) (n int) {
	for i := range *p.tab.Load() {
		if c := (*p.tab.Load())[i].Load(); c != nil {
			c.rcv.mu.Lock()
			for m := c.rcv.queue.head; m != nil; m = m.next {
				n++
			}
			c.rcv.mu.Unlock()
		}
	}
	return n
}

// TestMessagesBeforeReady: what a peer sends before its handshake fails costs nothing.
func TestMessagesBeforeReady(t *testing.T) {
	const long = 40000 // the memory is enough for one
	for _, shared := range []bool{false, true} {
		t.Run(fmt.Sprintf("shared=%t", shared), func(t *testing.T) {
			testutil.CheckLeaks(t)
			ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
			defer cancel()
			vctx, err := verbs.Open("soft0")
			if err != nil {
				t.Fatal(err)
			}
			var pollers [2]*Poller
			for i := range pollers {
				if pollers[i], err = NewPoller(vctx, &PollerConfig{BufferLimit: 1 << (20 - 4*i)}); err != nil {
					t.Fatal(err)
				}
			}
			near, far := pollers[0], pollers[1]
			cfg := Config{SharedReceive: shared, RecvDepth: 16, EagerSize: 1024, MaxMessage: 1 << 16, HandshakeTimeout: testutil.Patience}
			lcfg := cfg
			lcfg.Poller = far
			l, err := Listen(ctx, "127.0.0.1:0", &lcfg)
			if err != nil {
				t.Fatal(err)
			}
			for round := range 5 { // as many messages as there are receives in the shared queue
				c := dialUnready(t, ctx, near, l.Addr().String(), cfg)
				for i := range 16 {
					n := 500
					if i == 11 || i == 12 {
						n = long
					}
					if err := c.Send(ctx, make([]byte, n)); err != nil {
						t.Fatal(err)
					}
				}
				testutil.Eventually(t, "the messages are here, and one waits for memory", func() bool {
					near.Poll()
					far.Poll()
					return queued(far) == 12 && far.hungry.Load()
				})
				c.tcp.Close()
				testutil.Eventually(t, "the handshake has failed", func() bool {
					l.mu.Lock()
					defer l.mu.Unlock()
					return l.active == 0
				})
				c.discard()
				if n := far.received.Stats().InUse; n != 0 {
					t.Errorf("round %d: %d long messages are held", round, n)
				}
				if out := far.arenaFor(slotStride(cfg.EagerSize)).out; !shared && out != 0 {
					t.Errorf("round %d: %d receive slots are held", round, out)
				}
			}
			dcfg := cfg
			dcfg.Poller = near
			a, err := Dial(ctx, l.Addr().String(), &dcfg)
			if err != nil {
				t.Fatal(err)
			}
			b, err := l.Accept(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range []int{5, long} {
				if err := a.Send(ctx, make([]byte, n)); err != nil {
					t.Fatal(err)
				}
				if err := b.Recv(ctx, func(m *Message) error { return nil }); err != nil {
					t.Fatal(err)
				}
			}
			for _, x := range []interface{ Close() error }{a, b, l, near, far, vctx} {
				if err := x.Close(); err != nil {
					t.Errorf("%T: %v", x, err)
				}
			}
		})
	}
}
