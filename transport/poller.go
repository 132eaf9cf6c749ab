package transport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A PollMode says what a poller does when there is nothing to do.
type PollMode uint8

const (
	// Adaptive polls for as long as it has learned that completions are worth waiting for, at most
	// PollerConfig.SpinBudget, and then sleeps.
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
	SpinBudget time.Duration // longest poll before sleeping in Adaptive mode; default 50 us
	// CQDepth is the initial size of the completion queue. It grows with the connections where the device can resize;
	// elsewhere it bounds their number. Default 4096.
	CQDepth     int
	SharedDepth int // most receives in the shared receive queue; default 4096; used with Config.SharedReceive
	SharedSize  int // payload bytes of a shared receive slot; default 1 KiB. Config.EagerSize must not exceed it
	// MaxConns is the number of connections that the poller takes; default and limit 1<<20.
	MaxConns int
	// BufferLimit is the memory in bytes for messages above EagerSize, sent and received; default 1 GiB.
	BufferLimit int
}

// A Poller drives connections: it owns their completion queue and calls their handlers. Progress belongs to whoever
// waits: a goroutine in Wait (or in Conn.Send, Recv, Read and so on) becomes the polling goroutine if nobody is, and
// completes others' operations on the way; the others spin for a moment and then sleep until their own operation is
// done or the role is handed on to them.
//
// When all are asleep, and when nobody waits but a connection has a handler or messages to send, a goroutine of the poller's own sleeps on
// the completion channel and polls when it fires; it steps back as soon as somebody waits. It is not started before it
// is needed. So a server that only sets handlers makes progress, and one that wants a core for it calls Run.
//
// A Poller is safe for concurrent use. Handlers run one at a time, on the polling goroutine.
type Poller struct {
	vctx   *verbs.Context
	ownCtx bool
	pd     *verbs.PD
	ch     *verbs.CompChannel
	cq     *verbs.CQ
	pool   *mr.Pool
	cfg    PollerConfig
	attr   ib.DeviceAttr
	mode   PollMode
	yield  int // empty polls between two calls of runtime.Gosched, less one; 2^n-1

	_ [64]byte
	// role is odd while a goroutine polls, and grows by two with every spell: the driver sees whether anybody does.
	role atomic.Uint64
	_    [56]byte

	// Guarded by role.
	armed  bool // the CQ fires at its next completion
	failed error
	wcs    [32]ib.WC
	// Adaptive: a moving average of idle times in ns, when the current one began, and the number of budgets given.
	avgWait   int64
	idleSince int64
	spells    uint32

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

	driverOnce sync.Once
	driver     sync.WaitGroup
	driverIdle atomic.Bool // the driver is, or is about to be, in CompChannel.Wait
	dormant    atomic.Bool // the driver waits to be kicked, and looks at nothing by itself
	kick       chan struct{}

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

	nstalled atomic.Int32
	stalled  []*Conn // with rendezvous that wait for memory; guarded by role

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
	p := &Poller{vctx: vctx, kick: make(chan struct{}, 1), dead: make(chan struct{}), arenas: map[int]*arena{}}
	if cfg != nil {
		p.cfg = *cfg
	}
	c := &p.cfg
	if c.SpinBudget == 0 {
		c.SpinBudget = 50 * time.Microsecond
	}
	orDefault(&c.CQDepth, 4096)
	orDefault(&c.SharedDepth, 4096)
	orDefault(&c.SharedSize, 1024)
	orDefault(&c.MaxConns, maxConns)
	orDefault(&c.BufferLimit, 1<<30)
	if c.Mode > Event || c.SpinBudget < 0 || c.CQDepth < 16 || c.SharedDepth < 16 || c.MaxConns < 1 || c.MaxConns > maxConns ||
		c.SharedSize < minEager || c.SharedSize > maxEager || c.BufferLimit < 1<<16 {
		return nil, fmt.Errorf("transport: PollerConfig out of range: %+v", *c)
	}
	p.mode = c.Mode
	p.yield = 1<<10 - 1
	if runtime.GOMAXPROCS(0) <= 2 {
		p.yield = 1<<8 - 1
	}
	p.avgWait = int64(c.SpinBudget) / 4
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
	if p.attr.MaxCQE > 0 {
		p.cfg.CQDepth = min(p.cfg.CQDepth, p.attr.MaxCQE)
	}
	if p.pd, err = p.vctx.AllocPD(); err != nil {
		return err
	}
	if p.ch, err = p.vctx.NewCompChannel(); err != nil {
		return err
	}
	if p.cq, err = p.vctx.NewCQ(verbs.CQConfig{Entries: p.cfg.CQDepth, Channel: p.ch}); err != nil {
		return err
	}
	p.cqSize = p.cq.Entries()
	maxBuf := 1
	for maxBuf < p.cfg.BufferLimit {
		maxBuf <<= 1
	}
	p.pool, err = mr.NewPool(p.pd, mr.PoolConfig{
		Access: ib.AccessLocalWrite | ib.AccessRemoteRead, Limit: p.cfg.BufferLimit, MaxBuffer: min(maxBuf, maxMaxMessage), Poison: poison,
	})
	return err
}

// Context is the device that the poller works on.
func (p *Poller) Context() *verbs.Context { return p.vctx }

// PD is the protection domain of the poller's connections: memory for one-sided operations and for SendBuffer is
// registered in it.
func (p *Poller) PD() *verbs.PD { return p.pd }

// Pool is where the poller takes memory for messages above EagerSize. Buffers for Conn.SendBuffer come from it.
func (p *Poller) Pool() *mr.Pool { return p.pool }

// Mode is the poller's policy.
func (p *Poller) Mode() PollMode { return p.mode }

func (p *Poller) tryRole() bool {
	v := p.role.Load()
	return v&1 == 0 && p.role.CompareAndSwap(v, v+1)
}

// leave gives the role up, and sees to it that those who sleep are not forgotten: either the CQ is armed and the driver
// waits for it, or one of them takes the role over.
func (p *Poller) leave() {
	armed := p.armed
	p.role.Add(1) // pairs with the look at role in follow, after it has entered the list of sleepers
	if p.sleepers.Load() != 0 || p.ntasks.Load() != 0 {
		p.handOver(armed)
	}
}

func (p *Poller) handOver(armed bool) {
	for p.ntasks.Load() != 0 && p.tryRole() {
		p.runTasks()
		armed = p.armed
		p.role.Add(1)
	}
	if p.sleepers.Load() == 0 {
		return
	}
	if armed {
		p.wakeDriver()
		return
	}
	p.parkMu.Lock()
	if !p.awake {
		for w := p.oldest; w != nil; w = w.next {
			if w.nudge() {
				p.awake = true
				w.heir = true
				break
			}
		}
	}
	p.parkMu.Unlock()
}

func (p *Poller) addSleeper(w *Waiter) {
	p.parkMu.Lock()
	w.next, w.prev = nil, p.youngest
	if p.youngest != nil {
		p.youngest.next = w
	} else {
		p.oldest = w
	}
	p.youngest = w
	p.parkMu.Unlock()
	p.sleepers.Add(1)
}

// removeSleeper takes w off the list, and reports whether it had been made heir: handOver does that under parkMu.
func (p *Poller) removeSleeper(w *Waiter) (heir bool) {
	p.parkMu.Lock()
	if w.prev != nil {
		w.prev.next = w.next
	} else {
		p.oldest = w.next
	}
	if w.next != nil {
		w.next.prev = w.prev
	} else {
		p.youngest = w.prev
	}
	w.next, w.prev = nil, nil
	if heir = w.heir; heir {
		w.heir, p.awake = false, false
	}
	p.parkMu.Unlock()
	p.sleepers.Add(-1)
	return heir
}

// do runs f with the role held: at once if nobody polls, otherwise by the polling goroutine between two polls.
func (p *Poller) do(f func()) {
	p.taskMu.Lock()
	p.tasks = append(p.tasks, f)
	p.taskMu.Unlock()
	p.ntasks.Add(1)
	if p.tryRole() {
		p.runTasks()
		p.leave()
	}
}

func (p *Poller) runTasks() {
	for p.ntasks.Load() != 0 {
		p.taskMu.Lock()
		tasks := p.tasks
		p.tasks = nil
		p.taskMu.Unlock()
		p.ntasks.Add(int32(-len(tasks)))
		for _, f := range tasks {
			f()
		}
	}
}

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
		p.dispatch(tab, &p.wcs[i])
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
	p.leave()
	return n
}

// Run polls on the calling goroutine until ctx ends, and returns its error, or net.ErrClosed once the poller is closed.
// In Busy mode the goroutine never sleeps: runtime.LockOSThread and a pinned core suit it. In the other modes it sleeps
// like any waiter, and the poller's own goroutine does the work when there is little.
func (p *Poller) Run(ctx context.Context) error {
	var w Waiter
	return p.Wait(ctx, &w)
}

type outcome uint8

const (
	again outcome = iota
	finished
	cancelled
	closing
)

var errPollerClosed = fmt.Errorf("transport: poller: %w", net.ErrClosed)

// Wait waits until w is done, driving the poller if nobody else does, and returns w.Err(). If ctx ends first it returns
// ctx.Err(), and if the poller is closed an error that matches net.ErrClosed: w is then still pending, and must stay
// untouched until its operation completes it. Handlers must not call it. It does not allocate, except the first time
// that w sleeps.
func (p *Poller) Wait(ctx context.Context, w *Waiter) error {
	if w.Finished() {
		return w.err
	}
	done := ctx.Done()
	for {
		var o outcome
		if p.tryRole() {
			o = p.lead(done, w)
		} else {
			o = p.follow(done, w)
		}
		switch o {
		case finished:
			return w.err
		case cancelled:
			return ctx.Err()
		case closing:
			return errPollerClosed
		}
	}
}

// checkEvery is how many empty polls pass between two looks at the clock, the context and the scheduler.
const checkEvery = 64

var epoch = time.Now()

func now() int64 { return int64(time.Since(epoch)) }

// lead polls until w is done or it is time to sleep. It is entered with the role, and returns without.
func (p *Poller) lead(done <-chan struct{}, w *Waiter) outcome {
	var until int64 // when to sleep; 0: not long enough idle to look at the clock
	for spins := 1; ; spins++ {
		n := p.poll()
		if n > 0 {
			p.busy()
			spins, until = 0, 0
		}
		if w.Finished() {
			p.leave()
			return finished
		}
		if n > 0 || spins%checkEvery != 0 && p.mode != Event {
			continue
		}
		if p.closed.Load() {
			p.leave()
			return closing
		}
		select {
		case <-done:
			p.leave()
			return cancelled
		default:
		}
		if spins&p.yield == 0 {
			runtime.Gosched()
		}
		if p.mode == Busy || !p.idle(&until) || !p.arm() {
			continue
		}
		if !w.park() {
			continue
		}
		p.addSleeper(w)
		p.startDriver()
		p.leave()
		return p.sleep(done, w)
	}
}

// idle is called when polls have found nothing for a moment, and reports whether it is time to sleep. until is the
// caller's, zero at the start of the idle time. The role is held.
func (p *Poller) idle(until *int64) bool {
	t := now()
	if p.idleSince == 0 {
		p.idleSince = t
	}
	if *until == 0 {
		*until = t + p.budget()
	}
	return p.mode == Event || t >= *until
}

// busy is called when a poll has found something: it learns how long the idle time was. The role is held.
func (p *Poller) busy() {
	if p.idleSince != 0 {
		d := min(now()-p.idleSince, 20*int64(p.cfg.SpinBudget))
		p.idleSince = 0
		p.avgWait += (d - p.avgWait) / 8
	}
}

// arm makes the CQ fire at its next completion, and reports whether there is none yet.
func (p *Poller) arm() bool {
	if p.fired.Load() && p.fired.Swap(false) {
		p.armed = false
	}
	if !p.armed {
		if err := p.cq.Arm(false); err != nil {
			p.broken(err)
			return true // sleep: the connections' end wakes everybody
		}
		p.armed = true
	}
	return p.poll() == 0
}

// sleep waits for w's token. w is parked and in the list; afterwards it is neither.
func (p *Poller) sleep(done <-chan struct{}, w *Waiter) outcome {
	o := again
	select {
	case <-w.wake:
	case <-done:
		w.unpark()
		o = cancelled
	case <-p.dead:
		w.unpark()
		o = closing
	}
	heir := p.removeSleeper(w)
	if w.Finished() {
		o = finished
	}
	if heir && o != again {
		// We were to take the role, and will not: pass it on.
		if p.tryRole() {
			p.leave()
		}
	}
	return o
}

// follow waits for w while another goroutine polls: first by looking at w, then asleep.
func (p *Poller) follow(done <-chan struct{}, w *Waiter) outcome {
	p.want.Add(1)
	for i := 1; i <= 512; i++ {
		if w.Finished() {
			p.want.Add(-1)
			return finished
		}
		if p.role.Load()&1 == 0 {
			p.want.Add(-1)
			return again
		}
		if i%128 == 0 {
			runtime.Gosched()
		}
	}
	p.want.Add(-1)
	if !w.park() {
		return finished
	}
	p.addSleeper(w)
	if p.role.Load()&1 == 0 { // pairs with leave: it has seen us in the list, or we see that it left
		w.unpark()
		p.removeSleeper(w) // heir or not: we are about to try for the role
		return again
	}
	return p.sleep(done, w)
}

// budget is for how long to poll before sleeping. When completions are expected within the limit, it is twice what
// they took of late; otherwise there is nothing to gain, and it is short. Now and then it is the whole limit, because
// times that include a wake-up look longer than polling would have made them. The role is held.
func (p *Poller) budget() int64 {
	limit := int64(p.cfg.SpinBudget)
	p.spells++
	switch {
	case p.spells%16 == 0:
		return limit
	case p.avgWait > limit:
		return min(limit, 2000)
	}
	return min(limit, 2*p.avgWait+5000)
}

// startDriver makes sure that the poller's own goroutine exists.
func (p *Poller) startDriver() {
	p.driverOnce.Do(func() {
		p.driver.Add(1)
		go p.drive()
	})
}

// wakeDriver makes the driver look at the queue, if it is not waiting for it to fire already.
func (p *Poller) wakeDriver() {
	if !p.driverIdle.Load() {
		select {
		case p.kick <- struct{}{}:
		default:
		}
	}
}

// drive is the poller's own goroutine. It sleeps on the completion channel on behalf of all waiters that sleep and of
// the duties: one select over a waiter's token, its context and the channel's descriptor is not to be had without a
// goroutine, and this one costs a goroutine switch (0.2 us) only where a wake-up (5 us and more) is paid as well.
func (p *Poller) drive() {
	defer p.driver.Done()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for !p.closed.Load() {
		if p.tryRole() && p.driveLead() {
			if _, err := p.ch.Wait(context.Background()); err != nil {
				if errors.Is(err, net.ErrClosed) {
					return
				}
				p.do(func() { p.broken(err) })
				select { // a channel that fails for good must not make us spin
				case <-p.dead:
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
			p.fired.Store(true) // before the driver looks again: whoever arms next must not rely on the last time
			p.driverIdle.Store(false)
			continue
		}
		if !p.watch(timer) {
			return
		}
	}
}

// driveLead polls with the role held, and gives it up before it returns: true if the queue is armed and the driver is
// to sleep on it, false if somebody else wants the role or nobody needs the driver.
func (p *Poller) driveLead() bool {
	var until int64
	if p.armed {
		until = 1 // whoever armed the queue has spent a budget on polling it
	}
	for spins := 1; ; spins++ {
		n := p.poll()
		if n > 0 {
			p.busy()
			spins, until = 0, 0
		}
		if p.closed.Load() || p.want.Load() != 0 {
			p.leave()
			return false
		}
		sleepers := p.sleepers.Load()
		if n > 0 && sleepers != 0 {
			// Some of them are awake now, or get the role: let them run, on this thread, and see whether we are still needed.
			p.leave()
			runtime.Gosched()
			if !p.tryRole() {
				return false
			}
			continue
		}
		if n > 0 || spins%checkEvery != 0 && p.mode != Event && until != 1 {
			continue
		}
		needed := p.duties.Load() != 0
		if !needed && sleepers == 0 {
			p.leave()
			return false
		}
		if spins&p.yield == 0 {
			runtime.Gosched()
		}
		if p.mode == Busy && needed || !p.idle(&until) || !p.arm() {
			continue
		}
		if p.want.Load() != 0 {
			p.leave()
			return false
		}
		p.driverIdle.Store(true) // before leave: who leaves after us need not wake us
		p.leave()
		return true
	}
}

// watch waits until the driver is needed: when it is kicked, or when there are duties and for a while nobody has
// polled. It is false once the poller is closed.
func (p *Poller) watch(timer *time.Timer) bool {
	for tick := time.Millisecond; ; tick = min(2*tick, 8*time.Millisecond) {
		seen := p.role.Load()
		d := tick
		if p.duties.Load() == 0 && p.sleepers.Load() == 0 {
			p.dormant.Store(true)
			if p.duties.Load() == 0 && p.sleepers.Load() == 0 {
				d = time.Hour
			}
		}
		timer.Reset(d)
		select {
		case <-p.kick:
			p.dormant.Store(false)
			return true
		case <-p.dead:
			return false
		case <-timer.C:
		}
		p.dormant.Store(false)
		if v := p.role.Load(); v == seen && v&1 == 0 {
			return true
		}
	}
}

// addDuties counts what the driver must look after when nobody waits.
func (p *Poller) addDuties(n int32) {
	p.duties.Add(n) // pairs with the look at duties in watch, after it has set dormant
	if n > 0 {
		p.startDriver()
		if p.dormant.Load() && p.dormant.CompareAndSwap(true, false) {
			p.wakeDriver()
		}
	}
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
	if p.pool != nil {
		keep(p.pool.Close())
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

// unref undoes retain, and closes the poller if that was the last use of one that nobody else will close.
func (p *Poller) unref() error {
	p.refMu.Lock()
	p.refs--
	p.refMu.Unlock()
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

// sharedQueue is the poller's shared receive queue. Credits make sure that it never runs dry: its posted receives are
// at least the sum of what its connections' peers may send.
type sharedQueue struct {
	mu       sync.Mutex // making, growing, releases by other goroutines than the polling one
	q        *qp.SRQ
	slots    atomic.Pointer[[]*Message]
	arena    *arena
	payload  int
	need     int // sum over the connections of the receives that their peers may use
	posted   int // receives that exist
	byQPN    atomic.Pointer[qpnTable]
	conns    []*Conn
	batch    [sharedBatch]ib.RecvWR // guarded by the role
	nbatch   int
	returned [sharedBatch]ib.RecvWR // guarded by mu
	nreturn  int
}

// sharedBatch is how many receives are posted to the shared queue at a time; two batches more than needed exist, so
// that slots waiting in them do not count.
const sharedBatch = 16

// qpnTable finds connections by QPN: open addressing, replaced as a whole.
type qpnTable struct {
	mask  uint32
	conns []*Conn
}

func hashQPN(q ib.QPN) uint32 { return uint32(q) * 0x9e3779b1 >> 7 }

func (t *qpnTable) find(q ib.QPN) *Conn {
	for i := hashQPN(q); ; i++ {
		c := t.conns[i&t.mask]
		if c == nil || c.qpn == q {
			return c
		}
	}
}

func newQPNTable(conns []*Conn) *qpnTable {
	n := 16
	for n < 2*len(conns)+2 {
		n <<= 1
	}
	t := &qpnTable{mask: uint32(n - 1), conns: make([]*Conn, n)}
	for _, c := range conns {
		i := hashQPN(c.qpn)
		for t.conns[i&t.mask] != nil {
			i++
		}
		t.conns[i&t.mask] = c
	}
	return t
}

// join reserves receives for one more connection, posting them if there are not enough, and returns the queue.
func (s *sharedQueue) join(p *Poller, receives, eager int) (*qp.SRQ, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.q == nil {
		depth := p.cfg.SharedDepth
		if p.attr.MaxSRQWR > 0 {
			depth = min(depth, p.attr.MaxSRQWR)
		}
		q, err := qp.NewSRQ(p.pd, qp.SRQConfig{Depth: depth, SGE: 1})
		if err != nil {
			return nil, err
		}
		s.q = q
		s.payload = p.cfg.SharedSize
		s.arena = p.arenaFor(slotStride(s.payload))
		s.slots.Store(&[]*Message{})
		s.byQPN.Store(newQPNTable(nil))
	}
	if eager > s.payload {
		return nil, fmt.Errorf("transport: EagerSize %d exceeds the shared receive queue's slots of %d bytes: raise PollerConfig.SharedSize", eager, s.payload)
	}
	want := s.need + receives + 2*sharedBatch
	if want > s.q.Depth() {
		return nil, fmt.Errorf("%w: its shared receive queue has %d receives, and %d would be needed: raise PollerConfig.SharedDepth", ErrNoRoom, s.q.Depth(), want)
	}
	for s.posted < want {
		if err := s.growLocked(min(want-s.posted, 64)); err != nil {
			return nil, err
		}
	}
	s.need += receives
	return s.q, nil
}

func (s *sharedQueue) growLocked(n int) error {
	old := *s.slots.Load()
	slots := append(make([]*Message, 0, len(old)+n), old...)
	wrs := make([]ib.RecvWR, n)
	block := make([]Message, n)
	for i := range block {
		m := &block[i]
		sl, err := s.arena.get()
		if err != nil {
			return err // what was taken stays with the arena until the poller closes
		}
		m.init(sl, makeID(idShared, 0, 0, uint32(len(slots))), s.payload+headerLen)
		m.shared = true
		slots = append(slots, m)
		wrs[i] = m.wr
	}
	s.slots.Store(&slots)
	if _, err := s.q.PostRecv(wrs); err != nil {
		return err
	}
	s.posted += n
	return nil
}

// bind makes completions with the connection's QPN find it.
func (s *sharedQueue) bind(c *Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns = append(s.conns, c)
	s.byQPN.Store(newQPNTable(s.conns))
}

// part undoes join and, if it was called, bind.
func (s *sharedQueue) part(c *Conn, receives int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.need -= receives
	for i, o := range s.conns {
		if o == c {
			last := len(s.conns) - 1
			s.conns[i] = s.conns[last]
			s.conns[last] = nil
			s.conns = s.conns[:last]
			s.byQPN.Store(newQPNTable(s.conns))
			return
		}
	}
}

// received handles a completion of the shared queue. The role is held.
func (s *sharedQueue) received(p *Poller, wc *ib.WC) {
	slots := *s.slots.Load()
	low := uint32(wc.ID)
	if low >= uint32(len(slots)) {
		return
	}
	m := slots[low]
	c := s.byQPN.Load().find(wc.QPN)
	if c == nil {
		s.recycle(m) // of a connection that has ended
		return
	}
	c.received(m, wc)
}

// recycle posts a slot again, sooner or later. The role is held.
func (s *sharedQueue) recycle(m *Message) {
	s.batch[s.nbatch] = m.wr
	if s.nbatch++; s.nbatch == sharedBatch {
		s.nbatch = 0
		s.q.PostRecv(s.batch[:]) // fails only if the device does; then the CQ says so
	}
}

// giveBack is recycle for other goroutines.
func (s *sharedQueue) giveBack(m *Message) {
	s.mu.Lock()
	s.returned[s.nreturn] = m.wr
	if s.nreturn++; s.nreturn == sharedBatch {
		s.nreturn = 0
		s.q.PostRecv(s.returned[:])
	}
	s.mu.Unlock()
}

func (s *sharedQueue) close() error {
	if s.q == nil {
		return nil
	}
	return s.q.Close()
}

// stall remembers a connection that waits for memory of the pool. The role is held.
func (p *Poller) stall(c *Conn) {
	for _, o := range p.stalled {
		if o == c {
			return
		}
	}
	p.stalled = append(p.stalled, c)
	p.nstalled.Store(int32(len(p.stalled)))
}

// unstall is called when memory was given back to the pool.
func (p *Poller) unstall() {
	if p.nstalled.Load() == 0 {
		return
	}
	go p.do(func() { // not here: the caller may hold locks that the polling goroutine takes
		conns := p.stalled
		p.stalled = nil
		p.nstalled.Store(0)
		for _, c := range conns {
			msgs := c.rcv.stalled
			c.rcv.stalled = nil
			for _, m := range msgs {
				if !c.ended.Load() {
					c.readInto(m)
				}
			}
		}
	})
}
