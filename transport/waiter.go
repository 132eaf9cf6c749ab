package transport

import "sync/atomic"

// A Waiter is one pending completion that a goroutine can wait for with Poller.Wait. The zero value is pending. It can
// be embedded and reused with Reset, and costs no allocation once its goroutine has slept on it for the first time.
//
// Done or Fail is called once, by any goroutine (mostly the polling one). One goroutine waits at a time. A Waiter must
// not be copied after first use.
type Waiter struct {
	state atomic.Uint32
	heir  bool // guarded by the poller's parkMu: linked in its list of sleepers
	next  *Waiter
	prev  *Waiter
	err   error         // written before state becomes waiterDone
	wake  chan struct{} // capacity 1; made when first needed
}

const (
	waiterPending uint32 = iota
	waiterParked         // its goroutine sleeps on wake; whoever changes the state sends one token
	waiterDone
)

// Reset makes w pending again. Only its owner may call it, when nobody waits on w and nobody will complete it.
func (w *Waiter) Reset() {
	w.err = nil
	w.state.Store(waiterPending)
}

// Done completes w. It never blocks.
func (w *Waiter) Done() {
	if w.state.Swap(waiterDone) == waiterParked { // pairs with the swap in Poller.Wait before it sleeps
		w.wake <- struct{}{} // one token at a time: never blocks
	}
}

// Fail completes w with an error, which Wait will return. It never blocks.
func (w *Waiter) Fail(err error) {
	w.err = err
	w.Done()
}

// Finished reports whether Done or Fail was called since the last Reset.
func (w *Waiter) Finished() bool { return w.state.Load() == waiterDone }

// Err is the error given to Fail. It is valid once Finished.
func (w *Waiter) Err() error { return w.err }

// park announces that the goroutine is about to sleep on w.wake. False: w is finished.
func (w *Waiter) park() bool {
	if w.wake == nil {
		w.wake = make(chan struct{}, 1)
	}
	return w.state.CompareAndSwap(waiterPending, waiterParked)
}

// unpark ends a sleep that was not ended by a token: it takes the announcement back, or, if a token is on its way,
// takes that.
func (w *Waiter) unpark() {
	if !w.state.CompareAndSwap(waiterParked, waiterPending) {
		<-w.wake
	}
}

// nudge wakes the goroutine without completing w. False: it was not asleep.
func (w *Waiter) nudge() bool {
	if w.state.CompareAndSwap(waiterParked, waiterPending) {
		w.wake <- struct{}{}
		return true
	}
	return false
}
