//go:build amd64 || arm64

package mlx5

import (
	"errors"
	"fmt"
	"math/bits"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A shared receive queue is a list of slots: each begins with the number of the next one. The device takes them from the front, and
// tells which it has used, in any order; they are put behind the last one again. The slot at the end is never used, as the
// number of the one that will follow it is not known yet.
type srq struct {
	uverbs.SRQ
	c      *mlx5Context
	number uint32
	cookie uint64
	rec    *record
	mem    []byte
	maxSGE int

	mu      ring.SpinLock // taken by pollers, too
	closed  bool          // guarded by mu
	q       recvQueue     // guarded by mu
	free    []uint16      // guarded by mu: by slot, the one that follows. The device has a copy, which is not believed
	front   uint16        // guarded by mu: the slot that is posted next
	back    uint16        // guarded by mu: the last one of the list
	waiting []bool        // guarded by mu: by slot, whether it is posted and not used yet
}

const nextBytes = 16 // of a slot, before its elements

// CreateSRQ implements driver.SRQCreator.
func (p *pd) CreateSRQ(cfg driver.SRQConfig) (driver.SRQ, error) {
	c := p.c
	if err := c.Removed(); err != nil {
		return nil, err
	}
	stride := max(pow2(nextBytes+max(cfg.MaxSGE, 1)*dataBytes), 32)
	if cfg.MaxSGE < 0 || stride > c.info.maxRecv || cfg.MaxWR < 1 || cfg.MaxWR >= int(c.info.maxSRQSlots) {
		return nil, fmt.Errorf("%s: create_srq: %d receives of %d SGEs: this device has up to %d, of up to %d", c.Device(), cfg.MaxWR, cfg.MaxSGE,
			max(int(c.info.maxSRQSlots)-1, 0), (1<<(bits.Len32(c.info.maxRecv)-1)-nextBytes)/dataBytes)
	}
	s := &srq{c: c}
	slots := pow2(cfg.MaxWR + 1)
	s.cookie = c.Track(s)
	if err := s.open(p, slots, stride); err != nil {
		return nil, errors.Join(fmt.Errorf("create_srq: %w", err), s.release())
	}
	return s, nil
}

// open makes the queue, here and in the kernel. If it fails, release takes back what there is.
func (s *srq) open(p *pd, slots, stride uint32) (err error) {
	if s.mem, err = mapPages(int(slots * stride)); err != nil {
		return err
	}
	if s.rec, err = s.c.records.take(); err != nil {
		return err
	}
	s.maxSGE = int(stride-nextBytes) / dataBytes
	s.q = recvQueue{base: at(s.mem, 0, int(slots*stride)), mask: slots - 1, limit: slots - 1, shift: uint8(bits.TrailingZeros32(stride)),
		record: s.rec.word[recvWord], ids: make([]uint64, slots)}
	s.free, s.waiting, s.back = make([]uint16, slots), make([]bool, slots), uint16(slots-1)
	for i := range slots - 1 {
		s.link(uint16(i), uint16(i+1))
	}
	cmd := abi.Mlx5CreateSRQ{BufAddr: uverbs.AddrOf(s.mem), DBAddr: s.rec.addr}
	var resp abi.Mlx5CreateSRQResp
	wr, _, err := s.Init(&p.PD, int(slots-1), s.maxSGE, s.cookie, uverbs.Bytes(&cmd), uverbs.Bytes(&resp))
	if err != nil {
		return err
	}
	s.number = resp.SRQN
	switch {
	case wr != int(slots-1):
		err = fmt.Errorf("%w: a list of %d slots was given, and the kernel speaks of %d", ErrDevice, slots, wr+1)
	case s.number > number24 || s.number == 0:
		err = fmt.Errorf("%w: the shared receive queue has number %#x", ErrDevice, s.number)
	}
	if err == nil {
		return nil
	}
	if still := s.Destroy(); still != nil {
		s.c.leave(s.mem)
		s.mem, s.rec = nil, nil
		err = errors.Join(err, still)
	}
	return err
}

// link puts a slot behind another.
func (s *srq) link(i, next uint16) {
	s.free[i] = next
	put(s.q.slot(uint32(i)), 2, bits.ReverseBytes16(next))
}

// release gives back what the queue has. The kernel has none any more, or never had.
func (s *srq) release() error {
	s.c.records.give(s.rec)
	s.c.Forget(s.cookie)
	return unmapPages(s.mem)
}

// MaxWR implements driver.SRQ.
func (s *srq) MaxWR() int { return int(s.q.limit) }

// MaxSGE implements driver.SRQ.
func (s *srq) MaxSGE() int { return s.maxSGE }

// PostRecv implements driver.SRQ.
func (s *srq) PostRecv(wrs []ib.RecvWR) (n int, err error) {
	if err := s.c.Removed(); err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, driver.ErrClosed
	}
	for n < len(wrs) {
		if s.front == s.back {
			err = driver.ErrQueueFull
			break
		}
		wr := &wrs[n]
		i := s.front
		if err = putRecv(forward(s.q.slot(uint32(i)), nextBytes), wr.SGEs, s.maxSGE); err != nil {
			break
		}
		s.q.ids[i], s.waiting[i] = wr.ID, true
		s.front = s.free[i]
		n++
	}
	if n > 0 {
		s.q.head += uint32(n)
		publish(s.q.record, be32(s.q.head&0xffff))
	}
	return n, err
}

// received takes a slot that the device has used, and returns its receive's ID.
func (s *srq) received(slot uint16) (id uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, driver.ErrClosed // a queue pair is being closed that has had it
	}
	if int(slot) >= len(s.waiting) || !s.waiting[slot] {
		return 0, fmt.Errorf("it is of slot %d of shared receive queue %#x, where no receive is posted", slot, s.number)
	}
	s.waiting[slot] = false
	s.link(s.back, slot)
	s.back = slot
	return s.q.ids[slot], nil
}

// SetLimit implements driver.SRQ.
func (s *srq) SetLimit(n int) error { return s.Arm(n, nil) }

// Close implements driver.SRQ.
func (s *srq) Close() error {
	if err := s.Destroy(); err != nil {
		return err
	}
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	return s.release()
}
