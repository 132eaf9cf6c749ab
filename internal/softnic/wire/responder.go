package wire

import (
	"encoding/binary"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Responder is the executing half of a connection (IBA 9.7.3 to 9.7.5).
type Responder struct {
	cfg Config
	t   Target

	want    ib.PSN // of the packet that is expected next
	plain   ib.PSN // of the last packet that was executed and has no other answer than an acknowledgement
	msn     uint32 // messages that were executed, 24 bits
	nakked  bool   // the peer was told that want is missing
	late    bool   // Config.Selective: something was executed that no acknowledgement was asked for
	failed  bool
	msg     assembly
	ahead   aheads   // Config.Selective
	results []result // of the newest READs and atomics, by number
	nresult uint32   // of them, ever
	out     []response
	outHead uint32
	outTail uint32
	marked  uint32 // packets that came with FECN, 24 bits
	told    uint32 // how many of them the peer was told of
	toldAt  time.Duration
	pkt     roce.Packet // the one that is being sent: an Output would have it on the heap

	Counters ResponderCounters
}

// ResponderCounters say what a Responder has met.
type ResponderCounters struct {
	Received   uint64 // packets of requests
	Duplicates uint64 // of those, that were executed before
	Missed     uint64 // that came before one that is missing
	NoReceive  uint64 // messages without a receive
	// Requests that ended the connection, by what the peer was told: what they asked for may not be; they make no sense; they
	// could not be done.
	Access, Invalid, Operation uint64
	Dropped                    uint64 // that nothing could be done with
	Marked                     uint64 // that have met congestion on their way
	Notices                    uint64 // CNPs that were sent for them
}

// Refused returns how many requests ended the connection.
func (c *ResponderCounters) Refused() uint64 { return c.Access + c.Invalid + c.Operation }

// Add adds o.
func (c *ResponderCounters) Add(o *ResponderCounters) {
	c.Received += o.Received
	c.Duplicates += o.Duplicates
	c.Missed += o.Missed
	c.NoReceive += o.NoReceive
	c.Access += o.Access
	c.Invalid += o.Invalid
	c.Operation += o.Operation
	c.Dropped += o.Dropped
	c.Marked += o.Marked
	c.Notices += o.Notices
}

// A result is kept of a READ, or of what else has an answer, in case that its response is lost.
type result struct {
	first   ib.PSN
	packets uint32
	op      uint8 // of the packet
	addr    uint64
	rkey    uint32
	len     uint32
	old     uint64 // what the atomic has found
	msn     uint32
}

// A response waits to be sent: an acknowledgement, or what a result has.
type response struct {
	psn      ib.PSN // of its next packet
	msn      uint32
	syndrome roce.Syndrome
	result   bool
	atomic   bool
	begun    bool // a packet of it was sent
	repeat   bool // it was sent before
	old      uint64
	addr     uint64 // of the next packet
	rkey     uint32
	left     uint32
}

// NewResponder returns a Responder that expects the first packet.
func NewResponder(cfg Config, t Target) *Responder {
	cfg.fill()
	if cfg.Early == nil {
		cfg.Early = NewEarlyPool(16 << 20)
	}
	r := &Responder{cfg: cfg, t: t, ahead: aheads{pool: cfg.Early}, msg: assembly{mtu: cfg.MTU, t: t}, want: cfg.RQPSN, plain: cfg.RQPSN.Add(-1)}
	r.makeRoom()
	return r
}

// makeRoom has as much room for results, and for what is to be said, as MaxDestRdAtomic takes. The newest of what is there stays.
func (r *Responder) makeRoom() {
	// Acknowledgements between READs, and one behind; and FLUSHes, of which others (rxe) have as many on their way as packets.
	least := max(2*r.cfg.MaxDestRdAtomic, defaultWindow) + 4
	if r.cfg.Selective {
		least = 4*r.cfg.MaxDestRdAtomic + 32 // what is missing, and what was asked for again
	}
	n := 1
	for n < least {
		n *= 2
	}
	if n > len(r.out) {
		old := *r
		r.out = make([]response, n)
		for i := r.outHead; i != r.outTail; i++ {
			*r.at(i) = *old.at(i)
		}
	}
	old := r.results
	r.results = make([]result, max(r.cfg.MaxDestRdAtomic, 1))
	for i := range min(r.nresult, uint32(len(old)), uint32(len(r.results))) {
		at := r.nresult - 1 - i
		r.results[at%uint32(len(r.results))] = old[at%uint32(len(old))]
	}
}

// Change takes what of cfg may change while a connection lasts (IBA 11.2.5.3): MinRNRTimer and MaxDestRdAtomic.
func (r *Responder) Change(cfg Config) {
	r.cfg.MinRNRTimer = cfg.MinRNRTimer
	if r.cfg.MaxDestRdAtomic != cfg.MaxDestRdAtomic {
		r.cfg.MaxDestRdAtomic = cfg.MaxDestRdAtomic
		r.makeRoom()
	}
}

// Failed reports whether a request was refused that ended the connection.
func (r *Responder) Failed() bool { return r.failed }

// Begun reports whether the peer has sent what was expected: it is this connection's.
func (r *Responder) Begun() bool { return r.want != r.cfg.RQPSN }

// Release reports whether a receive was taken that has not completed, once: it is the caller's then. Nothing may be received after it.
func (r *Responder) Release() bool {
	taken := r.msg.taken
	r.msg.taken, r.failed = false, true
	return taken
}

// OnlyAck reports whether all that Pump has to send is an acknowledgement, which can wait for something that it can go with.
func (r *Responder) OnlyAck() bool {
	return r.outTail-r.outHead == 1 && !r.at(r.outHead).result && r.at(r.outHead).syndrome == roce.Ack
}

// Pending reports whether there is something for Pump to send.
func (r *Responder) Pending() bool { return r.outHead != r.outTail }

// Late reports whether there is something to acknowledge that the peer does not wait for: Acknowledge is to be called in a moment.
func (r *Responder) Late() bool { return r.late }

// Acknowledge has Pump acknowledge what is left to acknowledge.
func (r *Responder) Acknowledge() {
	if r.late && !r.failed {
		r.say(r.want.Add(-1), roce.Ack)
	}
	r.late = false
}

// Receive takes a packet of a request, which roce.Packet.Decode has checked. Pump sends what is to be said to it.
func (r *Responder) Receive(p *roce.Packet) {
	r.Counters.Received++
	if r.failed {
		r.Counters.Dropped++
		return
	}
	if p.FECN {
		r.Counters.Marked++
		r.marked = (r.marked + 1) & 0xffffff
	}
	switch d := distance(r.want, p.PSN); {
	case d < 0:
		r.Counters.Duplicates++
		want := r.want
		if r.duplicate(p); r.want != want { // it has asked for more than before
			r.catchUp()
		}
	case d > 0:
		r.Counters.Missed++
		if r.cfg.Selective {
			r.early(p, d)
		} else if !r.nakked { // once, until it comes (IBA 9.7.5.2.8)
			r.nakked = r.say(r.want, roce.NakPSN)
		}
	default:
		if r.execute(p, false); r.cfg.Selective {
			if r.nakked {
				r.ahead.drop(r.want)
			}
			r.catchUp()
		}
	}
}

// execute takes the packet that was expected, whose payload may be in its place already.
func (r *Responder) execute(p *roce.Packet, placed bool) {
	switch op := p.Opcode.Op(); {
	case op == roce.ReadRequest && !r.msg.begun():
		r.read(p)
		return
	case (op == roce.CompareSwap || op == roce.FetchAdd || op == roce.AtomicWrite) && !r.msg.begun():
		r.atomic(p)
		return
	case op == roce.Flush && !r.msg.begun():
		r.flush(p)
		return
	}
	switch st, there := r.msg.add(p, placed); {
	case !there:
		r.Counters.NoReceive++
		r.say(p.PSN, roce.RNRNak(r.cfg.MinRNRTimer))
		r.nakked = true // what comes behind it will come again
		return
	case st != ib.WCSuccess:
		r.refuse(p, st)
		return
	}
	r.plain = p.PSN
	if r.accept(1); p.Opcode.Last() {
		r.msn = (r.msn + 1) & 0xffffff
	}
	switch {
	case p.AckReq:
		r.say(p.PSN, roce.Ack)
	case r.cfg.Selective:
		r.late = true
	}
}

// accept notes that n PSNs have been dealt with.
func (r *Responder) accept(n uint32) {
	r.ahead.skip(r.want.Add(1), n-1)
	r.want = r.want.Add(int32(n))
	r.nakked = false
}

// read takes the request of a READ.
func (r *Responder) read(p *roce.Packet) {
	st := ib.WCSuccess
	switch {
	case p.Len > maxMessage, packets(p.Len, r.cfg.MTU) > maxPackets, r.cfg.MaxDestRdAtomic == 0:
		st = ib.WCRemoteInvalidReqErr
	case p.Len > 0:
		st = r.t.Check(p.RKey, p.Addr, p.Len, ib.AccessRemoteRead)
	}
	if st != ib.WCSuccess {
		r.refuse(p, st)
		return
	}
	r.keep(result{first: p.PSN, packets: packets(p.Len, r.cfg.MTU), op: roce.ReadRequest, addr: p.Addr, rkey: p.RKey, len: p.Len})
}

// atomic executes an atomic, or an ATOMIC WRITE.
func (r *Responder) atomic(p *roce.Packet) {
	op, compareAdd, swap, good := ib.OpAtomicFetchAdd, p.Swap, uint64(0), true
	switch p.Opcode.Op() {
	case roce.CompareSwap:
		op, compareAdd, swap = ib.OpAtomicCmpSwap, p.Cmp, p.Swap
	case roce.AtomicWrite:
		if good = p.Len == 8 && len(p.Payload) == 8; good {
			op, swap = ib.OpAtomicWrite, binary.NativeEndian.Uint64(p.Payload) // bytes, as they are
		}
	}
	if !good || r.cfg.MaxDestRdAtomic == 0 || p.Addr&7 != 0 || r.full() {
		st := ib.WCRemoteInvalidReqErr
		r.refuse(p, st)
		return
	}
	old, st := r.t.Atomic(p.RKey, p.Addr, op, compareAdd, swap)
	if st != ib.WCSuccess {
		r.refuse(p, st)
		return
	}
	r.keep(result{first: p.PSN, packets: 1, op: p.Opcode.Op(), old: old})
}

// flush executes a FLUSH (IBA A19.4).
func (r *Responder) flush(p *roce.Packet) {
	f := ib.Flush{Placement: ib.FlushPlacement(p.FETH & 0xf), Level: ib.FlushLevel(p.FETH >> 4 & 3), Length: p.Len}
	st := ib.WCRemoteInvalidReqErr
	if f.Placement != 0 && f.Placement <= ib.FlushGlobal|ib.FlushPersistent && f.Level <= ib.FlushRegion && r.cfg.MaxDestRdAtomic != 0 {
		if r.full() {
			r.Counters.Dropped++ // it will come again
			return
		}
		st = r.t.Flush(p.RKey, p.Addr, f)
	}
	if st != ib.WCSuccess {
		r.refuse(p, st)
		return
	}
	r.accept(1)
	r.msn = (r.msn + 1) & 0xffffff
	r.answer(r.flushed(p.PSN), 0, 0, false)
}

// flushed is the result of a FLUSH that has been executed. None is kept: it says the same whenever it is asked for again.
func (r *Responder) flushed(psn ib.PSN) *result {
	return &result{first: psn, packets: 1, op: roce.Flush, msn: r.msn}
}

// keep notes a result, and has it sent. A peer that has more of them on their way than it was allowed to is refused.
func (r *Responder) keep(x result) {
	if r.full() {
		r.refuse(&roce.Packet{PSN: x.first}, ib.WCRemoteInvalidReqErr)
		return
	}
	r.accept(x.packets)
	r.msn = (r.msn + 1) & 0xffffff
	x.msn = r.msn
	r.results[r.nresult%uint32(len(r.results))] = x
	r.nresult++
	r.answer(&x, 0, x.len, false)
}

// full reports whether no more responses can be queued: a place is left for what is said last.
func (r *Responder) full() bool { return r.outTail-r.outHead >= uint32(len(r.out))-2 }

// answer queues what a result has to say, from byte skip of a READ on, n bytes.
func (r *Responder) answer(x *result, skip, n uint32, repeat bool) {
	if r.full() {
		r.Counters.Dropped++ // it will be asked for again
		return
	}
	*r.push() = response{psn: x.first.Add(int32(skip / uint32(r.cfg.MTU))), msn: x.msn, syndrome: roce.Ack, result: true, atomic: x.op == roce.CompareSwap || x.op == roce.FetchAdd, old: x.old,
		addr: x.addr + uint64(skip), rkey: x.rkey, left: n, repeat: repeat}
}

func (r *Responder) at(n uint32) *response { return &r.out[n&uint32(len(r.out)-1)] }

func (r *Responder) push() *response {
	r.outTail++
	return r.at(r.outTail - 1)
}

// say queues an acknowledgement of everything up to psn, or what is wrong with psn. One that has not been sent yet and says
// less is replaced. false: there is no room, which only a peer that repeats itself can bring about.
func (r *Responder) say(psn ib.PSN, s roce.Syndrome) bool {
	r.late = false
	if r.outHead != r.outTail {
		if last := r.at(r.outTail - 1); !last.result && last.syndrome == roce.Ack {
			last.psn, last.msn, last.syndrome = psn, r.msn, s
			return true
		}
	}
	if r.outTail-r.outHead == uint32(len(r.out)) {
		r.Counters.Dropped++
		return false
	}
	*r.push() = response{psn: psn, msn: r.msn, syndrome: s}
	return true
}

// refuse ends the connection: the peer hears why (IBA 9.7.5.2), but for WCRetryExceeded, which is that it hears nothing.
func (r *Responder) refuse(p *roce.Packet, st ib.WCStatus) {
	if st == ib.WCRetryExceeded {
		r.Acknowledge() // what was done before
		r.Counters.Dropped++
		r.failed = true
		r.t.Fail(st)
		return
	}
	nak := nakOf(st)
	switch nak {
	case roce.NakAccess:
		r.Counters.Access++
	case roce.NakInvalid:
		r.Counters.Invalid++
	default:
		r.Counters.Operation++
	}
	r.failed = true
	r.say(p.PSN, nak)
	r.t.Fail(st)
}

// nakOf is how a peer hears of a status.
func nakOf(st ib.WCStatus) roce.Syndrome {
	switch st {
	case ib.WCRemoteAccessErr:
		return roce.NakAccess
	case ib.WCRemoteInvalidReqErr:
		return roce.NakInvalid
	}
	return roce.NakOperation
}

// duplicate takes a packet that was executed before: what was said to it must have been lost (IBA 9.7.5.1.4).
func (r *Responder) duplicate(p *roce.Packet) {
	switch p.Opcode.Op() {
	case roce.Flush:
		r.reply(r.flushed(p.PSN), 0, 0)
		return
	case roce.ReadRequest, roce.CompareSwap, roce.FetchAdd, roce.AtomicWrite:
		r.repeat(p)
		return
	}
	if p.Opcode.IsResponse() {
		r.Counters.Dropped++
		return
	}
	psn := r.want.Add(-1)
	if !r.cfg.Selective {
		psn = r.plain // rxe takes an acknowledgement of a READ or an atomic for its answer, which may have been lost
	}
	r.say(psn, roce.Ack)
}

// repeat answers once more what has an answer, if it is one of the last.
func (r *Responder) repeat(p *roce.Packet) {
	n := min(r.nresult, uint32(len(r.results)))
	for i := range n {
		x := &r.results[(r.nresult-1-i)%uint32(len(r.results))]
		at := distance(x.first, p.PSN)
		if at < 0 || at >= int32(x.packets) || x.op != p.Opcode.Op() {
			continue
		}
		skip := uint32(at) * uint32(r.cfg.MTU)
		read := x.op == roce.ReadRequest
		if read && (p.RKey != x.rkey || p.Addr != x.addr+uint64(skip) || p.Len != x.len-skip && !r.cfg.Selective) {
			break // not what was asked for then
		}
		r.reply(x, skip, min(p.Len, x.len-skip))
		if r.cfg.Selective && read && p.Len > x.len-skip {
			r.further(p, x.len-skip)
		}
		return
	}
	r.Counters.Dropped++
}

// reply queues an answer once more, of n bytes from byte skip of a READ on, or all of them if the peer goes back for what it misses.
func (r *Responder) reply(x *result, skip, n uint32) {
	switch {
	case !r.cfg.Selective:
		r.answerOnce(x, skip)
	case r.outTail-r.outHead < uint32(len(r.out))/2: // there must be room for new ones
		r.answer(x, skip, n, true)
	}
}

// further takes what a READ asks for behind the first n bytes: it is asked for again in larger parts than before.
func (r *Responder) further(p *roce.Packet, n uint32) {
	if n == 0 || n%uint32(r.cfg.MTU) != 0 {
		r.Counters.Dropped++ // what was asked for then ended in the middle of a packet, as only the end of a message does
		return
	}
	rest := *p
	rest.PSN = p.PSN.Add(int32(n / uint32(r.cfg.MTU)))
	rest.Addr += uint64(n)
	rest.Len -= n
	if distance(r.want, rest.PSN) < 0 {
		r.repeat(&rest)
	} else {
		r.execute(&rest, false)
	}
}

// answerOnce is answer, but for a response that is queued already: that begins again where it is asked to.
func (r *Responder) answerOnce(x *result, skip uint32) {
	for n := r.outHead; n != r.outTail; n++ {
		q := r.at(n)
		if !q.result {
			continue
		}
		if d := distance(x.first, q.psn); d < 0 || d >= int32(x.packets) {
			continue
		}
		if x.op == roce.ReadRequest {
			q.psn = x.first.Add(int32(skip / uint32(r.cfg.MTU)))
			q.addr, q.left, q.begun = x.addr+uint64(skip), x.len-skip, false
		}
		return
	}
	r.answer(x, skip, x.len-skip, true)
}

// Pump sends what there is to say. It reports whether out was full.
func (r *Responder) Pump(now time.Duration, out Output) (full bool) {
	if r.marked != r.told && !r.cfg.Selective && !r.notice(now, out) {
		return true
	}
	for r.outHead != r.outTail {
		q := r.at(r.outHead)
		sent, done := r.emit(q, out)
		if !sent {
			return true
		}
		if done {
			r.outHead++
		}
	}
	return false
}

// emit sends a packet of a response; done: it was the last.
func (r *Responder) emit(q *response, out Output) (sent, done bool) {
	p := &r.pkt
	*p = roce.Packet{PKey: roce.DefaultPKey, DestQP: r.cfg.DestQP, PSN: q.psn, Syndrome: q.syndrome, MSN: q.msn}
	n := uint32(0)
	switch {
	case !q.result:
		p.Opcode = roce.Op(roce.RC, roce.Acknowledge)
		if r.cfg.Selective && q.syndrome == roce.Ack {
			p.MSN = notesOf(r.beyond(q.psn.Add(1)), r.marked)
			p.BECN = r.marked != r.told
		}
	case q.atomic:
		p.Opcode = roce.Op(roce.RC, roce.AtomicAcknowledge)
		p.Original = q.old
	default:
		n = min(q.left, uint32(r.cfg.MTU))
		op := uint8(roce.ReadResponseMiddle)
		switch first, last := !q.begun, n == q.left; {
		case first && last:
			op = roce.ReadResponseOnly
		case first:
			op = roce.ReadResponseFirst
		case last:
			op = roce.ReadResponseLast
		}
		p.Opcode = roce.Op(roce.RC, op)
	}
	payload, ok := out.Packet(p, int(n))
	if !ok {
		return false, false
	}
	if n > 0 {
		if st := r.t.Read(q.rkey, q.addr, payload); st != ib.WCSuccess {
			out.Abort()
			if q.repeat && st != ib.WCRetryExceeded {
				// The requester may have it already, and have said so before its question came that another packet had overtaken:
				// then the memory is rightly gone.
				r.Counters.Dropped++
				return true, true
			}
			// It was withdrawn meanwhile. What is queued behind it will not be heard.
			psn := q.psn
			r.outTail = r.outHead
			if r.failed { // for what came behind it: the first to fail is to be heard of
				r.say(psn, nakOf(st))
			} else {
				r.refuse(&roce.Packet{PSN: psn}, st)
			}
			return true, false
		}
	}
	out.Commit()
	if p.BECN {
		r.told = r.marked
	}
	if !q.result || q.atomic {
		return true, true
	}
	q.begun = true
	q.psn = q.psn.Add(1)
	q.addr += uint64(n)
	q.left -= n
	return true, q.left == 0
}
