package transport

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// wantInline is how many bytes of inline data a connection asks for: small messages then need no registered memory, and
// their buffers are free again as soon as they are posted.
const wantInline = 256

// minInline is what the protocol's own messages need: an RTS.
const minInline = headerLen + remoteLen

// sendSide is the sending half of a Conn. mu is a leaf but for the queue pair's own locks and Waiter.Done.
type sendSide struct {
	mu        ring.SpinLock // held across PostSend, whose stores to the peer its release does not wait for
	err       error         // why nothing can be sent any more
	closing   bool          // CloseWrite was called
	eosDue    bool          // and the EOS is still to be sent
	eosSent   bool
	eosSeq    uint32 // its position in the send queue
	maxInline int

	// Flow control: messages that may be sent before the peer returns credits.
	credits, window uint32
	lowTold         bool // the peer was asked for credits since it last gave any

	// The send queue: requests are known by their position, and complete in order.
	sq              []sqEntry // a ring; len is a power of two
	head, tail      uint32    // next position, oldest incomplete position
	depth           uint32
	unsig, sigEvery uint32

	ctrl      []header   // control messages that wait for room in the send queue
	creditDue bool       // a credit message, likewise
	reads     []*Message // rendezvous to be read, likewise
	pend      *SendBuf   // messages that wait for room, credits or a rendezvous slot
	pendTail  *SendBuf
	ops       waitList // batches and WriteImm that wait for room or credits

	small, slots, big bufClass
	arena             *arena
	out               int // SendBufs with the user, but for class small

	rndv     []rndvOut
	rndvFree []uint16

	batches *Batch // free ones, for single operations

	cork   *cork  // made when first needed
	held   uint32 // it has messages; written under mu, looked at without
	corked bool   // the poller posts what is kept back, when it has handled what has come

	wr      [1]ib.SendWR
	sge     [1]ib.SGE
	ctl     [minInline]byte
	duty    bool    // the poller's driver looks after us
	drained *Waiter // Close waits for idleLocked
	waiters *roomWaiter
}

// sqEntry is what to do when a send request completes. At most one pointer is set; a free entry has none.
type sqEntry struct {
	buf   *SendBuf
	batch *Batch
	msg   *Message // the READ of a rendezvous
	last  bool     // of batch
}

const (
	bufFree  uint8 = iota
	bufOwned       // by the user
	bufQueued
	bufInFlight
)

func (s *sendSide) init(c *Conn, depth int) error {
	qcap := c.q.Cap()
	s.maxInline = min(qcap.MaxInline, wantInline)
	if s.maxInline < minInline {
		return fmt.Errorf("transport: device %s has %d bytes of inline data, and %d are needed: %w", c.p.vctx.Name(), qcap.MaxInline, minInline, errors.ErrUnsupported)
	}
	s.depth = uint32(depth)
	n := 1
	for n < depth {
		n <<= 1
	}
	s.sq = make([]sqEntry, n)
	s.sigEvery = uint32(max(1, min(depth, c.cfg.SendDepth)/4))
	s.small.max, s.slots.max, s.big.max = c.cfg.SendDepth, c.cfg.SendDepth, c.cfg.SendDepth
	c.inline = s.maxInline - headerLen
	return nil
}

// agree sets what depends on the peer's limits.
func (c *Conn) agree(maxMessage, eager, window, rndv int) {
	s := &c.snd
	c.maxMessage = min(maxMessage, c.cfg.MaxMessage)
	c.eager = min(eager, c.cfg.EagerSize)
	c.inline = min(c.inline, c.eager)
	c.rndvMax = min(rndv, c.cfg.RendezvousDepth)
	s.credits, s.window = uint32(window), uint32(window)
	s.arena = c.p.arenaFor(slotStride(c.eager))
	s.rndv = make([]rndvOut, c.rndvMax)
	for i := range s.rndv {
		s.rndvFree = append(s.rndvFree, uint16(i))
	}
}

func (s *sendSide) room() bool { return s.head-s.tail < s.depth }

// usableLocked is why no message can be sent, or nil.
func (s *sendSide) usableLocked() error {
	if s.err != nil {
		return s.err
	}
	if s.closing {
		return ErrWriteClosed
	}
	return nil
}

// Post sends the first n bytes of b, at most as many as were asked for. It never blocks: without credit the message is
// queued, and goes out in order when the peer returns some. b belongs to the Conn, in every outcome. Handlers may call it.
func (c *Conn) Post(b *SendBuf, n int) error { return c.post(b, n, false) }

func (c *Conn) post(b *SendBuf, n int, more bool) error {
	s := &c.snd
	s.mu.Lock()
	if b.state != bufOwned || b.c != c {
		s.mu.Unlock()
		panic("transport: Post of a SendBuf that is not owned")
	}
	c.outLocked(b)
	if uint(n) > uint(b.n) {
		c.dropLocked(b)
		s.mu.Unlock()
		return fmt.Errorf("%w: %d bytes in a buffer of %d", ErrTooLarge, n, b.n)
	}
	err := c.postBufLocked(b, n, more)
	s.mu.Unlock()
	return err
}

func (c *Conn) postBufLocked(b *SendBuf, n int, more bool) error {
	s := &c.snd
	if s.err != nil || s.closing {
		err := s.usableLocked()
		c.dropLocked(b)
		return err
	}
	b.n = n
	if b.big != nil {
		b.key = b.big.RemoteRange(0, n)
		b.key.Access = ib.AccessRemoteRead
	}
	if s.pend != nil || !c.canSendLocked(b) {
		b.state = bufQueued
		b.next = nil
		if s.pendTail != nil {
			s.pendTail.next = b
		} else {
			s.pend = b
		}
		s.pendTail = b
		c.dutyLocked()
		if !s.corked { // else it goes out in a moment
			return c.flushLocked() // it may have what b waits for
		}
		return nil
	}
	return c.transmitLocked(b, more)
}

// dutyLocked tells the poller whether there is something that must go out though nobody may be waiting for it.
func (c *Conn) dutyLocked() {
	s := &c.snd
	want := s.sq != nil && (s.pend != nil || s.eosDue || len(s.rndvFree) < len(s.rndv))
	if want == s.duty {
		return
	}
	s.duty = want
	if want {
		c.p.addDuties(1)
	} else {
		c.p.addDuties(-1)
	}
}

// canSendLocked reports whether b could be sent now.
func (c *Conn) canSendLocked(b *SendBuf) bool {
	s := &c.snd
	return s.credits != 0 && s.room() && (b.class != &s.big || len(s.rndvFree) != 0)
}

// transmitLocked sends b, or keeps it back for a moment if more are to follow; canSendLocked was true.
func (c *Conn) transmitLocked(b *SendBuf, more bool) error {
	s := &c.snd
	s.credits--
	flags := uint8(0)
	if s.credits == 0 {
		flags = flagLow
		s.lowTold = true
	}
	if (more || s.corked) && b.class != &s.big {
		return c.holdLocked(b, flags)
	}
	wr := &s.wr[0]
	wr.Opcode = ib.OpSend
	switch b.class {
	case &s.small:
		makeHeader(msgData, flags, c.takeOwed(), uint32(b.n)).put(b.mem)
		wr.Inline = b.mem[:headerLen+b.n]
		wr.SGEs = nil
		err := c.postLocked(false)
		c.putLocked(b) // inline data is copied by PostSend
		return err
	case &s.slots:
		makeHeader(msgData, flags, c.takeOwed(), uint32(b.n)).put(b.mem)
		s.sge[0] = b.sge
		s.sge[0].Length = uint32(headerLen + b.n)
		wr.Inline = nil
		wr.SGEs = s.sge[:]
		b.state = bufInFlight
		e := s.entry()
		e.buf = b
		if err := c.postLocked(s.scarceSlots()); err != nil {
			e.buf = nil
			c.putLocked(b)
			return err
		}
		return nil
	}
	if b.n == 0 { // a rendezvous of nothing: an empty message says the same
		makeHeader(msgData, flags, c.takeOwed(), 0).put(s.ctl[:])
		wr.Inline = s.ctl[:headerLen]
		wr.SGEs = nil
		err := c.postLocked(false)
		c.putLocked(b)
		return err
	}
	i := s.rndvFree[len(s.rndvFree)-1]
	s.rndvFree = s.rndvFree[:len(s.rndvFree)-1]
	r := &s.rndv[i]
	r.gen++
	r.buf, r.cancelled = b, false
	b.state = bufInFlight
	b.rid = rndvID(int(i), r.gen)
	makeHeader(msgRTS, flags, c.takeOwed(), b.rid).put(s.ctl[:])
	if _, err := b.key.AppendBinary(s.ctl[headerLen:headerLen]); err != nil {
		return err // not possible: the key is a region's
	}
	wr.Inline = s.ctl[:minInline]
	wr.SGEs = nil
	c.dutyLocked()
	return c.postLocked(false)
}

// entry is what the next request's completion will look at; it is empty.
func (s *sendSide) entry() *sqEntry { return &s.sq[s.head&uint32(len(s.sq)-1)] }

// scarceSlots reports whether the next message from a slot should be signalled: only completions give slots back.
func (s *sendSide) scarceSlots() bool { return 2*(s.slots.nfree+s.slots.max-s.slots.n) <= s.slots.max }

// stampLocked fills in the ID and Flags of the request that is next in the send queue.
func (c *Conn) stampLocked(wr *ib.SendWR, signal bool) {
	s := &c.snd
	wr.Flags = 0
	s.unsig++
	if signal || s.unsig >= s.sigEvery {
		s.unsig = 0
		wr.Flags = ib.SendSignaled
	}
	wr.ID = c.idBase | uint64(s.head)
}

// postLocked posts s.wr[0], filled in but for ID and Flags, after what is kept back. There is room.
func (c *Conn) postLocked(signal bool) error {
	s := &c.snd
	if err := c.flushLocked(); err != nil {
		return err
	}
	c.stampLocked(&s.wr[0], signal)
	if _, err := c.q.PostSend(s.wr[:]); err != nil {
		return c.postFailedLocked(err)
	}
	s.head++
	return nil
}

// postFailedLocked ends the connection, whose queue pair takes no requests.
func (c *Conn) postFailedLocked(err error) error {
	s := &c.snd
	if s.err == nil {
		s.err = &CloseError{Err: err}
		c.fail(s.err)
	}
	return s.err
}

// controlLocked sends a message that needs no credit, now or as soon as the send queue has room.
func (c *Conn) controlLocked(h header) {
	s := &c.snd
	if s.err != nil {
		return
	}
	if !s.room() || len(s.ctrl) > 0 {
		if h.typ() == msgCredit && h.flags() == 0 {
			s.creditDue = true
		} else {
			s.ctrl = append(s.ctrl, h) // bounded by the rendezvous' number, and rare: the send queue is full
		}
		return
	}
	c.transmitControlLocked(h)
}

func (c *Conn) transmitControlLocked(h header) {
	s := &c.snd
	if h.typ() == msgCredit && h.flags()&flagLow == 0 && !c.rcv.mustReturn() {
		return // some other message has carried them
	}
	owed := c.takeOwed()
	makeHeader(h.typ(), h.flags(), owed, h.arg()).put(s.ctl[:])
	wr := &s.wr[0]
	wr.Opcode = ib.OpSend
	wr.Inline = s.ctl[:headerLen]
	wr.SGEs = nil
	if h.typ() == msgEOS {
		s.eosSent, s.eosSeq = true, s.head
	}
	c.postLocked(h.typ() == msgEOS)
}

// drainLocked sends what has become possible.
func (c *Conn) drainLocked() {
	s := &c.snd
	if s.err != nil {
		return
	}
	n := 0
	for ; n < len(s.ctrl) && s.room(); n++ {
		c.transmitControlLocked(s.ctrl[n])
	}
	if n > 0 {
		s.ctrl = s.ctrl[:copy(s.ctrl, s.ctrl[n:])]
	}
	if s.creditDue && len(s.ctrl) == 0 && s.room() {
		s.creditDue = false
		c.transmitControlLocked(makeHeader(msgCredit, 0, 0, 0))
	}
	for len(s.reads) > 0 && s.room() && s.err == nil {
		m := s.reads[0]
		s.reads = s.reads[:copy(s.reads, s.reads[1:])]
		c.readLocked(m)
	}
	for s.pend != nil && c.canSendLocked(s.pend) && s.err == nil {
		b := s.pend
		s.pend = b.next
		if s.pend == nil {
			s.pendTail = nil
		}
		b.next = nil
		c.transmitLocked(b, s.pend != nil)
	}
	if !s.corked {
		c.flushLocked()
	}
	if s.eosDue && s.pend == nil && len(s.ctrl) == 0 && s.room() && s.err == nil {
		s.eosDue = false
		c.transmitControlLocked(makeHeader(msgEOS, 0, 0, 0))
	}
	if s.ops.head != nil && s.room() {
		s.ops.wakeAll()
	}
	if s.drained != nil && c.idleLocked() {
		s.drained.Done()
		s.drained = nil
	}
	c.dutyLocked()
}

// idleLocked reports whether everything that was to be sent, EOS included, has arrived.
func (c *Conn) idleLocked() bool {
	s := &c.snd
	return s.eosSent && int32(s.tail-s.eosSeq) > 0 && len(s.rndvFree) == len(s.rndv)
}

// addCredits takes the credits that the peer returned. The role is held.
func (c *Conn) addCredits(n uint32) {
	s := &c.snd
	s.mu.Lock()
	s.credits += n
	s.lowTold = false
	if s.credits > s.window {
		s.mu.Unlock()
		c.violated(protocolErrorf("%d credits of a window of %d", s.credits, s.window))
		return
	}
	if s.pend != nil || s.ops.head != nil {
		c.drainLocked()
	}
	s.mu.Unlock()
}

// sent handles the completion of a send request. The role is held.
func (c *Conn) sent(wc *ib.WC) {
	s := &c.snd
	var read *Message // at most one: each READ is signalled
	s.mu.Lock()
	seq := uint32(wc.ID)
	if s.sq == nil || seq-s.tail >= s.head-s.tail {
		s.mu.Unlock()
		return
	}
	if wc.Status != ib.WCSuccess {
		c.sendFailedLocked(seq, wc)
		s.mu.Unlock()
		return
	}
	mask := uint32(len(s.sq) - 1)
	for ; s.tail != seq+1; s.tail++ {
		e := &s.sq[s.tail&mask]
		switch {
		case e.buf != nil:
			b := e.buf
			e.buf = nil
			c.putLocked(b)
		case e.batch != nil:
			b := e.batch
			e.batch = nil
			if e.last {
				b.finishLocked(nil)
			}
		case e.msg != nil:
			read = e.msg
			e.msg = nil
		}
	}
	c.drainLocked()
	s.mu.Unlock()
	if read != nil {
		c.readDone(read)
	}
}

// peerGrace is how long a connection that cannot send any more waits for the peer's goodbye, whose reason is better, or for
// the news that it has died.
var peerGrace = 100 * time.Millisecond // a variable for tests

// failLater is fail after peerGrace. What the peer has refused comes before what follows from that.
func (c *Conn) failLater(err *CloseError) {
	time.AfterFunc(peerGrace, func() {
		if cause := c.cause.Load(); cause != nil {
			err = cause
		} else if (c.viaUDP || c.viaTCP) && !c.ended.Load() {
			if why := c.lostReason(); why != "" {
				err.Reason += ": " + why
			}
		}
		c.fail(err)
	})
}

// sendFailedLocked handles a request that failed; the queue pair is in the error state.
func (c *Conn) sendFailedLocked(seq uint32, wc *ib.WC) {
	s := &c.snd
	e := &s.sq[seq&uint32(len(s.sq)-1)]
	if c.ended.Load() {
		return
	}
	what := "a message"
	switch {
	case e.batch != nil:
		what = "a one-sided operation"
		if wc.Status != ib.WCFlushErr {
			e.batch.err = &verbs.WCError{WC: *wc, Op: "one-sided operation"}
		}
	case e.msg != nil:
		what = "reading a rendezvous"
	}
	gone := false
	switch wc.Status {
	case ib.WCFlushErr, ib.WCRetryExceeded, ib.WCResponseTimeoutErr, ib.WCRemoteAbortedErr:
		gone = true
	case ib.WCLocalQPOpErr: // siw says so of what it could not write to the socket (siw_qp_sq_process in siw_qp_tx.c)
		gone = c.p.needsCM()
	}
	if gone {
		err := &CloseError{Err: fmt.Errorf("%w: %w", ErrPeerDied, wc.Status), Reason: what + " could not be delivered"}
		c.failLater(err)
		return
	}
	err := &CloseError{Err: wc.Status, Reason: what + " failed"}
	switch wc.Status {
	case ib.WCRemoteAccessErr, ib.WCRemoteInvalidReqErr, ib.WCRemoteOpErr:
		// So do requests that reach a process while it dies: the kernel takes its memory away before its queue pairs.
		c.cause.CompareAndSwap(nil, err)
		c.failLater(err)
	default:
		c.fail(err)
	}
}

// Send sends msg, and returns when msg may be reused: it has been copied, and goes out in order as soon as the peer has
// room. It waits for a free buffer if SendDepth messages are under way. Messages above EagerSize are copied as well, into
// the poller's pool; SendBuffer and SendRegion spare the copy. The error is ctx's if that ended first; then the message
// was not sent.
func (c *Conn) Send(ctx context.Context, msg []byte) error {
	if len(msg) > c.maxMessage {
		return fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(msg), c.maxMessage)
	}
	s := &c.snd
	s.mu.Lock()
	b, err := c.takeLocked(len(msg))
	if err == nil && b.big == nil {
		copy(b.mem[headerLen:], msg)
		c.outLocked(b)
		err = c.postBufLocked(b, len(msg), false)
		s.mu.Unlock()
		return err
	}
	s.mu.Unlock()
	if err == ErrWouldBlock {
		b, err = c.Alloc(ctx, len(msg))
	}
	if err != nil {
		return err
	}
	copy(b.Bytes(), msg)
	return c.Post(b, len(msg))
}

// endSends gives back what the sending side holds, after the queue pair was closed. The role is held.
func (c *Conn) endSends(e *CloseError) {
	s := &c.snd
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = e
	s.cork.dropLocked(c)
	mask := uint32(len(s.sq) - 1)
	for ; s.tail != s.head; s.tail++ {
		en := s.sq[s.tail&mask]
		switch {
		case en.buf != nil:
			c.putLocked(en.buf)
		case en.batch != nil && en.last:
			en.batch.finishLocked(e)
		}
	}
	for b := s.pend; b != nil; {
		next := b.next
		if b.rel != nil {
			b.rel.Fail(e)
			b.rel = nil
		}
		c.putLocked(b)
		b = next
	}
	s.pend, s.pendTail = nil, nil
	for i := range s.rndv {
		if b := s.rndv[i].buf; b != nil {
			s.rndv[i].buf = nil
			if b.rel != nil {
				b.rel.Fail(e)
				b.rel = nil
			}
			c.putLocked(b)
		}
	}
	s.sq, s.ctrl, s.reads = nil, nil, nil
	c.dutyLocked()
	c.freeBufsLocked()
	for b := s.batches; b != nil; b = b.free {
		b.dropLocked()
	}
	s.batches = nil
	s.wakeAllLocked()
	if s.drained != nil {
		s.drained.Done()
		s.drained = nil
	}
	for range s.out { // buffers that are still with the user
		c.p.retain()
	}
}
