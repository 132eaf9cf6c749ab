package rxe

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var (
	errOldAH   = errors.New("this kernel's rxe does not number address handles (Linux before 5.15): UD needs a newer one")
	errOverrun = errors.New("the completion queue has overrun, and completions are lost: it must hold every completion that may be outstanding")
)

type cq struct {
	c      *rxeContext
	handle uint32
	cookie uint64

	failed atomic.Bool // it has overrun

	mu      ring.SpinLock // not held during commands
	q       queue         // guarded by mu; no memory once closed, and while away
	away    bool          // guarded by mu: a command changes the queue, and there is nothing to poll meanwhile
	entries int           // guarded by mu
	senders [64]*qp       // guarded by mu: those whose requests were polled last, by the end of their numbers

	armMu sync.Mutex          // held by what changes the queue, too
	arm   [2]*uverbs.Prepared // guarded by armMu: for any completion, for solicited ones; nil once closed
}

// CreateCQ implements driver.Context.
func (c *rxeContext) CreateCQ(cfg driver.CQConfig) (driver.CQ, error) {
	if err := c.Removed(); err != nil {
		return nil, err
	}
	fd, err := c.ChannelFD(cfg.Channel)
	if err != nil {
		return nil, err
	}
	q := &cq{c: c}
	q.cookie = c.Track(q)
	if err := q.create(cfg.Entries, fd); err != nil {
		c.Forget(q.cookie)
		return nil, err
	}
	return q, nil
}

func (q *cq) create(entries, channel int) error {
	var resp abi.RxeCreateCQResp
	handle, _, err := q.c.Context.CreateCQ(entries, channel, q.cookie, nil, uverbs.Bytes(&resp))
	if err != nil {
		return err
	}
	q.handle = handle
	if q.q, err = q.c.mapQueue(&resp.Mi, int(wcBytes), fromKernel); err == nil {
		q.entries = int(q.q.mask)
		for i := range q.arm {
			if q.arm[i], err = q.c.PrepareArm(handle, i == 1); err != nil {
				break
			}
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("create_cq: %w", err), q.destroy())
	}
	return nil
}

// take takes the queue away from those who poll, and put gives one back. In between the kernel can be told to change it.
func (q *cq) take() (old queue) {
	q.mu.Lock()
	defer q.mu.Unlock()
	old, q.q, q.away = q.q, queue{}, true
	return old
}

func (q *cq) put(fresh queue) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.q, q.away, q.entries = fresh, false, int(fresh.mask)
}

// destroy ends the queue in the kernel, then here. If the kernel refuses, nothing has changed.
func (q *cq) destroy() error {
	old := q.take()
	if err := uverbs.Destroyed(q.c.DestroyCQ(q.handle)); err != nil {
		q.put(old)
		return err
	}
	q.put(queue{})
	q.c.unmapQueue(&old)
	for i := range q.arm {
		q.arm[i].Free()
		q.arm[i] = nil
	}
	q.c.Forget(q.cookie)
	return nil
}

// Entries implements driver.CQ.
func (q *cq) Entries() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.entries
}

// Event hears of the queue's overrun.
func (q *cq) Event(ib.EventType) { q.failed.Store(true) }

// Err implements driver.CQ.
func (q *cq) Err() error {
	if err := q.c.Removed(); err != nil {
		return err
	}
	if q.failed.Load() {
		return errOverrun
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.q.mem == nil && !q.away {
		return driver.ErrClosed
	}
	return nil
}

// Poll implements driver.CQ.
func (q *cq) Poll(wcs []ib.WC) int {
	q.mu.Lock()
	if q.q.mem == nil || q.failed.Load() {
		away := q.away && !q.failed.Load()
		q.mu.Unlock()
		if away {
			return 0
		}
		return -1
	}
	n := min(q.q.filled(), uint32(len(wcs)))
	if n == 0 {
		q.mu.Unlock()
		if q.c.Removed() != nil {
			return -1
		}
		return 0
	}
	special := false
	var failed []failure
	sent, by := uint32(0), ib.QPN(0) // completions of requests, since another queue pair's
	for i := range n {
		w := &wcs[i]
		if takeWC(w, wc(q.q.slot(q.q.at+i))) {
			special = true
			if w.Status != ib.WCSuccess {
				failed = q.failure(failed, w.QPN)
			}
		} else if !w.Opcode.IsRecv() {
			if w.QPN != by {
				q.retire(by, sent)
				sent, by = 0, w.QPN
			}
			sent++
		}
	}
	q.retire(by, sent)
	q.q.publish(n)
	q.mu.Unlock()
	if special {
		q.note(wcs[:n], failed)
	}
	return int(n)
}

// A failure is a queue pair of which completions that failed have been polled, between the resets with these numbers.
type failure struct {
	of     *qp
	resets uint32
}

// failure adds a queue pair. Called with mu held: a reset has taken out its completions before, or takes mu later, and counts then.
func (q *cq) failure(list []failure, of ib.QPN) []failure {
	if n := len(list); n > 0 && list[n-1].of.QPN() == of {
		return list
	}
	if p := q.c.qp(of); p != nil {
		list = append(list, failure{p, p.resets.Load()})
	}
	return list
}

// retire counts n requests of a queue pair as polled. Called with mu held.
func (q *cq) retire(by ib.QPN, n uint32) {
	if n == 0 {
		return
	}
	p := q.senders[by%ib.QPN(len(q.senders))]
	if p == nil || p.QPN() != by {
		if p = q.c.qp(by); p == nil || p.scq != q {
			return // it was closed before its completions were polled
		}
		if !p.leaving {
			q.senders[by%ib.QPN(len(q.senders))] = p
		}
	}
	ring.StoreRel32(&p.polled, p.polled+n)
}

// leave has a queue pair that is being closed looked up each time: its number may soon be another's. If it stays, that is undone.
func (q *cq) leave(p *qp, leaving bool) {
	q.mu.Lock()
	p.leaving = leaving
	if at := &q.senders[p.QPN()%ib.QPN(len(q.senders))]; *at == p {
		*at = nil
	}
	q.mu.Unlock()
}

// clean takes out the completions of a queue pair that are not polled yet: it was reset, and they would be of requests that are no more.
func (q *cq) clean(of ib.QPN) {
	q.armMu.Lock() // the queue is not away
	defer q.armMu.Unlock()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.q.mem == nil {
		return
	}
	// What stays moves towards the kernel's end, which does not look at what it has written.
	n := q.q.filled()
	gone := uint32(0)
	for i := n; i > 0; i-- {
		e := wc(q.q.slot(q.q.at + i - 1))
		if ib.QPN(e.QPNum)&ib.MaxQPN == of {
			gone++
		} else if gone > 0 {
			*wc(q.q.slot(q.q.at + i - 1 + gone)) = *e
		}
	}
	q.q.publish(gone)
}

// takeWC copies a completion, and reports whether it is one to be noted.
func takeWC(to *ib.WC, from *abi.WC) (special bool) {
	to.ID = from.WRID
	to.QPN = ib.QPN(from.QPNum) & ib.MaxQPN
	to.VendorErr = from.VendorErr
	to.Status = ib.WCStatus(min(from.Status, uint32(ib.WCGeneralErr)))
	to.Opcode = ib.WCOpcode(from.Opcode)
	to.ByteLen = from.ByteLen
	to.SrcQPN = ib.QPN(from.SrcQP) & ib.MaxQPN
	to.PKeyIndex, to.SLID, to.SL = from.PKeyIndex, ib.LID(from.SLID), from.SL
	to.Imm, to.InvalidatedRKey = 0, 0
	to.Flags = 0
	if !to.Opcode.IsRecv() {
		return to.Status != ib.WCSuccess // the flags that rxe sets are those of what was sent
	}
	const grh, withImm, withInv = 1, 2, 4 // enum ib_wc_flags: not what libibverbs, and so package ib, numbers them
	to.Flags = ib.WCFlags(from.WCFlags & (grh | withImm))
	if from.SrcQP == 0 { // only a datagram has a source, and a GRH; the flag is set on every receive
		to.Flags &^= ib.WCGRH
	}
	if from.WCFlags&withImm != 0 {
		to.Imm = abi.FromBE32(abi.BE32(from.Ex))
	}
	if from.WCFlags&withInv != 0 {
		to.Flags |= ib.WCWithInv
		to.InvalidatedRKey = ib.RKey(from.Ex)
	}
	return to.Status != ib.WCSuccess || to.Flags&ib.WCWithInv != 0
}

// note tells queue pairs that they are in error, and windows that they were invalidated: nothing else does.
func (q *cq) note(wcs []ib.WC, failed []failure) {
	for _, f := range failed {
		f.of.failed(f.resets)
	}
	for i := range wcs {
		if wc := &wcs[i]; wc.Status == ib.WCSuccess && wc.Flags&ib.WCWithInv != 0 {
			q.c.windows.Invalidated(wc.InvalidatedRKey)
		}
	}
}

// Arm implements driver.CQ.
func (q *cq) Arm(solicitedOnly bool) error {
	if err := q.c.Removed(); err != nil {
		return err
	}
	i := 0
	if solicitedOnly {
		i = 1
	}
	q.armMu.Lock()
	defer q.armMu.Unlock()
	if q.arm[i] == nil {
		return driver.ErrClosed
	}
	return q.arm[i].Run()
}

// Resize implements driver.CQResizer.
func (q *cq) Resize(entries int) error {
	q.armMu.Lock()
	defer q.armMu.Unlock()
	if q.arm[0] == nil {
		return driver.ErrClosed
	}
	if err := q.c.Removed(); err != nil {
		return err
	}
	old := q.take()
	if n := int(old.filled()); entries < n {
		q.put(old)
		return fmt.Errorf("%d completions are queued: poll them first, or ask for more than %d entries", n, entries)
	}
	var resp abi.RxeResizeCQResp
	if _, err := q.c.ResizeCQ(q.handle, entries, nil, uverbs.Bytes(&resp)); err != nil {
		q.put(old)
		return err
	}
	// The kernel has moved what was queued, and writes to the new memory only.
	fresh, err := q.c.mapQueue(&resp.Mi, int(wcBytes), fromKernel)
	if err != nil {
		q.failed.Store(true) // its completions cannot be reached
		q.put(old)
		return fmt.Errorf("resize_cq: %w", err)
	}
	q.put(fresh)
	q.c.unmapQueue(&old)
	return nil
}

// Close implements driver.CQ.
func (q *cq) Close() error {
	q.armMu.Lock()
	defer q.armMu.Unlock()
	return q.destroy()
}
