package transport

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// stall remembers a connection that waits for memory. The role is held.
func (p *Poller) stall(c *Conn) {
	if !slices.Contains(p.stalled, c) {
		p.stalled = append(p.stalled, c)
	}
	p.hungry.Store(true)
}

// unstall is called whenever memory of received messages was given back, under whatever locks.
func (p *Poller) unstall() {
	// Looking comes after the Release, and in readInto after the Store in stall comes another Get: one of the two sees the other.
	if p.hungry.Load() && p.hungry.CompareAndSwap(true, false) {
		go p.Do(p.readStalled) // not here: the caller may hold locks that the polling goroutine takes
	}
}

// readStalled lets all connections that wait for memory try again, in the order in which they came. The role is held.
func (p *Poller) readStalled() {
	conns := p.stalled
	p.stalled = nil
	for _, c := range conns {
		c.readStalled()
	}
}

func (c *Conn) readStalled() {
	msgs := c.rcv.stalled
	c.rcv.stalled = nil
	for _, m := range msgs {
		if !c.ended.Load() {
			c.readInto(m)
		}
	}
}

// rndvOut is a rendezvous whose source the peer may be reading.
type rndvOut struct {
	buf       *SendBuf
	gen       uint16
	cancelled bool
}

// finRendezvous handles a FIN. The role is held.
func (c *Conn) finRendezvous(id uint32, cancelled bool) {
	s := &c.snd
	i, gen := splitRndvID(id)
	s.mu.Lock()
	if i >= len(s.rndv) || s.rndv[i].buf == nil || s.rndv[i].gen != gen || cancelled && !s.rndv[i].cancelled {
		s.mu.Unlock()
		c.violated(protocolErrorf("FIN for rendezvous %#x, which is not open", id))
		return
	}
	c.endRendezvousLocked(i, cancelled)
	c.drainLocked()
	s.mu.Unlock()
}

func (c *Conn) endRendezvousLocked(i int, cancelled bool) {
	s := &c.snd
	r := &s.rndv[i]
	b := r.buf
	r.buf = nil
	s.rndvFree = append(s.rndvFree, uint16(i))
	if b.rel != nil {
		if cancelled {
			b.rel.Fail(context.Canceled)
		} else {
			b.rel.Done()
		}
		b.rel = nil
	}
	c.putLocked(b)
}

// SendBuffer sends the bytes of b, which comes from Poller().Pool(), without copying those that are more than EagerSize.
// b belongs to the Conn, in every outcome; it is released when the peer has read it. SendBuffer waits if SendDepth long
// messages are under way.
func (c *Conn) SendBuffer(ctx context.Context, b *mr.Buffer) error {
	n := b.Len()
	if n <= c.eager || n > c.maxMessage {
		err := c.Send(ctx, b.Bytes())
		b.Release()
		return err
	}
	sb, err := c.allocForeign(ctx)
	if err != nil {
		b.Release()
		return err
	}
	sb.big, sb.mem, sb.n = b, b.Bytes(), n
	return c.Post(sb, n)
}

// allocForeign returns a SendBuf for a long message whose memory is somebody else's.
func (c *Conn) allocForeign(ctx context.Context) (*SendBuf, error) {
	s := &c.snd
	for {
		s.mu.Lock()
		if err := s.usableLocked(); err != nil {
			s.mu.Unlock()
			return nil, err
		}
		cl := &s.big
		b := cl.free
		if b != nil || cl.n < cl.max {
			if b == nil {
				b = &SendBuf{c: c, class: cl}
				cl.n++
			} else {
				cl.free, b.next = b.next, nil
				cl.nfree--
			}
			b.state = bufOwned
			s.out++
			s.mu.Unlock()
			return b, nil
		}
		if err := c.waitLocked(ctx, &cl.waiting); err != nil {
			return nil, err
		}
	}
}

// SendRegion sends n bytes at off of a region that was registered in PD() with ib.AccessRemoteRead, without copying
// those that are more than EagerSize, and returns when the peer has read them. If ctx ends first, the message is taken
// back if the peer has not begun to read it; in any case SendRegion returns only when the memory is not touched any
// more: if the peer does not answer for Config.Linger, the connection is closed for that. A nil error means that the
// message has been read by the peer, even if ctx has ended.
func (c *Conn) SendRegion(ctx context.Context, m *mr.MR, off, n int) error {
	if n <= c.eager || n > c.maxMessage {
		return c.Send(ctx, m.Bytes()[off:off+n])
	}
	if m.Access()&ib.AccessRemoteRead == 0 {
		return fmt.Errorf("transport: SendRegion needs a region with %v, this one has %v", ib.AccessRemoteRead, m.Access())
	}
	key := m.RemoteRange(off, n) // panics if it is not in m
	key.Access = ib.AccessRemoteRead
	b, err := c.allocForeign(ctx)
	if err != nil {
		return err
	}
	var w Waiter
	s := &c.snd
	s.mu.Lock()
	s.out--
	b.n, b.mem, b.rel, b.key = n, nil, &w, key
	if err = c.postBufLocked(b, n, false); err != nil {
		s.mu.Unlock()
		return err
	}
	s.mu.Unlock()
	if err = c.p.Wait(ctx, &w); w.Finished() {
		return err
	}
	// ctx has ended (or the poller, which waits for the connection). The peer may be reading at this moment.
	s.mu.Lock()
	switch {
	case w.Finished():
	case b.state == bufQueued:
		for p, prev := s.pend, (*SendBuf)(nil); p != nil; prev, p = p, p.next {
			if p != b {
				continue
			}
			if prev != nil {
				prev.next = b.next
			} else {
				s.pend = b.next
			}
			if s.pendTail == b {
				s.pendTail = prev
			}
			break
		}
		b.rel = nil
		c.putLocked(b)
		c.drainLocked() // what was behind it may go, the EOS included
		s.mu.Unlock()
		return err
	default:
		i, _ := splitRndvID(b.rid)
		s.rndv[i].cancelled = true
		c.controlLocked(makeHeader(msgCancel, 0, 0, b.rid))
	}
	s.mu.Unlock()
	grace, cancel := context.WithTimeout(context.Background(), c.cfg.Linger)
	werr := c.p.Wait(grace, &w)
	cancel()
	if !w.Finished() {
		c.fail(&CloseError{Err: ErrPeerDied, Reason: fmt.Sprintf("it did not give a message's memory back within %v", c.cfg.Linger)})
		<-c.done // ends w
		werr = w.Err()
	}
	if errors.Is(werr, context.Canceled) {
		return err
	}
	return werr
}

// startRendezvous handles an RTS: it takes memory for the message and reads it. The role is held.
func (c *Conn) startRendezvous(m *Message, h header, key mr.RemoteKey) {
	r := &c.rcv
	if r.eof {
		c.broken(m, protocolErrorf("a message after EOS"))
		return
	}
	m.ready, m.id, m.key, m.reading = false, h.arg(), key, false
	r.order.push(m)
	if r.nrndv++; r.nrndv > c.cfg.RendezvousDepth {
		c.violated(protocolErrorf("%d rendezvous at a time, at most %d", r.nrndv, c.cfg.RendezvousDepth))
		return
	}
	c.readInto(m)
	if h.flags()&flagLow != 0 {
		c.low()
	}
}

// readInto gets memory and reads the payload of m, or lists m as stalled. The role is held.
func (c *Conn) readInto(m *Message) {
	r := &c.rcv
	if len(r.stalled) > 0 {
		// In turn: messages are delivered in order, so memory for this one would only be kept from those before it, for ever
		// if the application waits for them before it gives any back.
		r.stalled = append(r.stalled, m)
		c.p.stall(c)
		return
	}
	big, err := c.p.received.Get(int(m.key.Len))
	if errors.Is(err, mr.ErrPoolExhausted) {
		r.stalled = append(r.stalled, m)
		c.p.stall(c)
		// Memory that was given back since found nobody stalled, and nobody will say so again: look once more.
		if big, err = c.p.received.Get(int(m.key.Len)); errors.Is(err, mr.ErrPoolExhausted) {
			return
		}
		r.stalled = r.stalled[:len(r.stalled)-1]
	}
	if err != nil {
		c.fail(&CloseError{Err: err, Reason: "no memory for a message"})
		return
	}
	m.big = big
	m.data = big.Bytes()[:m.key.Len]
	s := &c.snd
	s.mu.Lock()
	switch {
	case s.err != nil:
	case s.room():
		c.readLocked(m)
	default:
		m.readQueued = true
		s.reads = append(s.reads, m)
	}
	s.mu.Unlock()
}

// readLocked posts the READ of a rendezvous. snd.mu is held, and there is room.
func (c *Conn) readLocked(m *Message) {
	s := &c.snd
	m.readQueued, m.reading = false, true
	s.sge[0] = m.big.SGE(0, int(m.key.Len))
	wr := &s.wr[0]
	wr.Opcode, wr.Inline, wr.SGEs = ib.OpRDMARead, nil, s.sge[:]
	wr.RemoteAddr, wr.RKey = m.key.Addr, m.key.RKey
	e := s.entry()
	e.msg = m
	if c.postLocked(true) != nil {
		e.msg = nil
	}
}

// readDone ends a rendezvous whose payload is here. The role is held.
func (c *Conn) readDone(m *Message) {
	m.ready = true
	c.endRendezvous(m, 0)
	c.deliverOrdered()
}

func (c *Conn) endRendezvous(m *Message, flags uint8) {
	c.rcv.nrndv--
	s := &c.snd
	s.mu.Lock()
	c.controlLocked(makeHeader(msgFIN, flags, 0, m.id))
	s.mu.Unlock()
}

// deliverOrdered delivers what was held up. The role is held.
func (c *Conn) deliverOrdered() {
	r := &c.rcv
	if r.order.head == nil {
		return
	}
	for r.order.head != nil && r.order.head.ready {
		m := r.order.head
		if m.next == nil {
			// The list must look occupied while m is delivered, or a message that comes meanwhile would overtake it; but
			// the role is held, and none comes.
			r.order = msgList{}
		} else {
			r.order.head = m.next
			m.next = nil
		}
		c.deliver(m)
	}
	if r.order.head == nil && r.eof {
		c.endOfStream()
	}
}

// cancelled handles the peer's wish to have the source of a rendezvous back. If it is being read, the FIN is on its way
// in any case. The role is held.
func (c *Conn) cancelled(id uint32) {
	r := &c.rcv
	for m := r.order.head; m != nil; m = m.next {
		if m.ready || m.id != id || m.reading {
			continue
		}
		s := &c.snd
		s.mu.Lock()
		for i, q := range s.reads {
			if q == m && m.readQueued {
				s.reads = append(s.reads[:i], s.reads[i+1:]...)
				break
			}
		}
		s.mu.Unlock()
		first := len(r.stalled) > 0 && r.stalled[0] == m
		r.stalled = slices.DeleteFunc(r.stalled, func(q *Message) bool { return q == m })
		r.order.remove(m)
		c.endRendezvous(m, flagCancelled)
		m.dropBig()
		c.recycle(m)
		c.deliverOrdered()
		if first { // those behind it may want less
			c.readStalled()
		}
		return
	}
}
