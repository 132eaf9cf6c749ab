package wire

import (
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A UCRequester is the sending half of an unreliable connection (UC; IBA 9.8.2): a request has ended when it was sent. It
// sends SENDs and WRITEs.
type UCRequester struct {
	cfg    Config
	q      SendQueue
	reqs   []Request
	head   uint32
	tail   uint32
	off    uint32 // bytes of the head request that were sent
	begun  bool   // of the head request, a packet was sent
	next   ib.PSN
	failed bool
	pkt    roce.Packet // the one that is being sent: an Output would have it on the heap

	Sent uint64 // packets
}

// NewUCRequester returns a UCRequester without requests.
func NewUCRequester(cfg Config, q SendQueue) *UCRequester {
	return &UCRequester{cfg: cfg, q: q, reqs: make([]Request, cfg.SendDepth), next: cfg.SQPSN}
}

// Queued returns how many requests have not ended.
func (r *UCRequester) Queued() int { return int(r.tail - r.head) }

// Failed reports whether a request has failed, and what is posted is flushed.
func (r *UCRequester) Failed() bool { return r.failed }

// Resume has requests sent again after one has failed: the queue pair was taken from SQE to RTS.
func (r *UCRequester) Resume() { r.failed = false }

// Post queues a request, for which there must be room. Pump sends it.
func (r *UCRequester) Post(req *Request) {
	n := r.tail
	r.tail++
	if r.failed {
		r.head = r.tail
		r.q.Complete(n, ib.WCFlushErr)
		return
	}
	r.reqs[n&uint32(len(r.reqs)-1)] = *req
}

// Pump sends everything. It reports whether out was full.
func (r *UCRequester) Pump(_ time.Duration, out Output) (full bool) {
	for r.head != r.tail {
		req := &r.reqs[r.head&uint32(len(r.reqs)-1)]
		n := min(req.Len-r.off, uint32(r.cfg.MTU))
		last := n == req.Len-r.off
		p := &r.pkt
		*p = roce.Packet{PKey: roce.DefaultPKey, DestQP: r.cfg.DestQP, PSN: r.next, Opcode: roce.Op(roce.UC, PacketOp(req.Op, !r.begun, last)),
			Addr: req.Addr, RKey: req.RKey, Len: req.Len, Imm: req.Imm, Solicited: req.Solicited && last}
		payload, ok := out.Packet(p, int(n))
		if !ok {
			return true
		}
		if !r.q.Gather(r.head, r.off, payload) {
			out.Abort()
			r.fail(ib.WCLocalProtErr)
			return false
		}
		out.Commit()
		r.Sent++
		r.next = r.next.Add(1)
		r.off += n
		r.begun = true
		if last {
			r.off, r.begun = 0, false
			r.head++
			r.q.Complete(r.head-1, ib.WCSuccess)
		}
	}
	return false
}

func (r *UCRequester) fail(st ib.WCStatus) {
	r.failed = true
	r.off, r.begun = 0, false
	for r.head != r.tail {
		n := r.head
		r.head++
		r.q.Complete(n, st)
		st = ib.WCFlushErr
	}
}

// A UCResponder is the executing half of an unreliable connection (IBA 9.8.3): messages of which a packet is missing, that
// nobody has posted a receive for, or that may not be written where they ask to, have never been.
type UCResponder struct {
	t      Target
	msg    assembly
	want   ib.PSN
	skip   bool // the message is one that has never been
	failed bool

	Counters UCResponderCounters
}

// UCResponderCounters say what a UCResponder has met.
type UCResponderCounters struct {
	Received  uint64 // packets
	Missed    uint64 // of those, that came behind one that is missing
	NoReceive uint64 // messages without a receive
	Refused   uint64 // messages that may not be what they are, or where they want to
	Dropped   uint64 // packets that were not of a message that was taken whole
}

// Add adds o.
func (c *UCResponderCounters) Add(o *UCResponderCounters) {
	c.Received += o.Received
	c.Missed += o.Missed
	c.NoReceive += o.NoReceive
	c.Refused += o.Refused
	c.Dropped += o.Dropped
}

// NewUCResponder returns a UCResponder that expects the first packet.
func NewUCResponder(cfg Config, t Target) *UCResponder {
	return &UCResponder{t: t, msg: assembly{mtu: cfg.MTU, t: t}, want: cfg.RQPSN}
}

// Failed reports whether a message did not fit its receive, which ends the connection.
func (r *UCResponder) Failed() bool { return r.failed }

// Receive takes a packet, which roce.Packet.Decode has checked.
func (r *UCResponder) Receive(p *roce.Packet) {
	r.Counters.Received++
	if r.failed {
		r.Counters.Dropped++
		return
	}
	missed := p.PSN != r.want
	if missed {
		r.Counters.Missed++
	}
	r.want = p.PSN.Add(1)
	if missed || p.Opcode.First() {
		r.msg.drop()
		r.skip = !p.Opcode.First()
	}
	if r.skip {
		r.Counters.Dropped++
		return
	}
	st, there := r.msg.add(p, false)
	if st == ib.WCSuccess && there {
		return
	}
	r.Counters.Dropped++
	if there {
		r.Counters.Refused++
	} else {
		r.Counters.NoReceive++
	}
	r.skip = true
	r.msg.drop()
	if r.msg.spoilt { // which is the end of the queue pair (IBA 9.9.3.1)
		r.failed = true
		r.t.Fail(st)
	}
}
