package transport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/verbs"
)

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
		if p.guard.Load() == nil {
			p.startDriver() // there may be none yet: whoever has armed the queue slept in the channel itself, and has gone
			p.wakeDriver()
		}
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

// Do runs f while no handler of the poller's connections runs: at once if nobody polls, otherwise on the goroutine that does, between two
// polls, and perhaps after Do has returned. So what a handler did that had begun before is done when f runs. What f must not do is what
// handlers must not.
func (p *Poller) Do(f func()) {
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
// that w sleeps, and when it sleeps with a context that can end.
func (p *Poller) Wait(ctx context.Context, w *Waiter) error {
	if w.Finished() {
		return w.err
	}
	done := ctx.Done()
	guarded := false     // w has slept in the channel
	var stop func() bool // ends the interruption of the channel by the end of ctx
	for {
		var o outcome
		switch {
		case !p.tryRole():
			o = p.follow(done, w)
		case !p.lead(done, w, &o):
		case p.enterChannel(w):
			guarded = true
			if stop == nil && done != nil {
				stop = context.AfterFunc(ctx, p.ch.Interrupt)
			}
			o = p.sleepInChannel(done, w)
		default:
			o = p.park(done, w)
		}
		if o == again {
			continue
		}
		if guarded {
			p.unguarded()
		}
		if stop != nil {
			stop()
		}
		switch o {
		case finished:
			return w.err
		case cancelled:
			return ctx.Err()
		}
		return errPollerClosed
	}
}

// checkEvery is how many empty polls pass between two looks at the clock, the context and the scheduler.
const checkEvery = 64

var epoch = time.Now()

func now() int64 { return int64(time.Since(epoch)) }

// lead polls until w is done or it is time to sleep. It is entered with the role. If it returns true, it is time to sleep:
// the CQ is armed and empty, and the role still held. Otherwise the role is given up and o says what to do.
func (p *Poller) lead(done <-chan struct{}, w *Waiter, o *outcome) (sleep bool) {
	var until int64 // when to sleep; 0: not long enough idle to look at the clock
	for spins := 1; ; spins++ {
		n := p.poll()
		if n > 0 {
			p.busy()
			spins, until = 0, 0
		}
		if w.Finished() {
			p.leave()
			*o = finished
			return false
		}
		if n > 0 || spins%checkEvery != 0 && p.mode != Event {
			continue
		}
		if p.closed.Load() {
			p.leave()
			*o = closing
			return false
		}
		select {
		case <-done:
			p.leave()
			*o = cancelled
			return false
		default:
		}
		if spins&p.yield == 0 {
			p.crowd.yield()
		}
		if p.mode != Busy && p.idle(&until) && p.arm() {
			return true
		}
	}
}

// park puts the goroutine to sleep after lead; the driver watches the CQ.
func (p *Poller) park(done <-chan struct{}, w *Waiter) outcome {
	if !w.park() {
		p.leave()
		return finished
	}
	p.slept = true
	p.addSleeper(w)
	p.startDriver()
	p.leave()
	return p.sleep(done, w)
}

// idle is called when polls have found nothing for a moment, and reports whether it is time to sleep. until is the
// caller's, zero at the start of the idle time. The role is held.
func (p *Poller) idle(until *int64) bool {
	t := now()
	if p.idleSince == 0 {
		p.idleSince = t
	}
	if *until == 0 {
		*until = t + p.spin.budget()
	}
	return p.mode == Event || t >= *until
}

// busy is called when a poll has found something: it learns how long the wait was. The role is held.
func (p *Poller) busy() {
	if p.idleSince == 0 {
		p.spin.soon()
		return
	}
	if d := now() - p.idleSince; p.slept {
		p.spin.slept(d)
	} else {
		p.spin.found(d)
	}
	p.idleSince, p.slept = 0, false
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
	if p.poll() == 0 {
		return true
	}
	p.busy()
	return false
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

// channelSleepers is how many threads of the process sleep in completion channels.
var channelSleepers atomic.Int32

// yieldEvery is how long a goroutine goes on from sleep to sleep without a word to the scheduler, in ns. From 10 ms on the
// runtime takes it for a hog: it interrupts the thread with a signal and takes its share of GOMAXPROCS away, and its
// monitor then looks every 20 us for a while.
const yieldEvery = 5e6

// channelAlways lets tests have goroutines sleep in the channel whatever others there are to run.
var channelAlways bool

// enterChannel decides whether the goroutine of w sleeps, after lead, in the completion channel itself. That costs one
// wake-up, of its thread by the device, where the netpoller, the driver and w's token cost several; but a thread that
// sleeps in a system call keeps its share of GOMAXPROCS from the other goroutines until the runtime notices, which takes
// it from 20 us to 10 ms. So it is done while no other goroutine is there to run, and half of the shares can be used like
// this at a time. If it is to be, the role is given up.
func (p *Poller) enterChannel(w *Waiter) bool {
	if !p.threads || p.guard.Load() != nil || p.driverIdle.Load() {
		return false
	}
	if p.fired.Load() {
		// Whoever slept until now had the event in hand when we believed the CQ to be armed, and has gone since. The driver is not
		// asleep: it will be woken, and arm anew.
		return false
	}
	if t := now(); t-p.yielded > yieldEvery {
		p.yielded = t
		runtime.Gosched()
	}
	share := int(channelSleepers.Add(1)) <= runtime.GOMAXPROCS(0)/2 && !p.crowd.waits()
	if !share && !channelAlways || !w.enter(p.ch) {
		channelSleepers.Add(-1)
		return false
	}
	p.slept = true
	p.guard.Store(w) // with the role: the driver looks at it there
	p.addSleeper(w)
	p.leave()
	return true
}

// sleepInChannel sleeps after enterChannel until the CQ fires or w is to wake.
func (p *Poller) sleepInChannel(done <-chan struct{}, w *Waiter) outcome {
	o := again
	var err error
	if !p.closed.Load() { // pairs with the interrupt in Close
		var cq *verbs.CQ
		if cq, err = p.ch.WaitThread(); cq != nil {
			p.fired.Store(true) // whoever arms next must not rely on the last time
		}
	}
	w.exit()
	p.guard.Store(nil)
	channelSleepers.Add(-1)
	p.removeSleeper(w)
	switch {
	case w.Finished():
		o = finished
	case p.closed.Load():
		o = closing
	default:
		select {
		case <-done:
			o = cancelled
		default:
		}
	}
	if o == again && err != nil {
		p.channelFailed(err)
	}
	return o
}

// channelFailed ends everything, and waits a little: a channel that fails for good must not make its sleepers spin.
func (p *Poller) channelFailed(err error) {
	p.Do(func() { p.broken(err) })
	select {
	case <-p.dead:
	case <-time.After(10 * time.Millisecond):
	}
}

// unguarded is called by who has slept in the channel and will not look at the CQ again.
func (p *Poller) unguarded() {
	if p.sleepers.Load() != 0 && p.tryRole() {
		p.leave()
	}
	if p.duties.Load() != 0 && p.dormant.Load() && p.dormant.CompareAndSwap(true, false) {
		select {
		case p.kick <- false:
		default:
		}
	}
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
		case p.kick <- true:
		default:
		}
	}
}

// drive is the poller's own goroutine. It sleeps on the completion channel on behalf of the duties, and of all waiters
// that sleep when none of them does so in the channel itself.
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
				p.channelFailed(err)
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
			// Whoever sleeps next may do so in the channel.
			p.leave()
			runtime.Gosched()
			if p.threads || !p.tryRole() {
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
			p.crowd.yield()
		}
		if p.mode == Busy && needed || !p.idle(&until) || !p.arm() {
			continue
		}
		if p.want.Load() != 0 || p.guard.Load() != nil {
			p.leave()
			return false
		}
		if p.fired.Load() {
			continue // by the guard, who had the event in hand when we believed the CQ to be armed, and has gone since
		}
		p.slept = true
		p.driverIdle.Store(true) // before leave: who leaves after us need not wake us
		p.leave()
		return true
	}
}

// watch waits until the driver is needed: when it is kicked, or when there are duties and for a while nobody has
// polled. It is false once the poller is closed.
func (p *Poller) watch(timer *time.Timer) bool {
	const shortest, longest = 2 * time.Millisecond, 8 * time.Millisecond
	for tick := shortest; ; tick = min(2*tick, longest) {
		seen := p.role.Load()
		d := tick
		if p.unneeded() {
			p.dormant.Store(true)
			if p.unneeded() {
				d = time.Hour
			}
		}
		timer.Reset(d)
		select {
		case now := <-p.kick:
			p.dormant.Store(false)
			if now {
				return true
			}
			tick = shortest / 2
			continue
		case <-p.dead:
			return false
		case <-timer.C:
		}
		p.dormant.Store(false)
		if v := p.role.Load(); v == seen && v&1 == 0 && p.guard.Load() == nil {
			return true
		}
	}
}

// unneeded reports whether the driver need not even look from time to time.
func (p *Poller) unneeded() bool {
	return p.guard.Load() != nil || p.duties.Load() == 0 && p.sleepers.Load() == 0
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
