package transport

import (
	"context"
	"errors"
	"time"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// bufClass keeps one kind of SendBuf: at most max of them.
type bufClass struct {
	free    *SendBuf
	nfree   int
	n, max  int
	waiting waitList
}

// roomWaiter waits in a waitList. They are reused.
type roomWaiter struct {
	Waiter
	next *roomWaiter
	in   *waitList
}

type waitList struct{ head, tail *roomWaiter }

func (l *waitList) push(w *roomWaiter) {
	w.next, w.in = nil, l
	if l.tail != nil {
		l.tail.next = w
	} else {
		l.head = w
	}
	l.tail = w
}

func (l *waitList) pop() *roomWaiter {
	w := l.head
	if w != nil {
		l.head = w.next
		if l.head == nil {
			l.tail = nil
		}
		w.next, w.in = nil, nil
	}
	return w
}

func (l *waitList) remove(w *roomWaiter) {
	for p, prev := l.head, (*roomWaiter)(nil); p != nil; prev, p = p, p.next {
		if p != w {
			continue
		}
		if prev != nil {
			prev.next = w.next
		} else {
			l.head = w.next
		}
		if l.tail == w {
			l.tail = prev
		}
		w.next, w.in = nil, nil
		return
	}
}

// wakeOne lets the first waiter try again.
func (l *waitList) wakeOne() {
	if w := l.pop(); w != nil {
		w.Done()
	}
}

func (l *waitList) wakeAll() {
	for w := l.pop(); w != nil; w = l.pop() {
		w.Done()
	}
}

// A SendBuf is memory for one outgoing message, from Alloc or TryAlloc until Post or Discard. It has one owner.
type SendBuf struct {
	c     *Conn
	class *bufClass
	state uint8
	mem   []byte // header and payload; payload only if big is set
	n     int    // payload length
	sge   ib.SGE // slots only
	slot  slot
	big   *mr.Buffer   // a message above EagerSize
	key   mr.RemoteKey // its source
	rel   *Waiter      // told when the source is free again, instead of big being released
	rid   uint32
	next  *SendBuf
}

// Bytes is the memory to write the message to: as many bytes as were asked for. Only its owner may touch it, and not after Post.
func (b *SendBuf) Bytes() []byte {
	if b.big != nil {
		return b.mem[:b.n]
	}
	return b.mem[headerLen : headerLen+b.n]
}

// TryAlloc returns a buffer for a message of n bytes. It does not block: without a free one it returns ErrWouldBlock.
// Handlers may call it. Above EagerSize the buffer comes from the poller's pool.
func (c *Conn) TryAlloc(n int) (*SendBuf, error) {
	if n < 0 || n > c.maxMessage {
		return nil, ErrTooLarge
	}
	s := &c.snd
	s.mu.Lock()
	b, err := c.takeLocked(n)
	s.mu.Unlock()
	return b, err
}

func (c *Conn) classFor(n int) *bufClass {
	switch {
	case n <= c.inline:
		return &c.snd.small
	case n <= c.eager:
		return &c.snd.slots
	}
	return &c.snd.big
}

func (c *Conn) takeLocked(n int) (*SendBuf, error) {
	s := &c.snd
	if s.err != nil || s.closing {
		return nil, s.usableLocked()
	}
	cl := c.classFor(n)
	if cl.free == nil && cl.n == cl.max {
		c.flushLocked() // which gives inline buffers back at once, and the others soon
	}
	b := cl.free
	if b == nil {
		if cl.n == cl.max {
			return nil, ErrWouldBlock
		}
		b = &SendBuf{c: c, class: cl}
		switch cl {
		case &s.small:
			b.mem = make([]byte, s.maxInline)
		case &s.slots:
			sl, err := s.arena.get()
			if err != nil {
				return nil, err
			}
			b.slot, b.mem, b.sge = sl, sl.mem, sl.sge
		}
		cl.n++
		cl.nfree++
	} else {
		cl.free = b.next
		b.next = nil
	}
	cl.nfree--
	if cl == &s.big {
		big, err := c.p.pool.Get(n)
		if err != nil {
			c.putLocked(b)
			if errors.Is(err, mr.ErrPoolExhausted) {
				err = ErrWouldBlock
			}
			return nil, err
		}
		b.big, b.mem = big, big.Bytes()
	}
	b.n = n
	b.state = bufOwned
	if cl != &s.small {
		s.out++
	}
	return b, nil
}

// putLocked puts a buffer that nobody uses back into its class, and lets a waiter have it.
func (c *Conn) putLocked(b *SendBuf) {
	b.state = bufFree
	if b.big != nil {
		big := b.big
		b.big, b.mem = nil, nil
		big.Release()
	}
	if poison && b.class == &c.snd.slots {
		for i := range b.mem {
			b.mem[i] = poisonByte
		}
	}
	cl := b.class
	b.next = cl.free
	cl.free = b
	cl.nfree++
	if cl.waiting.head != nil {
		cl.waiting.wakeOne()
	}
}

// Alloc is TryAlloc that waits for a free buffer. Handlers must not call it.
func (c *Conn) Alloc(ctx context.Context, n int) (*SendBuf, error) {
	if n < 0 || n > c.maxMessage {
		return nil, ErrTooLarge
	}
	s := &c.snd
	for {
		s.mu.Lock()
		b, err := c.takeLocked(n)
		if err != ErrWouldBlock {
			s.mu.Unlock()
			return b, err
		}
		cl := c.classFor(n)
		if cl.nfree > 0 || cl.n < cl.max { // the pool is exhausted: by others, who do not tell us
			s.mu.Unlock()
			if err := c.nap(ctx); err != nil {
				return nil, err
			}
			continue
		}
		if err := c.waitLocked(ctx, &cl.waiting); err != nil {
			return nil, err
		}
	}
}

// nap makes progress for a moment.
func (c *Conn) nap(ctx context.Context) error {
	if c.p.Poll() > 0 {
		return ctx.Err()
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(100 * time.Microsecond):
		return nil
	}
}

// waitLocked waits in l until somebody wakes it, and unlocks s.mu before.
func (c *Conn) waitLocked(ctx context.Context, l *waitList) error {
	s := &c.snd
	c.flushLocked() // it may be what we wait for
	w := s.waiters
	if w == nil {
		w = new(roomWaiter)
	} else {
		s.waiters = w.next
	}
	w.Reset()
	l.push(w)
	s.mu.Unlock()
	err := c.p.Wait(ctx, &w.Waiter)
	s.mu.Lock()
	if w.in != nil {
		l.remove(w)
	} else if err != nil && !w.Finished() {
		// Popped, and Done is on its way: it happens under s.mu, so it has happened.
		panic("transport: waiter popped and not done")
	} else if err != nil {
		l.wakeOne() // we were woken, and will not make use of it
	}
	w.next = s.waiters
	s.waiters = w
	s.mu.Unlock()
	return err
}

// wakeAllLocked ends the waits of all senders; they find the reason.
func (s *sendSide) wakeAllLocked() {
	s.small.waiting.wakeAll()
	s.slots.waiting.wakeAll()
	s.big.waiting.wakeAll()
	s.ops.wakeAll()
}

// Discard gives back a buffer that will not be sent.
func (b *SendBuf) Discard() {
	c := b.c
	s := &c.snd
	s.mu.Lock()
	if b.state != bufOwned {
		s.mu.Unlock()
		panic("transport: Discard of a SendBuf that is not owned")
	}
	c.outLocked(b)
	c.dropLocked(b)
	s.mu.Unlock()
}

// outLocked: b is no longer the user's.
func (c *Conn) outLocked(b *SendBuf) {
	if b.class != &c.snd.small {
		c.snd.out--
	}
}

// dropLocked is putLocked, but for the end of the connection, when the buffer's memory goes back where it came from.
func (c *Conn) dropLocked(b *SendBuf) {
	s := &c.snd
	ended := s.err != nil && s.sq == nil
	small := b.class == &s.small
	c.putLocked(b)
	if ended && !small {
		c.freeBufsLocked()
		go c.p.unref() // the buffer kept the poller; not here: a Handler may be calling
	}
}

// freeBufsLocked returns the memory of all free buffers.
func (c *Conn) freeBufsLocked() {
	s := &c.snd
	for b := s.slots.free; b != nil; b = b.next {
		s.arena.put(b.slot)
		b.slot, b.mem = slot{}, nil
		s.slots.n--
	}
	s.slots.free, s.slots.nfree = nil, 0
}
