package softnic

import (
	"context"
	"fmt"
	"sync"

	"github.com/ringside-rdma/ringside/internal/driver"
)

// CompChannel implements driver.CompChannel. Producers of this process and of peers wake it through its waker.
type CompChannel struct {
	nic *NIC
	id  uint32
	w   waker

	mu     sync.Mutex
	cqs    []*CQ
	closed bool
}

// CreateCompChannel implements driver.Context.
func (n *NIC) CreateCompChannel() (driver.CompChannel, error) {
	w, err := n.newWaker()
	if err != nil {
		return nil, err
	}
	ch := &CompChannel{nic: n, w: w}
	if err := n.addChannel(ch); err != nil {
		w.close()
		return nil, err
	}
	return ch, nil
}

func (ch *CompChannel) wake() { ch.w.wake() }

func (ch *CompChannel) add(c *CQ) error {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if ch.closed {
		return driver.ErrClosed
	}
	ch.cqs = append(ch.cqs, c)
	return nil
}

func (ch *CompChannel) remove(c *CQ) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	for i, x := range ch.cqs {
		if x == c {
			ch.cqs = append(ch.cqs[:i:i], ch.cqs[i+1:]...)
			return
		}
	}
}

// next returns a CQ that has fired, or nil, and whether there are other CQs that may have.
func (ch *CompChannel) next() (c *CQ, more bool, err error) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if ch.closed {
		return nil, false, driver.ErrClosed
	}
	more = len(ch.cqs) > 1
	for i, c := range ch.cqs {
		if c.takeFired() {
			if more { // to the end, so that a busy CQ does not hide the others
				ch.cqs = append(append(ch.cqs[:i:i], ch.cqs[i+1:]...), c)
			}
			return c, more, nil
		}
	}
	return nil, more, nil
}

// Wait implements driver.CompChannel.
func (ch *CompChannel) Wait(ctx context.Context) (driver.CQ, error) {
	for {
		c, more, err := ch.next()
		if err != nil {
			return nil, err
		}
		if c != nil {
			if more {
				ch.w.wake() // there may be another for another waiter
			}
			return c, nil
		}
		if err := ch.w.wait(ctx); err != nil {
			return nil, err
		}
	}
}

// WaitThread implements driver.ThreadWaiter.
func (ch *CompChannel) WaitThread() (driver.CQ, error) {
	for woken := false; ; woken = true {
		c, _, err := ch.next()
		switch {
		case err != nil:
			return nil, err
		case c != nil:
			return c, nil
		case woken:
			return nil, nil
		}
		if err := ch.w.waitThread(); err != nil {
			return nil, err
		}
	}
}

// Interrupt implements driver.ThreadWaiter.
func (ch *CompChannel) Interrupt() { ch.w.wake() }

// Close implements driver.CompChannel.
func (ch *CompChannel) Close() error {
	ch.mu.Lock()
	if ch.closed {
		ch.mu.Unlock()
		return driver.ErrClosed
	}
	if len(ch.cqs) > 0 {
		ch.mu.Unlock()
		return fmt.Errorf("%w: completion queues use this channel", driver.ErrBusy)
	}
	ch.closed = true
	ch.mu.Unlock()
	ch.nic.dropChannel(ch)
	ch.w.close()
	return nil
}
