package softnic

import (
	"math/bits"
	"sync/atomic"
)

// A port is the owner's side of how one CQ hears over one link; see layout.go.
type port struct {
	link *link
	cq   *CQ
	mem  block
	mode *uint32
	// armedWord: the owner sets it, the peer (or the owner) clears it by CAS.
	armedWord *uint32
	summary   *uint64
	bitmap    []uint64

	// members[bit] is the member index of the QP that uses the bit, or -1. Guarded by cq.mu.
	members []int32
	used    int
	gone    bool // given up: no member comes any more. Guarded by cq.mu
}

func newPort(l *link, c *CQ, b block) *port {
	w32, w64 := words32(b.mem), words64(b.mem)
	return &port{link: l, cq: c, mem: b, mode: &w32[portMode/4], armedWord: &w32[portArmed/4],
		summary: &w64[portSummary/8], bitmap: w64[portBitmap/8:][:portWords]}
}

func (p *port) setBitsMode() { atomic.StoreUint32(p.mode, portBits) }

func (p *port) arm(kind uint32) { atomic.StoreUint32(p.armedWord, kind) }

func (p *port) fired() bool { return atomic.LoadUint32(p.armedWord) == armNone }

// addMember gives a member of the CQ a bit; false: all are taken. Called with cq.mu held.
func (p *port) addMember(k int) (bit int, ok bool) {
	if p.used == portQPs || p.gone {
		return 0, false
	}
	p.used++
	for i, m := range p.members {
		if m < 0 {
			p.members[i] = int32(k)
			return i, true
		}
	}
	p.members = append(p.members, int32(k))
	return len(p.members) - 1, true
}

// dropMember takes back a bit that the peer does not set any more.
func (p *port) dropMember(bit int) {
	p.cq.mu.Lock()
	p.members[bit] = -1
	p.used--
	p.cq.mu.Unlock()
	p.tidy()
}

// tidy gives the port up if it has no members and will get none: its CQ is closed, or its link down. No lock is held.
func (p *port) tidy() {
	down := p.link.reason() != nil
	c := p.cq
	c.mu.Lock()
	idle := p.used == 0 && !p.gone && (c.closed || down)
	p.gone = p.gone || idle
	c.mu.Unlock()
	if idle {
		p.link.dropPort(p)
	}
}

// collect moves the peer's bits into the CQ's set. Called with cq.mu held. Bits that no QP uses are the peer's mistake and
// mean nothing.
func (p *port) collect(r *readySet) {
	if atomic.LoadUint64(p.summary) == 0 {
		return
	}
	for s := atomic.SwapUint64(p.summary, 0); s != 0; s &= s - 1 {
		w := bits.TrailingZeros64(s)
		for b := atomic.SwapUint64(&p.bitmap[w], 0); b != 0; b &= b - 1 {
			i := w*64 + bits.TrailingZeros64(b)
			if i < len(p.members) && p.members[i] >= 0 {
				r.set(int(p.members[i]))
			}
		}
	}
}

// portView is the peer's side of a port.
type portView struct {
	mode    *uint32
	armed   *uint32
	summary *uint64
	word    *uint64 // the bitmap word of this QP
	wordBit uint64  // bit of the word in the summary
	bit     uint64  // bit of the QP in the word
	wake    func()  // wakes the owner's channel; nil: it has none
}

func newPortView(mem []byte, bit uint32, wake func()) portView {
	w32, w64 := words32(mem), words64(mem)
	return portView{mode: &w32[portMode/4], armed: &w32[portArmed/4], summary: &w64[portSummary/8],
		word: &w64[portBitmap/8+int(bit/64)], wordBit: 1 << (bit / 64), bit: 1 << (bit % 64), wake: wake}
}

// notify tells the owner of completions that were just published. It is a plain load twice in the usual case.
func (v *portView) notify(solicited bool) {
	if atomic.LoadUint32(v.mode) == portBits {
		atomic.OrUint64(v.word, v.bit)
		if atomic.LoadUint64(v.summary)&v.wordBit == 0 {
			atomic.OrUint64(v.summary, v.wordBit)
		}
	}
	if a := atomic.LoadUint32(v.armed); a != armNone && (a == armAny || solicited) {
		if atomic.CompareAndSwapUint32(v.armed, a, armNone) && v.wake != nil {
			v.wake()
		}
	}
}
