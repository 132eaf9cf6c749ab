package perf

import (
	"errors"
	"fmt"
	"time"

	"github.com/ringside-rdma/ringside/internal/perf/cycles"
)

// ClockMode is which clock a latency test reads between iterations.
type ClockMode uint8

// The clock modes.
const (
	ClockAuto ClockMode = iota // ClockTSC where it can be trusted, otherwise ClockMono
	ClockTSC                   // the processor's time-stamp counter
	ClockMono                  // the operating system's monotonic clock
)

var clockNames = map[ClockMode]string{ClockAuto: "auto", ClockTSC: "tsc", ClockMono: "mono"}

func (c ClockMode) String() string { return nameOf(clockNames, c) }

// ParseClockMode returns the clock mode called s.
func ParseClockMode(s string) (ClockMode, error) { return parseName(clockNames, "clock", s) }

// A clock counts ticks.
type clock struct {
	tsc       bool
	base      time.Time
	nsPerTick float64
}

// newClock calibrates the clock, which takes some 40 ms for the TSC.
func newClock(m ClockMode) (clock, error) {
	if m != ClockMono {
		r, err := cycles.Calibrate(20 * time.Millisecond)
		// A counter that ticks more slowly than the clock can be read (arm64's generic timer) has no advantage over it.
		if err == nil && (m == ClockTSC || r.NsPerTick() <= 2) {
			return clock{tsc: true, nsPerTick: r.NsPerTick()}, nil
		}
		if m == ClockTSC {
			return clock{}, fmt.Errorf("--clock tsc: %w: use --clock mono", err)
		}
		if err != nil && !errors.Is(err, cycles.ErrUnusable) {
			return clock{}, err
		}
	}
	return clock{base: time.Now(), nsPerTick: 1}, nil
}

func (c *clock) name() string {
	if c.tsc {
		return ClockTSC.String()
	}
	return ClockMono.String()
}

// now reads the clock.
func (c *clock) now() uint64 {
	if c.tsc {
		return cycles.Now()
	}
	return uint64(time.Since(c.base))
}

// after returns the reading that the clock will have in d.
func (c *clock) after(d time.Duration) uint64 { return c.now() + uint64(float64(d)/c.nsPerTick) }

// since returns how long ago the reading t was.
func (c *clock) since(t uint64) time.Duration {
	return time.Duration(float64(c.now()-t) * c.nsPerTick)
}
