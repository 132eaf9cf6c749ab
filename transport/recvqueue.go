package transport

import (
	"context"
	"errors"
	"io"
	"net"
)

// Messages that are there for Recv, or for a handler that comes late, and who waits for them.

type recvWaiter struct {
	Waiter
	next *recvWaiter
	in   bool
}

type recvWaitList struct{ head, tail *recvWaiter }

func (l *recvWaitList) push(w *recvWaiter) {
	w.next, w.in = nil, true
	if l.tail != nil {
		l.tail.next = w
	} else {
		l.head = w
	}
	l.tail = w
}

func (l *recvWaitList) wakeOne() {
	if w := l.head; w != nil {
		l.head = w.next
		if l.head == nil {
			l.tail = nil
		}
		w.next, w.in = nil, false
		w.Done()
	}
}

func (l *recvWaitList) remove(w *recvWaiter) {
	for p, prev := l.head, (*recvWaiter)(nil); p != nil; prev, p = p, p.next {
		if p == w {
			if prev != nil {
				prev.next = p.next
			} else {
				l.head = p.next
			}
			if l.tail == p {
				l.tail = prev
			}
			p.next, p.in = nil, false
			return
		}
	}
}

// Recv waits for the next message and calls fn with it; the message is lent until fn returns, see Message.Take. Recv
// returns fn's error. It returns io.EOF when the peer has sent its last message, ctx's error if that ends first, and the
// reason once the connection has ended and the messages that came before are received. Handlers must not call it.
func (c *Conn) Recv(ctx context.Context, fn func(*Message) error) error {
	m, err := c.next(ctx)
	if err != nil {
		return err
	}
	defer func() { // also when fn panics: a goroutine may have taken it before that
		r := &c.rcv
		r.mu.Lock()
		kept := m.endLoan()
		if kept {
			m.held = false // it is the taker's from here on
		}
		r.mu.Unlock()
		if !kept {
			c.giveBack(m, false)
		}
	}()
	return fn(m)
}

func (c *Conn) next(ctx context.Context) (*Message, error) {
	r := &c.rcv
	for {
		r.mu.Lock()
		if m := r.queue.pop(); m != nil {
			r.mu.Unlock()
			return m, nil
		}
		switch {
		case r.hasHandler:
			r.mu.Unlock()
			return nil, ErrHandlerSet
		case r.closed:
			err := r.endErr
			if r.eofSeen && !errors.Is(err, net.ErrClosed) {
				err = io.EOF
			}
			r.mu.Unlock()
			return nil, err
		case r.eofSeen:
			r.mu.Unlock()
			return nil, io.EOF
		}
		w := r.spare
		if w != nil {
			r.spare = w.next
		} else {
			w = new(recvWaiter)
		}
		w.Reset()
		r.waiting.push(w)
		r.mu.Unlock()
		c.flushHeld()
		err := c.p.Wait(ctx, &w.Waiter)
		r.mu.Lock()
		if w.in {
			r.waiting.remove(w)
		} else if err != nil && r.queue.head != nil {
			r.waiting.wakeOne() // the message that woke us is for somebody else
		}
		w.next = r.spare
		r.spare = w
		r.mu.Unlock()
		if err != nil {
			return nil, err
		}
	}
}

// deliverQueued gives a new handler the messages that came before it. The role is held.
func (c *Conn) deliverQueued(h Handler) {
	r := &c.rcv
	r.mu.Lock()
	r.hasHandler = true
	for r.waiting.head != nil {
		r.waiting.wakeOne()
	}
	for m := r.queue.pop(); m != nil; m = r.queue.pop() {
		r.mu.Unlock()
		h.HandleMessage(c, m)
		r.mu.Lock()
		kept := m.endLoan()
		if kept {
			m.held = false // heldShared counts it already
		}
		r.mu.Unlock()
		if !kept {
			c.giveBack(m, false)
		}
		r.mu.Lock()
	}
	r.mu.Unlock()
}

// dropQueue gives back the messages that nobody will ask for, because the connection was closed here after it had ended. It leaves
// closing the poller to its caller, who has an error to return.
func (c *Conn) dropQueue() {
	r := &c.rcv
	for {
		r.mu.Lock()
		r.endErr = &CloseError{Err: net.ErrClosed}
		m := r.queue.pop()
		r.mu.Unlock()
		if m == nil {
			return
		}
		if c.putBack(m, false) {
			c.p.unretain()
		}
	}
}
