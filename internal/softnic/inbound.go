package softnic

import (
	"fmt"
	"runtime"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// inbound is the owner's side of a block: what one peer may write to one QP.
type inbound struct {
	q       *QP
	link    *link
	port    *port
	bit     int
	blk     block
	geo     geometry
	connect connectMsg
	dst     uint32 // the peer's QPN, 0 for UD
	tag     uint32 // what the peer claims receives of a shared queue with: the QPN, or, for UD, a number of its own

	state  *uint32
	access *uint32
	tail   *uint32
	headW  *uint32
	busy   *uint32
	descs  []uint64
	cqes   []uint64
	sges   []uint64
	mask   uint32
	head   uint32 // completions consumed; guarded by rcq.mu
	seen   uint32 // completions counted, if the CQ counts; guarded by rcq.mu
	told   uint32 // handle that the peer was told of last; guarded by rq
	broken bool   // the peer wrote nonsense; guarded by rcq.mu
}

// openInbound gives the peer a block. Receives that are already posted become visible in it.
func (q *QP) openInbound(l *link, dst uint32) (*inbound, error) {
	g := geometry{sges: uint32(max(q.cap.MaxRecvSGE, 1)), cqeWords: cqeWordsRQ}
	switch {
	case q.typ == ib.UD:
		g.srq, g.cqeWords, g.depth, g.sges = true, cqeWordsSRQ, min(q.srq.ring, udRingSize), q.srq.sges
	case q.srq != nil:
		g.srq, g.cqeWords, g.depth, g.sges = true, cqeWordsSRQ, min(q.srq.ring, srqRingMax), q.srq.sges
	default:
		g.depth = uint32(q.cap.MaxRecvWR)
	}
	p, bit, err := l.port(q.rcq, q.rIdx)
	if err != nil {
		return nil, err
	}
	b, err := l.alloc(g.size())
	if err != nil {
		p.dropMember(bit)
		return nil, err
	}
	w32, w64 := words32(b.mem), words64(b.mem)
	in := &inbound{q: q, link: l, port: p, bit: bit, blk: b, geo: g, dst: dst, mask: g.depth - 1,
		state: &w32[blkState/4], access: &w32[blkAccess/4], tail: &w32[blkTail/4], headW: &w32[blkHead/4],
		busy: &w32[blkBusy/4], cqes: w64[g.cqeOff()/8:][:g.depth*g.cqeWords]}
	if !g.srq {
		in.descs = w64[g.descOff()/8:][:g.depth*descWords]
		if g.sges > 1 {
			in.sges = w64[g.sgeOff()/8:][:g.depth*g.sges*2]
		}
	}
	if in.tag = uint32(q.qpn); q.typ == ib.UD {
		q.peers++
		in.tag = uint32(ib.MaxQPN) + 1 + q.peers&uint32(ib.MaxQPN) // never a QPN, srqFree or srqSkip
	}
	in.connect = connectMsg{chunk: b.chunk, off: b.off, geo: g, portChunk: p.mem.chunk, portOff: p.mem.off, bit: uint32(bit),
		channel: l.tellChannel(q.rcq.channel), srq: 0, pd: q.pd.id, tag: in.tag, asks: q.refill != nil}
	if g.srq {
		in.connect.srq = l.tellSRQ(q.srq)
	}
	l.watchInbound(in)
	in.setRights(q)
	q.rq.Lock()
	if !g.srq {
		n := atomic.LoadUint32(&q.posted)
		for i := atomic.LoadUint32(&q.head); i != n; i++ {
			in.write(i)
		}
		atomic.StoreUint32(in.tail, n)
	}
	if q.typ == ib.UD {
		var ins []*inbound
		if old := q.ins.Load(); old != nil {
			ins = append(ins, *old...)
		}
		ins = append(ins, in)
		q.ins.Store(&ins)
	} else {
		q.in.Store(in)
	}
	q.rq.Unlock()
	in.setState(qpReady)
	return in, nil
}

func (in *inbound) setState(s uint32) { atomic.StoreUint32(in.state, s) }

// setRights tells the peer what it may do, and how long to wait for a receive.
func (in *inbound) setRights(q *QP) {
	q.sq.Lock()
	acc, key, rnr := uint32(q.attr.Access), q.attr.QKey, q.attr.MinRNRTimer
	if q.typ == ib.RC && q.attr.MaxDestRdAtomic == 0 {
		acc |= noResources
	}
	q.sq.Unlock()
	atomic.StoreUint32(in.access, acc)
	w := words32(in.blk.mem)
	atomic.StoreUint32(&w[blkQKey/4], uint32(key))
	atomic.StoreUint32(&w[blkRNR/4], uint32(rnr))
}

// waitIdle waits until the peer is not in the middle of an operation; heavyBarrier comes before it. A peer that keeps its
// busy word raised is cut off.
func (in *inbound) waitIdle() {
	defer runtime.KeepAlive(in) // whoever takes things away holds no lock that would keep the block: see link.watchInbound
	if atomic.LoadUint32(in.busy) == 0 {
		return
	}
	if !spinUntil(in.q.nic.busyFor, func() bool { return atomic.LoadUint32(in.busy) == 0 || in.link.cut.Load() || in.link.reason() != nil }) {
		in.link.fault("QP %d has been busy for %v", in.q.qpn, in.q.nic.busyFor)
	}
}

// fault ends what has written an impossible completion: the link to the peer, or, where that was this NIC for somebody who sends packets,
// the queue pair. Then it was another peer of its shared queue that has changed the receive. Called with rcq.mu held.
func (in *inbound) fault(format string, args ...any) {
	in.broken = true
	if in.link.net {
		in.q.errorLater(in.q.epoch.Load(), ib.EventQPFatal, true)
		return
	}
	in.link.fault(format, args...)
}

// release gives the block back once the peer has let go of it.
func (in *inbound) release() {
	port, bit := in.port, in.bit
	in.link.release(in.blk, in.q.qpn, ib.QPN(in.dst), func() { port.dropMember(bit) })
}

// write puts the descriptor of receive i where the peer reads it. Called with q.rq held; the tail publishes it.
func (in *inbound) write(i uint32) {
	q := in.q
	r := &q.recs[i&q.recMask]
	sges := q.recSGE[int(i&q.recMask)*q.cap.MaxRecvSGE:][:r.sges]
	if r.private && in.link.path != pathInproc && r.staged == nil {
		r.staged = q.nic.stageRecv(q.pd, sges, r.total)
	}
	d := in.descs[(i&in.mask)*descWords:][:descWords]
	for k := range sges {
		if h := uint32(sges[k].lenHdl >> 32); h != in.told && r.staged == nil {
			in.told = h
			in.link.pushRecv(h)
		}
	}
	if r.staged != nil && uint32(r.staged.desc.lenHdl>>32) != in.told {
		in.told = uint32(r.staged.desc.lenHdl >> 32)
		in.link.pushRecv(in.told)
	}
	switch {
	case r.staged != nil:
		d[0], d[1] = r.staged.desc.addr, r.staged.desc.lenHdl
	case len(sges) == 1:
		d[0], d[1] = sges[0].addr, sges[0].lenHdl
	case len(sges) == 0:
		d[0], d[1] = 0, uint64(sgeList)<<32
	default:
		list := in.sges[(i&in.mask)*in.geo.sges*2:]
		for k, s := range sges {
			list[2*k], list[2*k+1] = s.addr, s.lenHdl
		}
		d[0], d[1] = uint64(len(sges)), uint64(r.total)|uint64(sgeList)<<32
	}
}

// PostRecv implements driver.QP.
func (q *QP) PostRecv(wrs []ib.RecvWR) (int, error) {
	if q.srq != nil {
		if !q.ownSRQ {
			return 0, driver.ErrHasSRQ
		}
		return q.postOwnSRQ(wrs)
	}
	q.rq.Lock()
	if ib.QPState(q.state.Load()) == ib.Reset {
		q.rq.Unlock()
		return 0, q.stateErr()
	}
	posted := q.posted
	head := atomic.LoadUint32(&q.head)
	in := q.in.Load()
	n := 0
	var err error
	for i := range wrs {
		if posted-head > q.recMask {
			if head = atomic.LoadUint32(&q.head); posted-head > q.recMask {
				err = driver.ErrQueueFull
				break
			}
		}
		wr := &wrs[i]
		if len(wr.SGEs) > q.cap.MaxRecvSGE {
			err = driver.ErrTooManySGEs
			break
		}
		k := posted & q.recMask
		r := &q.recs[k]
		r.id, r.sges = wr.ID, uint16(len(wr.SGEs))
		if len(wr.SGEs) == 1 { // the common case, without a loop
			s := &wr.SGEs[0]
			if s.Length > ib.MaxMessage {
				err = errTooLong
				break
			}
			r.total = s.Length
			q.recSGE[int(k)*q.cap.MaxRecvSGE], r.private = q.nic.recvDesc(q.pd, s)
		} else {
			var sum uint64
			r.private = false
			for j := range wr.SGEs {
				d, private := q.nic.recvDesc(q.pd, &wr.SGEs[j])
				q.recSGE[int(k)*q.cap.MaxRecvSGE+j] = d
				r.private = r.private || private
				sum += uint64(wr.SGEs[j].Length)
			}
			if sum > ib.MaxMessage {
				err = errTooLong
				break
			}
			r.total = uint32(sum)
		}
		if in != nil {
			in.write(posted)
		}
		posted++
		n++
	}
	if n > 0 {
		ring.StoreRel32(&q.posted, posted)
		if in != nil {
			ring.StoreRel32(in.tail, posted)
		}
	}
	q.rq.Unlock()
	if n > 0 && q.flushing.Load() {
		q.rcq.signal(q.rIdx, true)
	}
	return n, err
}

var (
	errTooLong = fmt.Errorf("%w: longer than 2 GiB", driver.ErrInvalidWR)
)

// recvDesc translates an SGE of a receive. One that is not covered by a writable region of the PD gets handle 0: the error is
// reported when a message arrives for it, as the specification wants (IBA 10.8.3.2).
func (n *NIC) recvDesc(pd *PD, s *ib.SGE) (d descriptor, private bool) {
	r := n.regions.lookup(uint32(s.LKey))
	if r == nil || r.pd != pd || r.access&ib.AccessLocalWrite == 0 || r.qpn != 0 || !r.contains(s.Addr, s.Length) {
		return makeDesc(s.Addr, s.Length, 0), false
	}
	if !r.receives.Load() {
		r.receives.Store(true)
	}
	return makeDesc(s.Addr, s.Length, r.handle), r.fd < 0
}

// poll moves completions of this QP into wcs. Called with c.mu held.
func (q *QP) poll(c *CQ, wcs []ib.WC) int {
	n := 0
	if q.scq == c {
		n = q.pollSend(wcs)
	}
	if q.rcq == c {
		flushing := q.flushing.Load() // before looking at the rings: once it is set, nothing comes to them any more
		if in := q.in.Load(); in != nil && n < len(wcs) {
			n += in.poll(wcs[n:])
		} else if ins := q.ins.Load(); ins != nil {
			for _, in := range *ins {
				if n < len(wcs) {
					n += in.pollSRQ(wcs[n:])
				}
			}
		}
		if n < len(wcs) && flushing {
			n += q.pollFlush(wcs[n:])
		}
	}
	return n
}

// quiet reports, without a lock, that an RC or UC QP with a receive queue of its own and one CQ has no completions.
func (q *QP) quiet() bool {
	if atomic.LoadUint32(&q.scTail) != atomic.LoadUint32(&q.scHead) || q.flushing.Load() {
		return false
	}
	in := q.in.Load()
	if in == nil {
		return true
	}
	h := atomic.LoadUint32(&q.head) // the same as in.head: both count from RESET
	next := in.at(h)
	runtime.KeepAlive(in) // no lock keeps the block: see link.watchInbound
	return next != h+1
}

func (q *QP) pollSend(wcs []ib.WC) int {
	h := q.scHead
	t := atomic.LoadUint32(&q.scTail)
	if h == t {
		return 0
	}
	n := 0
	for h != t && n < len(wcs) {
		e := &q.sc[h&q.scMask]
		wcs[n] = ib.WC{ID: e.id, Status: e.status, Opcode: e.op, ByteLen: e.n, QPN: q.qpn}
		n++
		h++
	}
	ring.StoreRel32(&q.scHead, h)
	return n
}

// recount looks how many completions are queued for c, and returns how many more these are than when it looked last. Called with c.mu
// held.
func (q *QP) recount(c *CQ) (more int) {
	if q.scq == c {
		n := int(atomic.LoadUint32(&q.scTail) - q.scHead)
		more = n - q.sQueued
		q.sQueued = n
	}
	if q.rcq == c {
		n := q.countReceives()
		more += n - q.rQueued
		q.rQueued = n
	}
	return more
}

// countReceives counts the completions of receives that are queued, as far as peers can be believed. Called with rcq.mu held.
func (q *QP) countReceives() int {
	if q.flushing.Load() { // every receive is completed, or counts as that
		switch {
		case q.srq == nil:
			return int(atomic.LoadUint32(&q.posted) - q.head)
		case q.ownSRQ:
			return q.srq.outstanding()
		}
	}
	if in := q.in.Load(); in != nil {
		return in.count()
	}
	n := 0
	if ins := q.ins.Load(); ins != nil {
		for _, in := range *ins {
			n += in.count()
		}
	}
	return n
}

// count counts what the peer has completed and was not polled. Called with rcq.mu held.
func (in *inbound) count() int {
	if in.broken {
		return 0
	}
	if int32(in.seen-in.head) < 0 {
		in.seen = in.head
	}
	for in.seen-in.head <= in.mask && in.at(in.seen) == in.seen+1 {
		in.seen++
	}
	return int(in.seen - in.head)
}

// srqSlot is a receive of a shared queue.
type srqSlot struct {
	srq  *SRQ
	slot uint32
}

// checkSeen looks whether the receives that count has counted can have been completed, each once, and gives the link up if not. Called with
// rcq.mu held.
func (in *inbound) checkSeen(seen map[srqSlot]bool) {
	n := in.count()
	if !in.geo.srq {
		if posted := atomic.LoadUint32(&in.q.posted) - in.head; uint32(n) > posted {
			in.fault("%d completions for %d receives of QP %d", n, posted, in.q.qpn)
		}
		return
	}
	for h := in.head; h != in.seen; h++ {
		at := srqSlot{in.q.srq, uint32(in.cqes[(h&in.mask)*cqeWordsSRQ+2])}
		if seen[at] || !in.q.srq.holds(at.slot) {
			in.fault("impossible completion for SRQ entry %d of QP %d", at.slot, in.q.qpn)
			return
		}
		seen[at] = true
	}
}

// at returns the sequence number of completion h, acquired.
func (in *inbound) at(h uint32) uint32 {
	return uint32(atomic.LoadUint64(&in.cqes[(h&in.mask)*in.geo.cqeWords]))
}

// poll takes completions that the peer wrote. Everything in them is checked: the peer can write anything.
func (in *inbound) poll(wcs []ib.WC) int {
	if in.geo.srq {
		return in.pollSRQ(wcs)
	}
	h := in.head
	slot := (h & in.mask) * cqeWordsRQ
	a := atomic.LoadUint64(&in.cqes[slot]) // acquire; pairs with the release in peerView.complete
	if uint32(a) != h+1 {
		return 0
	}
	if in.broken {
		return 0
	}
	q := in.q
	posted := atomic.LoadUint32(&q.posted)
	n := 0
	for {
		r := &q.recs[h&q.recMask]
		b := in.cqes[slot+1]
		if h == posted {
			posted = atomic.LoadUint32(&q.posted) // it may be newer than our first look
		}
		ok := h != posted // else r is not looked at: a peer that lies completes a receive that PostRecv is just writing
		if ok {
			q.prefetch(h, uint32(a>>32))
			ok = q.recvWC(&wcs[n], in, uint32(a>>32), b, r.id, r.total)
		}
		if !ok {
			in.fault("impossible completion %#x %#x for receive %d of QP %d", a, b, h, q.qpn)
			break
		}
		if r.staged != nil {
			q.unstage(&wcs[n], r, q.recSGE[int(h&q.recMask)*q.cap.MaxRecvSGE:][:r.sges])
		}
		n++
		h++
		if n == len(wcs) {
			break
		}
		slot = (h & in.mask) * cqeWordsRQ
		if a = atomic.LoadUint64(&in.cqes[slot]); uint32(a) != h+1 {
			break
		}
	}
	if h != in.head {
		in.head = h
		ring.StoreRel32(&q.head, h)
		if !q.commEst {
			q.established()
		}
	}
	return n
}

// prefetch fetches the start of a message of n bytes that has just arrived: its lines are in the sender's cache, and whoever
// reads it would wait for one after the other.
func (q *QP) prefetch(h, n uint32) {
	d := &q.recSGE[int(h&q.recMask)*q.cap.MaxRecvSGE]
	if n == 0 || n > uint32(d.lenHdl) {
		return
	}
	r := q.nic.regions.lookup(uint32(d.lenHdl >> 32))
	if r == nil || r.mem == nil {
		return
	}
	b := r.bytes(d.addr, n)
	for i := 0; i < len(b) && i < 4*cacheLine; i += cacheLine {
		ring.Prefetch(&b[i])
	}
	ring.Prefetch(&b[len(b)-1])
}

// recvWC fills wc from a shared completion (byte length n, second word b); false: it cannot be.
func (q *QP) recvWC(wc *ib.WC, in *inbound, n uint32, b uint64, id uint64, total uint32) bool {
	imm, op, flags, status := uint32(b), ib.WCOpcode(b>>32), uint8(b>>40), ib.WCStatus(b>>48)
	*wc = ib.WC{ID: id, Opcode: ib.WCRecv, ByteLen: n, QPN: q.qpn}
	if status != ib.WCSuccess {
		if status == ib.WCFlushErr && in.link.net {
			wc.Status, wc.ByteLen = status, 0
			return true
		}
		if status != ib.WCLocalLengthErr && status != ib.WCLocalProtErr && status != ib.WCLocalQPOpErr {
			return false
		}
		wc.Status = status
		q.remoteFault(q.epoch.Load(), ib.EventQPFatal)
		return true
	}
	if op != 0 {
		return false
	}
	q.got.Messages++
	q.got.Bytes += uint64(n)
	if q.rcq.marks && flags&cqeSolicited != 0 {
		wc.Flags |= WCSolicited
	}
	if flags&cqeRDMA != 0 {
		wc.Opcode = ib.WCRecvRDMAWithImm
		if flags&cqeImm == 0 {
			return false
		}
	} else if n > total {
		return false
	}
	if flags&cqeImm != 0 {
		wc.Flags |= ib.WCWithImm
		wc.Imm = imm
	}
	if flags&cqeInv != 0 {
		wc.Flags |= ib.WCWithInv
		wc.InvalidatedRKey = ib.RKey(imm)
		q.nic.invalidateRemote(q, ib.RKey(imm))
	}
	return true
}

// established raises EventCommEst for the first message that arrives in RTR.
func (q *QP) established() {
	q.commEst = true
	if ib.QPState(q.state.Load()) == ib.RTR {
		q.nic.raise(driver.AsyncEvent{Type: ib.EventCommEst, QP: q})
	}
}

// pollFlush completes receives that no message will take any more. The peer has stopped writing before flushing is set,
// and the caller has seen it set before it polled, so everything that the peer completed was polled before.
func (q *QP) pollFlush(wcs []ib.WC) int {
	if q.srq != nil {
		if q.ownSRQ {
			return q.srq.flush(q, wcs)
		}
		return 0
	}
	posted := atomic.LoadUint32(&q.posted)
	h := q.head
	n := 0
	for h != posted && n < len(wcs) {
		r := &q.recs[h&q.recMask]
		if r.staged != nil {
			r.staged.free(q.nic)
			r.staged = nil
		}
		wcs[n] = ib.WC{ID: r.id, Status: ib.WCFlushErr, Opcode: ib.WCRecv, QPN: q.qpn}
		n++
		h++
	}
	if n > 0 {
		if in := q.in.Load(); in != nil {
			in.head = h
		}
		ring.StoreRel32(&q.head, h)
	}
	return n
}
