package wire

import (
	"fmt"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Every packet that is sent again is counted by why, once, and those that are not are new.
func TestReasons(t *testing.T) {
	for _, selective := range []bool{false, true} {
		for _, op := range []ib.Opcode{ib.OpSend, ib.OpRDMARead} {
			t.Run(fmt.Sprintf("%v, selective %v", op, selective), func(t *testing.T) {
				n := newNetwork(t, 5, func(c *Config) {
					c.Selective, c.MaxRdAtomic, c.MaxDestRdAtomic, c.AckTimeout, c.RNRRetry = selective, 8, 8, 67*time.Millisecond, ib.RNRRetryForever
				})
				a, b := n.nodes[0], n.nodes[1]
				n.loss = 0.05
				const messages, size = 100, 20*simMTU + 5
				data := payloadOf(size)
				left := messages
				var act func()
				act = func() {
					for ; left > 0 && a.req.Queued() < 10; left-- {
						r := Request{Op: op, Len: size, RKey: roKey}
						a.post(r, data)
					}
					a.pump()
					b.recvs++ // fewer than there are messages, at times
					if left > 0 || b.recvs < 10 {
						n.after(300*time.Microsecond, act)
					}
				}
				act()
				n.run(func() bool { return left == 0 && n.ended() })
				var counted [Reasons]uint64
				seen := map[ib.PSN]bool{}
				for _, p := range a.sent {
					counted[p.why]++
					if op == ib.OpSend && seen[p.psn] != (p.why != First) {
						t.Fatalf("PSN %d was sent before: %v, and is sent because of %q", p.psn, seen[p.psn], p.why)
					}
					seen[p.psn] = true
				}
				c := &a.req.Counters
				first := counted[First]
				counted[First] = 0
				if counted != c.Again || first+c.Resent != c.Sent {
					t.Errorf("sent again %v, counted %+v", counted, *c)
				}
				if want := c.Again[SequenceNAK] > 0 && c.Again[NoReceive] > 0; op == ib.OpSend && !want {
					t.Errorf("SENDs were sent again because of %v", c.Again)
				}
				if op == ib.OpRDMARead && c.Again[MissingResponse] == 0 {
					t.Errorf("READs were asked for again because of %v", c.Again)
				}
				if c.Again[Timeout] == 0 {
					t.Errorf("never because of a timeout: %v", c.Again)
				}
			})
		}
	}
}
