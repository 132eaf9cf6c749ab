package qp

import (
	"errors"
	"fmt"
	"net"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/life"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// SRQConfig describes a shared receive queue. Zero fields take their defaults, lowered to what the device can do.
type SRQConfig struct {
	Depth int // receives that can be outstanding; default 1024
	SGE   int // scatter/gather elements of one receive; default 1
}

// An SRQ is a shared receive queue: incoming messages of all its queue pairs take their buffers from it (IBA 10.2.9),
// so that memory is needed for the messages in flight and not for every connection. It is safe for concurrent use.
type SRQ struct {
	life    life.Node
	drv     driver.SRQ
	pd      *verbs.PD
	untrack func()
}

// NewSRQ makes a shared receive queue. It fails with errors.ErrUnsupported on devices without.
func NewSRQ(pd *verbs.PD, cfg SRQConfig) (*SRQ, error) {
	dev := pd.Context().Name()
	c, ok := pd.Driver().(driver.SRQCreator)
	if !ok {
		return nil, opErr("create_srq", dev, errors.ErrUnsupported)
	}
	a, err := pd.Context().QueryDevice()
	if err != nil {
		return nil, err
	}
	switch {
	case cfg.Depth < 0 || cfg.Depth > a.MaxSRQWR:
		return nil, opErr("create_srq", dev, fmt.Errorf("depth %d is not between 1 and the device's limit of %d", cfg.Depth, a.MaxSRQWR))
	case cfg.SGE < 0 || cfg.SGE > a.MaxSRQSGE:
		return nil, opErr("create_srq", dev, fmt.Errorf("SGE %d is not between 1 and the device's limit of %d", cfg.SGE, a.MaxSRQSGE))
	}
	if cfg.Depth == 0 {
		cfg.Depth = min(1024, a.MaxSRQWR)
	}
	if cfg.SGE == 0 {
		cfg.SGE = 1
	}
	s := &SRQ{pd: pd}
	if err := s.life.Attach(pd.Life()); err != nil {
		return nil, opErr("create_srq", dev, err)
	}
	if s.drv, err = c.CreateSRQ(driver.SRQConfig{MaxWR: cfg.Depth, MaxSGE: cfg.SGE}); err != nil {
		s.life.Abandon()
		return nil, opErr("create_srq", dev, err)
	}
	s.untrack = verbs.Track(pd.Context(), s.drv, s)
	life.Watch(s, &s.life, "qp.SRQ", dev)
	return s, nil
}

// Depth is how many receives can be outstanding, at least what was asked for.
func (s *SRQ) Depth() int { return s.drv.MaxWR() }

// SGE is how many scatter/gather elements one receive can have.
func (s *SRQ) SGE() int { return s.drv.MaxSGE() }

// PostRecv posts buffers, in order. It returns how many were accepted; if n < len(wrs), err says why wrs[n] was not. It
// never blocks and does not allocate.
func (s *SRQ) PostRecv(wrs []ib.RecvWR) (n int, err error) {
	if s.life.Closed() {
		return 0, errSRQClosed
	}
	return s.drv.PostRecv(wrs)
}

var errSRQClosed = &verbs.OpError{Op: "post_srq_recv", Err: net.ErrClosed}

// SetLimit arms one ib.EventSRQLimit for when fewer than n receives are posted; 0 disarms.
func (s *SRQ) SetLimit(n int) error {
	dev := s.pd.Context().Name()
	if s.life.Closed() {
		return opErr("modify_srq", dev, net.ErrClosed)
	}
	if n < 0 || n > s.drv.MaxWR() {
		return opErr("modify_srq", dev, fmt.Errorf("limit %d is not between 0 and the depth of %d", n, s.drv.MaxWR()))
	}
	return opErr("modify_srq", dev, s.drv.SetLimit(n))
}

// Limit is the armed limit, or 0 if none is armed, or the queue is closed.
func (s *SRQ) Limit() int {
	if s.life.Closed() {
		return 0
	}
	return s.drv.Limit()
}

// Close destroys the queue. It fails with verbs.ErrBusy while a queue pair uses it.
func (s *SRQ) Close() error {
	return opErr("destroy_srq", s.pd.Context().Name(), s.life.Close(func() error {
		if err := s.drv.Close(); err != nil {
			return err
		}
		s.untrack()
		return nil
	}))
}
