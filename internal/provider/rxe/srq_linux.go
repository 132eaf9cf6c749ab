package rxe

import (
	"errors"
	"fmt"
	"sync"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

type srq struct {
	uverbs.SRQ
	c      *rxeContext
	cookie uint64
	maxWR  int
	maxSGE int

	mu sync.Mutex
	q  queue // guarded by mu; no memory once closed
}

// CreateSRQ implements driver.SRQCreator.
func (p *pd) CreateSRQ(cfg driver.SRQConfig) (driver.SRQ, error) {
	if err := p.c.Removed(); err != nil {
		return nil, err
	}
	s := &srq{c: p.c}
	s.cookie = p.c.Track(s)
	var resp abi.RxeCreateSRQResp
	var err error
	if s.maxWR, s.maxSGE, err = s.Init(&p.PD, cfg.MaxWR, cfg.MaxSGE, s.cookie, nil, uverbs.Bytes(&resp)); err != nil {
		p.c.Forget(s.cookie)
		return nil, err
	}
	if s.q, err = p.c.mapQueue(&resp.Mi, recvSize(s.maxSGE), toKernel); err != nil {
		return nil, errors.Join(fmt.Errorf("create_srq: %w", err), s.Close())
	}
	return s, nil
}

// MaxWR implements driver.SRQ.
func (s *srq) MaxWR() int { return s.maxWR }

// MaxSGE implements driver.SRQ.
func (s *srq) MaxSGE() int { return s.maxSGE }

// PostRecv implements driver.SRQ.
func (s *srq) PostRecv(wrs []ib.RecvWR) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.q.mem == nil {
		return 0, driver.ErrClosed
	}
	if err := s.c.Removed(); err != nil {
		return 0, err
	}
	return postRecv(&s.q, s.maxSGE, wrs)
}

// SetLimit implements driver.SRQ.
func (s *srq) SetLimit(n int) error {
	var cmd abi.RxeModifySRQCmd // where a new mapping would be told: only the limit changes, but the driver insists
	return s.Arm(n, uverbs.Bytes(&cmd))
}

// Close implements driver.SRQ.
func (s *srq) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.Destroy(); err != nil {
		return err
	}
	s.c.unmapQueue(&s.q)
	s.c.Forget(s.cookie)
	return nil
}
