package softnic

import (
	"encoding/binary"
	"net/netip"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What observers see of operations that are done through memory: the packets that they would have been. The initiator's NIC, which
// is the one that does them, shows them all, the responder's answers included.

// shown is how far a queue pair's packets have been counted, as far as there was an observer. Guarded by sq.
type shown struct {
	begun bool
	psn   ib.PSN
	msn   uint32
}

// A rendering is of one request.
type rendering struct {
	q   *QP
	to  taps
	wr  *ib.SendWR
	rec observe.Record // of the request's packets
	svc roce.Service
	mtu uint32
	pkt roce.Packet
}

// execTapped is execute for observers. Called with sq held.
func (q *QP) execTapped(wr *ib.SendWR) (st ib.WCStatus, n uint32, s stallKind) {
	began := time.Now().UnixNano() // the peer may answer before we have shown what it answers to
	if st, n, s = q.execute(wr); s == stallNone {
		if x, ok := q.render(wr, began); ok {
			x.request(st, n)
		}
	}
	return st, n, s
}

// tapRNR shows observers an attempt to send for which the peer had no receive. Called with sq held.
func (q *QP) tapRNR(wr *ib.SendWR, timer ib.RNRTimer) {
	x, ok := q.render(wr, time.Now().UnixNano())
	if !ok {
		return
	}
	if _, n, st := q.local(wr, 0); st == ib.WCSuccess {
		x.packet(n, 0, packetsOf(n, x.mtu))
		x.answer(q.shown.psn, roce.RNRNak(timer))
	}
}

// render prepares to show a request. false: it is none that has packets, or the port shows them.
func (q *QP) render(wr *ib.SendWR, at int64) (x rendering, ok bool) {
	l := q.nic.taps.Load()
	if l == nil || wr.Opcode == ib.OpLocalInv || wr.Opcode == ib.OpBindMW {
		return x, false
	}
	x = rendering{q: q, to: *l, wr: wr, svc: roce.RC, mtu: maxUDMTU}
	to, peer := q.link, q.attr.DestQPN
	head := roce.IP{Class: q.attr.AH.TrafficClass, Hops: q.attr.AH.HopLimit}
	switch q.typ {
	case ib.UD:
		a := q.nic.ah(wr.AH)
		if a == nil || a.link == nil {
			return x, false
		}
		x.svc, to, peer, head = roce.UD, a.link, wr.RemoteQPN&ib.MaxQPN, a.ip
	case ib.UC:
		x.svc = roce.UC
	}
	if to == nil {
		return x, false
	}
	if m := q.attr.PathMTU.Bytes(); m != 0 && q.typ != ib.UD {
		x.mtu = uint32(m)
	}
	if !q.shown.begun {
		q.shown = shown{begun: true, psn: q.attr.SQPSN}
	}
	x.rec = observe.Record{Time: at, Out: true, Path: observe.Shm, QPN: uint32(q.qpn), PeerQPN: uint32(peer), IP: head,
		Src: netip.AddrPortFrom(netip.AddrFrom16(q.nic.gid), roce.SourcePort(uint32(q.qpn), uint32(peer))),
		Dst: netip.AddrPortFrom(netip.AddrFrom16(to.peer), roce.Port)}
	if to.path == pathInproc {
		x.rec.Path = observe.Inproc
	}
	return x, true
}

// packetsOf is how many packets n bytes take.
func packetsOf(n, mtu uint32) uint32 { return max(1, (n+mtu-1)/mtu) }

// request shows the packets of a request that has ended, and those of the answer.
func (x *rendering) request(st ib.WCStatus, n uint32) {
	q, wr := x.q, x.wr
	if isLocal(st) || st != ib.WCSuccess && nakOf(st) == roce.Ack {
		return // it has never left, or nobody has answered
	}
	first := q.shown.psn
	count := packetsOf(n, x.mtu)
	switch wr.Opcode {
	case ib.OpRDMARead:
		x.pkt = roce.Packet{Opcode: roce.Op(roce.RC, roce.ReadRequest), Addr: wr.RemoteAddr, RKey: uint32(wr.RKey), Len: n, AckReq: true}
		x.put(&x.rec, first, 0, 0)
	case ib.OpAtomicCmpSwap:
		count = 1
		x.pkt = roce.Packet{Opcode: roce.Op(roce.RC, roce.CompareSwap), Addr: wr.RemoteAddr, RKey: uint32(wr.RKey), Swap: wr.Swap, Cmp: wr.CompareAdd, AckReq: true}
		x.put(&x.rec, first, 0, 0)
	case ib.OpAtomicFetchAdd:
		count = 1
		x.pkt = roce.Packet{Opcode: roce.Op(roce.RC, roce.FetchAdd), Addr: wr.RemoteAddr, RKey: uint32(wr.RKey), Swap: wr.CompareAdd, AckReq: true}
		x.put(&x.rec, first, 0, 0)
	case ib.OpFlush:
		x.pkt = roce.Packet{Opcode: roce.Op(roce.RC, roce.Flush), FETH: uint32(wr.Flush.Placement) | uint32(wr.Flush.Level)<<4, Addr: wr.RemoteAddr, RKey: uint32(wr.RKey),
			Len: wr.Flush.Length, AckReq: true}
		x.put(&x.rec, first, 0, 0)
	case ib.OpAtomicWrite:
		count = 1
		x.pkt = roce.Packet{Opcode: roce.Op(roce.RC, roce.AtomicWrite), Addr: wr.RemoteAddr, RKey: uint32(wr.RKey), Len: 8, AckReq: true}
		x.put(&x.rec, first, 0, 8)
	default:
		for i := range count {
			x.packet(n, i, count)
		}
	}
	q.shown.psn = first.Add(int32(count))
	if x.svc != roce.RC {
		return
	}
	if st != ib.WCSuccess {
		x.answer(first, nakOf(st))
		return
	}
	q.shown.msn = (q.shown.msn + 1) & 0xffffff
	switch wr.Opcode {
	case ib.OpRDMARead:
		x.response(first, n, count)
	case ib.OpFlush, ib.OpAtomicWrite:
		x.response(first, 0, 1)
	case ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd:
		var old [8]byte
		q.gather(old[:], wr, 0)
		x.pkt = roce.Packet{Opcode: roce.Op(roce.RC, roce.AtomicAcknowledge), Syndrome: roce.Ack, MSN: q.shown.msn, Original: binary.NativeEndian.Uint64(old[:])}
		back := x.back()
		x.put(&back, first, 0, 0)
	default:
		x.answer(q.shown.psn.Add(-1), roce.Ack)
	}
}

// packet shows packet i of a SEND or WRITE of n bytes.
func (x *rendering) packet(n, i, count uint32) {
	wr := x.wr
	first, last := i == 0, i == count-1
	off := i * x.mtu
	x.pkt = roce.Packet{Opcode: roce.Op(x.svc, wire.PacketOp(wr.Opcode, first, last)), Addr: wr.RemoteAddr, RKey: uint32(wr.RKey), Len: n, Imm: wr.Imm,
		InvKey: uint32(wr.InvalidateRKey), Solicited: last && wr.Flags&ib.SendSolicited != 0, AckReq: last && x.svc == roce.RC}
	if x.svc == roce.UD {
		x.pkt.QKey, x.pkt.SrcQP = uint32(x.q.qkey(wr)), uint32(x.q.qpn)
	}
	x.put(&x.rec, x.q.shown.psn.Add(int32(i)), off, min(n-off, x.mtu))
}

// response shows the response to a READ: what it has read is in the request's buffers.
func (x *rendering) response(first ib.PSN, n, count uint32) {
	back := x.back()
	for i := range count {
		op := uint8(roce.ReadResponseMiddle)
		switch {
		case count == 1:
			op = roce.ReadResponseOnly
		case i == 0:
			op = roce.ReadResponseFirst
		case i == count-1:
			op = roce.ReadResponseLast
		}
		off := i * x.mtu
		x.pkt = roce.Packet{Opcode: roce.Op(roce.RC, op), Syndrome: roce.Ack, MSN: x.q.shown.msn}
		x.put(&back, first.Add(int32(i)), off, min(n-off, x.mtu))
	}
}

// answer shows an acknowledgement.
func (x *rendering) answer(psn ib.PSN, s roce.Syndrome) {
	x.pkt = roce.Packet{Opcode: roce.Op(roce.RC, roce.Acknowledge), Syndrome: s, MSN: x.q.shown.msn}
	back := x.back()
	x.put(&back, psn, 0, 0)
}

// back is the record of a packet that comes back now.
func (x *rendering) back() observe.Record {
	r := x.rec
	r.Time, r.Out = time.Now().UnixNano(), false
	r.Src = netip.AddrPortFrom(x.rec.Dst.Addr(), roce.SourcePort(r.PeerQPN, r.QPN))
	r.Dst = netip.AddrPortFrom(x.rec.Src.Addr(), roce.Port)
	return r
}

// put shows x.pkt with n bytes of the request's buffers, from byte off on.
func (x *rendering) put(r *observe.Record, psn ib.PSN, off, n uint32) {
	p := &x.pkt
	p.PKey, p.PSN, p.DestQP = roce.DefaultPKey, psn, r.PeerQPN
	if !r.Out {
		p.DestQP = r.QPN
	}
	var head [roce.MaxHeaderLen]byte
	h := p.PutHeader(head[:], int(n))
	whole := h + int(n) + roce.Pad(int(n))
	r.Length = whole + roce.ICRCLen
	for _, t := range x.to {
		b := t.begin(r, whole)
		if b == nil {
			continue
		}
		if k := copy(b, head[:h]); k < len(b) {
			rest := b[k:]
			if len(rest) > int(n) {
				clear(rest[n:])
				rest = rest[:n]
			}
			x.q.gather(rest, x.wr, off)
		}
		t.end()
	}
}

// nakOf is what the responder says that has ended a request so; roce.Ack: nothing.
func nakOf(st ib.WCStatus) roce.Syndrome {
	switch st {
	case ib.WCRemoteAccessErr:
		return roce.NakAccess
	case ib.WCRemoteInvalidReqErr:
		return roce.NakInvalid
	case ib.WCRemoteOpErr:
		return roce.NakOperation
	}
	return roce.Ack
}
