package rxe

import (
	"fmt"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Memory windows. The kernel's driver believes more than it should of what a work request says of them (Linux 6.1 to 6.12):
//
//   - It binds a window to a region of another protection domain. That is checked here.
//   - It dies when a window is invalidated that is not bound. Local requests are checked here; a peer that sends
//     SEND_WITH_INV twice cannot be.
//   - It keeps a queue pair that is to be destroyed waiting for the windows that are bound to it, and gives up after 50 s
//     (rxe_cleanup). They are freed before.
//   - It holds peers to the bounds of the region, not of the window. Nothing can be done about that here.

// bind checks a bind request, and notes what it will do. It returns the window's key before that.
func (q *qp) bind(b *ib.BindMW, number uint32) (current ib.RKey, err error) {
	w, _, err := q.c.windows.Lookup(&q.QP, b)
	if err != nil {
		return 0, err
	}
	return w.Bind(&q.QP, b.RKey, true, number)
}

// windowsFailed takes back what was noted of windows by requests that have failed, or were flushed. A failed completion does not say
// which request it is of. But the place of a request has what the kernel has made of it, until it is written again.
// Called with sendMu held.
func (q *qp) windowsFailed() {
	if q.sq.mem == nil {
		return
	}
	q.WindowsFailed(q.didLocked)
}

// didLocked reports whether the request of that number, which was posted before and is about a window, is done.
func (q *qp) didLocked(number uint32) bool {
	back := q.posts - number
	return back > q.sq.mask || q.sq.did(q.sq.at-back)
}

var errNoRegion = fmt.Errorf("%w: the 8 bytes of the atomic write are in no region of the QP's protection domain", driver.ErrInvalidWR)

// atomicWord is what an ATOMIC_WRITE of 8 bytes of registered memory writes. rxe wants them in the work request, as if they were
// inline.
func (q *qp) atomicWord(s *ib.SGE) ([8]byte, error) {
	w, ok := q.c.windows.Read8(q.PD, s)
	if !ok {
		return w, errNoRegion
	}
	return w, nil
}
