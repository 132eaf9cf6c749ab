package wire

import (
	"reflect"
	"sync"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// An early packet waits for those before it (Config.Selective), and its payload in a copy. In the middle of a WRITE that has begun it is
// written to its place at once, since bytes of a message may be written in any order before it ends. In a later WRITE it is not: that
// may be for the same memory.
type early struct {
	there  bool
	placed bool
	pkt    roce.Packet
}

// aheads are a Responder's early packets, by PSN.
type aheads struct {
	pool  *EarlyPool
	slots []early // nil: there are none
	n     int     // that are there
	held  int     // bytes of the pool
	top   ib.PSN  // the PSN behind the last packet that has come
}

func (a *aheads) at(psn ib.PSN) *early { return &a.slots[uint32(psn)%uint32(len(a.slots))] }

// open makes room for slots early packets, a power of two; false: there is no memory for it.
func (a *aheads) open(slots int, want ib.PSN) bool {
	if a.slots != nil {
		return true
	}
	if a.slots = a.pool.table(slots, a.held); a.slots == nil {
		return false
	}
	a.held += slots * slotSize
	a.top = want
	return true
}

// keep copies a packet to its slot, which is free; false: there is no memory for it. placed: its payload is where it belongs.
func (a *aheads) keep(x *early, p *roce.Packet, placed bool) bool {
	var payload []byte // never p's, even if it is empty: what has a capacity here is the pool's
	if placed {
		payload = inPlace[:len(p.Payload)]
	} else if len(p.Payload) > 0 {
		b := a.pool.buffer(len(p.Payload), a.held)
		if b == nil {
			return false
		}
		a.held += cap(b)
		payload = append(b, p.Payload...)
	}
	a.n++
	x.there, x.placed, x.pkt = true, placed, *p
	x.pkt.Payload = payload
	return true
}

// release gives the place of an early packet back.
func (a *aheads) release(x *early) {
	if b := x.pkt.Payload; cap(b) > 0 && !x.placed {
		a.held -= cap(b)
		a.pool.put(b)
	}
	*x = early{}
	a.n--
}

// skip forgets the early packets of n PSNs from psn on, which a READ has taken: they will not be executed.
func (a *aheads) skip(psn ib.PSN, n uint32) {
	if a.slots == nil {
		return
	}
	for range min(n, uint32(len(a.slots))) {
		if x := a.at(psn); x.there && x.pkt.PSN == psn {
			a.release(x)
		}
		psn = psn.Add(1)
	}
}

// drop forgets all early packets.
func (a *aheads) drop(want ib.PSN) {
	for i := 0; a.n > 0; i++ {
		if x := &a.slots[i]; x.there {
			a.release(x)
		}
	}
	a.top = want
	a.rest()
}

// rest gives the slots back, if nothing is in them.
func (a *aheads) rest() {
	if a.n == 0 && a.slots != nil {
		a.held -= len(a.slots) * slotSize
		a.pool.putTable(a.slots)
		a.slots = nil
	}
}

// An EarlyPool is memory for early packets, and what of it the Responders that share it may have: each as much as is left. So one has
// half of it at most, and however many peers send what makes no sense until something comes that never does, there is room for
// one more (dynamic thresholds, as switches divide their buffers: Choudhury and Hahne, 1998). A packet that there is no room for is
// dropped, as on its way, and comes again. It is safe for concurrent use.
type EarlyPool struct {
	max int // bytes

	mu     sync.Mutex
	lent   int // bytes that Responders have
	spare  int // bytes that were lent once, and are kept for the next
	free   [len(bufferSizes)][][]byte
	tables [][]early
}

// bufferSizes are those of buffers: payloads are at most as long as the largest path MTU, and mostly short, or as long as the path's.
var bufferSizes = [...]int{64, 256, 1024, 4096}

// slotSize is what a place for an early packet takes, without its payload.
var slotSize = int(reflect.TypeFor[early]().Size())

// NewEarlyPool returns a pool of so many bytes.
func NewEarlyPool(max int) *EarlyPool { return &EarlyPool{max: max} }

// Lent returns how many bytes Responders have now.
func (p *EarlyPool) Lent() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lent
}

// admit counts size bytes for a Responder that has held already; false: it may not have more. Called with mu held.
func (p *EarlyPool) admit(size, held int) bool {
	if held+size > p.max-p.lent-size {
		return false
	}
	p.lent += size
	return true
}

// fit has what is lent and what is spare fit together. Called with mu held, after admit.
func (p *EarlyPool) fit() {
	if p.lent+p.spare > p.max {
		p.forget()
	}
}

// forget leaves what is spare to the garbage collector. Called with mu held.
func (p *EarlyPool) forget() { p.free, p.tables, p.spare = [len(bufferSizes)][][]byte{}, nil, 0 }

// back counts size bytes that come back, and are spare from now on: so is an eighth of the pool at most. Called with mu held.
func (p *EarlyPool) back(size int) {
	p.lent -= size
	if p.spare+size > p.max/8 { // it is what is used now that is kept
		p.forget()
	}
	p.spare += size
}

// class is the index of the size for n bytes; len(bufferSizes) if they are too many.
func class(n int) (k int) {
	for k < len(bufferSizes) && bufferSizes[k] < n {
		k++
	}
	return k
}

// buffer returns an empty buffer for n bytes to who has held bytes already; nil: there is none.
func (p *EarlyPool) buffer(n, held int) []byte {
	k := class(n)
	p.mu.Lock()
	defer p.mu.Unlock()
	if k == len(bufferSizes) || !p.admit(bufferSizes[k], held) {
		return nil
	}
	if list := p.free[k]; len(list) > 0 {
		b := list[len(list)-1]
		p.free[k] = list[:len(list)-1]
		p.spare -= cap(b)
		return b
	}
	p.fit()
	return make([]byte, 0, bufferSizes[k])
}

// put takes a buffer back.
func (p *EarlyPool) put(b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.back(cap(b))
	k := class(cap(b))
	p.free[k] = append(p.free[k], b[:0])
}

// table returns n empty slots to who has held bytes already; nil: there are none.
func (p *EarlyPool) table(n, held int) []early {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.admit(n*slotSize, held) {
		return nil
	}
	if last := len(p.tables) - 1; last >= 0 && len(p.tables[last]) == n {
		t := p.tables[last]
		p.tables = p.tables[:last]
		p.spare -= n * slotSize
		return t
	}
	p.fit()
	return make([]early, n)
}

// putTable takes slots back, which are empty.
func (p *EarlyPool) putTable(t []early) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.back(len(t) * slotSize)
	p.tables = append(p.tables, t)
}

// early takes a packet that is d PSNs before its time.
func (r *Responder) early(p *roce.Packet, d int32) {
	a := &r.ahead
	if r.nakked || int(d) >= 2*r.cfg.Window {
		r.Counters.Dropped++ // it will come again: after the wait for a receive, or because of a timer
		return
	}
	slots := 1
	for slots < 2*r.cfg.Window {
		slots *= 2
	}
	if len(p.Payload) > r.cfg.MTU || !a.open(slots, r.want) {
		r.Counters.Dropped++
		return
	}
	if distance(a.top, r.want) > 0 {
		a.top = r.want
	}
	x := a.at(p.PSN)
	if x.there && x.pkt.PSN == p.PSN {
		r.Counters.Duplicates++
		if p.AckReq && p.PSN.Add(1) == a.top {
			r.report()
		} else {
			r.sayEarly(p)
		}
		return
	}
	if !a.keep(x, p, r.msg.place(p, d)) {
		a.rest()
		r.Counters.Dropped++
		return
	}
	behind := p.PSN.Add(1)
	if p.Opcode.Op() == roce.ReadRequest {
		behind = p.PSN.Add(int32(min(packets(p.Len, r.cfg.MTU), maxPackets)))
	}
	if gap := distance(a.top, p.PSN); gap > 0 && r.outTail-r.outHead < uint32(len(r.out))/2 {
		*r.push() = response{psn: r.want, msn: uint32(distance(r.want, a.top))<<12 | uint32(gap), syndrome: roce.NakPSN}
	}
	if distance(a.top, behind) > 0 {
		a.top = behind
	}
	r.sayEarly(p)
}

// sayEarly acknowledges what came before the gap, if p asks for it: an acknowledgement says how far behind it packets have come, too.
func (r *Responder) sayEarly(p *roce.Packet) {
	if p.AckReq && r.outTail-r.outHead < uint32(len(r.out))/2 {
		r.say(r.want.Add(-1), roce.Ack)
	}
}

// beyond is how far behind psn packets have come that are early; 0: psn is not what they wait for.
func (r *Responder) beyond(psn ib.PSN) uint32 {
	if r.ahead.slots == nil || psn != r.want {
		return 0
	}
	return uint32(max(0, distance(psn, r.ahead.top)))
}

// report says everything that is missing: the newest packet has come again, with which a requester asks for that.
func (r *Responder) report() {
	a := &r.ahead
	gap := span{first: r.want}
	say := func() {
		if gap.n > 0 && r.outTail-r.outHead < uint32(len(r.out))/2 {
			*r.push() = response{psn: r.want, msn: uint32(distance(r.want, gap.first))<<12 | gap.n, syndrome: roce.NakPSN}
		}
	}
	for psn := r.want; distance(psn, a.top) > 0; {
		x := a.at(psn)
		if !x.there || x.pkt.PSN != psn {
			psn = psn.Add(1)
			gap.n++
			continue
		}
		say()
		if psn = psn.Add(1); x.pkt.Opcode.Op() == roce.ReadRequest {
			psn = x.pkt.PSN.Add(int32(min(packets(x.pkt.Len, r.cfg.MTU), maxPackets)))
		}
		gap = span{first: psn}
	}
	say()
}

// catchUp executes the early packets whose time has come.
func (r *Responder) catchUp() {
	a := &r.ahead
	for a.slots != nil && !r.failed {
		x := a.at(r.want)
		if !x.there || x.pkt.PSN != r.want {
			break
		}
		r.execute(&x.pkt, x.placed)
		a.release(x)
		if r.nakked { // no receive: the requester goes back to it
			a.drop(r.want)
		}
	}
	if r.failed {
		a.drop(r.want)
	}
	a.rest()
	if r.outHead != r.outTail && r.beyond(r.want) > 0 {
		if last := r.at(r.outTail - 1); !last.result && last.syndrome == roce.Ack {
			r.say(r.want.Add(-1), roce.Ack) // there is another gap
		}
	}
}

// Discard forgets what has come early.
func (r *Responder) Discard() { r.ahead.drop(r.want) }
