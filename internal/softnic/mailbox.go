package softnic

import (
	"sync"
)

// mailbox is an unbounded queue with one consumer: control messages, and work for a NIC's own goroutine.
type mailbox[T any] struct {
	mu     sync.Mutex
	c      sync.Cond
	q      []T
	closed bool
}

func newMailbox[T any]() *mailbox[T] {
	b := &mailbox[T]{}
	b.c.L = &b.mu
	return b
}

// put appends v; it reports the length of the queue, or -1 if the mailbox is closed.
func (b *mailbox[T]) put(v T) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return -1
	}
	b.q = append(b.q, v)
	b.c.Signal()
	return len(b.q)
}

// take waits for the next batch; nil: closed and empty.
func (b *mailbox[T]) take(old []T) []T {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.q) == 0 {
		if b.closed {
			return nil
		}
		b.c.Wait()
	}
	q := b.q
	clear(old)
	b.q = old[:0]
	return q
}

func (b *mailbox[T]) close() {
	b.mu.Lock()
	b.closed = true
	b.c.Broadcast()
	b.mu.Unlock()
}

// tryTake takes the first, if there is one.
func (b *mailbox[T]) tryTake() (v T, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.q) == 0 {
		return v, false
	}
	v = b.q[0]
	b.q = b.q[1:]
	return v, true
}
