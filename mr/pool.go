package mr

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/ringside-rdma/ringside/internal/life"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Errors of pools.
var (
	// ErrPoolExhausted: all memory that the pool may have is in use, or in slabs with buffers that are; see Pool. Release
	// buffers, or raise PoolConfig.Limit. If the system's limit was met before the pool's, its error is wrapped, too.
	ErrPoolExhausted = errors.New("mr: pool is exhausted: all of its memory is in use; release buffers or raise PoolConfig.Limit")
	// ErrTooLarge: no buffer of the pool is that large; use Alloc, or raise PoolConfig.MaxBuffer or Limit.
	ErrTooLarge = errors.New("mr: larger than the pool's largest buffer: use Alloc or raise PoolConfig.MaxBuffer or Limit")
)

const (
	minClassBits = 6 // 64 B: a cache line, so that no two buffers share one
	maxClassBits = 30
	minSlab      = 64 << 10
	leastSlab    = 4 << 10 // where the system has no more: less would still take a page
)

// PoolConfig describes a pool. Zero fields take their defaults.
type PoolConfig struct {
	// Access is what may be done to the buffers. Default ib.AccessLocalWrite: sends, receives, and the results of reads.
	Access ib.Access
	// Limit is how many bytes of memory the pool may take; default 256 MiB, at least 64.
	Limit int
	// MaxBuffer is the size of the largest buffer in bytes, rounded up to a power of two; default 1 MiB, at most 1 GiB. It is
	// at most Limit, so that a pool without a buffer in use can always hand out one of any size that it has.
	MaxBuffer int
	// SlabSize is how many bytes are registered at a time once a size class is busy, rounded up to a power of two; default
	// 2 MiB. Classes start with smaller slabs; buffers that are larger get a slab each.
	SlabSize int
	// Options say what memory the slabs are.
	Options Options
	// Poison fills buffers when they are released, and panics if one was written to until it is handed out again. For
	// tests: it finds use after Release, by the program and by the device.
	Poison bool
}

// A Pool hands out buffers of registered memory: in size classes, powers of two from 64 bytes on, carved from slabs that
// are allocated as needed. In steady state Get and Release make no system call, no garbage and take no lock.
//
// Registering memory is dear, so slabs are kept, also those that nobody uses at the moment. Only when Limit, or what the
// system lets the process have (RLIMIT_MEMLOCK), leaves no room for a buffer of another size are slabs given back for it: such
// that have no buffer in use, the oldest first. Get then waits for the device, as MR.Close does. A slab stays as long as one of
// its buffers is in use, or a window on it or a region that was made of it (MR.Sub) is open. So a few small buffers that are held
// for long can keep much memory from the other sizes, and a large one may have to wait for as long as small ones keep all slabs
// busy. What is certain: when all buffers are released, there is room for one of any size up to MaxBuffer, if the system has that
// much. If no room can be made, a larger buffer than asked for is handed out if one is free.
//
// A Pool is safe for concurrent use, and goroutines keep out of each other's way where they can.
type Pool struct {
	life    life.Node
	pd      *verbs.PD
	cfg     PoolConfig
	classes []class
	hints   []hints      // a power of two
	waiting atomic.Int32 // waiters in wait

	mu       sync.Mutex // growing, giving back and closing take turns
	bytes    int
	slabs    []slab // oldest first
	returned int    // slabs given back
	closed   bool   // hands out nothing any more

	waitMu sync.Mutex
	wait   []*waiter
}

// class holds the buffers of one size.
type class struct {
	size int
	// words has a bit for every buffer of the class. The slice is replaced when the class grows, and by an empty one when
	// the pool is closed.
	words atomic.Pointer[[]*word]
	slabs int // how many there are; guarded by Pool.mu
}

// slab is a region that buffers of one class are carved from.
type slab struct {
	class int
	mr    *MR
	words []*word // nil: no buffer of it will be handed out any more, but the region could not be closed yet
}

// word keeps up to 64 buffers: a set bit is a free buffer. So taking one is a compare-and-swap, giving one back is an
// atomic or, whose old value tells a double release, and there is no list to tear.
type word struct {
	free atomic.Uint64
	bufs []Buffer
	_    [96]byte // own pair of cache lines: adjacent-line prefetch makes neighbours collide
}

// all is the value of free when no buffer is in use.
func (w *word) all() uint64 { return ^uint64(0) >> (64 - len(w.bufs)) }

// hints are, for each class, the index of the word where a goroutine found a buffer last. Goroutines that collide on a
// word part ways.
type hints struct {
	word [maxClassBits - minClassBits + 1]atomic.Uint32
	_    [28]byte // own pair of cache lines
}

// A Buffer is a piece of a pool's memory with one owner at a time: from Get to Release. Its methods are for the owner
// only; handing the buffer to another goroutine takes the usual synchronisation.
type Buffer struct {
	mem  []byte // the whole buffer
	n    int    // Len
	addr uint64
	lkey ib.LKey
	bit  uint64 // in word
	word *word
	off  int // in the slab
	mr   *MR
	pool *Pool
}

// NewPool makes a pool. It takes no memory until the first Get.
func NewPool(pd *verbs.PD, cfg PoolConfig) (*Pool, error) {
	dev := pd.Context().Name()
	if cfg.Access == 0 {
		cfg.Access = ib.AccessLocalWrite
	}
	if err := cfg.Access.Check(); err != nil {
		return nil, opErr("new_pool", dev, err)
	}
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&cfg.Limit, 256<<20)
	def(&cfg.MaxBuffer, 1<<20)
	def(&cfg.SlabSize, 2<<20)
	if cfg.Limit < 1<<minClassBits || cfg.MaxBuffer < 0 || cfg.MaxBuffer > 1<<maxClassBits || cfg.SlabSize < 0 || cfg.SlabSize > 1<<maxClassBits {
		return nil, opErr("new_pool", dev, fmt.Errorf("invalid size: Limit %d (at least %d), MaxBuffer %d (at most %d), SlabSize %d (at most %d)",
			cfg.Limit, 1<<minClassBits, cfg.MaxBuffer, 1<<maxClassBits, cfg.SlabSize, 1<<maxClassBits))
	}
	cfg.MaxBuffer = min(1<<ceilLog2(max(cfg.MaxBuffer, 1<<minClassBits)), cfg.Limit&^(1<<minClassBits-1))
	cfg.SlabSize = 1 << ceilLog2(max(cfg.SlabSize, minSlab))
	p := &Pool{pd: pd, cfg: cfg}
	// More hints than processors, because goroutines are spread over them by chance.
	p.hints = make([]hints, 1<<ceilLog2(min(16*runtime.GOMAXPROCS(0), 256)))
	p.classes = make([]class, ceilLog2(cfg.MaxBuffer)-minClassBits+1)
	for i := range p.classes {
		c := &p.classes[i]
		c.size = min(1<<(minClassBits+i), cfg.MaxBuffer)
		c.words.Store(&[]*word{})
	}
	if err := p.life.Attach(pd.Life()); err != nil {
		return nil, opErr("new_pool", dev, err)
	}
	life.Watch(p, &p.life, "mr.Pool", dev)
	return p, nil
}

func ceilLog2(n int) int { return bits.Len(uint(n - 1)) }

// classFor returns the index of the smallest class for n bytes; it may be past the end.
func classFor(n int) int { return max(bits.Len(uint(n-1)), minClassBits) - minClassBits }

// Get returns a buffer with Len n and at least that capacity; its content is arbitrary. It does not wait for a Release: if the
// pool may not grow any more, nothing can be given back, and larger classes have none free either, it fails with
// ErrPoolExhausted; if n is more than MaxBuffer, with ErrTooLarge. It may allocate memory from the system, and give some
// back; TryGet never does.
func (p *Pool) Get(n int) (*Buffer, error) {
	if uint(n-1) < uint(p.cfg.MaxBuffer) { // n in [1, MaxBuffer]
		if b := p.pop(classFor(n), p.hint()); b != nil {
			return p.hand(b, n), nil
		}
	}
	return p.getSlow(n)
}

// TryGet returns a buffer like Get if one is free, or nil. It makes no system call and takes no lock.
func (p *Pool) TryGet(n int) *Buffer {
	if n < 0 || n > p.cfg.MaxBuffer {
		return nil
	}
	i := 0
	if n > 0 {
		i = classFor(n)
	}
	hint := p.hint()
	for ; i < len(p.classes); i++ {
		if b := p.pop(i, hint); b != nil {
			return p.hand(b, n)
		}
	}
	return nil
}

// GetContext is Get, but waits for a Release while the pool is exhausted. It ends with ctx. Those who wait are tried in the
// order in which they came, but one that asks for less than there is does not wait for one that asks for more.
func (p *Pool) GetContext(ctx context.Context, n int) (*Buffer, error) {
	b, err := p.Get(n)
	if err == nil || !errors.Is(err, ErrPoolExhausted) {
		return b, err
	}
	w := &waiter{class: classFor(max(n, 1)), wake: make(chan struct{}, 1)}
	p.waitMu.Lock()
	p.wait = append(p.wait, w)
	p.waiting.Add(1)
	p.waitMu.Unlock()
	defer p.leave(w)
	for {
		// Looking comes after waiting.Add, and in Release waiting.Load comes after the push: one of the two sees the other.
		if b, err = p.Get(n); err == nil || !errors.Is(err, ErrPoolExhausted) {
			return b, err
		}
		p.waitMu.Lock()
		p.wakeLocked(slices.Index(p.wait, w)+1, w.class) // there may be enough for those who ask for less
		p.waitMu.Unlock()
		select {
		case <-w.wake:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// waiter is a GetContext that waits.
type waiter struct {
	class int
	wake  chan struct{} // holds one wake-up
}

// leave ends a wait. What w leaves of the memory that it was woken for, all or some, is for those behind it.
func (p *Pool) leave(w *waiter) {
	p.waitMu.Lock()
	i := slices.Index(p.wait, w)
	p.wait = slices.Delete(p.wait, i, i+1) // w is not woken after that, so no wake-up is lost
	p.waiting.Add(-1)
	p.wakeLocked(i, len(p.classes))
	p.waitMu.Unlock()
}

// released wakes the first who waits.
func (p *Pool) released() {
	p.waitMu.Lock()
	p.wakeLocked(0, len(p.classes))
	p.waitMu.Unlock()
}

// wakeLocked wakes the first waiter, from p.wait[from] on, whose class is below class. It finds out whether there is enough for it,
// and wakes the next: a release may help any of them, since it may have made a slab free, and with it room for another size; and
// it may help several. One in vain goes on to those who ask for less only, so a release does not wake everybody.
func (p *Pool) wakeLocked(from, class int) {
	for _, w := range p.wait[from:] {
		if w.class >= class {
			continue
		}
		select {
		case w.wake <- struct{}{}:
			return
		default: // woken already, and has not looked yet
		}
	}
}

func (p *Pool) hand(b *Buffer, n int) *Buffer {
	b.n = n
	if p.cfg.Poison {
		b.checkPoison()
	}
	return b
}

func (p *Pool) getSlow(n int) (*Buffer, error) {
	if n < 0 {
		panic(rangeError{0, n, p.cfg.MaxBuffer})
	}
	if n > p.cfg.MaxBuffer {
		return nil, fmt.Errorf("%w (%d bytes, largest %d)", ErrTooLarge, n, p.cfg.MaxBuffer)
	}
	i := 0
	if n > 0 {
		i = classFor(n)
	}
	hint := p.hint()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, opErr("pool_get", p.pd.Context().Name(), net.ErrClosed)
	}
	if b := p.pop(i, hint); b != nil { // somebody else has grown the class
		return p.hand(b, n), nil
	}
	b, err := p.growLocked(i, hint)
	if err == nil {
		return p.hand(b, n), nil
	}
	for j := i + 1; j < len(p.classes); j++ { // too large a buffer is better than none
		if b := p.pop(j, hint); b != nil {
			return p.hand(b, n), nil
		}
	}
	return nil, err
}

// growLocked adds a slab to class i and returns one of its buffers.
func (p *Pool) growLocked(i int, h *hints) (*Buffer, error) {
	c := &p.classes[i]
	if !p.makeRoomLocked(i, c.size) {
		return nil, ErrPoolExhausted
	}
	// Slabs double from 64 KiB, or what holds two buffers, to SlabSize: a class that is hardly used costs little.
	size := max(min(max(minSlab, 2*c.size)<<min(c.slabs, 10), p.cfg.SlabSize), c.size)
	for size > p.cfg.Limit-p.bytes {
		size = max(size/2, c.size)
	}
	m, err := p.allocLocked(i, size)
	if err != nil {
		return nil, err
	}
	size = m.Len()
	words := slices.Clone(*c.words.Load())
	mine := len(words)
	bufs := make([]Buffer, size/c.size)
	per := min(max(len(bufs)/16, 1), 64) // words for many goroutines, rather than full ones
	for first := 0; first < len(bufs); first += per {
		w := &word{bufs: bufs[first:min(first+per, len(bufs))]}
		for i := range w.bufs {
			off := (first + i) * c.size
			w.bufs[i] = Buffer{mem: m.buf[off : off+c.size : off+c.size], addr: m.base + uint64(off), lkey: m.lkey, off: off, mr: m,
				bit: 1 << i, word: w, pool: p}
			if p.cfg.Poison {
				w.bufs[i].poison()
			}
		}
		w.free.Store(w.all())
		words = append(words, w)
	}
	b := &words[mine].bufs[0]
	words[mine].free.Store(words[mine].free.Load() &^ b.bit) // nobody else sees it yet
	c.words.Store(&words)
	h.word[i].Store(uint32(mine))
	c.slabs++
	p.bytes += size
	p.slabs = append(p.slabs, slab{class: i, mr: m, words: slices.Clone(words[mine:])})
	return b, nil
}

// allocLocked makes a region of size bytes for class i. The system may have less than Limit allows: then the region is smaller, and
// if not even one buffer fits, slabs of other classes of which no buffer is in use are given back, the oldest first, until one does.
func (p *Pool) allocLocked(i, size int) (*MR, error) {
	least := max(p.classes[i].size, leastSlab)
	inUse := false
	for {
		m, err := AllocOptions(p.pd, size, p.cfg.Access, p.cfg.Options)
		switch {
		case err == nil || !shortage(err):
			return m, err
		case size > least:
			size = max(size/2, least)
			continue
		}
		if !inUse { // asked before slabs are looked at: a Release after that is one that whoever waits for it hears of
			inUse = p.statsLocked().InUse > 0
		}
		if !p.giveBackOldestLocked(i) {
			if inUse {
				err = fmt.Errorf("%w; the system has no more for it: %w", ErrPoolExhausted, err)
			}
			return nil, err
		}
	}
}

// shortage reports whether an error of AllocOptions can be another one's use of memory, regions or descriptors.
func shortage(err error) bool {
	for _, e := range []error{syscall.ENOMEM, syscall.EAGAIN, syscall.ENOSPC, syscall.EMFILE, syscall.ENFILE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// giveBackOldestLocked gives back one slab of another class than i, if there is one of which no buffer is in use.
func (p *Pool) giveBackOldestLocked(i int) bool {
	for k := range p.slabs {
		if s := &p.slabs[k]; s.class != i && s.claim() && p.giveBackLocked(k) {
			return true
		}
	}
	return false
}

// makeRoomLocked makes sure that the pool may take n bytes for class i, by giving back slabs of other classes of which no buffer is
// in use. It gives back none if that would not be enough.
func (p *Pool) makeRoomLocked(i, n int) bool {
	room := p.cfg.Limit - p.bytes
	for k := 0; k < len(p.slabs) && room < n; k++ {
		if s := &p.slabs[k]; s.class != i && s.idle() {
			room += s.mr.Len()
		}
	}
	if room < n {
		return false
	}
	for k := 0; k < len(p.slabs) && p.cfg.Limit-p.bytes < n; {
		if s := &p.slabs[k]; s.class == i || !s.claim() || !p.giveBackLocked(k) {
			k++
		}
	}
	return p.cfg.Limit-p.bytes >= n // not if somebody else was faster
}

// idle reports whether no buffer of the slab is in use at the moment.
func (s *slab) idle() bool {
	for _, w := range s.words {
		if w.free.Load() != w.all() {
			return false
		}
	}
	return s.words != nil
}

// claim takes all buffers of the slab, so that nobody else gets one, or none.
func (s *slab) claim() bool {
	for i, w := range s.words {
		if !w.free.CompareAndSwap(w.all(), 0) { // acquire; pairs with the Or in Release
			unclaim(s.words[:i])
			return false
		}
	}
	return s.words != nil
}

func unclaim(words []*word) {
	for _, w := range words {
		w.free.Store(w.all()) // all of its buffers are ours
	}
}

// gone is the word of buffers whose slab was given back: to Release, they are all released.
var gone word

func init() { gone.free.Store(^uint64(0)) }

// giveBackLocked closes slab k, which is claimed. False: it has to stay.
func (p *Pool) giveBackLocked(k int) bool {
	s := &p.slabs[k]
	if s.mr.Close() != nil && !s.mr.withdrawn {
		unclaim(s.words) // a window is bound to it, or a region made of it is open
		return false
	}
	c := &p.classes[s.class]
	words := slices.Clone(*c.words.Load()) // who still looks at the old slice finds nothing in the slab's words, for ever
	first := slices.Index(words, s.words[0])
	words = slices.Delete(words, first, first+len(s.words))
	c.words.Store(&words)
	c.slabs--
	for _, w := range s.words {
		for i := range w.bufs {
			w.bufs[i].word, w.bufs[i].mem = &gone, nil
		}
	}
	s.words = nil
	if !s.mr.life.Closed() { // the device has let go of it, and the system has not: Close tries again
		return false
	}
	p.bytes -= s.mr.Len()
	p.returned++
	p.slabs = slices.Delete(p.slabs, k, k+1)
	return true
}

// hint returns the hints of the calling goroutine, which it may share with others.
func (p *Pool) hint() *hints { return &p.hints[stackHint()&uint(len(p.hints)-1)] }

// pop takes a free buffer of class i, from the word that h names if that has one, else from the next that has; nil if
// there is none.
func (p *Pool) pop(i int, h *hints) *Buffer {
	words := *p.classes[i].words.Load()
	hint := &h.word[i]
	start := uint(hint.Load())
	if start >= uint(len(words)) { // slabs were given back since
		start = 0
	}
	for {
		raced := false
		for j := range uint(len(words)) {
			k := start + j
			if k >= uint(len(words)) {
				k -= uint(len(words))
			}
			w := words[k]
			free := w.free.Load()
			if free == 0 {
				continue
			}
			if w.free.CompareAndSwap(free, free&(free-1)) { // acquire; pairs with the Or in Release
				if j != 0 {
					hint.Store(uint32(k))
				}
				return &w.bufs[bits.TrailingZeros64(free)]
			}
			raced = true // with another goroutine, to whom we leave the word
		}
		if !raced {
			return nil
		}
	}
}

// Release gives the buffer back; its memory must not be touched any more, by the program or by a work request. It
// panics if the buffer was released already, and nobody has got it since: once somebody has, a second Release is theirs.
func (b *Buffer) Release() {
	p := b.pool
	if p.cfg.Poison {
		if b.word.free.Load()&b.bit != 0 {
			panic(doubleRelease)
		}
		b.poison()
	}
	if b.word.free.Or(b.bit)&b.bit != 0 { // release; pairs with the compare-and-swap in pop
		panic(doubleRelease)
	}
	if p.waiting.Load() != 0 {
		p.released()
	}
}

const doubleRelease = "mr: Buffer released twice"

// poisonByte fills released buffers.
const poisonByte = 0xdb

func (b *Buffer) poison() {
	b.n = 0
	for i := range b.mem {
		b.mem[i] = poisonByte
	}
}

func (b *Buffer) checkPoison() {
	for i, v := range b.mem {
		if v != poisonByte {
			panic(fmt.Sprintf("mr: Buffer was written to after Release: byte %d of %d is %#x", i, len(b.mem), v))
		}
	}
}

// Bytes is the memory of the buffer, Len bytes. It is the owner's until Release.
func (b *Buffer) Bytes() []byte { return b.mem[:b.n:len(b.mem)] }

// Len is the length that Get or SetLen has set.
func (b *Buffer) Len() int { return b.n }

// Cap is how long the buffer can be made.
func (b *Buffer) Cap() int { return len(b.mem) }

// SetLen changes the length. It panics if n is negative or more than Cap.
func (b *Buffer) SetLen(n int) {
	if uint(n) > uint(len(b.mem)) {
		panic(rangeError{0, n, len(b.mem)})
	}
	b.n = n
}

// SGE returns the scatter/gather element of n bytes at off. It panics, as a slice expression does, if they are not within
// the buffer's capacity.
func (b *Buffer) SGE(off, n int) ib.SGE {
	if off < 0 || n < 0 || off > len(b.mem)-n {
		panic(rangeError{off, n, len(b.mem)})
	}
	return ib.SGE{Addr: b.addr + uint64(off), Length: uint32(n), LKey: b.lkey}
}

// Region returns the memory region that the buffer lies in, and its offset there. It belongs to the pool.
func (b *Buffer) Region() (m *MR, off int) { return b.mr, b.off }

// RemoteRange returns what a peer needs to reach n bytes at off of the buffer, if the pool's access allows. The key opens
// other buffers of the slab, too: it is for peers that are trusted, or regions of their own. It panics, as a slice
// expression does, if the bytes are not within the buffer's capacity.
func (b *Buffer) RemoteRange(off, n int) RemoteKey {
	if off < 0 || n < 0 || off > len(b.mem)-n {
		panic(rangeError{off, n, len(b.mem)})
	}
	return b.mr.RemoteRange(b.off+off, n)
}

// PoolStats are a pool's numbers at one moment.
type PoolStats struct {
	Limit int // bytes the pool may take
	Bytes int // bytes it has taken
	Slabs int // regions they are in
	InUse int // buffers that are not released
	// Returned is how many slabs were given back so far because Limit, or the system, left no room for other sizes. If it grows all
	// the time, the pool registers memory again and again: raise Limit, or the system's (RLIMIT_MEMLOCK).
	Returned int
}

// Stats counts. It looks at every buffer, and while others Get and Release the result is approximate.
func (p *Pool) Stats() PoolStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.statsLocked()
}

func (p *Pool) statsLocked() PoolStats {
	s := PoolStats{Limit: p.cfg.Limit, Bytes: p.bytes, Slabs: len(p.slabs), Returned: p.returned}
	for i := range p.classes {
		for _, w := range *p.classes[i].words.Load() {
			s.InUse += len(w.bufs) - bits.OnesCount64(w.free.Load())
		}
	}
	return s
}

// MaxBuffer is the size of the largest buffer that Get can return.
func (p *Pool) MaxBuffer() int { return p.cfg.MaxBuffer }

// Close gives the memory back. It fails with verbs.ErrBusy while a buffer is not released.
func (p *Pool) Close() error {
	return opErr("close_pool", p.pd.Context().Name(), p.life.Close(p.teardown))
}

// teardown takes all free buffers away, so that no Get finds one, and sees whether that is all there are. From
// then on the pool hands out nothing, even if a slab cannot be closed yet (a memory window is bound to it): Close can be
// tried again.
func (p *Pool) teardown() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		if err := p.drainLocked(); err != nil {
			return err
		}
		p.closed = true
		p.waitMu.Lock()
		for _, w := range p.wait {
			select {
			case w.wake <- struct{}{}:
			default:
			}
		}
		p.waitMu.Unlock()
	}
	var errs []error
	for _, s := range p.slabs {
		errs = append(errs, s.mr.Close())
	}
	return errors.Join(errs...)
}

func (p *Pool) drainLocked() error {
	missing := 0
	taken := map[*word]uint64{}
	for i := range p.classes {
		for _, w := range *p.classes[i].words.Load() {
			taken[w] = w.free.Swap(0)
			missing += len(w.bufs) - bits.OnesCount64(taken[w])
		}
	}
	if missing == 0 {
		for i := range p.classes {
			p.classes[i].words.Store(&[]*word{})
		}
		return nil
	}
	for w, free := range taken {
		w.free.Or(free)
	}
	if p.waiting.Load() != 0 {
		p.released()
	}
	return fmt.Errorf("%w (%d buffers are not released)", verbs.ErrBusy, missing)
}
