package transport_test

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// alwaysReady fails the test if any message of the connection, whose NIC has no other, has found no receive. Retries hide that otherwise.
func alwaysReady(t *testing.T, c *transport.Conn) {
	t.Helper()
	n := c.Poller().Context().Driver().(interface{ Counters() *observe.NIC }).Counters()
	if len(n.QPs) == 0 {
		t.Error("no queue pair was counted")
	}
	for _, q := range n.QPs {
		if q.Requests.Messages == 0 || q.RNR != 0 || q.Wire != nil && (q.Wire.RNRNAKs != 0 || q.Wire.NotReady != 0) {
			t.Errorf("%+v, wire %+v", q, q.Wire)
		}
	}
}

// TestNoReceiverNotReady sends all that takes a receive at the peer, both ways at once, through windows of all kinds: each message finds
// one, as docs/protocol.md proves.
func TestNoReceiverNotReady(t *testing.T) {
	for _, path := range allPaths(t) {
		for name, cfg := range map[string]transport.Config{
			"window 2":        {SendDepth: 16, RecvDepth: 2, RendezvousDepth: 1},
			"window 3":        {SendDepth: 16, RecvDepth: 3, RendezvousDepth: 2},
			"window 4":        {SendDepth: 4, RecvDepth: 4, RendezvousDepth: 4},
			"window 5 shared": {SendDepth: 16, RecvDepth: 5, RendezvousDepth: 2, SharedReceive: true},
			"default":         {},
		} {
			t.Run(string(path)+"/"+name, func(t *testing.T) {
				cfg := cfg
				cfg.Path = path
				if cfg.RecvDepth != 0 {
					cfg.EagerSize = 512
				}
				a, b := transporttest.Pair(t, &cfg)
				count := 100
				if testing.Short() || raceEnabled {
					count = 40
				}
				var all sync.WaitGroup
				for i, d := range [][2]*transport.Conn{{a, b}, {b, a}} {
					from, to := d[0], d[1]
					src := alloc(t, from, 1<<16, ib.AccessLocalWrite|ib.AccessRemoteRead)
					remote := grant(t, to, alloc(t, to, 4096, allAccess), 0, 4096, ib.AccessRemoteWrite).Remote()
					ctx := t.Context()
					var senders sync.WaitGroup
					rng := func(s uint64) *rand.Rand { return rand.New(rand.NewPCG(uint64(i), s)) }
					for w := range uint64(2) {
						senders.Go(func() {
							for rng := rng(w); rng.IntN(count) != 0; {
								if err := from.Send(ctx, make([]byte, rng.IntN(100<<rng.IntN(8)))); err != nil {
									t.Error(err)
									return
								}
							}
						})
					}
					senders.Go(func() { // taken back at any time
						for rng := rng(3); rng.IntN(count) != 0; {
							short, cancel := context.WithTimeout(ctx, time.Duration(rng.IntN(300))*time.Microsecond)
							err := from.SendRegion(short, src, 0, 9000+rng.IntN(50000))
							cancel()
							if err != nil && !errors.Is(err, context.DeadlineExceeded) {
								t.Error(err)
								return
							}
						}
					})
					senders.Go(func() {
						for rng := rng(4); rng.IntN(count) != 0; {
							if err := from.WriteImm(ctx, src.SGE(0, 8), remote, 0, 1); err != nil {
								t.Error(err)
								return
							}
						}
					})
					all.Go(func() {
						senders.Wait()
						if err := from.CloseWrite(); err != nil {
							t.Error(err)
						}
					})
					all.Go(func() {
						rng := rng(5)
						var held *transport.Message
						for {
							err := to.Recv(ctx, func(m *transport.Message) error {
								if held == nil && cfg.RecvDepth != 2 && rng.IntN(4) == 0 { // WriteImm wants two credits
									held = m.Take()
								}
								return nil
							})
							if held != nil && (err != nil || rng.IntN(4) == 0) {
								held.Release()
								held = nil
							}
							if err == io.EOF {
								return
							}
							if err != nil {
								t.Error(err)
								return
							}
							if rng.IntN(50) == 0 {
								time.Sleep(time.Millisecond)
							}
						}
					})
				}
				all.Wait()
				alwaysReady(t, a)
				alwaysReady(t, b)
			})
		}
	}
}
