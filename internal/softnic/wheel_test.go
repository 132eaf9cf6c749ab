package softnic

import (
	"math/rand/v2"
	"testing"
	"time"
)

// Timers come when they are due, not before, and at most a tick late (or a turn of the wheel, for those to be put off).
func TestWheel(t *testing.T) {
	var h wheel
	r := rand.New(rand.NewPCG(1, 2))
	type timer struct {
		w    wireQP
		want time.Duration // 0: not set
	}
	timers := make([]timer, 50)
	index := map[*wireQP]*timer{}
	for i := range timers {
		index[&timers[i].w] = &timers[i]
	}
	now := 5 * time.Second
	came := 0
	const turn = wheelSlots * wheelTick
	for range 20000 {
		x := &timers[r.IntN(len(timers))]
		if d := time.Duration(r.Int64N(int64(3 * turn))); x.want == 0 || now+d < x.want { // timers are put off by who finds them
			x.want = now + d
			h.set(&x.w, x.want, now)
		}
		now += time.Duration(r.Int64N(int64(200 * time.Microsecond)))
		if r.IntN(500) == 0 {
			now += 2 * turn
		}
		if first := h.first(); h.count > 0 {
			for i := range timers {
				if w := timers[i].want; w != 0 && w+2*wheelTick < first && w > now {
					t.Fatalf("the first timer is said to come at %v, and one is due at %v", first, w)
				}
			}
		}
		h.due(now, func(w *wireQP) {
			x := index[w]
			if x.want > now {
				h.set(w, x.want, now) // not yet
				return
			}
			x.want = 0
			came++
		})
		for i := range timers {
			if w := timers[i].want; w != 0 && w+2*wheelTick < now {
				t.Fatalf("at %v, the timer of %v has not come", now, w)
			}
		}
	}
	if came < 3000 {
		t.Errorf("%d timers came", came)
	}
	now += 10 * turn
	h.due(now, func(*wireQP) {})
	if h.count != 0 || h.first() != 0 {
		t.Errorf("%d timers are left, the first at %v", h.count, h.first())
	}
}

// Setting timers, at times that no timer had before, allocates nothing.
func TestWheelAllocatesNothing(t *testing.T) {
	var h wheel
	var w wireQP
	now := time.Second
	if n := testing.AllocsPerRun(100, func() {
		now += 7 * wheelTick
		h.set(&w, now+500*wheelTick, now)
		h.set(&w, now+5*wheelTick, now) // sooner
		if h.count != 1 {
			t.Errorf("%d timers", h.count)
		}
		h.due(now+6*wheelTick, func(*wireQP) {})
	}); n != 0 || h.count != 0 {
		t.Errorf("%v allocations, %d timers are left", n, h.count)
	}
}
