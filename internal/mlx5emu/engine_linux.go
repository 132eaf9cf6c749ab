package mlx5emu

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// An engine is what moves a device's data. Its buffers are used with the device's mu held.
type engine struct {
	stopping atomic.Bool
	done     chan struct{} // closed when the goroutine has ended; nil without one

	wqe   [maxWQE + bbSize]byte
	slot  [nextSegSize + 1<<maxRQStride]byte
	send  sendWQE
	segs  []dataSeg
	sges  []ib.SGE
	wrs   [1]ib.SendWR
	recvs [1]ib.RecvWR
	bind  ib.BindMW
	wcs   [64]ib.WC
	later []*qp // to be put into the error state
}

// How much one step does for one queue, so that none keeps the others waiting.
const (
	sendBudget = 64
	recvBudget = 256
)

// start starts the goroutine, if the device has one.
func (d *Device) start() {
	if d.cfg.Manual {
		return
	}
	d.engine.done = make(chan struct{})
	go d.run()
}

func (d *Device) stop() {
	d.engine.stopping.Store(true)
	if d.engine.done != nil {
		<-d.engine.done
	}
}

// run steps until the device is closed. It has nobody to wake it, as doorbells are stores to memory: so it looks again and again, less
// often the longer nothing happens.
func (d *Device) run() {
	defer close(d.engine.done)
	const shortest, longest = 20 * time.Microsecond, time.Millisecond
	const patience = 200 // steps without a pause
	idle, pause := 0, shortest
	for !d.engine.stopping.Load() {
		some, waits := d.step()
		switch {
		case some:
			idle, pause = 0, shortest
			runtime.Gosched() // or a client that spins on our processor would not see it
		case waits:
			time.Sleep(shortest)
		case idle < patience:
			idle++
			runtime.Gosched()
		default:
			time.Sleep(pause)
			pause = min(pause*5/4, longest)
		}
	}
}

// Step looks once at everything that the client and its peers may have changed, and does what there is to do; it reports whether there
// was anything. With Config.Manual, a client's request that involves no other process is done when it has returned false. It never
// waits.
func (d *Device) Step() bool {
	some, _ := d.step()
	return some
}

// step is Step. waits: the software NIC has requests that wait for a peer, and must be tried again.
func (d *Device) step() (some, waits bool) {
	d.mu.Lock()
	waits = d.nic.Progress()
	lossy := false
	for _, c := range d.order {
		rang, l := c.look()
		some, lossy = rang || some, l || lossy
	}
	if lossy {
		d.mu.Unlock()
		eachDevice(d, (*Device).readRecvs)
		d.mu.Lock()
	}
	for _, c := range d.order {
		some = c.work() || some
	}
	some = d.collect() || some
	some = d.asyncEvents() || some
	later := d.engine.later
	d.engine.later = nil
	d.mu.Unlock()
	for _, n := range later {
		n.toError()
		some = true
	}
	return some, waits
}

// look takes a client's doorbells. It reports whether there were any, and whether some are for queue pairs whose messages are lost if
// nobody receives them. Called with dev.mu held, as those below.
func (c *Context) look() (some, lossy bool) {
	for id := range c.uarIDs {
		u := c.uars[uint32(id)]
		if u == nil {
			continue
		}
		sends, arms := c.rings(u, func(b *doorbell) { c.dev.traceDoorbell(u, b) })
		some = some || sends || arms
		if sends {
			for _, n := range c.qps {
				if n.uar == u {
					n.rung = true
					lossy = lossy || n.typ != ib.RC
				}
			}
		}
		if arms {
			for _, n := range c.cqs {
				if n.uar == u {
					n.doorbell()
				}
			}
		}
	}
	return some, lossy
}

// work does what a client's queues ask for.
func (c *Context) work() (some bool) {
	if c.async != nil {
		c.async.flush()
	}
	for _, ch := range c.channels {
		ch.flush()
	}
	some = c.readRecvs()
	for _, n := range c.qps {
		if n.rung && !n.frozen {
			some = n.fetchSends() || some
		}
	}
	return some
}

func (c *Context) readRecvs() (some bool) {
	for _, n := range c.srqs {
		some = n.fetch() || some
	}
	for _, n := range c.qps {
		if !n.frozen {
			some = n.fetchRecvs() || some
		}
	}
	return some
}

// readRecvs reads the receive queues of all clients of a device. A device reads them when a message comes, the software NIC must have
// them before: so before a message is sent that would be lost, all devices of this process look.
func (d *Device) readRecvs() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.order {
		c.readRecvs()
	}
}

// The devices of this process.
var (
	devicesMu sync.Mutex
	devices   []*Device
)

func (d *Device) register() {
	devicesMu.Lock()
	defer devicesMu.Unlock()
	devices = append(slices.Clone(devices), d)
}

func (d *Device) unregister() {
	devicesMu.Lock()
	defer devicesMu.Unlock()
	devices = slices.DeleteFunc(slices.Clone(devices), func(o *Device) bool { return o == d })
}

// eachDevice calls f for every device but one.
func eachDevice(but *Device, f func(*Device)) {
	devicesMu.Lock()
	all := devices
	devicesMu.Unlock()
	for _, d := range all {
		if d != but {
			f(d)
		}
	}
}

// counter reads a counter of 16 bits in a doorbell record. What was read twice alike was not torn.
func (c *Context) counter(va uint64) (uint16, bool) {
	var a, b [4]byte
	if c.mem.ReadAt(a[:], va) != nil {
		return 0, false
	}
	for range 8 {
		if c.mem.ReadAt(b[:], va) != nil {
			return 0, false
		}
		if a == b {
			break
		}
		a = b
	}
	return uint16(be32(b[:])), true
}

// sge makes an SGE of the software NIC's of a data segment. A key that is not there becomes one that the software NIC does not have
// either: it says so when the request's turn comes.
func (d *Device) sge(s *dataSeg) ib.SGE {
	g := ib.SGE{Addr: s.addr, Length: s.n}
	if m := d.keys[s.lkey]; m != nil {
		g.LKey = m.soft.LKey()
	}
	return g
}

// recv makes a receive of the list of scatter entries in b.
func (e *engine) recv(c *Context, id uint64, b []byte) []ib.RecvWR {
	e.segs = scatterList(e.segs[:0], b)
	e.sges = e.sges[:0]
	for i := range e.segs {
		e.sges = append(e.sges, c.dev.sge(&e.segs[i]))
	}
	e.recvs[0] = ib.RecvWR{ID: id, SGEs: e.sges}
	return e.recvs[:]
}

// fetchRecvs hands receives that the client has posted to the software NIC, and reports whether there were any.
func (n *qp) fetchRecvs() (some bool) {
	if n.srq != nil || n.rqCount == 0 || n.recvBad {
		return false
	}
	posted, ok := n.c.counter(n.db)
	if ok && posted == n.recvNext {
		return false
	}
	if a, err := n.soft.Query(); err != nil || a.State == ib.Reset {
		return false
	}
	if !ok || uint32(posted-n.recvNext) > n.rqCount {
		n.lostRecvs()
		return true
	}
	d := n.c.dev
	slot := d.engine.slot[:1<<n.rqShift]
	for range recvBudget {
		if n.recvNext == posted {
			break
		}
		at := uint64(uint32(n.recvNext)&(n.rqCount-1)) << n.rqShift
		if n.c.mem.ReadAt(slot, n.buf+at) != nil {
			n.lostRecvs()
			return true
		}
		wr := d.engine.recv(n.c, uint64(n.life)<<48|uint64(n.recvNext), slot)
		if _, err := n.soft.PostRecv(wr); err != nil {
			break // it is full: completions that were not taken yet make room
		}
		n.recvNext++
		some = true
	}
	return some
}

// fetchSends hands WQEs that the client has posted to the software NIC, in order, and reports whether there were any.
func (n *qp) fetchSends() (some bool) {
	if n.wrecked || n.sendBad {
		return false
	}
	if n.hold != nil {
		return n.releaseHeld()
	}
	if a, err := n.soft.Query(); err != nil || a.State < ib.RTS {
		return false
	}
	posted, ok := n.c.sendCounter(n.db)
	if !ok || uint32(posted-n.sendNext) > n.sqCount {
		n.lostSends()
		return true
	}
	for range sendBudget {
		left := int(posted - n.sendNext)
		if left == 0 {
			n.rung = false
			break
		}
		if !n.fetchSend(posted, left) {
			break
		}
		some = true
	}
	return some
}

func (c *Context) sendCounter(db uint64) (uint16, bool) { return c.counter(db + 4) }

// fetchSend takes the next WQE, of which at most left basic blocks are posted. It reports whether the one behind it may follow.
func (n *qp) fetchSend(posted uint16, left int) bool {
	e := &n.c.dev.engine
	w := &e.send
	if !n.readSQ(e.wqe[:bbSize], n.sendNext) {
		n.lostSends()
		return false
	}
	w.control(e.wqe[:])
	bbs := w.bbs()
	if w.segs == 0 || bbs > left || w.index != n.sendNext || w.qpn != n.qpn {
		n.c.dev.traceWQE(n, posted, e.wqe[:max(w.segs*segSize, segSize)][:min(max(w.segs*segSize, segSize), bbSize)])
		n.bad(max(bbs, 1), left)
		return false
	}
	b := e.wqe[:w.segs*segSize]
	if len(b) > bbSize && !n.readSQ(b[bbSize:], n.sendNext+1) {
		n.lostSends()
		return false
	}
	n.c.dev.traceWQE(n, posted, b)
	if err := w.decode(b, n.typ); err != nil {
		n.bad(bbs, left)
		return false
	}
	id := makeSendID(n.life, w.opcode, w.signaled, w.index)
	if w.opcode == opNop {
		n.sendNext += uint16(bbs)
		n.hold = &held{id, ib.WCSuccess}
		n.releaseHeld()
		return n.hold == nil
	}
	st := n.c.dev.request(n, w)
	if st != ib.WCSuccess {
		n.sendNext += uint16(bbs)
		n.hold = &held{id, st}
		n.releaseHeld()
		return false
	}
	e.wrs[0].ID = uint64(id)
	if _, err := n.soft.PostSend(e.wrs[:]); err != nil {
		if retry(err) {
			return false
		}
		n.bad(bbs, left)
		return false
	}
	n.outstanding++
	n.sendNext += uint16(bbs)
	return true
}

// bad ends a WQE that cannot be executed with an error. What is behind it is flushed, if it can be found.
func (n *qp) bad(bbs, left int) {
	w := &n.c.dev.engine.send
	n.hold = &held{makeSendID(n.life, w.opcode, true, n.sendNext), ib.WCLocalQPOpErr}
	n.sendNext += uint16(min(bbs, left))
	n.releaseHeld()
}

// releaseHeld completes the request that waits for those in front of it, if they have completed.
func (n *qp) releaseHeld() bool {
	h := n.hold
	if n.outstanding > 0 {
		return false
	}
	n.hold = nil
	st := h.st
	if a, err := n.soft.Query(); err != nil || a.State == ib.Err || a.State == ib.SQE {
		st = ib.WCFlushErr // a request in front of it has failed meanwhile
	}
	n.completeSend(&ib.WC{ID: uint64(h.id), Status: st})
	if st != ib.WCSuccess && st != ib.WCFlushErr {
		n.wreck()
	}
	return true
}

// readSQ reads the queue from a basic block on, around its end if need be.
func (n *qp) readSQ(p []byte, block uint16) bool {
	size := uint64(n.sqCount) * bbSize
	off := uint64(block) * bbSize % size
	k := min(uint64(len(p)), size-off)
	base := n.buf + n.sqOffset
	return n.c.mem.ReadAt(p[:k], base+off) == nil && (k == uint64(len(p)) || n.c.mem.ReadAt(p[k:], base) == nil)
}

// request makes the software NIC's request of a WQE in engine.wrs. Other than success, it says how the request ends without it.
func (d *Device) request(n *qp, w *sendWQE) ib.WCStatus {
	e := &d.engine
	e.sges = e.sges[:0]
	for i := range w.data {
		e.sges = append(e.sges, d.sge(&w.data[i]))
	}
	if len(e.sges) > softMaxSGE {
		return ib.WCLocalQPOpErr
	}
	wr := &e.wrs[0]
	*wr = ib.SendWR{Flags: ib.SendSignaled, SGEs: e.sges, Inline: w.inline, RemoteAddr: w.raddr, RKey: ib.RKey(w.rkey), Imm: w.imm}
	if w.solicited {
		wr.Flags |= ib.SendSolicited
	}
	if w.fence {
		wr.Flags |= ib.SendFence
	}
	switch w.opcode {
	case opSend:
		wr.Opcode = ib.OpSend
	case opSendImm:
		wr.Opcode = ib.OpSendWithImm
	case opSendInval:
		wr.Opcode, wr.InvalidateRKey = ib.OpSendWithInv, ib.RKey(w.imm)
	case opWrite:
		wr.Opcode = ib.OpRDMAWrite
	case opWriteImm:
		wr.Opcode = ib.OpRDMAWriteWithImm
	case opRead:
		wr.Opcode = ib.OpRDMARead
	case opCompSwap:
		wr.Opcode, wr.Swap, wr.CompareAdd = ib.OpAtomicCmpSwap, w.swapAdd, w.cmp
	case opFetchAdd:
		wr.Opcode, wr.CompareAdd = ib.OpAtomicFetchAdd, w.swapAdd
	case opUMR:
		return d.bindRequest(w, wr)
	}
	if n.typ == ib.UD {
		num, ok := n.address(&w.av)
		if !ok {
			return ib.WCLocalQPOpErr
		}
		wr.AH, wr.RemoteQPN, wr.RemoteQKey = num, ib.QPN(w.av.qpn), ib.QKey(w.av.qkey)
	}
	return ib.WCSuccess
}

func (d *Device) bindRequest(w *sendWQE, wr *ib.SendWR) ib.WCStatus {
	b := &w.bind
	if b.unbind {
		wr.Opcode, wr.InvalidateRKey = ib.OpLocalInv, ib.RKey(b.key)
		return ib.WCSuccess
	}
	m, region := d.windows[b.key>>8], d.keys[b.lkey]
	if m == nil || region == nil || uint32(m.soft.RKey()) != w.imm {
		return ib.WCMWBindErr
	}
	d.engine.bind = ib.BindMW{Window: m.soft.Handle(), RKey: ib.RKey(b.key), MRLKey: region.soft.LKey(), Addr: b.addr, Length: b.length, Access: b.access}
	wr.Opcode, wr.Bind = ib.OpBindMW, &d.engine.bind
	return ib.WCSuccess
}

// collect writes CQEs for what has completed: receives first, as they were there first.
func (d *Device) collect() (some bool) {
	for _, c := range d.order {
		for _, n := range c.cqs {
			for {
				k := n.soft.Poll(d.engine.wcs[:])
				if k < 0 {
					n.fail()
				}
				if k <= 0 {
					break
				}
				n.pending = append(n.pending, d.engine.wcs[:k]...)
				some = true
				if k < len(d.engine.wcs) {
					break
				}
			}
		}
	}
	if !some {
		return false
	}
	for _, receives := range []bool{true, false} {
		for _, c := range d.order {
			for _, n := range c.cqs {
				for i := range n.pending {
					if wc := &n.pending[i]; wc.Opcode.IsRecv() == receives {
						d.completed(wc)
					}
				}
			}
		}
	}
	for _, c := range d.order {
		for _, n := range c.cqs {
			n.pending = n.pending[:0]
		}
	}
	return true
}

// completed writes the CQE of a completion, if it is wanted.
func (d *Device) completed(wc *ib.WC) {
	n := d.qps[uint32(wc.QPN)]
	if n == nil || n.frozen {
		return // it has gone meanwhile, or will have forgotten
	}
	if wc.Opcode.IsRecv() {
		n.completeRecv(wc)
		return
	}
	if id := sendID(wc.ID); id.life() == n.life {
		n.outstanding--
		n.completeSend(wc)
	}
}

func (n *qp) completeSend(wc *ib.WC) {
	if wc.Status == ib.WCSuccess && !sendID(wc.ID).signaled() {
		return
	}
	var e cqe
	e.requester(wc, n.qpn)
	n.stamp(&e)
	n.scq.complete(&e, wc.Status != ib.WCSuccess)
}

func (n *qp) completeRecv(wc *ib.WC) {
	if n.srq == nil && uint16(wc.ID>>48) != n.life {
		return
	}
	var e cqe
	e.responder(wc, n.qpn, uint16(wc.ID))
	n.stamp(&e)
	n.rcq.complete(&e, wc.Status != ib.WCSuccess || wc.Flags&wcSolicited != 0)
}

// stamp fills what all CQEs have: the number by which the client knows the queue pair, and the time.
func (n *qp) stamp(e *cqe) {
	index := n.index
	if n.c.cqeVersion == 0 {
		index = 0
		if n.srq != nil && e[cqeOwner]>>4 != cqeRequester && e[cqeOwner]>>4 != cqeRequesterErr {
			index = n.srq.srqn
		}
	}
	be.PutUint32(e[cqeUserIndex:], index&cqeUserIndexMask)
	if op := e[cqeOwner] >> 4; op != cqeRequesterErr && op != cqeResponderErr {
		be.PutUint64(e[cqeTime:], n.c.dev.now())
	}
}

// now is the time of a CQE, in nanoseconds of a clock that begins anywhere.
func (d *Device) now() uint64 {
	if d.cfg.Numbered {
		d.clock++
		return d.clock
	}
	return uint64(time.Since(d.began))
}

// lostSends and lostRecvs end a queue that cannot be read: its memory is gone, or its counter cannot be. What has been read before is
// flushed, and nothing more is read until RESET.
func (n *qp) lostSends() {
	n.sendBad = true
	n.fatal()
}

func (n *qp) lostRecvs() {
	n.recvBad = true
	n.fatal()
}

// fatal puts the queue pair into the error state, and says so.
func (n *qp) fatal() {
	if !n.wrecked {
		n.c.raise(n, n.user, &n.events, ib.EventQPFatal)
		n.wreck()
	}
}

// wreck has the queue pair put into the error state, which waits for peers, and so is done without the lock.
func (n *qp) wreck() {
	n.wrecked = true
	n.c.dev.engine.later = append(n.c.dev.engine.later, n)
}

func (n *qp) toError() {
	n.modify.Lock()
	n.soft.Modify(context.Background(), &ib.QPAttr{State: ib.Err}, ib.AttrState)
	n.modify.Unlock()
	d := n.c.dev
	d.mu.Lock()
	n.wrecked, n.rung = false, true // what is left in the queue is flushed
	d.mu.Unlock()
}

// raise adds an asynchronous event about an object to the client's.
func (c *Context) raise(about object, user uint64, count *uint32, t ib.EventType) {
	if c.async == nil {
		return
	}
	*count++
	b := make([]byte, maxRecord)
	native.PutUint64(b, user)
	native.PutUint32(b[8:], uint32(t))
	c.async.send(b, about)
}

// asyncEvents passes on what the software NIC has to say of queue pairs and shared receive queues.
func (d *Device) asyncEvents() (some bool) {
	for {
		ev, err := d.nic.AsyncEvent(alreadyOver)
		if err != nil {
			return some
		}
		some = true
		switch {
		case ev.QP != nil:
			if n := d.qps[uint32(ev.QP.QPN())]; n != nil && driver.QP(n.soft) == ev.QP {
				n.c.raise(n, n.user, &n.events, ev.Type)
			}
		case ev.SRQ != nil:
			for _, c := range d.order {
				for _, n := range c.srqs {
					if n.soft == ev.SRQ {
						c.raise(n, n.user, &n.events, ev.Type)
					}
				}
			}
		}
	}
}

// alreadyOver is a context that waits for nothing.
var alreadyOver = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()
