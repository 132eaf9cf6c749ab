package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/transport"
)

// ErrServerClosed is returned by Serve and ServeConn after Shutdown or Close.
var ErrServerClosed = fmt.Errorf("rpc: server is closed: %w", net.ErrClosed)

// ServerConfig holds a server's limits. The zero value, and nil, mean the defaults.
type ServerConfig struct {
	// MaxConcurrent is how many handlers run at once on the server's workers; default 64. Inline handlers are not counted:
	// there is at most one at a time for each poller.
	MaxConcurrent int
	// MaxQueue is how many requests wait for a worker, over all connections; default 1024. A request beyond it is answered
	// with ResourceExhausted, flagged as not executed, without running its handler. -1: none may wait.
	MaxQueue int
	// MaxQueueBytes bounds the memory for requests that had to be copied because their connection's share of receive slots
	// was taken by other calls, over all connections; default 64 MiB. A request beyond it is refused as one beyond MaxQueue.
	MaxQueueBytes int64
	// StallTimeout is how long a response waits for a client that takes none, before its connection is closed; default
	// 10 s. It keeps such a client from holding the workers.
	StallTimeout time.Duration
	// Metrics turns counters and latency histograms of every method on; see Server.Stats. Off by default.
	Metrics bool
	// OnPanic is called, on the handler's goroutine, with each panic of a handler; default: logged with slog.Error. The
	// client sees Internal.
	OnPanic func(PanicInfo)
	// OnConnClosed is called when a connection has ended, with the reason: what the client did wrong, ErrServerClosed, or
	// what the transport says. Default: nothing.
	OnConnClosed func(conn *transport.Conn, err error)
}

func (c *ServerConfig) withDefaults() ServerConfig {
	var d ServerConfig
	if c != nil {
		d = *c
	}
	if d.MaxConcurrent <= 0 {
		d.MaxConcurrent = 64
	}
	switch {
	case d.MaxQueue == 0:
		d.MaxQueue = 1024
	case d.MaxQueue < 0:
		d.MaxQueue = 0
	}
	if d.MaxQueueBytes <= 0 {
		d.MaxQueueBytes = 64 << 20
	}
	if d.StallTimeout <= 0 {
		d.StallTimeout = 10 * time.Second
	}
	if d.OnPanic == nil {
		d.OnPanic = logPanic
	}
	return d
}

// Server answers calls. It is safe for concurrent use; methods may be registered while it serves.
type Server struct {
	cfg     ServerConfig
	methods methodTable
	pool    workers

	draining atomic.Bool
	copied   atomic.Int64  // bytes of copied requests
	active   atomic.Int64  // calls that were accepted and not answered yet, inline ones left out
	idle     chan struct{} // pulsed when active falls to 0 while draining

	mu     sync.Mutex
	conns  map[*serverConn]struct{}
	stops  map[*context.CancelFunc]struct{} // ends of running Serve calls
	closed bool
	wg     sync.WaitGroup // goroutines of Serve
}

// NewServer returns a server that serves nothing yet. A nil cfg means the defaults.
func NewServer(cfg *ServerConfig) *Server {
	s := &Server{
		cfg:   cfg.withDefaults(),
		idle:  make(chan struct{}, 1),
		conns: make(map[*serverConn]struct{}),
		stops: make(map[*context.CancelFunc]struct{}),
	}
	s.pool.init(s.cfg.MaxConcurrent, s.cfg.MaxQueue)
	return s
}

// RawHandler answers a call with bytes. req is lent for the duration of the handler: it aliases the memory that the
// request was received into. The response is written into memory from Call.Reply, from which it is sent; a handler
// that returns nil without a Reply sends an empty response. An error becomes the call's status: FromError says how.
//
// The Call must not be used after the handler has returned.
type RawHandler func(c *Call, req []byte) error

// HandleRaw registers h. It panics if the spec is wrong or its number or name is taken: both are programming errors.
func (s *Server) HandleRaw(spec Spec, h RawHandler) {
	m := &method{spec: spec, handler: h}
	if s.cfg.Metrics {
		m.metrics = new(methodMetrics)
	}
	if err := s.methods.add(m); err != nil {
		panic(err)
	}
}

// Stats returns the counters of every method, in the order of their numbers; nil unless ServerConfig.Metrics is set.
func (s *Server) Stats() []MethodStats {
	if !s.cfg.Metrics {
		return nil
	}
	var st []MethodStats
	s.methods.each(func(m *method) { st = append(st, m.metrics.snapshot(m.id, m.spec.Name)) })
	return st
}

// attach makes the server answer the requests that arrive on l.
func (s *Server) attach(l link, conn *transport.Conn) (*serverConn, error) {
	sc := &serverConn{srv: s, link: l, conn: conn, closedCh: make(chan struct{})}
	sc.maxHeld = int32(max(l.recvDepth()/4, 1))
	sc.maxMessage = l.maxMessage()
	sc.inline.conn = sc
	sc.inline.inline = true
	sc.out = outbox{link: l, limit: outboxLimit, stall: s.cfg.StallTimeout, onStall: sc.stalled}
	s.mu.Lock()
	if s.closed || s.draining.Load() {
		s.mu.Unlock()
		return nil, ErrServerClosed
	}
	s.conns[sc] = struct{}{}
	s.mu.Unlock()
	l.setHandler(sc)
	return sc, nil
}

// outboxLimit is how many bytes of responses a connection may have waiting for send slots besides those in workers'
// hands.
const outboxLimit = 1 << 20

func (s *Server) forget(sc *serverConn) {
	s.mu.Lock()
	delete(s.conns, sc)
	s.mu.Unlock()
}

func (s *Server) snapshotConns() []*serverConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := make([]*serverConn, 0, len(s.conns))
	for sc := range s.conns {
		l = append(l, sc)
	}
	return l
}

// finished takes a call off the count of active ones.
func (s *Server) finished() {
	if s.active.Add(-1) == 0 && s.draining.Load() {
		s.tellIdle()
	}
}

// tellIdle has a Shutdown that waits look whether calls are active.
func (s *Server) tellIdle() {
	select {
	case s.idle <- struct{}{}:
	default:
	}
}

// Shutdown ends the server gracefully: no new connections and calls are accepted (clients are told, and calls that
// cross this on the wire are answered with Unavailable, not executed), calls in flight finish, their responses are
// sent, then connections are closed. If ctx ends first, what is left is cut off as in Close, and ctx's error returned;
// handlers that ignore the end of their context may still run then, and a Close after it waits for them.
func (s *Server) Shutdown(ctx context.Context) error {
	s.draining.Store(true)
	s.mu.Lock()
	for stop := range s.stops {
		(*stop)()
	}
	s.mu.Unlock()
	for _, sc := range s.snapshotConns() {
		sc.goAway(OK, "server is shutting down")
	}
	var err error
	// Pairs with accept: it counts the call first and looks at draining then, so either it sees draining or we see it.
	for err == nil && s.active.Load() != 0 {
		select {
		case <-s.idle:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	s.tellIdle() // whoever else waits
	for _, sc := range s.snapshotConns() {
		if err == nil {
			err = sc.drain(ctx)
		}
	}
	if err != nil {
		s.cutOff()
		return err
	}
	return s.Close()
}

// Close ends the server at once: connections are closed, the contexts of running handlers end, and Close waits for
// these handlers. It must not be called from a handler. It always returns nil.
func (s *Server) Close() error {
	s.cutOff()
	s.wg.Wait()
	s.pool.wg.Wait()
	return nil
}

// cutOff is Close without the waiting.
func (s *Server) cutOff() {
	s.draining.Store(true)
	s.mu.Lock()
	s.closed = true
	for stop := range s.stops {
		(*stop)()
	}
	s.mu.Unlock()
	for _, sc := range s.snapshotConns() {
		sc.close(ErrServerClosed)
	}
	s.pool.end() // nothing is submitted any more: every connection has ended
}

// errShuttingDown is the status of calls that arrive during a shutdown.
var errShuttingDown = &Error{Code: Unavailable, Message: "server is shutting down", NotExecuted: true}

var errQueueFull = &Error{Code: ResourceExhausted, Message: "server is overloaded: its queue of requests is full", NotExecuted: true}

// serverConn is a connection as the server sees it.
type serverConn struct {
	srv        *Server
	link       link
	conn       *transport.Conn // what link stands on; nil in tests
	out        outbox
	maxMessage int
	maxHeld    int32 // receive slots that calls may hold; the rest keeps cancels and small calls moving

	inline Call // the call of inline handlers: there is one at a time, on the polling goroutine

	held atomic.Int32 // receive slots held by calls

	mu       sync.Mutex
	active   [64]*Call // calls on workers by slot index, chained by Call.next
	nactive  int
	eof      bool // the client sends no more
	ended    bool
	endErr   error
	closedCh chan struct{} // closed when the connection has ended
}

// handleMessage implements linkHandler: it runs on the polling goroutine.
func (sc *serverConn) handleMessage(m message) {
	h, err := parseHeader(m.b)
	if err != nil {
		sc.fail(err)
		return
	}
	switch h.kind {
	case kindRequest:
		sc.request(m, &h)
	case kindCancel:
		sc.cancel(h.id)
	case kindResolve:
		sc.resolve(&h, m.b[headerLen:])
	default:
		sc.fail(frameError("%v sent to a server", h.kind))
	}
}

func (sc *serverConn) request(m message, h *header) {
	srv := sc.srv
	md := srv.methods.find(h.word)
	if md == nil {
		sc.reject(h.id, &Error{Code: Unimplemented, Message: fmt.Sprintf("no method has the number %d", h.word), NotExecuted: true})
		return
	}
	if md.spec.Inline && h.bulk == 0 && sc.out.waiting.Load() == 0 {
		if srv.draining.Load() {
			sc.reject(h.id, errShuttingDown)
			return
		}
		c := &sc.inline
		c.id, c.method, c.timeout, c.req = h.id, md, h.timeout, m.b[headerLen:]
		if h.timeout != 0 {
			c.deadline = time.Now().Add(time.Duration(h.timeout) * time.Microsecond)
		}
		start := md.metrics.begin()
		code := c.finish(c.invoke())
		md.metrics.end(start, code)
		c.reset()
		return
	}

	// Count first, look at draining then: pairs with Shutdown.
	srv.active.Add(1)
	if srv.draining.Load() {
		srv.finished()
		sc.reject(h.id, errShuttingDown)
		return
	}
	var c *Call
	if h.bulk == 0 {
		c = srv.pool.get()
	} else {
		c = new(Call) // see recycle
	}
	c.conn, c.id, c.method, c.timeout = sc, h.id, md, h.timeout
	if h.timeout != 0 {
		c.deadline = time.Now().Add(time.Duration(h.timeout) * time.Microsecond)
	}
	c.start = md.metrics.begin()
	body := m.b[headerLen:]
	for range h.bulk {
		d, err := parseBulk(body)
		if err != nil {
			sc.drop(c)
			sc.fail(err)
			return
		}
		c.bulk = append(c.bulk, d)
		body = body[bulkLen:]
	}
	if sc.held.Add(1) <= sc.maxHeld {
		c.msg, c.holds = sc.link.take(m), true
		c.req = c.msg.b[headerLen+h.bulk*bulkLen:]
	} else {
		// Enough of the connection's receive slots are tied up: from here on requests are copied, so that cancels and
		// other calls still get through.
		sc.held.Add(-1)
		c.copied = int64(len(body))
		if srv.copied.Add(c.copied) > srv.cfg.MaxQueueBytes {
			sc.drop(c)
			sc.reject(h.id, errQueueFull)
			return
		}
		c.own = append(c.own[:0], body...)
		c.req = c.own
	}
	switch sc.submit(c) {
	case submitEnded:
		sc.drop(c)
	case submitFull:
		sc.drop(c)
		sc.reject(h.id, errQueueFull)
	}
}

// drop gives back a call that was not answered.
func (sc *serverConn) drop(c *Call) {
	c.releaseRequest()
	sc.srv.pool.recycle(c)
	sc.srv.finished()
}

// run answers a call on a worker.
func (sc *serverConn) run(c *Call) {
	returned := false
	defer func() {
		if !returned { // runtime.Goexit in the handler: the worker goes, the call is answered
			sc.complete(c, sc.srv.panicError(c.method, nil))
		}
	}()
	var err error
	if !c.deadline.IsZero() && !time.Now().Before(c.deadline) {
		err = &Error{Code: DeadlineExceeded, Message: "the deadline passed before a worker was free", NotExecuted: true}
	} else if c.ended() {
		err = &Error{Code: Canceled, Message: "canceled before a worker was free", NotExecuted: true}
	} else {
		err = c.invoke()
	}
	returned = true
	sc.complete(c, err)
}

func (sc *serverConn) complete(c *Call, err error) {
	md, start := c.method, c.start
	code := c.finish(err)
	md.metrics.end(start, code)
	sc.unregister(c)
	c.releaseRequest()
	sc.srv.pool.recycle(c)
	sc.srv.finished()
}

type submitResult uint8

const (
	submitted submitResult = iota
	submitEnded
	submitFull
)

// submit makes c reachable for cancels and hands it to a worker. The lock covers both, so that nothing reaches the
// workers once the connection has ended.
func (sc *serverConn) submit(c *Call) submitResult {
	b := uint32(c.id) % uint32(len(sc.active))
	sc.mu.Lock()
	defer sc.mu.Unlock()
	if sc.ended {
		return submitEnded
	}
	c.next = sc.active[b]
	sc.active[b] = c
	sc.nactive++
	if !sc.srv.pool.submit(c) {
		sc.active[b] = c.next
		c.next = nil
		sc.nactive--
		return submitFull
	}
	return submitted
}

func (sc *serverConn) unregister(c *Call) {
	b := uint32(c.id) % uint32(len(sc.active))
	sc.mu.Lock()
	defer sc.mu.Unlock()
	for p := &sc.active[b]; *p != nil; p = &(*p).next {
		if *p == c {
			*p = c.next
			c.next = nil
			break
		}
	}
	if sc.nactive--; sc.nactive == 0 && sc.eof && !sc.ended {
		go sc.closeGently()
	}
}

// handleEOF implements linkHandler: the client has closed its sending side. What it asked for is still answered.
func (sc *serverConn) handleEOF() {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	sc.eof = true
	if sc.nactive == 0 && !sc.ended {
		go sc.closeGently()
	}
}

// closeGently closes the connection once the responses so far have been sent. Calls that come meanwhile must be refused already.
func (sc *serverConn) closeGently() {
	for !sc.endSends() {
		select {
		case <-sc.closedCh:
			return
		case <-time.After(time.Millisecond):
		}
	}
	_ = sc.link.closeGently()
	sc.handleClose(net.ErrClosed)
}

// endSends closes the sending side, if there is nothing in the outbox. It waits for an inline handler that runs: no more than that it has
// returned says that its response was posted.
func (sc *serverConn) endSends() bool {
	done := make(chan bool, 1)
	sc.link.between(func() {
		empty := sc.out.waiting.Load() == 0
		if empty {
			sc.link.closeWrite()
		}
		done <- empty
	})
	select {
	case empty := <-done:
		return empty
	case <-sc.closedCh:
		return false
	}
}

// cancel ends the context of the call that the client has given up. A call that is not there has been answered.
func (sc *serverConn) cancel(id uint64) {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	for c := sc.active[uint32(id)%uint32(len(sc.active))]; c != nil; c = c.next {
		if c.id == id {
			c.end(context.Canceled)
			return
		}
	}
}

// resolve answers what number a name has.
func (sc *serverConn) resolve(h *header, name []byte) {
	md := sc.srv.methods.resolve(name)
	if md == nil {
		sc.reject(h.id, &Error{Code: Unimplemented, Message: fmt.Sprintf("no method has the name %q", name), NotExecuted: true})
		return
	}
	var b [headerLen + 4]byte
	putHeader(b[:], &header{kind: kindResponse, id: h.id, payload: 4})
	putUint32(b[headerLen:], uint32(md.id))
	sc.sendNow(b[:])
}

// reject answers a call that was not run.
func (sc *serverConn) reject(id uint64, e *Error) { sc.sendNow(sc.statusFrame(id, e)) }

// statusFrame encodes a response with an error.
func (sc *serverConn) statusFrame(id uint64, e *Error) []byte {
	h := header{kind: kindResponse, id: id, word: uint32(e.Code)}
	if e.NotExecuted {
		h.flags |= flagNotExecuted
	}
	return encodeStatus(&h, e, sc.maxMessage)
}

// encodeStatus returns a frame with header h and the message and details of e as payload, leaving out what does not fit.
func encodeStatus(h *header, e *Error, maxMessage int) []byte {
	b := appendStatus(make([]byte, headerLen, headerLen+len(e.Message)+16), e)
	if len(b) > maxMessage {
		b = appendStatus(b[:headerLen], &Error{Message: clipUTF8(e.Message, max(0, maxMessage-headerLen-8))})
	}
	h.payload = len(b) - headerLen
	putHeader(b, h)
	return b
}

// sendNow sends a small frame without waiting. When the sending side is closed, it is dropped: what the client hears next is that.
func (sc *serverConn) sendNow(frame []byte) {
	if err := sc.out.send(frame); err != nil && !errors.Is(err, errWriteClosed) {
		sc.close(err)
	}
}

var errPeerStalled = errors.New("rpc: the peer sends requests and takes no responses")

// stalled closes the connection to a peer that takes no responses.
func (sc *serverConn) stalled(err error) {
	switch {
	case errors.Is(err, errWriteClosed): // as in sendNow
		return
	case errors.Is(err, context.DeadlineExceeded):
		err = errPeerStalled
	}
	sc.close(err)
}

// goAway tells the client not to start more calls, if there is a send slot to say it with.
func (sc *serverConn) goAway(code Code, reason string) {
	sc.sendNow(encodeStatus(&header{kind: kindGoAway, word: uint32(code)}, &Error{Message: reason}, sc.maxMessage))
}

// fail closes the connection because of something that the peer did.
func (sc *serverConn) fail(err error) { sc.close(err) }

// drain is closeGently, cut short by ctx.
func (sc *serverConn) drain(ctx context.Context) error {
	go sc.closeGently()
	select {
	case <-sc.closedCh:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (sc *serverConn) hasEnded() bool {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	return sc.ended
}

// close closes the connection with a reason that the peer and HandleClose see.
func (sc *serverConn) close(reason error) {
	sc.link.abort(reason) // before handlers hear of it: what they answer then must not get through any more
	sc.handleClose(reason)
}

// handleClose implements linkHandler: the connection has ended, and with it the contexts of its calls.
func (sc *serverConn) handleClose(err error) {
	sc.mu.Lock()
	if sc.ended {
		sc.mu.Unlock()
		return
	}
	sc.ended, sc.endErr = true, err
	for _, c := range sc.active {
		for ; c != nil; c = c.next {
			c.end(context.Canceled)
		}
	}
	sc.mu.Unlock()
	sc.out.close()
	sc.srv.forget(sc)
	close(sc.closedCh)
}
