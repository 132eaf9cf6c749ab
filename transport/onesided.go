package transport

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Remote names memory of the peer's that was granted to us: it is what Grant.Remote returned there, sent here in a
// message or in the handshake's private data (Remote has MarshalBinary and UnmarshalBinary).
type Remote = mr.RemoteKey

// maxBatch is how many operations Batch.Start can post at once; see also Batch.Do.
const maxBatch = 64

// A Batch collects one-sided operations and posts them with one call; they are done in order. It belongs to one
// goroutine, and is reused with Reset. The memory of its operations must not be touched, and the Batch not be changed,
// from Do or Start until it is finished.
type Batch struct {
	c       *Conn
	wrs     []ib.SendWR
	sges    []ib.SGE
	results []slot      // one for each atomic, 8 bytes
	found   []uint64    // what was in them when the batch ended: the memory may go with the connection
	which   []int       // the result of operation i, or -1; an operation is one request or more
	next    int         // results in use
	posted  []ib.SendWR // of wrs, those under way; guarded by snd.mu, as is copied
	copied  int         // results that are in found
	busy    bool        // guarded by snd.mu
	err     error       // of the first operation that failed
	bad     error       // an operation that could not be collected
	own     Waiter
	w       *Waiter
	free    *Batch
	head    [headerLen]byte // of a message that goes along
}

// NewBatch returns an empty batch with room for n operations; it grows if need be.
func (c *Conn) NewBatch(n int) *Batch {
	return &Batch{c: c, wrs: make([]ib.SendWR, 0, n), sges: make([]ib.SGE, 0, n), which: make([]int, 0, n)}
}

// Len is the number of operations collected.
func (b *Batch) Len() int { return len(b.which) }

// Reset forgets the operations. It panics while they are under way.
func (b *Batch) Reset() {
	s := &b.c.snd
	s.mu.Lock()
	if b.busy {
		s.mu.Unlock()
		panic("transport: Reset of a batch that is under way")
	}
	s.mu.Unlock()
	b.clear()
}

func (b *Batch) clear() {
	b.wrs, b.sges, b.which, b.next = b.wrs[:0], b.sges[:0], b.which[:0], 0
	b.err, b.bad = nil, nil
}

// Close gives the batch's memory for results back. It panics while operations are under way.
func (b *Batch) Close() error {
	b.Reset()
	s := &b.c.snd
	s.mu.Lock()
	b.dropLocked()
	s.mu.Unlock()
	return nil
}

func (b *Batch) dropLocked() {
	a := b.c.p.arenaFor(resultStride)
	for _, r := range b.results {
		a.put(r)
	}
	b.results, b.found = nil, nil
}

// resultStride is a cache line: a result's slot.
const resultStride = 64

func (b *Batch) add(op ib.Opcode, r Remote, off, n uint64, need ib.Access) *ib.SendWR {
	if b.bad == nil {
		switch {
		case !r.Contains(off, n):
			b.bad = fmt.Errorf("%w: %d bytes at %d of %d", ErrRange, n, off, r.Len)
		case r.Access&need != need:
			b.bad = fmt.Errorf("transport: %v was not granted, only %v", need, r.Access)
		}
	}
	b.wrs = append(b.wrs, ib.SendWR{Opcode: op, RemoteAddr: r.Addr + off, RKey: r.RKey})
	b.which = append(b.which, -1)
	return &b.wrs[len(b.wrs)-1]
}

// local appends sges; earlier operations keep theirs even if the array moves.
func (b *Batch) local(sges ...ib.SGE) []ib.SGE {
	n := len(b.sges)
	b.sges = append(b.sges, sges...)
	return b.sges[n:len(b.sges):len(b.sges)]
}

// Read reads dst.Length bytes at off of src into dst.
func (b *Batch) Read(dst ib.SGE, src Remote, off uint64) {
	wr := b.add(ib.OpRDMARead, src, off, uint64(dst.Length), ib.AccessRemoteRead)
	n := len(b.sges)
	b.sges = append(b.sges, dst)
	wr.SGEs = b.sges[n : n+1 : n+1]
}

// ReadV reads the bytes at off of src into the elements of dst, one after the other.
func (b *Batch) ReadV(dst []ib.SGE, src Remote, off uint64) {
	limit := b.c.p.attr.MaxSGERead
	if limit <= 0 || len(dst) <= limit {
		b.add(ib.OpRDMARead, src, off, ib.SGELen(dst), ib.AccessRemoteRead).SGEs = b.local(dst...)
		return
	}
	// One operation, but several requests.
	b.add(ib.OpRDMARead, src, off, ib.SGELen(dst), ib.AccessRemoteRead).SGEs = b.local(dst[:limit]...)
	for dst, at := dst[limit:], src.Addr+off+ib.SGELen(dst[:limit]); len(dst) > 0; {
		n := min(limit, len(dst))
		b.wrs = append(b.wrs, ib.SendWR{Opcode: ib.OpRDMARead, RemoteAddr: at, RKey: src.RKey, SGEs: b.local(dst[:n]...)})
		at += ib.SGELen(dst[:n])
		dst = dst[n:]
	}
}

// Write writes src to off of dst.
func (b *Batch) Write(src ib.SGE, dst Remote, off uint64) {
	wr := b.add(ib.OpRDMAWrite, dst, off, uint64(src.Length), ib.AccessRemoteWrite)
	n := len(b.sges)
	b.sges = append(b.sges, src)
	wr.SGEs = b.sges[n : n+1 : n+1]
}

// WriteV writes the elements of src, one after the other, to off of dst.
func (b *Batch) WriteV(src []ib.SGE, dst Remote, off uint64) {
	b.add(ib.OpRDMAWrite, dst, off, ib.SGELen(src), ib.AccessRemoteWrite).SGEs = b.local(src...)
}

// WriteBytes writes src, of at most Conn.MaxInline bytes, to off of dst. src is read when the batch is posted.
func (b *Batch) WriteBytes(src []byte, dst Remote, off uint64) {
	if len(src) > b.c.snd.maxInline && b.bad == nil {
		b.bad = fmt.Errorf("%w: WriteBytes of %d bytes, at most %d", ErrTooLarge, len(src), b.c.snd.maxInline)
	}
	b.add(ib.OpRDMAWrite, dst, off, uint64(len(src)), ib.AccessRemoteWrite).Inline = src
}

func (b *Batch) atomic(op ib.Opcode, dst Remote, off, compareAdd, swap uint64) {
	wr := b.add(op, dst, off, 8, ib.AccessRemoteAtomic)
	wr.CompareAdd, wr.Swap = compareAdd, swap
	if !b.c.p.attr.Caps.Has(ib.CapAtomic) && b.bad == nil {
		b.bad = fmt.Errorf("transport: device %s has no atomics: %w", b.c.p.vctx.Name(), errors.ErrUnsupported)
		return
	}
	if (dst.Addr+off)%8 != 0 && b.bad == nil {
		b.bad = fmt.Errorf("%w: an atomic at offset %d is not aligned to 8 bytes", ErrRange, off)
	}
	if b.next == len(b.results) {
		r, err := b.c.p.arenaFor(resultStride).get()
		if err != nil {
			if b.bad == nil {
				b.bad = err
			}
			return
		}
		b.results, b.found = append(b.results, r), append(b.found, 0)
	}
	b.which[len(b.which)-1] = b.next
	sge := b.results[b.next].sge
	sge.Length = 8
	n := len(b.sges)
	b.sges = append(b.sges, sge)
	wr.SGEs = b.sges[n : n+1 : n+1]
	b.next++
}

// CompareAndSwap replaces the 8 bytes at off of dst, which are aligned, by new if they are old. They are a number in
// the byte order of the peer. Result tells what they were.
func (b *Batch) CompareAndSwap(dst Remote, off, old, new uint64) {
	b.atomic(ib.OpAtomicCmpSwap, dst, off, old, new)
}

// FetchAdd adds delta to the 8 bytes at off of dst. Result tells what they were.
func (b *Batch) FetchAdd(dst Remote, off, delta uint64) {
	b.atomic(ib.OpAtomicFetchAdd, dst, off, delta, 0)
}

// Result is what operation i, an atomic, found. It is valid once the batch has finished without error, also when the connection has
// ended since.
func (b *Batch) Result(i int) uint64 { return b.found[b.which[i]] }

// Do posts the operations and waits until all are done. A remote access error, or any other failure of an operation,
// ends the connection, as the InfiniBand specification has it for reliable connections: the error matches the
// ib.WCStatus. If ctx ends while operations are under way, Do still waits until the device touches no memory of
// theirs any more; should that take more than Config.Linger, it closes the connection for that. Operations that were
// done by then are not undone, and if all were, Do returns nil.
func (b *Batch) Do(ctx context.Context) error {
	if b.bad != nil {
		return b.bad
	}
	b.seal()
	for from := 0; from < len(b.wrs); {
		n := min(len(b.wrs)-from, b.c.batchMax())
		if err := b.run(ctx, from, n); err != nil {
			return err
		}
		from += n
	}
	return nil
}

func (c *Conn) batchMax() int { return min(maxBatch, int(c.snd.depth)/2) }

func (b *Batch) run(ctx context.Context, from, n int) error {
	c := b.c
	s := &c.snd
	b.own.Reset()
	for {
		s.mu.Lock()
		err := b.postLocked(from, n, &b.own)
		if err == nil {
			s.mu.Unlock()
			break
		}
		if err != ErrWouldBlock {
			s.mu.Unlock()
			return err
		}
		if err := c.waitLocked(ctx, &s.ops); err != nil {
			return err
		}
	}
	return c.settle(ctx, &b.own)
}

// settle waits for operations that are posted: their end, whatever ctx does.
func (c *Conn) settle(ctx context.Context, w *Waiter) error {
	err := c.p.Wait(ctx, w)
	if w.Finished() {
		return w.Err()
	}
	grace, cancel := context.WithTimeout(context.Background(), c.cfg.Linger)
	defer cancel()
	if c.p.Wait(grace, w); !w.Finished() {
		c.fail(&CloseError{Err: ErrPeerDied, Reason: fmt.Sprintf("an operation did not end within %v of its cancellation", c.cfg.Linger)})
		<-c.done
	}
	if w.Err() == nil {
		return nil
	}
	return errors.Join(err, w.Err())
}

// Start posts the operations, at most 64, and returns at once; w is done when they are, with their error. It does not
// block: without room for all of them it returns ErrWouldBlock, and nothing was posted. Handlers may call it.
func (b *Batch) Start(w *Waiter) error {
	switch {
	case b.bad != nil:
		return b.bad
	case len(b.wrs) == 0:
		w.Done()
		return nil
	case len(b.wrs) > b.c.batchMax():
		return fmt.Errorf("%w: %d operations in a batch, Start takes %d", ErrTooLarge, len(b.wrs), b.c.batchMax())
	}
	b.seal()
	s := &b.c.snd
	s.mu.Lock()
	err := b.postLocked(0, len(b.wrs), w)
	s.mu.Unlock()
	return err
}

// seal makes the batch's end mean that what it writes has arrived. That is so by itself, but on devices whose writes are
// complete when they are on their way (iWARP): there a READ of a byte follows the last one, because an answer comes only after
// everything that was sent before.
func (b *Batch) seal() {
	c := b.c
	if !c.p.needsCM() {
		return
	}
	for i := len(b.wrs) - 1; i >= 0; i-- {
		switch b.wrs[i].Opcode {
		case ib.OpRDMARead:
			if b.wrs[i].PayloadLen() > 0 { // some devices answer a READ of nothing by themselves
				return
			}
		case ib.OpRDMAWrite:
			n := len(b.sges)
			b.sges = append(b.sges, c.p.sync.SGE(syncSink, 1))
			b.wrs = append(b.wrs, ib.SendWR{Opcode: ib.OpRDMARead, RemoteAddr: c.peerSync.Addr, RKey: c.peerSync.RKey, SGEs: b.sges[n : n+1 : n+1]})
			return
		}
	}
}

// postLocked posts n operations from one on. snd.mu is held; not any more, if it panics: whoever recovers from that would leave the
// connection locked.
func (b *Batch) postLocked(from, n int, w *Waiter) error {
	c := b.c
	s := &c.snd
	if s.err != nil {
		return s.err
	}
	if b.busy {
		s.mu.Unlock()
		panic("transport: batch is under way already")
	}
	if s.depth-(s.head-s.tail) < uint32(n) {
		return ErrWouldBlock
	}
	if err := c.flushLocked(); err != nil {
		return err
	}
	mask := uint32(len(s.sq) - 1)
	wrs := b.wrs[from : from+n]
	for i := range wrs {
		wrs[i].ID = c.idBase | uint64(s.head+uint32(i))
		wrs[i].Flags &^= ib.SendSignaled
		s.sq[(s.head+uint32(i))&mask] = sqEntry{batch: b, last: i == n-1}
	}
	wrs[n-1].Flags |= ib.SendSignaled
	b.w, b.err, b.posted = w, nil, wrs
	if from == 0 {
		b.copied = 0
	}
	k, err := c.q.PostSend(wrs)
	s.head += uint32(k)
	s.unsig = 0
	if err != nil {
		for i := k; i < n; i++ {
			s.sq[(s.head+uint32(i-k))&mask] = sqEntry{}
		}
		if k > 0 {
			// Some are under way, without a signal: end the connection, and with it them.
			s.sq[(s.head-1)&mask].last = true
			b.busy = true
			s.err = &CloseError{Err: err, Reason: "a batch could be posted only in part"}
			c.fail(s.err)
			return nil
		}
		return err // a request that the device refuses: nothing has happened
	}
	b.busy = true
	return nil
}

// finishLocked ends the batch; err is why the connection did, if it has. snd.mu is held.
func (b *Batch) finishLocked(err error) {
	if b.err != nil {
		err = b.err
	}
	b.busy = false
	w, posted := b.w, b.posted
	b.w, b.posted = nil, nil
	if err != nil {
		w.Fail(err)
		return
	}
	for i := range posted { // results are in the order of requests
		if op := posted[i].Opcode; op == ib.OpAtomicCmpSwap || op == ib.OpAtomicFetchAdd {
			b.found[b.copied] = binary.NativeEndian.Uint64(b.results[b.copied].mem)
			b.copied++
		}
	}
	w.Done()
}

// single returns a batch for one operation.
func (c *Conn) single() *Batch {
	s := &c.snd
	s.mu.Lock()
	b := s.batches
	if b != nil {
		s.batches = b.free
		b.free = nil
	}
	s.mu.Unlock()
	if b == nil {
		b = c.NewBatch(1)
	}
	return b
}

// finish runs a batch from single, and gives it back.
func (b *Batch) finish(ctx context.Context) error {
	err := b.Do(ctx)
	b.recycle()
	return err
}

// recycle gives a batch from single back. Its operations are over.
func (b *Batch) recycle() {
	b.clear()
	s := &b.c.snd
	s.mu.Lock()
	if s.sq == nil { // endSends has been
		b.dropLocked()
	} else {
		b.free = s.batches
		s.batches = b
	}
	s.mu.Unlock()
}

// Read reads dst.Length bytes at off of src into dst, which was registered in PD() with ib.AccessLocalWrite. Several
// operations at once are cheaper in a Batch. For errors and cancellation see Batch.Do.
func (c *Conn) Read(ctx context.Context, dst ib.SGE, src Remote, off uint64) error {
	b := c.single()
	b.Read(dst, src, off)
	return b.finish(ctx)
}

// ReadV is Read into several places.
func (c *Conn) ReadV(ctx context.Context, dst []ib.SGE, src Remote, off uint64) error {
	b := c.single()
	b.ReadV(dst, src, off)
	return b.finish(ctx)
}

// Write writes src, which was registered in PD(), to off of dst. When it returns nil, the bytes are in the peer's memory.
// A Write is not ordered after messages that are still queued for want of credit, but before messages sent afterwards.
func (c *Conn) Write(ctx context.Context, src ib.SGE, dst Remote, off uint64) error {
	b := c.single()
	b.Write(src, dst, off)
	return b.finish(ctx)
}

// WriteV is Write from several places.
func (c *Conn) WriteV(ctx context.Context, src []ib.SGE, dst Remote, off uint64) error {
	b := c.single()
	b.WriteV(src, dst, off)
	return b.finish(ctx)
}

// WriteBytes is Write of at most MaxInline bytes of ordinary memory.
func (c *Conn) WriteBytes(ctx context.Context, src []byte, dst Remote, off uint64) error {
	b := c.single()
	b.WriteBytes(src, dst, off)
	return b.finish(ctx)
}

// WriteImm is Write that also gives the peer a Message without bytes, whose Imm is imm, once the bytes are there. It
// takes a credit as a message does, and waits for one.
func (c *Conn) WriteImm(ctx context.Context, src ib.SGE, dst Remote, off uint64, imm uint32) error {
	b := c.single()
	defer b.recycle()
	b.Write(src, dst, off)
	if c.p.attr.Caps.Has(ib.CapImm) {
		b.wrs[0].Opcode, b.wrs[0].Imm = ib.OpRDMAWriteWithImm, imm
	} else { // the message comes behind the bytes, as everything that is sent later
		makeHeader(msgImm, 0, 0, imm).put(b.head[:])
		b.wrs = append(b.wrs, ib.SendWR{Opcode: ib.OpSend, Inline: b.head[:]})
	}
	if b.bad != nil {
		return b.bad
	}
	s := &c.snd
	b.own.Reset()
	for {
		s.mu.Lock()
		if err := s.usableLocked(); err != nil {
			s.mu.Unlock()
			return err
		}
		// The last credit is for a message that can say so.
		if s.credits > 1 && s.pend == nil {
			err := b.postLocked(0, len(b.wrs), &b.own)
			if err == nil {
				s.credits--
				s.mu.Unlock()
				return c.settle(ctx, &b.own)
			}
			if err != ErrWouldBlock {
				s.mu.Unlock()
				return err
			}
		} else if s.pend == nil && !s.lowTold {
			s.lowTold = true
			c.controlLocked(makeHeader(msgCredit, flagLow, 0, 0))
		}
		if err := c.waitLocked(ctx, &s.ops); err != nil {
			return err
		}
	}
}

// CompareAndSwap replaces the 8 bytes at off of dst, which are aligned, by new if they are old, atomically among the
// operations of the peer's device, and returns what they were.
func (c *Conn) CompareAndSwap(ctx context.Context, dst Remote, off, old, new uint64) (prev uint64, err error) {
	b := c.single()
	defer b.recycle()
	b.CompareAndSwap(dst, off, old, new)
	if err := b.Do(ctx); err != nil {
		return 0, err
	}
	return b.Result(0), nil
}

// FetchAdd adds delta to the 8 bytes at off of dst, which are aligned, atomically among the operations of the peer's
// device, and returns what they were.
func (c *Conn) FetchAdd(ctx context.Context, dst Remote, off, delta uint64) (prev uint64, err error) {
	b := c.single()
	defer b.recycle()
	b.FetchAdd(dst, off, delta)
	if err := b.Do(ctx); err != nil {
		return 0, err
	}
	return b.Result(0), nil
}

// A Grant lets the peer of one connection work on a piece of memory until it is revoked or the connection ends.
type Grant struct {
	c      *Conn
	win    *mr.Window // one of the two
	sub    *mr.MR
	remote Remote

	revoking chan struct{} // of a window: full while a Revoke is under way, since the second of two has nothing to do
}

// Grant lets the peer do access (any of ib.AccessRemoteRead, RemoteWrite, RemoteAtomic) on n bytes at off of m, which
// was registered in PD(). Exactly these bytes are granted. If m has ib.AccessMWBind and the device has memory windows that
// can be relied on (ib.CapMWBounds), they are granted to this peer alone, and without a system call. Otherwise the bytes
// are registered once more, which m's rights must allow or ib.AccessMWBind, and the key opens them to whoever has it.
// m cannot be closed before the grant has ended.
func (c *Conn) Grant(ctx context.Context, m *mr.MR, off, n int, access ib.Access) (*Grant, error) {
	if access&^ib.AccessRemote != 0 || access == 0 {
		return nil, fmt.Errorf("transport: Grant of %v: want remote rights", access)
	}
	if off < 0 || n <= 0 || off > m.Len()-n {
		return nil, fmt.Errorf("%w: Grant of %d bytes at %d of %d", ErrRange, n, off, m.Len())
	}
	g := &Grant{c: c}
	bindable := m.Access()&ib.AccessMWBind != 0
	if !bindable && m.Access()&access != access {
		return nil, fmt.Errorf("transport: Grant of %v on a region with %v", access, m.Access())
	}
	var err error
	if bindable && c.p.attr.Caps.Has(ib.CapMW2|ib.CapMWBounds) {
		err = g.bind(ctx, m, off, n, access)
	} else {
		err = g.register(m, off, n, access)
	}
	if err != nil {
		return nil, fmt.Errorf("transport: Grant: %w", err)
	}
	c.grantMu.Lock()
	ended := c.grantsEnded
	if !ended {
		if c.grants == nil {
			c.grants = make(map[*Grant]struct{})
		}
		c.grants[g] = struct{}{}
	}
	c.grantMu.Unlock()
	if ended {
		g.close()
		return nil, c.Err()
	}
	return g, nil
}

func (g *Grant) bind(ctx context.Context, m *mr.MR, off, n int, access ib.Access) error {
	w, err := mr.NewWindow(g.c.p.pd)
	if err != nil {
		return err
	}
	if err := g.c.request(ctx, w.BindWR(m, off, n, access)); err != nil {
		w.Close()
		return err
	}
	g.win, g.remote, g.revoking = w, w.Remote(), make(chan struct{}, 1)
	return nil
}

func (g *Grant) register(m *mr.MR, off, n int, access ib.Access) (err error) {
	local := ib.Access(0)
	if access&(ib.AccessRemoteWrite|ib.AccessRemoteAtomic) != 0 {
		if m.Access()&ib.AccessLocalWrite == 0 {
			return fmt.Errorf("%v on a region without local write", access)
		}
		local = ib.AccessLocalWrite
	}
	if g.sub, err = m.Sub(off, n, access|local); err != nil {
		return err
	}
	g.remote = g.sub.Remote()
	return nil
}

// close frees the window or the region. The queue pair is closed, or the window invalidated. It may be called again.
func (g *Grant) close() error {
	g.c.grantMu.Lock()
	delete(g.c.grants, g)
	g.c.grantMu.Unlock()
	if g.win != nil {
		return g.win.Close()
	}
	return g.sub.Close()
}

// endGrants ends all grants, after the queue pair was closed.
func (c *Conn) endGrants() {
	c.grantMu.Lock()
	grants := c.grants
	c.grants, c.grantsEnded = nil, true
	c.grantMu.Unlock()
	for g := range grants {
		g.close() // only the device's failure could keep it, and then the region's Close says so
	}
}

// request posts one work request and waits for it.
func (c *Conn) request(ctx context.Context, wr ib.SendWR) error {
	b := c.single()
	b.wrs = append(b.wrs, wr)
	b.which = append(b.which, -1)
	return b.finish(ctx)
}

// Remote is what the peer needs; send it in a message.
func (g *Grant) Remote() Remote { return g.remote }

// Revoke takes the peer's access away. When it returns nil, the peer touches the memory no more: its operations get
// ib.WCRemoteAccessErr, and that ends the connection. A grant ends with its connection, too; Revoke is then not needed, and
// harmless, as is a second one.
func (g *Grant) Revoke(ctx context.Context) error {
	if g.sub != nil {
		return g.close()
	}
	select {
	case g.revoking <- struct{}{}:
		defer func() { <-g.revoking }()
	case <-ctx.Done():
		return ctx.Err()
	}
	g.c.grantMu.Lock()
	_, live := g.c.grants[g]
	g.c.grantMu.Unlock()
	if !live { // revoked, or the connection ends
		if g.c.Err() != nil {
			<-g.c.done
		}
		return nil
	}
	if err := g.c.request(ctx, g.win.InvalidateWR()); err != nil && g.c.Err() == nil {
		return err
	} else if err != nil {
		<-g.c.done // the queue pair that the window was bound to is gone, and the access with it
	}
	return g.close()
}
