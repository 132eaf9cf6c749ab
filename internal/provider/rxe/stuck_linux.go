package rxe

import (
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// When the way to a peer is lost, because the port goes down or loses its address, the driver fails the request that it cannot send, and sends no
// more. Requests before that, which have been sent and not acknowledged, stay as they are: they are not sent again, and no timer runs any
// more that would end them (seen in 6.1: rxe_requester sets the requester's state to an error, in which rxe_completer does not set the
// timer again). So nothing completes, the failure included, which comes after them. The queue that both sides see shows it: a
// request has failed behind one that has not. Such a queue pair is taken to Err, which flushes all of it.

const (
	stuckPause = 500 * time.Millisecond // how long a failed request may wait for one before it
	stuckLooks = 60                     // so often it is looked for after an event of the port
)

// A stuckWatch is when a send queue is looked at, and what was seen. Guarded by the queue pair's sendMu.
type stuckWatch struct {
	timer *time.Timer // nil until the port has had an event
	left  int         // looks
	seen  bool        // the last one saw a request that has failed behind head
	head  uint32
}

// PortEvent is called with each event of the port.
func (q *qp) PortEvent(e ib.EventType) {
	if q.Type() != ib.RC || e != ib.EventPortErr && e != ib.EventGIDChange {
		return
	}
	q.sendMu.Lock()
	defer q.sendMu.Unlock()
	if q.sq.mem == nil {
		return
	}
	w := &q.watch
	if w.left = stuckLooks; w.timer == nil {
		w.timer = time.AfterFunc(stuckPause, q.look)
	} else {
		w.timer.Reset(stuckPause)
	}
}

// look ends the queue pair if it has been stuck since the last look.
func (q *qp) look() {
	q.sendMu.Lock()
	if q.sq.mem == nil {
		q.sendMu.Unlock()
		return
	}
	w, resets := &q.watch, q.resets.Load()
	head, stuck := q.sq.stuck()
	over := stuck && w.seen && head == w.head
	w.seen, w.head = stuck, head
	if w.left--; w.left > 0 && !over {
		w.timer.Reset(stuckPause)
	}
	q.sendMu.Unlock()
	if over {
		q.failed(resets)
	}
}

// stop ends looking. The caller holds sendMu.
func (w *stuckWatch) stop() {
	if w.timer != nil {
		w.timer.Stop()
	}
}
