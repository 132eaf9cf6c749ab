//go:build amd64 || arm64

package mlx5

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

var errOverrun = errors.New("the completion queue has overrun, and completions are lost: it must hold every completion that may be outstanding")

type cq struct {
	c      *mlx5Context
	handle uint32
	number uint32
	cookie uint64
	rec    *record

	failure atomic.Pointer[error] // why it is of no use any more
	events  atomic.Uint32         // taken from the channel, ever

	mu    ring.SpinLock // not held during commands
	r     ringOfCQEs    // guarded by mu; no memory once closed, and while away
	next  uint32        // guarded by mu: completions taken, ever
	last  *qp           // guarded by mu: whose completion was the last one
	any   bool          // guarded by mu: it was armed for any completion, which arming it for solicited ones does not take back,
	anyAt uint32        // guarded by mu: after so many events
	away  bool          // guarded by mu: a command changes the ring, and there is nothing to poll meanwhile
	count uint32        // guarded by mu: of the ring, also while away

	changeMu sync.Mutex // held by what changes the ring, and by what must find all completions in it; taken before all spin locks
}

// CreateCQ implements driver.Context.
func (c *mlx5Context) CreateCQ(cfg driver.CQConfig) (driver.CQ, error) {
	if err := c.Removed(); err != nil {
		return nil, err
	}
	n, err := c.cqes(cfg.Entries)
	if err != nil {
		return nil, c.cqError("create_cq", err)
	}
	fd, err := c.ChannelFD(cfg.Channel)
	if err != nil {
		return nil, err
	}
	q := &cq{c: c}
	q.cookie = c.Track(q)
	if err := q.create(n, fd); err != nil {
		return nil, errors.Join(c.cqError("create_cq", err), q.free())
	}
	return q, nil
}

func (c *mlx5Context) cqError(op string, err error) error {
	return fmt.Errorf("%s: %s: %w", c.Device(), op, err)
}

// cqes is how many completions a ring for so many has: one more, which the device needs when the ring is changed, and a power of
// two.
func (c *mlx5Context) cqes(entries int) (uint32, error) {
	const most = 1 << 22 // what the device's doorbells have bits for
	if entries < 1 || entries >= most {
		return 0, fmt.Errorf("%d entries: 1 to %d are possible", entries, most-1)
	}
	return pow2(entries + 1), nil
}

func (q *cq) create(n uint32, channel int) (err error) {
	if q.r, err = newRing(n); err != nil {
		return err
	}
	q.count = n
	if q.rec, err = q.c.records.take(); err != nil {
		return err
	}
	cmd := abi.Mlx5CreateCQ{BufAddr: uverbs.AddrOf(q.r.mem), DBAddr: q.rec.addr, CQESize: cqeBytes}
	if q.c.info.fixedRegs == 0 {
		cmd.Flags, cmd.UARPageIndex = abi.MLX5_IB_CREATE_CQ_FLAGS_UAR_PAGE_INDEX, uint16(q.c.uars.armAt)
	}
	var resp abi.Mlx5CreateCQResp
	handle, granted, err := q.c.Context.CreateCQ(int(n-1), channel, q.cookie, uverbs.Bytes(&cmd), uverbs.Bytes(&resp))
	if err != nil {
		return err
	}
	q.handle, q.number = handle, resp.CQN
	switch {
	case granted != int(n-1):
		err = fmt.Errorf("%w: a ring of %d completions was given, and the kernel speaks of %d", ErrDevice, n, granted+1)
	case q.number > number24:
		err = fmt.Errorf("%w: the completion queue has number %#x, of more than 24 bits", ErrDevice, q.number)
	}
	if err == nil {
		return nil
	}
	if still := uverbs.Destroyed(q.c.DestroyCQ(handle)); still != nil {
		q.c.leave(q.r.mem)
		q.r, q.rec = ringOfCQEs{}, nil
		err = errors.Join(err, still)
	}
	return err
}

// free gives back what the queue has. The kernel has none any more, or never had.
func (q *cq) free() error {
	q.mu.Lock()
	mem := q.r.mem
	q.r, q.last = ringOfCQEs{}, nil
	q.mu.Unlock()
	q.c.records.give(q.rec)
	q.c.Forget(q.cookie)
	return unmapPages(mem)
}

// take takes the ring away from those who poll, and put gives one back.
func (q *cq) take() (old ringOfCQEs) {
	q.mu.Lock()
	defer q.mu.Unlock()
	old, q.r, q.away = q.r, ringOfCQEs{}, true
	return old
}

func (q *cq) put(r ringOfCQEs) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.r, q.away, q.count = r, false, r.mask+1
}

// Close implements driver.CQ.
func (q *cq) Close() error {
	q.changeMu.Lock()
	defer q.changeMu.Unlock()
	old := q.take()
	err := uverbs.Destroyed(q.c.DestroyCQ(q.handle))
	q.put(old)
	if err != nil { // nothing has changed
		return err
	}
	return q.free()
}

// Entries implements driver.CQ.
func (q *cq) Entries() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return int(q.count) - 1
}

// Event hears of the queue's overrun.
func (q *cq) Event(ib.EventType) { q.fail(errOverrun) }

// Notified implements what uverbs asks of queues whose events are counted.
func (q *cq) Notified() { q.events.Add(1) }

// fail makes the queue useless, for the first reason that is given.
func (q *cq) fail(err error) { q.failure.CompareAndSwap(nil, &err) }

// Err implements driver.CQ.
func (q *cq) Err() error {
	if err := q.c.Removed(); err != nil {
		return err
	}
	if e := q.failure.Load(); e != nil {
		return *e
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.r.mem == nil && !q.away {
		return driver.ErrClosed
	}
	return nil
}

// Arm implements driver.CQ.
func (q *cq) Arm(solicitedOnly bool) error {
	if err := q.Err(); err != nil {
		return err
	}
	q.changeMu.Lock() // while the ring changes, so does the index
	defer q.changeMu.Unlock()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.r.mem == nil {
		return driver.ErrClosed
	}
	events := q.events.Load()
	v := events&3<<28 | q.next&number24
	switch {
	case !solicitedOnly:
		q.any, q.anyAt = true, events
	case !q.any || q.anyAt != events:
		v |= 1 << 24
	}
	doorbell(q.rec.word[armWord], be32(v), q.c.uars.arm, be64(uint64(v)<<32|uint64(q.number)))
	return nil
}

// Poll implements driver.CQ.
func (q *cq) Poll(wcs []ib.WC) int {
	q.mu.Lock()
	n := q.pollLocked(wcs)
	q.mu.Unlock()
	if n == 0 && q.c.Removed() != nil {
		return -1
	}
	return n
}

func (q *cq) pollLocked(wcs []ib.WC) (n int) {
	if q.r.mem == nil || q.failure.Load() != nil {
		if q.away && q.failure.Load() == nil {
			return 0
		}
		return -1
	}
	start := q.next
	for n < len(wcs) {
		e, tail, ok := q.r.ready(q.next)
		if !ok {
			break
		}
		fromDevice()
		if err := q.decode(e, tail, &wcs[n]); err != nil {
			q.fail(fmt.Errorf("%w: completion %d of completion queue %#x: %w", ErrDevice, q.next, q.number, err))
			break
		}
		q.next++
		n++
	}
	if q.next != start {
		if q.last != nil {
			q.last.retire(q)
		}
		consumed(q.rec.word[indexWord], be32(q.next&number24))
	}
	if n == 0 && q.failure.Load() != nil {
		return -1
	}
	return n
}

// decode takes a completion that the device has written. Called with mu held.
func (q *cq) decode(e cqe, tail uint32, wc *ib.WC) error {
	code := cqeCode(tail)
	if cqeFormat(tail) != 0 {
		return fmt.Errorf("it has format %#x, of which none was asked for", cqeFormat(tail))
	}
	p, err := q.owner(e, code)
	if err != nil {
		return err
	}
	switch code {
	case cqeRequest:
		return q.request(p, e, tail, wc)
	case cqeRecv, cqeRecvImm, cqeRecvInv, cqeRecvWrite:
		return q.receive(p, e, tail, wc)
	case cqeRequestErr, cqeRecvErr:
		return q.failed(p, e, tail, wc)
	}
	return fmt.Errorf("its opcode is %d, which is not known", code)
}

// owner is the queue pair that a completion is of.
func (q *cq) owner(e cqe, code uint8) (*qp, error) {
	qpn := cqeOpcodeAndQPN(e) & number24
	index := qpn
	if q.c.info.byIndex {
		index = cqeIndex(e)
	}
	p := q.last
	if p == nil || p.index != index {
		if p != nil {
			p.retire(q)
		}
		p = q.c.qps.get(index)
		if p == nil || p.scq != q && p.rcq != q {
			return nil, fmt.Errorf("it is of queue pair %#x (index %#x), which is none of this queue", qpn, index)
		}
		q.last = p
	}
	if p.number != qpn && !(p.raw && code != cqeRequest && code != cqeRequestErr) { // of frames that came in there is a flow tag instead
		return nil, fmt.Errorf("it is of queue pair %#x, and its index %#x that of %#x", qpn, index, p.number)
	}
	return p, nil
}

// retire tells those who post how far the queues that complete on c are done. Called with c.mu held.
func (q *qp) retire(c *cq) {
	if q.scq == c && q.polled != q.tail {
		ring.StoreRel32(&q.polled, q.tail)
	}
	if q.rcq == c && q.recvPolled != q.recvTail {
		ring.StoreRel32(&q.recvPolled, q.recvTail)
	}
}

// finished finds the request that has ended, and with it all before it. Called with scq.mu held.
func (q *qp) finished(tail uint32) (*sent, error) {
	counter := cqeCounter(tail)
	if outstanding := atomic.LoadUint32(&q.posted) - q.tail; outstanding > 0 {
		if s := &q.sq.sent[uint32(counter)&q.sq.mask]; s.block == counter && s.head-q.tail < outstanding {
			q.tail = s.head + 1
			return s, nil
		}
	}
	return nil, fmt.Errorf("it is of the request at block %d of queue pair %#x, and none is outstanding there", counter, q.number)
}

// setWC makes wc that of a success. Field by field: a literal would be made elsewhere and copied.
func setWC(wc *ib.WC, id uint64, o ib.WCOpcode, qpn uint32) {
	wc.ID, wc.Status, wc.Opcode, wc.Flags, wc.SL = id, ib.WCSuccess, o, 0, 0
	wc.PKeyIndex, wc.SLID, wc.ByteLen, wc.Imm, wc.InvalidatedRKey = 0, 0, 0, 0, 0
	wc.QPN, wc.SrcQPN, wc.VendorErr = ib.QPN(qpn), 0, 0
}

// request takes the completion of a request. Called with mu held.
func (q *cq) request(p *qp, e cqe, tail uint32, wc *ib.WC) error {
	if p.scq != q {
		return fmt.Errorf("it is of a request of queue pair %#x, whose requests complete elsewhere", p.number)
	}
	s, err := p.finished(tail)
	if err != nil {
		return err
	}
	o := &p.ops[s.op&15]
	if got := uint8(cqeOpcodeAndQPN(e) >> 24); got != o.code {
		return fmt.Errorf("it is of an operation %#x, and %v was posted", got, s.op)
	}
	setWC(wc, s.id, o.wc, p.number)
	switch o.code {
	case codeRead:
		wc.ByteLen = cqeLength(e)
	case codeCmpSwap, codeFetchAdd:
		wc.ByteLen = 8
	}
	return nil
}

// failed takes the completion of a request or a receive that has failed. Called with mu held.
func (q *cq) failed(p *qp, e cqe, tail uint32, wc *ib.WC) error {
	setWC(wc, 0, ib.WCRecv, p.number)
	wc.Status, wc.VendorErr = statusOf(cqeSyndrome(e), cqeVendorSyndrome(e))
	if cqeCode(tail) == cqeRecvErr {
		id, err := q.received(p, e, tail)
		wc.ID = id
		return err
	}
	if p.scq != q {
		return fmt.Errorf("it is of a request of queue pair %#x, whose requests complete elsewhere", p.number)
	}
	s, err := p.finished(tail)
	if err != nil {
		return err
	}
	wc.ID, wc.Opcode = s.id, p.ops[s.op&15].wc
	p.WindowsFailed(func(number uint32) bool { return int32(number-s.head) < 0 })
	return nil
}

// receive takes the completion of a receive. Called with mu held.
func (q *cq) receive(p *qp, e cqe, tail uint32, wc *ib.WC) error {
	id, err := q.received(p, e, tail)
	if err != nil {
		return err
	}
	setWC(wc, id, ib.WCRecv, p.number)
	wc.ByteLen = cqeLength(e)
	switch cqeCode(tail) {
	case cqeRecvWrite:
		wc.Opcode = ib.WCRecvRDMAWithImm
		wc.Flags, wc.Imm = ib.WCWithImm, cqeImm(e)
	case cqeRecvImm:
		wc.Flags, wc.Imm = ib.WCWithImm, cqeImm(e)
	case cqeRecvInv:
		wc.Flags, wc.InvalidatedRKey = ib.WCWithInv, ib.RKey(cqeImm(e))
	}
	if p.more {
		if p.raw {
			wc.Flags |= p.checksums(e)
			return nil
		}
		f := cqeFlagsAndQPN(e)
		wc.SrcQPN, wc.SL, wc.SLID = ib.QPN(f&number24), uint8(f>>24&15), ib.LID(cqeSLID(e))
		if f>>28&3 != 0 {
			wc.Flags |= ib.WCGRH
		}
	}
	return nil
}

// received finds the receive that has ended. Called with mu held.
func (q *cq) received(p *qp, e cqe, tail uint32) (id uint64, err error) {
	if p.rcq != q {
		return 0, fmt.Errorf("it is of a receive of queue pair %#x, whose receives complete elsewhere", p.number)
	}
	counter := cqeCounter(tail)
	if p.srq != nil {
		if n := cqeIndex(e); !q.c.info.byIndex && n != p.srq.number {
			return 0, fmt.Errorf("it is of shared receive queue %#x, and queue pair %#x has %#x", n, p.number, p.srq.number)
		}
		return p.srq.received(counter)
	}
	rq := &p.rq
	if atomic.LoadUint32(&p.recvPosted) == p.recvTail || (uint32(counter)^p.recvTail)&rq.mask != 0 {
		return 0, fmt.Errorf("it is of receive %d of queue pair %#x, and that is not the oldest that is posted", counter, p.number)
	}
	id = rq.ids[p.recvTail&rq.mask]
	p.recvTail++
	return id, nil
}

// clean takes out the completions of a queue pair that are not polled yet: after it was reset they would be of requests that are no
// more, and after it was closed of a queue pair that is no more. Called with changeMu, and the queue pair's sendMu and recvMu, held.
func (q *cq) clean(p *qp) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.last == p {
		q.last = nil
	}
	if q.r.mem != nil { // else it is closed
		if p.scq == q {
			q.windowsFailed(p)
		}
		q.drop(p)
	}
	if p.scq == q {
		p.tail = 0
		ring.StoreRel32(&p.polled, 0)
	}
	if p.rcq == q {
		p.recvTail = 0
		ring.StoreRel32(&p.recvPolled, 0)
	}
}

// windowsFailed takes back what was noted of windows by requests whose failure has not been polled. Called with mu held.
func (q *cq) windowsFailed(p *qp) {
	for i := range q.ready() {
		e, tail, _ := q.r.ready(q.next + i)
		code := cqeCode(tail)
		if !p.owns(e) || code != cqeRequest && code != cqeRequestErr {
			continue
		}
		s, err := p.finished(tail)
		if err != nil {
			return
		}
		if code == cqeRequestErr {
			p.WindowsFailed(func(number uint32) bool { return int32(number-s.head) < 0 })
			return
		}
	}
}

// drop moves the completions of others to where those of a queue pair are, and takes the room that is left. Called with mu held.
func (q *cq) drop(p *qp) {
	n := q.ready()
	dropped := uint32(0)
	for i := n; i > 0; i-- {
		at := q.next + i - 1
		e, tail, _ := q.r.ready(at)
		switch {
		case p.owns(e):
			if code := cqeCode(tail); p.srq != nil && code != cqeRequest && code != cqeRequestErr {
				p.srq.received(cqeCounter(tail)) // what makes no sense is nobody's any more
			}
			dropped++
		case dropped > 0:
			q.r.copyTo(at, &q.r, at+dropped)
		}
	}
	if dropped > 0 {
		q.next += dropped
		consumed(q.rec.word[indexWord], be32(q.next&number24))
	}
}

// ready counts the completions that are there. Called with mu held.
func (q *cq) ready() (n uint32) {
	for n <= q.r.mask {
		if _, _, ok := q.r.ready(q.next + n); !ok {
			break
		}
		n++
	}
	fromDevice()
	return n
}

// owns reports whether a completion is the queue pair's.
func (q *qp) owns(e cqe) bool {
	if q.c.info.byIndex {
		return cqeIndex(e) == q.index
	}
	return cqeOpcodeAndQPN(e)&number24 == q.number
}
