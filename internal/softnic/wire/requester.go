package wire

import (
	"slices"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Request is a work request, without its local memory.
type Request struct {
	Op         ib.Opcode
	Solicited  bool
	Fence      bool
	Quiet      bool   // nobody waits for it to end: it may be acknowledged with a later one
	Len        uint32 // bytes to send or to read; 8 of an atomic
	Addr       uint64
	RKey       uint32
	Imm        uint32 // as it is on the wire
	InvKey     uint32
	CompareAdd uint64
	Swap       uint64
	Flush      ib.Flush
}

// response reports whether the request is answered by more than an acknowledgement.
func (r *Request) response() bool {
	return r.Op == ib.OpRDMARead || r.atomic() || r.Op == ib.OpFlush || r.Op == ib.OpAtomicWrite
}

// atomic reports whether the answer is what was found. That of a FLUSH and an ATOMIC WRITE is as of a READ of nothing.
func (r *Request) atomic() bool { return r.Op == ib.OpAtomicCmpSwap || r.Op == ib.OpAtomicFetchAdd }

// implied reports whether the response says no more than that the request was executed, as any later acknowledgement or response does: so it
// is for a FLUSH and an ATOMIC WRITE. A responder answers in the order of requests (IBA 9.5), and answers a FLUSH when what it is about is
// visible, or persistent (A19); so whatever answers a later request is no sooner than that, and this is no weaker a promise than the response's
// own. A READ or an atomic whose response is missing has to be asked for again, for what it was to bring. For these two that is spared, and it
// may be in vain: rxe does not note the PSN of a FLUSH that it has executed, and drops it when it comes again (rxe_prepare_res).
func (r *Request) implied() bool { return r.Op == ib.OpFlush || r.Op == ib.OpAtomicWrite }

// answer is how many bytes the response to the packet psn of e has.
func (r *Requester) answer(e *entry, psn ib.PSN) uint32 {
	if e.Op != ib.OpRDMARead {
		return 0
	}
	return min(e.Len-uint32(distance(e.first, psn))*uint32(r.cfg.MTU), uint32(r.cfg.MTU))
}

// A SendQueue is the local side of requests, which are counted from 0 as they are posted.
type SendQueue interface {
	// Gather copies the payload of request n from byte off on to dst, which it fills. false: the memory may not be read.
	Gather(n, off uint32, dst []byte) bool
	// Scatter copies what was read to the memory of request n from byte off on. false: the memory may not be written.
	Scatter(n, off uint32, src []byte) bool
	// Complete ends request n; those before have ended. After one that did not succeed, all others are flushed.
	Complete(n uint32, st ib.WCStatus)
}

// A Requester is the sending half of a connection (IBA 9.7.2 to 9.7.8).
//
// Requests take their PSNs when they are posted. Those from head on have not ended. Of request cur, the packet nxt is to be
// sent next; what is behind it was not sent yet, or is sent again. una is the oldest PSN that was not acknowledged, end the one
// behind the newest that was ever sent. A READ is asked for in parts (chunk), so that what is on its way has a bound.
type Requester struct {
	cfg  Config
	q    SendQueue
	reqs []entry
	head uint32
	cur  uint32
	tail uint32
	una  ib.PSN
	nxt  ib.PSN
	end  ib.PSN
	free ib.PSN // of the next request

	failed  bool
	bad     ib.WCStatus // if not success, request badAt cannot be sent for it
	badAt   uint32
	asks    []ib.PSN // ends of what was asked for, by READs and atomics, and has not come: oldest first. Again it is asked for in the same parts
	unasked int      // packets since the last one that asked for an acknowledgement
	wanted  bool     // there is a request among them whose end somebody waits for
	asked   bool     // what was lost behind una was asked for again already
	retries uint8    // left, until something is acknowledged
	rnr     uint8
	why     Reason // of the last rewind
	again   Reason // why the packet that is being sent is sent again

	pkt      roce.Packet   // the one that is being sent: an Output would have it on the heap
	old      [8]byte       // the same for what an atomic has found
	deadline time.Duration // when una must have been acknowledged; 0: nothing is on its way
	rnrUntil time.Duration // nothing is sent before; 0: the peer has not asked for that

	sel selective
	cc  congestion

	Counters RequesterCounters
}

// RequesterCounters say what a Requester has done, and why.
type RequesterCounters struct {
	Sent     uint64 // packets
	Resent   uint64 // of those, for a second time at least
	Timeouts uint64 // nothing was acknowledged for Config.AckTimeout
	SeqNAKs  uint64 // the peer has missed a packet
	RNRNAKs  uint64 // the peer had no receive posted
	Implied  uint64 // a response was missing
	Single   uint64 // of those sent again, packets that were sent again by themselves (Config.Selective)
	Marked   uint64 // packets that have met congestion, as far as is known
	Notified uint64 // CNPs
	Slowed   uint64 // times that the window was made smaller
	Dropped  uint64 // packets that say nothing new, or make no sense

	Again [Reasons]uint64 // Resent, by why
}

// Add adds o.
func (c *RequesterCounters) Add(o *RequesterCounters) {
	c.Sent += o.Sent
	c.Resent += o.Resent
	c.Timeouts += o.Timeouts
	c.SeqNAKs += o.SeqNAKs
	c.RNRNAKs += o.RNRNAKs
	c.Implied += o.Implied
	c.Single += o.Single
	c.Marked += o.Marked
	c.Notified += o.Notified
	c.Slowed += o.Slowed
	c.Dropped += o.Dropped
	for why, n := range o.Again {
		c.Again[why] += n
	}
}

type entry struct {
	Request
	first   ib.PSN
	packets uint32 // PSNs that it takes
	got     uint32 // bytes of the response that have come
	done    bool   // the response is whole
}

// end is the PSN behind the request's last one.
func (e *entry) end() ib.PSN { return e.first.Add(int32(e.packets)) }

// NewRequester returns a Requester without requests.
func NewRequester(cfg Config, q SendQueue) *Requester {
	cfg.fill()
	r := &Requester{cfg: cfg, q: q, reqs: make([]entry, cfg.SendDepth), una: cfg.SQPSN, nxt: cfg.SQPSN, end: cfg.SQPSN, free: cfg.SQPSN,
		asks: make([]ib.PSN, 0, cfg.MaxRdAtomic), retries: cfg.RetryCount, rnr: cfg.RNRRetry}
	r.sel.init(&cfg)
	r.cc.init(&cfg)
	return r
}

// Change takes what of cfg may change while a connection lasts (IBA 11.2.5.3): AckTimeout, RetryCount, RNRRetry and MaxRdAtomic. It holds for what
// is sent from now on.
func (r *Requester) Change(cfg Config) {
	r.cfg.AckTimeout, r.cfg.RetryCount, r.cfg.RNRRetry, r.cfg.MaxRdAtomic = cfg.AckTimeout, cfg.RetryCount, cfg.RNRRetry, cfg.MaxRdAtomic
	r.retries, r.rnr = cfg.RetryCount, cfg.RNRRetry
	r.asks = slices.Grow(r.asks, max(0, cfg.MaxRdAtomic-len(r.asks)))
	if cfg.AckTimeout == 0 {
		r.deadline = 0
	}
}

func (r *Requester) at(n uint32) *entry { return &r.reqs[n&uint32(len(r.reqs)-1)] }

// Queued returns how many requests have not ended.
func (r *Requester) Queued() int { return int(r.tail - r.head) }

// Failed reports whether a request has failed: the connection has ended.
func (r *Requester) Failed() bool { return r.failed }

// Heard reports whether the peer has acknowledged something: it is this connection's.
func (r *Requester) Heard() bool { return r.una != r.cfg.SQPSN }

// Post queues a request, for which there must be room: Queued is less than Config.SendDepth. Pump sends it. A request of a
// connection that has ended is flushed.
func (r *Requester) Post(req *Request) {
	n := r.tail
	r.tail++
	if r.failed {
		r.head, r.cur = r.tail, r.tail
		r.q.Complete(n, ib.WCFlushErr)
		return
	}
	e := r.at(n)
	*e = entry{Request: *req, first: r.free, packets: packets(req.Len, r.cfg.MTU)}
	if e.atomic() {
		e.packets = 1
	}
	r.free = e.end()
}

// Pump sends what may be sent. It reports whether out was full.
func (r *Requester) Pump(now time.Duration, out Output) (full bool) {
	idle := r.deadline == 0
	full = r.pump(now, out)
	if idle && r.deadline != 0 { // how long the answer takes depends on what was sent last
		r.deadline = 0
		r.watch(now)
	}
	return full
}

func (r *Requester) pump(now time.Duration, out Output) (full bool) {
	if r.sel.lost.n > 0 && r.resend(now, out) {
		return true
	}
	for r.cur != r.tail && !r.failed && r.rnrUntil == 0 {
		e := r.at(r.cur)
		fresh := r.nxt == r.end
		if e.packets > maxPackets {
			r.spoil(r.cur, ib.WCLocalLengthErr)
			return false
		}
		if r.bad != ib.WCSuccess && r.cur == r.badAt || !r.may(e, fresh) || r.cc.wait(now) {
			return false
		}
		n, sent := uint32(1), false
		if r.again = First; !fresh {
			r.again = r.why
		}
		if e.response() {
			n = r.askedFor(e, r.nxt)
			known := r.known(r.nxt)
			if sent, full = r.ask(r.cur, r.nxt, n, out); sent && !known {
				r.asks = append(r.asks, r.nxt.Add(int32(n)))
			}
		} else {
			sent, full = r.send(r.cur, r.nxt, out)
		}
		if !sent {
			return full // or it cannot be sent at all
		}
		r.count()
		r.nxt = r.nxt.Add(int32(n))
		if distance(r.end, r.nxt) > 0 {
			r.end = r.nxt
		}
		if r.nxt == e.end() {
			r.cur++
		}
		if fresh && r.cfg.Selective {
			idle := r.una.Add(int32(n)) == r.nxt
			if idle {
				r.sel.from = r.una
			}
			if r.sel.sent(r.nxt, now, idle, r.unasked == 0) {
				r.cc.restart()
			}
		}
		r.cc.sent(now, r.sel.rtt)
		r.watch(now)
	}
	return false
}

// chunk is how many packets a READ asks for at a time: there is room for some in the window, as far as there may be some.
func (r *Requester) chunk() uint32 {
	return uint32(max(1, r.cc.packets()/min(4, max(1, r.cfg.MaxRdAtomic))))
}

// part is how many packets of e's response the next request asks for, from psn on: to the end of a chunk.
func (r *Requester) part(e *entry, psn ib.PSN) uint32 {
	at, chunk := uint32(distance(e.first, psn)), r.chunk()
	return min(e.packets, at/chunk*chunk+chunk) - at
}

// askedFor is how many packets of e's response are asked for again at a time, from psn on: to the end of what was asked for at first. In
// smaller parts they would be more than the peer remembers, in larger ones other than it remembers. And what the window is now says nothing
// about where an answer ends that was asked for before.
func (r *Requester) askedFor(e *entry, psn ib.PSN) uint32 {
	for _, end := range r.asks {
		if n := min(distance(psn, end), distance(psn, e.end())); n > 0 {
			return uint32(n)
		}
	}
	return r.part(e, psn)
}

// known reports whether what is asked for from psn on is in asks.
func (r *Requester) known(psn ib.PSN) bool {
	return len(r.asks) > 0 && distance(psn, r.asks[len(r.asks)-1]) > 0
}

// may reports whether the next packet, of e, may be sent; fresh: it would be for the first time.
func (r *Requester) may(e *entry, fresh bool) bool {
	outstanding, window := r.underWay(e.response()), r.cc.packets()
	switch {
	case distance(r.una, r.nxt) >= 2*int32(r.cfg.Window) || outstanding >= window && !r.unheard(outstanding):
		r.cc.limited = true
		return false
	case e.response():
		if fresh && e.Fence && r.nxt == e.first && len(r.asks) > 0 {
			return false
		}
		// The packets of a response take room, too.
		if n := int(r.askedFor(e, r.nxt)); outstanding > 0 && outstanding+n > window || int(distance(r.una, r.nxt))+n > 2*r.cfg.Window {
			r.cc.limited = true
			return false
		}
		if len(r.asks) < max(1, r.cfg.MaxRdAtomic) || r.known(r.nxt) { // 0: it has become so since they were posted
			return true
		}
		r.cc.limited = r.cc.limited || outstanding >= window/2 // parts that end with their messages are shorter
		return false
	case !fresh:
		return true
	case r.nxt != e.first:
		return true // in the middle of a message
	}
	return !e.Fence || len(r.asks) == 0
}

// unheard reports whether so many packets are on their way that have filled the window, and none of them will be acknowledged:
// the window was larger when they were sent, and one more has to go that asks.
func (r *Requester) unheard(outstanding int) bool {
	return r.cc.on && r.unasked >= outstanding && outstanding+1 >= r.cc.packets() && outstanding < r.cfg.Window
}

// holds reports whether request n holds the one behind it back until it is acknowledged: a READ whose response fills the window.
func (r *Requester) holds(n uint32) bool {
	if n+1 == r.tail {
		return false
	}
	e := r.at(n + 1)
	return e.response() && r.underWay(true)+1+int(r.part(e, e.first)) > r.cc.packets()
}

// send sends the packet psn of a SEND or WRITE, request n.
func (r *Requester) send(n uint32, psn ib.PSN, out Output) (sent, full bool) {
	e := r.at(n)
	i := uint32(distance(e.first, psn))
	off := i * uint32(r.cfg.MTU)
	size := min(e.Len-off, uint32(r.cfg.MTU))
	first, last := i == 0, i == e.packets-1
	p := &r.pkt
	*p = roce.Packet{PKey: roce.DefaultPKey, DestQP: r.cfg.DestQP, PSN: psn, Opcode: roce.Op(roce.RC, PacketOp(e.Op, first, last))}
	if last {
		p.Solicited = e.Solicited
		p.Imm, p.InvKey = e.Imm, e.InvKey
	}
	if first {
		p.Addr, p.RKey, p.Len = e.Addr, e.RKey, e.Len
	}
	// What is sent last is asked about, so that no timer is needed to find out about it; and of many packets some, so that the
	// window opens again. A peer of our kind acknowledges what nobody waits for in its own time.
	p.AckReq = last && n+1 == r.tail && (!e.Quiet || r.wanted || !r.cfg.Selective) || r.unasked+1 >= min(maxUnasked, r.cc.packets()/4) || psn != r.end ||
		r.unheard(r.underWay(false)) || last && r.holds(n) || r.sel.wonders()
	payload, ok := out.Packet(p, int(size))
	if !ok {
		return false, true
	}
	if !r.q.Gather(n, off, payload) {
		out.Abort()
		r.spoil(n, ib.WCLocalProtErr)
		return false, false
	}
	out.Commit()
	if psn == r.end {
		r.wanted = !p.AckReq && (r.wanted || last && !e.Quiet)
	}
	if r.unasked++; p.AckReq {
		r.unasked = 0
	}
	return true, false
}

// maxUnasked is after how many packets an acknowledgement is asked for.
const maxUnasked = 16

// PacketOp returns the opcode of a packet of a SEND or a WRITE.
func PacketOp(op ib.Opcode, first, last bool) uint8 {
	base := uint8(roce.SendFirst)
	if op == ib.OpRDMAWrite || op == ib.OpRDMAWriteWithImm {
		base = roce.WriteFirst
	}
	const middle, end, endImm, only, onlyImm = 1, 2, 3, 4, 5 // behind the first, for both
	imm := op == ib.OpSendWithImm || op == ib.OpRDMAWriteWithImm
	switch inv := op == ib.OpSendWithInv; {
	case first && last && inv:
		return roce.SendOnlyInv
	case last && inv:
		return roce.SendLastInv
	case first && last && imm:
		return base + onlyImm
	case first && last:
		return base + only
	case last && imm:
		return base + endImm
	case last:
		return base + end
	case first:
		return base
	}
	return base + middle
}

// ask sends request k, a READ, for n packets from psn on, or one that has an answer besides.
func (r *Requester) ask(k uint32, psn ib.PSN, n uint32, out Output) (sent, full bool) {
	e, size := r.at(k), 0
	p := &r.pkt
	*p = roce.Packet{PKey: roce.DefaultPKey, DestQP: r.cfg.DestQP, PSN: psn, AckReq: true, Addr: e.Addr, RKey: e.RKey}
	switch e.Op {
	case ib.OpRDMARead:
		p.Opcode = roce.Op(roce.RC, roce.ReadRequest)
		off := uint32(distance(e.first, psn)) * uint32(r.cfg.MTU)
		p.Addr += uint64(off)
		p.Len = min(e.Len-off, n*uint32(r.cfg.MTU))
	case ib.OpAtomicCmpSwap:
		p.Opcode = roce.Op(roce.RC, roce.CompareSwap)
		p.Swap, p.Cmp = e.Swap, e.CompareAdd
	case ib.OpFlush:
		p.Opcode = roce.Op(roce.RC, roce.Flush)
		p.FETH, p.Len = uint32(e.Flush.Placement)|uint32(e.Flush.Level)<<4, e.Flush.Length
	case ib.OpAtomicWrite:
		p.Opcode = roce.Op(roce.RC, roce.AtomicWrite)
		p.Len, size = e.Len, int(e.Len)
	default:
		p.Opcode = roce.Op(roce.RC, roce.FetchAdd)
		p.Swap = e.CompareAdd
	}
	payload, ok := out.Packet(p, size)
	if !ok {
		return false, true
	}
	if size > 0 && !r.q.Gather(k, 0, payload) {
		out.Abort()
		r.spoil(k, ib.WCLocalProtErr)
		return false, false
	}
	out.Commit()
	r.unasked, r.wanted = 0, r.wanted && psn != r.end
	return true, false
}

// spoil notes that request n cannot be sent: it fails once those before it have ended.
func (r *Requester) spoil(n uint32, st ib.WCStatus) {
	r.bad, r.badAt = st, n
	r.settle()
}

// settle fails the request that could not be sent, if those before it have ended.
func (r *Requester) settle() {
	if r.bad != ib.WCSuccess && !r.failed && r.head == r.badAt {
		r.fail(r.bad)
	}
}

// fail ends the oldest request with an error, and flushes the rest (IBA 9.9.2.4).
func (r *Requester) fail(st ib.WCStatus) {
	r.failed = true
	r.deadline, r.rnrUntil = 0, 0
	r.sel.lost.n = 0
	for r.head != r.tail {
		n := r.head
		r.head++
		r.q.Complete(n, st)
		st = ib.WCFlushErr
	}
	r.cur = r.head
}

// Fail ends the connection: the oldest request with st, the rest flushed.
func (r *Requester) Fail(st ib.WCStatus) {
	if !r.failed {
		r.fail(st)
	}
}
