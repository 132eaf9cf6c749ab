package transport

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A PollMode says what a poller does when there is nothing to do.
type PollMode uint8

const (
	// Adaptive polls for as long as it has learned that completions take, if that is worthwhile, at most
	// PollerConfig.SpinBudget, and then sleeps. Where completions stay out it polls up to twice as long now and then, to
	// find out what they would take if their sender did not find us asleep.
	Adaptive PollMode = iota
	// Busy polls without ever sleeping: lowest latency, one core per poller. Give it a core of its own.
	Busy
	// Event sleeps at once: least CPU time, and each message costs a wake-up.
	Event
)

var modeNames = [...]string{"adaptive", "busy", "event"}

func (m PollMode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return fmt.Sprintf("PollMode(%d)", uint8(m))
}

// ParsePollMode is the inverse of PollMode.String.
func ParsePollMode(s string) (PollMode, error) {
	for i, n := range modeNames {
		if s == n {
			return PollMode(i), nil
		}
	}
	return 0, fmt.Errorf("transport: unknown poll mode %q: want adaptive, busy or event", s)
}

// PollerConfig describes a poller. A nil PollerConfig, and zero fields, mean the defaults.
type PollerConfig struct {
	Mode       PollMode
	SpinBudget time.Duration // longest poll before sleeping in Adaptive mode, see there; default 50 us
	// CQDepth is the initial size of the completion queue. It grows with the connections where the device can resize;
	// elsewhere (iWARP) it bounds their number. Default 4096; 65536 on iWARP.
	CQDepth int
	// SharedDepth bounds the receives in the shared receive queue, of which each connection with Config.SharedReceive needs
	// RecvDepth + 7 + 3 * RendezvousDepth; default 16384, or the device's limit. Memory is taken as connections come.
	SharedDepth int
	SharedSize  int // payload bytes of a shared receive slot; default 1 KiB. Config.EagerSize must not exceed it
	// MaxConns is the number of connections that the poller takes; default and limit 1<<20.
	MaxConns int
	// BufferLimit is the memory in bytes that the messages above EagerSize which are under way to peers may take, and again that
	// which those may take that have come; default 1 GiB, at least 64 KiB. No message can be longer (Config.MaxMessage). Memory is taken
	// as messages come, in sizes that are powers of two, see mr.Pool. While there is none, messages wait at their sender; those that
	// the program does not fetch, or keeps (Message.Take), hold up others when they are so many. What is sent and what has come are
	// kept apart because peers that send to each other would otherwise wait for each other to receive.
	BufferLimit int
}

// A Poller drives connections: it owns their completion queue and calls their handlers. Progress belongs to whoever
// waits: a goroutine in Wait (or in Conn.Send, Recv, Read and so on) becomes the polling goroutine if nobody is, and
// completes others' operations on the way; the others spin for a moment and then sleep until their own operation is
// done or the role is handed on to them.
//
// The last one to poll sleeps in the completion channel itself, on its thread, if the process has nothing else to run and
// threads to spare. Otherwise, and when nobody waits but a connection has a handler or messages to send, a goroutine of the
// poller's own sleeps on the channel and polls when it fires; it steps back as soon as somebody waits. It is not started
// before it is needed. So a server that only sets handlers makes progress, and one that wants a core for it calls Run.
//
// A Poller is safe for concurrent use. Handlers run one at a time, on the polling goroutine.
type Poller struct {
	vctx   *verbs.Context
	ownCtx bool
	pd     *verbs.PD
	ch     *verbs.CompChannel
	cq     *verbs.CQ
	pool   *mr.Pool // of what is sent
	// received is the pool of rendezvous that come. It has its own limit, so that what waits to be read by peers never keeps us from
	// reading what they wait to have read.
	received *mr.Pool
	cfg      PollerConfig
	attr     ib.DeviceAttr
	mode     PollMode
	yield    int // empty polls between two looks at who else wants to run, less one; 2^n-1

	_ [64]byte
	// role is odd while a goroutine polls, and grows by two with every spell: the driver sees whether anybody does.
	role atomic.Uint64
	_    [56]byte

	// Guarded by role.
	armed  bool // the CQ fires at its next completion
	failed error
	wcs    [32]ib.WC
	crowd  crowd
	// follows: the next completion is of the same connection. corked: connections that keep back what they post.
	follows bool
	corked  []*Conn
	// When the goroutine that is about to sleep in the channel last yielded, in ns; see yieldEvery.
	yielded int64
	// Adaptive: how long to poll, when the current wait began in ns or 0, and whether somebody has slept in it.
	spin      spin
	idleSince int64
	slept     bool

	// fired is set by the driver when the channel has delivered the event, and so disarmed the CQ: that happens without
	// the role, and at times after another goroutine has polled the completion and armed anew.
	fired atomic.Bool

	ntasks   atomic.Int32
	sleepers atomic.Int32 // Waiters in the list
	want     atomic.Int32 // goroutines that would take the role from the driver
	duties   atomic.Int32 // what must go on though nobody waits: handlers, and connections with messages to send

	taskMu sync.Mutex
	tasks  []func()

	parkMu   sync.Mutex
	oldest   *Waiter // the list of sleepers
	youngest *Waiter
	awake    bool // an heir was woken and did not look yet

	// guard is the waiter whose thread sleeps, or is about to, in the completion channel. Set with the role held.
	guard   atomic.Pointer[Waiter]
	threads bool // the channel can be slept in

	driverOnce sync.Once
	driver     sync.WaitGroup
	driverIdle atomic.Bool // the driver is, or is about to be, in CompChannel.Wait
	dormant    atomic.Bool // the driver waits to be kicked, and looks at nothing by itself
	kick       chan bool   // capacity 1. true: poll; false: look from time to time again

	tabMu sync.Mutex
	tab   atomic.Pointer[[]atomic.Pointer[Conn]]
	gens  []uint8
	free  []uint32
	used  int

	cqUsed int // CQ entries that the connections may need; guarded by tabMu
	cqSize int

	arenaMu sync.Mutex
	arenas  map[int]*arena

	srq sharedQueue

	sync    *mr.MR // of devices that are connected by the connection manager, see Batch.seal
	hubMu   sync.Mutex
	hubs    map[netip.Addr]*cmHub // guarded by hubMu
	hubWork sync.WaitGroup

	stalled []*Conn     // with rendezvous that wait for memory; guarded by role
	hungry  atomic.Bool // some may be stalled, and are to be told of memory that comes back

	refMu     sync.Mutex
	refs      int
	autoClose bool
	closed    atomic.Bool
	dead      chan struct{}
	closeMu   sync.Mutex
	closeErr  error // of the last Close
}

// NewPoller makes a poller on an open device. The Context stays the caller's.
func NewPoller(vctx *verbs.Context, cfg *PollerConfig) (*Poller, error) {
	p := &Poller{vctx: vctx, kick: make(chan bool, 1), dead: make(chan struct{}), arenas: map[int]*arena{}}
	if cfg != nil {
		p.cfg = *cfg
	}
	c := &p.cfg
	if c.SpinBudget == 0 {
		c.SpinBudget = 50 * time.Microsecond
	}
	orDefault(&c.SharedDepth, 16384)
	orDefault(&c.SharedSize, 1024)
	orDefault(&c.MaxConns, maxConns)
	orDefault(&c.BufferLimit, 1<<30)
	if c.Mode > Event || c.SpinBudget < 0 || c.CQDepth != 0 && c.CQDepth < 16 || c.SharedDepth < 16 || c.MaxConns < 1 || c.MaxConns > maxConns ||
		c.SharedSize < minEager || c.SharedSize > maxEager || c.BufferLimit < 1<<16 {
		return nil, fmt.Errorf("transport: PollerConfig out of range: %+v", *c)
	}
	p.mode = c.Mode
	p.crowd.waits() // the first time in a process it allocates
	p.yield = 1<<10 - 1
	if runtime.GOMAXPROCS(0) <= 2 {
		p.yield = 1<<8 - 1
	}
	p.spin = newSpin(int64(c.SpinBudget))
	p.tab.Store(&[]atomic.Pointer[Conn]{})
	if err := p.open(); err != nil {
		p.release()
		return nil, err
	}
	return p, nil
}

func (p *Poller) open() (err error) {
	if p.attr, err = p.vctx.QueryDevice(); err != nil {
		return err
	}
	if p.needsCM() { // the drivers of such devices do not resize
		orDefault(&p.cfg.CQDepth, 65536)
	}
	orDefault(&p.cfg.CQDepth, 4096)
	if p.attr.MaxCQE > 0 {
		p.cfg.CQDepth = min(p.cfg.CQDepth, p.attr.MaxCQE)
	}
	if p.pd, err = p.vctx.AllocPD(); err != nil {
		return err
	}
	if p.needsCM() {
		if p.sync, err = mr.Alloc(p.pd, syncSize, ib.AccessLocalWrite|ib.AccessRemoteRead); err != nil {
			return err
		}
	}
	if p.ch, err = p.vctx.NewCompChannel(); err != nil {
		return err
	}
	p.threads = p.ch.HasWaitThread()
	if p.cq, err = p.vctx.NewCQ(verbs.CQConfig{Entries: p.cfg.CQDepth, Channel: p.ch}); err != nil {
		return err
	}
	p.cqSize = p.cq.Entries()
	pc := mr.PoolConfig{
		Access: ib.AccessLocalWrite | ib.AccessRemoteRead, Limit: p.cfg.BufferLimit, MaxBuffer: min(p.cfg.BufferLimit, maxMaxMessage), Poison: poison,
	}
	if p.pool, err = mr.NewPool(p.pd, pc); err != nil {
		return err
	}
	pc.Access = ib.AccessLocalWrite
	p.received, err = mr.NewPool(p.pd, pc)
	return err
}

// Context is the device that the poller works on.
func (p *Poller) Context() *verbs.Context { return p.vctx }

// PD is the protection domain of the poller's connections: memory for one-sided operations and for SendBuffer is
// registered in it.
func (p *Poller) PD() *verbs.PD { return p.pd }

// Pool is where the poller takes memory for messages above EagerSize that it sends. Buffers for Conn.SendBuffer come from it.
func (p *Poller) Pool() *mr.Pool { return p.pool }

// Mode is the poller's policy.
func (p *Poller) Mode() PollMode { return p.mode }

// poll looks for completions once and handles them. The role is held.
func (p *Poller) poll() int {
	if p.ntasks.Load() != 0 {
		p.runTasks()
	}
	return p.pollCQ()
}

func (p *Poller) pollCQ() int {
	n, err := p.cq.Poll(p.wcs[:])
	if n == 0 {
		if err != nil {
			p.broken(err)
		}
		return 0
	}
	p.armed = false // if it was, it has fired
	tab := *p.tab.Load()
	for i := range p.wcs[:n] {
		p.follows = i+1 < n && p.wcs[i].QPN == p.wcs[i+1].QPN
		p.dispatch(tab, &p.wcs[i])
	}
	if len(p.corked) > 0 {
		p.uncork()
	}
	return n
}

// drain polls until the queue is empty, for connections that are about to end.
func (p *Poller) drain() {
	for i := 0; i < 1<<16 && p.pollCQ() > 0; i++ {
	}
}

// broken ends all connections: the CQ has overrun or the device is gone.
func (p *Poller) broken(err error) {
	if p.failed != nil || p.closed.Load() {
		return
	}
	p.failed = err
	for i := range *p.tab.Load() {
		if c := (*p.tab.Load())[i].Load(); c != nil {
			c.fail(&CloseError{Err: err})
		}
	}
}

// Poll looks for completions once and handles at most 32, if no other goroutine is polling; it returns how many. It
// does not block, and must not be called by a handler.
func (p *Poller) Poll() int {
	if !p.tryRole() {
		return 0
	}
	n := p.poll()
	if n > 0 {
		p.busy()
	}
	p.leave()
	return n
}

// Close ends the poller. It fails with verbs.ErrBusy while it has connections or listeners that are not closed, or while
// memory that was registered in PD() is open; close those first, and call Close again.
func (p *Poller) Close() error {
	p.refMu.Lock()
	if p.refs > 0 {
		p.refMu.Unlock()
		return fmt.Errorf("transport: poller: %w", verbs.ErrBusy)
	}
	first := !p.closed.Swap(true)
	p.refMu.Unlock()
	p.closeMu.Lock()
	defer p.closeMu.Unlock()
	if first {
		close(p.dead)
		p.ch.Interrupt()
		for !p.tryRole() { // whoever polls sees closed within checkEvery polls
			time.Sleep(10 * time.Microsecond)
		}
		p.runTasks()
		p.role.Store(closedRole)
	} else if p.closeErr == nil {
		return nil
	}
	p.closeErr = p.release()
	return p.closeErr
}

// closedRole is odd: the role of a closed poller is never free.
const closedRole = 1<<63 | 1

// release closes what the poller is made of, in order.
func (p *Poller) release() error {
	var errs []error
	keep := func(err error) { errs = append(errs, err) }
	keep(p.closeHubs())
	if p.cq != nil {
		keep(p.cq.Close())
	}
	if p.ch != nil {
		keep(p.ch.Close()) // ends the driver
	}
	p.driver.Wait()
	keep(p.srq.close())
	for _, a := range p.arenas {
		keep(a.close())
	}
	if p.sync != nil {
		keep(p.sync.Close())
	}
	for _, pool := range []*mr.Pool{p.pool, p.received} {
		if pool != nil {
			keep(pool.Close())
		}
	}
	if p.pd != nil {
		keep(p.pd.Close())
	}
	if p.ownCtx {
		keep(p.vctx.Close())
	}
	return errors.Join(errs...)
}

// retain counts a listener or connection that uses the poller.
func (p *Poller) retain() error {
	p.refMu.Lock()
	defer p.refMu.Unlock()
	if p.closed.Load() {
		return errPollerClosed
	}
	p.refs++
	return nil
}

// unretain undoes retain. closeUnused is to follow.
func (p *Poller) unretain() {
	p.refMu.Lock()
	p.refs--
	p.refMu.Unlock()
}

// unref undoes retain, and closes the poller if that was the last use of one that nobody else will close.
func (p *Poller) unref() error {
	p.unretain()
	return p.closeUnused()
}

// closeUnused closes a poller that was made for a listener or dialled connection when nobody uses it any more.
func (p *Poller) closeUnused() error {
	p.refMu.Lock()
	last := p.refs == 0 && p.autoClose
	p.refMu.Unlock()
	if !last {
		return nil
	}
	return p.Close()
}

// pollerFor returns the poller that cfg names, or a new one, with one reference.
func pollerFor(cfg *Config) (*Poller, error) {
	if p := cfg.Poller; p != nil {
		return p, p.retain()
	}
	vctx, own := cfg.Context, false
	if vctx == nil {
		var err error
		if vctx, err = verbs.Open(cfg.Device); err != nil {
			return nil, err
		}
		own = true
	}
	pc := &PollerConfig{Mode: cfg.PollMode}
	if cfg.SharedReceive {
		pc.SharedSize = cfg.EagerSize
	}
	p, err := NewPoller(vctx, pc)
	if err != nil {
		if own {
			vctx.Close()
		}
		return nil, err
	}
	p.ownCtx, p.autoClose, p.refs = own, true, 1
	return p, nil
}

// Work request ids: what completed (4 bits), the connection's generation (8) and index (20), and the receive slot or
// send queue position (32). There is nothing to look up but an array element.
const (
	idRecv   = 1
	idSend   = 2
	idShared = 3 // a receive of the shared queue: index and generation are zero, the QPN tells the connection

	maxConns = 1 << 20
)

func makeID(kind uint64, gen uint8, idx, low uint32) uint64 {
	return kind<<60 | uint64(gen)<<52 | uint64(idx)<<32 | uint64(low)
}

// dispatch hands one completion to its connection.
func (p *Poller) dispatch(tab []atomic.Pointer[Conn], wc *ib.WC) {
	kind := wc.ID >> 60
	if kind == idShared {
		p.srq.received(p, wc)
		return
	}
	idx := int(wc.ID >> 32 & (maxConns - 1))
	if idx >= len(tab) {
		return
	}
	c := tab[idx].Load()
	if c == nil || c.gen != uint8(wc.ID>>52) {
		return // a completion of a connection that has ended
	}
	switch kind {
	case idRecv:
		if low := uint32(wc.ID); low < uint32(len(c.slots)) {
			c.received(&c.slots[low], wc)
		}
	case idSend:
		c.sent(wc)
	}
}

// join gives c a place in the table and room in the CQ.
func (p *Poller) join(c *Conn, entries int) error {
	p.tabMu.Lock()
	defer p.tabMu.Unlock()
	if p.used >= p.cfg.MaxConns {
		return fmt.Errorf("%w: it has %d, its maximum", ErrNoRoom, p.used)
	}
	if need := p.cqUsed + entries; need > p.cqSize {
		size := max(2*p.cqSize, need)
		if p.attr.MaxCQE > 0 {
			size = max(min(size, p.attr.MaxCQE), need)
		}
		if err := p.cq.Resize(size); err != nil {
			return fmt.Errorf("%w: the completion queue has %d entries, and %d are needed: %w", ErrNoRoom, p.cqSize, need, err)
		}
		p.cqSize = p.cq.Entries()
	}
	p.cqUsed += entries
	c.cqNeed = entries
	var idx uint32
	if n := len(p.free); n > 0 {
		idx = p.free[n-1]
		p.free = p.free[:n-1]
	} else {
		idx = uint32(p.used)
		if old := *p.tab.Load(); int(idx) >= len(old) {
			tab := make([]atomic.Pointer[Conn], max(16, 2*len(old)))
			for i := range old {
				tab[i].Store(old[i].Load())
			}
			p.tab.Store(&tab)
			p.gens = append(p.gens, make([]uint8, len(tab)-len(p.gens))...)
		}
	}
	p.used++
	p.gens[idx]++
	c.idx, c.gen = idx, p.gens[idx]
	(*p.tab.Load())[idx].Store(c)
	return nil
}

// part undoes join. The role is held, and the queue pair is closed.
func (p *Poller) part(c *Conn) {
	p.drain() // what the queue pair left in the CQ no longer counts
	p.tabMu.Lock()
	defer p.tabMu.Unlock()
	(*p.tab.Load())[c.idx].Store(nil)
	p.free = append(p.free, c.idx)
	p.used--
	p.cqUsed -= c.cqNeed
}

// arenaFor returns the source of slots of the given stride.
func (p *Poller) arenaFor(stride int) *arena {
	p.arenaMu.Lock()
	defer p.arenaMu.Unlock()
	a := p.arenas[stride]
	if a == nil {
		a = &arena{pd: p.pd, stride: stride}
		p.arenas[stride] = a
	}
	return a
}
