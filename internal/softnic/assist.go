package softnic

import (
	"encoding/binary"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// One-sided operations on memory that a peer process cannot map (ordinary slices) are done by its NIC, piece by piece over
// the control channel: the only operations that need the target's CPU.

// assist is the state of such an operation at the head of a send queue. Guarded by sq.
type assist struct {
	active bool
	id     uint32
	off    uint32 // bytes done
	chunk  uint32 // bytes under way
	reply  bool
	status ib.WCStatus
	data   []byte
	value  uint64
}

const assistChunk = 32 << 10

// execAssist advances the operation of n bytes; stallAssist while an answer is awaited. Called with sq held.
func (q *QP) execAssist(v *peerView, wr *ib.SendWR, n uint32) (ib.WCStatus, stallKind) {
	a := &q.assist
	if !a.active {
		*a = assist{active: true}
		return q.sendAssist(v, wr, n)
	}
	if !a.reply {
		return 0, stallAssist
	}
	a.reply = false
	if st := a.status; st != ib.WCSuccess {
		*a = assist{}
		switch st {
		case ib.WCRetryExceeded: // the memory's process has ended: nobody answers
			return 0, stallPeer
		case ib.WCRemoteAccessErr:
			q.accessFault(v)
		}
		return st, stallNone
	}
	switch wr.Opcode {
	case ib.OpRDMARead:
		if uint32(len(a.data)) != a.chunk {
			v.link.fault("answer of %d bytes to a read of %d", len(a.data), a.chunk)
			return 0, stallAssist
		}
		if !q.scatter(wr, a.data, a.off) {
			*a = assist{}
			return ib.WCLocalProtErr, stallNone
		}
	case ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd:
		var b [8]byte
		putHost64(b[:], a.value)
		if !q.scatter(wr, b[:], 0) {
			*a = assist{}
			return ib.WCLocalProtErr, stallNone
		}
	}
	a.off += a.chunk
	if a.off < n {
		return q.sendAssist(v, wr, n)
	}
	*a = assist{}
	return ib.WCSuccess, stallNone
}

func (q *QP) sendAssist(v *peerView, wr *ib.SendWR, n uint32) (ib.WCStatus, stallKind) {
	a := &q.assist
	a.chunk = min(n-a.off, assistChunk)
	m := ctl{kind: ctlAssist, status: uint8(wr.Opcode), qpn: uint32(q.qpn), dst: uint32(v.qpn), a: uint32(wr.RKey), b: a.chunk,
		x: wr.RemoteAddr + uint64(a.off)}
	switch wr.Opcode {
	case ib.OpRDMAWrite, ib.OpRDMAWriteWithImm:
		m.data = make([]byte, a.chunk)
		if !q.gather(m.data, wr, a.off) {
			*a = assist{}
			return ib.WCLocalProtErr, stallNone
		}
	case ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd:
		m.y, m.z = wr.CompareAdd, wr.Swap
	case ib.OpAtomicWrite:
		m.z = host64(q.result[:])
	}
	l := v.link
	l.mu.Lock()
	l.nextID++
	a.id = l.nextID
	m.id = a.id
	l.assists[a.id] = q
	l.mu.Unlock()
	l.send(m)
	return 0, stallAssist
}

// assisted takes the peer's answer.
func (q *QP) assisted(m *ctl) {
	q.sq.Lock()
	if a := &q.assist; a.active && a.id == m.id && !a.reply {
		a.reply = true
		a.status = ib.WCStatus(m.status)
		switch a.status {
		case ib.WCSuccess, ib.WCRemoteAccessErr, ib.WCRemoteInvalidReqErr, ib.WCRetryExceeded:
		default:
			a.status = ib.WCRemoteOpErr
		}
		a.data = append([]byte(nil), m.data...)
		a.value = m.x
	}
	q.sq.Unlock()
	q.progress()
}

// handleAssist does a peer's operation on private memory.
func (l *link) handleAssist(m *ctl) error {
	answer := ctl{kind: ctlAssisted, id: m.id}
	answer.status = uint8(l.doAssist(m, &answer))
	l.send(answer)
	return nil
}

func (l *link) doAssist(m, answer *ctl) ib.WCStatus {
	q := l.nic.qp(ib.QPN(m.dst))
	if q == nil || m.b > assistChunk {
		return ib.WCRemoteInvalidReqErr
	}
	q.sq.Lock()
	s := ib.QPState(q.state.Load())
	ok := q.link == l && uint32(q.attr.DestQPN) == m.qpn && s >= ib.RTR && s != ib.Err
	rights, resources := q.attr.Access, q.attr.MaxDestRdAtomic != 0
	q.sq.Unlock()
	op := ib.Opcode(m.status)
	var need ib.Access
	switch op {
	case ib.OpRDMAWrite, ib.OpRDMAWriteWithImm:
		need = ib.AccessRemoteWrite
		ok = ok && uint32(len(m.data)) == m.b
	case ib.OpRDMARead:
		need = ib.AccessRemoteRead
	case ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd:
		need = ib.AccessRemoteAtomic
		ok = ok && m.b == 8 && m.x&7 == 0
	case ib.OpAtomicWrite:
		need = ib.AccessRemoteWrite
		ok = ok && m.b == 8 && m.x&7 == 0 && resources
	default:
		ok = false
	}
	if !ok || need != ib.AccessRemoteWrite && !resources {
		return ib.WCRemoteInvalidReqErr
	}
	l.nic.regionUse.RLock() // the region cannot go while we copy: quiesce takes the lock
	defer l.nic.regionUse.RUnlock()
	r := l.nic.regions.lookupRKey(ib.RKey(m.a))
	if r == nil || r.pd != q.pd || r.access&need == 0 || rights&need == 0 || r.qpn != 0 && r.qpn != q.qpn || !r.contains(m.x, m.b) {
		return ib.WCRemoteAccessErr
	}
	st := ib.WCSuccess
	switch op {
	case ib.OpRDMAWrite, ib.OpRDMAWriteWithImm:
		if !r.store(m.x, m.data) {
			st = ib.WCRemoteOpErr
		}
	case ib.OpRDMARead:
		b := make([]byte, m.b)
		if st = r.load(b, m.x); st == ib.WCSuccess {
			answer.data = b
		}
	default:
		answer.x, st = r.atomic(m.x, op, m.y, m.z)
	}
	if st == ib.WCRetryExceeded { // nobody is left to take the QP down but us, if its process runs another program
		q.errorLater(q.epoch.Load(), ib.EventQPFatal, true)
	}
	return st
}

// grh builds the header that a datagram's receive buffer starts with: an IPv6 header with both GIDs (IBA 8.3), and what the address handle
// says.
func grh(b *[ib.GRHLen]byte, src, dst ib.GID, ip *roce.IP, payload int) {
	binary.BigEndian.PutUint32(b[:], 6<<28|uint32(ip.Class)<<20|ip.Flow&(1<<20-1))
	binary.BigEndian.PutUint16(b[4:], uint16(payload))
	b[6], b[7] = 0x1b, ip.Hops
	copy(b[8:24], src[:])
	copy(b[24:40], dst[:])
}
