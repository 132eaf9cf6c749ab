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

	"github.com/ringside-rdma/ringside/internal/life"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Errors of pools.
var (
	// ErrPoolExhausted: all memory that the pool may have is in use. Release buffers, or raise PoolConfig.Limit.
	ErrPoolExhausted = errors.New("mr: pool is exhausted: all of its memory is in use; release buffers or raise PoolConfig.Limit")
	// ErrTooLarge: no buffer of the pool is that large; use Alloc, or raise PoolConfig.MaxBuffer.
	ErrTooLarge = errors.New("mr: larger than the pool's largest buffer: use Alloc or raise PoolConfig.MaxBuffer")
)

const (
	minClassBits = 6 // 64 B: a cache line, so that no two buffers share one
	maxClassBits = 30
	minSlab      = 64 << 10
)

// PoolConfig describes a pool. Zero fields take their defaults.
type PoolConfig struct {
	// Access is what may be done to the buffers. Default ib.AccessLocalWrite: sends, receives, and the results of reads.
	Access ib.Access
	// Limit is how many bytes of memory the pool may take; default 256 MiB.
	Limit int
	// MaxBuffer is the size of the largest buffer in bytes, rounded up to a power of two; default 1 MiB, at most 1 GiB.
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
// are allocated as needed and kept until Close. In steady state Get and Release make no system call, no garbage and
// take no lock.
//
// A Pool is safe for concurrent use, and goroutines keep out of each other's way where they can.
type Pool struct {
	life    life.Node
	pd      *verbs.PD
	cfg     PoolConfig
	classes []class
	hints   []hints      // a power of two
	waiting atomic.Int32 // waiters in wait

	mu     sync.Mutex // growing and closing take turns
	bytes  int
	slabs  []*MR
	closed bool // hands out nothing any more

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

// word keeps up to 64 buffers: a set bit is a free buffer. So taking one is a compare-and-swap, giving one back is an
// atomic or, whose old value tells a double release, and there is no list to tear.
type word struct {
	free atomic.Uint64
	bufs []Buffer
	_    [96]byte // own pair of cache lines: adjacent-line prefetch makes neighbours collide
}

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
	if cfg.Limit < 0 || cfg.MaxBuffer < 0 || cfg.MaxBuffer > 1<<maxClassBits || cfg.SlabSize < 0 || cfg.SlabSize > 1<<maxClassBits {
		return nil, opErr("new_pool", dev, fmt.Errorf("invalid size: Limit %d, MaxBuffer %d (at most %d), SlabSize %d (at most %d)",
			cfg.Limit, cfg.MaxBuffer, 1<<maxClassBits, cfg.SlabSize, 1<<maxClassBits))
	}
	cfg.MaxBuffer = 1 << ceilLog2(max(cfg.MaxBuffer, 1<<minClassBits))
	cfg.SlabSize = 1 << ceilLog2(max(cfg.SlabSize, minSlab))
	p := &Pool{pd: pd, cfg: cfg}
	// More hints than processors, because goroutines are spread over them by chance.
	p.hints = make([]hints, 1<<ceilLog2(min(16*runtime.GOMAXPROCS(0), 256)))
	p.classes = make([]class, ceilLog2(cfg.MaxBuffer)-minClassBits+1)
	for i := range p.classes {
		c := &p.classes[i]
		c.size = 1 << (minClassBits + i)
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

// Get returns a buffer with Len n and at least that capacity; its content is arbitrary. It does not wait: if the pool
// may not grow any more, and larger classes have none free either, it fails with ErrPoolExhausted; if n is more than
// MaxBuffer, with ErrTooLarge. It may allocate memory from the system; TryGet never does.
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

// GetContext is Get, but waits for a Release while the pool is exhausted. It ends with ctx.
func (p *Pool) GetContext(ctx context.Context, n int) (*Buffer, error) {
	b, err := p.Get(n)
	if err == nil || !errors.Is(err, ErrPoolExhausted) {
		return b, err
	}
	w := &waiter{size: n, wake: make(chan struct{}, 1)}
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
		select {
		case <-w.wake:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// waiter is a GetContext that waits.
type waiter struct {
	size int
	wake chan struct{} // holds one wake-up
}

// leave ends a wait. A wake-up that it did not use goes to the next.
func (p *Pool) leave(w *waiter) {
	p.waitMu.Lock()
	p.wait = slices.DeleteFunc(p.wait, func(v *waiter) bool { return v == w })
	p.waiting.Add(-1)
	p.waitMu.Unlock()
	select {
	case <-w.wake:
		p.wakeOne(p.cfg.MaxBuffer) // whichever size was released
	default:
	}
}

// wakeOne wakes the first waiter that a buffer of that size is enough for.
func (p *Pool) wakeOne(size int) {
	p.waitMu.Lock()
	defer p.waitMu.Unlock()
	for _, w := range p.wait {
		if w.size <= size {
			select {
			case w.wake <- struct{}{}:
				return
			default: // woken already
			}
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
	// Slabs double from 64 KiB, or what holds two buffers, to SlabSize: a class that is hardly used costs little.
	size := max(min(max(minSlab, 2*c.size)<<min(c.slabs, 10), p.cfg.SlabSize), c.size)
	for size > c.size && size > p.cfg.Limit-p.bytes {
		size /= 2
	}
	if size > p.cfg.Limit-p.bytes {
		return nil, ErrPoolExhausted
	}
	m, err := AllocOptions(p.pd, size, p.cfg.Access, p.cfg.Options)
	if err != nil {
		return nil, err
	}
	words := slices.Clone(*c.words.Load())
	mine := len(words)
	slab := make([]Buffer, size/c.size)
	per := min(max(len(slab)/16, 1), 64) // words for many goroutines, rather than full ones
	for first := 0; first < len(slab); first += per {
		w := &word{bufs: slab[first:min(first+per, len(slab))]}
		for i := range w.bufs {
			off := (first + i) * c.size
			w.bufs[i] = Buffer{mem: m.buf[off : off+c.size : off+c.size], addr: m.base + uint64(off), lkey: m.lkey, off: off, mr: m,
				bit: 1 << i, word: w, pool: p}
			if p.cfg.Poison {
				w.bufs[i].poison()
			}
		}
		w.free.Store(^uint64(0) >> (64 - len(w.bufs)))
		words = append(words, w)
	}
	b := &words[mine].bufs[0]
	words[mine].free.Store(words[mine].free.Load() &^ b.bit) // nobody else sees it yet
	c.words.Store(&words)
	h.word[i].Store(uint32(mine))
	c.slabs++
	p.bytes += size
	p.slabs = append(p.slabs, m)
	return b, nil
}

// hint returns the hints of the calling goroutine, which it may share with others.
func (p *Pool) hint() *hints { return &p.hints[stackHint()&uint(len(p.hints)-1)] }

// pop takes a free buffer of class i, from the word that h names if that has one, else from the next that has; nil if
// there is none.
func (p *Pool) pop(i int, h *hints) *Buffer {
	words := *p.classes[i].words.Load()
	hint := &h.word[i]
	start := uint(hint.Load())
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
// panics if the buffer was released already.
func (b *Buffer) Release() {
	p := b.pool
	size := len(b.mem)
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
		p.wakeOne(size)
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
}

// Stats counts. It looks at every buffer, and while others Get and Release the result is approximate.
func (p *Pool) Stats() PoolStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := PoolStats{Limit: p.cfg.Limit, Bytes: p.bytes, Slabs: len(p.slabs)}
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
	for _, m := range p.slabs {
		errs = append(errs, m.Close())
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
		p.wakeOne(p.cfg.MaxBuffer)
	}
	return fmt.Errorf("%w (%d buffers are not released)", verbs.ErrBusy, missing)
}
