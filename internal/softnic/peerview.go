package softnic

import (
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// peerView is the initiator's side of a block: how this QP writes into the peer's. Guarded by the QP's sq lock (for
// datagrams, by the udView's lock).
type peerView struct {
	link       *link
	qpn        ib.QPN // the peer's QP
	pd         uint32
	full       bool
	asks       bool   // where there is no receive, the peer's NIC is asked to look for some
	chunk, off uint32 // the block, which tells this connection of the two QPs from earlier and later ones
	geo        geometry
	mask       uint32
	tag        uint32 // what receives of a shared queue are claimed with

	state     *uint32
	access    *uint32
	qkey      *uint32
	rnr       *uint32
	tail      *uint32
	headW     *uint32
	busy      *uint32
	descs     []uint64
	cqes      []uint64
	sges      []uint64
	descBytes []byte // the memory of descs
	srq       *srqView
	port      portView

	idx    uint32 // next completion to write; without an SRQ also the next receive to take
	limit  uint32 // receives known to be posted (or, with an SRQ, completions known to fit)
	hdl    uint32 // handle of the last receive buffer's region, sgeList if there is none
	region *remoteRegion
	slot   recvSlot // the receive under way
}

func newPeerView(l *link, c *connectMsg, qpn ib.QPN, b []byte, port portView, srq *srqView) *peerView {
	w32, w64 := words32(b), words64(b)
	g := c.geo
	v := &peerView{link: l, qpn: qpn, pd: c.pd, full: l.full, asks: c.asks && l.path == pathShm, chunk: c.chunk, off: c.off, geo: g, mask: g.depth - 1, hdl: sgeList,
		state: &w32[blkState/4], access: &w32[blkAccess/4], qkey: &w32[blkQKey/4], rnr: &w32[blkRNR/4], tail: &w32[blkTail/4], headW: &w32[blkHead/4],
		busy: &w32[blkBusy/4], cqes: w64[g.cqeOff()/8:][:g.depth*g.cqeWords], srq: srq, port: port}
	if !g.srq {
		v.descs = w64[g.descOff()/8:][:g.depth*descWords]
		v.descBytes = b[g.descOff():][:g.depth*descWords*8]
		if g.sges > 1 {
			v.sges = w64[g.sgeOff()/8:][:g.depth*g.sges*2]
		}
	} else {
		v.limit = g.depth
		if v.tag = c.tag; v.tag == srqFree {
			v.tag = uint32(qpn)
		}
	}
	return v
}

// enter raises the busy word and reports whether the peer's QP receives; if not, the word is lowered again.
func (v *peerView) enter() bool {
	publish32(v.full, v.busy, 1)
	if atomic.LoadUint32(v.state) == qpReady {
		return true
	}
	v.leave()
	return false
}

// leave lowers the busy word: everything written before is visible to whoever sees it low.
func (v *peerView) leave() { publish32(false, v.busy, 0) }

// minRNRTimer is how long the peer's QP wants a request to wait that found no receive. Its bits beyond the five that there are mean nothing.
func (v *peerView) minRNRTimer() ib.RNRTimer { return ib.RNRTimer(atomic.LoadUint32(v.rnr) & 31) }

// recvSlot is a receive of the peer, as its descriptor says; nothing in it has been checked.
type recvSlot struct {
	addr   uint64
	lenHdl uint64
	list   []uint64 // scatter list, if the handle is sgeList
	slot   uint32   // SRQ entry
	seq    uint32   // and its sequence number
}

func (s *recvSlot) length() uint32 { return uint32(s.lenHdl) }
func (s *recvSlot) handle() uint32 { return uint32(s.lenHdl >> 32) }

// peek looks at the next receive that the peer has posted, without taking it. false: there is none.
func (v *peerView) peek(s *recvSlot) bool {
	if v.geo.srq {
		if v.idx-atomic.LoadUint32(v.headW) >= v.geo.depth { // its completion ring is full
			return false
		}
		return v.srq.peek(s)
	}
	if v.idx == v.limit {
		v.limit = atomic.LoadUint32(v.tail) // acquire; pairs with the release in QP.PostRecv
		if v.idx == v.limit {
			return false
		}
	}
	i := v.idx & v.mask
	if i%descsPerLine == 0 { // the next line of descriptors is in the receiver's cache as well
		ring.Prefetch(&v.descBytes[(i+descsPerLine)&v.mask*descWords*8])
	}
	d := v.descs[i*descWords:][:descWords]
	s.addr, s.lenHdl = d[0], d[1]
	if s.handle() == sgeList {
		s.list = nil
		if v.geo.sges > 1 {
			s.list = v.sges[i*v.geo.sges*2:][:v.geo.sges*2]
		}
	}
	return true
}

// take makes the receive that peek showed ours. Only with an SRQ can somebody else have been faster.
func (v *peerView) take(s *recvSlot) bool {
	return !v.geo.srq || v.srq.claim(s, v.tag)
}

// complete publishes the completion of the receive that was taken.
func (v *peerView) complete(s *recvSlot, n, imm uint32, flags uint8, st ib.WCStatus, src ib.QPN) {
	c := v.cqes[(v.idx&v.mask)*v.geo.cqeWords:][:v.geo.cqeWords]
	c[1] = uint64(imm) | uint64(flags)<<40 | uint64(st)<<48
	if len(c) > 2 {
		c[2] = uint64(s.slot) | uint64(src)<<32
	}
	v.idx++
	publish64(v.full, &c[0], uint64(v.idx)|uint64(n)<<32) // sequence = index + 1
}
