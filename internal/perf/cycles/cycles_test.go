package cycles

import (
	"errors"
	"testing"
	"time"
)

func TestCalibrate(t *testing.T) {
	r, err := Calibrate(5 * time.Millisecond)
	if err != nil {
		if !errors.Is(err, ErrUnusable) {
			t.Fatalf("error %v does not match ErrUnusable", err)
		}
		t.Skip(err)
	}
	if ns := r.NsPerTick(); ns < 0.05 || ns > 1000 {
		t.Errorf("a tick of %v ns is not plausible", ns)
	}
	// The counter and the clock agree over an interval that calibration did not see; generous, as the machine may be
	// busy between the two readings.
	a, t0 := Now(), time.Now()
	time.Sleep(20 * time.Millisecond)
	b, d := Now(), time.Since(t0)
	if got := float64(b-a) * r.NsPerTick(); got < 0.5*float64(d) || got > 2*float64(d)+1e9 {
		t.Errorf("counter says %v ns, clock says %v", got, d)
	}
}

func TestSlopes(t *testing.T) {
	for _, tt := range []struct {
		name       string
		p0, p1, p2 pair
		ok         bool
	}{
		{"steady", pair{0, 0}, pair{2500, 1000}, pair{5000, 2000}, true},
		{"changes rate", pair{0, 0}, pair{2500, 1000}, pair{6000, 2000}, false},
		{"stands still", pair{5, 0}, pair{5, 1000}, pair{5, 2000}, false},
		{"goes backwards", pair{5000, 0}, pair{2500, 1000}, pair{7000, 2000}, false},
	} {
		if _, _, ok := slopes(tt.p0, tt.p1, tt.p2); ok != tt.ok {
			t.Errorf("%s: agree = %v, want %v", tt.name, ok, tt.ok)
		}
	}
}

func TestNowAllocatesNothing(t *testing.T) {
	if n := testing.AllocsPerRun(100, func() { Now() }); n != 0 {
		t.Fatalf("Now allocates %v times", n)
	}
}

func BenchmarkNow(b *testing.B) {
	for b.Loop() {
		Now()
	}
}

func BenchmarkMonotonic(b *testing.B) {
	base := time.Now()
	for b.Loop() {
		_ = time.Since(base)
	}
}
