package transport

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// spinner plays one side's poller in virtual time, in ns.
type spinner struct {
	spin
	idle   int64 // when its wait began
	polled int64 // time spent polling
}

// wait ends the wait in which something arrives at time t, and returns when it is seen. A wake-up takes about wake.
func (s *spinner) wait(r *rand.Rand, t, wake int64) int64 {
	const look = 1000 // until the first look at the clock
	if t <= s.idle+look {
		s.polled += max(0, t-s.idle)
		s.soon()
		return max(t, s.idle)
	}
	b := look + s.budget()
	if t <= s.idle+b {
		s.polled += t - s.idle
		s.found(t - s.idle)
		return t
	}
	s.polled += b
	t += wake/2 + r.Int64N(wake)
	s.slept(t - s.idle)
	return t
}

// TestSpinTurns has two sides take turns with short messages, from different states, and demands that they find out that
// polling is worthwhile, also where a wake-up takes longer than SpinBudget, and that what keeps one of them for a moment
// does not put them to sleep for good.
func TestSpinTurns(t *testing.T) {
	const limit, flight, work, calls = 50_000, 300, 200, 40_000
	for _, wake := range []int64{3_000, 12_000, 50_000, 65_000} {
		for _, from := range []string{"new", "off", "long waits"} {
			t.Run(fmt.Sprintf("%dus/%s", wake/1000, from), func(t *testing.T) {
				r := rand.New(rand.NewPCG(1, uint64(wake)))
				var side [2]spinner
				for i := range side {
					s := &side[i]
					s.spin = newSpin(limit)
					s.rng = r.Uint64() | 1
					s.off = from != "new"
					s.long = from == "long waits"
				}
				var now int64
				slow := 0 // calls of the second half that a wake-up was in
				for i := range calls {
					began := now
					for j := range side {
						kept := int64(0)
						if r.IntN(1000) == 0 {
							kept = r.Int64N(300_000) // by an interrupt, or another process
						}
						side[j].idle = now + work
						now = side[1-j].wait(r, now+work+flight+kept, wake)
					}
					if now-began > 10_000 && i >= calls/2 {
						slow++
					}
				}
				if slow > calls/2/20 {
					t.Errorf("%d of %d calls took over 10 us: off %v, %v", slow, calls/2, side[0].off, side[1].off)
				}
			})
		}
	}
}

// TestSpinLong has messages come at intervals that polling is no good for, and demands that little time goes into it.
func TestSpinLong(t *testing.T) {
	for _, gap := range []int64{300_000, 1_000_000, 20_000_000} {
		r := rand.New(rand.NewPCG(2, uint64(gap)))
		s := spinner{spin: newSpin(50_000)}
		s.rng = r.Uint64() | 1
		var now int64
		for range 10_000 {
			s.idle = now
			now = s.wait(r, now+gap/2+r.Int64N(gap), 10_000)
		}
		if share := float64(s.polled) / float64(now); share > 0.01 {
			t.Errorf("every %d us: %.1f %% of the time goes into polling", gap/1000, 100*share)
		}
	}
}
