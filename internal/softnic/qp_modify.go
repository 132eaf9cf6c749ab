package softnic

import (
	"context"
	"errors"
	"fmt"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What can be changed of a QP, and in which states.

// Modify implements driver.QP.
func (q *QP) Modify(ctx context.Context, attr *ib.QPAttr, mask ib.QPAttrMask) error {
	q.cfg.Lock()
	defer q.cfg.Unlock()
	if q.closed.Load() {
		return driver.ErrClosed
	}
	cur := ib.QPState(q.state.Load())
	if mask&ib.AttrCurState != 0 && attr.CurState != cur {
		return fmt.Errorf("%w: the QP is in %v, not in %v", driver.ErrState, cur, attr.CurState)
	}
	next := cur
	if mask&ib.AttrState != 0 {
		next = attr.State
	}
	if err := q.checkAttr(attr, mask); err != nil {
		return err
	}
	if mask&ib.AttrAV != 0 && cur == ib.SQD && (attr.AH.DGID != q.attr.AH.DGID || attr.AH.SGIDIndex != q.attr.AH.SGIDIndex) {
		return fmt.Errorf("modify QP %d: %w: the software NIC does not take a connection elsewhere", q.qpn, errors.ErrUnsupported)
	}
	switch {
	case next == ib.Reset:
		q.reset()
		return nil
	case next == ib.Err:
		q.setAttr(attr, mask)
		q.toErrorLocked(0, false)
		return nil
	case next == ib.RTR && cur == ib.Init:
		return q.toRTR(ctx, attr, mask)
	}
	q.setAttr(attr, mask)
	q.sq.Lock()
	if ib.QPState(q.state.Load()) != cur { // an error came in between
		q.sq.Unlock()
		return fmt.Errorf("%w: the QP went to %v meanwhile", driver.ErrState, ib.QPState(q.state.Load()))
	}
	q.state.Store(uint32(next))
	notify := mask&ib.AttrSQDNotify != 0 && attr.SQDNotify
	a, w := q.attr, q.wire
	if w != nil && next == ib.RTS {
		w.toRTS()
	}
	begun := q.pendLen > 0 && q.stall.kind != stallNone || w != nil && w.given > 0
	drained := false
	if next == ib.SQD && cur == ib.RTS {
		switch {
		case begun && notify:
			q.drained = drainingNotify
		case begun:
			q.drained = draining
		default:
			q.drained = drainedYes
			drained = notify
		}
	}
	q.sq.Unlock()
	if w != nil && mask&(ib.AttrMinRNRTimer|ib.AttrMaxDestRdAtomic) != 0 {
		w.changeResponder(&a)
	}
	if w != nil && mask&ib.AttrAV != 0 {
		w.setIP(&a.AH)
	}
	if mask&(ib.AttrAccess|ib.AttrQKey|ib.AttrMaxDestRdAtomic|ib.AttrMinRNRTimer) != 0 {
		q.eachInbound(func(in *inbound) { in.setRights(q) })
	}
	if drained {
		q.nic.raise(driver.AsyncEvent{Type: ib.EventSQDrained, QP: q})
	}
	if next == ib.RTS {
		q.progress()
	}
	return nil
}

func (q *QP) checkAttr(a *ib.QPAttr, mask ib.QPAttrMask) error {
	bad := func(what string, v any) error {
		return fmt.Errorf("modify QP %d: %s %v is out of range on the software NIC", q.qpn, what, v)
	}
	switch {
	case mask&ib.AttrPort != 0 && a.Port != 1:
		return bad("Port", a.Port)
	case mask&ib.AttrPKeyIndex != 0 && a.PKeyIndex != 0:
		return bad("PKeyIndex", a.PKeyIndex)
	case mask&ib.AttrPathMTU != 0 && a.PathMTU.Bytes() == 0:
		return bad("PathMTU", uint8(a.PathMTU))
	case mask&ib.AttrDestQPN != 0 && a.DestQPN > ib.MaxQPN:
		return bad("DestQPN", a.DestQPN)
	case mask&ib.AttrRQPSN != 0 && a.RQPSN > ib.MaxPSN:
		return bad("RQPSN", a.RQPSN)
	case mask&ib.AttrSQPSN != 0 && a.SQPSN > ib.MaxPSN:
		return bad("SQPSN", a.SQPSN)
	case mask&ib.AttrMinRNRTimer != 0 && a.MinRNRTimer > 31:
		return bad("MinRNRTimer", a.MinRNRTimer)
	case mask&ib.AttrAckTimeout != 0 && a.AckTimeout > 31:
		return bad("AckTimeout", a.AckTimeout)
	case mask&ib.AttrRetryCount != 0 && a.RetryCount > ib.MaxRetry:
		return bad("RetryCount", a.RetryCount)
	case mask&ib.AttrRNRRetry != 0 && a.RNRRetry > ib.MaxRetry:
		return bad("RNRRetry", a.RNRRetry)
	case mask&ib.AttrMaxRdAtomic != 0 && a.MaxRdAtomic > maxPaths:
		return bad("MaxRdAtomic", a.MaxRdAtomic)
	case mask&ib.AttrMaxDestRdAtomic != 0 && a.MaxDestRdAtomic > maxPaths:
		return bad("MaxDestRdAtomic", a.MaxDestRdAtomic)
	case mask&ib.AttrAV != 0 && !q.nic.hasGID(a.AH.SGIDIndex):
		return bad("AH.SGIDIndex", a.AH.SGIDIndex)
	case mask&ib.AttrAV != 0 && a.AH.DGID.IsZero():
		return bad("AH.DGID", a.AH.DGID)
	case mask&ib.AttrAccess != 0 && a.Access&^(ib.AccessRemote|ib.AccessFlushGlobal|ib.AccessLocalWrite|ib.AccessMWBind) != 0:
		return bad("Access", a.Access)
	}
	return nil
}

func (q *QP) setAttr(a *ib.QPAttr, mask ib.QPAttrMask) {
	q.sq.Lock()
	defer q.sq.Unlock()
	d := &q.attr
	set := func(m ib.QPAttrMask, f func()) {
		if mask&m != 0 {
			f()
		}
	}
	set(ib.AttrPKeyIndex, func() { d.PKeyIndex = a.PKeyIndex })
	set(ib.AttrPort, func() { d.Port = a.Port })
	set(ib.AttrQKey, func() { d.QKey = a.QKey })
	set(ib.AttrAccess, func() { d.Access = a.Access })
	set(ib.AttrAV, func() { d.AH = a.AH })
	set(ib.AttrPathMTU, func() { d.PathMTU = a.PathMTU })
	set(ib.AttrDestQPN, func() { d.DestQPN = a.DestQPN })
	set(ib.AttrRQPSN, func() { d.RQPSN = a.RQPSN })
	set(ib.AttrSQPSN, func() { d.SQPSN = a.SQPSN })
	set(ib.AttrMaxDestRdAtomic, func() { d.MaxDestRdAtomic = a.MaxDestRdAtomic })
	set(ib.AttrMaxRdAtomic, func() { d.MaxRdAtomic = a.MaxRdAtomic })
	set(ib.AttrMinRNRTimer, func() { d.MinRNRTimer = a.MinRNRTimer })
	set(ib.AttrAckTimeout, func() { d.AckTimeout = a.AckTimeout })
	set(ib.AttrRetryCount, func() { d.RetryCount = a.RetryCount })
	set(ib.AttrRNRRetry, func() { d.RNRRetry = a.RNRRetry })
	set(ib.AttrSQDNotify, func() { d.SQDNotify = a.SQDNotify })
}
