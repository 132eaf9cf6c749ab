// Package qp makes queue pairs and shared receive queues, takes them through their states, and posts work requests.
//
// The life of a connected queue pair:
//
//	q, err := qp.New(pd, &qp.Config{Type: ib.RC, SendCQ: cq, RecvCQ: cq})
//	err = q.Init(ctx, 1, ib.AccessRemoteRead|ib.AccessRemoteWrite)  // from here on receives may be posted
//	... exchange q.QPN(), the GID and the starting PSN with the peer ...
//	err = q.Connect(ctx, qp.ConnectParams{Remote: theirs, LocalPSN: mine})
//	n, err := q.PostSend(wrs)
//
// One of datagrams, or of Ethernet frames, has no peer: see ActivateUD, and ActivateRaw and Steer.
//
// Completions arrive in the verbs.CQs that the queue pair was made with.
package qp

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/life"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Config describes a queue pair. Zero fields take their defaults; defaults are lowered to what the device can do,
// while a value that was asked for and exceeds the device's limit is an error. New does not change it. What was
// granted, at least what was asked for, can be read from Cap.
type Config struct {
	Type   ib.QPType // default ib.RC
	SendCQ *verbs.CQ // required
	RecvCQ *verbs.CQ // default SendCQ
	// SRQ is where receives are taken from; nil: the queue pair has its own receive queue.
	SRQ *SRQ
	// SendDepth and RecvDepth are how many send and receive work requests can be outstanding; default 128. RecvDepth
	// must be zero with an SRQ.
	SendDepth int
	RecvDepth int
	// SendSGE and RecvSGE are how many scatter/gather elements one work request can have; default 4 and 1.
	SendSGE int
	RecvSGE int
	// MaxInline is how many bytes SendWR.Inline can have; default 64. Of ib.RawPacket it is at least ib.DeviceAttr.MinFrameInline.
	MaxInline int
	// SignalAll gives every send work request a completion, as if it had ib.SendSignaled.
	SignalAll bool
	// Loopback has a queue pair of type ib.RawPacket receive also what queue pairs of its own context send, itself included, where its
	// rules match. Other types do so anyway.
	Loopback bool
}

// Defaults of Config.
const (
	DefaultDepth     = 128
	DefaultSendSGE   = 4
	DefaultRecvSGE   = 1
	DefaultMaxInline = 64
)

// A QP is a queue pair. It is safe for concurrent use; PostSends take turns, as do PostRecvs. Close may be called at
// any time and waits for calls in progress.
type QP struct {
	life    life.Node
	drv     driver.QP
	typ     ib.QPType
	pd      *verbs.PD
	sendCQ  *verbs.CQ
	recvCQ  *verbs.CQ
	srq     *SRQ
	untrack func()

	// modify is a lock that can be waited for with a context, and is held when there is something in it: one Modify at a time, so that
	// the state that was checked is the state that is changed.
	modify chan struct{}
}

// New makes a queue pair in state Reset.
func New(pd *verbs.PD, cfg *Config) (*QP, error) {
	dev := pd.Context().Name()
	d, err := driverConfig(pd.Context(), cfg)
	if err != nil {
		return nil, opErr("create_qp", dev, err)
	}
	q := &QP{typ: d.Type, pd: pd, sendCQ: cfg.SendCQ, recvCQ: cfg.RecvCQ, srq: cfg.SRQ, modify: make(chan struct{}, 1)}
	if q.recvCQ == nil {
		q.recvCQ = q.sendCQ
	}
	parents := []*life.Node{pd.Life(), q.sendCQ.Life(), q.recvCQ.Life()}
	if q.srq != nil {
		parents = append(parents, &q.srq.life)
	}
	if err := q.life.Attach(parents...); err != nil {
		return nil, opErr("create_qp", dev, err)
	}
	if q.drv, err = pd.Driver().CreateQP(d); err != nil {
		q.life.Abandon()
		return nil, opErr("create_qp", dev, err)
	}
	q.untrack = verbs.Track(pd.Context(), q.drv, q)
	life.Watch(q, &q.life, "qp.QP", dev)
	return q, nil
}

// driverConfig fills in defaults and checks cfg against the device's limits.
func driverConfig(c *verbs.Context, cfg *Config) (driver.QPConfig, error) {
	var d driver.QPConfig
	if cfg == nil || cfg.SendCQ == nil {
		return d, errors.New("a queue pair needs a SendCQ")
	}
	recvCQ := cfg.RecvCQ
	if recvCQ == nil {
		recvCQ = cfg.SendCQ
	}
	if cfg.SendCQ.Context() != c || recvCQ.Context() != c || cfg.SRQ != nil && cfg.SRQ.pd.Context() != c {
		return d, errors.New("PD, CQs and SRQ must belong to one context")
	}
	a, err := c.QueryDevice()
	if err != nil {
		return d, err
	}
	d = driver.QPConfig{Type: cfg.Type, SendCQ: cfg.SendCQ.Driver(), RecvCQ: recvCQ.Driver(), SignalAll: cfg.SignalAll,
		Loopback: cfg.Loopback}
	switch d.Type {
	case 0:
		d.Type = ib.RC
	case ib.RC:
	case ib.UC:
		if !a.Caps.Has(ib.CapUC) {
			return d, fmt.Errorf("UC queue pairs: %w", errors.ErrUnsupported)
		}
	case ib.UD:
		if !a.Caps.Has(ib.CapUD) {
			return d, fmt.Errorf("UD queue pairs: %w", errors.ErrUnsupported)
		}
	case ib.RawPacket:
		if !a.Caps.Has(ib.CapRawPacket) {
			return d, fmt.Errorf("raw packet queue pairs: %w", errors.ErrUnsupported)
		}
		if cfg.SRQ != nil {
			return d, errors.New("a raw packet queue pair cannot have an SRQ")
		}
	default:
		return d, fmt.Errorf("unknown queue pair type %s", d.Type)
	}
	if cfg.Loopback && d.Type != ib.RawPacket {
		return d, errors.New("only raw packet queue pairs have Loopback")
	}
	size := func(name string, asked, def, limit int) int {
		n := asked
		switch {
		case asked < 0:
			err = fmt.Errorf("invalid %s: %d", name, asked)
		case asked == 0:
			n = min(def, limit)
		case asked > limit:
			err = fmt.Errorf("%s %d exceeds the device's limit of %d", name, asked, limit)
		}
		return n
	}
	d.Cap.MaxSendWR = size("SendDepth", cfg.SendDepth, DefaultDepth, a.MaxQPWR)
	d.Cap.MaxSendSGE = size("SendSGE", cfg.SendSGE, DefaultSendSGE, a.MaxSGE)
	d.Cap.MaxInline = size("MaxInline", cfg.MaxInline, DefaultMaxInline, a.MaxInline)
	if cfg.SRQ != nil {
		if cfg.RecvDepth != 0 || cfg.RecvSGE != 0 {
			return d, errors.New("RecvDepth and RecvSGE must be zero with an SRQ")
		}
		d.SRQ = cfg.SRQ.drv
	} else {
		d.Cap.MaxRecvWR = size("RecvDepth", cfg.RecvDepth, DefaultDepth, a.MaxQPWR)
		d.Cap.MaxRecvSGE = size("RecvSGE", cfg.RecvSGE, DefaultRecvSGE, a.MaxSGE)
	}
	return d, err
}

func opErr(op, device string, err error) error {
	if err == nil {
		return nil
	}
	var oe *verbs.OpError
	if errors.As(err, &oe) && oe.Device == device {
		return err // says already where
	}
	return &verbs.OpError{Op: op, Device: device, Err: err}
}

func (q *QP) err(op string, err error) error { return opErr(op, q.pd.Context().Name(), err) }

// QPN is the queue pair's number.
func (q *QP) QPN() ib.QPN { return q.drv.QPN() }

// Type is the transport service.
func (q *QP) Type() ib.QPType { return q.typ }

// Cap is what was granted, each value at least what was asked for.
func (q *QP) Cap() ib.QPCap { return q.drv.Cap() }

// PD returns the protection domain that the queue pair belongs to.
func (q *QP) PD() *verbs.PD { return q.pd }

// SendCQ returns where completions of sends arrive.
func (q *QP) SendCQ() *verbs.CQ { return q.sendCQ }

// RecvCQ returns where completions of receives arrive.
func (q *QP) RecvCQ() *verbs.CQ { return q.recvCQ }

// SRQ returns where receives are taken from, or nil if the queue pair has its own receive queue.
func (q *QP) SRQ() *SRQ { return q.srq }

// State asks the device for the queue pair's state: errors change it without a Modify. It is Err if the device cannot
// be asked, which is the case after Close.
func (q *QP) State() ib.QPState {
	a, err := q.Query()
	if err != nil {
		return ib.Err
	}
	return a.State
}

// Query returns the current attributes as the device has them.
func (q *QP) Query() (ib.QPAttr, error) {
	if q.life.Closed() {
		return ib.QPAttr{}, q.err("query_qp", net.ErrClosed)
	}
	a, err := q.drv.Query()
	return a, q.err("query_qp", err)
}

// Path is a short name of how a connected queue pair reaches its peer, such as "inproc" or "shm"; empty before it is
// connected, and on devices that do not say.
func (q *QP) Path() string {
	if p, ok := q.drv.(driver.PathReporter); ok && !q.life.Closed() {
		return p.Path()
	}
	return ""
}

// Modify sets the attributes of attr that mask names; with ib.AttrState it changes the state. The call is checked
// against the state table first: a *StateError names attributes that are missing or not allowed, and nothing has
// changed. It may block while a path to the peer is set up, or another Modify is in progress; ctx bounds that. A change that the
// device had begun when ctx ended may still be made; one that it had not is not.
func (q *QP) Modify(ctx context.Context, attr *ib.QPAttr, mask ib.QPAttrMask) error {
	select {
	case q.modify <- struct{}{}:
	default: // in this order, so that ctx decides nothing when there is nothing to wait for
		select {
		case q.modify <- struct{}{}:
		case <-ctx.Done():
			return q.err("modify_qp", ctx.Err())
		}
	}
	defer func() { <-q.modify }()
	now, err := q.Query()
	if err != nil {
		return err
	}
	if err := check(q.typ, now.State, attr, mask); err != nil {
		return q.err("modify_qp", err)
	}
	return q.err("modify_qp", q.drv.Modify(ctx, attr, mask))
}

// PostSend posts wrs in order and rings the doorbell once. It returns how many were accepted; if n < len(wrs), err says
// why wrs[n] was not, and wrs[n:] have no effect. It never blocks and does not allocate. In state Err, requests are
// accepted and complete with ib.WCFlushErr.
//
// wrs is read during the call only. The memory that SGEs name belongs to the device until the request's completion,
// or that of a later request of the same queue, was polled.
func (q *QP) PostSend(wrs []ib.SendWR) (n int, err error) {
	if q.life.Closed() {
		return 0, errSendClosed
	}
	return q.drv.PostSend(wrs)
}

// PostRecv posts buffers for incoming messages, in order. It returns how many were accepted; if n < len(wrs), err says
// why wrs[n] was not. It never blocks and does not allocate. With an SRQ it fails with verbs.ErrInvalidWR.
func (q *QP) PostRecv(wrs []ib.RecvWR) (n int, err error) {
	if q.life.Closed() {
		return 0, errRecvClosed
	}
	return q.drv.PostRecv(wrs)
}

// Made once, because the data path must not allocate.
var (
	errSendClosed = &verbs.OpError{Op: "post_send", Err: net.ErrClosed}
	errRecvClosed = &verbs.OpError{Op: "post_recv", Err: net.ErrClosed}
)

// Close destroys the queue pair. Completions that were not polled yet may be lost; the device touches no buffer of its
// work requests any more. To see every completion, move to Err first and poll until all are flushed.
func (q *QP) Close() error {
	return q.err("destroy_qp", q.life.Close(func() error {
		if err := q.drv.Close(); err != nil {
			return err
		}
		q.untrack()
		return nil
	}))
}
