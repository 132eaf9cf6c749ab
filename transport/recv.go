package transport

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// creditSlots is how many receives are kept for credit and EOS messages of the peer, which need no credit; see "Flow
// control" in docs/protocol.md for why these are enough.
const creditSlots = 7

// msgList is a queue of messages.
type msgList struct{ head, tail *Message }

func (l *msgList) push(m *Message) {
	m.next = nil
	if l.tail != nil {
		l.tail.next = m
	} else {
		l.head = m
	}
	l.tail = m
}

func (l *msgList) pop() *Message {
	m := l.head
	if m != nil {
		l.head = m.next
		if l.head == nil {
			l.tail = nil
		}
		m.next = nil
	}
	return m
}

func (l *msgList) remove(m *Message) bool {
	for p, prev := l.head, (*Message)(nil); p != nil; prev, p = p, p.next {
		if p != m {
			continue
		}
		if prev != nil {
			prev.next = p.next
		} else {
			l.head = p.next
		}
		if l.tail == p {
			l.tail = prev
		}
		p.next = nil
		return true
	}
	return false
}

// recvSide is the receiving half of a Conn.
type recvSide struct {
	shared    int // receives reserved in the poller's shared receive queue; 0: own ring
	threshold uint32
	batchMax  int
	payload   int // of our slots

	// owed is how many credits the peer can be given: their receives are posted again.
	owed atomic.Uint32
	// given is how many the peer was given in all, modulo 2^32. Written with snd.mu held, read atomically by the role's holder.
	given      uint32
	heldShared atomic.Int32 // messages of the shared queue that are queued, lent by Recv or taken
	peerLow    atomic.Bool  // the peer has no credit and waits

	// Guarded by the role.
	handler Handler
	eof     bool // the peer has sent EOS
	batch   []ib.RecvWR
	order   msgList    // messages behind a rendezvous that is still being read, that one first
	stalled []*Message // rendezvous that wait for memory of the pool
	nrndv   int        // rendezvous of the peer's without a FIN
	left    uint32     // messages that the peer still has credits for, without those given since counted was
	counted uint32     // given when left was last raised
	corked  bool       // what the handler posts is kept back until the completions at hand are handled
	lost    bool       // a receive was flushed
	deaf    bool       // the peer has broken the protocol: nothing that comes after that is looked at
	// dropping: nobody asks for what still comes, because the connection was ended here.
	dropping bool

	mu         sync.Mutex
	closed     bool
	hasHandler bool
	endErr     error
	eofSeen    bool    // everything before the EOS is in queue; the role's holder, who alone writes it, may read it without mu
	queue      msgList // for Recv
	returned   []ib.RecvWR
	waiting    recvWaitList
	spare      *recvWaiter
}

// size works the geometry out and returns the number of receives that the peer may use.
func (r *recvSide) size(cfg *Config) int {
	r.threshold = uint32(max(1, cfg.RecvDepth/2))
	r.batchMax = max(1, cfg.RecvDepth/8)
	r.payload = cfg.EagerSize
	r.left = uint32(cfg.RecvDepth)
	r.batch = make([]ib.RecvWR, 0, r.batchMax+1)
	r.returned = make([]ib.RecvWR, 0, r.batchMax+1)
	return cfg.RecvDepth + creditSlots + 3*cfg.RendezvousDepth
}

// fillRing makes the connection's own receive slots and posts them.
func (c *Conn) fillRing(n int) error {
	a := c.p.arenaFor(slotStride(c.cfg.EagerSize))
	c.slots = make([]Message, n)
	wrs := make([]ib.RecvWR, n)
	for i := range c.slots {
		m := &c.slots[i]
		s, err := a.get()
		if err != nil {
			return err
		}
		m.c = c
		m.init(s, makeID(idRecv, c.gen, c.idx, uint32(i)), c.rcv.payload+headerLen)
		wrs[i] = m.wr
	}
	_, err := c.q.PostRecv(wrs)
	return err
}

// freeSlots returns the slots that are not held to their arena, and reports how many are.
func (c *Conn) freeSlots() (held int) {
	a := c.p.arenaFor(slotStride(c.cfg.EagerSize))
	for i := range c.slots {
		m := &c.slots[i]
		switch {
		case m.held || m.state.Load() != msgLent:
			held++
		case m.slot.mem != nil:
			m.dropBig()
			a.put(m.slot)
			m.slot = slot{}
		}
	}
	return held
}

// received handles a receive completion. The role is held.
func (c *Conn) received(m *Message, wc *ib.WC) {
	if wc.Status != ib.WCSuccess {
		c.recvFailed(m, wc)
		return
	}
	if c.rcv.deaf {
		if m.shared {
			c.p.srq.recycle(m)
		}
		return
	}
	m.c = c
	if wc.Opcode == ib.WCRecvRDMAWithImm {
		if !c.spend(m) {
			return
		}
		m.data, m.imm, m.hasImm = nil, wc.Imm, true
		c.arrived(m, 0)
		return
	}
	n := int(wc.ByteLen)
	if n > c.rcv.payload+headerLen {
		c.broken(m, protocolErrorf("message of %d bytes in a slot of %d", n, c.rcv.payload+headerLen))
		return
	}
	b := m.slot.mem[:n:n]
	h, err := parseHeader(b)
	if err != nil {
		c.broken(m, err)
		return
	}
	switch h.typ() {
	case msgData:
		if !c.spend(m) {
			return
		}
		if cr := h.credits(); cr != 0 {
			c.addCredits(uint32(cr))
		}
		m.data = b[headerLen:]
		c.arrived(m, h.flags())
	case msgImm:
		if !c.spend(m) {
			return
		}
		if cr := h.credits(); cr != 0 {
			c.addCredits(uint32(cr))
		}
		m.data, m.imm, m.hasImm = nil, h.arg(), true
		c.arrived(m, 0)
	case msgRTS:
		key, err := parseRTS(b[headerLen:], c.maxMessage)
		if err != nil {
			c.broken(m, err)
			return
		}
		if !c.spend(m) {
			return
		}
		if cr := h.credits(); cr != 0 {
			c.addCredits(uint32(cr))
		}
		c.startRendezvous(m, h, key)
	default:
		c.control(m, h)
	}
}

// control handles a message that took no credit. Its receive is posted again before anything else, so that the peer
// can count on it once it sees the effect.
func (c *Conn) control(m *Message, h header) {
	r := &c.rcv
	if m.shared {
		c.p.srq.recycle(m)
	} else {
		n := len(r.batch)
		r.batch = append(r.batch, m.wr)
		c.postReceives(r.batch, n)
		r.batch = r.batch[:0]
	}
	if cr := h.credits(); cr != 0 {
		c.addCredits(uint32(cr))
	}
	switch h.typ() {
	case msgFIN:
		c.finRendezvous(h.arg(), h.flags()&flagCancelled != 0)
	case msgCancel:
		c.cancelled(h.arg())
	case msgCredit:
		if h.flags()&flagLow != 0 {
			c.low()
		}
	case msgEOS:
		if r.eof {
			c.violated(protocolErrorf("a second EOS"))
			return
		}
		r.eof = true
		if r.order.head == nil {
			c.endOfStream()
		}
	}
}

// endOfStream tells the application that no more messages come.
func (c *Conn) endOfStream() {
	r := &c.rcv
	if h, ok := r.handler.(EOFHandler); ok {
		h.HandleEOF(c)
	}
	r.mu.Lock()
	r.eofSeen = true
	for r.waiting.head != nil {
		r.waiting.wakeOne()
	}
	r.mu.Unlock()
}

// broken ends the connection because of m, which the protocol does not allow. The role is held.
func (c *Conn) broken(m *Message, err error) {
	if m.shared { // others go with the queue pair
		m.clear()
		c.p.srq.recycle(m)
	}
	c.violated(err)
}

// violated ends the connection because of what the peer sent. The application gets nothing that came later: what is missing before
// it, nobody could tell. The role is held.
func (c *Conn) violated(err error) {
	c.rcv.deaf = true
	c.fail(err)
}

// recvFailed handles a receive that did not complete: the queue pair is in the error state.
func (c *Conn) recvFailed(m *Message, wc *ib.WC) {
	if m.shared {
		c.p.srq.recycle(m)
	}
	if c.ended.Load() || c.rcv.lost {
		return
	}
	c.rcv.lost = true
	if wc.Status == ib.WCFlushErr {
		// The device has given up on the peer. The bootstrap connection knows better why.
		c.failLater(&CloseError{Err: fmt.Errorf("%w: %w", ErrPeerDied, wc.Status), Reason: "the queue pair went to the error state"})
		return
	}
	c.fail(&CloseError{Err: wc.Status, Reason: "a receive failed"})
}

// arrived handles a message that is complete: in its turn. The role is held.
func (c *Conn) arrived(m *Message, flags uint8) {
	r := &c.rcv
	if r.eof {
		c.broken(m, protocolErrorf("a message after EOS"))
		return
	}
	low := flags&flagLow != 0
	if low { // make credits ready for a reply to carry, before the handler sends one
		r.peerLow.Store(true)
		c.flushBatch()
	}
	m.ready = true
	if r.order.head != nil {
		r.order.push(m)
	} else {
		c.deliver(m)
	}
	if low && r.peerLow.Load() {
		c.low()
	}
}

// deliver gives a message to the application. The role is held.
func (c *Conn) deliver(m *Message) {
	r := &c.rcv
	if r.dropping {
		c.recycle(m)
		return
	}
	if h := r.handler; h != nil {
		if c.p.follows && !r.corked {
			c.p.corkFor(c)
		}
		h.HandleMessage(c, m)
		if m.shared && m.state.Load() != msgLent {
			r.heldShared.Add(1) // before Release can take it off
			if !m.endLoan() {
				r.heldShared.Add(-1)
				c.recycle(m)
			}
		} else if !m.endLoan() {
			c.recycle(m)
		}
		return
	}
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		c.recycle(m)
		return
	}
	m.held = true
	if m.shared {
		r.heldShared.Add(1)
	}
	r.queue.push(m)
	r.waiting.wakeOne()
	r.mu.Unlock()
}

// recycle posts the receive of a message again, sooner or later. The role is held.
func (c *Conn) recycle(m *Message) {
	r := &c.rcv
	if m.big != nil || m.hasImm || poison {
		m.clear()
	}
	if m.shared {
		c.p.srq.recycle(m)
		r.owed.Add(1)
		c.creditCheck()
		return
	}
	r.batch = append(r.batch, m.wr)
	if len(r.batch) >= r.batchMax || r.peerLow.Load() {
		c.flushBatch()
		c.creditCheck()
	}
}

// flushBatch posts the receives that recycle has collected. The role is held.
func (c *Conn) flushBatch() {
	r := &c.rcv
	if n := len(r.batch); n > 0 {
		c.postReceives(r.batch, n)
		r.batch = r.batch[:0]
	}
}

func (c *Conn) flushReturnedLocked() {
	r := &c.rcv
	if n := len(r.returned); n > 0 {
		c.postReceives(r.returned, n)
		r.returned = r.returned[:0]
	}
}

// postReceives posts receives, credits of which the peer may use again.
func (c *Conn) postReceives(wrs []ib.RecvWR, credits int) {
	if _, err := c.q.PostRecv(wrs); err != nil {
		c.fail(&CloseError{Err: err, Reason: "receives cannot be posted"})
		return
	}
	c.rcv.owed.Add(uint32(credits))
}

// giveBack is recycle for any goroutine, for messages that were taken, or lent by Recv.
func (c *Conn) giveBack(m *Message, taken bool) {
	if c.putBack(m, taken) {
		go c.p.unref() // not here: a Handler may be calling
	}
}

// putBack is giveBack, but reports whether the message kept the poller: the caller then gives that up.
func (c *Conn) putBack(m *Message, taken bool) (kept bool) {
	r := &c.rcv
	r.mu.Lock()
	if taken && !m.state.CompareAndSwap(msgKept, msgLent) {
		r.mu.Unlock()
		panic("transport: Release of a message that is not taken")
	}
	m.held = false
	closed := r.closed
	switch {
	case m.shared:
		m.clear()
		r.heldShared.Add(-1)
		r.mu.Unlock()
		c.p.srq.giveBack(m)
		if !closed {
			r.owed.Add(1)
			c.creditCheck()
		}
	case closed:
		m.clear()
		s := m.slot
		m.slot = slot{}
		r.mu.Unlock()
		c.p.arenaFor(slotStride(c.cfg.EagerSize)).put(s)
	default:
		m.clear()
		r.returned = append(r.returned, m.wr)
		check := false
		if len(r.returned) >= r.batchMax || r.peerLow.Load() {
			c.flushReturnedLocked()
			check = true
		}
		r.mu.Unlock()
		if check {
			c.creditCheck()
		}
	}
	return closed
}

// endReceives gives back what the receiving side holds, and tells the application. The queue pair is closed, and the
// role is held.
func (c *Conn) endReceives(e *CloseError) {
	r := &c.rcv
	for m := r.order.pop(); m != nil; m = r.order.pop() {
		m.clear()
		if m.shared {
			c.p.srq.recycle(m)
		}
	}
	r.mu.Lock()
	r.closed = true
	r.endErr = e
	if errors.Is(e.Err, net.ErrClosed) { // nobody will ask for what is queued
		for m := r.queue.pop(); m != nil; m = r.queue.pop() {
			m.held = false
			m.clear()
			if m.shared {
				r.heldShared.Add(-1)
				c.p.srq.recycle(m)
			}
		}
	}
	held := 0
	if r.shared > 0 {
		held = int(r.heldShared.Load())
	} else {
		held = c.freeSlots()
	}
	for range held {
		c.p.retain()
	}
	for r.waiting.head != nil {
		r.waiting.wakeOne()
	}
	r.mu.Unlock()
	if h := r.handler; h != nil {
		h.HandleClose(c, e)
		c.p.addDuties(-1)
	}
}
