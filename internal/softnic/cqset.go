package softnic

import (
	"math/bits"
	"sync/atomic"
)

// readySet is a bitmap of members with news. Producers set bits, the poller takes them.
type readySet struct {
	on    atomic.Bool
	words atomic.Pointer[[]atomic.Uint64] // replaced by grow under the CQ's lock
	hint  int                             // word to look at first; poller only
	some  atomic.Uint32                   // raised by set before a poller looks; cleared by a full look
}

// grow makes room for n members; the bitmap is in use once that is more than scanLimit.
func (r *readySet) grow(n int) {
	if n <= scanLimit {
		return
	}
	need := (n + 63) / 64
	old := r.words.Load()
	if old == nil || len(*old) < need {
		w := make([]atomic.Uint64, max(need, 4, 2*lenOf(old)))
		r.words.Store(&w)
		if old != nil {
			// A producer may still set a bit in the old words: the caller marks every member ready after a pause, and so do we.
			for i := range w {
				w[i].Store(^uint64(0))
			}
		}
	}
	r.some.Store(1)
	r.on.Store(true)
}

func lenOf(w *[]atomic.Uint64) int {
	if w == nil {
		return 0
	}
	return len(*w)
}

func (r *readySet) set(k int) {
	for {
		w := r.words.Load()
		if w == nil || k/64 >= len(*w) {
			return
		}
		(*w)[k/64].Or(1 << (k % 64))
		if r.some.Load() == 0 {
			r.some.Store(1)
		}
		if r.words.Load() == w { // not replaced meanwhile: the bit is where the poller looks
			return
		}
	}
}

// pop takes one member, in rising order from the last one taken; false: none is set.
func (r *readySet) pop() (int, bool) {
	if r.some.Load() == 0 {
		return 0, false
	}
	w := *r.words.Load()
	for pass := 0; pass < 2; pass++ {
		if pass == 1 {
			r.some.Store(0) // before the look that finds nothing, so that a bit set after it raises some again
		}
		for i := 0; i < len(w); i++ {
			k := r.hint + i
			if k >= len(w) {
				k -= len(w)
			}
			if b := w[k].Load(); b != 0 {
				bit := bits.TrailingZeros64(b)
				w[k].And(^(uint64(1) << bit))
				r.hint = k
				r.some.Store(1)
				return k*64 + bit, true
			}
		}
	}
	return 0, false
}

// backlog is a queue of members, each of which is in it once at most.
type backlog struct {
	ring  []int
	in    []bool // by member
	first int
	n     int
}

// grow makes room for n members.
func (b *backlog) grow(n int) {
	if n <= len(b.in) {
		return
	}
	n = max(n, 2*len(b.in))
	r := make([]int, n)
	for i := range b.n {
		r[i] = b.ring[(b.first+i)%len(b.ring)]
	}
	b.ring, b.first = r, 0
	b.in = append(b.in, make([]bool, n-len(b.in))...)
}

func (b *backlog) push(k int) {
	if b.in[k] {
		return
	}
	b.in[k] = true
	i := b.first + b.n
	if i >= len(b.ring) {
		i -= len(b.ring)
	}
	b.ring[i] = k
	b.n++
}

func (b *backlog) pop() (int, bool) {
	if b.n == 0 {
		return 0, false
	}
	k := b.ring[b.first]
	b.in[k] = false
	if b.first++; b.first == len(b.ring) {
		b.first = 0
	}
	b.n--
	return k, true
}
