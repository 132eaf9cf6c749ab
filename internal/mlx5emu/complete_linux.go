package mlx5emu

import (
	"context"
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Completions, and how queue pairs end.

// collect writes CQEs for what has completed: receives first, as they were there first; but what a queue pair's failure has flushed
// comes behind the failure.
func (d *Device) collect() (some bool) {
	for _, c := range d.order {
		for _, n := range c.cqs {
			for {
				k := n.soft.Poll(d.engine.wcs[:])
				if k < 0 {
					n.fail()
				}
				if k <= 0 {
					break
				}
				n.pending = append(n.pending, d.engine.wcs[:k]...)
				some = true
				if k < len(d.engine.wcs) {
					break
				}
			}
		}
	}
	if !some {
		return false
	}
	for turn := range 3 {
		for _, c := range d.order {
			for _, n := range c.cqs {
				for i := range n.pending {
					if wc := &n.pending[i]; turnOf(wc) == turn {
						d.completed(wc)
					}
				}
			}
		}
	}
	for _, c := range d.order {
		for _, n := range c.cqs {
			n.pending = n.pending[:0]
		}
	}
	return true
}

// turnOf is when a completion is written, of those that were found at once.
func turnOf(wc *ib.WC) int {
	switch {
	case !wc.Opcode.IsRecv():
		return 1
	case wc.Status == ib.WCFlushErr:
		return 2
	}
	return 0
}

// completed writes the CQE of a completion, if it is wanted.
func (d *Device) completed(wc *ib.WC) {
	n := d.qps[uint32(wc.QPN)]
	if n == nil || n.frozen && (n.srq == nil || !wc.Opcode.IsRecv()) {
		return // it has gone meanwhile, or will have forgotten; but see settle
	}
	if wc.Opcode.IsRecv() {
		n.completeRecv(wc)
		return
	}
	if id := sendID(wc.ID); id.life() == n.life {
		n.outstanding--
		n.completeSend(wc)
	}
}

func (n *qp) completeSend(wc *ib.WC) {
	if wc.Status == ib.WCSuccess && !sendID(wc.ID).signaled() {
		return
	}
	n.sendDone = sendID(wc.ID).end()
	var e cqe
	e.requester(wc, n.qpn)
	n.stamp(&e)
	n.scq.complete(&e, wc.Status != ib.WCSuccess)
}

func (n *qp) completeRecv(wc *ib.WC) {
	if n.srq == nil && uint16(wc.ID>>48) != n.life {
		return
	}
	n.c.dev.traceRecv(n, wc)
	n.recvDone++
	var e cqe
	e.responder(wc, n.qpn, uint16(wc.ID))
	if n.typ == ib.UD && wc.Status == ib.WCSuccess && n.c.dev.cfg.InfiniBand {
		be.PutUint16(e[cqeSLID:], uint16(n.c.dev.source(wc.SrcQPN)))
	}
	n.stamp(&e)
	n.rcq.complete(&e, wc.Status != ib.WCSuccess || wc.Flags&wcSolicited != 0)
}

// stamp fills what all CQEs have: the number by which the client knows the queue pair, and the time.
func (n *qp) stamp(e *cqe) {
	index := n.index
	if n.c.cqeVersion == 0 {
		index = 0
		if n.srq != nil && e[cqeOwner]>>4 != cqeRequester && e[cqeOwner]>>4 != cqeRequesterErr {
			index = n.srq.srqn
		}
	}
	be.PutUint32(e[cqeUserIndex:], index&cqeUserIndexMask)
	if op := e[cqeOwner] >> 4; op != cqeRequesterErr && op != cqeResponderErr {
		be.PutUint64(e[cqeTime:], n.c.dev.now())
	}
}

// now is the time of a CQE, in nanoseconds of a clock that begins anywhere.
func (d *Device) now() uint64 {
	if d.cfg.Numbered {
		d.clock++
		return d.clock
	}
	return uint64(time.Since(d.began))
}

// lostSends and lostRecvs end a queue that cannot be read: its memory is gone, or its counter cannot be. What has been read before is
// flushed, and nothing more is read until RESET.
func (n *qp) lostSends() {
	n.sendBad = true
	n.fatal()
}

func (n *qp) lostRecvs() {
	n.c.recvs.mu.Lock()
	n.recvBad = true
	n.c.recvs.mu.Unlock()
	n.fatal()
}

// fatal puts the queue pair into the error state, and says so.
func (n *qp) fatal() {
	if !n.wrecked {
		n.c.raise(n, n.user, &n.events, ib.EventQPFatal)
		n.wreck()
	}
}

// wreck has the queue pair put into the error state, which waits for peers, and so is done without the lock.
func (n *qp) wreck() {
	n.wrecked = true
	n.c.dev.engine.later = append(n.c.dev.engine.later, n)
}

// toError is the other half of wreck, without the lock. It reports false if that is left to the next step: while the client changes the
// queue pair, which may take until a peer answers, other clients do not wait for it.
func (n *qp) toError() bool {
	d := n.c.dev
	if !n.modify.TryLock() {
		d.mu.Lock()
		d.engine.later = append(d.engine.later, n)
		d.mu.Unlock()
		return false
	}
	defer n.modify.Unlock()
	d.mu.Lock()
	wrecked := n.wrecked && !n.frozen
	d.mu.Unlock()
	if !wrecked {
		return true // it was reset meanwhile, or has gone
	}
	n.soft.Modify(context.Background(), &ib.QPAttr{State: ib.Err}, ib.AttrState)
	d.mu.Lock()
	n.wrecked, n.rung = false, true // what is left in the queue is flushed
	d.mu.Unlock()
	return true
}
