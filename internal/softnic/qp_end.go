package softnic

import (
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// How a QP ends: in ERR, in RESET, and for good.

// remoteFault: a request of the peer broke a rule and was refused: the responder goes to the error state too (IBA 9.9.3).
// epoch is the QP's from when that was found out.
func (q *QP) remoteFault(epoch uint32, ev ib.EventType) {
	if ev != ib.EventQPAccessErr && ev != ib.EventQPReqErr && ev != ib.EventQPFatal {
		ev = ib.EventQPFatal
	}
	q.errorLater(epoch, ev, true)
}

// errorLater is toError where locks are held, unless the QP is reset first.
func (q *QP) errorLater(epoch uint32, ev ib.EventType, raise bool) {
	q.nic.later(func() { q.toErrorIn(epoch, ev, raise) })
}

// toError moves the QP to ERR and flushes it.
func (q *QP) toError(ev ib.EventType, raise bool) {
	q.cfg.Lock()
	defer q.cfg.Unlock()
	if !q.closed.Load() {
		q.toErrorLocked(ev, raise)
	}
}

// toErrorIn is toError, unless the QP has been reset since its epoch was that.
func (q *QP) toErrorIn(epoch uint32, ev ib.EventType, raise bool) {
	q.cfg.Lock()
	defer q.cfg.Unlock()
	if !q.closed.Load() && q.epoch.Load() == epoch {
		q.toErrorLocked(ev, raise)
	}
}

// toErrorLocked is toError with cfg held.
func (q *QP) toErrorLocked(ev ib.EventType, raise bool) {
	q.sq.Lock()
	s := ib.QPState(q.state.Load())
	if s == ib.Reset || s == ib.Err && q.flushing.Load() {
		q.sq.Unlock()
		return
	}
	if q.lost && q.pendLen > 0 { // posted since the peer was seen to be gone: that is the request that has no answer
		q.lost = false
		q.unanswered()
	}
	q.state.Store(uint32(ib.Err))
	w := q.wire
	if w != nil {
		w.stop()
	}
	q.flushPending()
	q.publishSC()
	q.sq.Unlock()
	q.shutInbound()
	if w != nil {
		w.flushTaken()
	}
	q.flushing.Store(true)
	q.scq.signal(q.sIdx, true)
	q.rcq.signal(q.rIdx, true)
	if raise {
		q.nic.raise(driver.AsyncEvent{Type: ev, QP: q})
	}
	if q.srq != nil && !q.ownSRQ && !q.lastWQE {
		q.lastWQE = true
		q.nic.raise(driver.AsyncEvent{Type: ib.EventLastWQEReached, QP: q})
	}
}

// shutInbound stops peers from writing and waits for those in the middle of it.
func (q *QP) shutInbound() {
	any := false
	q.eachInbound(func(in *inbound) {
		in.setState(qpClosed)
		any = true
	})
	if !any {
		return
	}
	heavyBarrier()
	q.eachInbound(func(in *inbound) { in.waitIdle() })
}

func (q *QP) eachInbound(f func(*inbound)) {
	if in := q.in.Load(); in != nil {
		f(in)
	}
	if ins := q.ins.Load(); ins != nil {
		for _, in := range *ins {
			f(in)
		}
	}
}

// reset brings the QP back to RESET: queues are empty, completions that were not polled are gone. Called with cfg held.
func (q *QP) reset() {
	q.sq.Lock()
	q.epoch.Add(1)
	q.state.Store(uint32(ib.Reset))
	l := q.link
	w := q.wire
	if w != nil {
		w.stop()
	}
	q.pv, q.link, q.wire = nil, nil, nil
	q.met, q.lost, q.cut, q.drained = false, false, nil, drainedYes
	clear(q.rcache[:])
	clear(q.hcache[:])
	for q.pendLen > 0 {
		q.popPending()
	}
	q.assist, q.asked = assist{}, question{}
	q.shown, q.done, q.rnrs = shown{}, observe.Traffic{}, 0
	q.attr = ib.QPAttr{}
	q.sq.Unlock()
	if l != nil {
		l.unbindView(q)
	}
	if w != nil {
		w.detach()
	}
	if q.stream != nil {
		q.stream.Close()
		q.stream = nil
	}
	if q.typ == ib.UD {
		q.detachNet()
	}
	q.shutInbound()

	q.rcq.mu.Lock()
	q.epoch.Add(1) // again: until here Poll could meet completions of before
	in := q.in.Swap(nil)
	ins := q.ins.Swap(nil)
	q.rq.Lock()
	for i := range q.recs {
		q.recs[i].staged.free(q.nic)
		q.recs[i] = recvRec{}
	}
	atomic.StoreUint32(&q.posted, 0)
	atomic.StoreUint32(&q.head, 0)
	q.flushing.Store(false)
	q.lastWQE, q.commEst, q.got = false, false, observe.Traffic{}
	q.rq.Unlock()
	q.rcq.queued += q.recount(q.rcq)
	q.rcq.mu.Unlock()

	q.scq.mu.Lock()
	q.sq.Lock()
	q.scNext = 0
	atomic.StoreUint32(&q.scTail, 0)
	atomic.StoreUint32(&q.scHead, 0)
	q.sq.Unlock()
	q.scq.queued += q.recount(q.scq)
	q.scq.mu.Unlock()

	if in != nil {
		if q.srq != nil {
			q.srq.giveUp(in)
		}
		in.release()
	}
	if ins != nil {
		for _, in := range *ins {
			if !q.ownSRQ {
				q.srq.giveUp(in)
			}
			in.release()
		}
	}
	if q.ownSRQ {
		q.srq.clear()
	}
}

// Close implements driver.QP.
func (q *QP) Close() error {
	q.cfg.Lock()
	defer q.cfg.Unlock()
	if q.closed.Swap(true) {
		return driver.ErrClosed
	}
	q.reset()
	q.nic.dropQP(q)
	q.detachCQs()
	if q.srq != nil {
		q.srq.detachQP()
		if q.ownSRQ {
			q.srq.destroy()
		}
	}
	q.pd.dropChild()
	return nil
}
