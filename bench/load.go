package main

import (
	"math"
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/perf/cycles"
)

// echoArgs is what an echo client is told.
type echoArgs struct {
	Network  string // grpc: "tcp" or "unix"
	Addr     string
	API      string  // ringside: "blocking" or "async"
	Poll     string  // ringside: "busy", "adaptive", "event"
	Size     int     // bytes of a request and of its answer
	InFlight int     // calls at a time
	Calls    int     // to measure, all together
	Warmup   int     // before that
	Rate     float64 // calls a second; 0: as fast as they come back
}

// loadLimit ends a measurement before its number of calls is reached, on a machine that is busy with other things.
const loadLimit = 8 * time.Second

// echoResult is what an echo client says.
type echoResult struct {
	Calls   int
	Seconds float64
	Lat     latencies
	Usage   usage
}

// latencies are in microseconds.
type latencies struct{ P50, P90, P99, P999, Max float64 }

// clock reads time in ticks: the processor's counter where it can be trusted, because the operating system's clock costs
// a good part of a short call.
type clock struct {
	now   func() uint64
	perNS float64 // ticks a nanosecond
}

// limit returns the reading of the clock at which a load that starts now has to end.
func (c clock) limit() uint64 { return c.now() + uint64(float64(loadLimit)*c.perNS) }

func newClock() clock {
	rate, err := cycles.Calibrate(20 * time.Millisecond)
	if err != nil {
		base := time.Now()
		return clock{func() uint64 { return uint64(time.Since(base)) }, 1}
	}
	return clock{cycles.Now, 1 / rate.NsPerTick()}
}

// recorder keeps the latency of every call; the histogram is made afterwards.
type recorder struct{ ticks []uint32 }

func newRecorder(n int) *recorder {
	r := &recorder{ticks: make([]uint32, n)}
	for i := range r.ticks {
		r.ticks[i] = 1 // touches the pages now
	}
	r.ticks = r.ticks[:0]
	return r
}

func (r *recorder) add(ticks uint64) { r.ticks = append(r.ticks, uint32(min(ticks, math.MaxUint32))) }

func summarize(c clock, rs []*recorder) latencies {
	h := hdrhistogram.New(1, int64(10*time.Second), 3)
	for _, r := range rs {
		for _, t := range r.ticks {
			h.RecordValue(max(1, int64(float64(t)/c.perNS)))
		}
	}
	q := func(p float64) float64 { return float64(h.ValueAtQuantile(p)) / 1000 }
	return latencies{q(50), q(90), q(99), q(99.9), float64(h.Max()) / 1000}
}

// blockingLoad makes calls by call, from a.InFlight goroutines, and says the result to the parent once it has said go.
func blockingLoad(a *echoArgs, call func() error) error {
	ck := newClock()
	share := max(1, a.Calls/a.InFlight)
	each := func(n int, rec []*recorder) error {
		errs := make(chan error, a.InFlight)
		limit := ck.limit()
		var wg sync.WaitGroup
		for g := range a.InFlight {
			wg.Go(func() {
				var r *recorder
				if rec != nil {
					r = rec[g]
				}
				last := ck.now()
				for range n {
					if err := call(); err != nil {
						errs <- err
						return
					}
					now := ck.now()
					if r != nil {
						r.add(now - last)
					}
					if last = now; now > limit {
						return
					}
				}
			})
		}
		wg.Wait()
		select {
		case err := <-errs:
			return err
		default:
			return nil
		}
	}
	if err := each(max(1, a.Warmup/a.InFlight), nil); err != nil {
		return err
	}
	rec := make([]*recorder, a.InFlight)
	for g := range rec {
		rec[g] = newRecorder(share)
	}
	return measured(ck, rec, func() error { return each(share, rec) })
}

// pacedLoad makes a.Rate calls a second, one at a time.
func pacedLoad(a *echoArgs, call func() error) error {
	ck := newClock()
	rec := newRecorder(a.Calls)
	period := time.Duration(float64(time.Second) / a.Rate)
	run := func(n int, r *recorder) error {
		next := time.Now()
		limit := ck.limit()
		for range n {
			if ck.now() > limit {
				break
			}
			next = next.Add(period)
			sleepThread(time.Until(next))
			t := ck.now()
			if err := call(); err != nil {
				return err
			}
			if r != nil {
				r.add(ck.now() - t)
			}
		}
		return nil
	}
	if err := run(max(1, a.Warmup), nil); err != nil {
		return err
	}
	return measured(ck, []*recorder{rec}, func() error { return run(a.Calls, rec) })
}

// sleepThread is time.Sleep by a system call of this thread: what is measured is the processor time of calls, and the
// runtime's timers would add a tenth of it.
func sleepThread(d time.Duration) {
	for d > 0 {
		left := unix.NsecToTimespec(int64(d))
		if unix.Nanosleep(&left, &left) == nil {
			return
		}
		d = time.Duration(left.Nano()) // a signal came
	}
}

// measured says that the warm-up is over, waits for the parent's go, runs the load and says its result.
func measured(ck clock, rec []*recorder, load func() error) error {
	say("warm", true)
	hear("go")
	before := usageNow()
	begin := time.Now()
	if err := load(); err != nil {
		return err
	}
	seconds := time.Since(begin).Seconds()
	used := usageNow().since(before)
	calls := 0
	for _, r := range rec {
		calls += len(r.ticks)
	}
	say("result", echoResult{Calls: calls, Seconds: seconds, Lat: summarize(ck, rec), Usage: used})
	return nil
}

// echoRun measures a client role against a server role.
func echoRun(serverRole string, serverArgs any, clientRole string, a echoArgs) (values, error) {
	const patience = 3 * time.Minute
	server, err := start(serverRole, serverArgs)
	if err != nil {
		return nil, err
	}
	defer server.stop()
	if err := server.expect("addr", &a.Addr, patience); err != nil {
		return nil, err
	}
	client, err := start(clientRole, a)
	if err != nil {
		return nil, err
	}
	defer client.stop()
	var ok bool
	var r echoResult
	var served usage
	for _, step := range []func() error{
		func() error { return client.expect("warm", &ok, patience) },
		func() error { return server.tell("mark") },
		func() error { return server.expect("marked", &ok, patience) },
		func() error { return client.tell("go") },
		func() error { return client.expect("result", &r, patience) },
		func() error { return server.tell("report") },
		func() error { return server.expect("usage", &served, patience) },
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	n := float64(r.Calls)
	cpu := r.Usage.CPU + served.CPU
	return values{
		"p50": r.Lat.P50, "p90": r.Lat.P90, "p99": r.Lat.P99, "p999": r.Lat.P999, "max": r.Lat.Max,
		"rate":          n / r.Seconds,
		"client_allocs": float64(r.Usage.Mallocs) / n,
		"server_allocs": float64(served.Mallocs) / n,
		"cpu":           float64(cpu.Nanoseconds()) / 1000 / n, // us a call, both processes
		"cpu_percent":   cpu.Seconds() / r.Seconds * 100,       // of one core
	}, nil
}
