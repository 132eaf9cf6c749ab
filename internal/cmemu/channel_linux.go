package cmemu

import (
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// Memory is the address space of a client. Its methods may be called by several goroutines at a time. An access to memory that is not
// there, or may not be read or written, is an error.
type Memory interface {
	// ReadAt fills b from address va on.
	ReadAt(b []byte, va uint64) error
	// WriteAt writes b to address va on.
	WriteAt(b []byte, va uint64) error
}

// A Channel is what an open /dev/infiniband/rdma_cm is to its client: IDs, and a queue of their events. It is safe for concurrent use.
type Channel struct {
	m     *Manager
	mem   Memory
	ready chan struct{} // has something if there may be an event; closed with the channel

	// Guarded by m.mu.
	closed bool
	ids    map[*id]bool
	events []*event // that were not delivered, the oldest first
	notify func(some bool)
}

// An event is one that was not delivered.
type event struct {
	of   *id // whose it is, and for whom it counts
	made *id // of a request: the ID that goes with it
	resp abi.CMEventResp
}

// Close destroys all IDs of the channel: connections end, requests are rejected. The events that were not delivered are lost. It may be
// called again.
func (c *Channel) Close() error {
	m := c.m
	m.mu.Lock()
	if c.closed {
		m.mu.Unlock()
		return nil
	}
	c.closed = true
	delete(m.channels, c)
	close(c.ready)
	all := make([]*id, 0, len(c.ids))
	for x := range c.ids {
		all = append(all, x)
	}
	all = slices.DeleteFunc(all, func(x *id) bool { return !m.remove(x) })
	m.mu.Unlock()
	for _, x := range all {
		m.destroy(x)
	}
	return nil
}

// Ready returns a channel that has something whenever there may be an event that nobody has taken, for who wants to wait: a look at it
// takes that. It is closed with the Channel.
func (c *Channel) Ready() <-chan struct{} { return c.ready }

// SetNotify has f called when the first event comes into the queue, and when the last one has gone; at once, if there are events already.
// f is called with locks held: it must not wait, nor call anything of this package. Nil ends that.
func (c *Channel) SetNotify(f func(some bool)) {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	c.notify = f
	if f != nil && len(c.events) > 0 {
		f(true)
	}
}

// put adds an event to the queue. Called with m.mu held, as all below.
func (c *Channel) put(e *event) {
	c.setEvents(append(c.events, e))
}

// setEvents replaces the queue.
func (c *Channel) setEvents(l []*event) {
	was := len(c.events) > 0
	c.events = l
	if len(l) == 0 {
		c.events = nil
	}
	some := len(l) > 0
	if some && !c.closed {
		select {
		case c.ready <- struct{}{}:
		default:
		}
	}
	if was != some && c.notify != nil {
		c.notify(some)
	}
}

// full reports whether nothing may be added that need not be.
func (c *Channel) full() bool { return len(c.events) >= maxEvents }

// getEvent is GET_EVENT, which does not wait.
func getEvent(w *call) syscall.Errno {
	const least = uint16(abi.CMEventRespUDOffset + 304) // what there was before ECE
	if w.out < least {
		return unix.ENOSPC
	}
	q, ok := arg[abi.CMGetEvent](w)
	if !ok {
		return unix.EINVAL
	}
	c, m := w.c, w.c.m
	m.mu.Lock()
	if c.closed {
		m.mu.Unlock()
		return unix.EBADF
	}
	if len(c.events) == 0 {
		m.mu.Unlock()
		return unix.EAGAIN
	}
	e := c.events[0]
	c.setEvents(c.events[1:])
	e.of.reported++ // before it is written: who destroys the ID meanwhile is told to wait for it
	if e.made != nil {
		e.of.backlog++
	}
	m.mu.Unlock()
	b := bytesOf(&e.resp)
	errno := w.write(q.Response, b[:min(int(w.out), len(b))])
	if errno != 0 {
		m.undeliver(c, e)
	}
	return errno
}

// undeliver puts an event back that the client has no memory for.
func (m *Manager) undeliver(c *Channel, e *event) {
	m.mu.Lock()
	if !e.of.dead && !c.closed {
		e.of.reported--
		if e.made != nil {
			e.of.backlog--
		}
		at := e.of.ch // it may have been migrated
		at.setEvents(append([]*event{e}, at.events...))
		m.mu.Unlock()
		return
	}
	orphan := e.made != nil && m.remove(e.made)
	m.mu.Unlock()
	if orphan {
		m.destroy(e.made)
	}
}
