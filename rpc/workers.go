package rpc

import (
	"sync"
	"sync/atomic"
)

// workers runs calls on a bounded number of goroutines that are started when they are needed and then kept. It also
// keeps the Calls: both are the reason why a call on a worker allocates nothing, unless it has bulk arguments.
type workers struct {
	max   int
	queue chan *Call
	stop  chan struct{}

	// idle is workers less calls that are not answered: below zero, calls are waiting. It is counted up with mu held or not, and
	// down with it, so that who has it sees what there is, or less.
	idle atomic.Int32
	wg   sync.WaitGroup

	mu      sync.Mutex
	started int
	free    *Call
	stopped bool
}

func (w *workers) init(maxConcurrent, maxQueue int) {
	w.max = maxConcurrent
	// Calls in the channel are those that wait and those that a worker is about to take.
	w.queue = make(chan *Call, maxConcurrent+maxQueue)
	w.stop = make(chan struct{})
}

// get returns a clean Call.
func (w *workers) get() *Call {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := w.free
	if c == nil {
		return new(Call)
	}
	w.free, c.next = c.next, nil
	return c
}

// recycle takes a Call that has ended. One with bulk arguments stays what it is, one that is over: a goroutine that the handler has left behind may be
// about to Pull, and must not meet another call's memory. So those that are used again never have any.
func (w *workers) recycle(c *Call) {
	if len(c.bulk) > 0 {
		return
	}
	c.reset()
	w.mu.Lock()
	c.next = w.free
	w.free = c
	w.mu.Unlock()
}

// submit hands c to a worker. It returns false if all are busy and the queue is full. It never blocks.
func (w *workers) submit(c *Call) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	waiting := w.idle.Add(-1)
	if waiting < 0 && w.startLocked() {
		waiting++
	}
	c.counted = true
	if int(-waiting) > cap(w.queue)-w.max {
		w.uncount(c)
		return false
	}
	select {
	case w.queue <- c:
		return true
	default:
		w.uncount(c)
		return false
	}
}

// uncount has c not be counted any more: it was not taken, or is answered.
func (w *workers) uncount(c *Call) {
	if c.counted {
		c.counted = false
		w.idle.Add(1)
	}
}

// startLocked starts a worker, unless there are all.
func (w *workers) startLocked() bool {
	if w.stopped || w.started >= w.max {
		return false
	}
	w.started++
	w.idle.Add(1)
	w.wg.Add(1)
	go w.work()
	return true
}

func (w *workers) work() {
	normal := false
	defer func() {
		if !normal {
			// A handler has called runtime.Goexit: the goroutine is going, the worker is replaced.
			w.mu.Lock()
			w.started--
			w.idle.Add(-1)
			w.startLocked()
			w.mu.Unlock()
		}
		w.wg.Done()
	}()
	for {
		select {
		case c := <-w.queue:
			c.conn.run(c)
		case <-w.stop:
			// What is left was queued before the connections ended; it is answered into the void, so that its buffers go back.
			for {
				select {
				case c := <-w.queue:
					c.conn.run(c)
				default:
					normal = true
					return
				}
			}
		}
	}
}

// end makes the workers go when they have finished what they do. Nothing may be submitted any more.
func (w *workers) end() {
	w.mu.Lock()
	if !w.stopped {
		w.stopped = true
		close(w.stop)
	}
	w.mu.Unlock()
}
