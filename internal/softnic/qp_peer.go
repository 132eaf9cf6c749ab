package softnic

import (
	"context"
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// How a QP finds its peer within the host, and learns that it has gone.

// toRTR has the QP receive. RC and UC, unless a network or a stream connects them, find the link to the peer, and give the peer a
// block to write to.
func (q *QP) toRTR(ctx context.Context, attr *ib.QPAttr, mask ib.QPAttrMask) error {
	if q.typ == ib.UD {
		q.setAttr(attr, mask)
		q.state.Store(uint32(ib.RTR))
		return q.attachNet()
	}
	if q.stream != nil {
		return q.toRTRStream(attr, mask)
	}
	if attr.AH.SGIDIndex != 0 {
		return q.toRTRWire(attr, mask)
	}
	l, err := q.nic.linkTo(ctx, attr.AH.DGID)
	if err != nil {
		return err
	}
	q.setAttr(attr, mask)
	if err := l.bindView(q); err != nil {
		return err
	}
	q.sq.Lock()
	q.link = l
	q.sq.Unlock()
	in, err := q.openInbound(l, uint32(attr.DestQPN))
	if err != nil {
		l.unbindView(q)
		q.sq.Lock()
		q.link = nil
		q.sq.Unlock()
		return err
	}
	q.sq.Lock()
	q.state.Store(uint32(ib.RTR))
	q.sq.Unlock()
	if l.reason() != nil { // it ended while we connected: nobody else tells us
		q.nic.later(func() { q.linkDown(l, l.reason()) })
		return nil
	}
	l.pushRegions(q.pd)
	m := in.connect
	msg := ctl{kind: ctlConnect, qpn: uint32(q.qpn), dst: uint32(attr.DestQPN)}
	m.into(&msg)
	l.send(msg)
	if v := l.waitingView(q.qpn, attr.DestQPN); v != nil {
		q.tryConnect(l, v, true)
	}
	return nil
}

// tryConnect takes the peer's block as the place to send to, if the QP expects that peer. If the description was waiting,
// the peer may have withdrawn it since it was looked up; if it does so from now on, peerLeft follows.
func (q *QP) tryConnect(l *link, v *peerView, waited bool) {
	q.sq.Lock()
	if waited && !l.stillWaiting(q.qpn, v) {
		q.sq.Unlock()
		return
	}
	s := ib.QPState(q.state.Load())
	ok := q.link == l && q.attr.DestQPN == v.qpn && q.pv == nil && (s == ib.RTR || s == ib.RTS || s == ib.SQD) &&
		l.reason() == nil // from now on linkDown comes before the memory goes
	if ok {
		q.pv = v
		q.met = true
	}
	more := ok && q.pendLen > 0
	q.sq.Unlock()
	if more {
		q.progress()
	}
}

// peerLeft: the peer destroyed or reset its QP. As on a wire, we only notice by requests that nobody answers.
func (q *QP) peerLeft(l *link, peer ib.QPN) {
	q.sq.Lock()
	defer q.sq.Unlock()
	if q.link == l && q.attr.DestQPN == peer {
		q.pv = nil
	}
}

// linkDown: the peer's NIC is gone. The request under way gets RETRY_EXC_ERR, later ones and receives are flushed.
func (q *QP) linkDown(l *link, _ error) {
	if q.typ == ib.UD {
		q.dropPeer(l, time.Millisecond)
		return
	}
	q.sq.Lock()
	if q.link != l {
		q.sq.Unlock()
		return
	}
	q.pv = nil
	clear(q.rcache[:])
	clear(q.hcache[:])
	if !connected(ib.QPState(q.state.Load())) {
		q.sq.Unlock()
		return
	}
	q.unanswered()
	epoch := q.epoch.Load() // a reset in between has let go of the link, and what comes behind it has another
	q.sq.Unlock()
	q.toErrorIn(epoch, ib.EventQPFatal, true)
}
