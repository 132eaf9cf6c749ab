package rpc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/ringside-rdma/ringside/transport"
)

func putUint32(b []byte, v uint32) { binary.LittleEndian.PutUint32(b, v) }

// Call is one call as its handler sees it. It is lent to the handler and may be used again for other calls afterwards. It is
// not safe for concurrent use; the context from Context is, and so are Pull and Push.
type Call struct {
	conn   *serverConn
	method *method
	id     uint64
	req    []byte
	inline bool

	msg    message // holds the request while holds is set
	holds  bool
	own    []byte // the request's copy when no receive slot could be held; the memory is kept for the next call
	copied int64  // bytes of own that count towards Server.copied

	counted bool // towards workers.idle

	timeout  uint64    // microseconds, as received
	deadline time.Time // zero: none
	start    time.Time // zero: metrics are off

	// The response: a send slot, or memory of its own for an inline handler that found none.
	buf     sendBuf
	hasBuf  bool
	heap    []byte
	replied bool
	size    int // bytes of payload asked for

	bulk []transport.Remote

	mu     sync.Mutex // guards what follows
	ctx    *callCtx   // made when asked for
	endErr error
	over   bool // the handler has returned: no more one-sided transfers
	nbulk  int  // transfers running
	quiet  *sync.Cond

	next *Call // serverConn.active, workers.free
}

// Method returns the number that the call came with.
func (c *Call) Method() Method { return c.method.id }

// MethodName returns the method's name; empty if it has none.
func (c *Call) MethodName() string { return c.method.spec.Name }

// RemoteAddr returns the client's address.
func (c *Call) RemoteAddr() net.Addr { return c.conn.link.remoteAddr() }

// Conn returns the connection that the call came on, for one-sided operations beside the call's.
func (c *Call) Conn() *transport.Conn { return c.conn.conn }

// Deadline returns when the client stops waiting; ok is false if it waits for ever. It was counted from the arrival of
// the request, so the two sides need no common clock.
func (c *Call) Deadline() (deadline time.Time, ok bool) { return c.deadline, !c.deadline.IsZero() }

// Context returns the call's context. It has the client's deadline, and ends when the client cancels the call, when the
// connection is lost, and when the handler returns. An inline handler's knows of the deadline only: nothing is received
// while it runs. The context is made at the first use, at the cost of an allocation.
func (c *Call) Context() context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx == nil {
		c.ctx = &callCtx{deadline: c.deadline}
		c.ctx.call.Store(c)
		if c.endErr != nil {
			c.ctx.end(c.endErr)
		}
	}
	return c.ctx
}

// FromContext returns the Call that a handler's context belongs to, for its bulk arguments and its peer; nil if ctx is
// not from a handler, or the handler has returned. The rules of Call apply.
func FromContext(ctx context.Context) *Call {
	c, _ := ctx.Value(callKey{}).(*Call)
	return c
}

// end ends the call's context.
func (c *Call) end(err error) {
	c.mu.Lock()
	if c.endErr == nil {
		c.endErr = err
	}
	ctx := c.ctx
	c.mu.Unlock()
	if ctx != nil {
		ctx.end(err)
	}
}

func (c *Call) ended() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.endErr != nil
}

// MaxReply returns the largest response in bytes that the connection carries.
func (c *Call) MaxReply() int { return c.conn.maxMessage - headerLen }

// Reply returns n bytes to write the response into: registered memory that is sent when the handler returns nil. The
// content is undefined at first. Calling it again drops what was written before. It fails with ResourceExhausted if n
// is over MaxReply, and with Unavailable if the connection is lost; return the error then.
func (c *Call) Reply(n int) ([]byte, error) {
	if n < 0 || n > c.MaxReply() {
		return nil, Errorf(ResourceExhausted, "a response of %d bytes is over the connection's maximum of %d", n, c.MaxReply())
	}
	c.dropReply()
	total := headerLen + n
	buf, err := c.conn.link.tryAlloc(total)
	if err != nil {
		switch {
		case !errors.Is(err, errWouldBlock):
			return nil, unavailable(err)
		case c.inline:
			// The polling goroutine cannot wait for a slot; the outbox will.
			c.heap = make([]byte, total)
		default:
			if buf, err = c.conn.allocPatiently(total); err != nil {
				return nil, unavailable(err)
			}
		}
	}
	c.replied, c.size = true, n
	if c.heap != nil {
		return c.heap[headerLen:], nil
	}
	c.buf, c.hasBuf = buf, true
	return buf.b[headerLen:total:total], nil
}

// ReplyBytes makes a copy of b the response.
func (c *Call) ReplyBytes(b []byte) error {
	p, err := c.Reply(len(b))
	if err != nil {
		return err
	}
	copy(p, b)
	return nil
}

// Shrink shortens the response from Reply to its first n bytes. It panics if n is negative or over its length.
func (c *Call) Shrink(n int) {
	if !c.replied || n < 0 || n > c.size {
		panic(fmt.Sprintf("rpc: Shrink(%d) of a response of %d bytes", n, c.size))
	}
	c.size = n
}

func (c *Call) dropReply() {
	if c.hasBuf {
		c.conn.link.discard(c.buf)
		c.buf, c.hasBuf = sendBuf{}, false
	}
	c.heap, c.replied, c.size = nil, false, 0
}

// allocPatiently waits for a send slot, and closes the connection if there is none for too long.
func (sc *serverConn) allocPatiently(n int) (sendBuf, error) {
	ctx, cancel := context.WithTimeout(context.Background(), sc.srv.cfg.StallTimeout)
	defer cancel()
	buf, err := sc.link.alloc(ctx, n)
	if errors.Is(err, context.DeadlineExceeded) {
		err = errPeerStalled
		sc.close(err)
	}
	return buf, err
}

// invoke runs the handler, and turns what it returns, or a panic, into an Error, or nil. The methods of an error that it returns are
// the handler's code, too.
func (c *Call) invoke() (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = c.conn.srv.panicError(c.method, v)
		}
	}()
	if e := FromError(c.method.handler(c, c.req)); e != nil {
		return e
	}
	return nil
}

// finish sends the response, or the status that err stands for. It returns the code that was sent.
func (c *Call) finish(err error) Code {
	if len(c.bulk) != 0 {
		c.finishBulk()
	}
	if c.ctx != nil { // only the handler's goroutine sets it: no lock
		c.ctx.call.Store(nil)
		c.ctx.end(context.Canceled)
	}
	sc := c.conn
	if err == nil && !c.replied {
		_, err = c.Reply(0)
	}
	if err != nil {
		c.dropReply()
		e := FromError(err)
		if e.Code == OK { // an Error with code OK makes no sense; a caller must not take it for success
			e = &Error{Code: Unknown, Message: e.Message}
		}
		frame := sc.statusFrame(c.id, e)
		switch {
		case sc.hasEnded():
			// The client hears that the connection is lost, not what its handler made of the end of its context.
		case c.inline:
			sc.sendNow(frame)
		default:
			buf, err := sc.allocPatiently(len(frame))
			if err == nil {
				copy(buf.b, frame)
				c.uncount()
				err = sc.link.post(buf, len(frame))
			}
			if err != nil {
				sc.close(err)
			}
		}
		return e.Code
	}
	h := header{kind: kindResponse, id: c.id, payload: c.size}
	if c.heap != nil {
		putHeader(c.heap, &h)
		if !sc.out.push(c.heap[:headerLen+c.size]) {
			sc.stalled(errPeerStalled)
		}
		c.heap = nil
		return OK
	}
	putHeader(c.buf.b, &h)
	c.hasBuf = false
	c.uncount()
	if perr := sc.link.post(c.buf, headerLen+c.size); perr != nil {
		sc.close(perr)
		return Unavailable
	}
	return OK
}

// uncount takes the call off what the server's limits count, when its answer is about to leave: whoever has got that finds a place for
// its next request, though the worker may not have come that far.
func (c *Call) uncount() {
	c.conn.srv.pool.uncount(c)
	if c.copied != 0 {
		c.conn.srv.copied.Add(-c.copied)
		c.copied = 0
	}
}

// releaseRequest gives back the receive slot, or the share of memory, that the request lies in.
func (c *Call) releaseRequest() {
	c.uncount()
	if c.holds {
		c.conn.link.release(c.msg)
		c.conn.held.Add(-1)
		c.msg, c.holds = message{}, false
	}
}

// keepOwn is how much memory for request copies a recycled Call keeps.
const keepOwn = 8 << 10

// reset clears what belongs to one call, for the next.
func (c *Call) reset() {
	if c.inline {
		// The fast path: what an inline call never sets needs no clearing.
		c.req, c.buf, c.heap, c.replied, c.size = nil, sendBuf{}, nil, false, 0
		if c.timeout != 0 {
			c.timeout, c.deadline = 0, time.Time{}
		}
		if c.ctx != nil {
			c.ctx, c.endErr = nil, nil
		}
		return
	}
	own := c.own
	if cap(own) > keepOwn {
		own = nil
	}
	c.conn, c.method, c.id, c.req = nil, nil, 0, nil
	c.own = own
	c.timeout, c.deadline, c.start = 0, time.Time{}, time.Time{}
	c.buf, c.hasBuf, c.heap, c.replied, c.size = sendBuf{}, false, nil, false, 0
	c.ctx, c.endErr = nil, nil
	c.next = nil
}

// unavailable wraps an error of the connection.
func unavailable(err error) error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return err
	}
	return &Error{Code: Unavailable, Message: err.Error(), cause: err}
}
