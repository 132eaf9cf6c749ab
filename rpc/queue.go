package rpc

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"
)

// ErrQueueFull is returned by Queue's Start methods while as many calls are in flight as the Queue has room for.
// Wait makes room.
var ErrQueueFull = errors.New("rpc: the queue has as many calls in flight as it is deep")

// Queue makes many calls from one goroutine: Start sends a request and returns, Wait collects what has been answered,
// in batches, with no goroutine per call and no switch between goroutines.
//
//	q, err := client.NewQueue(64)
//	for next := range work {
//		if q.Len() == 64 {
//			q.Wait(ctx, collect)
//		}
//		q.Start(ctx, method, next.request, next.tag)
//	}
//	for q.Len() > 0 {
//		q.Wait(ctx, collect)
//	}
//
// A Queue belongs to one goroutine at a time. In steady state its methods do not allocate.
type Queue struct {
	// Timeout is the deadline that travels with each call when the context given to Start has none; 0: none. The server
	// keeps to it; Wait ends with its own context.
	Timeout time.Duration
	// Batch is how many requests may go out together: Start keeps them back until there are so many, or until Wait, TryWait
	// or Flush is called, and Wait, once it has a result, polls for a moment until it has half as many. That makes a call
	// cheaper and its answer later. 0 and 1: each goes out at once. The transport posts at most 16 together.
	Batch int

	c        *Client
	kept     int     // requests that Start may have kept back
	slots    []*slot // all that the queue owns
	free     []*slot
	inFlight int
	closed   bool

	finished atomic.Uint32 // stack of answered slots: index + 1
	batch    uint32        // answered slots taken off finished, in order of arrival: index + 1
	w        waiter
}

// NewQueue returns a queue with room for depth calls in flight, which count towards ClientConfig.MaxInFlight. It fails
// with ResourceExhausted if there are not that many left. Close it to give them back.
func (c *Client) NewQueue(depth int) (*Queue, error) {
	if depth <= 0 {
		return nil, Errorf(InvalidArgument, "a queue of depth %d", depth)
	}
	if e := c.stopped.Load(); e != nil {
		return nil, e
	}
	q := &Queue{c: c}
	for range depth {
		s := c.popFree()
		if s == nil {
			for _, s := range q.slots {
				s.queue = nil
				c.releaseSlot(s)
			}
			return nil, Errorf(ResourceExhausted, "no %d more calls can be in flight: raise ClientConfig.MaxInFlight above %d", depth, c.cfg.MaxInFlight)
		}
		s.queue = q
		q.slots = append(q.slots, s)
	}
	q.free = append(make([]*slot, 0, depth), q.slots...)
	return q, nil
}

// Depth returns how many calls can be in flight.
func (q *Queue) Depth() int { return len(q.slots) }

// Len returns how many calls were started and not yet handed to Wait's function.
func (q *Queue) Len() int { return q.inFlight }

// Start sends a request; Wait will return its result under tag, which means nothing to the Queue. req is copied. Start
// waits only for a send slot, as long as the server takes no requests; ctx bounds that, and its deadline travels with
// the call. With Depth calls in flight it returns ErrQueueFull.
func (q *Queue) Start(ctx context.Context, m Method, req []byte, tag uint64) error {
	s, buf, err := q.prepare(ctx, len(req))
	if err != nil {
		return err
	}
	copy(buf.b[headerLen:], req)
	return q.send(ctx, s, buf, m, len(req), tag)
}

// StartFunc is Start for a request of n bytes that fill writes straight into the memory it is sent from. If fill fails,
// nothing is sent.
func (q *Queue) StartFunc(ctx context.Context, m Method, n int, fill func(req []byte) error, tag uint64) error {
	s, buf, err := q.prepare(ctx, n)
	if err != nil {
		return err
	}
	filled := false
	defer func() {
		if !filled {
			q.c.link.discard(buf)
			q.put(s)
		}
	}()
	if err := fill(buf.b[headerLen : headerLen+n : headerLen+n]); err != nil {
		return err
	}
	if q.closed { // by fill
		return errQueueClosed
	}
	filled = true
	return q.send(ctx, s, buf, m, n, tag)
}

// StartMessage is Start for a protobuf message, marshalled straight into the memory it is sent from. The function
// given to Wait unmarshals the response.
func (q *Queue) StartMessage(ctx context.Context, m Method, req proto.Message, tag uint64) error {
	return q.StartFunc(ctx, m, proto.Size(req), func(b []byte) error { return marshalInto(b, req) }, tag)
}

func (q *Queue) prepare(ctx context.Context, n int) (*slot, sendBuf, error) {
	if q.closed {
		return nil, sendBuf{}, errQueueClosed
	}
	if len(q.free) == 0 {
		return nil, sendBuf{}, ErrQueueFull
	}
	if e := q.c.stopped.Load(); e != nil {
		return nil, sendBuf{}, unsent(e)
	}
	buf, err := q.c.requestBuf(ctx, headerLen, n)
	if err != nil {
		return nil, sendBuf{}, err
	}
	s := q.free[len(q.free)-1]
	q.free = q.free[:len(q.free)-1]
	return s, buf, nil
}

var errQueueClosed = &Error{Code: FailedPrecondition, Message: "the queue is closed", NotExecuted: true}

func (q *Queue) send(ctx context.Context, s *slot, buf sendBuf, m Method, n int, tag uint64) error {
	h := header{kind: kindRequest, word: uint32(m), payload: n}
	if h.timeout = timeoutOf(ctx); h.timeout == 0 && q.Timeout > 0 {
		h.timeout = timeoutMicros(q.Timeout)
	}
	if q.c.cfg.Metrics {
		s.mm = q.c.methodMetrics(m)
		s.start = s.mm.begin()
	}
	s.tag = tag
	q.kept++
	more := q.kept < q.Batch
	if !more {
		q.kept = 0
	}
	if err := q.c.send(s, buf, &h, more); err != nil {
		q.c.clear(s)
		q.put(s)
		return err
	}
	q.inFlight++
	return nil
}

// Flush sends what Start has kept back; see Batch. An error means that the connection is lost, which Wait tells as well.
func (q *Queue) Flush() error {
	if q.kept == 0 {
		return nil
	}
	q.kept = 0
	return unavailable(q.c.link.flush())
}

// completed is told by whoever received the result of s.
func (q *Queue) completed(s *slot) {
	for {
		old := q.finished.Load()
		s.next.Store(old)
		if q.finished.CompareAndSwap(old, s.index+1) { // pairs with the swap in collect
			if old == 0 {
				q.w.Done()
			}
			return
		}
	}
}

// collect moves what has been answered to batch, which is empty, oldest first.
func (q *Queue) collect() bool {
	head := q.finished.Swap(0)
	for head != 0 {
		s := q.c.slotAt(head - 1)
		next := s.next.Load()
		s.next.Store(q.batch)
		head, q.batch = next, head
	}
	return q.batch != 0
}

// Wait hands every result that is there to fn, and waits for one first if there is none. It returns how many it handed
// over. resp is lent until fn returns; err is the call's, and one call's failure is not Wait's. fn may call Start.
//
// Wait returns an error, and no results, if ctx ends first; calls stay in flight then. With no calls in flight it
// returns 0 at once.
func (q *Queue) Wait(ctx context.Context, fn func(tag uint64, resp []byte, err error)) (int, error) {
	if q.inFlight == 0 {
		return 0, nil
	}
	_ = q.Flush() // if it fails, the calls do
	for q.batch == 0 && !q.collect() {
		q.w.Reset()
		if q.collect() { // pairs with completed: it pushes first and calls Done then
			break
		}
		if err := q.c.link.wait(ctx, &q.w); err != nil && !q.collect() {
			return 0, callError(err)
		}
		q.gather()
	}
	n := 0
	for q.batch != 0 {
		s := q.c.slotAt(q.batch - 1)
		q.batch = s.next.Load()
		q.deliver(s, fn)
		n++
	}
	return n, nil
}

// gather polls a little longer for a batch's worth of results: one at a time, each would cost the time that its cache
// lines take from the server's core, and so would each request that follows it.
func (q *Queue) gather() {
	if q.Batch <= 1 {
		return
	}
	want := min(q.Batch, q.inFlight) / 2
	for idle := 0; want > 0 && idle < 16; idle++ {
		if n := q.c.link.poll(); n > 0 {
			want -= n
			idle = 0
		}
	}
}

// TryWait is Wait without waiting: it polls once and hands over what is there.
func (q *Queue) TryWait(fn func(tag uint64, resp []byte, err error)) int {
	if q.inFlight == 0 {
		return 0
	}
	_ = q.Flush()
	if q.batch == 0 && !q.collect() {
		q.c.link.poll()
		q.collect()
	}
	n := 0
	for q.batch != 0 {
		s := q.c.slotAt(q.batch - 1)
		q.batch = s.next.Load()
		q.deliver(s, fn)
		n++
	}
	return n
}

// put gives a slot back: to the client, if the queue was closed meanwhile by one of its user's functions.
func (q *Queue) put(s *slot) {
	if q.closed {
		s.queue = nil
		q.c.releaseSlot(s)
		return
	}
	q.free = append(q.free, s)
}

func (q *Queue) deliver(s *slot, fn func(tag uint64, resp []byte, err error)) {
	q.inFlight--
	defer func() { // also when fn panics
		q.c.clear(s)
		q.put(s)
	}()
	if s.mm != nil {
		s.mm.end(s.start, CodeOf(s.err))
	}
	if s.err != nil {
		fn(s.tag, nil, s.err)
		return
	}
	fn(s.tag, s.body, nil)
}

// Close gives up the calls in flight, whose results are lost, and gives the queue's slots back to the client. It always
// returns nil.
func (q *Queue) Close() error {
	if q.closed {
		return nil
	}
	q.closed = true
	_ = q.Flush()
	for _, s := range q.slots {
		if s.giveUp() {
			q.c.cancel(s.id())
			q.inFlight--
			q.c.clear(s)
			q.free = append(q.free, s)
		}
	}
	for q.inFlight > 0 { // results that are there, or arriving this moment
		_, _ = q.Wait(context.Background(), func(uint64, []byte, error) {})
	}
	for _, s := range q.free {
		s.queue = nil
		q.c.releaseSlot(s)
	}
	q.free = nil
	return nil
}
