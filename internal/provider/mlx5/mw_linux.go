//go:build amd64 || arm64

package mlx5

import (
	"errors"
	"fmt"
	"sync"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Memory windows of type 2. A window is a memory key of the device's that is bound, and freed, by requests of a kind of its own: a
// UMR. What it is bound to is named by the region's key, and the device looks at that key's rights only when the window is used;
// so whether the region is there for windows, and how large it is, is checked here.

// A region is memory that windows can be bound to.
type region struct {
	*uverbs.MR
	pd     *pd
	base   uint64 // the device's address of its first byte
	n      uint64
	access ib.Access
}

// RegisterMR implements driver.PD.
func (p *pd) RegisterMR(cfg driver.MRConfig) (driver.MR, error) {
	m, err := p.PD.RegisterMR(cfg, nil, nil)
	if err != nil {
		return nil, err
	}
	if cfg.Access&ib.AccessMWBind == 0 {
		return m, nil
	}
	r := &region{MR: m, pd: p, n: uint64(len(cfg.Mem)), access: cfg.Access}
	if cfg.Access&ib.AccessZeroBased == 0 {
		r.base = uverbs.AddrOf(cfg.Mem)
	}
	p.c.mu.Lock()
	p.c.regions[m.LKey()] = r
	p.c.mu.Unlock()
	return r, nil
}

// Close implements driver.MR.
func (m *region) Close() error {
	c := m.pd.c
	c.mu.Lock()
	delete(c.regions, m.LKey()) // before the kernel may give the key to another
	c.mu.Unlock()
	err := m.MR.Close()
	if err != nil { // it is there still
		c.mu.Lock()
		c.regions[m.LKey()] = m
		c.mu.Unlock()
	}
	return err
}

type mw struct {
	pd     *pd
	handle uint32

	mu  sync.Mutex
	key ib.RKey // guarded by mu: as it will be when what was posted is done
}

// number is what all keys of a window have in common, and Handle tells.
func number(key ib.RKey) uint32 { return uint32(key) >> 8 }

// AllocMW implements driver.MWAllocator.
func (p *pd) AllocMW() (driver.MW, error) {
	if err := p.c.Removed(); err != nil {
		return nil, err
	}
	if a, err := p.c.QueryDevice(); err != nil || !a.Caps.Has(ib.CapMW2) {
		return nil, errors.Join(err, fmt.Errorf("%s: alloc_mw: %w: this device has no memory windows of type 2", p.c.Device(), errors.ErrUnsupported))
	}
	handle, key, err := p.C.AllocMW(p.Handle)
	if err != nil {
		return nil, err
	}
	w := &mw{pd: p, handle: handle, key: key}
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
	c := w.pd.c
	if err := uverbs.Destroyed(c.DeallocMW(w.handle)); err != nil {
		return err
	}
	c.mu.Lock()
	if n := w.Handle(); c.windows[n] == w {
		delete(c.windows, n)
	}
	c.mu.Unlock()
	return nil
}

var (
	errNoWindow   = fmt.Errorf("%w: no memory window of this context", driver.ErrInvalidWR)
	errDomains    = fmt.Errorf("%w: window, region and QP must belong to one protection domain, and the region needs AccessMWBind", driver.ErrInvalidWR)
	errWindowKey  = fmt.Errorf("%w: the key's upper 24 bits are not the memory window's", driver.ErrInvalidWR)
	errWindowSize = fmt.Errorf("%w: a memory window opens 1 byte to 2 GiB, all of them within the region", driver.ErrInvalidWR)
	errLocalWrite = fmt.Errorf("%w: a memory window for writes or atomics needs a region with AccessLocalWrite", driver.ErrInvalidWR)
)

// bind checks a bind request, and notes what it will do. It returns the window's key before that.
func (q *qp) bind(b *ib.BindMW) (current ib.RKey, err error) {
	q.c.mu.RLock()
	w, r := q.c.windows[b.Window], q.c.regions[b.MRLKey]
	q.c.mu.RUnlock()
	switch {
	case w == nil:
		return 0, errNoWindow
	case r == nil || r.pd.Handle != q.PD || w.pd.Handle != q.PD:
		return 0, errDomains
	case b.Length == 0 || b.Length > 1<<31 || b.Addr-r.base > r.n || b.Length > r.n-(b.Addr-r.base):
		return 0, errWindowSize
	case b.Access&(ib.AccessRemoteWrite|ib.AccessRemoteAtomic) != 0 && r.access&ib.AccessLocalWrite == 0:
		return 0, errLocalWrite
	case number(b.RKey) != b.Window:
		return 0, errWindowKey
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	current, w.key = w.key, b.RKey
	return current, nil
}
