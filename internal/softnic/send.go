package softnic

import (
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// pendingWR is a request that waits in the send queue, with storage of its own.
type pendingWR struct {
	wr     ib.SendWR
	bind   ib.BindMW
	sges   []ib.SGE
	inline []byte
}

// stall says why the head of the send queue cannot be executed now.
type stall struct {
	kind  stallKind
	since time.Time // of the present reason
	next  time.Time // RNR: when the next attempt counts
	tries int
}

type stallKind uint8

const (
	stallNone    stallKind = iota
	stallRNR               // no receive is posted
	stallPeer              // the peer's QP is not there, or not ready
	stallResolve           // a region of the peer is being mapped
	stallAssist            // the peer's NIC works for us
	stallNet               // a datagram cannot be sent just now
	stallRefill            // the peer's NIC looks for receives
)

func (q *QP) stateErr() error {
	if q.closed.Load() {
		return driver.ErrClosed
	}
	return driver.StateErr(ib.QPState(q.state.Load()))
}

// plain reports that nothing is wrong with a request of the common kinds; checkWR looks closely at the others.
func (q *QP) plain(wr *ib.SendWR) bool {
	return q.typ == ib.RC && driver.OpsPlain>>wr.Opcode&1 != 0 && len(wr.SGEs) <= q.cap.MaxSendSGE && len(wr.Inline) == 0 ||
		q.typ == ib.RC && driver.OpsInline>>wr.Opcode&1 != 0 && len(wr.SGEs) == 0 && len(wr.Inline) <= q.cap.MaxInline
}

// checkWR finds what can be wrong with a request by itself.
func (q *QP) checkWR(wr *ib.SendWR) error {
	if wr.Opcode >= ib.OpFlush {
		return driver.CheckPlacementWR(q.typ, &q.cap, wr)
	}
	if err := driver.CheckSendWR(q.typ, &q.cap, wr); err != nil {
		return err
	}
	if q.typ == ib.UD && q.nic.ah(wr.AH) == nil {
		return driver.ErrNoAH
	}
	return nil
}

// PostSend implements driver.QP. A request whose turn it is is executed here and now.
func (q *QP) PostSend(wrs []ib.SendWR) (int, error) {
	q.sq.Lock()
	st := ib.QPState(q.state.Load())
	if st < ib.RTS {
		q.sq.Unlock()
		return 0, q.stateErr()
	}
	// Slots are taken by requests that wait and by completions that were not polled yet.
	room := uint32(q.cap.MaxSendWR) - q.pendLen - (q.scNext - atomic.LoadUint32(&q.scHead))
	n := 0
	var err error
	for i := range wrs {
		wr := &wrs[i]
		if room == 0 {
			if room = uint32(q.cap.MaxSendWR) - q.pendLen - (q.scNext - atomic.LoadUint32(&q.scHead)); room == 0 {
				err = driver.ErrQueueFull
				break
			}
		}
		if !q.plain(wr) {
			if err = q.checkWR(wr); err != nil {
				break
			}
		}
		n++
		if st == ib.RTS && q.pendLen == 0 && q.wire == nil {
			status, length, stall := q.exec(wr)
			if stall == stallNone {
				if status != ib.WCSuccess {
					q.sendFailed(wr, status)
					st = ib.QPState(q.state.Load())
					room--
					continue
				}
				q.done.Messages++
				q.done.Bytes += uint64(length)
				if wr.Flags&ib.SendSignaled != 0 || q.sigAll {
					q.pushSC(wr, ib.WCSuccess, length)
					room--
				}
				continue
			}
			q.enqueue(wr)
			q.stallOn(stall)
			room--
			continue
		}
		if st == ib.Err || st == ib.SQE {
			status := ib.WCFlushErr
			if q.lost { // the peer died when nothing was under way: this is the first request that it does not answer
				q.lost, status = false, ib.WCRetryExceeded
			}
			q.pushSC(wr, status, 0)
		} else {
			q.enqueue(wr)
		}
		room--
	}
	signal := q.publishSC()
	w, port := q.wire, q.flushNet
	q.flushNet = nil
	q.sq.Unlock()
	if signal {
		q.scq.signal(q.sIdx, st == ib.Err || st == ib.SQE)
	}
	if w != nil && n > 0 {
		w.port.submit(w)
	} else if port != nil {
		port.run()
	}
	return n, err
}

// pushSC fills the next send completion; publishSC shows it to the poller.
func (q *QP) pushSC(wr *ib.SendWR, st ib.WCStatus, n uint32) {
	q.sc[q.scNext&q.scMask] = sendCompletion{id: wr.ID, n: n, status: st, op: ib.WCOpcodeOf(wr.Opcode)}
	q.scNext++
}

func (q *QP) publishSC() bool {
	if q.scNext == q.scTail {
		return false
	}
	publish32(q.full, &q.scTail, q.scNext) // pairs with the atomic load in pollSend
	return true
}

// sendFailed completes a request that failed; the QP stops, and what waits behind it is flushed (IBA 10.8.6). Called with
// sq held.
func (q *QP) sendFailed(wr *ib.SendWR, st ib.WCStatus) {
	q.pushSC(wr, st, 0)
	if w := q.wire; w != nil {
		w.given, w.over = 0, q.typ == ib.RC
	}
	if q.typ == ib.RC {
		q.state.Store(uint32(ib.Err))
		q.errorLater(q.epoch.Load(), 0, false)
	} else {
		q.state.Store(uint32(ib.SQE))
	}
	q.flushPending()
}

// flushPending completes every waiting request with a flush error. Called with sq held.
func (q *QP) flushPending() {
	q.assist, q.asked = assist{}, question{}
	q.stall = stall{}
	for q.pendLen > 0 {
		q.pushSC(&q.popPending().wr, ib.WCFlushErr, 0)
	}
}

// completePending completes the head of the waiting requests. Called with sq held.
func (q *QP) completePending(st ib.WCStatus, n uint32) {
	p := q.popPending()
	q.assist, q.asked = assist{}, question{}
	q.stall = stall{}
	switch begun := q.wire != nil && q.wire.given > 0; {
	case begun:
	case q.drained == draining:
		q.drained = drainedYes
	case q.drained == drainingNotify:
		q.drained = drainedNotify
	}
	if st != ib.WCSuccess {
		q.sendFailed(&p.wr, st)
		return
	}
	q.done.Messages++
	q.done.Bytes += uint64(n)
	if p.wr.Flags&ib.SendSignaled != 0 || q.sigAll {
		q.pushSC(&p.wr, st, n)
	}
}

// enqueue copies a request to the end of those that wait.
func (q *QP) enqueue(wr *ib.SendWR) {
	if q.pend == nil {
		q.makePending()
	}
	p := &q.pend[(q.pendHead+q.pendLen)&q.scMask]
	q.pendLen++
	p.sges = append(p.sges[:0], wr.SGEs...)
	p.inline = append(p.inline[:0], wr.Inline...)
	p.wr = *wr
	p.wr.SGEs, p.wr.Inline = p.sges, p.inline
	if wr.Bind != nil {
		p.bind = *wr.Bind
		p.wr.Bind = &p.bind
	}
}

// makePending makes room for as many requests as the queue has, each of the largest kind.
func (q *QP) makePending() {
	n, sges, inline := q.cap.MaxSendWR, q.cap.MaxSendSGE, q.cap.MaxInline
	q.pend = make([]pendingWR, n)
	s, b := make([]ib.SGE, n*sges), make([]byte, n*inline)
	for i := range q.pend {
		q.pend[i].sges = s[i*sges : i*sges : (i+1)*sges]
		q.pend[i].inline = b[i*inline : i*inline : (i+1)*inline]
	}
}

func (q *QP) popPending() *pendingWR {
	p := &q.pend[q.pendHead&q.scMask]
	q.pendHead++
	q.pendLen--
	return p
}

// stallOn notes why the head request waits, and has the NIC retry it. Called with sq held.
func (q *QP) stallOn(k stallKind) {
	if q.stall.kind != k {
		now := time.Now()
		q.stall = stall{kind: k, since: now}
		if k == stallRNR {
			q.stall.next = now // the first attempt has been made: it counts
		}
	}
	if !q.stalled {
		q.stalled = true
		q.nic.addStalled(q)
	}
}

// timedOut applies the retry limits to the head request, which has just been tried in vain. Called with sq held.
func (q *QP) timedOut(now time.Time) (ib.WCStatus, bool) {
	switch s := &q.stall; s.kind {
	case stallRNR:
		if now.Before(s.next) || q.pv != nil && q.pv.asks && !q.asked.vain { // an attempt counts once the peer has looked
			return 0, false
		}
		q.asked = question{}
		s.tries++
		q.rnrs++
		timer := ib.RNRTimer(0)
		if q.pv != nil {
			timer = q.pv.minRNRTimer()
		}
		if q.nic.taps.Load() != nil {
			q.tapRNR(&q.pend[q.pendHead&q.scMask].wr, timer)
		}
		if q.attr.RNRRetry != ib.RNRRetryForever && s.tries > int(q.attr.RNRRetry) {
			return ib.WCRNRRetryExceeded, true
		}
		s.next = now.Add(timer.Duration())
	case stallPeer:
		if q.typ == ib.UC {
			return ib.WCSuccess, now.Sub(s.since) > linkTimeout // as if it had been sent to nobody
		}
		if q.attr.AckTimeout != 0 && now.Sub(s.since) > q.attr.AckTimeout.Duration()*time.Duration(q.attr.RetryCount+1) {
			return ib.WCRetryExceeded, true
		}
	}
	return 0, false
}

// progress retries the waiting requests. It reports whether some are left, and never blocks.
func (q *QP) progress() (left bool) {
	q.sq.Lock()
	if w := q.wire; w != nil {
		q.sq.Unlock()
		w.port.submit(w)
		return false
	}
	for q.pendLen > 0 && q.sending() {
		wr := &q.pend[q.pendHead&q.scMask].wr
		st, n, stall := q.exec(wr)
		if stall != stallNone {
			q.stallOn(stall)
			if st, out := q.timedOut(time.Now()); out {
				q.completePending(st, 0)
				continue
			}
			break
		}
		q.completePending(st, n)
	}
	left = q.pendLen > 0
	if !left {
		q.stall = stall{}
	}
	q.unlockSends()
	return left
}

// unlockSends shows what has completed and lets go of sq, which progress or a wireQP holds.
func (q *QP) unlockSends() {
	st := ib.QPState(q.state.Load())
	signal := q.publishSC()
	drained := st == ib.SQD && q.drained == drainedNotify
	if drained {
		q.drained = drainedYes
	}
	port := q.flushNet
	q.flushNet = nil
	q.sq.Unlock()
	if drained {
		q.nic.raise(driver.AsyncEvent{Type: ib.EventSQDrained, QP: q})
	}
	if signal {
		q.scq.signal(q.sIdx, st == ib.Err || st == ib.SQE)
	}
	if port != nil {
		port.run()
	}
}

// sending reports whether the head request may be executed: in RTS, and in SQD if it had begun before. Called with sq held.
func (q *QP) sending() bool {
	s := ib.QPState(q.state.Load())
	return s == ib.RTS || s == ib.SQD && (q.drained == drainingNotify || q.drained == draining)
}
