package softnic

import (
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Receive queues that somebody else fills: an emulated device's receives lie in its client's memory, and nobody says when one is
// added. So the queue is looked at once more when a message comes that finds no receive. A message of another process is executed over
// there, where that memory is not: its NIC asks for the look, and the message waits for the answer.

// OnEmpty has f called when a message from another process or host comes for which no receive is posted. If none is then either, the
// message is dropped or refused. f may post receives to the queue pair or its SRQ, and calls nothing else of the NIC; it is called by
// several goroutines at a time, with locks of the NIC held, and so does not wait for anybody.
//
// OnEmpty is called before the queue pair leaves RESET. NICs of the same process do not ask: their users can look themselves.
func (q *QP) OnEmpty(f func()) { q.refill = f }

// peekOwn is peek for a view of q's own block.
func (q *QP) peekOwn(v *peerView, s *recvSlot) bool {
	if v.peek(s) {
		return true
	}
	if q.refill == nil {
		return false
	}
	q.refill()
	return v.peek(s)
}

// A question is what the head of a send queue has asked the peer's NIC: to look for receives.
type question struct {
	link *link
	id   uint64 // 0: nothing is asked
	at   time.Time
	vain bool // instead: it was asked, and there is no receive
}

// noReceive says what becomes of a message for which peek has found no receive: there is one after all, or it waits, or, with
// stallNone, it is dropped. Called with sq held, between enter and leave.
func (q *QP) noReceive(v *peerView, s *recvSlot) (found bool, kind stallKind) {
	waits := false
	if v.asks {
		found, waits = q.lookAgain(v, s)
	}
	switch {
	case found:
		return true, stallNone
	case q.typ == ib.RC:
		return false, stallRNR
	case waits:
		return false, stallRefill
	}
	return false, stallNone
}

// lookAgain has the peer's NIC look for receives, and peeks again when it has: once for each message, or, of RC, for each attempt that
// counts. A peer that does not answer is not asked again until it does.
func (q *QP) lookAgain(v *peerView, s *recvSlot) (found, waits bool) {
	l, a := v.link, &q.asked
	switch {
	case a.id == 0 || a.link != l:
		*a = question{}
		now := time.Now()
		if now.Before(q.stall.next) {
			return false, false
		}
		if !l.deaf.Load() {
			*a = question{link: l, id: l.askRefill(q.qpn, v.qpn), at: now}
			return false, true
		}
	case l.answered.Load() >= a.id:
		found = v.peek(s)
	case time.Since(a.at) < linkTimeout:
		return false, true
	default:
		l.deaf.Store(true)
	}
	*a = question{vain: !found}
	return found, false
}

// askRefill asks for receives of a QP of the peer's. Answers come in the order of the questions.
func (l *link) askRefill(own, peer ib.QPN) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.questions++
	l.send(ctl{kind: ctlRefill, qpn: uint32(own), dst: uint32(peer), x: l.questions})
	return l.questions
}

// handleRefill looks for receives of ours.
func (l *link) handleRefill(m *ctl) error {
	if q := l.nic.qp(ib.QPN(m.dst)); q != nil {
		mine := false
		q.eachInbound(func(in *inbound) { mine = mine || in.link == l })
		if mine && q.refill != nil {
			q.refill()
		}
	}
	l.send(ctl{kind: ctlRefilled, x: m.x})
	return nil
}

// handleRefilled takes the answer.
func (l *link) handleRefilled(m *ctl) error {
	l.mu.Lock()
	ok := m.x > l.answered.Load() && m.x <= l.questions
	l.mu.Unlock()
	if !ok {
		return errCtl
	}
	l.deaf.Store(false)
	l.answered.Store(m.x)
	l.nic.progressStalled()
	return nil
}
