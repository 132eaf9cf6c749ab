package softnic

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/softnic/stream"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// QP is a queue pair of the software NIC.
//
// Lock order: cfg, then a netPort's mu, then a CQ's armMu, then a CQ's mu, then rq, then sq. Control messages and calls into other NICs are made
// with none of the spin locks held, except that sending a control message (which only queues it) is always allowed.
type QP struct {
	nic    *NIC
	pd     *PD
	typ    ib.QPType
	qpn    ib.QPN
	cap    ib.QPCap
	scq    *CQ
	rcq    *CQ
	srq    *SRQ // shared, or a UD QP's own receive queue
	ownSRQ bool
	sigAll bool
	full   bool // stores must be full fences: no asymmetric barrier in this process
	sIdx   int  // member index in scq
	rIdx   int  // and in rcq

	refill func() // see OnEmpty

	cfg    sync.Mutex     // serialises Modify and Close
	stream *stream.Socket // what the QP is to be connected by, before RTR; guarded by cfg
	closed atomic.Bool

	// The send side.
	sq       ring.SpinLock
	state    atomic.Uint32 // ib.QPState; written under sq
	attr     ib.QPAttr     // guarded by sq
	pv       *peerView     // guarded by sq; nil: the peer is not there (yet)
	link     *link         // guarded by sq: the link of a connected QP
	wire     *wireQP       // guarded by sq: its connection over a network, instead of a link
	flushNet *netPort      // guarded by sq: has packets of this QP that were not handed to the system yet
	rcache   [4]*remoteRegion
	hcache   [4]*remoteRegion
	pend     []pendingWR // ring of requests that could not be executed at once; allocated at first need
	pendHead uint32
	pendLen  uint32
	stall    stall
	asked    question // of the head request; guarded by sq
	assist   assist
	between  []byte  // a buffer for foreign memory; guarded by sq
	result   [8]byte // of an atomic; guarded by sq
	met      bool    // the peer has been there since RTR; guarded by sq
	lost     bool    // the peer's NIC has gone, and no request has said so yet; guarded by sq
	cut      error   // why the stream that it was connected by has ended; guarded by sq
	drained  drain   // guarded by sq
	stalled  bool    // in the NIC's set of QPs to retry; guarded by sq
	shown    shown
	done     observe.Traffic // requests that have completed with success; guarded by sq
	rnrs     uint64          // attempts in vain, for want of a receive; guarded by sq

	// Send completions: written under sq, taken under scq.mu.
	sc     []sendCompletion
	scMask uint32
	scTail uint32 // release store by the poster, atomic load by the poller
	scNext uint32 // guarded by sq: entries below are filled, to be published
	_      [cacheLine]byte
	scHead uint32 // release store by the poller, atomic load by the poster

	// The receive side. Posted and head count since Reset.
	rq       ring.SpinLock
	posted   uint32 // release store under rq, atomic load by the poller
	head     uint32 // release store under rcq.mu, atomic load by posters
	recs     []recvRec
	recMask  uint32
	recSGE   []descriptor // cap.MaxRecvSGE for each rec
	in       atomic.Pointer[inbound]
	ins      atomic.Pointer[[]*inbound] // UD: one for each peer that sends
	epoch    atomic.Uint32              // counts resets: what was found out before one does not concern the QP after it
	flushing atomic.Bool
	lastWQE  bool
	commEst  bool
	got      observe.Traffic // receives whose completions were polled; guarded by rcq.mu
}

// drain is how far a QP in SQD is.
type drain uint8

const (
	drainedYes     drain = iota // nothing is under way
	draining                    // the head request had begun and is waited for
	drainingNotify              // likewise, and EventSQDrained is wanted
	drainedNotify               // the event is due
)

type sendCompletion struct {
	id     uint64
	n      uint32
	status ib.WCStatus
	op     ib.WCOpcode
}

// descriptor is one scatter element as the shared rings hold it.
type descriptor struct {
	addr   uint64
	lenHdl uint64 // u32 length, u32 handle
}

func makeDesc(addr uint64, n, handle uint32) descriptor {
	return descriptor{addr, uint64(n) | uint64(handle)<<32}
}

// recvRec is the owner's private record of a posted receive; what peers see of it is a copy.
type recvRec struct {
	id      uint64
	total   uint32
	sges    uint16
	state   uint8
	private bool // some of it is memory that another process cannot map
	staged  *stageBuf
}

const (
	maxQPs     = 1 << 18
	maxUDDepth = 4096
)

func pow2(n int) uint32 { return 1 << bits.Len32(uint32(max(n, 1)-1)) }

// CreateQP implements driver.PD.
func (pd *PD) CreateQP(cfg driver.QPConfig) (driver.QP, error) {
	n := pd.nic
	scq, ok1 := cfg.SendCQ.(*CQ)
	rcq, ok2 := cfg.RecvCQ.(*CQ)
	if !ok1 || !ok2 || scq.nic != n || rcq.nic != n {
		return nil, errors.New("a QP needs a send CQ and a receive CQ of its own context")
	}
	if cfg.Type != ib.RC && cfg.Type != ib.UC && cfg.Type != ib.UD {
		return nil, fmt.Errorf("%w: QP type %v", errors.ErrUnsupported, cfg.Type)
	}
	c := cfg.Cap
	if c.MaxSendWR < 0 || c.MaxRecvWR < 0 || c.MaxSendWR > maxDepth || c.MaxRecvWR > maxDepth ||
		c.MaxSendSGE < 0 || c.MaxRecvSGE < 0 || c.MaxSendSGE > maxSGE || c.MaxRecvSGE > maxSGE || c.MaxInline < 0 || c.MaxInline > maxInline {
		return nil, fmt.Errorf("the software NIC grants up to %d work requests a queue, %d SGEs and %d bytes inline; asked for %+v",
			maxDepth, maxSGE, maxInline, c)
	}
	c.MaxSendWR = int(pow2(c.MaxSendWR))
	c.MaxSendSGE, c.MaxRecvSGE = max(c.MaxSendSGE, 1), max(c.MaxRecvSGE, 1)
	q := &QP{nic: n, pd: pd, typ: cfg.Type, scq: scq, rcq: rcq, sigAll: cfg.SignalAll, full: !asymmetric()}
	switch {
	case cfg.SRQ != nil:
		s, ok := cfg.SRQ.(*SRQ)
		if !ok || s.nic != n {
			return nil, errors.New("the SRQ belongs to another context")
		}
		if cfg.Type == ib.UC {
			return nil, fmt.Errorf("%w: SRQ on a UC QP", errors.ErrUnsupported)
		}
		q.srq = s
		c.MaxRecvWR, c.MaxRecvSGE = 0, 0
	case cfg.Type == ib.UD:
		c.MaxRecvWR = int(pow2(c.MaxRecvWR))
		s, err := newSRQ(n, pd, driver.SRQConfig{MaxWR: c.MaxRecvWR, MaxSGE: c.MaxRecvSGE}, true)
		if err != nil {
			return nil, err
		}
		q.srq, q.ownSRQ = s, true
	default:
		c.MaxRecvWR = int(pow2(c.MaxRecvWR))
		q.recs = make([]recvRec, c.MaxRecvWR)
		q.recMask = uint32(c.MaxRecvWR - 1)
		q.recSGE = make([]descriptor, c.MaxRecvWR*c.MaxRecvSGE)
	}
	q.cap = c
	q.sc = make([]sendCompletion, c.MaxSendWR)
	q.scMask = uint32(c.MaxSendWR - 1)
	if err := pd.addChild(); err != nil {
		return nil, err
	}
	fail := func(err error) (driver.QP, error) {
		pd.dropChild()
		if q.ownSRQ {
			q.srq.destroy()
		}
		return nil, err
	}
	if q.srq != nil {
		if err := q.srq.attachQP(); err != nil {
			return fail(err)
		}
	}
	recvCap := c.MaxRecvWR
	if q.srq != nil {
		recvCap = 0 // shared: what the QPs of an SRQ complete together is bounded by the SRQ, not by each
	}
	var err error
	if scq == rcq {
		if q.sIdx, err = scq.attach(q, c.MaxSendWR+recvCap); err != nil {
			return fail(err)
		}
		q.rIdx = q.sIdx
	} else {
		if q.sIdx, err = scq.attach(q, c.MaxSendWR); err != nil {
			return fail(err)
		}
		if q.rIdx, err = rcq.attach(q, recvCap); err != nil {
			scq.detach(q.sIdx, c.MaxSendWR)
			return fail(err)
		}
	}
	if err := n.addQP(q); err != nil {
		q.detachCQs()
		return fail(err)
	}
	return q, nil
}

func (q *QP) recvCap() int {
	if q.srq != nil {
		return 0
	}
	return q.cap.MaxRecvWR
}

func (q *QP) detachCQs() {
	if q.scq == q.rcq {
		q.scq.detach(q.sIdx, q.cap.MaxSendWR+q.recvCap())
		return
	}
	q.scq.detach(q.sIdx, q.cap.MaxSendWR)
	q.rcq.detach(q.rIdx, q.recvCap())
}

// QPN implements driver.QP.
func (q *QP) QPN() ib.QPN { return q.qpn }

// Cap implements driver.QP.
func (q *QP) Cap() ib.QPCap { return q.cap }

// Path implements driver.PathReporter.
func (q *QP) Path() string {
	q.sq.Lock()
	defer q.sq.Unlock()
	switch {
	case q.wire != nil:
		return q.wire.path()
	case q.link == nil:
		return ""
	}
	return q.link.path
}

// Query implements driver.QP.
func (q *QP) Query() (ib.QPAttr, error) {
	if q.closed.Load() {
		return ib.QPAttr{}, driver.ErrClosed
	}
	q.sq.Lock()
	defer q.sq.Unlock()
	a := q.attr
	a.State = ib.QPState(q.state.Load())
	a.CurState = a.State
	return a, nil
}

// State is the state, for those who hold locks of the NIC.
func (q *QP) State() ib.QPState { return ib.QPState(q.state.Load()) }

// Modify implements driver.QP.
func (q *QP) Modify(ctx context.Context, attr *ib.QPAttr, mask ib.QPAttrMask) error {
	q.cfg.Lock()
	defer q.cfg.Unlock()
	if q.closed.Load() {
		return driver.ErrClosed
	}
	cur := ib.QPState(q.state.Load())
	if mask&ib.AttrCurState != 0 && attr.CurState != cur {
		return fmt.Errorf("%w: the QP is in %v, not in %v", driver.ErrState, cur, attr.CurState)
	}
	next := cur
	if mask&ib.AttrState != 0 {
		next = attr.State
	}
	if err := q.checkAttr(attr, mask); err != nil {
		return err
	}
	switch {
	case next == ib.Reset:
		q.reset()
		return nil
	case next == ib.Err:
		q.setAttr(attr, mask)
		q.toErrorLocked(0, false)
		return nil
	case next == ib.RTR && cur == ib.Init:
		return q.toRTR(ctx, attr, mask)
	}
	q.setAttr(attr, mask)
	q.sq.Lock()
	if ib.QPState(q.state.Load()) != cur { // an error came in between
		q.sq.Unlock()
		return fmt.Errorf("%w: the QP went to %v meanwhile", driver.ErrState, ib.QPState(q.state.Load()))
	}
	q.state.Store(uint32(next))
	notify := mask&ib.AttrSQDNotify != 0 && attr.SQDNotify
	a, w := q.attr, q.wire
	if w != nil && next == ib.RTS {
		w.toRTS()
	}
	begun := q.pendLen > 0 && q.stall.kind != stallNone || w != nil && w.given > 0
	drained := false
	if next == ib.SQD && cur == ib.RTS {
		switch {
		case begun && notify:
			q.drained = drainingNotify
		case begun:
			q.drained = draining
		default:
			q.drained = drainedYes
			drained = notify
		}
	}
	q.sq.Unlock()
	if w != nil && mask&(ib.AttrMinRNRTimer|ib.AttrMaxDestRdAtomic) != 0 {
		w.changeResponder(&a)
	}
	if mask&(ib.AttrAccess|ib.AttrQKey|ib.AttrMaxDestRdAtomic) != 0 {
		q.eachInbound(func(in *inbound) { in.setRights(q) })
	}
	if drained {
		q.nic.raise(driver.AsyncEvent{Type: ib.EventSQDrained, QP: q})
	}
	if next == ib.RTS {
		q.progress()
	}
	return nil
}

func (q *QP) checkAttr(a *ib.QPAttr, mask ib.QPAttrMask) error {
	bad := func(what string, v any) error {
		return fmt.Errorf("modify QP %d: %s %v is out of range on the software NIC", q.qpn, what, v)
	}
	switch {
	case mask&ib.AttrPort != 0 && a.Port != 1:
		return bad("Port", a.Port)
	case mask&ib.AttrPKeyIndex != 0 && a.PKeyIndex != 0:
		return bad("PKeyIndex", a.PKeyIndex)
	case mask&ib.AttrPathMTU != 0 && a.PathMTU.Bytes() == 0:
		return bad("PathMTU", uint8(a.PathMTU))
	case mask&ib.AttrDestQPN != 0 && a.DestQPN > ib.MaxQPN:
		return bad("DestQPN", a.DestQPN)
	case mask&ib.AttrRQPSN != 0 && a.RQPSN > ib.MaxPSN:
		return bad("RQPSN", a.RQPSN)
	case mask&ib.AttrSQPSN != 0 && a.SQPSN > ib.MaxPSN:
		return bad("SQPSN", a.SQPSN)
	case mask&ib.AttrMinRNRTimer != 0 && a.MinRNRTimer > 31:
		return bad("MinRNRTimer", a.MinRNRTimer)
	case mask&ib.AttrAckTimeout != 0 && a.AckTimeout > 31:
		return bad("AckTimeout", a.AckTimeout)
	case mask&ib.AttrRetryCount != 0 && a.RetryCount > ib.MaxRetry:
		return bad("RetryCount", a.RetryCount)
	case mask&ib.AttrRNRRetry != 0 && a.RNRRetry > ib.MaxRetry:
		return bad("RNRRetry", a.RNRRetry)
	case mask&ib.AttrMaxRdAtomic != 0 && a.MaxRdAtomic > maxPaths:
		return bad("MaxRdAtomic", a.MaxRdAtomic)
	case mask&ib.AttrMaxDestRdAtomic != 0 && a.MaxDestRdAtomic > maxPaths:
		return bad("MaxDestRdAtomic", a.MaxDestRdAtomic)
	case mask&ib.AttrAV != 0 && !q.nic.hasGID(a.AH.SGIDIndex):
		return bad("AH.SGIDIndex", a.AH.SGIDIndex)
	case mask&ib.AttrAV != 0 && a.AH.DGID.IsZero():
		return bad("AH.DGID", a.AH.DGID)
	case mask&ib.AttrAccess != 0 && a.Access&^(ib.AccessRemote|ib.AccessFlushGlobal|ib.AccessLocalWrite|ib.AccessMWBind) != 0:
		return bad("Access", a.Access)
	}
	return nil
}

func (q *QP) setAttr(a *ib.QPAttr, mask ib.QPAttrMask) {
	q.sq.Lock()
	defer q.sq.Unlock()
	d := &q.attr
	set := func(m ib.QPAttrMask, f func()) {
		if mask&m != 0 {
			f()
		}
	}
	set(ib.AttrPKeyIndex, func() { d.PKeyIndex = a.PKeyIndex })
	set(ib.AttrPort, func() { d.Port = a.Port })
	set(ib.AttrQKey, func() { d.QKey = a.QKey })
	set(ib.AttrAccess, func() { d.Access = a.Access })
	set(ib.AttrAV, func() { d.AH = a.AH })
	set(ib.AttrPathMTU, func() { d.PathMTU = a.PathMTU })
	set(ib.AttrDestQPN, func() { d.DestQPN = a.DestQPN })
	set(ib.AttrRQPSN, func() { d.RQPSN = a.RQPSN })
	set(ib.AttrSQPSN, func() { d.SQPSN = a.SQPSN })
	set(ib.AttrMaxDestRdAtomic, func() { d.MaxDestRdAtomic = a.MaxDestRdAtomic })
	set(ib.AttrMaxRdAtomic, func() { d.MaxRdAtomic = a.MaxRdAtomic })
	set(ib.AttrMinRNRTimer, func() { d.MinRNRTimer = a.MinRNRTimer })
	set(ib.AttrAckTimeout, func() { d.AckTimeout = a.AckTimeout })
	set(ib.AttrRetryCount, func() { d.RetryCount = a.RetryCount })
	set(ib.AttrRNRRetry, func() { d.RNRRetry = a.RNRRetry })
	set(ib.AttrSQDNotify, func() { d.SQDNotify = a.SQDNotify })
}

// toRTR makes the QP memReach: for RC and UC it finds the link to the peer and gives the peer a block to write to.
func (q *QP) toRTR(ctx context.Context, attr *ib.QPAttr, mask ib.QPAttrMask) error {
	if q.typ == ib.UD {
		q.setAttr(attr, mask)
		q.state.Store(uint32(ib.RTR))
		return q.attachNet()
	}
	if q.stream != nil {
		return q.toRTRStream(attr, mask)
	}
	if attr.AH.SGIDIndex != 0 {
		return q.toRTRWire(attr, mask)
	}
	l, err := q.nic.linkTo(ctx, attr.AH.DGID)
	if err != nil {
		return err
	}
	q.setAttr(attr, mask)
	if err := l.bindView(q); err != nil {
		return err
	}
	q.sq.Lock()
	q.link = l
	q.sq.Unlock()
	in, err := q.openInbound(l, uint32(attr.DestQPN))
	if err != nil {
		l.unbindView(q)
		q.sq.Lock()
		q.link = nil
		q.sq.Unlock()
		return err
	}
	q.sq.Lock()
	q.state.Store(uint32(ib.RTR))
	q.sq.Unlock()
	if l.reason() != nil { // it ended while we connected: nobody else tells us
		q.nic.later(func() { q.linkDown(l, l.reason()) })
		return nil
	}
	l.pushRegions(q.pd)
	m := in.connect
	msg := ctl{kind: ctlConnect, qpn: uint32(q.qpn), dst: uint32(attr.DestQPN)}
	m.into(&msg)
	l.send(msg)
	if v := l.waitingView(q.qpn, attr.DestQPN); v != nil {
		q.tryConnect(l, v, true)
	}
	return nil
}

// tryConnect takes the peer's block as the place to send to, if the QP expects that peer. If the description was waiting,
// the peer may have withdrawn it since it was looked up; if it does so from now on, peerLeft follows.
func (q *QP) tryConnect(l *link, v *peerView, waited bool) {
	q.sq.Lock()
	if waited && !l.stillWaiting(q.qpn, v) {
		q.sq.Unlock()
		return
	}
	s := ib.QPState(q.state.Load())
	ok := q.link == l && q.attr.DestQPN == v.qpn && q.pv == nil && (s == ib.RTR || s == ib.RTS || s == ib.SQD) &&
		l.reason() == nil // from now on linkDown comes before the memory goes
	if ok {
		q.pv = v
		q.met = true
	}
	more := ok && q.pendLen > 0
	q.sq.Unlock()
	if more {
		q.progress()
	}
}

// peerLeft: the peer destroyed or reset its QP. As on a wire, we only notice by requests that nobody answers.
func (q *QP) peerLeft(l *link, peer ib.QPN) {
	q.sq.Lock()
	defer q.sq.Unlock()
	if q.link == l && q.attr.DestQPN == peer {
		q.pv = nil
	}
}

// linkDown: the peer's NIC is gone. The request under way gets RETRY_EXC_ERR, later ones and receives are flushed.
func (q *QP) linkDown(l *link, _ error) {
	if q.typ == ib.UD {
		q.dropPeer(l, time.Millisecond)
		return
	}
	q.sq.Lock()
	if q.link != l {
		q.sq.Unlock()
		return
	}
	q.pv = nil
	clear(q.rcache[:])
	clear(q.hcache[:])
	if !connected(ib.QPState(q.state.Load())) {
		q.sq.Unlock()
		return
	}
	q.unanswered()
	epoch := q.epoch.Load() // a reset in between has let go of the link, and what comes behind it has another
	q.sq.Unlock()
	q.toErrorIn(epoch, ib.EventQPFatal, true)
}

// remoteFault: a request of the peer broke a rule and was refused: the responder goes to the error state too (IBA 9.9.3).
// epoch is the QP's from when that was found out.
func (q *QP) remoteFault(epoch uint32, ev ib.EventType) {
	if ev != ib.EventQPAccessErr && ev != ib.EventQPReqErr && ev != ib.EventQPFatal {
		ev = ib.EventQPFatal
	}
	q.errorLater(epoch, ev, true)
}

// errorLater is toError where locks are held, unless the QP is reset first.
func (q *QP) errorLater(epoch uint32, ev ib.EventType, raise bool) {
	q.nic.later(func() { q.toErrorIn(epoch, ev, raise) })
}

// toError moves the QP to ERR and flushes it.
func (q *QP) toError(ev ib.EventType, raise bool) {
	q.cfg.Lock()
	defer q.cfg.Unlock()
	if !q.closed.Load() {
		q.toErrorLocked(ev, raise)
	}
}

// toErrorIn is toError, unless the QP has been reset since its epoch was that.
func (q *QP) toErrorIn(epoch uint32, ev ib.EventType, raise bool) {
	q.cfg.Lock()
	defer q.cfg.Unlock()
	if !q.closed.Load() && q.epoch.Load() == epoch {
		q.toErrorLocked(ev, raise)
	}
}

// toErrorLocked is toError with cfg held.
func (q *QP) toErrorLocked(ev ib.EventType, raise bool) {
	q.sq.Lock()
	s := ib.QPState(q.state.Load())
	if s == ib.Reset || s == ib.Err && q.flushing.Load() {
		q.sq.Unlock()
		return
	}
	q.state.Store(uint32(ib.Err))
	w := q.wire
	if w != nil {
		w.stop()
	}
	q.flushPending()
	q.publishSC()
	q.sq.Unlock()
	q.shutInbound()
	if w != nil {
		w.flushTaken()
	}
	q.flushing.Store(true)
	q.scq.signal(q.sIdx, true)
	q.rcq.signal(q.rIdx, true)
	if raise {
		q.nic.raise(driver.AsyncEvent{Type: ev, QP: q})
	}
	if q.srq != nil && !q.ownSRQ && !q.lastWQE {
		q.lastWQE = true
		q.nic.raise(driver.AsyncEvent{Type: ib.EventLastWQEReached, QP: q})
	}
}

// shutInbound stops peers from writing and waits for those in the middle of it.
func (q *QP) shutInbound() {
	any := false
	q.eachInbound(func(in *inbound) {
		in.setState(qpClosed)
		any = true
	})
	if !any {
		return
	}
	heavyBarrier()
	q.eachInbound(func(in *inbound) { in.waitIdle() })
}

func (q *QP) eachInbound(f func(*inbound)) {
	if in := q.in.Load(); in != nil {
		f(in)
	}
	if ins := q.ins.Load(); ins != nil {
		for _, in := range *ins {
			f(in)
		}
	}
}

// reset brings the QP back to RESET: queues are empty, completions that were not polled are gone. Called with cfg held.
func (q *QP) reset() {
	q.sq.Lock()
	q.epoch.Add(1)
	q.state.Store(uint32(ib.Reset))
	l := q.link
	w := q.wire
	if w != nil {
		w.stop()
	}
	q.pv, q.link, q.wire = nil, nil, nil
	q.met, q.lost, q.cut, q.drained = false, false, nil, drainedYes
	clear(q.rcache[:])
	clear(q.hcache[:])
	for q.pendLen > 0 {
		q.popPending()
	}
	q.assist, q.asked = assist{}, question{}
	q.shown, q.done, q.rnrs = shown{}, observe.Traffic{}, 0
	q.attr = ib.QPAttr{}
	q.sq.Unlock()
	if l != nil {
		l.unbindView(q)
	}
	if w != nil {
		w.detach()
	}
	if q.stream != nil {
		q.stream.Close()
		q.stream = nil
	}
	if q.typ == ib.UD {
		q.detachNet()
	}
	q.shutInbound()

	q.rcq.mu.Lock()
	q.epoch.Add(1) // again: until here Poll could meet completions of before
	in := q.in.Swap(nil)
	ins := q.ins.Swap(nil)
	q.rq.Lock()
	for i := range q.recs {
		q.recs[i].staged.free(q.nic)
		q.recs[i] = recvRec{}
	}
	atomic.StoreUint32(&q.posted, 0)
	atomic.StoreUint32(&q.head, 0)
	q.flushing.Store(false)
	q.lastWQE, q.commEst, q.got = false, false, observe.Traffic{}
	q.rq.Unlock()
	q.rcq.mu.Unlock()

	q.scq.mu.Lock()
	q.sq.Lock()
	q.scNext = 0
	atomic.StoreUint32(&q.scTail, 0)
	atomic.StoreUint32(&q.scHead, 0)
	q.sq.Unlock()
	q.scq.mu.Unlock()

	if q.srq != nil {
		q.srq.giveUp(q, in, ins)
	}
	if in != nil {
		in.release()
	}
	if ins != nil {
		for _, in := range *ins {
			in.release()
		}
	}
	if q.ownSRQ {
		q.srq.clear()
	}
}

// Close implements driver.QP.
func (q *QP) Close() error {
	q.cfg.Lock()
	defer q.cfg.Unlock()
	if q.closed.Swap(true) {
		return driver.ErrClosed
	}
	q.reset()
	q.nic.dropQP(q)
	q.detachCQs()
	if q.srq != nil {
		q.srq.detachQP()
		if q.ownSRQ {
			q.srq.destroy()
		}
	}
	q.pd.dropChild()
	return nil
}

// stall says why the head of the send queue cannot be executed now.
type stall struct {
	kind  stallKind
	since time.Time // of the present reason
	next  time.Time // RNR: when the next attempt counts
	tries int
}

type stallKind uint8

const (
	stallNone    stallKind = iota
	stallRNR               // no receive is posted
	stallPeer              // the peer's QP is not there, or not ready
	stallResolve           // a region of the peer is being mapped
	stallAssist            // the peer's NIC works for us
	stallNet               // a datagram cannot be sent just now
	stallRefill            // the peer's NIC looks for receives
)
