package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/ringside-rdma/ringside/transport"
)

// ClientConfig holds a client's limits. The zero value, and nil, mean the defaults.
type ClientConfig struct {
	// MaxInFlight is how many calls can be in flight at once, those of Queues included; default 1024. Further calls wait
	// for one to end. Each costs about 350 bytes, from the first time that so many are in flight.
	MaxInFlight int
	// Metrics turns counters and latency histograms by method on; see Client.Stats. Off by default.
	Metrics bool
}

// maxInFlightLimit keeps slot indices within a frame's half of a call id, and memory within reason.
const maxInFlightLimit = 1 << 20

func (c *ClientConfig) withDefaults() ClientConfig {
	var d ClientConfig
	if c != nil {
		d = *c
	}
	if d.MaxInFlight <= 0 {
		d.MaxInFlight = 1024
	}
	d.MaxInFlight = min(d.MaxInFlight, maxInFlightLimit)
	return d
}

// Client makes calls over one connection. It is safe for concurrent use by any number of goroutines.
//
// A call sends its request and then drives the connection's poller itself until its response is there, unless another
// goroutine does so already: one call in flight costs no switch of goroutines.
type Client struct {
	link       link
	conn       *transport.Conn // what link stands on; nil in tests
	cfg        ClientConfig
	maxMessage int
	maxHeld    int32

	chunks []atomic.Pointer[chunk] // the slots; later chunks are made when they are needed
	growMu sync.Mutex
	nslots int // guarded by growMu

	hot  atomic.Uint32 // index + 1 of a free slot, or 0
	free atomic.Uint64 // stack of free slots: index + 1 in the low half, a counter against ABA in the high half
	held atomic.Int32  // receive slots that undelivered responses hold
	out  outbox

	stopped atomic.Pointer[Error] // set once: why no call can start any more

	waiting  atomic.Int32 // goroutines in waitQueue, or about to be
	waitMu   sync.Mutex
	waitList []chan struct{}

	nameMu  sync.Mutex // writers of names and metrics
	names   atomic.Pointer[map[string]Method]
	metrics atomic.Pointer[map[Method]*methodMetrics]

	closeOnce sync.Once
	closed    atomic.Bool
	ended     chan struct{} // closed when the connection has ended
}

func newClient(l link, conn *transport.Conn, cfg *ClientConfig) *Client {
	c := &Client{link: l, conn: conn, cfg: cfg.withDefaults(), maxMessage: l.maxMessage(), ended: make(chan struct{})}
	c.maxHeld = int32(l.recvDepth() / 4)
	c.chunks = make([]atomic.Pointer[chunk], (c.cfg.MaxInFlight+chunkSize-1)/chunkSize)
	c.pushFree(c.grow())
	c.out = outbox{link: l, limit: outboxLimit, onStall: func(error) {}}
	l.setHandler(c)
	return c
}

// Sending.

// requestBuf returns a send slot for a request with n bytes of payload after head bytes.
func (c *Client) requestBuf(ctx context.Context, head, n int) (sendBuf, error) {
	if n > c.maxMessage-head {
		return sendBuf{}, &Error{Code: ResourceExhausted, NotExecuted: true,
			Message: fmt.Sprintf("a request of %d bytes is over the connection's maximum of %d", n, c.maxMessage-head)}
	}
	buf, err := c.link.tryAlloc(head + n)
	if err == nil {
		return buf, nil
	}
	if errors.Is(err, errWouldBlock) {
		if buf, err = c.link.alloc(ctx, head+n); err == nil {
			return buf, nil
		}
	}
	return sendBuf{}, unsent(err)
}

// timeoutOf returns what a request's timeout field says for ctx.
func timeoutOf(ctx context.Context) uint64 {
	d, ok := ctx.Deadline()
	if !ok {
		return 0
	}
	return timeoutMicros(time.Until(d))
}

// send posts buf as a request of slot s, which is pending from here on. If it fails, the slot is free again.
// With more set, the request may be kept back until link.flush.
func (c *Client) send(s *slot, buf sendBuf, h *header, more bool) error {
	h.id = s.begin()
	putHeader(buf.b, h)
	n := headerLen + h.bulk*bulkLen + h.payload
	var err error
	if more {
		err = c.link.postMore(buf, n)
	} else {
		err = c.link.post(buf, n)
	}
	if err != nil && s.giveUp() {
		return unsent(err)
	}
	// Pairs with handleClose: it sees the pending slot, or we see that it is closed. The store in begin is visible before
	// this load, because post takes a lock between the two.
	if c.closed.Load() && s.giveUp() {
		return c.stopped.Load()
	}
	return nil // or handleClose has the slot: await finds its verdict
}

// await waits for the result of s. If it returns nil, the result is there; else the call was given up.
func (c *Client) await(ctx context.Context, s *slot) error {
	err := c.link.wait(ctx, &s.w)
	if err == nil {
		return nil
	}
	if !s.giveUp() {
		c.settle(s)
		return nil
	}
	c.cancel(s.id())
	return callError(err)
}

// settle waits for a result that is arriving this moment.
func (c *Client) settle(s *slot) {
	_ = c.link.wait(context.Background(), &s.w)
}

// cancel tells the server that nobody waits for the call any more.
func (c *Client) cancel(id uint64) {
	var b [headerLen]byte
	putHeader(b[:], &header{kind: kindCancel, id: id})
	_ = c.out.send(b[:]) // without it the server finishes the call in vain
}

// callError turns an error of the connection or of a context into the call's.
func callError(err error) error {
	var e *Error
	if errors.As(err, &e) {
		return err
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return &Error{Code: DeadlineExceeded, Message: "the deadline passed before the response came", cause: err}
	case errors.Is(err, context.Canceled):
		return &Error{Code: Canceled, Message: "the caller canceled", cause: err}
	}
	return unavailable(err)
}

// unsent is callError for a call whose request did not leave.
func unsent(err error) error {
	e := FromError(callError(err))
	if !e.NotExecuted {
		c := *e
		c.NotExecuted = true
		e = &c
	}
	return e
}

// Calls.

// CallRaw calls method m with req and waits for the response, which it hands to fn: resp is lent until fn returns. req
// is copied before CallRaw waits. fn may be nil. Its error becomes CallRaw's.
//
// If ctx has a deadline, it travels with the call. If ctx ends first, CallRaw returns at once, the server is told, and
// a response that comes later is dropped. In steady state CallRaw does not allocate.
func (c *Client) CallRaw(ctx context.Context, m Method, req []byte, fn func(resp []byte) error) error {
	s, buf, err := c.prepare(ctx, headerLen, len(req))
	if err != nil {
		return err
	}
	copy(buf.b[headerLen:], req)
	return c.finishRaw(ctx, s, buf, m, len(req), fn)
}

// CallFunc is CallRaw for a request of n bytes that fill writes straight into the memory it is sent from: no copy is
// made. If fill fails, nothing is sent, and CallFunc returns its error.
func (c *Client) CallFunc(ctx context.Context, m Method, n int, fill func(req []byte) error, fn func(resp []byte) error) error {
	s, buf, err := c.prepare(ctx, headerLen, n)
	if err != nil {
		return err
	}
	if err := c.fill(s, buf, n, fill); err != nil {
		return err
	}
	return c.finishRaw(ctx, s, buf, m, n, fn)
}

// fill runs fill on buf; if that fails or panics, buf and s are given back.
func (c *Client) fill(s *slot, buf sendBuf, n int, fill func(req []byte) error) (err error) {
	filled := false
	defer func() {
		if !filled {
			c.unprepare(s, buf)
		}
	}()
	if err := fill(buf.b[headerLen : headerLen+n : headerLen+n]); err != nil {
		return err
	}
	filled = true
	return nil
}

// prepare returns a slot and a send slot for a call with head bytes of header and descriptors and n of request.
func (c *Client) prepare(ctx context.Context, head, n int) (*slot, sendBuf, error) {
	if err := ctx.Err(); err != nil {
		return nil, sendBuf{}, unsent(err)
	}
	s, err := c.acquire(ctx)
	if err != nil {
		return nil, sendBuf{}, unsent(err)
	}
	buf, err := c.requestBuf(ctx, head, n)
	if err != nil {
		c.releaseSlot(s)
		return nil, sendBuf{}, err
	}
	s.w.Reset()
	return s, buf, nil
}

// unprepare gives back what prepare returned.
func (c *Client) unprepare(s *slot, buf sendBuf) {
	c.link.discard(buf)
	c.clear(s)
	c.releaseSlot(s)
}

func (c *Client) finishRaw(ctx context.Context, s *slot, buf sendBuf, m Method, n int, fn func(resp []byte) error) error {
	if err := c.roundTrip(ctx, s, buf, &header{kind: kindRequest, word: uint32(m), payload: n}); err != nil {
		return err
	}
	defer c.finish(s)
	if s.err != nil {
		return s.err
	}
	if fn == nil {
		return nil
	}
	return fn(s.body)
}

// roundTrip sends buf and waits. If it returns nil, s is done and has to be given to finish; else it is given back.
func (c *Client) roundTrip(ctx context.Context, s *slot, buf sendBuf, h *header) error {
	if h.kind == kindRequest {
		h.timeout = timeoutOf(ctx)
		if c.cfg.Metrics {
			s.mm = c.methodMetrics(Method(h.word))
			s.start = s.mm.begin()
		}
	}
	err := c.send(s, buf, h, false)
	if err == nil {
		err = c.await(ctx, s)
	}
	if err != nil {
		s.mm.end(s.start, CodeOf(err))
		c.clear(s)
		c.releaseSlot(s)
	}
	return err
}

// finish gives back a done slot.
func (c *Client) finish(s *slot) {
	if s.mm != nil {
		s.mm.end(s.start, CodeOf(s.err))
	}
	c.clear(s)
	c.releaseSlot(s)
}

// Method returns the number of the method with a name on this connection. The server is asked the first time.
func (c *Client) Method(ctx context.Context, name string) (Method, error) {
	if names := c.names.Load(); names != nil {
		if m, ok := (*names)[name]; ok {
			return m, nil
		}
	}
	if err := checkMethodName(name); err != nil {
		return 0, &Error{Code: InvalidArgument, Message: err.Error(), NotExecuted: true}
	}
	s, buf, err := c.prepare(ctx, headerLen, len(name))
	if err != nil {
		return 0, err
	}
	copy(buf.b[headerLen:], name)
	if err := c.roundTrip(ctx, s, buf, &header{kind: kindResolve, payload: len(name)}); err != nil {
		return 0, err
	}
	defer c.finish(s)
	if s.err != nil {
		return 0, s.err
	}
	if len(s.body) != 4 {
		err := frameError("answer to resolve has %d bytes", len(s.body))
		c.fail(err)
		return 0, unavailable(err)
	}
	m := Method(getUint32(s.body))
	c.nameMu.Lock()
	defer c.nameMu.Unlock()
	names := make(map[string]Method)
	if old := c.names.Load(); old != nil {
		for k, v := range *old {
			names[k] = v
		}
	}
	names[name] = m
	c.names.Store(&names)
	return m, nil
}

// Call calls the method with a name: req is marshalled straight into the memory it is sent from, and the response
// unmarshalled into resp from where it was received. A nil resp ignores the response's content.
func (c *Client) Call(ctx context.Context, name string, req, resp proto.Message) error {
	m, err := c.Method(ctx, name)
	if err != nil {
		return err
	}
	return c.CallMethod(ctx, m, req, resp)
}

// CallMethod is Call for a method that is known by number, or by what Client.Method returned.
func (c *Client) CallMethod(ctx context.Context, m Method, req, resp proto.Message) error {
	n := proto.Size(req)
	s, buf, err := c.prepare(ctx, headerLen, n)
	if err != nil {
		return err
	}
	if err := marshalInto(buf.b[headerLen:headerLen+n:headerLen+n], req); err != nil {
		c.unprepare(s, buf)
		return &Error{Code: Internal, Message: "request: " + err.Error(), NotExecuted: true, cause: err}
	}
	if err := c.roundTrip(ctx, s, buf, &header{kind: kindRequest, word: uint32(m), payload: n}); err != nil {
		return err
	}
	defer c.finish(s)
	if s.err != nil || resp == nil {
		return s.err
	}
	if err := unmarshal(s.body, resp); err != nil {
		return &Error{Code: Internal, Message: "response: " + err.Error(), cause: err}
	}
	return nil
}

// Events from the connection.

// handleMessage implements linkHandler: it runs on the goroutine that polls.
func (c *Client) handleMessage(m message) {
	h, err := parseHeader(m.b)
	if err != nil {
		c.fail(err)
		return
	}
	switch h.kind {
	case kindResponse:
		c.response(m, &h)
	case kindGoAway:
		e, err := parseStatus(h.word, 0, m.b[headerLen:])
		if err != nil {
			c.fail(err)
			return
		}
		c.stop(&Error{Code: Unavailable, Message: goAwayText(e), NotExecuted: true})
	default:
		c.fail(frameError("%v sent to a client", h.kind))
	}
}

func goAwayText(e *Error) string {
	if e.Message == "" {
		return "the server takes no more calls"
	}
	return "the server takes no more calls: " + e.Message
}

func (c *Client) response(m message, h *header) {
	index, gen := splitID(h.id)
	var ch *chunk
	if i := index >> chunkBits; i < uint32(len(c.chunks)) {
		ch = c.chunks[i].Load()
	}
	if ch == nil {
		c.fail(frameError("response: call id %#x was never used", h.id))
		return
	}
	s := &ch[index%chunkSize]
	if !s.claim(gen) {
		return // late: the caller gave up
	}
	body := m.b[headerLen:]
	switch {
	case h.word != uint32(OK):
		e, err := parseStatus(h.word, h.flags, body)
		if err != nil {
			s.err = unavailable(err)
			s.publish()
			c.fail(err)
			return
		}
		s.err = e
	case len(body) <= smallBody:
		s.body = s.small[:copy(s.small[:], body)]
	case c.held.Add(1) <= c.maxHeld:
		s.msg, s.holds = c.link.take(m), true
		s.body = s.msg.b[headerLen:]
	default:
		// Responses that nobody has picked up yet hold half of the receive slots; the rest must stay in motion.
		c.held.Add(-1)
		s.body = append([]byte(nil), body...)
	}
	s.publish()
}

// stop makes further calls fail with e; the first reason stands.
func (c *Client) stop(e *Error) { c.stopped.CompareAndSwap(nil, e) }

// fail closes the connection because of something that the server did.
func (c *Client) fail(err error) {
	c.link.abort(err)
	c.handleClose(err)
}

// handleClose implements linkHandler: every call in flight ends with Unavailable.
func (c *Client) handleClose(err error) { c.end(err, false) }

// end ends every call in flight with Unavailable. notExecuted: none of them has reached a handler.
func (c *Client) end(err error, notExecuted bool) {
	c.closeOnce.Do(func() {
		if err == nil {
			err = net.ErrClosed
		}
		e := &Error{Code: Unavailable, Message: "connection lost: " + err.Error(), NotExecuted: notExecuted, cause: err}
		c.stop(e)
		c.closed.Store(true) // before the sweep: pairs with send
		close(c.ended)
		c.out.close()
		for i := range c.chunks {
			ch := c.chunks[i].Load()
			if ch == nil {
				break
			}
			for j := range ch {
				s := &ch[j]
				st := atomic.LoadUint64(&s.state)
				if gen := uint32(st >> 32); uint32(st) == phasePending && s.claim(gen) {
					s.err = e
					s.publish()
				}
			}
		}
	})
}

// handleEOF implements linkHandler: a server that sends no more answers no more. If it has said before that it would go, it has answered
// all that it has executed.
func (c *Client) handleEOF() {
	c.end(errServerEOF, c.stopped.Load() != nil)
	c.link.abort(errServerEOF)
}

var errServerEOF = fmt.Errorf("the server closed the connection: %w", io.EOF)

// Close closes the connection. Calls in flight end with Unavailable. It can be called again.
func (c *Client) Close() error {
	c.handleClose(errClientClosed)
	return c.link.closeGently()
}

var errClientClosed = fmt.Errorf("rpc: client is closed: %w", net.ErrClosed)

// Stats returns the counters of every method called so far, in no order; nil unless ClientConfig.Metrics is set. Name is
// empty for methods that were called by number.
func (c *Client) Stats() []MethodStats {
	mm := c.metrics.Load()
	if mm == nil {
		return nil
	}
	byNumber := make(map[Method]string)
	if names := c.names.Load(); names != nil {
		for name, m := range *names {
			byNumber[m] = name
		}
	}
	var st []MethodStats
	for m, v := range *mm {
		st = append(st, v.snapshot(m, byNumber[m]))
	}
	return st
}

// methodMetrics returns the counters of m, making them at first use.
func (c *Client) methodMetrics(m Method) *methodMetrics {
	if mm := c.metrics.Load(); mm != nil {
		if v, ok := (*mm)[m]; ok {
			return v
		}
	}
	c.nameMu.Lock()
	defer c.nameMu.Unlock()
	next := make(map[Method]*methodMetrics)
	if old := c.metrics.Load(); old != nil {
		if v, ok := (*old)[m]; ok {
			return v
		}
		for k, v := range *old {
			next[k] = v
		}
	}
	v := new(methodMetrics)
	next[m] = v
	c.metrics.Store(&next)
	return v
}
