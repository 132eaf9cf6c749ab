package mlx5emu

import (
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Receives: what the client has posted is read and handed to the software NIC, before a message comes for it.

// counter reads a counter of 16 bits in a doorbell record. What was read twice alike was not torn.
func (c *Context) counter(va uint64) (uint16, bool) {
	var a, b [4]byte
	if c.mem.ReadAt(a[:], va) != nil {
		return 0, false
	}
	for range 8 {
		if c.mem.ReadAt(b[:], va) != nil {
			return 0, false
		}
		if a == b {
			break
		}
		a = b
	}
	return uint16(be32(b[:])), true
}

// sge makes an SGE of the software NIC's of a data segment. A key that is not there becomes one that the software NIC does not have
// either: it says so when the request's turn comes.
func (d *Device) sge(s *dataSeg) ib.SGE {
	g := ib.SGE{Addr: s.addr, Length: s.n}
	if m := d.keys[s.lkey]; m != nil {
		g.LKey = m.soft.LKey()
	}
	return g
}

// recv makes a receive of the list of scatter entries in b.
func (e *engine) recv(c *Context, id uint64, b []byte) []ib.RecvWR {
	e.segs = scatterList(e.segs[:0], b)
	e.sges = e.sges[:0]
	for i := range e.segs {
		e.sges = append(e.sges, c.dev.sge(&e.segs[i]))
	}
	e.recvs[0] = ib.RecvWR{ID: id, SGEs: e.sges}
	return e.recvs[:]
}

// fetchRecvs hands receives that the client has posted to the software NIC, and reports whether there were any.
func (n *qp) fetchRecvs() (some bool) {
	if n.srq != nil || n.rqCount == 0 || n.recvBad {
		return false
	}
	if n.raw() {
		return n.flushRecvs()
	}
	posted, ok := n.c.counter(n.db)
	if ok && posted == n.recvNext {
		return false
	}
	if a, err := n.soft.Query(); err != nil || a.State == ib.Reset {
		return false
	}
	if !ok || uint32(posted-n.recvNext) > n.rqCount {
		n.lostRecvs()
		return true
	}
	d := n.c.dev
	slot := d.engine.slot[:1<<n.rqShift]
	for range recvBudget {
		if n.recvNext == posted {
			break
		}
		at := uint64(uint32(n.recvNext)&(n.rqCount-1)) << n.rqShift
		if n.c.mem.ReadAt(slot, n.buf+at) != nil {
			n.lostRecvs()
			return true
		}
		wr := d.engine.recv(n.c, uint64(n.life)<<48|uint64(n.recvNext), slot)
		if _, err := n.soft.PostRecv(wr); err != nil {
			break // it is full: completions that were not taken yet make room
		}
		n.recvNext++
		some = true
	}
	return some
}
