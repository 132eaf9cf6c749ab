package mlx5emu

import (
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Sends: WQEs are read, taken apart, and handed to the software NIC.

// fetchSends hands WQEs that the client has posted to the software NIC, in order, and reports whether there were any.
func (n *qp) fetchSends() (some bool) {
	if n.wrecked || n.sendBad {
		return false
	}
	if n.hold != nil {
		return n.releaseHeld()
	}
	if a, err := n.soft.Query(); err != nil || a.State < ib.RTS || a.State == ib.SQD {
		return false
	}
	posted, ok := n.c.sendCounter(n.db)
	if !ok || over(posted, n.sendNext, n.sendDone, n.sqCount) {
		n.lostSends()
		return true
	}
	for range sendBudget {
		left := int(posted - n.sendNext)
		if left == 0 {
			n.rung = false
			break
		}
		if !n.fetchSend(posted, left) {
			break
		}
		some = true
	}
	return some
}

// over reports whether a counter of what is posted cannot be, for a queue of size, of which has been read up to next, and completed up to
// done: a block may be written again only after the client has seen by a CQE that it is done with, not when it has been read.
func over(posted, next, done uint16, size uint32) bool {
	return uint32(posted-next)+uint32(next-done) > size
}

func (c *Context) sendCounter(db uint64) (uint16, bool) { return c.counter(db + 4) }

// fetchSend takes the next WQE, of which at most left basic blocks are posted. It reports whether the one behind it may follow.
func (n *qp) fetchSend(posted uint16, left int) bool {
	e := &n.c.dev.engine
	w := &e.send
	if !n.readSQ(e.wqe[:bbSize], n.sendNext) {
		n.lostSends()
		return false
	}
	w.control(e.wqe[:])
	bbs := w.bbs()
	if w.segs == 0 || bbs > left || w.index != n.sendNext || w.qpn != n.qpn {
		n.c.dev.traceWQE(n, posted, e.wqe[:max(w.segs*segSize, segSize)][:min(max(w.segs*segSize, segSize), bbSize)])
		n.bad(max(bbs, 1), left)
		return false
	}
	b := e.wqe[:w.segs*segSize]
	if len(b) > bbSize && !n.readSQ(b[bbSize:], n.sendNext+1) {
		n.lostSends()
		return false
	}
	n.c.dev.traceWQE(n, posted, b)
	if err := w.decode(b, n.typ); err != nil {
		n.bad(bbs, left)
		return false
	}
	id := makeSendID(n.life, w.opcode, w.signaled, w.index, bbs)
	if w.opcode == opNop {
		n.sendNext += uint16(bbs)
		n.hold = &held{id, ib.WCSuccess}
		n.releaseHeld()
		return n.hold == nil
	}
	if n.raw() {
		return n.fetchFrame(w, id, bbs, left)
	}
	st := n.c.dev.request(n, w)
	if st != ib.WCSuccess {
		n.sendNext += uint16(bbs)
		n.hold = &held{id, st}
		n.releaseHeld()
		return false
	}
	e.wrs[0].ID = uint64(id)
	if _, err := n.soft.PostSend(e.wrs[:]); err != nil {
		if retry(err) {
			return false
		}
		n.bad(bbs, left)
		return false
	}
	n.outstanding++
	n.sendNext += uint16(bbs)
	return true
}

// bad ends a WQE that cannot be executed with an error. What is behind it is flushed, if it can be found.
func (n *qp) bad(bbs, left int) {
	w := &n.c.dev.engine.send
	bbs = min(bbs, left)
	n.hold = &held{makeSendID(n.life, w.opcode, true, n.sendNext, bbs), ib.WCLocalQPOpErr}
	n.sendNext += uint16(bbs)
	n.releaseHeld()
}

// releaseHeld completes the request that waits for those in front of it, if they have completed.
func (n *qp) releaseHeld() bool {
	h := n.hold
	if n.outstanding > 0 {
		return false
	}
	n.hold = nil
	st := h.st
	if a, err := n.soft.Query(); err != nil || a.State == ib.Err || a.State == ib.SQE {
		st = ib.WCFlushErr // a request in front of it has failed meanwhile
	}
	n.completeSend(&ib.WC{ID: uint64(h.id), Status: st})
	if st != ib.WCSuccess && st != ib.WCFlushErr {
		n.wreck()
	}
	return true
}

// readSQ reads the queue from a basic block on, around its end if need be.
func (n *qp) readSQ(p []byte, block uint16) bool {
	size := uint64(n.sqCount) * bbSize
	off := uint64(block) * bbSize % size
	k := min(uint64(len(p)), size-off)
	base := n.sqBuf
	return n.c.mem.ReadAt(p[:k], base+off) == nil && (k == uint64(len(p)) || n.c.mem.ReadAt(p[k:], base) == nil)
}

// request makes the software NIC's request of a WQE in engine.wrs. Other than success, it says how the request ends without it.
func (d *Device) request(n *qp, w *sendWQE) ib.WCStatus {
	e := &d.engine
	e.sges = e.sges[:0]
	for i := range w.data {
		e.sges = append(e.sges, d.sge(&w.data[i]))
	}
	if len(e.sges) > softMaxSGE {
		return ib.WCLocalQPOpErr
	}
	wr := &e.wrs[0]
	*wr = ib.SendWR{Flags: ib.SendSignaled, SGEs: e.sges, Inline: w.inline, RemoteAddr: w.raddr, RKey: ib.RKey(w.rkey), Imm: w.imm}
	if w.solicited {
		wr.Flags |= ib.SendSolicited
	}
	if w.fence {
		wr.Flags |= ib.SendFence
	}
	switch w.opcode {
	case opSend:
		wr.Opcode = ib.OpSend
	case opSendImm:
		wr.Opcode = ib.OpSendWithImm
	case opSendInval:
		wr.Opcode, wr.InvalidateRKey = ib.OpSendWithInv, ib.RKey(w.imm)
	case opWrite:
		wr.Opcode = ib.OpRDMAWrite
	case opWriteImm:
		wr.Opcode = ib.OpRDMAWriteWithImm
	case opRead:
		wr.Opcode = ib.OpRDMARead
	case opCompSwap:
		wr.Opcode, wr.Swap, wr.CompareAdd = ib.OpAtomicCmpSwap, w.swapAdd, w.cmp
	case opFetchAdd:
		wr.Opcode, wr.CompareAdd = ib.OpAtomicFetchAdd, w.swapAdd
	case opUMR:
		return d.bindRequest(w, wr)
	}
	if n.typ == ib.UD {
		if w.length() > n.datagram { // the software NIC's own limit is that of memory
			return ib.WCLocalLengthErr
		}
		d.routeDatagram(&w.av)
		num, ok := n.address(&w.av)
		if !ok {
			return ib.WCLocalQPOpErr
		}
		wr.AH, wr.RemoteQPN, wr.RemoteQKey = num, ib.QPN(w.av.qpn), ib.QKey(w.av.qkey)
	}
	return ib.WCSuccess
}

func (d *Device) bindRequest(w *sendWQE, wr *ib.SendWR) ib.WCStatus {
	b := &w.bind
	if b.unbind {
		wr.Opcode, wr.InvalidateRKey = ib.OpLocalInv, ib.RKey(b.key)
		return ib.WCSuccess
	}
	m, region := d.windows[b.key>>8], d.keys.get(b.lkey)
	if m == nil || region == nil { // the low byte of a free key is not looked at: Linux' own driver has the new one there
		return ib.WCMWBindErr
	}
	d.engine.bind = ib.BindMW{Window: m.soft.Handle(), RKey: ib.RKey(b.key), MRLKey: region.soft.LKey(), Addr: b.addr, Length: b.length, Access: b.access}
	wr.Opcode, wr.Bind = ib.OpBindMW, &d.engine.bind
	return ib.WCSuccess
}
