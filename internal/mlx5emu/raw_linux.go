package mlx5emu

import (
	"context"
	"sync"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Raw packet queue pairs: what is sent are Ethernet frames, and what comes in is read into receives when it comes. The software NIC has no
// part in that.

// A rawQP has the state of such a queue pair, where others have one of the software NIC's.
type rawQP struct {
	qpn  ib.QPN
	mu   sync.Mutex
	attr ib.QPAttr // guarded by mu
}

func (q *rawQP) QPN() ib.QPN   { return q.qpn }
func (q *rawQP) Cap() ib.QPCap { return ib.QPCap{} }
func (q *rawQP) Close() error  { return nil }

// Draining is for states that such a queue pair does not have.
func (q *rawQP) Draining() bool { return false }

func (q *rawQP) State() ib.QPState {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.attr.State
}

func (q *rawQP) Query() (ib.QPAttr, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.attr, nil
}

func (q *rawQP) Modify(_ context.Context, a *ib.QPAttr, mask ib.QPAttrMask) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if mask&ib.AttrPort != 0 {
		q.attr.Port = a.Port
	}
	if mask&ib.AttrState != 0 {
		if q.attr.State = a.State; a.State == ib.Reset {
			q.attr = ib.QPAttr{}
		}
	}
	return nil
}

// PostSend and PostRecv are for requests of the software NIC's, of which there are none.
func (q *rawQP) PostSend([]ib.SendWR) (int, error) { return 0, driver.ErrOpcode }
func (q *rawQP) PostRecv([]ib.RecvWR) (int, error) { return 0, driver.ErrOpcode }

func (n *qp) raw() bool { return n.typ == ib.RawPacket }

// firstRaw is the number before that of the first queue of a raw packet queue pair. They are not queue pairs' numbers, and may be the same.
const firstRaw = 0x1000

// makeRaw makes what the software NIC makes for others. Called with dev.mu held.
func (n *qp) makeRaw() {
	d := n.c.dev
	n.qpn, n.rqn = firstRaw+d.nextRaw+1, firstRaw+d.nextRaw+2
	if d.nextRaw += 2; d.nextRaw >= 1<<23 {
		d.nextRaw = 0
	}
	n.soft = &rawQP{qpn: ib.QPN(n.qpn)}
}

// rawNumbers tells what the queue pair consists of.
func (n *qp) rawNumbers(r *abi.Mlx5CreateQPResp) {
	r.CompMask = abi.MLX5_IB_CREATE_QP_RESP_MASK_TIRN | abi.MLX5_IB_CREATE_QP_RESP_MASK_RQN
	r.Tirn, r.RQN = n.rqn, n.rqn
	if n.sqCount > 0 {
		r.CompMask |= abi.MLX5_IB_CREATE_QP_RESP_MASK_TISN | abi.MLX5_IB_CREATE_QP_RESP_MASK_SQN
		r.Tisn, r.SQN = n.qpn, n.qpn
	}
}

// inlineMode is how much of a frame has to be in the WQE.
func (d *Device) inlineMode() uint8 {
	if d.cfg.L2Inline {
		return abi.MLX5_USER_INLINE_MODE_L2
	}
	return abi.MLX5_USER_INLINE_MODE_NONE
}

func (d *Device) minInline() int {
	const l2 = 18 // addresses, a VLAN tag, and the type
	if d.cfg.L2Inline {
		return l2
	}
	return 0
}

// fetchFrame sends the frame of a WQE of that many basic blocks. It reports whether the one behind it may follow.
func (n *qp) fetchFrame(w *sendWQE, id sendID, bbs, left int) bool {
	d := n.c.dev
	if len(w.eth.header) < d.minInline() {
		n.bad(bbs, left)
		return false
	}
	st := ib.WCSuccess
	if n.soft.State() == ib.Err {
		st = ib.WCFlushErr
	} else {
		st = n.transmit(w)
	}
	n.sendNext += uint16(bbs)
	n.hold = &held{id, st}
	n.releaseHeld()
	return st == ib.WCSuccess || st == ib.WCFlushErr
}

// transmit puts a frame on the wire.
func (n *qp) transmit(w *sendWQE) ib.WCStatus {
	d := n.c.dev
	size := uint64(len(w.eth.header) + len(w.inline))
	for i := range w.data {
		size += uint64(w.data[i].n)
	}
	switch {
	case size < ethHeader:
		return ib.WCLocalQPOpErr
	case size > maxFrame: // the port loses it, and the queue does not hear of that
		for i := range w.data {
			if _, ok := n.place(&w.data[i], 0); !ok {
				return ib.WCLocalProtErr
			}
		}
		return ib.WCSuccess
	}
	b := append(append(d.engine.frame[:0], w.eth.header...), w.inline...)
	for i := range w.data {
		s := &w.data[i]
		va, ok := n.place(s, 0)
		if !ok || n.c.mem.ReadAt(b[len(b):][:s.n], va) != nil {
			return ib.WCLocalProtErr
		}
		b = b[:len(b)+int(s.n)]
	}
	for len(b) < minFrame {
		b = append(b, 0)
	}
	f := frame{data: append([]byte(nil), b...), from: n.c}
	f.fillChecksums(w.eth.checksums)
	d.broadcast(f)
	return ib.WCSuccess
}

// place is where in the client's memory a data segment is, if the queue pair may use that with these rights.
func (n *qp) place(s *dataSeg, need ib.Access) (va uint64, ok bool) {
	m := n.c.dev.keys.get(s.lkey)
	if m == nil || m.pd != n.pd || m.access&need != need {
		return 0, false
	}
	off := s.addr - m.iova
	if off > m.length || uint64(s.n) > m.length-off {
		return 0, false
	}
	return m.start + off, true
}

// take is what the queue pair does with a frame that a rule has brought to it.
func (n *qp) take(f *frame) {
	d := n.c.dev
	state := n.soft.State()
	// In INIT the receive queue works, as a device's does: drivers ring for it only in RTR.
	if n.frozen || n.wrecked || n.recvBad || n.rqCount == 0 || state == ib.Reset || state == ib.Err {
		return
	}
	posted, ok := n.c.counter(n.db)
	if ok && posted == n.recvNext {
		return // nobody receives it
	}
	if !ok || uint32(posted-n.recvNext) > n.rqCount {
		n.lostRecvs()
		return
	}
	slot := d.engine.slot[:1<<n.rqShift]
	at := uint64(uint32(n.recvNext)&(n.rqCount-1)) << n.rqShift
	if n.c.mem.ReadAt(slot, n.buf+at) != nil {
		n.lostRecvs()
		return
	}
	st := n.scatter(f.data, slot)
	n.completeFrame(f, st)
	if st != ib.WCSuccess {
		n.wreck()
	}
}

// scatter writes a frame to the memory of the receive in slot.
func (n *qp) scatter(b, slot []byte) ib.WCStatus {
	e := &n.c.dev.engine
	e.segs = scatterList(e.segs[:0], slot)
	for i := range e.segs {
		if len(b) == 0 {
			break
		}
		s := &e.segs[i]
		va, ok := n.place(s, ib.AccessLocalWrite)
		if !ok {
			return ib.WCLocalProtErr
		}
		k := min(uint64(s.n), uint64(len(b)))
		if n.c.mem.WriteAt(b[:k], va) != nil {
			return ib.WCLocalProtErr
		}
		b = b[k:]
	}
	if len(b) > 0 {
		return ib.WCLocalLengthErr
	}
	return ib.WCSuccess
}

// completeFrame ends the oldest receive. f is nil if it was flushed.
func (n *qp) completeFrame(f *frame, st ib.WCStatus) {
	const flowTag = 0 // of rules that set none: successes have it where others have a number
	wc := ib.WC{ID: uint64(n.recvNext), Status: st, Opcode: ib.WCRecv}
	n.recvNext++
	n.c.dev.traceRecv(n, &wc)
	number := n.rqn
	var e cqe
	if st == ib.WCSuccess {
		wc.ByteLen, number = uint32(len(f.data)), flowTag
		e[cqeRight], e[cqeHeaders] = f.verify()
	}
	e.responder(&wc, number, uint16(wc.ID))
	n.stamp(&e)
	n.rcq.complete(&e, st != ib.WCSuccess)
}

// flushRecvs ends the receives of a queue pair in the error state, and reports whether there were any.
func (n *qp) flushRecvs() (some bool) {
	if n.soft.State() != ib.Err || n.wrecked {
		return false
	}
	posted, ok := n.c.counter(n.db)
	if !ok || uint32(posted-n.recvNext) > n.rqCount {
		n.lostRecvs()
		return true
	}
	for n.recvNext != posted {
		n.completeFrame(nil, ib.WCFlushErr)
		some = true
	}
	return some
}
