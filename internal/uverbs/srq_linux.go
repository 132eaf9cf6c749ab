package uverbs

import (
	"sync"

	"github.com/ringside-rdma/ringside/internal/driver"
)

// An SRQ is what shared receive queues of all kernel devices have in common.
type SRQ struct {
	Handle uint32

	c  *Context
	mu sync.RWMutex // held alone when the kernel is told to destroy it, and by who names it to the kernel otherwise
	// ended is guarded by mu: the handle may be another's.
	ended bool
}

// Init makes the queue, of at least maxWR receives of maxSGE elements. uhwIn and uhwOut are what the provider's driver takes and gives.
func (s *SRQ) Init(p *PD, maxWR, maxSGE int, cookie uint64, uhwIn, uhwOut []byte) (wr, sge int, err error) {
	s.c = p.C
	s.Handle, wr, sge, err = p.C.CreateSRQ(p.Handle, maxWR, maxSGE, cookie, uhwIn, uhwOut)
	return wr, sge, err
}

// Arm sets the limit; 0 disarms. uhwIn is what the provider's driver takes.
func (s *SRQ) Arm(limit int, uhwIn []byte) error {
	if err := s.c.Removed(); err != nil {
		return err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.ended {
		return driver.ErrClosed
	}
	return s.c.SetSRQLimit(s.Handle, limit, uhwIn)
}

// Limit implements driver.SRQ: what the kernel answers, or 0.
func (s *SRQ) Limit() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.ended {
		return 0
	}
	n, err := s.c.SRQLimit(s.Handle)
	if err != nil {
		return 0
	}
	return n
}

// Destroy ends the queue; commands that name it end first.
func (s *SRQ) Destroy() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil
	}
	err := Destroyed(s.c.DestroySRQ(s.Handle))
	s.ended = err == nil
	return err
}
