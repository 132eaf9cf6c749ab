package rpc

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// fakeLink is one end of a pair of links in memory, strict about what the contract of link allows: memory is poisoned
// when its loan ends, messages are limited by credits, and handlers run one at a time on whoever polls.
type fakeLink struct {
	t    testing.TB
	peer *fakeLink
	max  int
	recv int // receive slots

	mu          sync.Mutex
	in          [][]byte
	slots       int // free send slots
	credits     int // messages that may be sent to the peer
	handler     linkHandler
	ended       bool
	endErr      error
	writeClosed bool
	told        bool // handleClose was called
	changed     chan struct{}

	role   sync.Mutex
	taken  atomic.Int32
	allocs atomic.Int32 // send slots that are neither posted nor discarded
	stall  atomic.Bool  // no send slot is ever free
}

var (
	errFakeClosed = errors.New("fake link: closed by the peer")
	errFakeLocal  = net.ErrClosed
)

// newFakePair returns two ends; slots is the number of send slots of each, and of receive slots.
func newFakePair(t testing.TB, slots, maxMessage int) (a, b *fakeLink) {
	mk := func() *fakeLink {
		return &fakeLink{t: t, max: maxMessage, recv: slots, slots: slots, credits: slots, changed: make(chan struct{})}
	}
	a, b = mk(), mk()
	a.peer, b.peer = b, a
	t.Cleanup(func() {
		a.abort(nil)
		b.abort(nil)
		if n := a.taken.Load() + b.taken.Load(); n != 0 {
			t.Errorf("%d received messages were not released", n)
		}
		if n := a.allocs.Load() + b.allocs.Load(); n != 0 {
			t.Errorf("%d send slots were neither posted nor discarded", n)
		}
	})
	return a, b
}

// change wakes everybody who waits for something on l.
func (l *fakeLink) changeLocked() {
	close(l.changed)
	l.changed = make(chan struct{})
}

type fakeBuf struct {
	b    []byte
	gone bool
}

func (l *fakeLink) tryAlloc(n int) (sendBuf, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.ended:
		return sendBuf{}, l.endErr
	case l.writeClosed:
		return sendBuf{}, errWriteClosed
	case n > l.max:
		return sendBuf{}, errors.New("fake link: message too large")
	case l.slots == 0 || l.stall.Load():
		return sendBuf{}, errWouldBlock
	}
	l.slots--
	l.allocs.Add(1)
	f := &fakeBuf{b: poisoned(n)}
	return sendBuf{f.b, f}, nil
}

func poisoned(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = 0xdb
	}
	return b
}

func (l *fakeLink) alloc(ctx context.Context, n int) (sendBuf, error) {
	for {
		l.mu.Lock()
		changed := l.changed
		l.mu.Unlock()
		b, err := l.tryAlloc(n)
		if !errors.Is(err, errWouldBlock) {
			return b, err
		}
		if !l.step() {
			select {
			case <-changed:
			case <-ctx.Done():
				return sendBuf{}, ctx.Err()
			}
		}
	}
}

func (f *fakeBuf) spend(l *fakeLink) {
	if f.gone {
		l.t.Error("a send slot was posted or discarded twice")
	}
	f.gone = true
	l.allocs.Add(-1)
}

func (l *fakeLink) postMore(b sendBuf, n int) error { return l.post(b, n) }

func (l *fakeLink) flush() error { return nil }

func (l *fakeLink) post(b sendBuf, n int) error {
	f := b.h.(*fakeBuf)
	f.spend(l)
	msg := append([]byte(nil), f.b[:n]...)
	copy(f.b, poisoned(len(f.b)))
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return l.endErr
	}
	l.mu.Unlock()
	p := l.peer
	p.mu.Lock()
	p.in = append(p.in, msg)
	p.changeLocked()
	p.mu.Unlock()
	return nil
}

func (l *fakeLink) discard(b sendBuf) {
	b.h.(*fakeBuf).spend(l)
	l.giveSlot()
}

func (l *fakeLink) giveSlot() {
	l.mu.Lock()
	l.slots++
	l.changeLocked()
	l.mu.Unlock()
}

type fakeMsg struct {
	b        []byte
	taken    bool
	released atomic.Bool
}

func (l *fakeLink) take(m message) message {
	f := m.h.(*fakeMsg)
	f.taken = true
	l.taken.Add(1)
	return m
}

func (l *fakeLink) release(m message) {
	f := m.h.(*fakeMsg)
	if f.released.Swap(true) {
		l.t.Error("a message was released twice")
	}
	copy(f.b, poisoned(len(f.b)))
	l.taken.Add(-1)
	l.peer.giveSlot() // a send slot of the peer stands for a receive slot here
}

// step polls: it delivers one message or the end, if there is one and nobody else polls.
func (l *fakeLink) step() bool {
	if !l.role.TryLock() {
		return false
	}
	defer l.role.Unlock()
	l.mu.Lock()
	h := l.handler
	switch {
	case h == nil:
	case len(l.in) > 0 && !l.ended:
		b := l.in[0]
		l.in = l.in[1:]
		l.mu.Unlock()
		f := &fakeMsg{b: b}
		h.handleMessage(message{b, f})
		if !f.taken {
			copy(b, poisoned(len(b)))
			l.peer.giveSlot()
		}
		return true
	case l.ended && !l.told:
		l.told = true
		err := l.endErr
		l.mu.Unlock()
		h.handleClose(err)
		return true
	}
	l.mu.Unlock()
	return false
}

func (l *fakeLink) poll() int {
	if l.step() {
		return 1
	}
	return 0
}

func (l *fakeLink) wait(ctx context.Context, w *waiter) error {
	for !w.Finished() {
		l.mu.Lock()
		changed := l.changed
		l.mu.Unlock()
		if l.step() {
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Microsecond): // another goroutine completed w
		}
	}
	return w.Err()
}

// drive polls until the link has ended, as a server's poller does.
func (l *fakeLink) drive() {
	for {
		l.mu.Lock()
		changed, over := l.changed, l.told
		l.mu.Unlock()
		if over {
			return
		}
		if !l.step() {
			select {
			case <-changed:
			case <-time.After(200 * time.Microsecond): // another goroutine had the role
			}
		}
	}
}

func (l *fakeLink) setHandler(h linkHandler) {
	l.mu.Lock()
	l.handler = h
	l.changeLocked()
	l.mu.Unlock()
}

func (l *fakeLink) maxMessage() int      { return l.max }
func (l *fakeLink) recvDepth() int       { return l.recv }
func (l *fakeLink) remoteAddr() net.Addr { return &net.UnixAddr{Name: "fake"} }

func (l *fakeLink) end(err error) {
	l.mu.Lock()
	if !l.ended {
		l.ended, l.endErr = true, err
		l.changeLocked()
	}
	l.mu.Unlock()
}

func (l *fakeLink) between(f func()) {
	l.role.Lock()
	defer l.role.Unlock()
	f()
}

func (l *fakeLink) closeWrite() {
	l.mu.Lock()
	l.writeClosed = true
	l.changeLocked()
	l.mu.Unlock()
}

func (l *fakeLink) closeGently() error {
	l.end(errFakeLocal)
	// What was posted arrives before the end does.
	for {
		l.peer.mu.Lock()
		done := len(l.peer.in) == 0 || l.peer.ended
		l.peer.mu.Unlock()
		if done {
			break
		}
		if !l.peer.step() {
			time.Sleep(50 * time.Microsecond)
		}
	}
	l.peer.end(errFakeClosed)
	return nil
}

func (l *fakeLink) abort(reason error) {
	if reason == nil {
		reason = errFakeLocal
	}
	l.end(reason)
	l.peer.end(errFakeClosed)
}
