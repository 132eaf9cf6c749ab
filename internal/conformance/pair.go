package conformance

import (
	"net/netip"

	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// end is one end of a connected pair: a QP, its CQs, and memory.
type end struct {
	*Side
	*QP
	mem    *Mem
	turns  int32  // times that it was taken out of RESET
	stream handle // that its peer has made for it; 0: none
}

const onlyReliable = "over TCP there are reliable connections only"

// link is two ends that are connected.
type link struct{ a, b *end }

// linkOpts says what is not usual about a pair.
type linkOpts struct {
	typ                    ib.QPType
	depth, recvDepth, sges int
	inline                 int
	signalAll              bool
	rnrRetry, retry        uint8
	retryA                 uint8 // retry of the first end, if it is not that of both; 0: it is
	minRNR                 ib.RNRTimer
	access                 ib.Access // of both QPs
	rdAtomic, destRdAtomic uint8
	memSize                int
	memAccess              ib.Access
	mtu                    ib.MTU
	srqA, srqB             handle
	scqA, rcqA, scqB, rcqB *CQ
	cqEntries              int
	noConnect              bool
	qkeyA, qkeyB           ib.QKey
	sliceMem, odd          bool // odd: a slice whose address is
}

func (c *C) opts(typ ib.QPType) linkOpts {
	return linkOpts{
		typ: typ, depth: 64, recvDepth: 64, sges: min(4, c.A.dev.Attr.MaxSGE), rnrRetry: ib.RNRRetryForever, retry: 7, minRNR: 1,
		access: ib.AccessRemote, rdAtomic: uint8(min(4, c.A.dev.Attr.MaxQPInitRdAtom)), destRdAtomic: uint8(min(4, c.A.dev.Attr.MaxQPRdAtomic)),
		memSize: 64 << 10, memAccess: accessAll, mtu: min(c.A.dev.Port.ActiveMTU, c.B.dev.Port.ActiveMTU), cqEntries: 256,
		qkeyA: 0x1111, qkeyB: 0x2222,
	}
}

// pair makes a connected pair of QPs with the usual options; changes may alter them.
func (c *C) pair(typ ib.QPType, changes ...func(*linkOpts)) link {
	c.Helper()
	o := c.opts(typ)
	for _, f := range changes {
		f(&o)
	}
	return c.pairOn(c.A, c.B, o)
}

func (c *C) pairOn(a, b *Side, o linkOpts) link {
	c.Helper()
	if o.typ != ib.RC && (lossy != "" || c.lossy) {
		c.Skip("an unreliable service on a network that loses packets")
	}
	if o.typ != ib.RC && c.streams {
		c.Skip(onlyReliable)
	}
	if o.typ == ib.UD || o.typ == ib.UC {
		o.memAccess &^= ib.AccessRemoteAtomic | ib.AccessRemoteRead
	}
	l := link{
		c.end(a, o, o.scqA, o.rcqA, o.srqA),
		c.end(b, o, o.scqB, o.rcqB, o.srqB),
	}
	if !o.noConnect {
		c.connect(l, o)
	}
	return l
}

func (c *C) end(s *Side, o linkOpts, scq, rcq *CQ, srq handle) *end {
	c.Helper()
	if scq == nil {
		scq = s.cq(o.cqEntries)
	}
	if rcq == nil {
		rcq = s.cq(o.cqEntries)
	}
	cfg := qp.Config{Type: o.typ, SendDepth: o.depth, RecvDepth: o.recvDepth, SendSGE: o.sges, RecvSGE: o.sges, MaxInline: o.inline, SignalAll: o.signalAll}
	if srq != 0 {
		cfg.RecvDepth, cfg.RecvSGE = 0, 0
	}
	e := &end{Side: s, QP: s.qp(qpOpts{scq: scq, rcq: rcq, srq: srq, cfg: cfg})}
	if o.memSize > 0 {
		e.mem = &Mem{s, do(s, opMem, memArgs{PD: s.pd, Size: o.memSize, Access: o.memAccess, Slice: o.sliceMem, Odd: o.odd}), o.memSize}
	}
	return e
}

// connect takes both ends from RESET to RTS.
func (c *C) connect(l link, o linkOpts) {
	c.Helper()
	if c.cmOnly() {
		c.connectCM(l, o)
		return
	}
	for _, e := range []*end{l.a, l.b} {
		qkey := o.qkeyA
		if e == l.b {
			qkey = o.qkeyB
		}
		e.toInit(o, qkey)
	}
	l.a.toRTR(o, l.b)
	l.b.toRTR(o, l.a)
	oa := o
	if o.retryA > 0 {
		oa.retry = o.retryA
	}
	l.a.toRTS(oa)
	l.b.toRTS(o)
}

func (e *end) toInit(o linkOpts, qkey ib.QKey) {
	e.c.Helper()
	e.turns++
	if o.typ == ib.UD {
		e.modify(ib.QPAttr{State: ib.Init, Port: 1, QKey: qkey}, ib.AttrState|ib.AttrPort|ib.AttrPKeyIndex|ib.AttrQKey)
		return
	}
	access := o.access
	if o.typ == ib.UC {
		access &= ib.AccessRemoteWrite
	}
	e.modify(ib.QPAttr{State: ib.Init, Port: 1, Access: access}, ib.AttrState|ib.AttrPort|ib.AttrPKeyIndex|ib.AttrAccess)
}

// cmOnly reports whether the devices are iWARP's: QPs are connected by the connection manager, and a message is on its way when
// its request completes.
func (c *C) cmOnly() bool { return c.A.dev.Attr.Caps.Has(ib.CapCMOnly) }

// connectCM lets a dial b.
func (c *C) connectCM(l link, o linkOpts) {
	c.Helper()
	p := qp.CMParams{Access: o.access, MaxRdAtomic: orNone(o.rdAtomic), MaxDestRdAtomic: orNone(o.destRdAtomic), RetryCount: orNone(o.retry),
		RNRRetry: orNone(o.rnrRetry), MinRNRTimer: o.minRNR.Duration()}
	if l.b.listener == nil {
		listener := do(l.b.Side, opListen, netip.AddrPortFrom(l.b.dev.Addr, 0))
		l.b.listener = &listener
	}
	accepted := make(chan error, 1)
	go func() {
		_, err := call(l.b.Side, opAccept, cmArgs{QP: l.b.H, Listener: l.b.listener.H, Params: p})
		accepted <- err
	}()
	_, err := call(l.a.Side, opDial, cmArgs{QP: l.a.H, Local: netip.AddrPortFrom(l.a.dev.Addr, 0), Remote: l.b.listener.Addr, Params: p})
	if err != nil {
		c.Fatalf("%s: rdma_connect: %v", l.a.name, err)
	}
	if err := <-accepted; err != nil {
		c.Fatalf("%s: rdma_accept: %v", l.b.name, err)
	}
	if o.rdAtomic > 0 {
		l.a.peer, l.b.peer = l.b.Side, l.a.Side
	}
}

// orNone is a count as qp's parameters have it.
func orNone(n uint8) int {
	if n == 0 {
		return -1
	}
	return int(n)
}

// psn is the first PSN that the end sends: just before the counter wraps, and different for each QP, and each time that it is
// connected, lest what is on its way from before be taken for something new.
func (e *end) psn() ib.PSN { return ib.MaxPSN.Add(-int32(e.QPN%8) - (e.turns-1)<<12) }

func (e *end) rtrAttr(o linkOpts, to *end) (ib.QPAttr, ib.QPAttrMask) {
	if o.typ == ib.UD {
		return ib.QPAttr{State: ib.RTR}, ib.AttrState
	}
	attr := ib.QPAttr{State: ib.RTR, AH: e.Side.ahTo(to.Side), PathMTU: o.mtu, DestQPN: to.QPN, RQPSN: to.psn(), MaxDestRdAtomic: o.destRdAtomic, MinRNRTimer: o.minRNR}
	mask := ib.AttrState | ib.AttrAV | ib.AttrPathMTU | ib.AttrDestQPN | ib.AttrRQPSN
	if o.typ == ib.RC {
		mask |= ib.AttrMaxDestRdAtomic | ib.AttrMinRNRTimer
	}
	return attr, mask
}

func (e *end) toRTR(o linkOpts, to *end) {
	e.c.Helper()
	attr, mask := e.rtrAttr(o, to)
	if e.c.streams {
		e.useStream(to)
	}
	e.modify(attr, mask)
}

func (e *end) rtsAttr(o linkOpts) (ib.QPAttr, ib.QPAttrMask) {
	attr := ib.QPAttr{State: ib.RTS, SQPSN: e.psn(), AckTimeout: 14, RetryCount: o.retry, RNRRetry: o.rnrRetry, MaxRdAtomic: o.rdAtomic}
	mask := ib.AttrState | ib.AttrSQPSN
	if o.typ == ib.RC {
		mask |= ib.AttrAckTimeout | ib.AttrRetryCount | ib.AttrRNRRetry | ib.AttrMaxRdAtomic
	}
	return attr, mask
}

func (e *end) toRTS(o linkOpts) {
	e.c.Helper()
	attr, mask := e.rtsAttr(o)
	e.modify(attr, mask)
}

// ahTo is the address of a side's port, as seen from s.
func (s *Side) ahTo(to *Side) ib.AHAttr {
	if to.dev.Port.LinkLayer == ib.LinkInfiniBand { // within a subnet the LID suffices
		return ib.AHAttr{DLID: to.dev.Port.LID, Port: 1}
	}
	return ib.AHAttr{DGID: to.dev.GID, SGIDIndex: s.dev.GIDIndex, HopLimit: 64, Port: 1, DLID: to.dev.Port.LID, UDPPort: to.dev.UDPPort}
}

// ah makes an address handle for a side's port.
func (s *Side) ah(to *Side) ib.AHNum {
	s.c.Helper()
	return do(s, opAH, ahArgs{s.pd, s.ahTo(to)}).Num
}

// alive checks that the pair still works: a message each way.
func (l link) alive(c *C) {
	c.Helper()
	for i, dir := range []link{l, {l.b, l.a}} {
		id := uint64(9000 + i)
		dir.b.recv(id, dir.b.mem.sge(0, 64))
		dir.a.post(wrSend(id, dir.a.mem.sge(0, 64)))
		dir.a.sent(want{ID: id, Op: ib.WCSend, Len: anyLen})
		dir.b.received(want{ID: id, Op: ib.WCRecv, Len: 64})
	}
}
