package transport

import (
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/verbs"
)

// A Waiter is one pending completion that a goroutine can wait for with Poller.Wait. The zero value is pending. It can
// be embedded and reused with Reset, and costs no allocation once its goroutine has slept on it for the first time.
//
// Done or Fail is called once, by any goroutine (mostly the polling one). One goroutine waits at a time. A Waiter must
// not be copied after first use.
type Waiter struct {
	state uint32
	heir  bool // guarded by the poller's parkMu: linked in its list of sleepers
	next  *Waiter
	prev  *Waiter
	err   error                             // written before state becomes waiterDone
	wake  chan struct{}                     // capacity 1; made when first needed
	ch    atomic.Pointer[verbs.CompChannel] // the channel slept in last
}

const (
	waiterPending uint32 = iota
	waiterParked         // its goroutine sleeps on wake; whoever changes the state sends one token
	waiterDone
	waiterInChannel // its thread sleeps in ch; whoever changes the state interrupts that
)

// Reset makes w pending again. Only its owner may call it, when nobody waits on w and nobody will complete it.
func (w *Waiter) Reset() {
	w.err = nil
	ring.StoreRel32(&w.state, waiterPending) // whoever completes w gets it from its owner in an ordered way
}

// Done completes w. It never blocks.
func (w *Waiter) Done() {
	// Pairs with the compare-and-swap in park and enter.
	if s := atomic.SwapUint32(&w.state, waiterDone); s != waiterPending {
		w.rouse(s)
	}
}

// rouse wakes the goroutine that slept in state s.
func (w *Waiter) rouse(s uint32) {
	switch s {
	case waiterParked:
		w.wake <- struct{}{} // one token at a time: never blocks
	case waiterInChannel:
		w.ch.Load().Interrupt() // of a later sleep, if the goroutine has woken by itself: that ends early, and looks again
	}
}

// Fail completes w with an error, which Wait will return. It never blocks.
func (w *Waiter) Fail(err error) {
	w.err = err
	w.Done()
}

// Finished reports whether Done or Fail was called since the last Reset.
func (w *Waiter) Finished() bool { return atomic.LoadUint32(&w.state) == waiterDone }

// Err is the error given to Fail. It is valid once Finished.
func (w *Waiter) Err() error { return w.err }

// park announces that the goroutine is about to sleep on w.wake. False: w is finished.
func (w *Waiter) park() bool {
	if w.wake == nil {
		w.wake = make(chan struct{}, 1)
	}
	return atomic.CompareAndSwapUint32(&w.state, waiterPending, waiterParked)
}

// unpark ends a sleep that was not ended by a token: it takes the announcement back, or, if a token is on its way,
// takes that.
func (w *Waiter) unpark() {
	if !atomic.CompareAndSwapUint32(&w.state, waiterParked, waiterPending) {
		<-w.wake
	}
}

// enter is park for a goroutine that is about to sleep in ch.
func (w *Waiter) enter(ch *verbs.CompChannel) bool {
	w.ch.Store(ch)
	return atomic.CompareAndSwapUint32(&w.state, waiterPending, waiterInChannel)
}

// exit ends what enter has begun. An interrupt that is still on its way only ends the next sleep in the channel early.
func (w *Waiter) exit() { atomic.CompareAndSwapUint32(&w.state, waiterInChannel, waiterPending) }

// nudge wakes the goroutine without completing w. False: it was not asleep.
func (w *Waiter) nudge() bool {
	s := atomic.LoadUint32(&w.state)
	if s != waiterParked && s != waiterInChannel || !atomic.CompareAndSwapUint32(&w.state, s, waiterPending) {
		return false
	}
	w.rouse(s)
	return true
}
