package siw

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var errOverrun = errors.New("the completion queue has overrun, and completions are lost: it must hold every completion that may be outstanding")

// A completion queue is made with room to spare, because some requests that nobody wants to hear of need completions all the same
// (see qp.put): as much as was asked for, within these bounds.
const minSpare, maxSpare = 64, 1024

type cq struct {
	c       *siwContext
	handle  uint32
	cookie  uint64
	channel *uverbs.CompChannel // nil: none
	entries int                 // without the spare ones
	spare   int64
	hidden  atomic.Int64 // spare ones in use
	failed  atomic.Bool  // it has overrun

	mu       sync.Mutex
	q        queue          // guarded by mu; no memory once closed
	at       uint64         // guarded by mu: the next position
	qps      map[uint32]*qp // guarded by mu: those whose completions come here
	due      *ledger        // guarded by mu: a list of those that may have something to hand out
	flushing []*ledger      // guarded by mu: those to flush when the kernel's completions are taken
	bad      []*qp          // guarded by mu: those of which a request has failed
	wake     *qp            // guarded by mu: a list of those that may give the kernel more
}

// CreateCQ implements driver.Context.
func (c *siwContext) CreateCQ(cfg driver.CQConfig) (driver.CQ, error) {
	if err := c.Removed(); err != nil {
		return nil, err
	}
	fd, err := c.ChannelFD(cfg.Channel)
	if err != nil {
		return nil, err
	}
	q := &cq{c: c, qps: map[uint32]*qp{}}
	q.channel, _ = cfg.Channel.(*uverbs.CompChannel)
	q.cookie = c.Track(q)
	if err := q.create(cfg.Entries, fd); err != nil {
		c.Forget(q.cookie)
		return nil, err
	}
	return q, nil
}

func (q *cq) create(entries, channel int) error {
	spare := min(max(entries, minSpare), maxSpare)
	var resp abi.SiwUrespCreateCQ
	handle, _, err := q.c.Context.CreateCQ(entries+spare, channel, q.cookie, nil, uverbs.Bytes(&resp))
	if err != nil {
		return err
	}
	q.handle = handle
	if q.q, err = q.c.mapQueue(resp.CQKey, resp.NumCQE, entries+spare, cqeBytes, ctrlBytes); err != nil {
		return errors.Join(fmt.Errorf("create_cq: %w", err), q.destroy())
	}
	q.entries, q.spare = q.q.len()-spare, int64(spare)
	atomic.StoreUint32(q.q.behind(), abi.SIW_NOTIFY_NOT)
	return nil
}

// destroy ends the queue in the kernel, then here. If the kernel refuses, nothing has changed.
func (q *cq) destroy() error {
	if err := uverbs.Destroyed(q.c.DestroyCQ(q.handle)); err != nil {
		return err
	}
	q.c.unmapQueue(&q.q)
	q.c.Forget(q.cookie)
	if q.channel != nil {
		q.channel.Forget(q)
	}
	return nil
}

// Entries implements driver.CQ.
func (q *cq) Entries() int { return q.entries }

// Event hears of the queue's overrun. The kernel leaves its queue pairs alone, and their completions are lost.
func (q *cq) Event(ib.EventType) {
	q.failed.Store(true)
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, p := range q.qps {
		go p.fail()
	}
}

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
	if q.q.mem == nil {
		return driver.ErrClosed
	}
	return nil
}

// Poll implements driver.CQ.
func (q *cq) Poll(wcs []ib.WC) int {
	q.mu.Lock()
	if q.q.mem == nil || q.failed.Load() {
		q.mu.Unlock()
		return -1
	}
	n := q.poll(wcs)
	bad, wake := q.toDo()
	q.mu.Unlock()
	finish(bad, wake)
	if n == 0 && q.c.Removed() != nil {
		return -1
	}
	return n
}

func (q *cq) poll(wcs []ib.WC) (n int) {
	for n < len(wcs) {
		if l := q.due; l != nil {
			k, more := l.handOut(wcs[n:])
			if n += k; !more {
				q.due, l.next, l.listed = l.next, nil, false
			}
			continue
		}
		if head := q.q.head(q.at); head&validCQE != 0 {
			n += q.take(&wcs[n], head)
			continue
		}
		if !q.flush() {
			break
		}
	}
	return n
}

// validCQE is the flag in a completion's first word.
var validCQE = func() uint32 {
	for w := uint32(1); ; w <<= 8 {
		if flags, _, _ := cqeHead(w); flags == abi.SIW_WQE_VALID {
			return w
		}
	}
}()

// take takes the next completion of the kernel's. It returns 1 if that is one to be handed out at once, and is in wc: only receives
// from a shared receive queue are, which no ledger has. Without a wc such a one stays where it is, and take returns -1.
func (q *cq) take(wc *ib.WC, head uint32) int {
	_, opcode, status := cqeHead(head)
	e := q.q.cqe(q.at)
	id, bytes, qpn := e.ID, e.Bytes, e.QPID // read once: what is decided by them must be of them
	if wc == nil && opcode == abi.SIW_OP_RECEIVE && qpn <= uint64(ib.MaxQPN) {
		if p := q.qps[uint32(qpn)]; p != nil && p.srq != nil {
			return -1
		}
	}
	q.q.setHead(q.at, 0)
	q.at++
	if qpn > uint64(ib.MaxQPN) {
		return 0
	}
	p := q.qps[uint32(qpn)]
	if p == nil {
		return 0 // of one that is closed
	}
	if status != abi.SIW_WC_SUCCESS && !p.failed.Load() {
		q.bad = append(q.bad, p)
	}
	l := &p.send
	switch {
	case opcode != abi.SIW_OP_RECEIVE:
		if p.scq != q {
			return 0
		}
	case p.rcq != q:
		return 0
	case p.srq != nil:
		p.srq.polled.Add(1)
		*wc = ib.WC{ID: id, Status: wcStatus(status), Opcode: ib.WCRecv, QPN: p.QPN(), ByteLen: bytes, VendorErr: uint32(status)}
		return 1
	default:
		l = &p.recv
	}
	if !l.complete(id, bytes, status) {
		return 0
	}
	if l.at(id).is&(signaled|silent) == 0 {
		q.hidden.Add(-1)
	}
	if l.at(id).gate == reads {
		q.wakeUp(p)
	}
	q.isDue(l)
	return 0
}

// isDue notes that a ledger has something to hand out. Called with mu held.
func (q *cq) isDue(l *ledger) {
	if !l.listed {
		l.listed, l.next, q.due = true, q.due, l
	}
}

// flush flushes the ledgers of queue pairs that the kernel has nothing more to say about, when everything is taken that it has
// said. It reports whether there is something to hand out now, or to take.
func (q *cq) flush() bool {
	rest := q.flushing[:0]
	for _, l := range q.flushing {
		// The kernel may have said something, and then got quiet, since Poll has looked.
		if !l.q.quiet.Load() || q.q.head(q.at)&validCQE != 0 {
			rest = append(rest, l)
			continue
		}
		l.flushing = false
		if l.unfinished() {
			l.flush()
			q.isDue(l)
		}
	}
	clear(q.flushing[len(rest):])
	q.flushing = rest
	return q.due != nil || len(rest) > 0 && q.q.head(q.at)&validCQE != 0
}

// flushLater has a ledger of a failed queue pair flushed by the next Poll that finds it quiet. Whoever waits for the completion
// queue's event is woken: the kernel does not know of these completions.
func (q *cq) flushLater(l *ledger) {
	if !l.unfinished() {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.q.mem == nil || q.qps[uint32(l.q.QPN())] != l.q { // it may have been closed since it was seen to fail
		return
	}
	if !l.flushing {
		l.flushing = true
		q.flushing = append(q.flushing, l)
	}
	if q.channel != nil && l.q.quiet.Load() && atomic.SwapUint32(q.q.behind(), abi.SIW_NOTIFY_NOT) != abi.SIW_NOTIFY_NOT {
		q.channel.Fire(q) // with the lock: not after Close
	}
}

// Arm implements driver.CQ. The kernel does not raise events for solicited receives, so all are asked for.
func (q *cq) Arm(bool) error {
	if err := q.c.Removed(); err != nil {
		return err
	}
	q.mu.Lock()
	if q.q.mem == nil {
		q.mu.Unlock()
		return driver.ErrClosed
	}
	// Sequentially consistent: what the caller polls next is loaded after it.
	atomic.StoreUint32(q.q.behind(), abi.SIW_NOTIFY_SOLICITED|abi.SIW_NOTIFY_NEXT_COMPLETION)
	q.mu.Unlock()
	return nil
}

// Close implements driver.CQ.
func (q *cq) Close() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.q.mem == nil {
		return nil
	}
	return q.destroy()
}

// add lets completions of a queue pair be known as its own.
func (q *cq) add(p *qp) {
	q.mu.Lock()
	q.qps[uint32(p.QPN())] = p
	q.mu.Unlock()
}

// drop forgets a queue pair that the kernel has destroyed, and takes its completions out, before its number is given to another.
func (q *cq) drop(p *qp) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.qps[uint32(p.QPN())] != p {
		return // it was not made
	}
	delete(q.qps, uint32(p.QPN()))
	for i, end := q.at, q.at+uint64(q.q.len()); q.q.mem != nil && i < end; i++ {
		head := q.q.head(i)
		if head&validCQE == 0 {
			break
		}
		if e := q.q.cqe(i); e.QPID == uint64(p.QPN()) {
			if _, opcode, _ := cqeHead(head); opcode == abi.SIW_OP_RECEIVE && p.srq != nil {
				p.srq.polled.Add(1)
			}
			e.QPID = ^uint64(0) // nobody's; the slot is ours until its flags are cleared
		}
	}
	if q == p.scq {
		for pos := p.send.retired.Load(); pos < p.send.posted.Load(); pos++ {
			if e := p.send.at(pos); e.is&(signaled|silent|done|late) == 0 {
				q.hidden.Add(-1)
			}
		}
	}
	for _, l := range []*ledger{&p.send, &p.recv} {
		if l.listed && (l == &p.send && q == p.scq || l == &p.recv && q == p.rcq) {
			for at := &q.due; *at != nil; at = &(*at).next {
				if *at == l {
					*at = l.next
					break
				}
			}
			l.listed, l.next = false, nil
		}
	}
	rest := q.flushing[:0]
	for _, l := range q.flushing {
		if l.q != p {
			rest = append(rest, l)
		}
	}
	clear(q.flushing[len(rest):])
	q.flushing = rest
}
