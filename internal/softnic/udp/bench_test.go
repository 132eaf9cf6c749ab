package udp_test

import (
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/udp"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// benchEnd is an endpoint that keeps nothing of what it sends and receives.
type benchEnd struct {
	sock *udp.Socket
	peer *udp.Peer
	req  *wire.Requester
	resp *wire.Responder
	data []byte
	took atomic.Int64
	err  ib.WCStatus
}

func (e *benchEnd) Gather(_, off uint32, dst []byte) bool { copy(dst, e.data[off:]); return true }
func (e *benchEnd) Scatter(_, _ uint32, _ []byte) bool    { return true }
func (e *benchEnd) Complete(_ uint32, st ib.WCStatus)     { e.err = max(e.err, st) }

type sink struct {
	endpointTarget
	e *benchEnd
}

func (s sink) Take() bool { return true }
func (s sink) Put(off uint32, data []byte) ib.WCStatus {
	copy(s.e.data[off:], data)
	return ib.WCSuccess
}
func (s sink) Complete(wire.Message, ib.WCStatus) { s.e.took.Add(1) }

// turn does what there is to do.
func (e *benchEnd) turn(now, wait time.Duration, start time.Time) error {
	e.req.Expire(now)
	e.resp.Pump(now, e.peer)
	e.req.Pump(now, e.peer)
	e.sock.Flush()
	var deadline time.Time
	if wait > 0 {
		deadline = start.Add(now + wait)
	}
	_, _, err := e.sock.Receive(deadline, func(_ netip.AddrPort, p *roce.Packet) {
		if p.Opcode.IsResponse() {
			e.req.Receive(p, now)
		} else {
			e.resp.Receive(p)
		}
	})
	return err
}

// BenchmarkMessages streams SENDs over a connection between two goroutines, by busy polling.
func BenchmarkMessages(b *testing.B) {
	for _, n := range []int{64, 4096, 65536} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s, r := listen(b, "127.0.0.1:0"), listen(b, "127.0.0.1:0")
			cfg := wire.Config{MTU: 4096, AckTimeout: 20 * time.Millisecond, RetryCount: 250, RNRRetry: 7, SendDepth: 256}
			end := func(sock, to *udp.Socket) *benchEnd {
				e := &benchEnd{sock: sock, data: make([]byte, n)}
				var err error
				if e.peer, err = sock.Peer(to.Local()); err != nil {
					b.Fatal(err)
				}
				e.req, e.resp = wire.NewRequester(cfg, e), wire.NewResponder(cfg, sink{e: e})
				return e
			}
			x, y := end(s, r), end(r, s)
			var stop atomic.Bool
			served := make(chan struct{})
			start := time.Now()
			go func() {
				defer close(served)
				for !stop.Load() {
					if err := y.turn(time.Since(start), 0, start); err != nil {
						b.Error(err)
						return
					}
				}
			}()
			b.SetBytes(int64(n))
			b.ResetTimer()
			for left := b.N; left > 0 || x.req.Queued() > 0; {
				for left > 0 && x.req.Queued() < 256 {
					x.req.Post(&wire.Request{Op: ib.OpSend, Len: uint32(n)})
					left--
				}
				if err := x.turn(time.Since(start), 0, start); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			stop.Store(true)
			<-served
			if x.err != ib.WCSuccess || int(y.took.Load()) != b.N {
				b.Errorf("%d of %d messages, %v", y.took.Load(), b.N, x.err)
			}
			b.ReportMetric(float64(x.req.Counters.Resent)/float64(b.N), "resent/op")
		})
	}
}
