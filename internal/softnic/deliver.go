package softnic

import (
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func (q *QP) execSend(v *peerView, wr *ib.SendWR) (ib.WCStatus, uint32, stallKind) {
	b, n, st := q.local(wr, 0)
	if b == nil && st == ib.WCSuccess {
		b, st = q.fetch(wr, n)
	}
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
		if found, s := q.noReceive(v, slot); !found {
			return ib.WCSuccess, s
		}
	}
	h := slot.handle()
	if n > 0 && h != sgeList && (h != v.hdl || !v.region.ok()) { // the usual receive comes from the same region as the last one
		r := v.link.regionByHandle(h)
		if r == nil {
			return 0, stallResolve
		}
		// If it has gone, the last one must not be taken for it: handles are the same. deliverSlow then says how the message ends.
		v.hdl, v.region = sgeList, nil
		if !r.missing && r.ok() && r.mem != nil { // only what is mapped can be received into
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
		} else if !q.gather(dst, wr, 0) {
			return q.cutShort(v, slot)
		}
	}
	v.complete(slot, n, imm, flags, ib.WCSuccess, q.qpn)
	v.port.notify(flags&cqeSolicited != 0)
	return ib.WCSuccess, stallNone
}

// deliverSlow handles scatter lists, foreign memory, and receives that do not fit: the receiver learns of the latter by its
// completion.
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
	case n > 0:
		list, count := slot.list, slot.addr
		if slot.handle() != sgeList {
			one := [2]uint64{slot.addr, slot.lenHdl}
			list, count = one[:], 1
		}
		if count > uint64(len(list)/2) {
			v.link.fault("receive with %d scatter elements", count)
			return 0, stallPeer
		}
		left := n
		for i := 0; i < int(count) && left > 0; i++ {
			addr, lenHdl := list[2*i], list[2*i+1]
			k := min(uint32(lenHdl), left)
			if k == 0 {
				continue
			}
			r := v.link.regionByHandle(uint32(lenHdl >> 32))
			if r == nil {
				return 0, stallResolve
			}
			if r.missing || !r.ok() || !r.contains(addr, uint32(lenHdl)) || r.mem == nil && r.own == nil {
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
	}
	if q.typ == ib.UD && bad == ib.WCLocalLengthErr {
		return ib.WCSuccess, stallNone // a datagram that does not fit is dropped
	}
	if !v.take(slot) {
		return q.deliver(v, wr, nil, n, imm, flags)
	}
	if bad == ib.WCSuccess && n > 0 {
		var skip uint32
		for i := 0; i < np && bad == ib.WCSuccess; i++ {
			p := &parts[i]
			var ok bool
			if bad, ok = q.storePart(p.r, p.addr, p.n, wr, skip); !ok {
				return q.cutShort(v, slot)
			}
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

// cutShort ends a message of which a part has arrived when the rest, in foreign memory here, could not be read. A receive that has
// been taken is completed, as one that failed.
func (q *QP) cutShort(v *peerView, slot *recvSlot) (ib.WCStatus, stallKind) {
	if v.geo.srq {
		v.complete(slot, 0, 0, 0, ib.WCLocalProtErr, q.qpn)
		v.port.notify(true)
	}
	return ib.WCLocalProtErr, stallNone
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
