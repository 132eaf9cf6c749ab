package rpc

import (
	"testing"
	"time"
)

func TestHistogram(t *testing.T) {
	prev := time.Duration(-1)
	for i := range histBuckets {
		u := histUpper(i)
		if u <= prev || histIndex(u) != i || histIndex(prev+1) != i {
			t.Fatalf("bucket %d: (%d, %d] is not what histIndex says: %d, %d", i, prev, u, histIndex(prev+1), histIndex(u))
		}
		if prev > 8 && float64(u+1) > 1.25*float64(prev+1) {
			t.Fatalf("bucket %d is too wide: (%d, %d]", i, prev, u)
		}
		prev = u
	}
	if histIndex(-5) != 0 || histIndex(1<<62) != histBuckets-1 {
		t.Error("out of range")
	}
	var m methodMetrics
	for i := range 1000 {
		m.calls[OK].Add(1)
		m.latency.record(time.Duration(i+1) * time.Microsecond)
	}
	s := m.snapshot(1, "")
	if s.Total() != 1000 {
		t.Error("total")
	}
	for _, q := range []struct {
		q    float64
		want time.Duration
	}{{0, time.Microsecond}, {0.5, 500 * time.Microsecond}, {0.99, 990 * time.Microsecond}, {1, time.Millisecond}} {
		if got := s.Quantile(q.q); got < q.want || float64(got) > 1.26*float64(q.want) {
			t.Errorf("quantile %v is %v, want about %v", q.q, got, q.want)
		}
	}
	if (&MethodStats{}).Quantile(0.5) != 0 {
		t.Error("quantile of nothing")
	}
}
