package rpc

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// callKey finds the Call in a handler's context.
type callKey struct{}

// callCtx is the context of a handler: one allocation, with the channel and the timer made only when somebody waits.
//
// It is not recycled with its Call: a handler may leave it behind in goroutines, for which it ends when the handler
// returns. It is safe for concurrent use.
type callCtx struct {
	deadline time.Time // zero: none
	call     atomic.Pointer[Call]

	mu    sync.Mutex
	done  chan struct{} // nil until somebody asks
	err   error
	timer *time.Timer
	after map[*afterFunc]struct{}
}

type afterFunc struct{ f func() }

var closedChan = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// Deadline implements context.Context.
func (c *callCtx) Deadline() (time.Time, bool) { return c.deadline, !c.deadline.IsZero() }

// Done implements context.Context.
func (c *callCtx) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done == nil {
		if c.err != nil {
			c.done = closedChan
		} else {
			c.done = make(chan struct{})
			c.armLocked()
		}
	}
	return c.done
}

// armLocked makes the deadline end the context without anybody looking.
func (c *callCtx) armLocked() {
	if c.timer == nil && !c.deadline.IsZero() {
		c.timer = time.AfterFunc(time.Until(c.deadline), func() { c.end(context.DeadlineExceeded) })
	}
}

// Err implements context.Context.
func (c *callCtx) Err() error {
	c.mu.Lock()
	err, armed := c.err, c.timer != nil
	c.mu.Unlock()
	if err == nil && !armed && !c.deadline.IsZero() && !time.Now().Before(c.deadline) {
		c.end(context.DeadlineExceeded)
		return c.Err()
	}
	return err
}

// Value implements context.Context.
func (c *callCtx) Value(key any) any {
	if key == (callKey{}) {
		if call := c.call.Load(); call != nil {
			return call
		}
	}
	return nil
}

// AfterFunc lets package context derive contexts without a goroutine each.
func (c *callCtx) AfterFunc(f func()) (stop func() bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		go f()
		return func() bool { return false }
	}
	a := &afterFunc{f}
	if c.after == nil {
		c.after = make(map[*afterFunc]struct{})
	}
	c.after[a] = struct{}{}
	c.armLocked()
	return func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		_, waiting := c.after[a]
		delete(c.after, a)
		return waiting
	}
}

// end ends the context with err, if it has not ended before.
func (c *callCtx) end(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	if c.timer != nil {
		c.timer.Stop()
	}
	if c.done != nil {
		close(c.done)
	}
	after := c.after
	c.after = nil
	c.mu.Unlock()
	for a := range after {
		go a.f()
	}
}
