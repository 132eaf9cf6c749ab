//go:build amd64 || arm64

package mlx5

import (
	"context"
	"errors"
	"fmt"
	"math/bits"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

type qp struct {
	// What posting needs, and never changes once the queue pair is made.
	c        *mlx5Context
	ops      *operations
	maxSGE   int // of a send request
	inline   int
	sigFlags uint32 // of every request
	number   uint32
	csum     ib.SendFlags // those for checksums that the device has
	ud       bool
	raw      bool
	more     bool // completions of receives say more: ud or raw

	sendMu ring.SpinLock
	fence  uint32 // guarded by sendMu: of the next request, unless it has one
	closed bool   // guarded by sendMu
	sq     sendQueue
	reg    *sendReg

	_      [64]byte // what pollers write is in lines of its own
	posted uint32   // requests written, ever: written under sendMu with release, before the doorbell; loaded by pollers
	_      [60]byte
	polled uint32 // requests complete, ever: written under scq.mu with release; loaded by posters
	tail   uint32 // guarded by scq.mu: the same

	recvTail   uint32 // guarded by rcq.mu: receives complete, ever
	recvPolled uint32 // the same: written under rcq.mu with release; loaded by posters
	_          [48]byte
	recvPosted uint32 // receives written, ever: written under recvMu with release, before the record; loaded by pollers
	recvMu     ring.SpinLock
	recvClosed bool // guarded by recvMu
	rq         recvQueue
	maxRecvSGE int
	withheld   recordWord // guarded by recvMu: see admit

	uverbs.QP
	cookie   uint64
	scq, rcq *cq
	srq      *srq
	index    uint32 // by which c.qps has it
	mem      []byte
	rec      *record
}

// units is how many units n bytes take.
func units(n int) int { return (n + unitBytes - 1) / unitBytes }

// overhead is the bytes before a send element's data, of the operation that has most of them.
func overhead(t ib.QPType) int {
	switch t {
	case ib.UD:
		return ctrlBytes + avBytes
	case ib.RawPacket:
		return ctrlBytes + 2*ethBytes
	}
	return ctrlBytes + raddrBytes
}

// maxInline is what any queue pair can be given.
func (c *mlx5Context) maxInline() int { return int(c.info.maxSend) - overhead(ib.UD) - 4 }

// maxSGE likewise, in send and receive requests.
func (c *mlx5Context) maxSGE() int {
	return min((int(c.info.maxSend)-overhead(ib.UD))/dataBytes, 1<<(bits.Len32(c.info.maxRecv)-1)/dataBytes)
}

// sizeOf is how large the queues have to be, or why they cannot.
func (i *deviceInfo) sizeOf(cfg *driver.QPConfig) (s size, err error) {
	want := &cfg.Cap
	if want.MaxSendWR < 0 || want.MaxRecvWR < 0 || want.MaxSendSGE < 0 || want.MaxRecvSGE < 0 || want.MaxInline < 0 {
		return s, fmt.Errorf("negative sizes: %+v", *want)
	}
	if s.apart = 1; cfg.Type == ib.RawPacket {
		s.apart = pageBytes // to the kernel, it is memory of its own
	}
	if want.MaxSendWR > 0 {
		over := overhead(cfg.Type)
		if want.MaxSendSGE > (int(i.maxSend)-over)/dataBytes {
			return s, fmt.Errorf("%d SGEs a send request: this device has room for %d", want.MaxSendSGE, (int(i.maxSend)-over)/dataBytes)
		}
		if most := int(i.maxSend) - over - 4; want.MaxInline > most {
			return s, fmt.Errorf("%d bytes of inline data: this device has room for %d", want.MaxInline, most)
		}
		n := over + max(want.MaxSendSGE*dataBytes, units(4+want.MaxInline)*unitBytes)
		switch cfg.Type {
		case ib.RC, ib.UC:
			n = max(n, bindBytes)
		case ib.RawPacket: // a request may have both, and must have the frame's beginning inline on some devices
			if n = max(n, ctrlBytes+units(ethHead+max(want.MaxInline, i.minInline))*unitBytes+want.MaxSendSGE*dataBytes); n > int(i.maxSend) {
				return s, fmt.Errorf("%d bytes of inline data and %d SGEs: this device has room for requests of %d bytes", want.MaxInline, want.MaxSendSGE, i.maxSend)
			}
		}
		blocks := (n + blockBytes - 1) / blockBytes
		most := int(i.maxBlocks) / blocks
		if want.MaxSendWR > most {
			return s, fmt.Errorf("%d send requests of %d SGEs or %d bytes of inline data: this device has room for %d", want.MaxSendWR, want.MaxSendSGE,
				want.MaxInline, most)
		}
		s.blocks = pow2(want.MaxSendWR * blocks)
		if s.blocks > i.maxBlocks {
			return s, fmt.Errorf("%d send requests take %d blocks: this device has queues of %d", want.MaxSendWR, s.blocks, i.maxBlocks)
		}
		s.requests = s.blocks / uint32(blocks)
		room := min(blocks*blockBytes, int(i.maxSend))
		s.inline = room - over - 4
		if cfg.Type == ib.RawPacket {
			s.inline = min(s.inline+i.minInline, room-ctrlBytes-ethHead-want.MaxSendSGE*dataBytes)
		}
	}
	if want.MaxRecvWR > 0 && cfg.SRQ == nil {
		stride := pow2(max(want.MaxRecvSGE, 1) * dataBytes)
		if stride > i.maxRecv {
			return s, fmt.Errorf("%d SGEs a receive: this device has room for %d", want.MaxRecvSGE, (1<<(bits.Len32(i.maxRecv)-1))/dataBytes)
		}
		if want.MaxRecvWR > int(i.maxSlots) {
			return s, fmt.Errorf("%d receives: this device has queues of %d", want.MaxRecvWR, i.maxSlots)
		}
		s.slots = max(pow2(want.MaxRecvWR), blockBytes/stride)
		s.shift = uint8(bits.TrailingZeros32(stride))
	}
	return s, nil
}

// pow2 is the power of two that is at least n, which is up to 2^30.
func pow2(n int) uint32 { return 1 << bits.Len32(uint32(n-1)) }

// CreateQP implements driver.PD.
func (p *pd) CreateQP(cfg driver.QPConfig) (driver.QP, error) {
	c := p.c
	if err := c.Removed(); err != nil {
		return nil, err
	}
	scq, ok1 := cfg.SendCQ.(*cq)
	rcq, ok2 := cfg.RecvCQ.(*cq)
	s, ok3 := cfg.SRQ.(*srq)
	if !ok1 || !ok2 || !ok3 && cfg.SRQ != nil || scq.c != c || rcq.c != c || s != nil && s.c != c {
		return nil, errors.New("the QP's CQs or SRQ belong to another device")
	}
	q := &qp{c: c, ops: operationsOf(cfg.Type), ud: cfg.Type == ib.UD, raw: cfg.Type == ib.RawPacket, scq: scq, rcq: rcq, srq: s, index: noUserIndex}
	if q.ops == nil {
		return nil, fmt.Errorf("%s: create_qp: %w: queue pairs of type %v", c.Device(), errors.ErrUnsupported, cfg.Type)
	}
	q.more = q.ud || q.raw
	if q.raw {
		if err := q.openRaw(&cfg); err != nil {
			return nil, fmt.Errorf("%s: create_qp: %w", c.Device(), err)
		}
	}
	z, err := c.info.sizeOf(&cfg)
	if err != nil {
		return nil, fmt.Errorf("%s: create_qp: %w", c.Device(), err)
	}
	if cfg.SignalAll {
		q.sigFlags = ctrlCompletion
	}
	if err := q.open(p, &cfg, z); err != nil {
		return nil, errors.Join(fmt.Errorf("create_qp: %w", err), q.free())
	}
	return q, nil
}

// open makes the queues, and the queue pair in the kernel. If it fails, free takes back what there is.
func (q *qp) open(p *pd, cfg *driver.QPConfig, z size) (err error) {
	c := q.c
	if q.mem, err = mapPages(max(z.sendAt()+z.sendBytes(), 1)); err != nil {
		return err
	}
	if q.rec, err = c.records.take(); err != nil {
		return err
	}
	if q.reg, err = c.uars.take(); err != nil {
		return err
	}
	cmd := abi.Mlx5CreateQP{BufAddr: uverbs.AddrOf(q.mem), DBAddr: q.rec.addr, SQWQECount: z.blocks, RQWQECount: z.slots,
		RQWQEShift: uint32(z.shift), Uidx: noUserIndex}
	if q.reg != nil {
		cmd.Flags, cmd.BFRegIndex = abi.MLX5_QP_FLAG_UAR_PAGE_INDEX, q.reg.page
	}
	if q.raw {
		cmd.SQBufAddr = cmd.BufAddr + uint64(z.sendAt())
		if cfg.Loopback {
			cmd.Flags |= abi.MLX5_QP_FLAG_TIR_ALLOW_SELF_LB_UC | abi.MLX5_QP_FLAG_TIR_ALLOW_SELF_LB_MC
		}
	}
	if c.info.byIndex {
		if q.index, err = c.qps.add(&unfinished); err != nil {
			return err
		}
		cmd.Uidx = q.index
	}
	srqHandle := -1
	if q.srq != nil {
		srqHandle = int(q.srq.Handle)
	}
	q.cookie = c.Track(q)
	if !c.info.byIndex {
		c.numbers.Lock()
		defer c.numbers.Unlock()
	}
	var resp abi.Mlx5CreateQPResp
	if err = q.Init(&p.PD, cfg, q.cookie, q.scq.handle, q.rcq.handle, srqHandle, uverbs.Bytes(&cmd), uverbs.Bytes(&resp)); err != nil {
		return err
	}
	q.number = uint32(q.QPN())
	if err = q.finish(&resp); err != nil {
		if still := q.Destroy(); still != nil {
			c.leave(q.mem)
			q.mem, q.rec, q.reg, q.index = nil, nil, nil, noUserIndex // they stay what they are
			err = errors.Join(err, still)
		}
		return err
	}
	q.lay(z)
	q.QPInfo.Cap = ib.QPCap{MaxSendWR: int(z.requests), MaxRecvWR: int(z.slots), MaxSendSGE: cfg.Cap.MaxSendSGE, MaxRecvSGE: q.maxRecvSGE, MaxInline: z.inline}
	q.maxSGE, q.inline = cfg.Cap.MaxSendSGE, z.inline
	c.qps.set(q.index, q) // for those who poll, and not before all of it is there
	return nil
}

// finish takes what the kernel has answered.
func (q *qp) finish(resp *abi.Mlx5CreateQPResp) (err error) {
	c := q.c
	if q.number > number24 {
		return fmt.Errorf("%w: the queue pair has number %#x, of more than 24 bits", ErrDevice, q.number)
	}
	if q.reg == nil {
		if q.reg, err = c.uars.chosen(resp.BFRegIndex); err != nil {
			return fmt.Errorf("%w: %w", ErrDevice, err)
		}
	}
	if !c.info.byIndex {
		if c.qps.get(q.number) != nil {
			return fmt.Errorf("%w: the number %#x is another queue pair's", ErrDevice, q.number)
		}
		q.index = q.number
	}
	return nil
}

// unfinished stands in the table for a queue pair that is being made: no completion can be of it.
var unfinished qp

// lay divides the memory: receives, then sends.
func (q *qp) lay(z size) {
	if z.slots > 0 {
		q.rq = recvQueue{base: at(q.mem, 0, z.recvBytes()), mask: z.slots - 1, limit: z.slots, shift: z.shift, record: q.rec.word[recvWord], ids: make([]uint64, z.slots)}
		q.maxRecvSGE = 1 << z.shift / dataBytes
		if q.raw {
			q.rq.record = &q.withheld
		}
	}
	if z.blocks > 0 {
		q.sq = sendQueue{base: at(q.mem, z.sendAt(), z.sendBytes()), mask: z.blocks - 1, limit: z.requests, record: q.rec.word[sendWord],
			sent: make([]sent, z.blocks)}
		q.sq.end = pastEnd(q.sq.base, z.sendBytes())
	}
}

// free gives back what the queue pair has. The kernel has none any more, or never had.
func (q *qp) free() error {
	c := q.c
	if q.index != noUserIndex {
		if c.info.byIndex {
			c.qps.remove(q.index)
		} else if c.qps.get(q.index) == q {
			c.qps.set(q.index, nil)
		}
	}
	if q.cookie != 0 {
		c.Forget(q.cookie)
	}
	c.uars.give(q.reg)
	c.records.give(q.rec)
	return unmapPages(q.mem)
}

// Close implements driver.QP.
func (q *qp) Close() error {
	c := q.c
	if !c.info.byIndex {
		c.numbers.Lock()
		defer c.numbers.Unlock()
	}
	q.shut(true) // nobody rings for a number that may be another's
	if err := q.Destroy(); err != nil {
		q.shut(false)
		return err
	}
	release := q.holdRings()
	q.sendMu.Lock()
	q.recvMu.Lock()
	q.forget()
	q.recvMu.Unlock()
	q.sendMu.Unlock()
	release()
	return q.free()
}

// shut ends posting, or lets it go on.
func (q *qp) shut(closed bool) {
	q.sendMu.Lock()
	q.recvMu.Lock()
	q.closed, q.recvClosed = closed, closed
	q.recvMu.Unlock()
	q.sendMu.Unlock()
}

// holdRings keeps the rings of the queue pair's completion queues where they are, until the function that it returns is called.
func (q *qp) holdRings() (release func()) {
	a, b := q.scq, q.rcq
	if a == b {
		a.changeMu.Lock()
		return a.changeMu.Unlock
	}
	if a.cookie > b.cookie { // everybody in the same order
		a, b = b, a
	}
	a.changeMu.Lock()
	b.changeMu.Lock()
	return func() {
		b.changeMu.Unlock()
		a.changeMu.Unlock()
	}
}

// forget takes what the queue pair has had so far out of its completion queues. Called with their rings held, and sendMu and recvMu.
func (q *qp) forget() {
	q.scq.clean(q)
	if q.rcq != q.scq {
		q.rcq.clean(q)
	}
}

// Path implements driver.PathReporter.
func (q *qp) Path() string {
	switch {
	case q.State() < ib.RTR:
		return ""
	case q.raw:
		return "ethernet"
	case q.c.Link == ib.LinkInfiniBand:
		return "infiniband"
	}
	return "roce"
}

// Modify implements driver.QP.
func (q *qp) Modify(ctx context.Context, attr *ib.QPAttr, mask ib.QPAttrMask) error {
	own := *attr // the caller's are the caller's again when this returns, which the end of ctx may bring about first
	attr = &own
	return q.Change(ctx, attr, mask, func() {
		switch {
		case mask&ib.AttrState == 0:
		case attr.State == ib.Reset:
			q.reset()
		case q.raw && attr.State != ib.Init:
			q.admit()
		}
	})
}

// reset makes the queues as they were in the beginning: the device has forgotten them.
func (q *qp) reset() {
	defer q.holdRings()()
	q.sendMu.Lock()
	q.recvMu.Lock()
	q.forget()
	q.ForgetWindows()
	q.sq.cur, q.sq.head, q.rq.head, q.fence = 0, 0, 0, 0
	ring.StoreRel32(&q.posted, 0)
	ring.StoreRel32(&q.recvPosted, 0)
	q.rec.clear()
	if q.raw && q.rq.limit > 0 {
		q.rq.record = &q.withheld
	}
	q.recvMu.Unlock()
	q.sendMu.Unlock()
}

// Query implements driver.QP.
func (q *qp) Query() (ib.QPAttr, error) { return q.Ask() }
