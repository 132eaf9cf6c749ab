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
	now   binding    // guarded by mu: as it will be when what was posted is done
	freed bool       // guarded by mu: in the kernel
}

// A binding is what requests change of a window.
type binding struct {
	key   ib.RKey
	bound *QP // by whom; only of Bind's with exclusive
}

// WindowRequests are the requests about windows that a queue pair has posted lately. One that fails has changed nothing, nor have those
// behind it, which are flushed: what was noted of them when they were posted is taken back.
type WindowRequests struct {
	mu   sync.Mutex      // taken before windows' locks
	list []windowRequest // guarded by mu, in the order of posting
}

// A windowRequest is one of them. Its number counts all of the queue pair's send requests.
type windowRequest struct {
	w             *MW
	number        uint32
	before, after binding
}

// addLocked notes a request. Those that lie further back than the send queue has room for have succeeded. Called with w.mu held, too.
func (r *WindowRequests) addLocked(w *MW, number uint32, before binding, depth int) {
	old := 0
	for old < len(r.list) && int(number-r.list[old].number) > depth {
		old++
	}
	r.list = append(r.list[old:], windowRequest{w, number, before, w.now})
}

// WindowsFailed says that a send request has failed. did reports whether the one of that number was done before that; those behind the
// first that was not are flushed.
func (q *QP) WindowsFailed(did func(number uint32) bool) {
	r := &q.windows
	r.mu.Lock()
	defer r.mu.Unlock()
	done := 0
	for done < len(r.list) && did(r.list[done].number) {
		done++
	}
	for i := len(r.list) - 1; i >= done; i-- {
		e := &r.list[i]
		e.w.mu.Lock()
		if e.w.now == e.after { // else somebody has gone on from there
			e.w.now = e.before
		}
		e.w.mu.Unlock()
	}
	r.list = nil
}

// WindowsDone returns the number of the oldest send request about a window that is not done, or next if all are.
func (q *QP) WindowsDone(next uint32, did func(number uint32) bool) uint32 {
	r := &q.windows
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.list {
		if n := r.list[i].number; !did(n) {
			return n
		}
	}
	return next
}

// ForgetWindows says that nothing that was posted can fail any more: the queue pair was reset, and nobody knows how far it had come.
func (q *QP) ForgetWindows() {
	q.windows.mu.Lock()
	q.windows.list = nil
	q.windows.mu.Unlock()
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
	w := &MW{p: p, handle: handle, now: binding{key: key}}
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
	if o := t.windows[n]; o != nil && !o.ended() {
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
	return w.now.key
}

// Close implements driver.MW.
func (w *MW) Close() error {
	t := w.p.W
	t.mu.Lock()
	if n := w.Handle(); t.windows[n] == w { // else it has ended before, and the number is another's
		delete(t.windows, n) // before the kernel may give it to another
	}
	t.mu.Unlock()
	err := w.free()
	if err != nil { // it is there still
		t.addWindow(w)
	}
	return err
}

// ended reports whether the kernel has the window no more, and may give its number to another.
func (w *MW) ended() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.freed
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
		w.freed, w.now.bound = true, nil
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

// Bind notes that the send request of that number, which is being posted to the queue pair, gives the window a key. It returns the key
// before that. If it is exclusive, a window that is bound, as far as is known here, is refused.
func (w *MW) Bind(q *QP, key ib.RKey, exclusive bool, number uint32) (current ib.RKey, err error) {
	q.windows.mu.Lock()
	defer q.windows.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.freed:
		return 0, ErrWindowEnded
	case w.now.bound != nil:
		return 0, ErrIsBound
	}
	before := w.now
	w.now.key = key
	if exclusive {
		w.now.bound = q
	}
	q.windows.addLocked(w, number, before, q.QPInfo.Cap.MaxSendWR)
	return before.key, nil
}

// find returns the window that a key is of, or nil.
func (t *Windows) find(key ib.RKey) *MW {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.windows[windowNumber(key)]
}

// Unbind notes that the send request of that number, which is being posted to the queue pair, invalidates a local key, which must be
// bound. Keys that are no window's are the kernel's to judge.
func (t *Windows) Unbind(q *QP, key ib.RKey, number uint32) error {
	w := t.find(key)
	if w == nil {
		return nil
	}
	q.windows.mu.Lock()
	defer q.windows.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	if key == w.now.key {
		before := w.now
		if before.bound == nil {
			return ErrNotBound
		}
		w.now.bound = nil
		q.windows.addLocked(w, number, before, q.QPInfo.Cap.MaxSendWR)
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
	if key == w.now.key {
		w.now.bound = nil
	}
	w.mu.Unlock()
}

// Free ends the windows that are bound by the queue pair.
func (t *Windows) Free(q *QP) {
	var list []*MW
	t.mu.RLock()
	for _, w := range t.windows {
		w.mu.Lock()
		if w.now.bound == q {
			list = append(list, w)
		}
		w.mu.Unlock()
	}
	t.mu.RUnlock()
	for _, w := range list {
		w.free() // if it fails, so will the queue pair's end, or take longer
	}
}
