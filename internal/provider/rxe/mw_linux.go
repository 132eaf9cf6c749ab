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
//   - It keeps a queue pair that is to be destroyed waiting for the windows that are bound to it. They are freed before.
//   - It holds peers to the bounds of the region, not of the window. Nothing can be done about that here.

// RegisterMR implements driver.PD.
func (p *pd) RegisterMR(cfg driver.MRConfig) (driver.MR, error) {
	m, err := p.PD.RegisterMR(cfg, nil, nil)
	if err != nil {
		return nil, err
	}
	r := &region{MR: m, pd: p, mem: cfg.Mem, bind: cfg.Access&ib.AccessMWBind != 0}
	if cfg.Access&ib.AccessZeroBased == 0 {
		r.base = uverbs.AddrOf(cfg.Mem)
	}
	p.c.mu.Lock()
	p.c.regions[m.LKey()] = r
	p.c.mu.Unlock()
	return r, nil
}

// A region is memory that the provider has to know again: when a window is bound to it, and for ATOMIC_WRITE.
type region struct {
	*uverbs.MR
	pd   *pd
	mem  []byte
	base uint64 // the device's address of mem[0]
	bind bool   // windows can be bound to it
}

// Close implements driver.MR.
func (m *region) Close() error {
	c := m.pd.c
	c.mu.Lock()
	delete(c.regions, m.LKey()) // before the kernel may give the key to another, and the memory goes
	c.mu.Unlock()
	err := m.MR.Close()
	if err != nil { // it is there still
		c.mu.Lock()
		c.regions[m.LKey()] = m
		c.mu.Unlock()
	}
	return err
}

// atomicWord is what an ATOMIC_WRITE of 8 bytes of registered memory writes. rxe wants them in the work request, as if they were
// inline.
func (q *qp) atomicWord(s *ib.SGE) (w [8]byte, err error) {
	c := q.c
	c.mu.RLock() // the region, and so its memory, stays until then
	defer c.mu.RUnlock()
	r := c.regions[s.LKey]
	if r == nil || r.pd.Handle != q.PD {
		return w, errNoRegion
	}
	at := s.Addr - r.base
	if uint64(len(r.mem)) < 8 || at > uint64(len(r.mem)-8) {
		return w, errNoRegion
	}
	copy(w[:], r.mem[at:])
	return w, nil
}

var errNoRegion = fmt.Errorf("%w: the 8 bytes of the atomic write are in no region of the QP's protection domain", driver.ErrInvalidWR)

type mw struct {
	p      *pd
	handle uint32

	mu    sync.Mutex
	key   ib.RKey // guarded by mu: as it will be when what was posted is done
	bound *qp     // guarded by mu; likewise
	freed bool    // guarded by mu: in the kernel
}

// number is what all keys of a window have in common, and Handle tells.
func number(key ib.RKey) uint32 { return uint32(key) >> 8 }

// AllocMW implements driver.MWAllocator.
func (p *pd) AllocMW() (driver.MW, error) {
	if err := p.c.Removed(); err != nil {
		return nil, err
	}
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
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.free(); err != nil {
		return err
	}
	delete(c.windows, number(w.key))
	return nil
}

// free ends the window in the kernel. Called with mu held.
func (w *mw) free() error {
	if w.freed {
		return nil
	}
	err := uverbs.Destroyed(w.p.c.DeallocMW(w.handle))
	if err == nil {
		w.freed, w.bound = true, nil
	}
	return err
}

// freeWindows ends the windows that are bound to q. The kernel's queue pair cannot go before them: it is waited for, and
// after 50 s the wait is given up (rxe_cleanup).
func (q *qp) freeWindows() {
	q.c.mu.RLock()
	defer q.c.mu.RUnlock()
	for _, w := range q.c.windows {
		w.mu.Lock()
		if w.bound == q {
			w.free() // if it fails, the queue pair's end takes longer
		}
		w.mu.Unlock()
	}
}

var (
	errNoWindow  = fmt.Errorf("%w: no memory window of this context", driver.ErrInvalidWR)
	errDomains   = fmt.Errorf("%w: window, region and QP must belong to one protection domain, and the region needs AccessMWBind", driver.ErrInvalidWR)
	errNotBound  = fmt.Errorf("%w: the memory window is not bound", driver.ErrInvalidWR)
	errIsBound   = fmt.Errorf("%w: the memory window is bound: invalidate it first", driver.ErrInvalidWR)
	errFreed     = fmt.Errorf("%w: the memory window was bound to a QP that is closed, and has ended with it", driver.ErrInvalidWR)
	errWindowKey = fmt.Errorf("%w: the key's upper 24 bits are not the memory window's", driver.ErrInvalidWR)
)

// bind checks a bind request, and notes what it will do. It returns the window's key before that.
func (q *qp) bind(b *ib.BindMW) (current ib.RKey, err error) {
	q.c.mu.RLock()
	w, r := q.c.windows[b.Window], q.c.regions[b.MRLKey]
	q.c.mu.RUnlock()
	switch {
	case w == nil:
		return 0, errNoWindow
	case r == nil || !r.bind || r.pd.Handle != q.PD || w.p.Handle != q.PD:
		return 0, errDomains
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.freed:
		return 0, errFreed
	case w.bound != nil:
		return 0, errIsBound
	case number(b.RKey) != number(w.key):
		return 0, errWindowKey
	}
	current = w.key
	w.key, w.bound = b.RKey, q
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
		if w.bound == nil {
			return errNotBound
		}
		w.bound = nil
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
		w.bound = nil
	}
	w.mu.Unlock()
}
