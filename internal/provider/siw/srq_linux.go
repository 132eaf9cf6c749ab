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

type srq struct {
	uverbs.SRQ
	c      *siwContext
	cookie uint64
	maxSGE int
	maxWR  int
	limit  atomic.Int32  // what is armed: the kernel goes on telling what was
	polled atomic.Uint64 // receives whose completions were polled, or dropped with their queue pair

	mu     sync.Mutex
	q      queue  // guarded by mu; no memory once closed
	posted uint64 // guarded by mu
}

// CreateSRQ implements driver.SRQCreator.
func (p *pd) CreateSRQ(cfg driver.SRQConfig) (driver.SRQ, error) {
	if err := p.c.Removed(); err != nil {
		return nil, err
	}
	s := &srq{c: p.c}
	s.cookie = p.c.Track(s)
	var resp abi.SiwUrespCreateSRQ
	var err error
	if _, s.maxSGE, err = s.Init(&p.PD, cfg.MaxWR, cfg.MaxSGE, s.cookie, nil, uverbs.Bytes(&resp)); err != nil {
		p.c.Forget(s.cookie)
		return nil, err
	}
	s.q, err = p.c.mapQueue(resp.SRQKey, resp.NumRQE, cfg.MaxWR, rqeBytes, 0)
	if err == nil && (s.maxSGE < cfg.MaxSGE || s.maxSGE > abi.SIW_MAX_SGE) {
		err = fmt.Errorf("the kernel granted %d SGEs, %d were asked for", s.maxSGE, cfg.MaxSGE)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create_srq: %w", err), s.destroy())
	}
	s.maxWR = s.q.len()
	return s, nil
}

// MaxWR implements driver.SRQ.
func (s *srq) MaxWR() int { return s.maxWR }

// MaxSGE implements driver.SRQ.
func (s *srq) MaxSGE() int { return s.maxSGE }

// PostRecv implements driver.SRQ.
func (s *srq) PostRecv(wrs []ib.RecvWR) (n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.q.mem == nil {
		return 0, driver.ErrClosed
	}
	if err := s.c.Removed(); err != nil {
		return 0, err
	}
	room := s.q.len() - int(s.posted-s.polled.Load())
	for n < len(wrs) {
		wr := &wrs[n]
		if n >= room || !wqeFree(s.q.head(s.posted)) {
			return n, driver.ErrQueueFull
		}
		if err := checkRecv(wr, s.maxSGE); err != nil {
			return n, err
		}
		s.q.setHead(s.posted, s.q.putRecv(s.posted, wr.ID, wr))
		s.posted++
		n++
	}
	return n, nil
}

// SetLimit implements driver.SRQ.
func (s *srq) SetLimit(n int) error {
	if err := s.c.Removed(); err != nil {
		return err
	}
	s.limit.Store(int32(n)) // before the event may come
	err := s.Arm(n, nil)
	if err != nil {
		s.limit.Store(0)
	}
	return err
}

// Limit implements driver.SRQ.
func (s *srq) Limit() int { return int(s.limit.Load()) }

// Event hears that the limit was reached.
func (s *srq) Event(t ib.EventType) {
	if t == ib.EventSRQLimit {
		s.limit.Store(0)
	}
}

// Close implements driver.SRQ.
func (s *srq) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.destroy()
}

func (s *srq) destroy() error {
	if err := s.Destroy(); err != nil {
		return err
	}
	s.c.unmapQueue(&s.q)
	s.c.Forget(s.cookie)
	return nil
}
