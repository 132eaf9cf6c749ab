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
// A Pool is safe for concurrent use. Free buffers are kept in several lists a class, of which goroutines prefer
// different ones.
type Pool struct {
	life    life.Node
	pd      *verbs.PD
	cfg     PoolConfig
	nshards uint // a power of two
	classes []class
	waiting atomic.Int32 // waiters in wait

	mu     sync.Mutex // growing, closing; taken with no list involved
	bytes  int
	slabs  []*MR
	closed bool // hands out nothing any more

	waitMu sync.Mutex
	wait   []*waiter
}

// class holds the buffers of one size.
type class struct {
	size int
	// bufs is every buffer of the class; it only grows. A buffer's index is published here before it is in any list.
	bufs   atomic.Pointer[[]*Buffer]
	shards []shard
	slabs  int // how many there are; guarded by Pool.mu
}

// shard is a list of free buffers, linked by index (Treiber's stack). The upper half of head counts changes, so that a
// head that was popped and pushed again between another's load and compare-and-swap is noticed.
type shard struct {
	head atomic.Uint64
	_    [120]byte // own pair of cache lines: adjacent-line prefetch makes neighbours collide
}

// What Buffer.next and the lower half of shard.head hold: the index of a buffer plus firstIndex, or one of these.
const (
	endOfList  = 0 // so that the zero shard is an empty list
	inUse      = 1 // not in any list: somebody owns it
	firstIndex = 2
)

// A Buffer is a piece of a pool's memory with one owner at a time: from Get to Release. Its methods are for the owner
// only; handing the buffer to another goroutine takes the usual synchronisation.
type Buffer struct {
	mem  []byte // the whole buffer
	n    int    // Len
	addr uint64
	lkey ib.LKey
	home uint32 // the shard that it goes back to; written by the owner
	idx  uint32
	next atomic.Uint32
	off  int // in the slab
	mr   *MR
	cls  *class
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
	p.nshards = 1 << ceilLog2(min(runtime.GOMAXPROCS(0), 64))
	p.classes = make([]class, ceilLog2(cfg.MaxBuffer)-minClassBits+1)
	for i := range p.classes {
		c := &p.classes[i]
		c.size = 1 << (minClassBits + i)
		c.shards = make([]shard, p.nshards)
		c.bufs.Store(&[]*Buffer{})
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
		c := &p.classes[classFor(n)]
		if b := c.pop(stackHint() & (p.nshards - 1)); b != nil {
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
	hint := stackHint() & (p.nshards - 1)
	for ; i < len(p.classes); i++ {
		if b := p.classes[i].pop(hint); b != nil {
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
	c := &p.classes[i]
	hint := stackHint() & (p.nshards - 1)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, opErr("pool_get", p.pd.Context().Name(), net.ErrClosed)
	}
	if b := c.pop(hint); b != nil { // somebody else has grown the class
		return p.hand(b, n), nil
	}
	err := p.growLocked(c, hint)
	if err == nil {
		return p.hand(c.takeNew(), n), nil
	}
	for j := i + 1; j < len(p.classes); j++ { // too large a buffer is better than none
		if b := p.classes[j].pop(hint); b != nil {
			return p.hand(b, n), nil
		}
	}
	return nil, err
}

// growLocked adds a slab to c: all of its buffers but the last go to the list of shard, the last is the caller's.
func (p *Pool) growLocked(c *class, shard uint) error {
	// Slabs double from 64 KiB, or what holds two buffers, to SlabSize: a class that is hardly used costs little.
	size := max(min(max(minSlab, 2*c.size)<<min(c.slabs, 10), p.cfg.SlabSize), c.size)
	for size > c.size && size > p.cfg.Limit-p.bytes {
		size /= 2
	}
	if size > p.cfg.Limit-p.bytes {
		return ErrPoolExhausted
	}
	m, err := AllocOptions(p.pd, size, p.cfg.Access, p.cfg.Options)
	if err != nil {
		return err
	}
	old := *c.bufs.Load()
	all := old // appending beyond len(old) disturbs no reader of old
	slab := make([]Buffer, size/c.size)
	for i := range slab {
		b := &slab[i]
		off := i * c.size
		*b = Buffer{mem: m.buf[off : off+c.size : off+c.size], addr: m.base + uint64(off), lkey: m.lkey, off: off, mr: m,
			idx: uint32(len(all)), home: uint32(shard), cls: c, pool: p}
		b.next.Store(inUse)
		if p.cfg.Poison {
			b.poison()
		}
		all = append(all, b)
	}
	c.bufs.Store(&all)
	c.slabs++
	p.bytes += size
	p.slabs = append(p.slabs, m)
	for i := range slab[:len(slab)-1] {
		if !slab[i].push() {
			panic("mr: a new buffer is free already")
		}
	}
	return nil
}

// takeNew returns the buffer that growLocked left to the caller.
func (c *class) takeNew() *Buffer {
	all := *c.bufs.Load()
	return all[len(all)-1]
}

// pop takes a free buffer, from the list of shard if it has one, else from the others; nil if there is none.
func (c *class) pop(shard uint) *Buffer {
	mask := uint(len(c.shards) - 1)
	for i := range uint(len(c.shards)) {
		s := (shard + i) & mask
		head := &c.shards[s].head
		for {
			h := head.Load()
			if uint32(h) == endOfList {
				break
			}
			// The list of buffers is loaded after the head: it has the head's index.
			b := (*c.bufs.Load())[uint32(h)-firstIndex]
			// b may be popped by another right now; then next is of no use, but the count in head has changed.
			if head.CompareAndSwap(h, (h>>32+1)<<32|uint64(b.next.Load())) {
				b.next.Store(inUse)
				b.home = uint32(s)
				return b
			}
		}
	}
	return nil
}

// push puts b into its home list. It returns false if b is not in use.
func (b *Buffer) push() bool {
	head := &b.cls.shards[b.home].head
	h := head.Load()
	if !b.next.CompareAndSwap(inUse, uint32(h)) {
		return false
	}
	for !head.CompareAndSwap(h, (h>>32+1)<<32|uint64(b.idx+firstIndex)) {
		h = head.Load()
		b.next.Store(uint32(h))
	}
	return true
}

// Release gives the buffer back; its memory must not be touched any more, by the program or by a work request. It
// panics if the buffer was released already.
func (b *Buffer) Release() {
	p := b.pool
	size := b.cls.size
	if p.cfg.Poison {
		if b.next.Load() != inUse {
			panic(doubleRelease)
		}
		b.poison()
	}
	if !b.push() {
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
		for _, b := range *p.classes[i].bufs.Load() {
			if b.next.Load() == inUse {
				s.InUse++
			}
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

// teardown takes all buffers out of the lists, so that no Get finds one, and sees whether that is all there are. From
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
	var taken []*Buffer
	for i := range p.classes {
		c := &p.classes[i]
		n := 0
		for b := c.pop(0); b != nil; b = c.pop(0) {
			taken = append(taken, b)
			n++
		}
		missing += len(*c.bufs.Load()) - n
	}
	if missing == 0 {
		return nil
	}
	for _, b := range taken {
		b.push()
	}
	if p.waiting.Load() != 0 {
		p.wakeOne(p.cfg.MaxBuffer)
	}
	return fmt.Errorf("%w (%d buffers are not released)", verbs.ErrBusy, missing)
}
