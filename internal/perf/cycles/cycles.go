// Package cycles reads the processor's time-stamp counter, for measurements in which the operating system's clock
// would cost as much as what is measured.
//
// Now costs a few nanoseconds where time.Now costs tens. Its unit is a tick of unknown length: Calibrate compares the
// counter with the monotonic clock and refuses where the two do not keep step, so that a caller who got a Rate can
// trust it.
package cycles

import (
	"errors"
	"fmt"
	"math"
	"time"
)

// ErrUnusable is matched by the errors of Check and Calibrate: the counter cannot serve as a clock on this machine.
var ErrUnusable = errors.New("the processor's time-stamp counter cannot serve as a clock here")

// Rate is the length of a tick.
type Rate struct {
	nsPerTick float64
}

// NsPerTick returns the length of a tick in nanoseconds.
func (r Rate) NsPerTick() float64 { return r.nsPerTick }

// Check returns nil if the counter runs at one rate, on all processors alike and in sleep states too, as far as the
// processor and the kernel say so; otherwise an error that matches ErrUnusable and says what is missing.
func Check() error {
	if err := check(); err != nil {
		return fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	return nil
}

// Calibrate measures the length of a tick against the monotonic clock. It takes about 2*d (20 ms each is plenty), and
// fails with an error that matches ErrUnusable if Check does or if two measurements disagree by more than 0.1 %.
func Calibrate(d time.Duration) (Rate, error) {
	if err := Check(); err != nil {
		return Rate{}, err
	}
	base := time.Now()
	// A disturbed reading (this thread lost the processor between the two clocks) only shows as disagreement, so a
	// second attempt is worth its time before the counter is blamed.
	var a, b float64
	for range 3 {
		p0 := readPair(base)
		time.Sleep(d)
		p1 := readPair(base)
		time.Sleep(d)
		p2 := readPair(base)
		var ok bool
		if a, b, ok = slopes(p0, p1, p2); ok {
			return Rate{nsPerTick: float64(p2.ns-p0.ns) / float64(p2.ticks-p0.ticks)}, nil
		}
	}
	return Rate{}, fmt.Errorf("%w: two calibrations against the monotonic clock gave %.6g and %.6g ns a tick", ErrUnusable, a, b)
}

// pair is a moment on both clocks.
type pair struct {
	ticks uint64
	ns    int64
}

// slopes returns the tick lengths of the two intervals, and whether they agree.
func slopes(p0, p1, p2 pair) (a, b float64, ok bool) {
	if p1.ticks <= p0.ticks || p2.ticks <= p1.ticks || p1.ns <= p0.ns || p2.ns <= p1.ns {
		return math.NaN(), math.NaN(), false
	}
	a = float64(p1.ns-p0.ns) / float64(p1.ticks-p0.ticks)
	b = float64(p2.ns-p1.ns) / float64(p2.ticks-p1.ticks)
	return a, b, math.Abs(a-b) <= 1e-3*math.Min(a, b)
}

// readPair reads both clocks as close together as possible: of many attempts, the one with the shortest gap.
func readPair(base time.Time) pair {
	var best pair
	gap := uint64(math.MaxUint64)
	for range 64 {
		t0 := Now()
		ns := int64(time.Since(base))
		t1 := Now()
		if t1-t0 < gap {
			gap = t1 - t0
			best = pair{ticks: t0 + (t1-t0)/2, ns: ns}
		}
	}
	return best
}
