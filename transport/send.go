package transport

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/mr"
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
	mu        sync.Mutex
	err       error // why nothing can be sent any more
	closing   bool  // CloseWrite was called
	eosDue    bool  // and the EOS is still to be sent
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

	// spare is a free buffer of class small that changes hands without mu. Such buffers lie on the Go heap: nothing must
	// be given back when the connection ends.
	spare atomic.Pointer[SendBuf]

	small, slots, big bufClass
	arena             *arena
	out               int // SendBufs with the user, but for class small

	rndv     []rndvOut
	rndvFree []uint16

	batches *Batch // free ones, for single operations

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

// rndvOut is a rendezvous whose source the peer may be reading.
type rndvOut struct {
	buf       *SendBuf
	gen       uint16
	cancelled bool
}

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

const (
	bufFree  uint8 = iota
	bufOwned       // by the user
	bufQueued
	bufInFlight
)

// Bytes is the memory to write the message to: as many bytes as were asked for. Only its owner may touch it, and not after Post.
func (b *SendBuf) Bytes() []byte {
	if b.big != nil {
		return b.mem[:b.n]
	}
	return b.mem[headerLen : headerLen+b.n]
}

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

// TryAlloc returns a buffer for a message of n bytes. It does not block: without a free one it returns ErrWouldBlock.
// Handlers may call it. Above EagerSize the buffer comes from the poller's pool.
func (c *Conn) TryAlloc(n int) (*SendBuf, error) {
	if n < 0 || n > c.maxMessage {
		return nil, ErrTooLarge
	}
	s := &c.snd
	if n <= c.inline {
		if b := s.spare.Load(); b != nil && s.spare.CompareAndSwap(b, nil) {
			b.n = n
			b.state = bufOwned
			return b, nil // if the connection has ended, Post says so
		}
	}
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
	b := cl.free
	if b == nil && cl == &s.small {
		if b = s.spare.Swap(nil); b != nil {
			b.n = n
			b.state = bufOwned
			return b, nil
		}
	}
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
	if b.class == &c.snd.small && b.class.waiting.head == nil && c.snd.spare.Load() == nil {
		c.snd.spare.Store(b) // only putLocked fills it
		return
	}
	if b.big != nil {
		big := b.big
		b.big, b.mem = nil, nil
		big.Release()
		c.p.unstall()
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
func (s *sendSide) wakeAllLocked(error) {
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

// Post sends the first n bytes of b, at most as many as were asked for. It never blocks: without credit the message is
// queued, and goes out in order when the peer returns some. b belongs to the Conn, in every outcome. Handlers may call it.
func (c *Conn) Post(b *SendBuf, n int) error {
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
	err := c.postBufLocked(b, n)
	s.mu.Unlock()
	return err
}

func (c *Conn) postBufLocked(b *SendBuf, n int) error {
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
		return nil
	}
	return c.transmitLocked(b)
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

// transmitLocked sends b; canSendLocked was true.
func (c *Conn) transmitLocked(b *SendBuf) error {
	s := &c.snd
	s.credits--
	flags := uint8(0)
	if s.credits == 0 {
		flags = flagLow
		s.lowTold = true
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
		// A signal soon, if buffers are getting scarce: only completions give them back.
		e := s.entry()
		e.buf = b
		if err := c.postLocked(2*(s.slots.nfree+s.slots.max-s.slots.n) <= s.slots.max); err != nil {
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

// postLocked posts s.wr[0], filled in but for ID and Flags. There is room.
func (c *Conn) postLocked(signal bool) error {
	s := &c.snd
	wr := &s.wr[0]
	wr.Flags = 0
	s.unsig++
	if signal || s.unsig >= s.sigEvery {
		s.unsig = 0
		wr.Flags = ib.SendSignaled
	}
	wr.ID = c.idBase | uint64(s.head)
	if _, err := c.q.PostSend(s.wr[:]); err != nil {
		if s.err == nil {
			s.err = &CloseError{Err: err}
			c.fail(s.err)
		}
		return s.err
	}
	s.head++
	return nil
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
		c.transmitLocked(b)
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

// addCredits takes the credits that the peer returned.
func (c *Conn) addCredits(n uint32) {
	s := &c.snd
	s.mu.Lock()
	s.credits += n
	s.lowTold = false
	if s.credits > s.window {
		s.mu.Unlock()
		c.fail(protocolErrorf("%d credits of a window of %d", s.credits, s.window))
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

// peerGrace is how long a connection that cannot send any more waits for the peer's goodbye: its reason is better.
const peerGrace = 100 * time.Millisecond

// failLater is fail after peerGrace.
func (c *Conn) failLater(err *CloseError) {
	time.AfterFunc(peerGrace, func() { c.fail(err) })
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
	switch wc.Status {
	case ib.WCFlushErr, ib.WCRetryExceeded, ib.WCResponseTimeoutErr, ib.WCRemoteAbortedErr:
		err := &CloseError{Err: fmt.Errorf("%w: %w", ErrPeerDied, wc.Status), Reason: what + " could not be delivered"}
		c.failLater(err)
	default:
		c.fail(&CloseError{Err: wc.Status, Reason: what + " failed"})
	}
}

// finRendezvous handles a FIN. The role is held.
func (c *Conn) finRendezvous(id uint32, cancelled bool) {
	s := &c.snd
	i, gen := splitRndvID(id)
	s.mu.Lock()
	if i >= len(s.rndv) || s.rndv[i].buf == nil || s.rndv[i].gen != gen || cancelled && !s.rndv[i].cancelled {
		s.mu.Unlock()
		c.fail(protocolErrorf("FIN for rendezvous %#x, which is not open", id))
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
		err = c.postBufLocked(b, len(msg))
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
	b, err := c.allocForeign(ctx)
	if err != nil {
		return err
	}
	var w Waiter
	s := &c.snd
	s.mu.Lock()
	s.out--
	b.n, b.mem, b.rel = n, nil, &w
	b.key = m.RemoteRange(off, n)
	b.key.Access = ib.AccessRemoteRead
	if err = c.postBufLocked(b, n); err != nil {
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

// endSends gives back what the sending side holds, after the queue pair was closed. The role is held.
func (c *Conn) endSends(e *CloseError) {
	s := &c.snd
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = e
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
	s.wakeAllLocked(e)
	if s.drained != nil {
		s.drained.Done()
		s.drained = nil
	}
	for range s.out { // buffers that are still with the user
		c.p.retain()
	}
}
