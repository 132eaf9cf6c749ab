package wire

import (
	"bytes"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
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

// An early packet whose PSN turns out to be a READ's is forgotten, and its memory given back: neither is it kept in the place of those
// that come a turn later.
func TestEarlyThatNeverComes(t *testing.T) {
	pool := NewEarlyPool(1 << 20)
	n := newNetwork(t, 1, func(c *Config) { c.Selective, c.Early = true, pool })
	r := n.nodes[1].resp
	n.nodes[1].recvs = 10
	first := r.want
	take := func(psn ib.PSN) {
		r.Receive(&roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly), PSN: psn, Payload: make([]byte, 4)})
	}
	read := func(psn ib.PSN, packets int32) {
		r.Receive(&roce.Packet{Opcode: roce.Op(roce.RC, roce.ReadRequest), PSN: psn, RKey: roKey, Addr: uint64(distance(first, psn)) * simMTU, Len: uint32(packets) * simMTU})
	}
	take(first.Add(1)) // lies in the middle of what follows
	read(first, 3)
	if r.want != first.Add(3) {
		t.Fatalf("it expects %d", distance(first, r.want))
	}
	if n := pool.Lent(); n != 0 {
		t.Errorf("%d bytes are kept for what will never be executed", n)
	}
	turn := int32(len(r.ahead.slots))
	r.want = first.Add(turn) // as if all between had come
	take(first.Add(turn + 1))
	take(first.Add(turn))
	if r.want != first.Add(turn+2) {
		t.Errorf("the early packet of a turn later was not kept: it expects %d", distance(first, r.want)-turn)
	}
}

// A READ that is asked for again in larger parts than before takes the PSNs of parts that came early, and what is behind them is
// executed.
func TestEarlyBehindLargerRead(t *testing.T) {
	pool := NewEarlyPool(1 << 20)
	n := newNetwork(t, 1, func(c *Config) { c.Selective, c.Early = true, pool })
	b := n.nodes[1]
	b.recvs = 1
	r, first := b.resp, b.resp.want
	read := func(at, packets int32) {
		r.Receive(&roce.Packet{Opcode: roce.Op(roce.RC, roce.ReadRequest), PSN: first.Add(at), RKey: roKey, Addr: uint64(at) * simMTU, Len: uint32(packets) * simMTU})
	}
	read(0, 2)
	read(4, 2) // what is between them is lost
	r.Receive(&roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly), PSN: first.Add(6), Payload: make([]byte, 4)})
	if r.want != first.Add(2) || pool.Lent() == 0 {
		t.Fatalf("it expects %d", distance(first, r.want))
	}
	read(0, 6)
	if r.want != first.Add(7) || len(b.got) != 1 || pool.Lent() != 0 {
		t.Errorf("it expects %d, not 7; %d messages, %d bytes are kept", distance(first, r.want), len(b.got), pool.Lent())
	}
}

// Payload that comes early is written at once if it is in the middle of a WRITE that has begun: not its end, nor of a later WRITE.
func TestEarlyInPlace(t *testing.T) {
	n := newNetwork(t, 1, func(c *Config) { c.Selective = true })
	b := n.nodes[1]
	r := b.resp
	first := r.want
	const packets = 5
	take := func(i int32, op uint8, fill byte, size int) {
		p := &roce.Packet{Opcode: roce.Op(roce.RC, op), PSN: first.Add(i), Payload: bytes.Repeat([]byte{fill}, size)}
		if p.Opcode.HasRETH() {
			p.RKey, p.Addr, p.Len = memKey, 1000, packets*simMTU
		}
		r.Receive(p)
	}
	there := func(what string, want ...byte) {
		t.Helper()
		for i, fill := range want {
			if !bytes.Equal(b.mem[1000+i*simMTU:][:simMTU], bytes.Repeat([]byte{fill}, simMTU)) {
				t.Errorf("%s: packet %d of the memory begins with %d, want %d", what, i, b.mem[1000+i*simMTU], fill)
			}
		}
	}
	take(2, roce.WriteMiddle, 1, simMTU)
	there("it is not known where to", 0, 0, 0, 0, 0)
	take(0, roce.WriteFirst, 1, simMTU)
	take(3, roce.WriteMiddle, 1, simMTU)
	there("it is known where to", 1, 0, 0, 1, 0)
	if !r.ahead.at(first.Add(3)).placed || r.ahead.at(first.Add(2)).placed {
		t.Error("it is not known what is in its place")
	}
	take(4, roce.WriteLast, 1, simMTU)
	take(5, roce.WriteFirst, 2, simMTU)
	take(6, roce.WriteMiddle, 2, simMTU)
	there("the end, and the next WRITE to the same memory", 1, 0, 0, 1, 0)
	take(1, roce.WriteMiddle, 1, simMTU)
	there("nothing is missing", 2, 2, 1, 1, 1)
	take(8, roce.WriteMiddle, 2, simMTU-4) // is refused in its turn
	there("it is too short", 2, 2, 1, 1, 1)
	take(7, roce.WriteMiddle, 2, simMTU)
	there("in its turn", 2, 2, 2, 1, 1)
	if !r.Failed() || b.fatal != ib.WCRemoteInvalidReqErr {
		t.Errorf("it fails with %v", b.fatal)
	}
}

// The time that a peer without a receive has asked for is not silence: what is lost after it is sent again, and no retry is counted.
func TestLossAfterRNR(t *testing.T) {
	n := newNetwork(t, 1, func(c *Config) {
		c.Selective, c.AckTimeout, c.RetryCount, c.MinRNRTimer = true, 8*time.Millisecond, 2, 20 // 10.24 ms
	})
	a, b := n.nodes[0], n.nodes[1]
	naks := 0
	n.drop = func(_ *node, p *roce.Packet) bool {
		if _, rnr := p.Syndrome.IsRNR(); !rnr || p.Opcode.Op() != roce.Acknowledge {
			return false
		}
		naks++
		return naks%2 == 0
	}
	a.post(Request{Op: ib.OpSend, Len: 64}, make([]byte, 64))
	a.pump()
	n.run(func() bool { return naks == 20 || len(a.done) > 0 })
	b.recvs = 1
	n.run(func() bool { return len(a.done) > 0 })
	if c := a.req.Counters; a.done[0] != ib.WCSuccess || c.Timeouts < 9 {
		t.Errorf("it ends with %v: %+v", a.done[0], c)
	}
}
