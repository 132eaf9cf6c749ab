//go:build amd64 || arm64

package mlx5

import (
	"fmt"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var errSGELen = fmt.Errorf("%w: an SGE has less than 2 GiB", driver.ErrInvalidWR)

// PostSend implements driver.QP.
func (q *qp) PostSend(wrs []ib.SendWR) (n int, err error) {
	if err := q.c.Removed(); err != nil {
		return 0, err
	}
	q.sendMu.Lock()
	n, err = q.postSendLocked(wrs)
	q.sendMu.Unlock()
	return n, err
}

func (q *qp) postSendLocked(wrs []ib.SendWR) (n int, err error) {
	if q.closed {
		return 0, driver.ErrClosed
	}
	if s := q.State(); s < ib.RTS { // with the lock held: whoever resets the queue pair has said so before it takes it
		return 0, driver.StateErr(s)
	}
	sq := &q.sq
	room := int(sq.limit - (sq.head - atomic.LoadUint32(&q.polled)))
	var last, length uint32 // the newest request's first block, and how many units it has
	for n < min(len(wrs), room) {
		wr := &wrs[n]
		k := uint32(0)
		switch {
		case len(wr.Inline) > 0:
			k = q.writeInline(wr)
		case len(wr.SGEs) == 1:
			k = q.writeShort(wr)
		}
		if k == 0 {
			var failed error // of its own: err would be carried through memory from request to request
			if k, failed = q.write(wr); failed != nil {
				err = failed
				break
			}
		}
		last, length = sq.cur, k
		s := &sq.sent[last&sq.mask]
		s.id, s.head, s.block, s.op = wr.ID, sq.head, uint16(last), wr.Opcode
		sq.head++
		sq.cur += (k + 3) / 4
		n++
	}
	if err == nil && n < len(wrs) {
		err = driver.ErrQueueFull
	}
	if n == 0 {
		return 0, err
	}
	ring.StoreRel32(&q.posted, sq.head)
	if n == 1 {
		q.reg.ringOne(sq, sq.block(last), length)
	} else {
		q.reg.ringLast(sq, sq.block(last))
	}
	return n, err
}

// writeShort is write for a SEND, WRITE or READ with one element, and nothing inline, which fits one block; for all others it returns 0.
func (q *qp) writeShort(wr *ib.SendWR) uint32 {
	o := &q.ops[wr.Opcode&15]
	shape := o.shape
	if shape-plainShape > remoteShape-plainShape || wr.Opcode > 15 || len(wr.SGEs) != 1 || q.maxSGE == 0 {
		return 0
	}
	s := &wr.SGEs[0]
	if s.Length-1 >= maxSGELen {
		return 0
	}
	p := q.sq.block(q.sq.cur)
	seg := forward(p, ctrlBytes)
	units := uint32(2)
	if shape != plainShape {
		putRemote(seg, wr.RemoteAddr, wr.RKey)
		seg = forward(seg, raddrBytes)
		units = 3
	}
	putSGE(seg, s)
	q.sq.putControl(p, o.code, q.number, units, q.flags(wr), o.immediate(wr))
	return units
}

// writeInline is write for a SEND or WRITE with its data in it, if that does not go on at the beginning of the queue; for all others it
// returns 0.
func (q *qp) writeInline(wr *ib.SendWR) uint32 {
	o := &q.ops[wr.Opcode&15]
	data := wr.Inline
	if o.shape-plainShape > remoteShape-plainShape || !o.inline || wr.Opcode > 15 || len(wr.SGEs) > 0 || len(data) > q.inline {
		return 0
	}
	p := q.sq.block(q.sq.cur)
	seg := forward(p, ctrlBytes)
	units := uint32(1)
	if o.shape == remoteShape {
		putRemote(seg, wr.RemoteAddr, wr.RKey)
		seg = forward(seg, raddrBytes)
		units = 2
	}
	if !q.sq.straight(seg, len(data)) {
		return 0
	}
	putData(seg, data)
	units += inlineUnits(len(data))
	q.sq.putControl(p, o.code, q.number, units, q.flags(wr), o.immediate(wr))
	return units
}

// flags are those of a request's control segment. A fence that the one before has asked for is taken; so nothing may fail any more.
func (q *qp) flags(wr *ib.SendWR) uint32 {
	flags := ctrlFlags[wr.Flags&7] | q.sigFlags
	if q.fence != 0 {
		if wr.Flags&ib.SendFence == 0 {
			flags |= q.fence
		}
		q.fence = 0
	}
	return flags
}

// immediate is the last field of a request's control segment.
func (o *operation) immediate(wr *ib.SendWR) uint32 {
	switch o.imm {
	case immData:
		return wr.Imm
	case immKey:
		return uint32(wr.InvalidateRKey)
	}
	return 0
}

// write writes a request to the next blocks, and returns how many units it takes. Called with sendMu held; if it fails, nothing
// has happened.
func (q *qp) write(wr *ib.SendWR) (n uint32, err error) {
	o := &q.ops[wr.Opcode&15]
	if o.shape <= frameShape || wr.Opcode > 15 {
		if o.shape == frameShape && wr.Opcode == ib.OpSend {
			return q.writeFrame(wr)
		}
		return 0, q.noOperation(wr.Opcode)
	}
	if len(wr.SGEs) > q.maxSGE {
		return 0, driver.ErrTooManySGEs
	}
	if len(wr.Inline) > 0 && (len(wr.SGEs) > 0 || len(wr.Inline) > q.inline || !o.inline) {
		return 0, driver.ErrNoInline
	}
	if o.shape >= bindShape {
		return q.writeKey(wr, o)
	}
	sq := &q.sq
	p := sq.block(sq.cur)
	seg := forward(p, ctrlBytes)
	n = ctrlBytes / unitBytes
	switch o.shape {
	case remoteShape:
		putRemote(seg, wr.RemoteAddr, wr.RKey)
		seg = forward(seg, raddrBytes)
		n += raddrBytes / unitBytes
	case atomicShape:
		if len(wr.SGEs) != 1 || wr.SGEs[0].Length != 8 {
			return 0, driver.ErrAtomicLen
		}
		putRemote(seg, wr.RemoteAddr, wr.RKey)
		putOperands(forward(seg, raddrBytes), wr)
		seg = forward(seg, 2*raddrBytes)
		n += 2 * raddrBytes / unitBytes
	case datagramShape:
		av := q.c.ahs.get(uint32(wr.AH))
		if av == nil {
			return 0, driver.ErrNoAH
		}
		putAV(seg, av, wr.RemoteQPN, wr.RemoteQKey)
		if seg = forward(seg, avBytes); seg == sq.end {
			seg = sq.base
		}
		n += avBytes / unitBytes
	}
	if len(wr.Inline) > 0 {
		n += sq.putInline(seg, wr.Inline)
		sq.putControl(p, o.code, q.number, n, q.flags(wr), o.immediate(wr))
		return n, nil
	}
	sges := wr.SGEs
	for i := range sges {
		s := &sges[i]
		if s.Length-1 >= maxSGELen { // to the device, a length of 0 is 2 GiB
			if s.Length == 0 {
				continue
			}
			return 0, errSGELen
		}
		if seg == sq.end {
			seg = sq.base
		}
		putSGE(seg, s)
		seg = forward(seg, dataBytes)
		n += dataBytes / unitBytes
	}
	sq.putControl(p, o.code, q.number, n, q.flags(wr), o.immediate(wr))
	return n, nil
}

// writeKey is write for a request that binds or frees a memory window. Whatever comes next may use the key, and waits for it.
func (q *qp) writeKey(wr *ib.SendWR, o *operation) (n uint32, err error) {
	sq := &q.sq
	p := sq.block(sq.cur)
	c := cursor{forward(p, ctrlBytes), ctrlBytes / unitBytes}
	imm := o.immediate(wr)
	if o.shape == invalShape {
		sq.putInvalidate(&c)
	} else {
		if wr.Bind == nil {
			return 0, driver.ErrNoBind
		}
		key, err := q.bind(wr.Bind)
		if err != nil {
			return 0, err
		}
		sq.putBind(&c, wr.Bind, q.number)
		imm = uint32(key)
	}
	sq.putControl(p, o.code, q.number, c.units, q.flags(wr), imm)
	q.fence = ctrlSmallFence
	return c.units, nil
}

// noOperation says why there is no such operation.
func (q *qp) noOperation(o ib.Opcode) error {
	if q.Type() == ib.RC && (o == ib.OpFlush || o == ib.OpAtomicWrite) {
		return driver.ErrNoPlacement
	}
	return driver.ErrOpcode
}

// PostRecv implements driver.QP.
func (q *qp) PostRecv(wrs []ib.RecvWR) (n int, err error) {
	if q.srq != nil {
		return 0, driver.ErrHasSRQ
	}
	if err := q.c.Removed(); err != nil {
		return 0, err
	}
	q.recvMu.Lock()
	n, err = q.postRecvLocked(wrs)
	q.recvMu.Unlock()
	return n, err
}

func (q *qp) postRecvLocked(wrs []ib.RecvWR) (n int, err error) {
	if q.recvClosed {
		return 0, driver.ErrClosed
	}
	if s := q.State(); s == ib.Reset {
		return 0, driver.StateErr(s)
	}
	rq := &q.rq
	room := int(rq.limit - (rq.head - atomic.LoadUint32(&q.recvPolled)))
	for n < len(wrs) {
		if n == room {
			err = driver.ErrQueueFull
			break
		}
		wr := &wrs[n]
		if err = putRecv(rq.slot(rq.head), wr.SGEs, q.maxRecvSGE); err != nil {
			break
		}
		rq.ids[rq.head&rq.mask] = wr.ID
		rq.head++
		n++
	}
	if n > 0 {
		ring.StoreRel32(&q.recvPosted, rq.head)
		publish(rq.record, be32(rq.head&0xffff))
	}
	return n, err
}
