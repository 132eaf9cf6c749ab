package wire

import (
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// nobody is a Target that takes everything.
type nobody struct{ Target }

func (nobody) Take() bool                     { return true }
func (nobody) Put(uint32, []byte) ib.WCStatus { return ib.WCSuccess }
func (nobody) Complete(Message, ib.WCStatus)  {}
func (nobody) Fail(ib.WCStatus)               {}
func earlyPacket(psn ib.PSN, n int) *roce.Packet {
	return &roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly), PSN: psn, Payload: make([]byte, n)}
}

// However many peers send packets that can never be executed, and however long these are, what is kept of them stays within the
// pool, and whoever comes late has a place. All is given back, and the next does not allocate.
func TestEarlyIsBoundedForAll(t *testing.T) {
	const size, peers, mtu = 4 << 20, 50, 4096
	pool := NewEarlyPool(size)
	var all []*Responder
	for range peers {
		r := NewResponder(Config{MTU: mtu, Selective: true, Early: pool}, nobody{})
		all = append(all, r)
		for i := range 2 * selectiveWindow {
			r.Receive(earlyPacket(ib.PSN(1+i), mtu))
			for r.Pending() {
				r.outHead++
			}
		}
		if pool.lent+pool.spare > size {
			t.Fatalf("%d bytes are kept, and %d more, of %d", pool.lent, pool.spare, size)
		}
	}
	if n := all[0].ahead.held; n < size*2/5 {
		t.Errorf("the first has %d bytes of %d", n, size)
	}
	for i, r := range all {
		r.Receive(earlyPacket(0, mtu)) // what was missing
		if len := r.ahead.held; len != 0 && i < 2 {
			t.Errorf("%d bytes are left of peer %d", len, i)
		}
		r.Discard()
	}
	if pool.Lent() != 0 || pool.spare > size/8+2*selectiveWindow*slotSize {
		t.Errorf("%d bytes are lent, %d are kept, when nobody has any", pool.Lent(), pool.spare)
	}
	r := NewResponder(Config{MTU: mtu, Selective: true, Early: pool}, nobody{})
	psn, early, due := ib.PSN(0), earlyPacket(0, 64), earlyPacket(0, 64)
	if n := testing.AllocsPerRun(100, func() {
		early.PSN, due.PSN = psn.Add(1), psn
		r.Receive(early)
		r.Receive(due)
		r.outHead = r.outTail
		psn = psn.Add(2)
	}); n != 0 {
		t.Errorf("an early packet allocates %v times", n)
	}
	if r.want != psn || pool.Lent() != 0 {
		t.Errorf("%d is expected next, not %d; %d bytes are lent", r.want, psn, pool.Lent())
	}
}

// A connection for whose early packets there is no memory gets by: they are sent again.
func TestWithoutEarlyMemory(t *testing.T) {
	for name, size := range map[string]int{"none": 0, "slots only": 2 * 2 * selectiveWindow * slotSize, "a few": 2*2*selectiveWindow*slotSize + 40*simMTU} {
		t.Run(name, func(t *testing.T) {
			pool := NewEarlyPool(size)
			n := newNetwork(t, 1, func(c *Config) { c.Selective, c.AckTimeout, c.Early = true, 67*time.Millisecond, pool })
			a, b := n.nodes[0], n.nodes[1]
			n.loss = 0.05
			const messages = 50
			b.recvs = messages
			data := payloadOf(20 * simMTU)
			for range messages {
				a.post(Request{Op: ib.OpSend, Len: uint32(len(data))}, data)
			}
			a.pump()
			n.run(func() bool { return len(a.done) == messages && n.ended() })
			for i, st := range a.done {
				if st != ib.WCSuccess {
					t.Errorf("request %d ends with %v", i, st)
				}
			}
			if pool.Lent() != 0 {
				t.Errorf("%d bytes are lent", pool.Lent())
			}
		})
	}
}

// What has no payload keeps nothing of the buffer that it came in: an empty slice of that is not the pool's.
func TestEarlyWithoutPayload(t *testing.T) {
	pool := NewEarlyPool(4 << 20)
	r := NewResponder(Config{MTU: 4096, Selective: true, Early: pool}, nobody{})
	p := earlyPacket(1, 1<<16)
	p.Payload = p.Payload[:0]
	r.Receive(p)
	if n := r.ahead.n; n != 1 {
		t.Fatalf("%d packets are kept", n)
	}
	r.Receive(earlyPacket(0, 64))
	if r.want != 2 || pool.Lent() != 0 {
		t.Errorf("%d is expected next; %d bytes are lent", r.want, pool.Lent())
	}
}
