package wire

import (
	"encoding/binary"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What a Requester makes of acknowledgements and responses.

// Receive takes an acknowledgement or a response. The packet has been checked by roce.Packet.Decode, nothing else of it.
func (r *Requester) Receive(p *roce.Packet, now time.Duration) {
	known := distance(r.una, p.PSN) < 0
	if known && r.cfg.Selective && p.PSN.Add(1) == r.una && p.Opcode.Op() == roce.Acknowledge && p.Syndrome.IsAck() {
		beyond, _ := notes(p.MSN)
		known = beyond == 0 // what is behind a gap may be news
	}
	if r.failed || known || distance(p.PSN, r.end) <= 0 {
		if known {
			r.sel.repeated(now)
		}
		r.Counters.Dropped++
		return
	}
	switch p.Opcode.Op() {
	case roce.Acknowledge:
		r.acknowledge(p, now)
	case roce.AtomicAcknowledge, roce.ReadResponseFirst, roce.ReadResponseMiddle, roce.ReadResponseLast, roce.ReadResponseOnly:
		r.response(p, now)
	default:
		r.Counters.Dropped++
	}
}

func (r *Requester) acknowledge(p *roce.Packet, now time.Duration) {
	if p.Syndrome.IsAck() {
		r.echo(p)
		r.executed(p.PSN.Add(1))
		r.acked(p.PSN.Add(1), now)
		r.overtaken(p)
		return
	}
	r.executed(p.PSN)
	r.acked(p.PSN, now)
	if r.failed || r.una != p.PSN && !(r.cfg.Selective && p.Syndrome == roce.NakPSN) {
		return // it waits for something else first
	}
	if timer, ok := p.Syndrome.IsRNR(); ok {
		if r.rnrUntil != 0 {
			return
		}
		r.Counters.RNRNAKs++
		if r.rnr == 0 {
			r.fail(ib.WCRNRRetryExceeded)
			return
		}
		if r.rnr != ib.RNRRetryForever {
			r.rnr--
		}
		r.rnrUntil = now + timer.Duration()
		r.deadline = 0
		r.rewind(NoReceive)
		return
	}
	if p.Syndrome == roce.NakPSN {
		if r.cfg.Selective {
			r.missed(p)
			return
		}
		if r.nxt != r.una { // else it has been heard
			r.Counters.SeqNAKs++
			r.retry(SequenceNAK)
		}
		return
	}
	if st := p.Syndrome.Status(); st != ib.WCSuccess {
		r.fail(st)
		return
	}
	r.Counters.Dropped++
}

// acked notes that the peer has everything before psn; una and end are its limits.
func (r *Requester) acked(psn ib.PSN, now time.Duration) {
	lost, moved := false, false
	for r.head != r.tail {
		e := r.at(r.head)
		if r.cfg.Selective {
			r.arrived(e)
		}
		if e.response() && !e.done && !(e.implied() && distance(e.end(), psn) >= 0) {
			if at := r.reached(e); distance(at, psn) > 0 {
				psn, lost = at, true // the peer is further, and has answered: that was lost
			}
			break
		}
		if distance(e.end(), psn) < 0 {
			break
		}
		n := r.head
		r.head++
		r.q.Complete(n, ib.WCSuccess)
	}
	if n := distance(r.una, psn); n > 0 {
		r.una, moved = psn, true
		r.cc.progress(int(n), psn, r.nxt)
	}
	done := 0
	for done < len(r.asks) && distance(r.asks[done], r.una) >= 0 {
		done++
	}
	r.asks = append(r.asks[:0], r.asks[done:]...)
	if moved {
		r.retries, r.rnr, r.asked = r.cfg.RetryCount, r.cfg.RNRRetry, false
		r.deadline = 0
		r.sel.progress(r.una, now)
		if r.una != r.end {
			r.watch(now)
		}
		if distance(r.nxt, r.una) > 0 { // what was to be sent again had come after all
			r.rewind(r.why)
		}
	}
	if lost && !r.cfg.Selective {
		r.askAgain()
	}
	r.settle()
}

// response takes a packet of the response to a READ or an atomic.
func (r *Requester) response(p *roce.Packet, now time.Duration) {
	n := r.find(p.PSN)
	e := r.at(n)
	if !e.response() || e.done || e.atomic() != (p.Opcode.Op() == roce.AtomicAcknowledge) {
		r.Counters.Dropped++
		return
	}
	if p.FECN {
		r.marks(1)
	}
	if r.cfg.Selective {
		r.anyOrder(n, p, now)
		return
	}
	r.acked(e.first, now) // so the peer has executed what came before
	if r.failed || r.head != n {
		return
	}
	want := r.reached(e)
	// Whether a response begins is not looked at: rxe continues with MIDDLE when it is asked again for the rest of one.
	if d := distance(want, p.PSN); d != 0 {
		if d > 0 {
			r.askAgain()
		}
		r.Counters.Dropped++
		return
	}
	if e.Op != ib.OpRDMARead {
		binary.NativeEndian.PutUint64(r.old[:], p.Original)
		switch {
		case uint32(len(p.Payload)) != r.answer(e, p.PSN):
			r.fail(ib.WCBadRespErr)
			return
		case e.atomic() && !r.q.Scatter(n, 0, r.old[:]):
			r.fail(ib.WCLocalProtErr)
			return
		}
		e.done = true
		r.acked(e.end(), now)
		return
	}
	left := e.Len - e.got
	size := min(left, uint32(r.cfg.MTU))
	if uint32(len(p.Payload)) != size || p.Opcode.Last() != (r.askedFor(e, want) == 1) {
		r.fail(ib.WCBadRespErr)
		return
	}
	if !r.q.Scatter(n, e.got, p.Payload) {
		r.fail(ib.WCLocalProtErr)
		return
	}
	e.got += size
	e.done = size == left
	r.acked(p.PSN.Add(1), now)
}

// reached is the PSN of what is missing next of a response.
func (r *Requester) reached(e *entry) ib.PSN { return e.first.Add(int32(e.got / uint32(r.cfg.MTU))) }
