package wire

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What was lost several times over, and a gap whose NAKs are all lost, are found by what comes later: no timer is needed.
func TestLostTwice(t *testing.T) {
	for _, op := range []ib.Opcode{ib.OpSend, ib.OpRDMAWrite, ib.OpRDMARead} {
		for _, what := range []string{"packet", "NAK"} {
			t.Run(fmt.Sprint(op, " ", what), func(t *testing.T) {
				n := newNetwork(t, 1, func(c *Config) {
					c.Selective, c.AckTimeout, c.MaxRdAtomic, c.MaxDestRdAtomic = true, 67*time.Millisecond, 64, 64
				})
				a, b := n.nodes[0], n.nodes[1]
				const messages, size = 200, 6 * simMTU
				b.recvs = messages
				victim := a.req.nxt.Add(20)
				lost, most := 0, 3
				n.drop = func(from *node, p *roce.Packet) bool {
					data := p.PSN == victim && (from == a && op != ib.OpRDMARead || from == b && op == ib.OpRDMARead)
					nak := p.Opcode.Op() == roce.Acknowledge && p.Syndrome == roce.NakPSN
					if data && (what == "packet" && lost < most || lost == 0) {
						lost++
						return true
					}
					return what == "NAK" && nak
				}
				left := messages
				var act func()
				act = func() {
					if left > 0 && a.req.Queued() < 60 { // so that something always comes behind what was lost
						left--
						r := Request{Op: op, Len: size, RKey: memKey}
						if op == ib.OpRDMARead {
							r.RKey = roKey
						}
						a.post(r, payloadOf(size))
					}
					a.pump()
					if left > 0 {
						n.after(2*time.Microsecond, act)
					}
				}
				act()
				n.run(func() bool { return left == 0 && n.ended() })
				for i, st := range a.done {
					if st != ib.WCSuccess || op == ib.OpRDMARead && !bytes.Equal(a.sinks[i], b.readOnly[:size]) {
						t.Fatalf("request %d ends with %v", i, st)
					}
				}
				if c := &a.req.Counters; c.Timeouts != 0 || c.Resent < uint64(lost) || c.Resent > uint64(lost)+2 {
					t.Errorf("%d times lost: %+v", lost, *c)
				}
			})
		}
	}
}

// A gap does not stop what is sent behind it, up to twice the window, and what is then on its way is no more than the window.
func TestWindowBehindGap(t *testing.T) {
	const window = 16
	n := newNetwork(t, 1, func(c *Config) { c.Selective, c.AckTimeout, c.Window = true, 67*time.Millisecond, window })
	a, b := n.nodes[0], n.nodes[1]
	first := a.req.nxt
	most, behind := 0, int32(0)
	n.drop = func(from *node, p *roce.Packet) bool {
		if from == a {
			most, behind = max(most, a.req.underWay(false)), max(behind, distance(first, p.PSN)+1)
		}
		return from == a && p.PSN == first
	}
	b.recvs = 1
	a.post(Request{Op: ib.OpSend, Len: 50 * simMTU}, payloadOf(50*simMTU))
	a.pump()
	n.run(func() bool { return n.now > 500*time.Microsecond })
	if most > window || behind != 2*window {
		t.Errorf("%d packets on their way, %d behind the gap, with a window of %d", most, behind, window)
	}
	n.drop = nil
	n.run(n.ended)
	if a.done[0] != ib.WCSuccess || !bytes.Equal(b.got[0].data, payloadOf(50*simMTU)) {
		t.Errorf("it ends with %v", a.done[0])
	}
}
