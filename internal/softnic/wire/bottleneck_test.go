package wire

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A bottleneck is a link that several connections share: it has a rate, and a queue of finite length in front of it that marks
// packets behind a threshold.
type bottleneck struct {
	each  time.Duration // that a byte takes, times 1024
	limit time.Duration // the queue is full when it takes so long to empty
	mark  time.Duration // packets behind a queue that is longer are marked; 0: none are
	free  time.Duration // when everything that is queued will have left

	sent, marked, dropped int
	busy                  time.Duration
	depths                []time.Duration // the queue, at fixed times
}

func (l *bottleneck) depth(now time.Duration) time.Duration { return max(0, l.free-now) }

// take queues a packet, and returns how long it takes until it has left.
func (l *bottleneck) take(now time.Duration, b []byte) (time.Duration, bool) {
	q, size := l.depth(now), time.Duration(len(b)+wireBytes)*l.each>>10
	if q+size > l.limit {
		l.dropped++
		return 0, false
	}
	if l.mark > 0 && q > l.mark {
		b[4] |= 1 << 7 // FECN, which the invariant CRC does not cover
		l.marked++
	}
	l.sent++
	l.busy += size
	l.free = now + q + size
	return l.free - now, true
}

const (
	wireBytes = 14 + 20 + 8 // in front of the BTH
	// fullPacket is the time that a link of a bottleneckOf takes for a packet with a full payload.
	fullPacket = time.Microsecond
)

// bottleneckOf returns a link with a queue of so many full packets.
func bottleneckOf(limit, mark int) *bottleneck {
	return &bottleneck{each: fullPacket << 10 / (simMTU + 12 + 4 + wireBytes), limit: time.Duration(limit) * fullPacket, mark: time.Duration(mark) * fullPacket}
}

// A fabric is connections in one virtual time.
type fabric struct {
	t     *testing.T
	flows []*flow
	link  *bottleneck
	now   time.Duration
}

// A flow is a connection whose node 0 keeps a queue full of requests from start to stop, or posts one now and then.
type flow struct {
	*network
	op          ib.Opcode
	size        int
	start, stop time.Duration
	every       time.Duration // one request a time; 0: as many as there is room for
	deep        int
	next        time.Duration
	last        ib.PSN
	got         int // packets that were acknowledged, ever
	mark        int // of them, when the measurement began
	posted      []time.Duration
	took        []time.Duration // of each request
}

type flowConfig struct {
	delay       time.Duration // one way
	start, stop time.Duration
	op          ib.Opcode
	size        int // packets
	every       time.Duration
	loss        float64
	off         bool // no congestion control
}

func newFabric(t *testing.T, seed uint64, link *bottleneck, flows ...flowConfig) *fabric {
	f := &fabric{t: t, link: link}
	starts := rand.New(rand.NewPCG(seed, 7))
	for i, c := range flows {
		n := newNetwork(t, seed*1000+uint64(i), func(cfg *Config) {
			cfg.Selective, cfg.Congestion, cfg.AckTimeout, cfg.RetryCount = true, !c.off, 67*time.Millisecond, 7
			cfg.MaxRdAtomic, cfg.MaxDestRdAtomic = 16, 16 // as is usual
		})
		n.delay, n.link, n.loss, n.jitter = c.delay, link, c.loss, fullPacket/2
		x := &flow{network: n, op: c.op, size: max(1, c.size) * simMTU, start: c.start + time.Duration(starts.Int64N(int64(20*time.Microsecond))), stop: c.stop,
			every: c.every, deep: 32}
		if c.op == ib.OpRDMARead {
			n.via = 1
		}
		x.next, x.last = x.start, n.nodes[0].req.una
		f.flows = append(f.flows, x)
	}
	return f
}

var payload, sink = payloadOf(1 << 16), make([]byte, 1<<16)

// turn has the flow post what it wants to, and send what it can.
func (x *flow) turn() {
	a := x.nodes[0]
	for x.now >= x.next && (x.stop == 0 || x.now < x.stop) && a.req.Queued() < x.deep {
		x.posted = append(x.posted, x.now)
		a.sends = append(a.sends, payload[:x.size])
		a.sinks = append(a.sinks, sink)
		a.req.Post(&Request{Op: x.op, Len: uint32(x.size), RKey: memKey})
		if x.every > 0 {
			x.next += x.every
		}
	}
	a.pump()
	for n := len(x.took); n < len(a.done); n++ {
		if a.done[n] != ib.WCSuccess {
			x.t.Fatalf("request %d ends with %v", n, a.done[n])
		}
		x.took = append(x.took, x.now-x.posted[n])
	}
	x.got += int(distance(x.last, a.req.una))
	x.last = a.req.una
}

// due is when something happens next, for who it is: nil for a packet, or for a post.
func (x *flow) due() (at time.Duration, who *node) {
	at = 1 << 62
	if len(x.events) > 0 {
		at = x.events[0].at
	}
	for _, a := range x.nodes {
		if d := a.req.Deadline(); d != 0 && d < at {
			at, who = d, a
		}
	}
	if x.nodes[0].req.Queued() < x.deep && x.next < at && (x.stop == 0 || x.next < x.stop) && (x.every > 0 || x.next > x.now) {
		at, who = x.next, nil
	}
	return at, who
}

// sampleEvery is how often the queue is looked at.
const sampleEvery = 5 * time.Microsecond

// run runs until a time, from when on what happens is measured.
func (f *fabric) run(until time.Duration) {
	for sample := f.now + sampleEvery; ; {
		var first *flow
		at, who := time.Duration(1<<62), (*node)(nil)
		for _, x := range f.flows {
			if d, w := x.due(); d < at {
				at, who, first = d, w, x
			}
		}
		for ; sample <= min(at, until); sample += sampleEvery {
			f.link.depths = append(f.link.depths, f.link.depth(sample))
		}
		if at > until {
			f.now = until
			return
		}
		f.now, first.now = at, at
		switch {
		case who != nil:
			who.req.Expire(at)
			who.pump()
		case len(first.events) > 0 && first.events[0].at == at:
			heap.Pop(&first.events).(event).do()
		}
		first.turn()
	}
}

// measure forgets what was before, and runs for a time.
func (f *fabric) measure(d time.Duration) *findings {
	l := f.link
	l.sent, l.marked, l.dropped, l.busy, l.depths = 0, 0, 0, 0, l.depths[:0]
	for _, x := range f.flows {
		x.mark, x.took = x.got, x.took[:len(x.took):len(x.took)]
	}
	before := make([]int, len(f.flows))
	for i, x := range f.flows {
		before[i] = len(x.took)
	}
	f.run(f.now + d)
	r := &findings{used: float64(l.busy) / float64(d), loss: float64(l.dropped) / float64(max(1, l.sent+l.dropped)), marked: float64(l.marked) / float64(max(1, l.sent))}
	sum := 0
	for i, x := range f.flows {
		r.shares = append(r.shares, float64(x.got-x.mark))
		r.took = append(r.took, slices.Sorted(slices.Values(x.took[before[i]:])))
		sum += x.got - x.mark
	}
	r.goodput = float64(sum) * float64(fullPacket) / float64(d)
	slices.Sort(l.depths)
	at := func(p float64) float64 {
		return float64(l.depths[int(p*float64(len(l.depths)-1))]) / float64(fullPacket)
	}
	r.p50, r.p99 = at(0.5), at(0.99)
	return r
}

// findings are what a measurement found.
type findings struct {
	shares   []float64 // packets of each flow
	used     float64   // of the link's time
	goodput  float64   // the same, without what was sent again
	loss     float64   // of what came to the link
	marked   float64
	p50, p99 float64 // of the queue, in full packets
	took     [][]time.Duration
}

// jain is Jain's index of fairness.
func jain(shares []float64) float64 {
	sum, squares := 0.0, 0.0
	for _, x := range shares {
		sum += x
		squares += x * x
	}
	return sum * sum / (float64(len(shares)) * squares)
}

func (r *findings) String() string {
	return fmt.Sprintf("fairness %.3f, used %.2f, goodput %.2f, loss %.4f, marked %.2f, queue p50 %.0f p99 %.0f", jain(r.shares), r.used, r.goodput, r.loss, r.marked, r.p50, r.p99)
}
