package softnic

import (
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Execution of requests on a direct path: what is checked, and what moves.

// exec executes a request, or says why it cannot be executed yet. Called with sq held.
func (q *QP) exec(wr *ib.SendWR) (st ib.WCStatus, n uint32, s stallKind) {
	if q.nic.taps.Load() != nil {
		return q.execTapped(wr)
	}
	return q.execute(wr)
}

// execute is exec without observers.
func (q *QP) execute(wr *ib.SendWR) (st ib.WCStatus, n uint32, s stallKind) {
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
	case ib.OpFlush:
		st, s = q.execFlush(v, wr)
	case ib.OpAtomicWrite:
		st, n, s = q.execAtomicWrite(v, wr)
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
// as b; of several pieces, and of foreign memory, b is nil, and gather or scatter do the copying. The memory cannot go while sq is held.
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
		if s.Length > ib.MaxMessage {
			return nil, 0, ib.WCLocalLengthErr
		}
		if r.mem == nil {
			return nil, s.Length, ib.WCSuccess // foreign memory
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

// gather copies the request's payload, from byte skip on, to dst; local has checked it. false: foreign memory cannot be read.
func (q *QP) gather(dst []byte, wr *ib.SendWR, skip uint32) bool {
	if len(wr.Inline) > 0 {
		dma(dst, wr.Inline[skip:])
		return true
	}
	for i := range wr.SGEs {
		s := &wr.SGEs[i]
		if len(dst) == 0 {
			return true
		}
		if s.Length <= skip {
			skip -= s.Length
			continue
		}
		if r := q.nic.regions.lookup(uint32(s.LKey)); r != nil {
			k := min(uint32(len(dst)), s.Length-skip)
			if r.load(dst[:k], s.Addr+uint64(skip)) != ib.WCSuccess {
				return false
			}
			dst = dst[k:]
		}
		skip = 0
	}
	return true
}

// scatter copies src to the request's buffers, from byte skip on. false: foreign memory cannot be written.
func (q *QP) scatter(wr *ib.SendWR, src []byte, skip uint32) bool {
	for i := range wr.SGEs {
		s := &wr.SGEs[i]
		if len(src) == 0 {
			return true
		}
		if s.Length <= skip {
			skip -= s.Length
			continue
		}
		if r := q.nic.regions.lookup(uint32(s.LKey)); r != nil {
			k := min(uint32(len(src)), s.Length-skip)
			if !r.store(s.Addr+uint64(skip), src[:k]) {
				return false
			}
			src = src[k:]
		}
		skip = 0
	}
	return true
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

// answerable says whether a request that has an answer of its own (READ, the atomics, FLUSH, ATOMIC WRITE) can be sent to the peer: one side
// or the other may have been connected without (IBA 9.7.4.1.6, and A19 for the latter two, which take responder resources as a READ does).
func (q *QP) answerable(v *peerView) ib.WCStatus {
	switch {
	case q.attr.MaxRdAtomic == 0:
		return ib.WCLocalQPOpErr
	case atomic.LoadUint32(v.access)&noResources != 0:
		return q.invalidFault(v)
	}
	return ib.WCSuccess
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
		q.fault(v, ib.EventQPAccessErr)
	}
	return ib.WCRemoteAccessErr
}

func (q *QP) invalidFault(v *peerView) ib.WCStatus {
	q.fault(v, ib.EventQPReqErr)
	return ib.WCRemoteInvalidReqErr
}

func (q *QP) fault(v *peerView, e ib.EventType) {
	v.link.send(ctl{kind: ctlFault, qpn: uint32(q.qpn), dst: uint32(v.qpn), a: v.chunk, b: v.off, status: uint8(e)})
}

// uncache forgets an rkey that this QP has had invalidated.
func (q *QP) uncache(k ib.RKey) {
	if r := q.rcache[k&3]; r != nil && r.rkey == k {
		q.rcache[k&3] = nil
	}
}

func (q *QP) execWrite(v *peerView, wr *ib.SendWR) (ib.WCStatus, uint32, stallKind) {
	b, n, st := q.local(wr, 0)
	if b == nil && st == ib.WCSuccess {
		b, st = q.fetch(wr, n)
	}
	if st != ib.WCSuccess {
		return st, 0, stallNone
	}
	withImm := wr.Opcode == ib.OpRDMAWriteWithImm
	slot := &v.slot
	if withImm && !v.peek(slot) { // the receive that the immediate takes must be there
		if found, s := q.noReceive(v, slot); !found {
			return ib.WCSuccess, n, s
		}
	}
	if n > 0 { // a write of nothing does not look at the rkey (IBA 9.7.5.2.7)
		r, st, s := q.remote(v, wr.RKey, wr.RemoteAddr, n, ib.AccessRemoteWrite)
		if st != ib.WCSuccess || s != stallNone {
			return st, 0, s
		}
		switch {
		case r.own != nil:
			if st, s := q.execForeign(v, r.own, wr, b, n); st != ib.WCSuccess || s != stallNone {
				return st, 0, s
			}
		case r.assisted:
			if st, s := q.execAssist(v, wr, n); st != ib.WCSuccess || s != stallNone {
				return st, 0, s
			}
		case b != nil:
			dma(r.bytes(wr.RemoteAddr, n), b)
		case !q.gather(r.bytes(wr.RemoteAddr, n), wr, 0):
			return ib.WCLocalProtErr, 0, stallNone
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
	if st := q.answerable(v); st != ib.WCSuccess {
		return st, 0, stallNone
	}
	if n == 0 {
		return ib.WCSuccess, 0, stallNone
	}
	r, st, s := q.remote(v, wr.RKey, wr.RemoteAddr, n, ib.AccessRemoteRead)
	if st != ib.WCSuccess || s != stallNone {
		return st, 0, s
	}
	if r.assisted {
		if r.own != nil {
			st, s := q.execForeign(v, r.own, wr, b, n)
			return st, n, s
		}
		st, s := q.execAssist(v, wr, n)
		return st, n, s
	}
	if b != nil {
		dma(b, r.bytes(wr.RemoteAddr, n))
	} else if !q.scatter(wr, r.bytes(wr.RemoteAddr, n), 0) {
		return ib.WCLocalProtErr, 0, stallNone
	}
	ring.AcquireFence() // what the caller reads after this read is not older than it
	return ib.WCSuccess, n, stallNone
}

func (q *QP) execAtomic(v *peerView, wr *ib.SendWR) (ib.WCStatus, uint32, stallKind) {
	b, _, st := q.local(wr, ib.AccessLocalWrite)
	if st != ib.WCSuccess {
		return st, 0, stallNone
	}
	if st := q.answerable(v); st != ib.WCSuccess {
		return st, 0, stallNone
	}
	if wr.RemoteAddr&7 != 0 {
		return q.invalidFault(v), 0, stallNone
	}
	r, st, s := q.remote(v, wr.RKey, wr.RemoteAddr, 8, ib.AccessRemoteAtomic)
	if st != ib.WCSuccess || s != stallNone {
		return st, 0, s
	}
	if r.assisted {
		if r.own != nil {
			st, s := q.execForeign(v, r.own, wr, b, 8)
			return st, 8, s
		}
		st, s := q.execAssist(v, wr, 8)
		return st, 8, s
	}
	w := word64At(r.mem, wr.RemoteAddr-r.memAt)
	if w == nil {
		return q.invalidFault(v), 0, stallNone
	}
	old := q.result[:] // an array of this function's would be on the heap: foreign memory is behind an interface
	putHost64(old, doAtomic(w, wr.Opcode, wr.CompareAdd, wr.Swap))
	if b != nil {
		dma(b, old) // checkWR: one buffer of 8 bytes
	} else if !q.scatter(wr, old, 0) {
		return ib.WCLocalProtErr, 0, stallNone
	}
	return ib.WCSuccess, 8, stallNone
}

// execAtomicWrite executes an ATOMIC_WRITE: of a WRITE, nobody knows in which pieces its bytes come.
func (q *QP) execAtomicWrite(v *peerView, wr *ib.SendWR) (ib.WCStatus, uint32, stallKind) {
	if _, _, st := q.local(wr, 0); st != ib.WCSuccess {
		return st, 0, stallNone
	}
	if !q.gather(q.result[:], wr, 0) {
		return ib.WCLocalProtErr, 0, stallNone
	}
	if st := q.answerable(v); st != ib.WCSuccess {
		return st, 0, stallNone
	}
	if wr.RemoteAddr&7 != 0 {
		return q.invalidFault(v), 0, stallNone
	}
	r, st, s := q.remote(v, wr.RKey, wr.RemoteAddr, 8, ib.AccessRemoteWrite)
	if st != ib.WCSuccess || s != stallNone {
		return st, 0, s
	}
	switch {
	case r.own != nil:
		_, st = r.own.atomic(wr.RemoteAddr, wr.Opcode, 0, host64(q.result[:]))
		st, s = q.foreignFault(v, st)
		return st, 8, s
	case r.assisted:
		st, s := q.execAssist(v, wr, 8)
		return st, 8, s
	}
	w := word64At(r.mem, wr.RemoteAddr-r.memAt)
	if w == nil {
		return q.invalidFault(v), 0, stallNone
	}
	doAtomic(w, wr.Opcode, 0, host64(q.result[:]))
	return ib.WCSuccess, 8, stallNone
}

// execFlush executes a FLUSH: whoever may, and asks for what can be had, has it, since operations before it were done where all see them.
func (q *QP) execFlush(v *peerView, wr *ib.SendWR) (ib.WCStatus, stallKind) {
	if st := q.answerable(v); st != ib.WCSuccess {
		return st, stallNone
	}
	addr, n := flushRange(wr.RemoteAddr, wr.Flush)
	_, st, s := q.remote(v, wr.RKey, addr, n, flushRights(wr.Flush.Placement))
	return st, s
}

// flushRange is what a FLUSH is about; of a whole region, nothing more is known.
func flushRange(addr uint64, f ib.Flush) (uint64, uint32) {
	if f.Level == ib.FlushRegion {
		return 0, 0
	}
	return addr, f.Length
}

// flushRights are the rights that a FLUSH takes.
func flushRights(p ib.FlushPlacement) (need ib.Access) {
	if p&ib.FlushGlobal != 0 {
		need |= ib.AccessFlushGlobal
	}
	if p&ib.FlushPersistent != 0 {
		need |= ib.AccessFlushPersistent
	}
	return need
}

// doAtomic executes an atomic, or an ATOMIC_WRITE of swap, and returns the old value. It is atomic with the CPU's own atomics on both sides.
func doAtomic(w *uint64, op ib.Opcode, compareAdd, swap uint64) uint64 {
	if op == ib.OpAtomicFetchAdd {
		return add64(w, compareAdd)
	}
	for {
		old := load64(w)
		if op == ib.OpAtomicCmpSwap && old != compareAdd || cas64(w, old, swap) {
			return old
		}
	}
}
