package wire

import (
	"bytes"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// With selective repeat, little more is sent again than was lost, in both directions, and timers are needed for the rest only.
func TestSelective(t *testing.T) {
	for _, op := range []ib.Opcode{ib.OpSend, ib.OpRDMAWrite, ib.OpRDMARead, ib.OpAtomicFetchAdd} {
		t.Run(op.String(), func(t *testing.T) {
			for seed := range uint64(20) {
				n := newNetwork(t, seed, func(c *Config) {
					c.Selective, c.MaxRdAtomic, c.MaxDestRdAtomic, c.AckTimeout = true, 8, 8, 67*time.Millisecond
				})
				a, b := n.nodes[0], n.nodes[1]
				n.loss = 0.01
				const messages, size = 400, 20*simMTU + 5
				b.recvs = messages
				data := payloadOf(size)
				left := messages
				var act func()
				act = func() {
					for ; left > 0 && a.req.Queued() < 20; left-- {
						r := Request{Op: op, Len: size, RKey: memKey}
						switch op {
						case ib.OpRDMARead:
							r.RKey = roKey
						case ib.OpAtomicFetchAdd:
							r.Len, r.CompareAdd = 8, 1
						}
						a.post(r, data)
					}
					a.pump()
					if left > 0 {
						n.after(20*time.Microsecond, act)
					}
				}
				act()
				n.run(func() bool { return left == 0 && n.ended() })
				for i, st := range a.done {
					if st != ib.WCSuccess || op == ib.OpRDMARead && !bytes.Equal(a.sinks[i], b.readOnly[:size]) {
						t.Fatalf("seed %d: request %d ends with %v", seed, i, st)
					}
				}
				c := &a.req.Counters
				sent := c.Sent + b.resp.Counters.Received
				if op == ib.OpAtomicFetchAdd {
					sent *= 2
				} else {
					sent = messages * 22
				}
				if c.Resent != c.Single || float64(c.Resent) > 2*0.01*float64(sent)+10 || float64(c.Timeouts) > 0.2*float64(c.Resent)+3 {
					t.Errorf("seed %d: %+v", seed, *c)
				}
			}
		})
	}
}
