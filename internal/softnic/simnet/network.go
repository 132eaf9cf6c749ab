package simnet

import (
	"container/heap"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Faults are what a Network does to packets: shares of them, between 0 and 1, and times. Packets between two hosts that are not put
// behind others arrive in the order in which they were sent.
type Faults struct {
	Delay     time.Duration // of each packet
	Jitter    time.Duration // up to that much more
	Loss      float64
	Duplicate float64
	Corrupt   float64 // one to three bits are turned around
	Reorder   float64 // of the others, ReorderBy behind their turn at most
	ReorderBy time.Duration
	// In each period of length Every no packet arrives for a time of length For, at a place that follows from the seed. 0: always.
	Every, For time.Duration
	// KeepRefusals: the refusal of a request always arrives. It is sent once, since it ends the connection, and a requester that
	// does not hear it says that the peer does not answer.
	KeepRefusals bool
}

// Lossy reports whether there are packets that do not arrive, or not in order.
func (f *Faults) Lossy() bool { return f.Loss+f.Duplicate+f.Corrupt+f.Reorder > 0 || f.For > 0 }

// Counters count packets.
type Counters struct {
	Sent, Lost, Repeated, Corrupted, Reordered, CutOff uint64
	Refused                                            uint64 // arrived, and were refused for their invariant CRC or their headers
	Stray                                              uint64 // to an address where nobody is
}

// A Network joins hosts. It is safe for concurrent use; its order of events follows from the seed if one goroutine uses it.
type Network struct {
	stepping sync.Mutex // held for a step; comes before every lock of a NIC

	mu     sync.Mutex // a leaf
	seed   uint64
	faults Faults
	fate   *rand.Rand
	keys   *rand.Rand
	now    time.Duration
	order  uint64
	events events
	hosts  []*Host
	last   map[[2]netip.AddrPort]time.Duration // arrival of the last packet that was not put behind others
	trace  hash.Hash
	count  Counters
	more   chan struct{} // closed when there is a new event; nil: nobody waits for one
}

// never is the time of what does not happen.
const never time.Duration = math.MaxInt64

// An event is the arrival of a packet, or a timer.
type event struct {
	at    time.Duration
	order uint64
	to    *Host
	pkt   datagram
	fire  func()
	index int // in the heap; -1: not in it
}

type events []*event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].order < e[j].order
}
func (e events) Swap(i, j int) {
	e[i], e[j] = e[j], e[i]
	e[i].index, e[j].index = i, j
}
func (e *events) Push(x any) {
	ev := x.(*event)
	ev.index = len(*e)
	*e = append(*e, ev)
}
func (e *events) Pop() any {
	old := *e
	ev := old[len(old)-1]
	old[len(old)-1] = nil
	*e = old[:len(old)-1]
	ev.index = -1
	return ev
}

// New makes a network.
func New(seed uint64, f Faults) *Network {
	return &Network{seed: seed, faults: f, fate: rand.New(rand.NewPCG(seed, 1)), keys: rand.New(rand.NewPCG(seed, 2)),
		last: map[[2]netip.AddrPort]time.Duration{}, trace: sha256.New()}
}

// Now returns the time since the network was made.
func (n *Network) Now() time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.now
}

// Uint32 returns a number that follows from the seed: for keys and identities of the NICs.
func (n *Network) Uint32() uint32 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.keys.Uint32()
}

// Counters returns what has been counted.
func (n *Network) Counters() Counters {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.count
}

// Trace is a checksum of all packets so far: when each was sent, from where to where, its bytes, when it arrives. The addresses of
// memory in them are left out: the system chooses these.
func (n *Network) Trace() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return hex.EncodeToString(n.trace.Sum(nil)[:8])
}

// Step lets happen what comes next: work that the NICs have put off, or else the next event. It reports whether there was any. No
// lock of a NIC is held.
func (n *Network) Step() bool {
	n.stepping.Lock()
	defer n.stepping.Unlock()
	n.mu.Lock()
	hosts := n.hosts
	n.mu.Unlock()
	some := false
	for _, h := range hosts {
		if h.work() {
			some = true
		}
	}
	if some {
		return true
	}
	n.mu.Lock()
	at, timed := never, (*Host)(nil)
	for _, h := range n.hosts {
		if h.wakeAt < at {
			at, timed = h.wakeAt, h
		}
	}
	if len(n.events) > 0 && n.events[0].at <= at {
		ev := n.arrive()
		n.mu.Unlock()
		if ev.fire != nil {
			ev.fire()
		} else {
			ev.to.turn()
		}
		return true
	}
	if timed != nil {
		n.now = max(n.now, at)
		timed.wakeAt = never
	}
	n.mu.Unlock()
	if timed == nil {
		return false
	}
	timed.turn()
	return true
}

// arrive takes the first event, and the packets that arrive at its host with it. Called with mu held.
func (n *Network) arrive() *event {
	ev := heap.Pop(&n.events).(*event)
	n.now = max(n.now, ev.at)
	if ev.to == nil {
		return ev
	}
	ev.to.inbox = append(ev.to.inbox, ev.pkt)
	for len(n.events) > 0 && n.events[0].at == ev.at && n.events[0].to == ev.to {
		ev.to.inbox = append(ev.to.inbox, heap.Pop(&n.events).(*event).pkt)
	}
	return ev
}

// schedule has the event happen. Called with mu held.
func (n *Network) schedule(ev *event) {
	n.order++
	ev.order = n.order
	heap.Push(&n.events, ev)
	n.news()
}

// Wake has those who sleep because nothing was left to happen look again: a NIC has put off work.
func (n *Network) Wake() {
	n.mu.Lock()
	n.news()
	n.mu.Unlock()
}

// news wakes who sleeps because nothing was left to happen. Called with mu held.
func (n *Network) news() {
	if n.more != nil {
		close(n.more)
		n.more = nil
	}
}

// Sleep steps until c has something, which it takes, or ctx ends. If nothing is left to happen it waits until somebody changes that.
func (n *Network) Sleep(ctx context.Context, c <-chan struct{}) error {
	for {
		select {
		case <-c:
			return nil
		default:
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		n.mu.Lock()
		if n.more == nil {
			n.more = make(chan struct{})
		}
		more := n.more
		n.mu.Unlock()
		if n.Step() {
			continue
		}
		select {
		case <-c:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-more:
		}
	}
}

// Advance lets the time pass.
func (n *Network) Advance(d time.Duration) {
	ctx, cancel := n.Timeout(d)
	defer cancel()
	n.Sleep(ctx, nil)
}

// Poll repeats f until it says that it is done, or the time d has passed, or nothing is left to happen; between, it steps. It reports
// whether f has said so.
func (n *Network) Poll(d time.Duration, f func() bool) bool {
	for end := n.Now() + d; ; {
		if f() {
			return true
		}
		if n.Now() >= end || !n.Step() {
			return f()
		}
	}
}

// Timeout returns a context that ends when the time d has passed, or with cancel.
func (n *Network) Timeout(d time.Duration) (context.Context, context.CancelFunc) {
	c := &timeout{done: make(chan struct{})}
	ev := &event{fire: func() { c.end(context.DeadlineExceeded) }}
	n.mu.Lock()
	ev.at = n.now + d
	n.schedule(ev)
	n.mu.Unlock()
	return c, func() {
		n.mu.Lock()
		if ev.index >= 0 {
			heap.Remove(&n.events, ev.index)
		}
		n.mu.Unlock()
		c.end(context.Canceled)
	}
}

// timeout is a context in virtual time.
type timeout struct {
	done chan struct{}
	mu   sync.Mutex
	err  error
}

func (c *timeout) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
		close(c.done)
	}
}

func (c *timeout) Deadline() (time.Time, bool) { return time.Time{}, false } // none in real time
func (c *timeout) Done() <-chan struct{}       { return c.done }
func (c *timeout) Value(any) any               { return nil }
func (c *timeout) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// cut reports whether nothing arrives at that time.
func (n *Network) cut(at time.Duration) bool {
	if n.faults.For == 0 || n.faults.Every <= n.faults.For {
		return false
	}
	k := at / n.faults.Every
	from := k*n.faults.Every + time.Duration(rand.New(rand.NewPCG(n.seed, uint64(k)+3)).Int64N(int64(n.faults.Every-n.faults.For)))
	return at >= from && at < from+n.faults.For
}

// send has a packet go its way. Called with mu held.
func (n *Network) send(src netip.AddrPort, o *outgoing) {
	dst := o.to
	n.count.Sent++
	f := &n.faults
	kept := o.kept && f.KeepRefusals
	var to *Host
	if i := slices.IndexFunc(n.hosts, func(h *Host) bool { return h.local == dst }); i >= 0 {
		to = n.hosts[i]
	}
	copies := 1
	switch x := n.fate.Float64(); {
	case to == nil:
		copies, n.count.Stray = 0, n.count.Stray+1
	case kept:
	case x < f.Loss:
		copies, n.count.Lost = 0, n.count.Lost+1
	case x < f.Loss+f.Duplicate:
		copies, n.count.Repeated = 2, n.count.Repeated+1
	}
	n.note(n.now, src, dst, o.traced)
	for range copies {
		at, changed := n.arrival(src, dst, kept), 0
		b := slices.Clone(o.b)
		if !kept && n.fate.Float64() < f.Corrupt {
			changed = n.corrupt(b)
		}
		if !kept && n.cut(at) {
			n.count.CutOff++
			at = never
		}
		if binary.Write(n.trace, binary.LittleEndian, [2]int64{int64(at), int64(changed)}); at != never {
			n.schedule(&event{at: at, to: to, pkt: datagram{src, o.ip, b}})
		}
	}
}

func (n *Network) note(at time.Duration, src, dst netip.AddrPort, b []byte) {
	fmt.Fprintf(n.trace, "%d %v %v %d ", at, src, dst, len(b))
	n.trace.Write(b)
}

// tick is the resolution of arrivals: so that some come together.
const tick = time.Microsecond

// arrival returns when a packet arrives that is sent now.
func (n *Network) arrival(src, dst netip.AddrPort, kept bool) time.Duration {
	f := &n.faults
	at := n.now + f.Delay + time.Duration(n.fate.Int64N(int64(f.Jitter)+1))
	link := [2]netip.AddrPort{src, dst}
	if !kept && n.fate.Float64() < f.Reorder {
		n.count.Reordered++
		return (at + time.Duration(n.fate.Int64N(int64(f.ReorderBy)+1))).Truncate(tick)
	}
	at = max(at.Truncate(tick), n.last[link])
	n.last[link] = at
	return at
}

// maskedByte is the byte of a packet that the invariant CRC leaves out: marks of congestion, which links may set.
const maskedByte = 4

// corrupt turns bits around, and returns something that says which.
func (n *Network) corrupt(b []byte) (which int) {
	n.count.Corrupted++
	turned := map[int]bool{}
	for want := 1 + n.fate.IntN(3); len(turned) < want; {
		bit := n.fate.IntN(len(b) * 8)
		if bit/8 == maskedByte || turned[bit] {
			continue
		}
		turned[bit] = true
		b[bit/8] ^= 1 << (bit % 8)
		which = which*40000 + bit + 1
	}
	return which
}
