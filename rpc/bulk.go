package rpc

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Bulk is memory of the client that the handler of a call may read (pull) or write (push) one-sided: payloads that are
// too large to travel in messages, or that should end up in a certain place without a copy.
//
// Either MR is set: Len bytes of the region from Off on are granted for the length of the call, with the rights in Access.
// Or Remote is set, the descriptor of an earlier Conn.Grant, which stays granted when the call is over.
type Bulk struct {
	MR     *mr.MR
	Off    int
	Len    int
	Access ib.Access // AccessRemoteRead: the handler may pull; AccessRemoteWrite: it may push

	Remote transport.Remote
}

// MaxBulk is the largest number of bulk arguments of a call.
const MaxBulk = maxBulk

// bulkGrace is how long a call that was given up waits for its handler to leave the bulk arguments alone.
const bulkGrace = time.Second

// CallBulk is CallRaw with bulk arguments. When it returns, the server has no access any more to those given as MR, and
// no transfer of this call is under way to or from the others.
//
// So it does not return the moment ctx ends: the server is told, and its answer awaited for up to a second; if there is
// none, access is withdrawn by force, which ends the connection if a transfer was under way, and always if an argument
// was given as Remote. Unlike CallRaw, CallBulk allocates.
func (c *Client) CallBulk(ctx context.Context, m Method, req []byte, bulk []Bulk, fn func(resp []byte) error) error {
	if len(bulk) > MaxBulk {
		return Errorf(InvalidArgument, "%d bulk arguments, at most %d are allowed", len(bulk), MaxBulk)
	}
	var grants []*transport.Grant
	defer func() {
		for _, g := range grants {
			if err := g.Revoke(context.Background()); err != nil {
				// Without the connection there is no access either.
				c.fail(fmt.Errorf("rpc: withdrawing a bulk argument: %w", err))
				<-c.conn.Done()
			}
		}
	}()
	keys := make([]transport.Remote, len(bulk))
	lasting := false // some argument stays granted
	for i := range bulk {
		b := &bulk[i]
		if b.MR == nil {
			keys[i] = b.Remote
			keys[i].Access &= bulkAccess
			lasting = true
			continue
		}
		if b.Off < 0 || b.Len < 0 || b.Off > b.MR.Len()-b.Len || b.Access&^bulkAccess != 0 || b.Access == 0 {
			return Errorf(InvalidArgument, "bulk argument %d: %d bytes at %d with access %#x of a region of %d", i, b.Len, b.Off, uint32(b.Access), b.MR.Len())
		}
		if b.Len == 0 { // nothing to grant
			keys[i].Access = b.Access
			continue
		}
		g, err := c.conn.Grant(ctx, b.MR, b.Off, b.Len, b.Access)
		if err != nil {
			return callError(err)
		}
		grants = append(grants, g)
		keys[i] = g.Remote()
		keys[i].Access &= bulkAccess
	}

	head := headerLen + len(bulk)*bulkLen
	s, buf, err := c.prepare(ctx, head, len(req))
	if err != nil {
		return err
	}
	for i, k := range keys {
		if err := putBulk(buf.b[headerLen+i*bulkLen:], k); err != nil {
			c.unprepare(s, buf)
			return Errorf(InvalidArgument, "bulk argument %d: %w", i, err)
		}
	}
	copy(buf.b[head:], req)
	h := header{kind: kindRequest, word: uint32(m), timeout: timeoutOf(ctx), bulk: len(bulk), payload: len(req)}
	if c.cfg.Metrics {
		s.mm = c.methodMetrics(m)
		s.start = s.mm.begin()
	}
	if err = c.send(s, buf, &h, false); err == nil {
		err = c.awaitBulk(ctx, s, lasting)
	}
	if lasting && c.closed.Load() && (err != nil || s.err != nil) {
		<-c.conn.Done() // nobody has withdrawn the access, and the server may still use it
	}
	if err != nil {
		s.mm.end(s.start, CodeOf(err))
		c.clear(s)
		c.releaseSlot(s)
		return err
	}
	defer c.finish(s)
	if s.err != nil || fn == nil {
		return s.err
	}
	return fn(s.body)
}

// awaitBulk is await for a call whose memory the server may be working on. When it returns an error, the slot is free.
func (c *Client) awaitBulk(ctx context.Context, s *slot, lasting bool) error {
	err := c.link.wait(ctx, &s.w)
	if err == nil {
		return nil
	}
	c.cancel(s.id())
	grace, cancel := context.WithTimeout(context.Background(), bulkGrace)
	defer cancel()
	if c.link.wait(grace, &s.w) == nil || !s.giveUp() {
		c.settle(s) // at once, if the answer is there
		if s.err != nil {
			s.err = callError(err)
		}
		return nil
	}
	if lasting {
		c.fail(errBulkStuck)
		<-c.conn.Done()
	}
	return callError(err)
}

var errBulkStuck = fmt.Errorf("rpc: the server did not let go of the bulk arguments of a call that was given up")

// NumBulk returns the number of bulk arguments.
func (c *Call) NumBulk() int { return len(c.bulk) }

// Bulk returns the description of bulk argument i: Len is its size in bytes, Access says whether it can be pulled
// (ib.AccessRemoteRead) or pushed (ib.AccessRemoteWrite). It panics if i is out of range.
func (c *Call) Bulk(i int) transport.Remote { return c.bulk[i] }

// Pull reads dst.Length bytes of bulk argument i, from off on, into registered memory of this side: a part of an mr.MR or
// of an mr.Buffer from Conn().Poller().Pool(). It returns when they are there.
//
// Pull and Push may be called concurrently, until the handler returns; the response is sent when none is under way any
// more. They fail with PermissionDenied or OutOfRange if the client granted less, and with Canceled once the call is over: also
// much later, for a goroutine that the handler has left behind. On a call that came without bulk arguments they fail with OutOfRange, whenever that is.
func (c *Call) Pull(ctx context.Context, dst ib.SGE, i int, off uint64) error {
	r, err := c.beginBulk(i, off, dst.Length, ib.AccessRemoteRead)
	if err != nil {
		return err
	}
	defer c.endBulk()
	if dst.Length == 0 {
		return nil
	}
	return bulkError(c.conn.conn.Read(ctx, dst, r, off))
}

// Push writes src.Length bytes of registered memory of this side to bulk argument i, from off on. It returns when the
// client's memory has them. See Pull.
func (c *Call) Push(ctx context.Context, src ib.SGE, i int, off uint64) error {
	r, err := c.beginBulk(i, off, src.Length, ib.AccessRemoteWrite)
	if err != nil {
		return err
	}
	defer c.endBulk()
	if src.Length == 0 {
		return nil
	}
	return bulkError(c.conn.conn.Write(ctx, src, r, off))
}

func bulkError(err error) error {
	if err == nil {
		return nil
	}
	return callError(err)
}

func (c *Call) beginBulk(i int, off uint64, n uint32, need ib.Access) (transport.Remote, error) {
	// Looked at without the lock, since a goroutine that the handler has left behind may come when the Call is cleared for another: c.bulk is
	// complete before the handler begins, and a Call that is used again never has any.
	if len(c.bulk) == 0 {
		return transport.Remote{}, Errorf(OutOfRange, "the call has no bulk argument %d", i)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.over:
		return transport.Remote{}, Errorf(Canceled, "the handler has returned")
	case c.endErr != nil:
		return transport.Remote{}, callError(c.endErr)
	case i < 0 || i >= len(c.bulk):
		return transport.Remote{}, Errorf(OutOfRange, "the call has no bulk argument %d", i)
	}
	r := c.bulk[i]
	if r.Access&need == 0 {
		return r, Errorf(PermissionDenied, "the client did not grant this access to bulk argument %d", i)
	}
	if !r.Contains(off, uint64(n)) {
		return r, Errorf(OutOfRange, "%d bytes at %d are outside of bulk argument %d, which has %d", n, off, i, r.Len)
	}
	c.nbulk++
	return r, nil
}

func (c *Call) endBulk() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.nbulk--; c.nbulk == 0 && c.quiet != nil {
		c.quiet.Broadcast()
	}
}

// finishBulk waits until no transfer is under way and lets none begin.
func (c *Call) finishBulk() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	if c.nbulk > 0 && c.quiet == nil {
		c.quiet = sync.NewCond(&c.mu)
	}
	for c.nbulk > 0 {
		c.quiet.Wait()
	}
}
