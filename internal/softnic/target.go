package softnic

import (
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/softnic/wire"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A target is what packets of a network do to a QP: it writes to the QP's receives, its completions and the regions of its
// protection domain, in the place of a peer that shares memory. It is used with the port's mu held, between enter and leave of v.
type target struct {
	q     *QP
	v     *peerView
	epoch uint32 // the QP's
	open  bool   // while responses are sent: v was entered
}

// Take implements wire.Target.
func (t *target) Take() bool {
	for t.q.peekOwn(t.v, &t.v.slot) {
		if t.v.take(&t.v.slot) {
			return true
		}
	}
	return false
}

// Put implements wire.Target.
func (t *target) Put(off uint32, data []byte) ib.WCStatus {
	return t.q.nic.putSlot(&t.v.slot, off, data)
}

// putSlot copies data to a receive of this NIC, from byte off on. Where it is may come from a queue that other peers write to, too: so
// each word is read once, and only memory that receives were posted to is written, which such a peer can have mapped anyway.
func (n *NIC) putSlot(s *recvSlot, off uint32, data []byte) ib.WCStatus {
	if uint64(off)+uint64(len(data)) > uint64(s.length()) {
		return ib.WCRemoteInvalidReqErr
	}
	one := [2]uint64{s.addr, s.lenHdl}
	list := one[:]
	if s.handle() == sgeList {
		if s.addr > uint64(len(s.list)/2) {
			return ib.WCRemoteOpErr
		}
		list = s.list[:2*s.addr]
	}
	for ; len(list) > 0 && len(data) > 0; list = list[2:] {
		addr, lenHdl := list[0], list[1]
		size := uint32(lenHdl)
		if off >= size {
			off -= size
			continue
		}
		k := min(uint32(len(data)), size-off)
		r := n.regions.lookup(uint32(lenHdl >> 32))
		if r == nil || !r.receives.Load() || !r.contains(addr, size) {
			return ib.WCRemoteOpErr
		}
		if !r.store(addr+uint64(off), data[:k]) {
			return ib.WCRemoteOpErr
		}
		data, off = data[k:], 0
	}
	return ib.WCSuccess
}

// Complete implements wire.Target.
func (t *target) Complete(m wire.Message, st ib.WCStatus) {
	var flags uint8
	switch {
	case m.HasInv:
		flags = cqeInv
	case m.HasImm:
		flags = cqeImm
	}
	if m.Write {
		flags |= cqeRDMA
	}
	if m.Solicited {
		flags |= cqeSolicited
	}
	if st != ib.WCSuccess {
		flags = 0
	}
	t.v.complete(&t.v.slot, m.Len, m.Imm, flags, st, t.q.qpn)
	t.v.port.notify(m.Solicited || st != ib.WCSuccess)
}

// region returns the region that the peer may use so.
func (t *target) region(rkey uint32, addr uint64, n uint32, need ib.Access) *region {
	r := t.q.nic.regions.lookupRKey(ib.RKey(rkey))
	if r == nil || r.pd != t.q.pd || r.access&need != need || ib.Access(atomic.LoadUint32(t.v.access))&need != need ||
		r.qpn != 0 && r.qpn != t.q.qpn || n > 0 && !r.contains(addr, n) {
		return nil
	}
	return r
}

// Check implements wire.Target.
func (t *target) Check(rkey uint32, addr uint64, n uint32, need ib.Access) ib.WCStatus {
	if t.region(rkey, addr, n, need) == nil {
		return ib.WCRemoteAccessErr
	}
	return ib.WCSuccess
}

// Write implements wire.Target.
func (t *target) Write(rkey uint32, addr uint64, data []byte) ib.WCStatus {
	r := t.region(rkey, addr, uint32(len(data)), ib.AccessRemoteWrite)
	if r == nil {
		return ib.WCRemoteAccessErr
	}
	if !r.store(addr, data) {
		return ib.WCRemoteOpErr
	}
	return ib.WCSuccess
}

// Read implements wire.Target.
func (t *target) Read(rkey uint32, addr uint64, dst []byte) ib.WCStatus {
	if !t.open {
		return ib.WCRemoteOpErr
	}
	r := t.region(rkey, addr, uint32(len(dst)), ib.AccessRemoteRead)
	if r == nil {
		return ib.WCRemoteAccessErr
	}
	return r.load(dst, addr)
}

// Atomic implements wire.Target.
func (t *target) Atomic(rkey uint32, addr uint64, op ib.Opcode, compareAdd, swap uint64) (uint64, ib.WCStatus) {
	need := ib.AccessRemoteAtomic
	if op == ib.OpAtomicWrite {
		need = ib.AccessRemoteWrite
	}
	r := t.region(rkey, addr, 8, need)
	if r == nil {
		return 0, ib.WCRemoteAccessErr
	}
	return r.atomic(addr, op, compareAdd, swap)
}

// Flush implements wire.Target. What was written before is where it was written to, and everybody sees it.
func (t *target) Flush(rkey uint32, addr uint64, f ib.Flush) ib.WCStatus {
	addr, n := flushRange(addr, f)
	if t.region(rkey, addr, n, flushRights(f.Placement)) == nil {
		return ib.WCRemoteAccessErr
	}
	return ib.WCSuccess
}

// Invalidate implements wire.Target. The window goes when the message's completion is polled, as on the other paths.
func (t *target) Invalidate(rkey uint32) ib.WCStatus {
	r := t.q.nic.regions.lookupRKey(ib.RKey(rkey))
	if r == nil || r.pd != t.q.pd || r.qpn != t.q.qpn {
		return ib.WCRemoteAccessErr
	}
	return ib.WCSuccess
}

// Fail implements wire.Target.
func (t *target) Fail(st ib.WCStatus) {
	ev := ib.EventQPReqErr
	switch st {
	case ib.WCRemoteAccessErr:
		ev = ib.EventQPAccessErr
	case ib.WCRemoteOpErr, ib.WCRetryExceeded:
		ev = ib.EventQPFatal
	}
	t.q.errorLater(t.epoch, ev, true)
}
