package uverbs

import (
	"sync"

	"github.com/ringside-rdma/ringside/internal/driver"
)

// firing has a completion channel's events that the kernel does not know of: a provider has completions of its own making.
type firing struct {
	mu    sync.Mutex
	queue []driver.CQ // guarded by mu
}

// CreateFiringChannel is CreateCompChannel for a provider that calls Fire.
func (c *Context) CreateFiringChannel() (driver.CompChannel, error) {
	d, err := c.CreateCompChannel()
	if err != nil {
		return nil, err
	}
	d.(*CompChannel).soft = &firing{}
	return d, nil
}

// Fire makes Wait, or WaitThread, return cq: the one in progress, or else the next.
func (ch *CompChannel) Fire(cq driver.CQ) {
	f := ch.soft
	f.mu.Lock()
	f.queue = append(f.queue, cq)
	f.mu.Unlock()
	ch.e.Nudge()
	ch.e.Interrupt()
}

// Forget drops what was fired and not returned, before cq is closed.
func (ch *CompChannel) Forget(cq driver.CQ) {
	ch.soft.mu.Lock()
	defer ch.soft.mu.Unlock()
	rest := ch.soft.queue[:0]
	for _, q := range ch.soft.queue {
		if q != cq {
			rest = append(rest, q)
		}
	}
	clear(ch.soft.queue[len(rest):])
	ch.soft.queue = rest
}

// next returns what was fired, or nil.
func (ch *CompChannel) next() driver.CQ {
	f := ch.soft
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.queue) == 0 {
		return nil
	}
	cq := f.queue[0]
	f.queue = f.queue[:copy(f.queue, f.queue[1:])]
	if len(f.queue) > 0 {
		ch.e.Nudge() // another waiter, for the next one
	}
	return cq
}
