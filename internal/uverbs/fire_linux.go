package uverbs

import (
	"context"
	"sync"

	"github.com/ringside-rdma/ringside/internal/driver"
)

// firing has a completion channel's events that the kernel does not know of: a provider has completions of its own making.
type firing struct {
	mu     sync.Mutex
	queue  []driver.CQ        // guarded by mu
	cancel context.CancelFunc // guarded by mu: of the Wait in progress; nil if there is none
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
	if f.cancel != nil {
		f.cancel()
	}
	f.mu.Unlock()
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
func (f *firing) next() driver.CQ {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.queue) == 0 {
		return nil
	}
	cq := f.queue[0]
	f.queue = f.queue[:copy(f.queue, f.queue[1:])]
	return cq
}

// context returns a context that also ends when something is fired. One Wait at a time has one that does: the others are not
// the ones to be woken.
func (f *firing) context(ctx context.Context) (context.Context, func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cancel != nil {
		return ctx, func() {}
	}
	wait, cancel := context.WithCancel(ctx)
	f.cancel = cancel
	if len(f.queue) > 0 {
		cancel()
	}
	return wait, func() {
		f.mu.Lock()
		f.cancel = nil
		f.mu.Unlock()
		cancel()
	}
}
