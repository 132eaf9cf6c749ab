package softnic

import (
	"fmt"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// pendingWR is a request that waits in the send queue, with storage of its own.
type pendingWR struct {
	wr     ib.SendWR
	bind   ib.BindMW
	sges   []ib.SGE
	inline []byte
}

var errNoInline = fmt.Errorf("%w: inline payload with SGEs, longer than MaxInline, or with an opcode that has none", driver.ErrInvalidWR)
var errOpcode = fmt.Errorf("%w: this QP type has no such operation", driver.ErrInvalidWR)
var errAtomicLen = fmt.Errorf("%w: an atomic needs one 8-byte buffer for the old value", driver.ErrInvalidWR)
var errNoBind = fmt.Errorf("%w: a bind request needs its Bind field", driver.ErrInvalidWR)
var errNoAH = fmt.Errorf("%w: a datagram needs an address handle of this context", driver.ErrInvalidWR)

var stateErrs = func() (e [ib.Err + 1]error) {
	for s := range e {
		e[s] = fmt.Errorf("%w: it is %v", driver.ErrState, ib.QPState(s))
	}
	return e
}()

func (q *QP) stateErr() error {
	if q.closed.Load() {
		return driver.ErrClosed
	}
	return stateErrs[q.state.Load()]
}

const (
	opsRC = 1<<ib.OpRDMAWrite | 1<<ib.OpRDMAWriteWithImm | 1<<ib.OpSend | 1<<ib.OpSendWithImm | 1<<ib.OpRDMARead |
		1<<ib.OpAtomicCmpSwap | 1<<ib.OpAtomicFetchAdd | 1<<ib.OpLocalInv | 1<<ib.OpBindMW | 1<<ib.OpSendWithInv
	opsUC = 1<<ib.OpRDMAWrite | 1<<ib.OpRDMAWriteWithImm | 1<<ib.OpSend | 1<<ib.OpSendWithImm | 1<<ib.OpLocalInv |
		1<<ib.OpBindMW
	opsUD     = 1<<ib.OpSend | 1<<ib.OpSendWithImm
	opsInline = 1<<ib.OpRDMAWrite | 1<<ib.OpRDMAWriteWithImm | 1<<ib.OpSend | 1<<ib.OpSendWithImm | 1<<ib.OpSendWithInv
	opsPlain  = opsInline | 1<<ib.OpRDMARead
	opsAtomic = 1<<ib.OpAtomicCmpSwap | 1<<ib.OpAtomicFetchAdd
)

// plain reports that nothing is wrong with a request of the common kinds; checkWR looks closely at the others.
func (q *QP) plain(wr *ib.SendWR) bool {
	return q.typ == ib.RC && opsPlain>>wr.Opcode&1 != 0 && len(wr.SGEs) <= q.cap.MaxSendSGE && len(wr.Inline) == 0 ||
		q.typ == ib.RC && opsInline>>wr.Opcode&1 != 0 && len(wr.SGEs) == 0 && len(wr.Inline) <= q.cap.MaxInline
}

// checkWR finds what can be wrong with a request by itself.
func (q *QP) checkWR(wr *ib.SendWR) error {
	ops := uint32(opsRC)
	if q.typ != ib.RC {
		ops = opsUC
		if q.typ == ib.UD {
			ops = opsUD
		}
	}
	bit := uint32(1) << (wr.Opcode & 31)
	if ops&bit == 0 || wr.Opcode > ib.OpSendWithInv {
		return errOpcode
	}
	if len(wr.SGEs) > q.cap.MaxSendSGE {
		return errTooManySGEs
	}
	if len(wr.Inline) > 0 && (len(wr.SGEs) > 0 || len(wr.Inline) > q.cap.MaxInline || opsInline&bit == 0) {
		return errNoInline
	}
	if bit&(opsAtomic|1<<ib.OpBindMW) != 0 {
		if bit&opsAtomic != 0 && (len(wr.SGEs) != 1 || wr.SGEs[0].Length != 8) {
			return errAtomicLen
		}
		if wr.Opcode == ib.OpBindMW && wr.Bind == nil {
			return errNoBind
		}
	}
	if q.typ == ib.UD && q.nic.ah(wr.AH) == nil {
		return errNoAH
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
		if st == ib.RTS && q.pendLen == 0 {
			status, length, stall := q.exec(wr)
			if stall == stallNone {
				if status != ib.WCSuccess {
					q.sendFailed(wr, status)
					st = ib.QPState(q.state.Load())
					room--
				} else if wr.Flags&ib.SendSignaled != 0 || q.sigAll {
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
	q.sq.Unlock()
	if signal {
		q.scq.signal(q.sIdx, st == ib.Err || st == ib.SQE)
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
	q.assist = assist{}
	q.stall = stall{}
	for q.pendLen > 0 {
		q.pushSC(&q.popPending().wr, ib.WCFlushErr, 0)
	}
}

// completePending completes the head of the waiting requests. Called with sq held.
func (q *QP) completePending(st ib.WCStatus, n uint32) {
	p := q.popPending()
	q.assist = assist{}
	q.stall = stall{}
	switch q.drained {
	case draining:
		q.drained = drainedYes
	case drainingNotify:
		q.drained = drainedNotify
	}
	if st != ib.WCSuccess {
		q.sendFailed(&p.wr, st)
	} else if p.wr.Flags&ib.SendSignaled != 0 || q.sigAll {
		q.pushSC(&p.wr, st, n)
	}
}

// enqueue copies a request to the end of those that wait.
func (q *QP) enqueue(wr *ib.SendWR) {
	if q.pend == nil {
		q.pend = make([]pendingWR, q.cap.MaxSendWR)
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
		if now.Before(s.next) {
			return 0, false
		}
		s.tries++
		if q.attr.RNRRetry != ib.RNRRetryForever && s.tries > int(q.attr.RNRRetry) {
			return ib.WCRNRRetryExceeded, true
		}
		d := ib.RNRTimer(0)
		if q.pv != nil {
			d = q.pv.rnr
		}
		s.next = now.Add(d.Duration())
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
	st := ib.QPState(q.state.Load())
	signal := q.publishSC()
	drained := st == ib.SQD && q.drained == drainedNotify
	if drained {
		q.drained = drainedYes
	}
	q.sq.Unlock()
	if drained {
		q.nic.raise(driver.AsyncEvent{Type: ib.EventSQDrained, QP: q})
	}
	if signal {
		q.scq.signal(q.sIdx, st == ib.Err || st == ib.SQE)
	}
	return left
}

// sending reports whether the head request may be executed: in RTS, and in SQD if it had begun before. Called with sq held.
func (q *QP) sending() bool {
	s := ib.QPState(q.state.Load())
	return s == ib.RTS || s == ib.SQD && (q.drained == drainingNotify || q.drained == draining)
}

// exec executes a request, or says why it cannot be executed yet. Called with sq held.
func (q *QP) exec(wr *ib.SendWR) (st ib.WCStatus, n uint32, s stallKind) {
	if q.typ == ib.UD {
		return q.execUD(wr)
	}
	switch wr.Opcode {
	case ib.OpLocalInv:
		return q.localInv(wr.InvalidateRKey), 0, stallNone
	case ib.OpBindMW:
		return q.bind(wr.Bind), 0, stallNone
	}
	v := q.pv
	if v != nil {
		// v.enter and v.leave, which are too large for the compiler to inline here.
		publish32(v.full, v.busy, 1)
		if atomic.LoadUint32(v.state) != qpReady {
			v.leave()
			v = nil
		}
	}
	if v == nil {
		if q.typ == ib.UC && q.met {
			return ib.WCSuccess, 0, stallNone // nobody listens, and nobody says so
		}
		return 0, 0, stallPeer
	}
	switch wr.Opcode {
	case ib.OpSend, ib.OpSendWithImm, ib.OpSendWithInv:
		st, n, s = q.execSend(v, wr)
	case ib.OpRDMAWrite, ib.OpRDMAWriteWithImm:
		st, n, s = q.execWrite(v, wr)
	case ib.OpRDMARead:
		st, n, s = q.execRead(v, wr)
	default:
		st, n, s = q.execAtomic(v, wr)
	}
	v.leave()
	if q.typ == ib.UC && st != ib.WCSuccess && !isLocal(st) {
		return ib.WCSuccess, n, stallNone // errors of the responder do not come back
	}
	return st, n, s
}

func isLocal(st ib.WCStatus) bool {
	return st == ib.WCLocalProtErr || st == ib.WCLocalLengthErr || st == ib.WCLocalQPOpErr
}

// local checks the local buffers of a request and returns their length. A payload in one piece, the usual case, is returned
// as b; of several pieces b is nil, and gather or scatter do the copying. The memory cannot go while sq is held.
func (q *QP) local(wr *ib.SendWR, need ib.Access) (b []byte, n uint32, st ib.WCStatus) {
	if len(wr.Inline) > 0 {
		return wr.Inline, uint32(len(wr.Inline)), ib.WCSuccess
	}
	if len(wr.SGEs) == 1 {
		s := &wr.SGEs[0]
		if s.Length == 0 {
			return nil, 0, ib.WCSuccess
		}
		r := q.nic.regions.lookup(uint32(s.LKey))
		if r == nil || r.pd != q.pd || r.qpn != 0 || r.access&need != need || !r.contains(s.Addr, s.Length) {
			return nil, 0, ib.WCLocalProtErr
		}
		return r.bytes(s.Addr, s.Length), s.Length, ib.WCSuccess
	}
	n, st = q.localList(wr, need)
	return nil, n, st
}

func (q *QP) localList(wr *ib.SendWR, need ib.Access) (uint32, ib.WCStatus) {
	var sum uint64
	for i := range wr.SGEs {
		s := &wr.SGEs[i]
		if s.Length == 0 {
			continue
		}
		r := q.nic.regions.lookup(uint32(s.LKey))
		if r == nil || r.pd != q.pd || r.qpn != 0 || r.access&need != need || !r.contains(s.Addr, s.Length) {
			return 0, ib.WCLocalProtErr
		}
		sum += uint64(s.Length)
	}
	if sum > ib.MaxMessage {
		return 0, ib.WCLocalLengthErr
	}
	return uint32(sum), ib.WCSuccess
}

// gather copies the request's payload, from byte skip on, to dst; local has checked it.
func (q *QP) gather(dst []byte, wr *ib.SendWR, skip uint32) {
	if len(wr.Inline) > 0 {
		dma(dst, wr.Inline[skip:])
		return
	}
	for i := range wr.SGEs {
		s := &wr.SGEs[i]
		if len(dst) == 0 {
			return
		}
		if s.Length <= skip {
			skip -= s.Length
			continue
		}
		if r := q.nic.regions.lookup(uint32(s.LKey)); r != nil {
			dst = dst[dma(dst, r.bytes(s.Addr+uint64(skip), s.Length-skip)):]
		}
		skip = 0
	}
}

// scatter copies src to the request's buffers, from byte skip on.
func (q *QP) scatter(wr *ib.SendWR, src []byte, skip uint32) {
	for i := range wr.SGEs {
		s := &wr.SGEs[i]
		if len(src) == 0 {
			return
		}
		if s.Length <= skip {
			skip -= s.Length
			continue
		}
		if r := q.nic.regions.lookup(uint32(s.LKey)); r != nil {
			src = src[dma(r.bytes(s.Addr+uint64(skip), s.Length-skip), src):]
		}
		skip = 0
	}
}

func (q *QP) execSend(v *peerView, wr *ib.SendWR) (ib.WCStatus, uint32, stallKind) {
	b, n, st := q.local(wr, 0)
	if st != ib.WCSuccess {
		return st, 0, stallNone
	}
	var flags uint8
	var imm uint32
	switch wr.Opcode {
	case ib.OpSendWithImm:
		flags, imm = cqeImm, wr.Imm
	case ib.OpSendWithInv:
		flags, imm = cqeInv, uint32(wr.InvalidateRKey)
		if st, s := q.remoteWindow(v, wr.InvalidateRKey); st != ib.WCSuccess || s != stallNone {
			return st, 0, s
		}
	}
	if wr.Flags&ib.SendSolicited != 0 {
		flags |= cqeSolicited
	}
	st, s := q.deliver(v, wr, b, n, imm, flags)
	if st == ib.WCSuccess && s == stallNone && wr.Opcode == ib.OpSendWithInv {
		q.uncache(wr.InvalidateRKey)
	}
	return st, n, s
}

// deliver puts a message of n bytes (b, if it is in one piece) into the peer's next receive and completes it. Called between
// enter and leave.
func (q *QP) deliver(v *peerView, wr *ib.SendWR, b []byte, n, imm uint32, flags uint8) (ib.WCStatus, stallKind) {
	slot := &v.slot
	if !v.peek(slot) {
		if q.typ == ib.UC {
			return ib.WCSuccess, stallNone // dropped
		}
		return 0, stallRNR
	}
	h := slot.handle()
	if n > 0 && h != sgeList && (h != v.hdl || !v.region.ok()) { // the usual receive comes from the same region as the last one
		r := v.link.regionByHandle(h)
		if r == nil {
			return 0, stallResolve
		}
		if !r.missing && r.ok() {
			v.hdl, v.region = h, r
		}
	}
	if h == sgeList || n > slot.length() || n > 0 && (h != v.hdl || !v.region.contains(slot.addr, slot.length())) {
		return q.deliverSlow(v, wr, slot, n, imm, flags)
	}
	if v.geo.srq && !v.take(slot) {
		return q.deliver(v, wr, b, n, imm, flags) // somebody else took it: look at the next
	}
	if n > 0 {
		dst := v.region.bytes(slot.addr, n)
		if b != nil {
			dma(dst, b)
		} else {
			q.gather(dst, wr, 0)
		}
	}
	v.complete(slot, n, imm, flags, ib.WCSuccess, q.qpn)
	v.port.notify(flags&cqeSolicited != 0)
	return ib.WCSuccess, stallNone
}

// deliverSlow handles scatter lists and receives that do not fit: the receiver learns of the latter by its completion.
func (q *QP) deliverSlow(v *peerView, wr *ib.SendWR, slot *recvSlot, n, imm uint32, flags uint8) (ib.WCStatus, stallKind) {
	var parts [maxSGE]struct {
		r    *remoteRegion
		addr uint64
		n    uint32
	}
	np := 0
	bad := ib.WCSuccess // what the receiver sees
	switch {
	case n > slot.length() && !(slot.handle() == sgeList && slot.addr == 0 && n == 0):
		bad = ib.WCLocalLengthErr
	case n > 0 && slot.handle() == sgeList:
		if slot.addr > uint64(len(slot.list)/2) {
			v.link.fault("receive with %d scatter elements", slot.addr)
			return 0, stallPeer
		}
		left := n
		for i := 0; i < int(slot.addr) && left > 0; i++ {
			addr, lenHdl := slot.list[2*i], slot.list[2*i+1]
			k := min(uint32(lenHdl), left)
			if k == 0 {
				continue
			}
			r := v.link.regionByHandle(uint32(lenHdl >> 32))
			if r == nil {
				return 0, stallResolve
			}
			if r.missing || !r.ok() || !r.contains(addr, uint32(lenHdl)) || r.mem == nil {
				v.dropBad(r)
				bad = ib.WCLocalProtErr
				break
			}
			parts[np].r, parts[np].addr, parts[np].n = r, addr, k
			np++
			left -= k
		}
		if left > 0 && bad == ib.WCSuccess {
			bad = ib.WCLocalLengthErr
		}
	case n > 0:
		if r := v.link.regionByHandle(slot.handle()); r != nil {
			v.dropBad(r)
		}
		bad = ib.WCLocalProtErr
	}
	if q.typ == ib.UD && bad == ib.WCLocalLengthErr {
		return ib.WCSuccess, stallNone // a datagram that does not fit is dropped
	}
	if !v.take(slot) {
		return q.deliver(v, wr, nil, n, imm, flags)
	}
	if bad == ib.WCSuccess && n > 0 {
		var skip uint32
		for i := range np {
			p := &parts[i]
			q.gather(p.r.bytes(p.addr, p.n), wr, skip)
			skip += p.n
		}
	}
	v.complete(slot, n, imm, flags, bad, q.qpn)
	v.port.notify(bad != ib.WCSuccess || flags&cqeSolicited != 0)
	switch bad {
	case ib.WCSuccess:
		return ib.WCSuccess, stallNone
	case ib.WCLocalLengthErr:
		return ib.WCRemoteInvalidReqErr, stallNone
	}
	return ib.WCRemoteOpErr, stallNone
}

// dropBad forgets a region that turned out unusable for receives, so that its handle is asked for again if it comes back.
func (v *peerView) dropBad(r *remoteRegion) {
	if r.missing {
		v.link.forgetMissing(r)
	} else {
		v.link.forgetStale(r)
	}
	v.hdl, v.region = sgeList, nil
}

// remote finds the peer's memory for a one-sided operation: n bytes at addr under rkey, with the right need. A nil slice with
// success means that the peer's NIC has to do it (assisted). Called between enter and leave.
func (q *QP) remote(v *peerView, rkey ib.RKey, addr uint64, n uint32, need ib.Access) (*remoteRegion, ib.WCStatus, stallKind) {
	r := q.rcache[rkey&3]
	if r == nil || r.rkey != rkey || !r.ok() {
		if r = v.link.regionByRKey(rkey); r == nil {
			return nil, 0, stallResolve
		}
		if r.missing {
			v.link.forgetMissing(r)
			return nil, q.accessFault(v), stallNone
		}
		if !r.ok() { // revoked; but the rkey may live again
			v.link.forgetStale(r)
			if q.stall.kind == stallResolve && q.stall.tries > 3 {
				return nil, q.accessFault(v), stallNone
			}
			q.stall.tries++
			v.link.regionByRKey(rkey)
			return nil, 0, stallResolve
		}
		q.rcache[rkey&3] = r
	}
	if r.access&need != need || atomic.LoadUint32(v.access)&uint32(need) != uint32(need) || r.pd != v.pd ||
		r.qpn != 0 && r.qpn != v.qpn || n > 0 && !r.contains(addr, n) {
		return nil, q.accessFault(v), stallNone
	}
	return r, ib.WCSuccess, stallNone
}

// remoteWindow checks that the key is a window that the peer has bound for this connection: nothing else can be invalidated.
func (q *QP) remoteWindow(v *peerView, k ib.RKey) (ib.WCStatus, stallKind) {
	r, st, s := q.remote(v, k, 0, 0, 0)
	if st == ib.WCSuccess && s == stallNone && r.qpn != v.qpn {
		st = q.accessFault(v)
	}
	return st, s
}

// accessFault tells the responder that we were refused, which ends its QP as well (IBA 9.9.3: NAK remote access error).
func (q *QP) accessFault(v *peerView) ib.WCStatus {
	if q.typ == ib.RC {
		v.link.send(ctl{kind: ctlFault, qpn: uint32(q.qpn), dst: uint32(v.qpn), a: v.chunk, b: v.off, status: uint8(ib.EventQPAccessErr)})
	}
	return ib.WCRemoteAccessErr
}

func (q *QP) invalidFault(v *peerView) ib.WCStatus {
	v.link.send(ctl{kind: ctlFault, qpn: uint32(q.qpn), dst: uint32(v.qpn), a: v.chunk, b: v.off, status: uint8(ib.EventQPReqErr)})
	return ib.WCRemoteInvalidReqErr
}

// uncache forgets an rkey that this QP has had invalidated.
func (q *QP) uncache(k ib.RKey) {
	if r := q.rcache[k&3]; r != nil && r.rkey == k {
		q.rcache[k&3] = nil
	}
}

func (q *QP) execWrite(v *peerView, wr *ib.SendWR) (ib.WCStatus, uint32, stallKind) {
	b, n, st := q.local(wr, 0)
	if st != ib.WCSuccess {
		return st, 0, stallNone
	}
	withImm := wr.Opcode == ib.OpRDMAWriteWithImm
	slot := &v.slot
	if withImm && !v.peek(slot) { // the receive that the immediate takes must be there
		if q.typ == ib.UC {
			return ib.WCSuccess, n, stallNone
		}
		return 0, 0, stallRNR
	}
	if n > 0 { // a write of nothing does not look at the rkey (IBA 9.7.5.2.7)
		r, st, s := q.remote(v, wr.RKey, wr.RemoteAddr, n, ib.AccessRemoteWrite)
		if st != ib.WCSuccess || s != stallNone {
			return st, 0, s
		}
		switch {
		case r.assisted:
			if st, s := q.execAssist(v, wr, n); st != ib.WCSuccess || s != stallNone {
				return st, 0, s
			}
		case b != nil:
			dma(r.bytes(wr.RemoteAddr, n), b)
		default:
			q.gather(r.bytes(wr.RemoteAddr, n), wr, 0)
		}
	}
	if withImm {
		for !v.take(slot) {
			if !v.peek(slot) {
				return 0, 0, stallRNR
			}
		}
		flags := cqeImm | cqeRDMA
		if wr.Flags&ib.SendSolicited != 0 {
			flags |= cqeSolicited
		}
		v.complete(slot, n, wr.Imm, flags, ib.WCSuccess, q.qpn)
		v.port.notify(flags&cqeSolicited != 0)
	}
	return ib.WCSuccess, n, stallNone
}

func (q *QP) execRead(v *peerView, wr *ib.SendWR) (ib.WCStatus, uint32, stallKind) {
	b, n, st := q.local(wr, ib.AccessLocalWrite)
	if st != ib.WCSuccess {
		return st, 0, stallNone
	}
	if q.attr.MaxRdAtomic == 0 {
		return ib.WCLocalQPOpErr, 0, stallNone // the QP was connected without reads and atomics
	}
	if n == 0 {
		return ib.WCSuccess, 0, stallNone
	}
	r, st, s := q.remote(v, wr.RKey, wr.RemoteAddr, n, ib.AccessRemoteRead)
	if st != ib.WCSuccess || s != stallNone {
		return st, 0, s
	}
	if r.assisted {
		st, s := q.execAssist(v, wr, n)
		return st, n, s
	}
	if b != nil {
		dma(b, r.bytes(wr.RemoteAddr, n))
	} else {
		q.scatter(wr, r.bytes(wr.RemoteAddr, n), 0)
	}
	ring.AcquireFence() // what the caller reads after this read is not older than it
	return ib.WCSuccess, n, stallNone
}

func (q *QP) execAtomic(v *peerView, wr *ib.SendWR) (ib.WCStatus, uint32, stallKind) {
	b, _, st := q.local(wr, ib.AccessLocalWrite)
	if st != ib.WCSuccess {
		return st, 0, stallNone
	}
	if q.attr.MaxRdAtomic == 0 {
		return ib.WCLocalQPOpErr, 0, stallNone
	}
	if wr.RemoteAddr&7 != 0 {
		return q.invalidFault(v), 0, stallNone
	}
	r, st, s := q.remote(v, wr.RKey, wr.RemoteAddr, 8, ib.AccessRemoteAtomic)
	if st != ib.WCSuccess || s != stallNone {
		return st, 0, s
	}
	if r.assisted {
		st, s := q.execAssist(v, wr, 8)
		return st, 8, s
	}
	w := word64At(r.mem, wr.RemoteAddr-r.memAt)
	if w == nil {
		return q.invalidFault(v), 0, stallNone
	}
	var old [8]byte
	putHost64(old[:], doAtomic(w, wr.Opcode, wr.CompareAdd, wr.Swap))
	dma(b, old[:]) // checkWR: one buffer of 8 bytes
	return ib.WCSuccess, 8, stallNone
}

// doAtomic executes an atomic and returns the old value. It is atomic with the CPU's own atomics on both sides.
func doAtomic(w *uint64, op ib.Opcode, compareAdd, swap uint64) uint64 {
	if op == ib.OpAtomicFetchAdd {
		return add64(w, compareAdd)
	}
	for {
		old := load64(w)
		if old != compareAdd || cas64(w, old, swap) {
			return old
		}
	}
}
