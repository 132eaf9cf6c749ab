package wire

import (
	"encoding/binary"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Selective repeat, between two of this package's (Config.Selective). It differs from go-back-N in this:
//
//   - A responder keeps requests that come before one that is missing, and executes them when that has come. When it finds that
//     some are missing, it says at once which: in a NAK (PSN sequence error), whose PSN is as ever the one that is expected, the
//     MSN field says how far behind that the gap begins (12 bits) and how many PSNs it has (12 bits).
//   - A requester sends what is in a gap again, and nothing else.
//   - It places responses as they come, and asks again for the packets that others have overtaken: a request for a part of what was
//     asked for before, which the responder answers from where its memory is then (as it does in any case for a READ that is
//     asked for again, IBA 9.7.5.1.4).
//   - A SEND or WRITE that nobody waits for (Request.Quiet) asks for no acknowledgement by itself. The responder sends one
//     a moment later if none has been asked for since (Responder.Late), so that the requester's timer need not find out.
//   - What has come behind a gap is not on its way any more: a gap does not stop what is sent behind it, up to twice the window. What
//     is lost for a second time is found out by what comes later (overtaken.go), or by a timer, as is what is lost at the end. It goes
//     by how long answers take, not by Config.AckTimeout: that remains what a retry is counted by.
//
// Who believes to talk to its like, and does not, gets by: a NAK of another's means a gap that is not there, and then timers count.

// A span is PSNs in a row.
type span struct {
	first ib.PSN
	n     uint32
	why   Reason // it is sent again
}

// behind is how far psn is from its end; not positive: the end comes first.
func (s *span) behind(psn ib.PSN) int32 { return distance(psn, s.first.Add(int32(s.n))) }

// has reports whether psn is in it.
func (s *span) has(psn ib.PSN) bool { return distance(s.first, psn) >= 0 && s.behind(psn) > 0 }

// spans is a queue of them.
type spans struct {
	buf  [64]span
	head int
	n    int
}

func (q *spans) front() *span { return &q.buf[q.head] }

func (q *spans) pop() {
	q.head = (q.head + 1) % len(q.buf)
	q.n--
}

// push adds one; without room it is dropped, and a timer finds it.
func (q *spans) push(s span) {
	if q.n < len(q.buf) && s.n > 0 {
		q.buf[(q.head+q.n)%len(q.buf)] = s
		q.n++
	}
}

// find returns the one that psn is in; nil: none is.
func (q *spans) find(psn ib.PSN) *span {
	for i := range q.n {
		if s := &q.buf[(q.head+i)%len(q.buf)]; s.has(psn) {
			return s
		}
	}
	return nil
}

// selective is what a Requester knows besides.
type selective struct {
	lost    spans
	repeats repeats // of lost, what was sent again and has not been acknowledged
	heard   ib.PSN  // requests before it have come, or are missing

	seen  []uint64 // responses that have come before others: bits by PSN
	top   ib.PSN   // responses before it have come or are in lost, or have been
	known ib.PSN   // what is before it has been executed

	since   time.Duration // of the last progress, or the last timeout that was counted
	backoff uint          // timeouts since the last progress
	probe   ib.PSN        // when it is acknowledged, that took from probeAt until then
	probeAt time.Duration
	probing bool
	from    ib.PSN        // the first of those that are on their way, or have been, since nothing was
	twice   bool          // what is acknowledged with probe was sent again
	took    time.Duration // what that took since it was sent first
	until   time.Duration // when there may be a second answer to it
	rtt     time.Duration // smoothed; 0: unknown
	guess   time.Duration // what answers may take instead, until that is measured; 0: no idea
}

func (s *selective) init(cfg *Config) {
	s.top, s.known, s.heard = cfg.SQPSN, cfg.SQPSN, cfg.SQPSN
	if cfg.Selective {
		words := 1
		for words*64 < 2*cfg.Window {
			words *= 2
		}
		s.seen = make([]uint64, words)
	}
}

func (s *selective) bit(psn ib.PSN) (*uint64, uint64) {
	i := uint32(psn) % uint32(64*len(s.seen))
	return &s.seen[i/64], 1 << (i % 64)
}

func (s *selective) has(psn ib.PSN) bool {
	w, b := s.bit(psn)
	return *w&b != 0
}

// forget is called when everything from una on is sent again.
func (s *selective) forget(una ib.PSN) {
	s.lost.n, s.repeats.n = 0, 0
	s.top, s.heard = una, una
	s.probing, s.twice = false, false
}

// executed notes that the peer has executed what is before psn, and so has sent its responses.
func (r *Requester) executed(psn ib.PSN) {
	if r.cfg.Selective && distance(r.sel.known, psn) > 0 {
		r.sel.known = psn
		r.holes(psn, MissingResponse)
		if r.sel.repeats.n > 0 {
			r.late(psn, r.una.Add(-1))
		}
	}
}

// holes finds responses before psn that have not come, and has them asked for again.
func (r *Requester) holes(psn ib.PSN, why Reason) {
	s := &r.sel
	for n := r.head; n != r.tail && distance(r.at(n).first, psn) > 0; n++ {
		e := r.at(n)
		if !e.response() || e.done || e.implied() && why == MissingResponse {
			continue // it needs none, or has it; or what is known says all that it would
		}
		from, to := r.reached(e), e.end()
		if distance(from, s.top) > 0 {
			from = s.top
		}
		if distance(psn, to) > 0 {
			to = psn
		}
		gap := span{first: from, why: why}
		for at := from; distance(at, to) > 0; at = at.Add(1) {
			if s.has(at) {
				s.lost.push(gap)
				gap = span{first: at.Add(1), why: why}
			} else {
				gap.n++
			}
		}
		s.lost.push(gap)
	}
	if distance(s.top, psn) > 0 {
		s.top = psn
	}
}

// missed takes a NAK that says what is missing.
func (r *Requester) missed(p *roce.Packet) {
	first := p.PSN.Add(int32(p.MSN >> 12))
	n := max(1, p.MSN&0xfff)
	if d := distance(first, r.nxt); d <= 0 {
		return // it is sent again anyway, or it makes no sense
	} else {
		n = min(n, uint32(d))
	}
	r.Counters.SeqNAKs++
	behind := first.Add(int32(n))
	if distance(r.sel.heard, behind) > 0 {
		r.sel.heard = behind
	}
	if left := distance(r.unawaited(first), behind); left > 0 { // the rest is on its way
		r.sel.lost.push(span{behind.Add(-left), uint32(left), SequenceNAK})
	}
}

// resend sends what is lost. It reports whether out was full.
func (r *Requester) resend(now time.Duration, out Output) (full bool) {
	q := &r.sel.lost
	for q.n > 0 && !r.failed && r.rnrUntil == 0 {
		g := q.front()
		if d := distance(g.first, r.una); d > 0 { // acknowledged meanwhile
			d = min(d, int32(g.n))
			g.first, g.n = g.first.Add(d), g.n-uint32(d)
		}
		if g.n == 0 || distance(g.first, r.nxt) <= 0 {
			q.pop()
			continue
		}
		n := r.find(g.first)
		e := r.at(n)
		k, sent := uint32(1), true
		if g.why != Timeout && r.underWay(e.response()) >= r.cc.packets() {
			r.cc.limited = true
			return false
		}
		r.again = g.why
		switch {
		case !e.response():
			if sent, full = r.send(n, g.first, out); full {
				return true
			} else if !sent {
				return false
			}
		case e.done || distance(g.first, r.reached(e)) > 0 || r.sel.has(g.first):
			sent = false // it has come
		default:
			for most := min(g.n, r.askedFor(e, g.first)); k < most && !r.sel.has(g.first.Add(int32(k))); {
				k++
			}
			if sent, full = r.ask(n, g.first, k, out); full {
				return true
			} else if !sent {
				return false
			}
		}
		if sent {
			r.count()
			r.Counters.Single++
			gone := int(k)
			if e.response() && g.why == SequenceNAK {
				gone = 1 // of what was sent: it is the request that the peer has missed, not what it asks for
			}
			if r.cc.lose(gone, int(distance(r.una, r.end)), g.why, r.end) {
				r.Counters.Slowed++
			}
			r.sel.probing = r.sel.twice
			r.sel.repeats.add(span{g.first, k, g.why}, r.end)
			r.watch(now)
		}
		g.first, g.n = g.first.Add(int32(k)), g.n-k
	}
	return false
}

// anyOrder takes a packet of the response to request n, wherever in it that is.
func (r *Requester) anyOrder(n uint32, p *roce.Packet, now time.Duration) {
	e := r.at(n)
	r.executed(p.PSN)
	if distance(r.reached(e), p.PSN) < 0 || r.sel.has(p.PSN) {
		r.Counters.Dropped++ // it has come before
		r.acked(r.sel.known, now)
		return
	}
	off, payload := uint32(0), r.old[:]
	if e.atomic() {
		binary.NativeEndian.PutUint64(r.old[:], p.Original)
	} else {
		off, payload = uint32(distance(e.first, p.PSN))*uint32(r.cfg.MTU), p.Payload
		if uint32(len(payload)) != r.answer(e, p.PSN) {
			r.fail(ib.WCBadRespErr)
			return
		}
	}
	if (e.atomic() || e.Op == ib.OpRDMARead) && !r.q.Scatter(n, off, payload) {
		r.fail(ib.WCLocalProtErr)
		return
	}
	w, b := r.sel.bit(p.PSN)
	*w |= b
	r.executed(p.PSN.Add(1))
	r.acked(r.sel.known, now)
}

// arrived takes what has come of the response to the oldest request, as far as nothing is missing.
func (r *Requester) arrived(e *entry) {
	for e.response() && !e.done {
		w, b := r.sel.bit(r.reached(e))
		if *w&b == 0 {
			return
		}
		*w &^= b
		left := e.Len - e.got
		if e.Op != ib.OpRDMARead || left <= uint32(r.cfg.MTU) {
			e.got, e.done = e.Len, true
		} else {
			e.got += uint32(r.cfg.MTU)
		}
	}
}
