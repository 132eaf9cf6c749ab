package wire

import (
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// When a Requester sends again, and what: everything from the oldest packet on that was not acknowledged. With Config.Selective it is less; see
// selective.go.

// Deadline returns when Expire has something to do next; 0: it has not.
func (r *Requester) Deadline() time.Duration {
	if r.rnrUntil != 0 {
		return r.rnrUntil
	}
	if r.cc.paused && (r.deadline == 0 || r.cc.pause < r.deadline) {
		return r.cc.pause
	}
	return r.deadline
}

// Expire is to be called when Deadline has come, and Pump after it.
func (r *Requester) Expire(now time.Duration) {
	if r.rnrUntil != 0 {
		if now >= r.rnrUntil {
			r.rnrUntil = 0
			r.sel.since, r.sel.backoff = now, 0 // the peer has asked for the silence until now
		}
		return
	}
	if now >= r.cc.pause {
		r.cc.paused = false
	}
	if r.deadline == 0 || now < r.deadline {
		return
	}
	r.deadline = 0
	r.Counters.Timeouts++
	if r.cfg.Stream {
		r.fail(ib.WCRetryExceeded)
		return
	}
	if r.cfg.Selective && r.patient(now) {
		return
	}
	r.retry(Timeout)
}

// watch sets the timer, if it is not set.
func (r *Requester) watch(now time.Duration) {
	switch {
	case r.deadline != 0 || r.cfg.AckTimeout == 0:
	case r.cfg.Stream:
		r.deadline = now + r.cfg.silence()
	case r.cfg.Selective:
		r.deadline = now + r.timeout()
	default:
		r.deadline = now + r.cfg.AckTimeout
	}
}

// retry sends everything from una on again, if it has not been sent too often.
func (r *Requester) retry(why Reason) {
	if r.retries == 0 {
		r.fail(ib.WCRetryExceeded)
		return
	}
	r.retries--
	r.cc.silence(r.end, true)
	r.rewind(why)
}

// rewind has everything from una on sent again.
func (r *Requester) rewind(why Reason) {
	r.why = why
	r.cur, r.nxt = r.find(r.una), r.una
	r.unasked = 0
	r.sel.forget(r.una)
}

// find returns the number of the request that the packet psn is part of, which is between una and free.
func (r *Requester) find(psn ib.PSN) uint32 {
	n := r.head
	for n != r.tail && distance(r.at(n).end(), psn) >= 0 {
		n++
	}
	return n
}

// askAgain asks for the response that una is part of again, at most once until something new comes.
func (r *Requester) askAgain() {
	if r.asked {
		return
	}
	r.asked = true
	r.Counters.Implied++
	r.rewind(MissingResponse)
}
