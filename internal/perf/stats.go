package perf

import (
	"math"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// stampsMax is how many iterations a side runs before it folds their clock readings into the histogram: 8 MiB of them.
// Folding happens between iterations, outside of what is timed. It has to be quick all the same, because the other
// side spins meanwhile and its CPU time counts: see recorder.low.
const stampsMax = 1 << 20

// lowTicks is the longest iteration that has a counter of its own: 26 us at 2.5 GHz.
const lowTicks = 1 << 16

// The histogram counts picoseconds, since an operation may take less than 50 ns, and goes up to an hour. 3 significant
// digits.
const (
	histMax    = int64(time.Hour / time.Nanosecond * 1000)
	histDigits = 3
)

// A recorder turns the clock readings between the iterations of a latency test into a histogram.
type recorder struct {
	// stamps holds one reading before the first iteration and one after each. The timed loop writes it directly.
	stamps []uint64

	psPerTick float64 // of one iteration's share: halved already where half of the round trip is reported
	// low counts short iterations by ticks: an increment, where the histogram's arithmetic takes ten times as long. They
	// move to the histogram at the end.
	low      []uint32
	hist     *hdrhistogram.Histogram
	n        uint64
	sum      uint64 // ticks
	min, max uint64 // ticks
}

// newRecorder makes a recorder for up to chunk iterations at a time. parts is how many latencies an iteration consists
// of: 2 for half of a round trip.
func newRecorder(chunk int, nsPerTick float64, parts int) *recorder {
	r := &recorder{
		stamps:    make([]uint64, chunk+1),
		psPerTick: nsPerTick * 1000 / float64(parts),
		low:       make([]uint32, lowTicks),
		hist:      hdrhistogram.New(1, histMax, histDigits),
		min:       math.MaxUint64,
	}
	for i := range r.stamps { // page faults belong here, not into the measurement
		r.stamps[i] = 1
	}
	return r
}

// fold adds the first n iterations that stamps holds.
func (r *recorder) fold(n int) {
	for i := range n {
		r.add(r.stamps[i+1] - r.stamps[i])
	}
}

// add adds one iteration that took ticks.
func (r *recorder) add(ticks uint64) {
	if int64(ticks) < 0 { // counters of two processors, out of step by less than what is measured
		ticks = 0
	}
	r.n++
	r.sum += ticks
	r.min = min(r.min, ticks)
	r.max = max(r.max, ticks)
	if ticks < lowTicks && r.low[ticks] < math.MaxUint32 {
		r.low[ticks]++
		return
	}
	r.record(ticks, 1)
}

func (r *recorder) record(ticks uint64, n int64) {
	ps := int64(math.Min(float64(ticks)*r.psPerTick+0.5, float64(histMax)))
	_ = r.hist.RecordValues(ps, n) // cannot fail: in range
}

// latency returns what was recorded, or nil if nothing was.
func (r *recorder) latency() *Latency {
	if r.n == 0 {
		return nil
	}
	for ticks, n := range r.low {
		if n > 0 {
			r.record(uint64(ticks), int64(n))
			r.low[ticks] = 0
		}
	}
	ns := func(ticks uint64) float64 { return float64(ticks) * r.psPerTick / 1000 }
	lo, hi := ns(r.min), ns(r.max)
	// The histogram's buckets reach up to 0.1 % beyond the values in them; the extremes are known exactly.
	q := func(p float64) float64 { return math.Min(math.Max(float64(r.hist.ValueAtPercentile(p))/1000, lo), hi) }
	l := &Latency{
		Min: lo, Mean: float64(r.sum) / float64(r.n) * r.psPerTick / 1000, StdDev: r.hist.StdDev() / 1000,
		P50: q(50), P90: q(90), P99: q(99), P999: q(99.9), Max: hi,
	}
	// For the plot: as far into the tail as there are samples.
	for _, p := range []float64{0, 10, 25, 50, 75, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.98, 99.99, 99.999, 99.9999, 99.99999} {
		if p == 0 || (1-p/100)*float64(r.n) >= 1 {
			l.curve = append(l.curve, curvePoint{p, q(p)})
		}
	}
	return l
}

// Latency is a distribution of latencies in nanoseconds.
type Latency struct {
	Min    float64 `json:"min"`
	Mean   float64 `json:"mean"`
	StdDev float64 `json:"stddev"`
	P50    float64 `json:"p50"`
	P90    float64 `json:"p90"`
	P99    float64 `json:"p99"`
	P999   float64 `json:"p99_9"`
	Max    float64 `json:"max"`

	curve []curvePoint
}

// curvePoint is one point of the distribution: percentile, and nanoseconds.
type curvePoint struct{ percentile, ns float64 }
