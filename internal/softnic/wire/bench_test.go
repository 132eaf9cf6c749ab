package wire

import (
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A pipe hands packets from one end to the other, in order.
type pipe struct {
	pkts []roce.Packet
	mem  []byte
}

func (p *pipe) Packet(h *roce.Packet, n int) ([]byte, bool) {
	p.pkts = append(p.pkts, *h)
	p.pkts[len(p.pkts)-1].Payload = p.mem[:n]
	return p.mem[:n], true
}

func (p *pipe) Commit() {}
func (p *pipe) Abort()  {}

// nothing is memory that nobody looks at.
type nothing struct{ Target }

func (nothing) Gather(uint32, uint32, []byte) bool                  { return true }
func (nothing) Scatter(uint32, uint32, []byte) bool                 { return true }
func (nothing) Check(uint32, uint64, uint32, ib.Access) ib.WCStatus { return ib.WCSuccess }
func (nothing) Write(uint32, uint64, []byte) ib.WCStatus            { return ib.WCSuccess }

// sends is the queue of such requests.
type sends struct{ nothing }

func (sends) Complete(uint32, ib.WCStatus) {}

// BenchmarkWrite is what a packet of a WRITE costs both ends together, without memory and network: with congestion control and
// without, and with one packet in a hundred lost.
func BenchmarkWrite(b *testing.B) {
	for name, c := range map[string]struct {
		congestion bool
		loss       int
	}{"plain": {}, "congestion": {congestion: true}, "loss": {loss: 100}, "congestion, loss": {true, 100}} {
		b.Run(name, func(b *testing.B) {
			cfg := Config{MTU: 1024, Selective: true, Congestion: c.congestion, SendDepth: 64, AckTimeout: time.Second, RetryCount: 7}
			req, resp := NewRequester(cfg, sends{}), NewResponder(cfg, nothing{})
			there, back := &pipe{mem: make([]byte, 1024)}, &pipe{mem: make([]byte, 1024)}
			b.ReportAllocs()
			now, n := time.Duration(1), 0
			for n < b.N {
				for req.Queued() < 60 {
					req.Post(&Request{Op: ib.OpRDMAWrite, Len: 64 << 10, Quiet: true})
				}
				now += 100 * time.Microsecond
				if d := req.Deadline(); d != 0 && now >= d {
					req.Expire(now)
				}
				req.Pump(now, there)
				for i := range there.pkts {
					if n++; c.loss == 0 || n%c.loss != 0 {
						resp.Receive(&there.pkts[i])
					}
				}
				there.pkts = there.pkts[:0]
				resp.Pump(now, back)
				for i := range back.pkts {
					req.Receive(&back.pkts[i], now)
				}
				back.pkts = back.pkts[:0]
			}
		})
	}
}
