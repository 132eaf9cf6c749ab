package wire

import (
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What a connection with losses waits for. While a packet that was lost is sent again, others go on: what the peer has behind a gap
// is not on its way any more, and takes no room in the window. And what was sent again, and is overtaken by what was sent after it,
// was lost once more: no timer needs to find that out, nor that the NAK for a gap was lost.

// notesMax is the largest count that an acknowledgement has a place for.
const notesMax = 1<<12 - 1

// notesOf makes the MSN field of an acknowledgement between two of this package's, where only others look for a message number: how
// many PSNs behind what it acknowledges the newest request begins to end that has come (0: there is no gap), and how many packets
// came with a mark, ever: the lower bits.
func notesOf(beyond, marked uint32) uint32 { return min(beyond, notesMax)<<12 | marked&notesMax }

// notes takes it apart.
func notes(msn uint32) (beyond, marked uint32) { return msn >> 12 & notesMax, msn & notesMax }

// A resent is a span that was sent again.
type resent struct {
	span
	until ib.PSN // what is behind it was sent later
	over  bool   // something that was sent later has come, so this has, too, or is lost
}

// repeats are the newest of them, oldest first.
type repeats struct {
	buf [64]resent
	n   int
}

// add notes that s was sent again; what is behind until was not sent yet. Without room the oldest is forgotten: a timer finds it if
// it is lost.
func (q *repeats) add(s span, until ib.PSN) {
	if q.n > 0 {
		if last := &q.buf[q.n-1]; !last.over && last.why == s.why && last.behind(s.first) == 0 {
			last.n, last.until = last.n+s.n, until
			return
		}
	}
	if q.n == len(q.buf) {
		copy(q.buf[:], q.buf[1:])
		q.n--
	}
	q.buf[q.n] = resent{span: s, until: until}
	q.n++
}

// find returns what psn is in that was sent again, and may be on its way; nil: nothing.
func (q *repeats) find(psn ib.PSN) *span {
	for i := range q.buf[:q.n] {
		if s := &q.buf[i]; !s.over && s.has(psn) {
			return &s.span
		}
	}
	return nil
}

// underWay is how many packets of them may be on their way.
func (q *repeats) underWay(una ib.PSN) (n int32) {
	for i := range q.buf[:q.n] {
		if s := &q.buf[i]; !s.over {
			n += max(0, min(s.behind(una), int32(s.n)))
		}
	}
	return n
}

// overtake notes that what is before una was acknowledged, and that something has come of what was sent first before top.
func (q *repeats) overtake(una, top ib.PSN) {
	later := false
	for i := q.n - 1; i >= 0; i-- {
		s := &q.buf[i]
		later = later || s.behind(una) <= 0
		s.over = s.over || later || distance(s.until, top) > 0
	}
}

// underWay is how many packets may be on their way, of requests; of responses if those are asked for. Those that have come behind a gap
// are not.
func (r *Requester) underWay(responses bool) int {
	front := r.sel.heard
	if responses {
		front = r.sel.top
	}
	if distance(r.una, front) < 0 {
		front = r.una
	}
	return int(max(0, distance(front, r.nxt)) + r.sel.repeats.underWay(r.una))
}

// awaited reports whether psn is to be sent again, or was and may be on its way.
func (r *Requester) awaited(psn ib.PSN) bool { return r.unawaited(psn) != psn }

// unawaited returns the first PSN from psn on of which that is not so.
func (r *Requester) unawaited(psn ib.PSN) ib.PSN {
	for {
		s := r.sel.lost.find(psn)
		if s == nil {
			s = r.sel.repeats.find(psn)
		}
		if s == nil {
			return psn
		}
		psn = s.first.Add(int32(s.n))
	}
}

// overtaken takes what an acknowledgement says of packets that have come behind a gap.
func (r *Requester) overtaken(p *roce.Packet) {
	beyond, _ := notes(p.MSN)
	if beyond == 0 || !r.cfg.Selective || r.failed || r.rnrUntil != 0 {
		return
	}
	want := p.PSN.Add(1)
	top := want.Add(int32(beyond))
	if distance(top, r.nxt) < 0 {
		top = r.nxt // it was sent before a rewind, or it makes no sense
	}
	if distance(r.sel.heard, top) > 0 {
		r.sel.heard = top
	}
	if distance(r.una, want) < 0 || distance(want, top) <= 0 {
		return // it came late
	}
	r.late(top, want)
	if !r.awaited(want) { // who has said so was not heard
		n := uint32(1)
		if e := r.at(r.find(want)); e.response() {
			n = r.askedFor(e, want)
		}
		r.Counters.SeqNAKs++
		r.sel.lost.push(span{want, min(n, uint32(distance(want, r.nxt))), SequenceNAK})
		r.inquire(SequenceNAK)
	}
}

// inquire has the newest packet sent again, to hear about everything that is missing: see Responder.report. A READ's is not: its answer may
// be many packets.
func (r *Requester) inquire(why Reason) {
	last := r.nxt.Add(-1)
	if last != r.una && !r.awaited(last) && r.at(r.find(last)).Op != ib.OpRDMARead {
		r.sel.lost.push(span{last, 1, why})
	}
}

// late has sent again what was sent again in vain: something has come of what was sent first before top. want is a request that the
// peer does not have; whether it has those behind that is not known.
func (r *Requester) late(top, want ib.PSN) {
	q := &r.sel.repeats
	q.overtake(r.una, top)
	left := 0
	for i := range q.buf[:q.n] {
		s := q.buf[i]
		if done := distance(s.first, r.una); done > 0 { // acknowledged
			done = min(done, int32(s.n))
			s.first, s.n = s.first.Add(done), s.n-uint32(done)
		}
		switch {
		case s.n == 0:
		case s.over && (s.has(want) || r.at(r.find(s.first)).response()):
			r.sel.lost.push(s.span)
		default:
			q.buf[left] = s
			left++
		}
	}
	q.n = left
}
