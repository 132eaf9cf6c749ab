package transport

import (
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/ring"
)

// The credits that the peer is given, and what becomes of them.

// takeOwed takes the credits that a message to the peer can carry. snd.mu is held.
func (c *Conn) takeOwed() uint16 {
	r := &c.rcv
	n := r.owed.Load()
	if n == 0 {
		return 0
	}
	n = min(n, 0xffff)
	r.owed.Add(-n)                       // only takeOwed lowers it
	ring.StoreRel32(&r.given, r.given+n) // before the peer can use them
	r.peerLow.Store(false)
	return uint16(n)
}

// spend takes the credit of a message that came with one, and reports false if the peer had none: that ends the connection.
// The role is held.
func (c *Conn) spend(m *Message) bool {
	r := &c.rcv
	if r.left == 0 {
		given := atomic.LoadUint32(&r.given)
		r.left, r.counted = given-r.counted, given
		if r.left == 0 {
			c.broken(m, protocolErrorf("a message without credit, with a window of %d", c.cfg.RecvDepth))
			return false
		}
	}
	r.left--
	return true
}

// returnCredits sends the credits owed in a message of their own.
func (c *Conn) returnCredits() {
	s := &c.snd
	s.mu.Lock()
	if c.rcv.mustReturn() { // still: takeOwed runs under mu
		c.controlLocked(makeHeader(msgCredit, 0, 0, 0))
	}
	s.mu.Unlock()
}

// mustReturn reports whether credits are worth a message of their own: the peer waits for them, or they are half of the
// window. creditSlots depends on it being no earlier.
func (r *recvSide) mustReturn() bool {
	n := r.owed.Load()
	return n >= r.threshold || n != 0 && r.peerLow.Load()
}

// low: the peer has used its last credit. What can be given back is made ready, for the next message to it to carry.
func (c *Conn) low() {
	r := &c.rcv
	r.peerLow.Store(true)
	c.flushBatch()
	r.mu.Lock()
	c.flushReturnedLocked()
	r.mu.Unlock()
	c.creditCheck()
}

// creditCheck sends credits by themselves if the peer waits for them, or if they have become many.
func (c *Conn) creditCheck() {
	if c.rcv.mustReturn() {
		c.returnCredits()
	}
}
