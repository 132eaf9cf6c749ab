package rxe

import (
	"fmt"
	"sync"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Memory windows. The kernel's driver believes more than it should of what a work request says of them (Linux 6.1 to 6.12):
//
//   - It binds a window to a region of another protection domain. That is checked here.
//   - It dies when a window is invalidated that is not bound. Local requests are checked here; a peer that sends
//     SEND_WITH_INV twice cannot be.
//   - It holds peers to the bounds of the region, not of the window. Nothing can be done about that here.

// RegisterMR implements driver.PD.
func (p *pd) RegisterMR(cfg driver.MRConfig) (driver.MR, error) {
	m, err := p.PD.RegisterMR(cfg, nil, nil)
	if err != nil || cfg.Access&ib.AccessMWBind == 0 {
		return m, err
	}
	p.c.mu.Lock()
	p.c.regions[m.LKey()] = p
	p.c.mu.Unlock()
	return &bindable{m, p.c}, nil
}

// A bindable region is one that windows can be bound to.
type bindable struct {
	*uverbs.MR
	c *rxeContext
}

// Close implements driver.MR.
func (m *bindable) Close() error {
	m.c.mu.Lock()
	defer m.c.mu.Unlock()
	if err := m.MR.Close(); err != nil {
		return err
	}
	delete(m.c.regions, m.LKey())
	return nil
}

type mw struct {
	p      *pd
	handle uint32

	mu    sync.Mutex
	key   ib.RKey // guarded by mu: as it will be when what was posted is done
	bound bool    // guarded by mu; likewise
}

// number is what all keys of a window have in common, and Handle tells.
func number(key ib.RKey) uint32 { return uint32(key) >> 8 }

// AllocMW implements driver.MWAllocator.
func (p *pd) AllocMW() (driver.MW, error) {
	handle, key, err := p.C.AllocMW(p.Handle)
	if err != nil {
		return nil, err
	}
	w := &mw{p: p, handle: handle, key: key}
	p.c.mu.Lock()
	p.c.windows[number(key)] = w
	p.c.mu.Unlock()
	return w, nil
}

// Handle implements driver.MW.
func (w *mw) Handle() uint32 { return number(w.RKey()) }

// RKey implements driver.MW.
func (w *mw) RKey() ib.RKey {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.key
}

// Close implements driver.MW.
func (w *mw) Close() error {
	c := w.p.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := uverbs.Destroyed(c.DeallocMW(w.handle)); err != nil {
		return err
	}
	delete(c.windows, number(w.key))
	return nil
}

var (
	errNoWindow  = fmt.Errorf("%w: no memory window of this context", driver.ErrInvalidWR)
	errDomains   = fmt.Errorf("%w: window, region and QP must belong to one protection domain, and the region needs AccessMWBind", driver.ErrInvalidWR)
	errNotBound  = fmt.Errorf("%w: the memory window is not bound", driver.ErrInvalidWR)
	errIsBound   = fmt.Errorf("%w: the memory window is bound: invalidate it first", driver.ErrInvalidWR)
	errWindowKey = fmt.Errorf("%w: the key's upper 24 bits are not the memory window's", driver.ErrInvalidWR)
)

// bind checks a bind request, and notes what it will do. It returns the window's key before that.
func (q *qp) bind(b *ib.BindMW) (current ib.RKey, err error) {
	q.c.mu.RLock()
	w, region := q.c.windows[b.Window], q.c.regions[b.MRLKey]
	q.c.mu.RUnlock()
	switch {
	case w == nil:
		return 0, errNoWindow
	case region == nil || region.Handle != q.PD || w.p.Handle != q.PD:
		return 0, errDomains
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.bound:
		return 0, errIsBound
	case number(b.RKey) != number(w.key):
		return 0, errWindowKey
	}
	current = w.key
	w.key, w.bound = b.RKey, true
	return current, nil
}

// invalidate checks a request to invalidate a local key, and notes what it will do. Keys that are no window's are the
// kernel's to judge.
func (q *qp) invalidate(key ib.RKey) error {
	q.c.mu.RLock()
	w := q.c.windows[number(key)]
	q.c.mu.RUnlock()
	if w == nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if key == w.key {
		if !w.bound {
			return errNotBound
		}
		w.bound = false
	}
	return nil
}

// invalidated notes that a peer has invalidated a key.
func (c *rxeContext) invalidated(key ib.RKey) {
	c.mu.RLock()
	w := c.windows[number(key)]
	c.mu.RUnlock()
	if w == nil {
		return
	}
	w.mu.Lock()
	if key == w.key {
		w.bound = false
	}
	w.mu.Unlock()
}
