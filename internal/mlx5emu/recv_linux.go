package mlx5emu

import (
	"sync"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Receives: what the client has posted is read and handed to the software NIC. The engine looks now and then, and the software NIC has
// it done when a message of another process or host comes that finds no receive.

// A receiver is what the receives of a client are read with. Its mu is taken with the device's held, or by the software NIC, with
// locks of its own held: so with mu, nothing is called but PostRecv. It guards how far receive queues have been read; what says whether
// they may be read is written with both held.
type receiver struct {
	mu   sync.Mutex
	slot [nextSegSize + 1<<maxRQStride]byte
	segs []dataSeg
	sges []ib.SGE
	wrs  [1]ib.RecvWR
}

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
	if m := d.keys.get(s.lkey); m != nil {
		g.LKey = m.soft.LKey()
	}
	return g
}

// request makes a receive of the list of scatter entries in b. It ends where the longest message does: what an entry behind that says is
// never used, and the software NIC would refuse more.
func (r *receiver) request(d *Device, id uint64, b []byte) []ib.RecvWR {
	r.segs = scatterList(r.segs[:0], b)
	r.sges = r.sges[:0]
	room := uint32(ib.MaxMessage)
	for i := 0; i < len(r.segs) && room > 0; i++ {
		g := d.sge(&r.segs[i])
		g.Length = min(g.Length, room)
		room -= g.Length
		r.sges = append(r.sges, g)
	}
	r.wrs[0] = ib.RecvWR{ID: id, SGEs: r.sges}
	return r.wrs[:]
}

// refill is what the software NIC calls. A queue that cannot be read is left to the engine, which finds it so, too.
func (n *qp) refill() {
	if n.srq != nil {
		n.srq.take()
		return
	}
	n.takeRecvs(false)
}

// fetchRecvs hands receives that the client has posted to the software NIC, and reports whether there were any. Called with dev.mu held.
func (n *qp) fetchRecvs() bool {
	if n.raw() {
		return !n.frozen && !n.recvBad && n.rqCount > 0 && n.flushRecvs()
	}
	some, lost := n.takeRecvs(true)
	if lost {
		n.lostRecvs()
	}
	return some || lost
}

// takeRecvs is fetchRecvs without consequences for a queue that cannot be read. engine: dev.mu is held, and says what has completed.
func (n *qp) takeRecvs(engine bool) (some, lost bool) {
	r := &n.c.recvs
	r.mu.Lock()
	defer r.mu.Unlock()
	if n.frozen || n.recvBad || n.srq != nil || n.rqCount == 0 {
		return false, false
	}
	posted, ok := n.c.counter(n.db)
	if ok && posted == n.recvNext || n.soft.State() == ib.Reset {
		return false, false
	}
	done := n.recvNext
	if engine {
		done = n.recvDone
	}
	if !ok || over(posted, n.recvNext, done, n.rqCount) {
		return false, true
	}
	slot := r.slot[:1<<n.rqShift]
	for range recvBudget {
		if n.recvNext == posted {
			break
		}
		at := uint64(uint32(n.recvNext)&(n.rqCount-1)) << n.rqShift
		if n.c.mem.ReadAt(slot, n.buf+at) != nil {
			return some, true
		}
		wr := r.request(n.c.dev, uint64(n.life)<<48|uint64(n.recvNext), slot)
		if _, err := n.soft.PostRecv(wr); err != nil {
			if !retry(err) {
				return some, true
			}
			break // it is full: completions that were not taken yet make room
		}
		n.recvNext++
		some = true
	}
	return some, false
}
