package rxe

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

type qp struct {
	uverbs.QP
	c      *rxeContext
	cookie uint64
	scq    *cq
	rcq    *cq
	srq    *srq
	sigAll bool
	qkey   atomic.Uint32

	// The kernel frees the place of a request when it completes it. But a request is outstanding until its completion was
	// polled (IBA 10.8.5.1): else somebody who posts until there is no room would overrun a completion queue that is as large
	// as the send queue.
	signalled uint32      // guarded by sendMu: requests posted that complete in any case
	polled    uint32      // of those, polled; written by who holds scq.mu, with release, and loaded by posters
	broken    atomic.Bool // a request has failed: from now on each completes

	resets atomic.Uint32 // written with sendMu, when a reset has taken out the completions: what failed before is not of the queue pair after it

	leaving bool // guarded by scq.mu: it is being closed, and may be gone the next moment
	closing bool // guarded by sendMu and recvMu, written with both: nothing is posted any more

	sendMu   sync.Mutex
	sq       queue            // guarded by sendMu; no memory once closed
	posts    uint32           // guarded by sendMu: requests posted, ever
	watch    portWatch        // guarded by sendMu
	sendBell *uverbs.Prepared // guarded by sendMu

	recvMu sync.Mutex
	rq     queue // guarded by recvMu; no memory with an SRQ, or once closed
}

// CreateQP implements driver.PD.
func (p *pd) CreateQP(cfg driver.QPConfig) (driver.QP, error) {
	if err := p.c.Removed(); err != nil {
		return nil, err
	}
	scq, ok1 := cfg.SendCQ.(*cq)
	rcq, ok2 := cfg.RecvCQ.(*cq)
	s, ok3 := cfg.SRQ.(*srq)
	if !ok1 || !ok2 || !ok3 && cfg.SRQ != nil {
		return nil, errors.New("the QP's CQs or SRQ belong to another device")
	}
	q := &qp{c: p.c, scq: scq, rcq: rcq, srq: s, sigAll: cfg.SignalAll}
	q.cookie = p.c.Track(q)
	srqHandle := -1
	if s != nil {
		srqHandle = int(s.Handle)
	}
	var resp abi.RxeCreateQPResp
	if err := q.Init(&p.PD, &cfg, q.cookie, scq.handle, rcq.handle, srqHandle, nil, uverbs.Bytes(&resp)); err != nil {
		p.c.Forget(q.cookie)
		return nil, err
	}
	if err := q.open(&resp); err != nil {
		return nil, errors.Join(fmt.Errorf("create_qp: %w", err), q.destroy())
	}
	p.c.mu.Lock()
	p.c.qps[q.QPN()] = q
	p.c.mu.Unlock()
	return q, nil
}

// open maps the queues.
func (q *qp) open(resp *abi.RxeCreateQPResp) (err error) {
	c := q.Cap()
	if q.sq, err = q.c.mapQueue(&resp.SQMi, sendSize(c.MaxSendSGE, c.MaxInline), toKernel); err != nil {
		return err
	}
	q.QPInfo.Cap.MaxSendWR = int(q.sq.mask) // the kernel answers with what was asked for, and makes more
	if q.sendBell, err = q.c.PrepareSendDoorbell(q.Handle); err != nil || q.srq != nil {
		return err
	}
	q.rq, err = q.c.mapQueue(&resp.RQMi, recvSize(c.MaxRecvSGE), toKernel)
	q.QPInfo.Cap.MaxRecvWR = int(q.rq.mask)
	return err
}

// destroy ends the queue pair in the kernel, then here. If the kernel refuses, nothing has changed.
func (q *qp) destroy() error {
	if err := q.Destroy(); err != nil {
		return err
	}
	q.sendMu.Lock()
	defer q.sendMu.Unlock()
	q.recvMu.Lock()
	defer q.recvMu.Unlock()
	q.watch.stop()
	q.c.unmapQueue(&q.sq)
	q.c.unmapQueue(&q.rq)
	q.sendBell.Free()
	q.sendBell = nil
	q.c.Forget(q.cookie)
	return nil
}

// Close implements driver.QP.
func (q *qp) Close() error {
	q.shut(true) // before the kernel may give its handle and its number to another
	q.c.windows.Free(&q.QP)
	if err := q.destroy(); err != nil {
		q.shut(false)
		if q.broken.Load() { // while it was closing, not all could be done about that
			q.failed(q.resets.Load())
			q.flushRecvs()
		}
		return err
	}
	q.c.mu.Lock()
	if q.c.qps[q.QPN()] == q { // else it is another's by now
		delete(q.c.qps, q.QPN())
	}
	q.c.mu.Unlock()
	return nil
}

// shut ends posting, or lets it go on. Completions count meanwhile, but nothing else of the queue pair is used.
func (q *qp) shut(closing bool) {
	q.sendMu.Lock()
	q.recvMu.Lock()
	q.closing = closing
	q.recvMu.Unlock()
	q.sendMu.Unlock()
	q.scq.leave(q, closing)
}

// Path implements driver.PathReporter.
func (q *qp) Path() string {
	if q.State() < ib.RTR {
		return ""
	}
	return "roce"
}

// Modify implements driver.QP.
func (q *qp) Modify(ctx context.Context, attr *ib.QPAttr, mask ib.QPAttrMask) error {
	own := *attr // the caller's are the caller's again when this returns, which the end of ctx may bring about first
	attr = &own
	return q.ChangeAround(ctx, attr, mask, func(change func() error) error {
		if mask&ib.AttrState != 0 && attr.State == ib.Reset {
			command := change
			change = func() error { return q.reset(command) }
		}
		if err := change(); err != nil {
			return err
		}
		if mask&ib.AttrQKey != 0 {
			q.qkey.Store(uint32(attr.QKey))
		}
		if mask&ib.AttrState != 0 && attr.State == ib.RTS {
			q.ring() // in SQD requests could be posted, and the kernel does not look for them by itself
		}
		return nil
	})
}

func (q *qp) ring() {
	q.sendMu.Lock()
	if q.sendBell != nil && !q.closing {
		q.sendBell.Run() // if it fails, so will the next PostSend
	}
	q.sendMu.Unlock()
}

// reset empties the queues, and takes out the completions that were not polled, after change has reset the queue pair. The kernel clears
// the queues' memory then, but takes no receive off its queue: what was posted would come back as receives of no buffers.
func (q *qp) reset(change func() error) error {
	q.sendMu.Lock()
	defer q.sendMu.Unlock()
	done := q.WindowsDone(q.posts, q.didLocked) // the kernel's memory tells it only before
	if err := change(); err != nil {
		return err
	}
	q.WindowsFailed(func(number uint32) bool { return int32(number-done) < 0 })
	q.sq.forget()
	q.scq.clean(q.QPN())
	if q.rcq != q.scq {
		q.rcq.clean(q.QPN())
	}
	q.signalled = atomic.LoadUint32(&q.polled)
	q.broken.Store(false)
	q.resets.Add(1)
	q.recvMu.Lock()
	defer q.recvMu.Unlock()
	if q.rq.mem != nil {
		q.rq.forget()
	}
	return nil
}

// Query implements driver.QP.
func (q *qp) Query() (ib.QPAttr, error) {
	was := q.State()
	a, err := q.Ask()
	if err == nil && a.State == ib.Err && was != ib.Err {
		q.flushRecvs()
	}
	return a, err
}

// failed notes that a request of the queue pair has failed, unless it was reset since there were so many resets.
func (q *qp) failed(resets uint32) {
	q.sendMu.Lock()
	defer q.sendMu.Unlock()
	if q.resets.Load() != resets {
		return
	}
	q.broken.Store(true)
	switch {
	case q.State() == ib.Err:
	case q.Type() == ib.RC: // there is no doubt, and the kernel may take a moment to say so
		q.SetState(ib.Err)
		q.Flush()
	default:
		if a, err := q.Ask(); err == nil && a.State == ib.Err {
			q.Flush()
		}
	}
	q.windowsFailed() // until it was in the error state, the kernel may have done what came behind
}

// flushRecvs makes the kernel flush what was posted to the receive queue of a queue pair, if that is in error: it looks there by
// itself only when the queue pair gets into that state. (The command POST_RECV, which makes it look as well, is not open to
// user space.) If it fails, the device has gone, or the queue pair.
func (q *qp) flushRecvs() {
	if q.srq != nil {
		return
	}
	q.sendMu.Lock() // it is not reset meanwhile
	defer q.sendMu.Unlock()
	if q.State() == ib.Err {
		q.Flush()
	}
}

// PostSend implements driver.QP.
func (q *qp) PostSend(wrs []ib.SendWR) (n int, err error) {
	q.sendMu.Lock()
	n, err = q.postSendLocked(wrs)
	q.sendMu.Unlock()
	return n, err
}

func (q *qp) postSendLocked(wrs []ib.SendWR) (n int, err error) {
	if q.sq.mem == nil || q.closing {
		return 0, driver.ErrClosed
	}
	if err := q.c.Removed(); err != nil {
		return 0, err
	}
	if s := q.State(); s < ib.RTS {
		return 0, driver.StateErr(s)
	}
	room, polled := q.sq.room(), atomic.LoadUint32(&q.polled)
	unpolled := int32(q.signalled - polled)
	for n < len(wrs) {
		wr := &wrs[n]
		signalled := q.sigAll || wr.Flags&ib.SendSignaled != 0
		if uint32(n) == room || signalled && unpolled >= int32(q.sq.mask) && !q.broken.Load() {
			err = driver.ErrQueueFull
			break
		}
		if err = q.put(wr, uint32(n)); err != nil {
			break
		}
		n++
		if signalled {
			unpolled++
		}
	}
	q.signalled = polled + uint32(unpolled)
	if n > 0 {
		q.sq.publish(uint32(n))
		q.posts += uint32(n)
		if bellErr := q.sendBell.Run(); bellErr != nil {
			return n, bellErr
		}
	}
	return n, err
}

// sendFlags are what the kernel has in common with package ib (enum ib_send_flags).
const (
	sendFlags  = ib.SendFence | ib.SendSignaled | ib.SendSolicited
	sendInline = 8
)

// put writes a request behind n others that are not published yet.
func (q *qp) put(wr *ib.SendWR, n uint32) error {
	at := q.sq.at + n
	if wr.Opcode >= ib.OpFlush {
		return q.putPlacement(wr, at)
	}
	if err := driver.CheckSendWR(q.Type(), &q.QPInfo.Cap, wr); err != nil {
		return err
	}
	flags := uint32(wr.Flags & sendFlags)
	if len(wr.Inline) > 0 {
		flags |= sendInline
	}
	ud := q.Type() == ib.UD
	if ud && wr.AH == 0 {
		return driver.ErrNoAH
	}
	e := extra{flags: flags, ud: ud, qkey: wr.RemoteQKey}
	switch {
	case ud && wr.RemoteQKey&ownQKey != 0:
		e.qkey = ib.QKey(q.qkey.Load())
	case wr.Opcode == ib.OpBindMW:
		key, err := q.bind(wr.Bind, q.posts+n)
		if err != nil {
			return err
		}
		e.window = key
	case wr.Opcode == ib.OpLocalInv:
		if err := q.c.windows.Unbind(&q.QP, wr.InvalidateRKey, q.posts+n); err != nil {
			return err
		}
	}
	putSend(q.sq.slot(at), wr, e)
	return nil
}

// putPlacement is put for FLUSH and ATOMIC_WRITE.
func (q *qp) putPlacement(wr *ib.SendWR, at uint32) error {
	if !q.c.placement {
		return driver.ErrNoPlacement
	}
	if err := driver.CheckPlacementWR(q.Type(), &q.QPInfo.Cap, wr); err != nil {
		return err
	}
	flags := uint32(wr.Flags & sendFlags)
	if wr.Opcode == ib.OpFlush {
		putFlush(q.sq.slot(at), wr, flags)
		return nil
	}
	var word [8]byte
	if copy(word[:], wr.Inline) == 0 {
		var err error
		if word, err = q.atomicWord(&wr.SGEs[0]); err != nil {
			return err
		}
	}
	putAtomicWrite(q.sq.slot(at), wr, flags, word)
	return nil
}

// ownQKey in a request's Q_Key stands for the queue pair's own (IBA 10.2.5); rxe would send the bit.
const ownQKey ib.QKey = 1 << 31

// PostRecv implements driver.QP.
func (q *qp) PostRecv(wrs []ib.RecvWR) (n int, err error) {
	if q.srq != nil {
		return 0, driver.ErrHasSRQ
	}
	q.recvMu.Lock()
	n, err = q.postRecvLocked(wrs)
	q.recvMu.Unlock()
	if n > 0 && q.State() == ib.Err {
		q.flushRecvs()
	}
	return n, err
}

func (q *qp) postRecvLocked(wrs []ib.RecvWR) (n int, err error) {
	if q.rq.mem == nil || q.closing {
		return 0, driver.ErrClosed
	}
	if err := q.c.Removed(); err != nil {
		return 0, err
	}
	if s := q.State(); s == ib.Reset {
		return 0, driver.StateErr(s)
	}
	return postRecv(&q.rq, q.QPInfo.Cap.MaxRecvSGE, wrs)
}

// postRecv writes receives into a queue, and publishes them.
func postRecv(q *queue, maxSGE int, wrs []ib.RecvWR) (n int, err error) {
	room := q.room()
	for n < len(wrs) {
		wr := &wrs[n]
		if uint32(n) == room {
			err = driver.ErrQueueFull
			break
		}
		if len(wr.SGEs) > maxSGE {
			err = driver.ErrTooManySGEs
			break
		}
		putRecv(q.slot(q.at+uint32(n)), wr)
		n++
	}
	if n > 0 {
		q.publish(uint32(n))
	}
	return n, err
}
