package uverbs

import (
	"errors"
	"fmt"
	"sync"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Memory windows of type 2, on devices where binding one is a request that the provider writes. The kernel makes a window and frees
// it; what it is bound to, and with which key, only who has posted the requests knows. So a context keeps account of its windows, and
// of the regions that they can be bound to.

// Windows are the memory windows and regions of a context.
type Windows struct {
	mu      sync.RWMutex
	windows map[uint32]*MW      // guarded by mu; by the number that their keys have in common
	regions map[ib.LKey]*Region // guarded by mu
}

// NewWindows returns an account with nothing in it.
func NewWindows() *Windows {
	return &Windows{windows: map[uint32]*MW{}, regions: map[ib.LKey]*Region{}}
}

// A WindowPD is a PD of a device that has memory windows.
type WindowPD struct {
	PD
	W *Windows
}

// A Region is memory that has to be known again when a request names it.
type Region struct {
	*MR
	Base   uint64 // the device's address of its first byte
	Len    uint64
	Access ib.Access
	mem    []byte // nil: it is of a dma-buf
	pd     *WindowPD
}

// RegisterMR implements driver.PD.
func (p *WindowPD) RegisterMR(cfg driver.MRConfig) (driver.MR, error) {
	m, err := p.PD.RegisterMR(cfg, nil, nil)
	if err != nil {
		return nil, err
	}
	r := &Region{MR: m, Len: uint64(len(cfg.Mem)), Access: cfg.Access, mem: cfg.Mem, pd: p}
	if cfg.Access&ib.AccessZeroBased == 0 {
		r.Base = AddrOf(cfg.Mem)
	}
	p.W.add(r)
	return r, nil
}

// RegisterDMABuf implements driver.DMABufRegistrar.
func (p *WindowPD) RegisterDMABuf(cfg driver.DMABufConfig) (driver.MR, error) {
	m, err := p.PD.registerDMABuf(cfg)
	if err != nil {
		return nil, err
	}
	r := &Region{MR: m, Base: cfg.IOVA, Len: cfg.Length, Access: cfg.Access, pd: p}
	p.W.add(r)
	return r, nil
}

func (t *Windows) add(r *Region) {
	t.mu.Lock()
	t.regions[r.LKey()] = r
	t.mu.Unlock()
}

// Close implements driver.MR.
func (r *Region) Close() error {
	t := r.pd.W
	t.mu.Lock()
	delete(t.regions, r.LKey()) // before the kernel may give the key to another, and the memory goes
	t.mu.Unlock()
	err := r.MR.Close()
	if err != nil { // it is there still
		t.add(r)
	}
	return err
}

// Read8 copies the 8 bytes that an element names, if they are in registered memory of the protection domain.
func (t *Windows) Read8(pd uint32, s *ib.SGE) (b [8]byte, ok bool) {
	t.mu.RLock() // the region, and so its memory, stays until then
	defer t.mu.RUnlock()
	r := t.regions[s.LKey]
	if r == nil || r.pd.Handle != pd {
		return b, false
	}
	at := s.Addr - r.Base
	if uint64(len(r.mem)) < 8 || at > uint64(len(r.mem)-8) {
		return b, false
	}
	copy(b[:], r.mem[at:])
	return b, true
}

// A MW is a memory window.
type MW struct {
	p      *WindowPD
	handle uint32

	freeMu sync.Mutex // held while the kernel is asked to free it; taken before mu

	mu    sync.Mutex // never held during commands
	key   ib.RKey    // guarded by mu: as it will be when what was posted is done
	bound *QP        // guarded by mu; likewise. Only of Bind's with exclusive
	freed bool       // guarded by mu: in the kernel
}

// windowNumber is what all keys of a window have in common, and Handle tells.
func windowNumber(key ib.RKey) uint32 { return uint32(key) >> 8 }

// AllocMW implements driver.MWAllocator.
func (p *WindowPD) AllocMW() (driver.MW, error) {
	if err := p.C.Removed(); err != nil {
		return nil, err
	}
	caps, err := p.C.deviceCaps()
	if err != nil {
		return nil, err
	}
	if !caps.Has(ib.CapMW2) {
		return nil, p.C.errorf("alloc_mw", fmt.Errorf("%w: this device has no memory windows of type 2", errors.ErrUnsupported))
	}
	handle, key, err := p.C.AllocMW(p.Handle)
	if err != nil {
		return nil, err
	}
	w := &MW{p: p, handle: handle, key: key}
	if !p.W.addWindow(w) {
		err := p.C.errorf("alloc_mw", fmt.Errorf("the kernel gave the key %#x, whose upper 24 bits are another memory window's", uint32(key)))
		return nil, errors.Join(err, Destroyed(p.C.DeallocMW(handle)))
	}
	return w, nil
}

// addWindow reports whether the window's number was free.
func (t *Windows) addWindow(w *MW) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := w.Handle()
	if t.windows[n] != nil {
		return false
	}
	t.windows[n] = w
	return true
}

// Handle implements driver.MW.
func (w *MW) Handle() uint32 { return windowNumber(w.RKey()) }

// RKey implements driver.MW.
func (w *MW) RKey() ib.RKey {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.key
}

// Close implements driver.MW.
func (w *MW) Close() error {
	t := w.p.W
	t.mu.Lock()
	delete(t.windows, w.Handle()) // before the kernel may give the number to another
	t.mu.Unlock()
	err := w.free()
	if err != nil { // it is there still
		t.addWindow(w)
	}
	return err
}

// free ends the window in the kernel.
func (w *MW) free() error {
	w.freeMu.Lock()
	defer w.freeMu.Unlock()
	w.mu.Lock()
	freed := w.freed
	w.mu.Unlock()
	if freed {
		return nil
	}
	err := Destroyed(w.p.C.DeallocMW(w.handle))
	if err == nil {
		w.mu.Lock()
		w.freed, w.bound = true, nil
		w.mu.Unlock()
	}
	return err
}

// Why a request about a window is refused. All match driver.ErrInvalidWR.
var (
	ErrNoWindow      = fmt.Errorf("%w: no memory window of this context", driver.ErrInvalidWR)
	ErrWindowDomains = fmt.Errorf("%w: window, region and QP must belong to one protection domain, and the region needs AccessMWBind", driver.ErrInvalidWR)
	ErrWindowKey     = fmt.Errorf("%w: the key's upper 24 bits are not the memory window's", driver.ErrInvalidWR)
	ErrNotBound      = fmt.Errorf("%w: the memory window is not bound", driver.ErrInvalidWR)
	ErrIsBound       = fmt.Errorf("%w: the memory window is bound: invalidate it first", driver.ErrInvalidWR)
	ErrWindowEnded   = fmt.Errorf("%w: the memory window was bound to a QP that is closed, and has ended with it", driver.ErrInvalidWR)
)

// Lookup finds what a bind request of the queue pair is about, or says why it cannot be.
func (t *Windows) Lookup(q *QP, b *ib.BindMW) (*MW, *Region, error) {
	t.mu.RLock()
	w, r := t.windows[b.Window], t.regions[b.MRLKey]
	t.mu.RUnlock()
	switch {
	case w == nil:
		return nil, nil, ErrNoWindow
	case r == nil || r.Access&ib.AccessMWBind == 0 || r.pd.Handle != q.PD || w.p.Handle != q.PD:
		return nil, nil, ErrWindowDomains
	case windowNumber(b.RKey) != b.Window:
		return nil, nil, ErrWindowKey
	}
	return w, r, nil
}

// Bind notes that a request that is being posted to the queue pair gives the window a key. It returns the key before that. If it is
// exclusive, a window that is bound, as far as is known here, is refused.
func (w *MW) Bind(q *QP, key ib.RKey, exclusive bool) (current ib.RKey, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.freed:
		return 0, ErrWindowEnded
	case w.bound != nil:
		return 0, ErrIsBound
	}
	current, w.key = w.key, key
	if exclusive {
		w.bound = q
	}
	return current, nil
}

// find returns the window that a key is of, or nil.
func (t *Windows) find(key ib.RKey) *MW {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.windows[windowNumber(key)]
}

// Unbind notes that a request that is being posted invalidates a local key, which must be bound. Keys that are no window's are the
// kernel's to judge.
func (t *Windows) Unbind(key ib.RKey) error {
	w := t.find(key)
	if w == nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if key == w.key {
		if w.bound == nil {
			return ErrNotBound
		}
		w.bound = nil
	}
	return nil
}

// Invalidated notes that a peer has invalidated a key.
func (t *Windows) Invalidated(key ib.RKey) {
	w := t.find(key)
	if w == nil {
		return
	}
	w.mu.Lock()
	if key == w.key {
		w.bound = nil
	}
	w.mu.Unlock()
}

// Free ends the windows that are bound by the queue pair.
func (t *Windows) Free(q *QP) {
	var list []*MW
	t.mu.RLock()
	for _, w := range t.windows {
		w.mu.Lock()
		if w.bound == q {
			list = append(list, w)
		}
		w.mu.Unlock()
	}
	t.mu.RUnlock()
	for _, w := range list {
		w.free() // if it fails, so will the queue pair's end, or take longer
	}
}
