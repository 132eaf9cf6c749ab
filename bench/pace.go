package main

import (
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A pace is how fast the processors are at a moment. Those of a virtual machine change within seconds: to half their speed and back with
// what others do on the other threads of their cores, and with where they are, the time that a cache line takes from one to another to
// five times as long. What is compared has to have been measured with the same ones.
type pace struct {
	Speed []float64 // of each processor while all are busy, in steps of a loop a nanosecond
	Line  float64   // how long a line takes from the first processor to the second, in nanoseconds; 0: there is one
}

// paces are those right before a measurement and right after it.
type paces [2]pace

// alike reports whether all of these paces are about the same.
func alike(all ...paces) bool {
	var speed [][]float64 // by processor
	var line []float64
	for _, p := range all {
		for _, q := range p {
			for len(speed) < len(q.Speed) {
				speed = append(speed, nil)
			}
			for i, s := range q.Speed {
				speed[i] = append(speed[i], s)
			}
			line = append(line, q.Line)
		}
	}
	for _, s := range speed {
		if slices.Max(s) > 1.25*slices.Min(s) {
			return false
		}
	}
	return slices.Max(line) <= 1.5*slices.Min(line)
}

const (
	paceParts   = 3 // of which the fastest counts, since anything else may have run for a moment
	pacePart    = 4 * time.Millisecond
	paceLines   = 10
	paceLine    = 200
	paceLineMax = 50 * time.Millisecond // two that share a processor take a time slice for each pass
	paceMaxCPUs = 16
)

// takePace looks, for some 20 ms.
func takePace() (p pace) {
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return p
	}
	var cpus []int
	for cpu := 0; len(cpus) < min(allowed.Count(), paceMaxCPUs, runtime.GOMAXPROCS(0)); cpu++ {
		if allowed.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	p.Speed = make([]float64, len(cpus))
	var waiting atomic.Int32
	var word struct {
		_ [64]byte
		atomic.Uint32
		_ [64]byte
	}
	var all sync.WaitGroup
	for i, cpu := range cpus {
		all.Go(func() {
			runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
			var one unix.CPUSet
			one.Set(cpu)
			unix.SchedSetaffinity(0, &one) // if it fails, what is measured is what the measurements get
			for waiting.Add(1); waiting.Load() < int32(len(cpus)); {
			}
			p.Speed[i] = speed()
			for waiting.Add(1); waiting.Load() < 2*int32(len(cpus)); {
			}
			if i < 2 && len(cpus) > 1 {
				if d := passLine(&word.Uint32, uint32(i)); i == 0 {
					p.Line = d
				}
			}
		})
	}
	all.Wait()
	return p
}

// speed is how many steps a nanosecond has.
func speed() (most float64) {
	const steps = 2000
	for range paceParts {
		a, n, begin := uint64(1), 0, time.Now()
		var took time.Duration
		for took < pacePart {
			for i := range uint64(steps) {
				a = a*3 + a>>7 ^ i
			}
			n, took = n+steps, time.Since(begin)
		}
		paceSink.Store(a)
		most = max(most, float64(n)/float64(took))
	}
	return most
}

var paceSink atomic.Uint64 // so that the steps are made

// passedEnough tells the other one to stop.
const passedEnough = ^uint32(0)

// passLine passes word back and forth, as one of two, who are 0 and 1, and returns how long one way takes.
func passLine(word *atomic.Uint32, who uint32) float64 {
	best, begin := time.Duration(1<<62), time.Now()
	end := begin.Add(paceLineMax)
	for i := range uint32(paceLines * paceLine) {
		for w := word.Load(); w != 2*i+who; w = word.Load() {
			if w == passedEnough {
				return 0
			}
		}
		if who == 0 && i > 0 && (i%paceLine == 0 || i&(i-1) == 0 && i < paceLine) {
			now := time.Now()
			if i%paceLine == 0 {
				best, begin = min(best, now.Sub(begin)), now
			}
			if now.After(end) {
				if i < paceLine {
					best = now.Sub(begin) / time.Duration(i) * paceLine
				}
				word.Store(passedEnough)
				break
			}
		}
		word.Store(2*i + who + 1)
	}
	return float64(best) / paceLine / 2
}

// paced makes a measurement, and looks at the processors before and after it.
func (m measurement) paced(c *config) (v values, p paces, err error) {
	p[0] = takePace()
	v, err = m.run(c)
	p[1] = takePace()
	return v, p, err
}
