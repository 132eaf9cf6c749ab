package transport

import (
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// corkMax is how many messages are posted together at most.
const corkMax = 16

// cork keeps messages back that go out together: one call of PostSend, one doorbell. Between two messages that are posted
// one by one, the first locked instruction waits until the lines that the first has written have come over from the peer.
// Guarded by sendSide.mu.
type cork struct {
	n    int // the messages; they have their credits and their places in the send queue already
	wrs  [corkMax]ib.SendWR
	sges [corkMax]ib.SGE
	bufs [corkMax]*SendBuf // those that are inline: free once posted
}

// holdLocked keeps b, of class small or slots, for the next flushLocked. canSendLocked was true, and its credit is taken.
func (c *Conn) holdLocked(b *SendBuf, flags uint8) error {
	s := &c.snd
	k := s.cork
	if k == nil {
		k = new(cork)
		s.cork = k
	}
	i := k.n
	wr := &k.wrs[i]
	wr.Opcode = ib.OpSend
	makeHeader(msgData, flags, c.takeOwed(), uint32(b.n)).put(b.mem)
	signal := false
	if b.class == &s.small {
		wr.Inline, wr.SGEs = b.mem[:headerLen+b.n], nil
		k.bufs[i] = b
	} else {
		k.sges[i] = b.sge
		k.sges[i].Length = uint32(headerLen + b.n)
		wr.Inline, wr.SGEs = nil, k.sges[i:i+1:i+1]
		signal = s.scarceSlots()
		s.entry().buf = b
	}
	b.state = bufInFlight
	c.stampLocked(wr, signal)
	s.head++
	k.n++
	ring.StoreRel32(&s.held, 1)
	if k.n == corkMax {
		return c.flushLocked()
	}
	return nil
}

// flushLocked posts what is kept back.
func (c *Conn) flushLocked() error {
	s := &c.snd
	k := s.cork
	if k == nil || k.n == 0 {
		return nil
	}
	n := k.n
	k.n = 0
	ring.StoreRel32(&s.held, 0)
	posted, err := c.q.PostSend(k.wrs[:n])
	for i := range n {
		if b := k.bufs[i]; b != nil {
			k.bufs[i] = nil
			c.putLocked(b) // inline data was copied by PostSend
		}
	}
	if err == nil {
		return nil
	}
	for ; n > posted; n-- { // the places of those that were not posted
		s.head--
		if e := s.entry(); e.buf != nil {
			b := e.buf
			e.buf = nil
			c.putLocked(b)
		}
	}
	return c.postFailedLocked(err)
}

// dropLocked forgets what is kept back, when the connection has ended. The buffers in the send queue are not its business.
func (k *cork) dropLocked(c *Conn) {
	if k == nil {
		return
	}
	for i := range k.n {
		if b := k.bufs[i]; b != nil {
			k.bufs[i] = nil
			c.putLocked(b)
		}
	}
	k.n = 0
}

// PostMore is Post for a message that others are about to follow. It may be kept back, to be posted together with them:
// until the next Post or Flush, or anything else that the connection sends or waits for; at most 15 are, and none that is
// longer than EagerSize. A failure to post what was kept back ends the connection. Handlers may call it, but need not: what a handler posts while more messages of its connection wait to be handled goes out together anyway.
func (c *Conn) PostMore(b *SendBuf, n int) error { return c.post(b, n, true) }

// Flush posts what PostMore has kept back. It never blocks. The error is why nothing can be sent any more: see Err.
// Handlers may call it.
func (c *Conn) Flush() error {
	s := &c.snd
	s.mu.Lock()
	err := s.err
	if err == nil && !s.corked { // else it goes out in a moment
		err = c.flushLocked()
	}
	s.mu.Unlock()
	return err
}

// flushHeld posts what the caller has kept back before it waits for the peer's answer.
func (c *Conn) flushHeld() {
	if atomic.LoadUint32(&c.snd.held) != 0 { // without the lock, which costs every Recv
		c.Flush()
	}
}

// corkFor has the connection keep back what its handler posts until the completions at hand have been handled. The role is
// held.
func (p *Poller) corkFor(c *Conn) {
	c.rcv.corked = true
	p.corked = append(p.corked, c)
	c.snd.mu.Lock()
	c.snd.corked = true
	c.snd.mu.Unlock()
}

// uncork ends corkFor. The role is held.
func (p *Poller) uncork() {
	for i, c := range p.corked {
		p.corked[i] = nil
		c.rcv.corked = false
		s := &c.snd
		s.mu.Lock()
		s.corked = false
		c.flushLocked() // a failure ends the connection
		s.mu.Unlock()
	}
	p.corked = p.corked[:0]
}
