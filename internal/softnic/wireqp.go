package softnic

import (
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A wireQP is the part of an RC or UC QP that is connected over a network: the requests in the QP's queue (pend) are given to a
// wire.Requester, what the peer requests is executed by a wire.Responder on the QP's own block (see target), as a peer that shares
// memory would write to it. So polling is the same for both.
type wireQP struct {
	q       *QP
	port    *netPort
	out     output
	addr    netip.Addr // the peer's; packets from elsewhere are dropped
	service roce.Service
	epoch   uint32 // the QP's
	cfg     wire.Config
	queued  atomic.Bool // in port.ready

	// Guarded by port.mu.
	resp    *wire.Responder
	uresp   *wire.UCResponder
	t       target
	touched bool
	blocked bool
	owing   bool          // in port.owing
	late    bool          // in port.late
	lateAt  time.Duration // when what nobody waits for is acknowledged at the latest; 0: there is nothing
	lateAck time.Duration // how long that takes at most: once there is a requester, its LateAck
	dead    bool          // the QP was reset
	tick    int64         // of the wheel; 0: no timer is set
	before  *wireQP
	after   *wireQP // in the same slot of the wheel
	older   *wireQP // RC: the connection to the same queue pair that there was before, until the peer was heard of

	// Guarded by the QP's sq.
	req   *wire.Requester // one of these from RTS on
	ureq  *wire.UCRequester
	given uint32 // requests at the head of pend that the requester has
	first uint32 // the requester's number of the head
	over  bool   // the QP flushes its queue: the requester's opinion does not count
}

// toRTRWire is toRTR for a peer on a network.
func (q *QP) toRTRWire(attr *ib.QPAttr, mask ib.QPAttrMask) error {
	p, err := q.nic.netPortAt(attr.AH.SGIDIndex)
	if err != nil {
		return fmt.Errorf("%w: %w", driver.ErrUnreachable, err)
	}
	if err := p.checkMTU(attr.PathMTU); err != nil {
		return err
	}
	to := peerAddr(&attr.AH)
	peer, err := p.sock.Peer(to, attr.AH.UDPPort != 0)
	if err != nil {
		return fmt.Errorf("%w: %w", driver.ErrUnreachable, err)
	}
	peer.SetIP(attr.AH.TrafficClass, attr.AH.HopLimit)
	return q.connectWire(p, peer, attr, mask, wire.Config{Selective: attr.AH.UDPPort != 0, Congestion: p.congestion})
}

// connectWire takes the QP to RTR by a port. cfg says what is particular to the way.
func (q *QP) connectWire(p *netPort, peer netPeer, attr *ib.QPAttr, mask ib.QPAttrMask, cfg wire.Config) error {
	q.setAttr(attr, mask)
	in, err := q.openInbound(p.link, uint32(attr.DestQPN))
	if err != nil {
		return err
	}
	w := &wireQP{q: q, port: p, addr: peer.Addr().Addr(), service: roce.RC, epoch: q.epoch.Load(), lateAck: wire.LateAck}
	w.out = output{netPeer: peer, port: p, w: w}
	cfg.DestQP, cfg.MTU, cfg.RQPSN, cfg.MinRNRTimer = uint32(attr.DestQPN), attr.PathMTU.Bytes(), attr.RQPSN, attr.MinRNRTimer
	cfg.MaxDestRdAtomic, cfg.SendDepth, cfg.Early = int(attr.MaxDestRdAtomic), q.cap.MaxSendWR, q.nic.early
	w.cfg = cfg
	w.t = target{q: q, v: q.ownView(in), epoch: w.epoch}
	if q.typ == ib.UC {
		w.service = roce.UC
		w.uresp = wire.NewUCResponder(w.cfg, &w.t)
	} else {
		w.resp = wire.NewResponder(w.cfg, &w.t)
	}
	p.mu.Lock()
	p.join(w)
	p.unlock()
	q.sq.Lock()
	q.wire = w
	q.state.Store(uint32(ib.RTR))
	q.sq.Unlock()
	return nil
}

// path is the QP's, as QP.Path has it.
func (w *wireQP) path() string { return w.port.path() }

// path is that of the QPs that are connected by the port.
func (p *netPort) path() string {
	switch {
	case p.nic.sim != nil:
		return pathSim
	case p.stream != nil:
		return pathTCP
	}
	return pathUDP
}

// checkMTU says whether packets of the path MTU fit the net device.
func (p *netPort) checkMTU(m ib.MTU) error {
	if most := wireMTU(p.mtu); m > most {
		return fmt.Errorf("a path MTU of %d needs a net device whose MTU is larger than %d by the headers' %d: use %d",
			m.Bytes(), p.mtu, wireOverhead, most.Bytes())
	}
	return nil
}

// wireOverhead is what a packet is longer than its payload, at most: IPv6, UDP, BTH and the largest extension headers, CRC.
const wireOverhead = 40 + 8 + roce.MaxHeaderLen + roce.ICRCLen

// wireMTU is the path MTU that a net device of the MTU has room for.
func wireMTU(dev int) ib.MTU {
	m := ib.MTU256
	for m < ib.MTU4096 && (m+1).Bytes()+wireOverhead <= dev {
		m++
	}
	return m
}

// peerAddr is where the packets for a destination go.
func peerAddr(ah *ib.AHAttr) netip.AddrPort {
	port := ah.UDPPort
	if port == 0 {
		port = roce.Port
	}
	return netip.AddrPortFrom(ah.DGID.Addr(), port)
}

// ownView is a view of a block of this NIC, as a peer would have it.
func (q *QP) ownView(in *inbound) *peerView {
	var wake func()
	if ch := q.rcq.channel; ch != nil {
		wake = ch.wake
	}
	var srq *srqView
	if q.srq != nil {
		srq = newSRQView(q.srq.mem, q.srq.ring, q.srq.sges, nil)
	}
	return newPeerView(in.link, &in.connect, q.qpn, in.blk.mem, newPortView(in.port.mem.mem, uint32(in.bit), wake), srq)
}

// changeResponder takes attributes that have changed since the QP was connected. Called with cfg held, and nothing else.
func (w *wireQP) changeResponder(a *ib.QPAttr) {
	w.port.mu.Lock()
	defer w.port.unlock()
	w.cfg.MinRNRTimer, w.cfg.MaxDestRdAtomic = a.MinRNRTimer, int(a.MaxDestRdAtomic)
	if w.resp != nil {
		w.resp.Change(w.cfg)
	}
}

// setIP takes a traffic class and hop limit that have changed since the QP was connected. Called with cfg held, and nothing else.
func (w *wireQP) setIP(ah *ib.AHAttr) {
	w.port.mu.Lock()
	w.out.SetIP(ah.TrafficClass, ah.HopLimit)
	w.port.unlock()
}

// toRTS makes the requester, with the attributes of the QP, or has it take those that have changed. Called with sq held.
func (w *wireQP) toRTS() {
	a := &w.q.attr
	c := w.cfg
	c.SQPSN, c.RetryCount, c.RNRRetry, c.MaxRdAtomic = a.SQPSN, a.RetryCount, a.RNRRetry, int(a.MaxRdAtomic)
	if a.AckTimeout != 0 {
		c.AckTimeout = a.AckTimeout.Duration()
	}
	if w.q.pend == nil {
		w.q.makePending()
	}
	switch {
	case w.q.typ == ib.UC && w.ureq != nil:
		w.ureq.Resume()
	case w.q.typ == ib.UC:
		w.ureq = wire.NewUCRequester(c, (*sendQueue)(w))
	case w.req == nil:
		w.req = wire.NewRequester(c, (*sendQueue)(w))
	default:
		w.req.Change(c)
	}
}

// feed gives the requester what is posted. Requests that are executed here, and those whose buffers are not what they should be,
// wait until they are the oldest. Called with sq held.
func (w *wireQP) feed() {
	q := w.q
	for w.given < q.pendLen && ib.QPState(q.state.Load()) == ib.RTS {
		wr := &q.pend[(q.pendHead+w.given)&q.scMask].wr
		var r wire.Request
		st, here := w.request(&r, wr)
		if st == ib.WCSuccess && !here {
			w.given++
			if w.ureq != nil {
				w.ureq.Post(&r)
			} else {
				w.req.Post(&r)
			}
			continue
		}
		if w.given > 0 {
			return
		}
		if here {
			st, _, _ = q.exec(wr)
		}
		q.completePending(st, 0)
	}
}

// request translates a work request. here: it is not for the peer.
func (w *wireQP) request(r *wire.Request, wr *ib.SendWR) (st ib.WCStatus, here bool) {
	need := ib.Access(0)
	switch wr.Opcode {
	case ib.OpLocalInv, ib.OpBindMW:
		return ib.WCSuccess, true
	case ib.OpRDMARead, ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd, ib.OpFlush, ib.OpAtomicWrite:
		if w.q.attr.MaxRdAtomic == 0 {
			return ib.WCLocalQPOpErr, false
		}
		if wr.Opcode < ib.OpFlush {
			need = ib.AccessLocalWrite
		}
	}
	_, n, st := w.q.local(wr, need)
	*r = wire.Request{Op: wr.Opcode, Solicited: wr.Flags&ib.SendSolicited != 0, Fence: wr.Flags&ib.SendFence != 0,
		Quiet: wr.Flags&ib.SendSignaled == 0 && !w.q.sigAll, Len: n,
		Addr: wr.RemoteAddr, RKey: uint32(wr.RKey), Imm: wr.Imm, InvKey: uint32(wr.InvalidateRKey), CompareAdd: wr.CompareAdd, Swap: wr.Swap, Flush: wr.Flush}
	return st, false
}

// sendQueue is the wireQP as its requester sees it. Its methods are called with sq held.
type sendQueue wireQP

// wr returns the requester's request n.
func (s *sendQueue) wr(n uint32) *ib.SendWR {
	return &s.q.pend[(s.q.pendHead+n-s.first)&s.q.scMask].wr
}

func (s *sendQueue) Gather(n, off uint32, dst []byte) bool {
	wr := s.wr(n)
	if _, _, st := s.q.local(wr, 0); st != ib.WCSuccess { // a region has gone since it was posted
		return false
	}
	return s.q.gather(dst, wr, off)
}

func (s *sendQueue) Scatter(n, off uint32, src []byte) bool {
	wr := s.wr(n)
	if _, _, st := s.q.local(wr, ib.AccessLocalWrite); st != ib.WCSuccess {
		return false
	}
	return s.q.scatter(wr, src, off)
}

func (s *sendQueue) Complete(n uint32, st ib.WCStatus) {
	if s.over || s.given == 0 {
		s.first = n + 1
		return // flushed with the rest of the queue
	}
	wr := s.wr(n)
	length := uint32(ib.SGELen(wr.SGEs)) + uint32(len(wr.Inline))
	s.first = n + 1
	s.given--
	s.q.completePending(st, length)
}

// stop has the requester forget everything: the queue is flushed. Called with sq held.
func (w *wireQP) stop() {
	w.over, w.given = true, 0
	if w.req != nil {
		w.req.Fail(ib.WCFlushErr)
	}
}

// receive takes a packet of the peer. Called with port.mu held.
func (w *wireQP) receive(pkt *roce.Packet) {
	switch {
	case w.dead:
	case pkt.Opcode.IsResponse() && w.resp != nil:
		w.q.sq.Lock()
		if w.req != nil && !w.over {
			w.req.Receive(pkt, w.port.now)
		} else {
			w.port.drops.State++
		}
		w.q.sq.Unlock()
	case !w.t.v.enter():
		w.port.drops.State++
	default:
		if w.resp != nil {
			w.resp.Receive(pkt)
		} else {
			w.uresp.Receive(pkt)
		}
		w.t.v.leave()
	}
}

// pump sends what can be sent, and shows what has completed. With wait, an acknowledgement that has nothing to go with waits for
// what is posted next. Called with port.mu held.
func (w *wireQP) pump(wait bool) {
	if w.dead {
		return
	}
	q := w.q
	var at time.Duration
	sent := false
	for {
		q.sq.Lock()
		full, more := false, false
		if !w.over {
			w.feed()
			switch {
			case w.req != nil:
				was := w.req.Counters.Sent
				full = w.req.Pump(w.port.now, &w.out)
				at, sent = w.req.Deadline(), sent || w.req.Counters.Sent != was
				w.lateAck = w.req.LateAck()
			case w.ureq != nil:
				full = w.ureq.Pump(w.port.now, &w.out)
			}
			w.feed()                                    // what waited for those before it
			more = w.ureq != nil && w.ureq.Queued() > 0 // of UC they have ended as they were sent, and nothing else will come
		}
		q.unlockSends()
		if !full && !more {
			break
		}
		if full && w.full() {
			return
		}
	}
	if at != 0 {
		w.port.timers.set(w, at, w.port.now)
	}
	if sent && w.lateAt != 0 && w.lateEnough() { // behind what was sent it costs little, and before the next it may be due
		w.lateAt = 0
		w.resp.Acknowledge()
	}
	w.respond(wait && !sent)
}

// lateEnough reports whether half of the time is over that an acknowledgement may wait.
func (w *wireQP) lateEnough() bool { return w.lateAt-w.port.now <= w.lateAck/2 }

// respond sends what there is to say to requests: after our own, so that an acknowledgement leaves in one piece with them.
func (w *wireQP) respond(wait bool) {
	for w.resp != nil && w.resp.Pending() {
		if wait && w.resp.OnlyAck() {
			if p := w.port; !w.owing {
				if len(p.owing) == 0 {
					p.owingAt = p.now
				}
				w.owing = true
				p.owing = append(p.owing, w)
			}
			return
		}
		w.t.open = w.t.v.enter()
		if !w.t.open && !w.resp.Failed() {
			return // a QP that does not receive is silent, but for why it does not
		}
		full := w.resp.Pump(w.port.now, &w.out)
		if w.t.open {
			w.t.v.leave()
		}
		if full && w.full() {
			return
		}
	}
	switch late := w.resp != nil && w.resp.Late(); {
	case !late:
		w.lateAt = 0
	case w.lateAt == 0:
		w.port.lately(w)
	}
}

// full makes room in the socket; true: there is none, or what is left waits until the port has received.
func (w *wireQP) full() bool {
	p := w.port
	if !p.sock.Flush() && p.sock.Room() == 0 {
		p.block(w)
		return true
	}
	p.looks.Store(p.looks.Load() + 1) // a turn that sends this much is a long one, and drive would wait for its end
	if p.filled++; p.filled < maxFilled {
		return false
	}
	p.putBack = true
	p.block(w)
	return true
}

// expire is called when the connection's timer has come. Called with port.mu held.
func (w *wireQP) expire() {
	if w.dead {
		return
	}
	w.q.sq.Lock()
	if w.req != nil && !w.over {
		w.req.Expire(w.port.now)
	}
	w.q.sq.Unlock()
	w.pump(false)
}

// part acknowledges what was executed and waits to be acknowledged: the QP is about to be silent, and a peer that hears nothing repeats
// itself until it gives up on what has been done. Called with port.mu held.
func (w *wireQP) part() {
	if w.dead || w.resp == nil {
		return
	}
	w.resp.Acknowledge()
	if w.resp.OnlyAck() {
		w.resp.Pump(w.port.now, &w.out)
		w.port.sock.Flush()
	}
}

// flushTaken completes a receive of an SRQ that a message was arriving in, and forgets what has come early. The QP does not receive any
// more, and cfg is held. A receive of the QP's own queue is flushed with the others.
func (w *wireQP) flushTaken() {
	w.port.mu.Lock()
	defer w.port.unlock()
	w.part()
	if w.resp != nil {
		w.resp.Discard()
	}
	if v := w.t.v; v.geo.srq && w.resp != nil && w.resp.Release() {
		v.complete(&v.slot, 0, 0, 0, ib.WCFlushErr, w.q.qpn)
		v.port.notify(true)
	}
}

// detach takes the QP off the network: nothing of it is sent or received any more when this returns. Called with cfg held.
func (w *wireQP) detach() {
	p := w.port
	p.mu.Lock()
	w.part()
	w.dead = true
	if w.resp != nil {
		w.resp.Discard()
	}
	p.left.add(w)
	p.leave(w)
	p.unlock()
	if p.stream != nil { // it was for this QP only
		p.nic.streams.finish(p)
		p.close()
	}
}
