package softnic

import (
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

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
	peers    uint32                     // UD: counts those that have had a block; guarded by cfg
	epoch    atomic.Uint32              // counts resets: what was found out before one does not concern the QP after it
	flushing atomic.Bool
	lastWQE  bool
	commEst  bool
	got      observe.Traffic // receives whose completions were polled; guarded by rcq.mu

	sQueued, rQueued int // completions that were queued when the CQs last counted them; guarded by scq.mu and rcq.mu
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

const maxQPs = 1 << 18

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
	var err error
	if q.sIdx, err = scq.attach(q); err != nil {
		return fail(err)
	}
	q.rIdx = q.sIdx
	if scq != rcq {
		if q.rIdx, err = rcq.attach(q); err != nil {
			scq.detach(q.sIdx)
			return fail(err)
		}
	}
	if err := n.addQP(q); err != nil {
		q.detachCQs()
		return fail(err)
	}
	return q, nil
}

func (q *QP) detachCQs() {
	q.scq.detach(q.sIdx)
	if q.scq != q.rcq {
		q.rcq.detach(q.rIdx)
	}
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

// Draining reports whether a request that was under way when the QP went to SQD still is.
func (q *QP) Draining() bool {
	q.sq.Lock()
	defer q.sq.Unlock()
	return ib.QPState(q.state.Load()) == ib.SQD && (q.drained == draining || q.drained == drainingNotify)
}

// State is the state, for those who hold locks of the NIC.
func (q *QP) State() ib.QPState { return ib.QPState(q.state.Load()) }
