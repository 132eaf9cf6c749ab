package rpc

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// Histogram buckets are logarithmic with four steps to a factor of two: bucket boundaries are within 25 % of each
// other, from 1 ns to about 36 minutes.
const (
	histSubBits = 2
	histBuckets = 40 << histSubBits
)

// histogram is a latency histogram of plain atomics: recording is one addition.
type histogram struct {
	buckets [histBuckets]atomic.Uint64
}

func histIndex(d time.Duration) int {
	if d < 1<<histSubBits {
		return int(max(d, 0))
	}
	shift := bits.Len64(uint64(d)) - 1 - histSubBits
	i := (shift+1)<<histSubBits + int(uint64(d)>>shift)&(1<<histSubBits-1)
	return min(i, histBuckets-1)
}

// histUpper returns the largest duration that falls into bucket i.
func histUpper(i int) time.Duration {
	if i < 1<<histSubBits {
		return time.Duration(i)
	}
	shift := i>>histSubBits - 1
	return time.Duration(uint64(1<<histSubBits+i&(1<<histSubBits-1)+1)<<shift) - 1
}

func (h *histogram) record(d time.Duration) { h.buckets[histIndex(d)].Add(1) }

// methodMetrics is what is counted for a method. A nil pointer counts nothing: that is how metrics are off.
type methodMetrics struct {
	calls   [maxCode + 1]atomic.Uint64
	latency histogram
}

// begin returns the time to hand to end; the zero time if metrics are off, which costs no look at the clock.
func (m *methodMetrics) begin() time.Time {
	if m == nil {
		return time.Time{}
	}
	return time.Now()
}

func (m *methodMetrics) end(start time.Time, code Code) {
	if m == nil {
		return
	}
	m.latency.record(time.Since(start)) // first, as snapshot reads it last: what is counted has a latency
	m.calls[min(code, maxCode)].Add(1)
}

// MethodStats is a snapshot of a method's counters. Latency is the handler's on the server (with the time that the
// request waited for a worker), and the whole call's on the client.
type MethodStats struct {
	Method Method
	Name   string // empty for a method without a name
	// Calls counts finished calls by status code.
	Calls [maxCode + 1]uint64
	// Buckets is the latency histogram; bucket i counts calls that took at most BucketUpper(i), and longer than
	// BucketUpper(i-1).
	Buckets [histBuckets]uint64
}

// BucketUpper returns the upper bound of bucket i of MethodStats.Buckets.
func BucketUpper(i int) time.Duration { return histUpper(i) }

// Total returns the number of finished calls.
func (s *MethodStats) Total() uint64 {
	var n uint64
	for _, c := range s.Calls {
		n += c
	}
	return n
}

// Quantile returns an upper bound of the q-quantile of the latency, 0 <= q <= 1: exact to 25 %. It is 0 if there were
// no calls.
func (s *MethodStats) Quantile(q float64) time.Duration {
	var total uint64
	for _, n := range s.Buckets {
		total += n
	}
	if total == 0 {
		return 0
	}
	rank := uint64(q * float64(total))
	if rank >= total {
		rank = total - 1
	}
	var seen uint64
	for i, n := range s.Buckets {
		if seen += n; seen > rank {
			return histUpper(i)
		}
	}
	return histUpper(histBuckets - 1)
}

func (m *methodMetrics) snapshot(id Method, name string) MethodStats {
	s := MethodStats{Method: id, Name: name}
	for i := range m.calls {
		s.Calls[i] = m.calls[i].Load()
	}
	for i := range m.latency.buckets {
		s.Buckets[i] = m.latency.buckets[i].Load()
	}
	return s
}
