package ring

import (
	"runtime"
	"sync/atomic"
	"time"
)

// SpinLock guards a few dozen nanoseconds of work: one locked instruction to take it and a release store to give it
// back, where sync.Mutex needs two locked ones, and the second would wait for the stores that the work just made.
// The zero value is unlocked. Holders must not block; a waiter yields its thread before long, so that a preempted
// holder gets to run. Must not be copied after first use.
type SpinLock struct {
	v uint32
}

// Lock takes the lock.
func (l *SpinLock) Lock() {
	if atomic.CompareAndSwapUint32(&l.v, 0, 1) {
		return
	}
	l.lockSlow()
}

func (l *SpinLock) lockSlow() {
	for i := 0; ; i++ {
		if atomic.LoadUint32(&l.v) == 0 && atomic.CompareAndSwapUint32(&l.v, 0, 1) {
			return
		}
		switch {
		case i < 64:
			Pause()
		case i < 256:
			runtime.Gosched()
		default:
			time.Sleep(10 * time.Microsecond) // the holder lost its thread: give it a whole core
		}
	}
}

// Unlock gives the lock back. The work is visible before the lock is free.
func (l *SpinLock) Unlock() { StoreRel32(&l.v, 0) }
