package siw

import (
	"sync/atomic"
	"time"
)

// A request that has to wait for READs is held back until they are done: a READ beyond those that can be in flight, one with a
// fence, and what is behind these. The kernel could do that itself, but it holds up the answers to the peer's READs meanwhile, and
// if the peer has such a request as well, both wait for ever (siw_activate_tx_from_sq, siw_init_rresp).
//
// What is held back stands in its slot without the flag VALID. Whoever polls the completion of a READ gives more; if nobody polls,
// a goroutine does, as the requests may be ones that nobody waits for.
type hold struct {
	given     atomic.Uint64 // requests below it were given to the kernel; changed with sendMu held
	readsSent atomic.Uint64 // READs among them; likewise
	readsDone atomic.Uint64 // READs that have completed; changed with the completion queue's lock held
	stepping  atomic.Bool   // the goroutine is there

	// Guarded by the completion queue's lock.
	wakeNext *qp // in its list of those to give more
	woken    bool
}

// holds reports whether something is held back.
func (q *qp) holds() bool { return q.given.Load() != q.send.posted.Load() && !q.failed.Load() }

// mayGive reports whether the request at pos can be given to the kernel.
func (q *qp) mayGive(pos uint64) bool {
	out := q.readsSent.Load() - q.readsDone.Load()
	switch q.send.at(pos).gate {
	case reads:
		return out < q.ord.Load()
	case fenced:
		return out == 0
	}
	return true
}

// give gives the kernel what is posted, as far as it may have it. Called with sendMu held.
func (q *qp) give() error {
	first := q.given.Load()
	pos, end := first, q.send.posted.Load()
	for ; pos < end && q.mayGive(pos); pos++ {
		e := q.send.at(pos)
		if e.gate == reads {
			q.readsSent.Add(1)
		}
		q.given.Store(pos + 1) // before the kernel can complete it
		q.sq.setHead(pos, e.head)
	}
	if pos < end && q.stepping.CompareAndSwap(false, true) {
		go q.step()
	}
	if pos == first {
		return nil
	}
	return q.ring()
}

// giveMore gives what was held back and may go now. It waits for nobody: who has the lock does the same afterwards.
func (q *qp) giveMore() {
	for q.holds() && q.sendMu.TryLock() {
		before := q.given.Load()
		if q.sq.mem != nil && !q.failed.Load() {
			q.give() // if it fails, the device has gone
		}
		more := q.given.Load() != before
		q.sendMu.Unlock()
		if !more {
			return
		}
	}
}

// step gives more for as long as something is held back, if nobody else does.
func (q *qp) step() {
	const shortest, longest = 50 * time.Microsecond, 2 * time.Millisecond
	for pause := shortest; q.holds() && q.C.Removed() == nil; pause = min(2*pause, longest) {
		time.Sleep(pause)
		before := q.given.Load()
		if !q.scq.harvest() {
			break // closed
		}
		if q.giveMore(); q.given.Load() != before {
			pause = shortest / 2
		}
	}
	q.stepping.Store(false)
	if q.holds() && q.C.Removed() == nil && q.scq.Err() == nil && q.stepping.CompareAndSwap(false, true) {
		go q.step() // posted meanwhile
	}
}

// harvest takes the kernel's completions as far as they can be kept, which is up to a receive of a shared receive queue. It
// reports false if the queue is closed.
func (q *cq) harvest() bool {
	q.mu.Lock()
	if q.q.mem == nil || q.failed.Load() {
		q.mu.Unlock()
		return false
	}
	for {
		head := q.q.head(q.at)
		if head&validCQE == 0 || q.take(nil, head) < 0 {
			break
		}
	}
	bad, wake := q.toDo()
	q.mu.Unlock()
	finish(bad, wake)
	return true
}

// toDo takes what is to be done once mu is released. Called with it held.
func (q *cq) toDo() (bad []*qp, wake *qp) {
	if len(q.bad) > 0 {
		bad, q.bad = q.bad, nil
	}
	wake, q.wake = q.wake, nil
	return bad, wake
}

// wakeUp notes that a READ of p has completed while something is held back. Called with mu held.
func (q *cq) wakeUp(p *qp) {
	if !p.woken && p.holds() {
		p.woken, p.wakeNext, q.wake = true, q.wake, p
	}
}

// finish does it.
func finish(bad []*qp, wake *qp) {
	for _, p := range bad {
		p.fail()
	}
	for p := wake; p != nil; {
		next := p.wakeNext
		p.scq.mu.Lock()
		p.woken, p.wakeNext = false, nil
		p.scq.mu.Unlock()
		p.giveMore()
		p = next
	}
}
