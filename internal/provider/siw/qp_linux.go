package siw

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What iWARP, or the driver, does not have. Made once, because the data path must not allocate.
var (
	errOnlyRC   = fmt.Errorf("iWARP has reliable connections only, and no UC or UD: %w", errors.ErrUnsupported)
	errByHand   = fmt.Errorf("iWARP connections are made by the connection manager only (qp.Listen, qp.QP.Dial), not by hand: %w", errors.ErrUnsupported)
	errOneLife  = fmt.Errorf("a queue pair of iWARP serves one connection, and does not come back to RESET: make a new one: %w", errors.ErrUnsupported)
	errNoDrain  = fmt.Errorf("iWARP has no state SQD: %w", errors.ErrUnsupported)
	errNoImm    = fmt.Errorf("%w: iWARP has no immediate data", driver.ErrInvalidWR)
	errNoAtomic = fmt.Errorf("%w: this iWARP has no atomics", driver.ErrInvalidWR)
	errNoWindow = fmt.Errorf("%w: this iWARP has no memory windows, and invalidates no keys", driver.ErrInvalidWR)
	errReadSGEs = fmt.Errorf("%w: a READ of iWARP goes to one SGE", driver.ErrInvalidWR)
	errNoReads  = fmt.Errorf("%w: the connection was made with no READs in flight (MaxRdAtomic)", driver.ErrInvalidWR)
	errTooLong  = fmt.Errorf("%w: a message of more than 2^31-1 bytes", driver.ErrInvalidWR)
	errSpare    = fmt.Errorf("%w (the completion queue has no room for more unsignaled READs and long messages)", driver.ErrQueueFull)
)

// copied is the length from which on the kernel does not copy an unsignaled message (SENDPAGE_THRESH: at least a page).
const copied = 4096

type qp struct {
	uverbs.QP
	c        *siwContext
	cookie   uint64
	scq, rcq *cq
	srq      *srq // nil: own receive queue
	sigAll   bool
	made     chan struct{} // closed when it is made, or cannot be

	access    atomic.Uint32 // what the last Modify has said
	port      atomic.Uint32
	connected atomic.Bool   // it has been in RTS
	ord       atomic.Uint64 // READs that the kernel can have in flight

	failed atomic.Bool // it is in Err, or on its way there, for good
	quiet  atomic.Bool // it is, and the kernel has said all about its requests
	endMu  sync.Mutex  // held on the way there
	endErr error       // guarded by endMu: how that went the last time

	sendMu sync.Mutex
	sq     queue            // guarded by sendMu, and read by ledger.flush; no memory once closed
	bell   *uverbs.Prepared // guarded by sendMu
	send   ledger
	hold

	recvMu sync.Mutex
	rq     queue // guarded by recvMu; no memory without, or once closed
	recv   ledger
	closed bool // guarded by recvMu
}

// CreateQP implements driver.PD.
func (p *pd) CreateQP(cfg driver.QPConfig) (driver.QP, error) {
	if err := p.c.Removed(); err != nil {
		return nil, err
	}
	if cfg.Type != ib.RC {
		return nil, errOnlyRC
	}
	scq, ok1 := cfg.SendCQ.(*cq)
	rcq, ok2 := cfg.RecvCQ.(*cq)
	s, ok3 := cfg.SRQ.(*srq)
	if !ok1 || !ok2 || !ok3 && cfg.SRQ != nil {
		return nil, errors.New("the QP's CQs or SRQ belong to another device")
	}
	cfg.Cap.MaxSendWR = max(cfg.Cap.MaxSendWR, 1) // the driver wants a send queue
	q := &qp{c: p.c, scq: scq, rcq: rcq, srq: s, sigAll: cfg.SignalAll, made: make(chan struct{})}
	defer close(q.made)
	srqHandle := -1
	if s != nil {
		srqHandle = int(s.Handle)
	}
	q.cookie = p.c.Track(q)
	var resp abi.SiwUrespCreateQP
	if err := q.Init(&p.PD, &cfg, q.cookie, scq.handle, rcq.handle, srqHandle, nil, uverbs.Bytes(&resp)); err != nil {
		p.c.Forget(q.cookie)
		return nil, err
	}
	p.c.settle(uint32(q.QPN()))
	if err := q.open(&resp, &cfg.Cap); err != nil {
		return nil, errors.Join(fmt.Errorf("create_qp: %w", err), q.destroy())
	}
	scq.add(q)
	if rcq != scq {
		rcq.add(q)
	}
	return q, nil
}

// open maps the queues.
func (q *qp) open(resp *abi.SiwUrespCreateQP, asked *ib.QPCap) (err error) {
	c := &q.QPInfo.Cap
	c.MaxInline = abi.SIW_MAX_INLINE
	switch {
	case uint64(resp.QPID) != uint64(q.QPN()):
		return fmt.Errorf("the kernel gave the numbers %#x and %#x", uint32(q.QPN()), resp.QPID)
	case c.MaxSendSGE < asked.MaxSendSGE || c.MaxSendSGE > abi.SIW_MAX_SGE || c.MaxRecvSGE < asked.MaxRecvSGE || c.MaxRecvSGE > abi.SIW_MAX_SGE:
		return fmt.Errorf("the kernel granted %d and %d SGEs, %d and %d were asked for", c.MaxSendSGE, c.MaxRecvSGE, asked.MaxSendSGE, asked.MaxRecvSGE)
	}
	if q.sq, err = q.c.mapQueue(resp.SQKey, resp.NumSQE, asked.MaxSendWR, sqeBytes, 0); err != nil {
		return err
	}
	c.MaxSendWR = q.sq.len()
	q.send.init(q, false, c.MaxSendWR)
	if q.bell, err = q.c.PrepareSendDoorbell(q.Handle); err != nil {
		return err
	}
	c.MaxRecvWR = 0
	if q.srq == nil && asked.MaxRecvWR > 0 {
		if q.rq, err = q.c.mapQueue(resp.RQKey, resp.NumRQE, asked.MaxRecvWR, rqeBytes, 0); err != nil {
			return err
		}
		c.MaxRecvWR = q.rq.len()
	}
	q.recv.init(q, true, c.MaxRecvWR)
	return nil
}

// destroy ends the queue pair in the kernel, then here. If the kernel refuses, nothing has changed.
func (q *qp) destroy() error {
	defer q.c.endNumber(q)()
	if err := q.Destroy(); err != nil {
		return err
	}
	q.failed.Store(true) // nothing is held back any more
	q.scq.drop(q)
	if q.rcq != q.scq {
		q.rcq.drop(q)
	}
	q.c.unmapQueue(&q.sq)
	q.c.unmapQueue(&q.rq)
	q.closed = true
	q.bell.Free()
	q.bell = nil
	q.c.Forget(q.cookie)
	return nil
}

// Close implements driver.QP.
func (q *qp) Close() error {
	err := q.close()
	if err != nil && q.failed.Load() {
		q.fail() // who has tried that meanwhile was turned away
	}
	return err
}

func (q *qp) close() error {
	q.sendMu.Lock()
	defer q.sendMu.Unlock()
	q.recvMu.Lock()
	defer q.recvMu.Unlock()
	if q.closed {
		return nil // its number may be another's
	}
	return q.destroy()
}

// Path implements driver.PathReporter.
func (q *qp) Path() string {
	if !q.connected.Load() {
		return ""
	}
	return "iwarp"
}

// Modify implements driver.QP.
func (q *qp) Modify(ctx context.Context, attr *ib.QPAttr, mask ib.QPAttrMask) error {
	if mask&ib.AttrPKeyIndex != 0 && attr.PKeyIndex != 0 {
		return fmt.Errorf("P_Key index %d: iWARP has no P_Keys", attr.PKeyIndex)
	}
	mask &^= ib.AttrPKeyIndex
	own := *attr // the caller's are the caller's again when this returns, which the end of ctx may bring about first
	attr = &own
	to := q.State()
	if mask&ib.AttrState != 0 {
		to = attr.State
	}
	switch {
	case to == ib.Err:
		if err := ctx.Err(); err != nil {
			return err
		}
		return q.fail()
	case to == ib.RTR || to == ib.RTS && q.State() < ib.RTS:
		return errByHand
	case to == ib.SQD || to == ib.SQE:
		return errNoDrain
	case to == ib.Reset && (q.connected.Load() || q.failed.Load()):
		return errOneLife
	}
	err := q.Change(ctx, attr, mask, func() {
		if mask&ib.AttrAccess != 0 {
			q.access.Store(uint32(attr.Access))
		}
		if mask&ib.AttrPort != 0 {
			q.port.Store(uint32(attr.Port))
		}
	})
	if q.failed.Load() { // meanwhile
		q.SetState(ib.Err)
	}
	if err == nil && to == ib.Reset {
		q.forget() // not in the change: Close holds recvMu when it waits for that to end
	}
	return err
}

// forget empties the receive queue, which the kernel has not looked at.
func (q *qp) forget() {
	q.recvMu.Lock()
	defer q.recvMu.Unlock()
	q.rcq.mu.Lock()
	defer q.rcq.mu.Unlock()
	if q.rq.mem == nil || q.connected.Load() {
		return
	}
	for i := range uint64(q.rq.len()) {
		q.rq.setHead(i, 0)
	}
	q.recv.posted.Store(0)
	q.recv.retired.Store(0)
}

// Query implements driver.QP. The state is this package's. Of the rest, only what is copied here comes from the driver: the kernel
// does not clear what that leaves out.
func (q *qp) Query() (ib.QPAttr, error) {
	if err := q.c.Removed(); err != nil {
		return ib.QPAttr{}, err
	}
	a, err := q.ask()
	if err != nil {
		return a, err
	}
	if q.c.tellsState && a.State > ib.RTS && q.State() == ib.RTS {
		q.fail()
	}
	s := q.State()
	return ib.QPAttr{State: s, CurState: s, PathMTU: a.PathMTU, Access: ib.Access(q.access.Load()), Port: uint8(q.port.Load()),
		MaxRdAtomic: a.MaxDestRdAtomic, MaxDestRdAtomic: a.MaxRdAtomic}, nil // the driver has these the other way around
}

// ask returns what the kernel answers, as it is.
func (q *qp) ask() (a ib.QPAttr, err error) {
	err = q.Named(func() (err error) {
		a, err = q.C.QueryQP(q.Handle)
		return err
	})
	return a, err
}

// Moved says that the connection manager has moved the queue pair.
func (q *qp) Moved(s ib.QPState) {
	if s != ib.RTS {
		q.fail()
		return
	}
	if a, err := q.ask(); err == nil {
		q.ord.Store(uint64(a.MaxDestRdAtomic)) // see Query
	}
	q.connected.Store(true)
	q.SetState(ib.RTS)
	if q.failed.Load() {
		q.SetState(ib.Err)
	}
}

// Event hears of errors.
func (q *qp) Event(t ib.EventType) {
	switch t {
	case ib.EventQPFatal, ib.EventQPReqErr, ib.EventQPAccessErr:
		go func() {
			<-q.made
			q.fail()
		}()
	}
}

// fail moves the queue pair to Err, if it is not there, and has what is posted flushed. When it returns without an error, from
// whichever of several calls, the kernel has flushed. Otherwise the kernel has the requests, as far as is known: nothing is said of
// them before it is called again, or the queue pair is closed.
func (q *qp) fail() error {
	q.failed.Store(true)
	err := q.end()
	q.scq.flushLater(&q.send)
	if q.srq == nil {
		q.rcq.flushLater(&q.recv)
	}
	return err
}

// end tells the kernel, once.
func (q *qp) end() error {
	q.endMu.Lock()
	defer q.endMu.Unlock()
	if q.quiet.Load() {
		return q.endErr
	}
	q.endErr = q.Flush() // also if the device is on its way out: the kernel goes on with what it has for as long as it has the device
	q.SetState(ib.Err)
	if q.endErr == nil || errors.Is(q.endErr, driver.ErrDeviceRemoved) {
		q.quiet.Store(true)
	}
	if q.endErr == nil {
		q.endErr = q.c.Removed()
	}
	return q.endErr
}

// PostSend implements driver.QP.
func (q *qp) PostSend(wrs []ib.SendWR) (n int, err error) {
	q.sendMu.Lock()
	n, err = q.postSend(wrs)
	q.sendMu.Unlock()
	if q.holds() {
		q.giveMore() // READs may have completed meanwhile, and nobody have found the lock free
	}
	return n, err
}

func (q *qp) postSend(wrs []ib.SendWR) (n int, err error) {
	if q.sq.mem == nil {
		return 0, driver.ErrClosed
	}
	if err := q.c.Removed(); err != nil {
		return 0, err
	}
	if s := q.State(); s < ib.RTS && !q.failed.Load() {
		return 0, driver.StateErr(s)
	}
	failed := q.failed.Load()
	room, first := q.send.room(), q.send.posted.Load()
	for n < len(wrs) {
		if n >= room {
			err = driver.ErrQueueFull
			break
		}
		if err = q.put(&wrs[n], first+uint64(n), failed); err != nil {
			break
		}
		n++
	}
	if n == 0 {
		return 0, err
	}
	q.send.posted.Store(first + uint64(n)) // before the kernel can complete any
	if !failed {
		if bellErr := q.give(); bellErr != nil {
			return n, bellErr
		}
	}
	// Either this sees that the queue pair has failed, or who has failed it sees what was posted.
	if q.failed.Load() {
		q.scq.flushLater(&q.send)
	}
	return n, err
}

// bellTries is how often the doorbell is rung when the queue pair is busy.
const bellTries = 64

// ring has the kernel look at the send queue. It returns an error only if the device has gone: every other failure is the
// queue pair's, and what was posted is flushed.
func (q *qp) ring() error {
	var err error
	for range bellTries {
		if err = q.bell.Run(); !errors.Is(err, unix.ENOTCONN) || q.failed.Load() {
			break
		}
		runtime.Gosched() // its state is being changed, or is another by now
	}
	if errors.Is(err, driver.ErrDeviceRemoved) {
		return err
	}
	if err != nil {
		q.fail()
	}
	return nil
}

// put writes a request to its slot, all but the flags, and enters it in the ledger. If the queue pair has failed, it is only
// entered.
func (q *qp) put(wr *ib.SendWR, pos uint64, failed bool) error {
	op, err := opcode(wr.Opcode)
	if err != nil {
		return err
	}
	if err := driver.CheckSendWR(ib.RC, &q.QPInfo.Cap, wr); err != nil {
		return err
	}
	if op == abi.SIW_OP_READ && filled(wr.SGEs) == 0 {
		// The kernel on the other side answers with as many bytes as its last message had (siw_activate_tx leaves the length of
		// what it sent before in its place). A WRITE of nothing does as little, and needs no key either.
		op = abi.SIW_OP_WRITE
	}
	e := entry{id: wr.ID, op: ib.WCOpcodeOf(wr.Opcode)}
	var flags uint16 = abi.SIW_WQE_VALID
	if wr.Flags&ib.SendSignaled != 0 || q.sigAll { // the kernel looks at the request only
		e.is |= signaled
		flags |= abi.SIW_WQE_SIGNALLED
	}
	if wr.Flags&ib.SendSolicited != 0 && op == abi.SIW_OP_SEND {
		flags |= abi.SIW_WQE_SOLICITED
	}
	payload := wr.PayloadLen()
	if payload > maxMessage {
		return errTooLong
	}
	if failed {
		e.is |= late
		*q.send.at(pos) = e
		return nil
	}
	read := op == abi.SIW_OP_READ
	switch {
	case read && filled(wr.SGEs) > 1:
		return errReadSGEs
	case read && q.ord.Load() == 0:
		return errNoReads // it would be held back for ever
	case !wqeFree(q.sq.head(pos)):
		return driver.ErrQueueFull // the ledger says otherwise: the kernel is not done with it
	}
	switch {
	case read:
		e.gate = reads
	case wr.Flags&ib.SendFence != 0: // READs are done in order
		e.gate = fenced
	}
	if e.is&signaled == 0 {
		if !read && payload < copied {
			e.is |= silent
		} else {
			// The kernel has to tell all the same. Nothing later says that a READ is done: what follows it completes before it. And
			// what is large is sent right from the caller's memory if nobody wants to hear of it, and so has not left that when
			// something later completes.
			if q.scq.hidden.Add(1) > q.scq.spare {
				q.scq.hidden.Add(-1)
				return errSpare
			}
			flags |= abi.SIW_WQE_SIGNALLED
		}
	}
	e.head = q.sq.putSend(pos, wr, op, flags)
	*q.send.at(pos) = e
	return nil
}

// filled counts the elements that have bytes.
func filled(sges []ib.SGE) (n int) {
	for i := range sges {
		if sges[i].Length > 0 {
			n++
		}
	}
	return n
}

// opcode is the driver's opcode.
func opcode(op ib.Opcode) (uint8, error) {
	switch op {
	case ib.OpSend:
		return abi.SIW_OP_SEND, nil
	case ib.OpRDMAWrite:
		return abi.SIW_OP_WRITE, nil
	case ib.OpRDMARead:
		return abi.SIW_OP_READ, nil
	case ib.OpSendWithImm, ib.OpRDMAWriteWithImm:
		return 0, errNoImm
	case ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd:
		return 0, errNoAtomic
	case ib.OpBindMW, ib.OpLocalInv, ib.OpSendWithInv:
		return 0, errNoWindow
	}
	return 0, driver.ErrOpcode
}

// PostRecv implements driver.QP.
func (q *qp) PostRecv(wrs []ib.RecvWR) (n int, err error) {
	if q.srq != nil {
		return 0, driver.ErrHasSRQ
	}
	q.recvMu.Lock()
	defer q.recvMu.Unlock()
	if q.closed {
		return 0, driver.ErrClosed
	}
	if err := q.c.Removed(); err != nil {
		return 0, err
	}
	failed := q.failed.Load()
	if s := q.State(); s == ib.Reset && !failed {
		return 0, driver.StateErr(s)
	}
	room, first := q.recv.room(), q.recv.posted.Load()
	for n < len(wrs) {
		wr, pos := &wrs[n], first+uint64(n)
		if n >= room || !failed && !wqeFree(q.rq.head(pos)) {
			err = driver.ErrQueueFull
			break
		}
		if err = checkRecv(wr, q.QPInfo.Cap.MaxRecvSGE); err != nil {
			break
		}
		e := entry{id: wr.ID, op: ib.WCRecv, is: signaled}
		if failed {
			e.is |= late
		} else {
			e.head = q.rq.putRecv(pos, pos, wr)
		}
		*q.recv.at(pos) = e
		n++
	}
	if n == 0 {
		return 0, err
	}
	end := first + uint64(n)
	q.recv.posted.Store(end)
	if !failed {
		for i := first; i < end; i++ {
			q.rq.setHead(i, q.recv.at(i).head)
		}
	}
	if q.failed.Load() {
		q.rcq.flushLater(&q.recv)
	}
	return n, err
}

func checkRecv(wr *ib.RecvWR, maxSGE int) error {
	switch {
	case len(wr.SGEs) > maxSGE:
		return driver.ErrTooManySGEs
	case ib.SGELen(wr.SGEs) > maxMessage:
		return errTooLong
	}
	return nil
}
