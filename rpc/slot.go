package rpc

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/internal/ring"
)

// The calls in flight of a Client.

// smallBody is the size of responses that are copied out of the receive slot at once: cheaper than keeping the slot.
const smallBody = 128

// A slot is a call in flight. Its state holds the generation of the call in the high half and a phase in the low half;
// whoever moves it out of phasePending owns the result, so a late response finds another generation or phase and is
// dropped. The result is published by the Waiter, or by the Queue's list.
//
//	free -> pending -> answered -> pending ...      pending -> free (the caller gave up)
type slot struct {
	state uint64

	// Written by who has moved the slot to phaseAnswered, read by the caller after that was published.
	body  []byte
	msg   message
	holds bool
	err   error

	index uint32
	next  atomic.Uint32 // free list and Queue lists: index + 1 of the next slot
	queue *Queue        // nil: a blocking call
	tag   uint64
	start time.Time
	mm    *methodMetrics
	w     waiter // Done is called once for each answered call, and not otherwise
	small [smallBody]byte
}

const (
	phaseFree uint32 = iota
	phasePending
	phaseAnswered
)

func slotState(gen, phase uint32) uint64 { return uint64(gen)<<32 | uint64(phase) }

// begin starts a new generation of a slot and returns its call id. Only the slot's owner calls it.
func (s *slot) begin() uint64 {
	gen := uint32(atomic.LoadUint64(&s.state)>>32) + 1
	ring.StoreRel64(&s.state, slotState(gen, phasePending)) // before the request is posted; see Client.send
	return makeID(s.index, gen)
}

func (s *slot) id() uint64 { return makeID(s.index, uint32(atomic.LoadUint64(&s.state)>>32)) }

// giveUp ends a pending call. It returns false if a result has arrived or is arriving.
func (s *slot) giveUp() bool {
	gen := uint32(atomic.LoadUint64(&s.state) >> 32)
	return atomic.CompareAndSwapUint64(&s.state, slotState(gen, phasePending), slotState(gen, phaseFree))
}

// claim gives the caller the right to write the result of call generation gen.
func (s *slot) claim(gen uint32) bool {
	return atomic.CompareAndSwapUint64(&s.state, slotState(gen, phasePending), slotState(gen, phaseAnswered))
}

// publish hands the result that was written after claim to the caller.
func (s *slot) publish() {
	if s.queue != nil {
		s.queue.completed(s)
		return
	}
	s.w.Done()
}

// chunk is how many slots are made at a time.
type chunk [chunkSize]slot

const (
	chunkBits = 4
	chunkSize = 1 << chunkBits
)

// slotAt returns the slot with an index that exists.
func (c *Client) slotAt(i uint32) *slot { return &c.chunks[i>>chunkBits].Load()[i%chunkSize] }

// grow makes another chunk of slots, if there may be more. It returns the first of them; the others are free.
func (c *Client) grow() *slot {
	c.growMu.Lock()
	defer c.growMu.Unlock()
	first := c.nslots
	n := min(chunkSize, c.cfg.MaxInFlight-first)
	if n <= 0 {
		return nil
	}
	ch := new(chunk)
	for i := range ch {
		ch[i].index = uint32(first + i)
	}
	c.chunks[first>>chunkBits].Store(ch)
	c.nslots += n
	for i := n - 1; i > 0; i-- {
		c.pushStack(&ch[i]) // so that the first ones are used first, and again and again
	}
	return &ch[0]
}

// Free slots: a place for one, which is all that a single caller needs, and a stack.

func (c *Client) pushFree(s *slot) {
	if c.hot.Load() != 0 || !c.hot.CompareAndSwap(0, s.index+1) {
		c.pushStack(s)
	}
}

func (c *Client) pushStack(s *slot) {
	for {
		old := c.free.Load()
		s.next.Store(uint32(old))
		if c.free.CompareAndSwap(old, (old>>32+1)<<32|uint64(s.index+1)) {
			return
		}
	}
}

func (c *Client) popFree() *slot {
	if i := c.hot.Load(); i != 0 && c.hot.CompareAndSwap(i, 0) {
		return c.slotAt(i - 1)
	}
	for {
		old := c.free.Load()
		if uint32(old) == 0 {
			return c.grow()
		}
		s := c.slotAt(uint32(old) - 1)
		if c.free.CompareAndSwap(old, (old>>32+1)<<32|uint64(s.next.Load())) {
			return s
		}
	}
}

// acquire returns a free slot; it waits for one if all are in use.
func (c *Client) acquire(ctx context.Context) (*slot, error) {
	if e := c.stopped.Load(); e != nil {
		return nil, e
	}
	if s := c.popFree(); s != nil {
		return s, nil
	}
	c.waiting.Add(1) // pairs with the load in releaseSlot: a slot is given back either before our next look or to us
	defer c.waiting.Add(-1)
	ch := make(chan struct{}, 1)
	for {
		c.waitMu.Lock()
		c.waitList = append(c.waitList, ch)
		c.waitMu.Unlock()
		s := c.popFree()
		if s == nil {
			select {
			case <-ch:
				if s = c.popFree(); s == nil {
					continue
				}
				return s, nil
			case <-ctx.Done():
				c.leaveWaitList(ch)
				return nil, callError(ctx.Err())
			case <-c.ended:
				c.leaveWaitList(ch)
				return nil, c.stopped.Load()
			}
		}
		c.leaveWaitList(ch)
		return s, nil
	}
}

// leaveWaitList takes ch out; a wake-up that it got already goes to the next in line.
func (c *Client) leaveWaitList(ch chan struct{}) {
	c.waitMu.Lock()
	for i, w := range c.waitList {
		if w == ch {
			c.waitList = append(c.waitList[:i], c.waitList[i+1:]...)
			c.waitMu.Unlock()
			return
		}
	}
	c.waitMu.Unlock()
	select {
	case <-ch:
		c.wakeOne()
	default:
	}
}

func (c *Client) wakeOne() {
	c.waitMu.Lock()
	if len(c.waitList) > 0 {
		c.waitList[0] <- struct{}{}
		c.waitList = append(c.waitList[:0], c.waitList[1:]...)
	}
	c.waitMu.Unlock()
}

// releaseSlot gives back a slot that has no call.
func (c *Client) releaseSlot(s *slot) {
	c.pushFree(s)
	if c.waiting.Load() != 0 {
		c.wakeOne()
	}
}

// clear gives back what a finished call's result holds.
func (c *Client) clear(s *slot) {
	if s.holds {
		c.link.release(s.msg)
		c.held.Add(-1)
		s.msg, s.holds = message{}, false
	}
	s.body, s.err, s.mm = nil, nil, nil
}
