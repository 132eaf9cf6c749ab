package rxe

import (
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Two things of the driver keep requests for ever when the way to the peer is lost, and nobody hears of it:
//
//   - When a request cannot be sent, because the port has gone down or has lost its address, the driver fails that, and sends no more.
//     Requests before it, which have been sent and not acknowledged, stay as they are: they are not sent again, and no timer runs any more that
//     would end them (seen in 6.1: rxe_requester sets the requester's state to an error, in which rxe_completer does not set the timer again).
//     So nothing completes, the failure included, which comes after them.
//   - With a RetryCount of 7 it sends again without end (rxe_completer), also into a link that has no carrier.
//
// The queue that both sides see shows the first: a request has failed behind one that has not. For the second, requests of a port that
// is down may wait for a while, as long as other devices would try. Then the queue pair is taken to Err, which flushes all of it.

const (
	lookPause  = 500 * time.Millisecond
	stuckLooks = 2  // looks at which a request has failed behind another, the same one
	downLooks  = 5  // looks at a port that is down, at which the same request was the first
	mostLooks  = 60 // after an event of the port; while it is down, there is no end to them
)

// A portWatch is when a send queue is looked at, and what was seen. Guarded by the queue pair's sendMu.
type portWatch struct {
	timer *time.Timer // nil until the port has had an event
	down  bool        // the last event said so
	left  int         // looks
	head  uint32      // the first request of the last look
	stuck int         // looks at which one behind head had failed
	same  int         // looks at which the port was down, and head the first
}

// PortEvent is called with each event of the port.
func (q *qp) PortEvent(e ib.EventType) {
	if q.Type() != ib.RC || e != ib.EventPortErr && e != ib.EventPortActive && e != ib.EventGIDChange {
		return
	}
	q.sendMu.Lock()
	defer q.sendMu.Unlock()
	if q.sq.mem == nil {
		return
	}
	w := &q.watch
	if e != ib.EventGIDChange {
		w.down = e == ib.EventPortErr
	}
	if w.left = mostLooks; w.timer == nil {
		w.timer = time.AfterFunc(lookPause, q.look)
	} else {
		w.timer.Reset(lookPause)
	}
}

// look ends the queue pair if its requests wait for what does not come.
func (q *qp) look() {
	q.sendMu.Lock()
	if q.sq.mem == nil {
		q.sendMu.Unlock()
		return
	}
	w, resets := &q.watch, q.resets.Load()
	head, some, stuck := q.sq.waiting()
	if !some || head != w.head {
		w.head, w.stuck, w.same = head, 0, 0
	}
	if stuck {
		w.stuck++
	}
	if some && w.down {
		w.same++
	}
	over := w.stuck >= stuckLooks || w.same >= downLooks
	if !w.down {
		w.same = 0
		w.left--
	}
	if w.left > 0 && !over {
		w.timer.Reset(lookPause)
	}
	q.sendMu.Unlock()
	if over {
		q.failed(resets)
	}
}

// stop ends looking. The caller holds sendMu.
func (w *portWatch) stop() {
	if w.timer != nil {
		w.timer.Stop()
	}
}
