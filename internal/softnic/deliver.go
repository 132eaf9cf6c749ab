package softnic

import (
	"github.com/ringside-rdma/ringside/verbs/ib"
)

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
