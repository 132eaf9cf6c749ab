package transport

import "math/rand/v2"

// spin decides how long a poller in Adaptive mode polls before it sleeps. All times are in ns. Guarded by the poller's role.
//
// The difficulty is that of two peers which take turns each sees the other's sleep: once both sleep, every wait has two
// wake-ups in it, and may look too long for polling though a peer that polled would answer within a microsecond. So
// polling is not given up for a few such waits, and whoever has given it up tries it again, at random and several times
// in a row, so that the tries of two sides meet.
type spin struct {
	limit int64  // PollerConfig.SpinBudget
	avg   int64  // moving average of the short waits
	bad   int    // waits too long for polling, less short ones; 0 to maxBad
	tries int    // polls left in a series, when off
	off   bool   // polling has been given up
	every uint32 // spells for a series, on average; a power of two
	long  bool   // the last wait that was slept through was longer than wake-ups explain
	rng   uint64
}

const (
	maxBad    = 32  // then polling is given up
	tryLength = 4   // polls in a series of tries
	tryEvery  = 32  // spin.every after polling has been given up. Each series in vain doubles it,
	trySeldom = 128 // up to this: where the peer does not poll, a try finds it on a halted processor, and costs a slow wake-up.
	tryRarely = 512 // instead of it where waits are long
)

func newSpin(limit int64) spin {
	return spin{limit: limit, avg: limit / 4, every: tryEvery, rng: rand.Uint64() | 1}
}

// worthwhile is the longest wait that polling is expected to be better for than sleeping: beyond it the polling costs more
// processor time than the wake-up, and the wake-up adds little to the wait.
func (s *spin) worthwhile() int64 { return s.limit / 2 }

// patience is how long to poll where it isn't known what for: a peer that must be woken first may answer within it.
func (s *spin) patience() int64 { return 2 * s.limit }

// budget is for how long to poll before sleeping, in a wait that has just begun: twice what waits took of late, or longer
// after one that took more; not at all where polling has been given up, but for tries.
func (s *spin) budget() int64 {
	switch {
	case !s.off && s.bad == 0:
		return min(s.limit, 2*s.avg+5000)
	case !s.off:
		return s.patience()
	case s.tries == 0 && !s.chance():
		return 0
	case s.tries == 0:
		s.tries = tryLength
		s.every = min(2*s.every, trySeldom)
	}
	s.tries--
	return s.patience()
}

// chance tells whether a series of tries begins.
func (s *spin) chance() bool {
	s.rng ^= s.rng << 13
	s.rng ^= s.rng >> 7
	s.rng ^= s.rng << 17
	every := s.every
	if s.long {
		every = tryRarely
	}
	return uint32(s.rng>>32)&(every-1) == 0
}

// soon is called when a poll has found something before anybody looked at the clock.
func (s *spin) soon() {
	s.bad = max(0, s.bad-1)
	s.avg -= s.avg / 8
}

// found is called when polling has found something after d.
func (s *spin) found(d int64) {
	s.long = false
	switch {
	case d > s.worthwhile():
		s.missed(1)
	case s.off:
		s.off, s.avg, s.bad, s.every = false, d, maxBad*3/4, tryEvery
	default:
		s.avg += (d - s.avg) / 8
		s.bad = max(0, s.bad-1)
	}
}

// slept is called when something was found after d, and some of it was slept through.
func (s *spin) slept(d int64) {
	if s.long = d > 2*s.patience(); s.long {
		s.missed(4)
	} else {
		s.missed(1)
	}
}

func (s *spin) missed(n int) {
	s.bad = min(maxBad, s.bad+n)
	s.off = s.off || s.bad == maxBad
}
