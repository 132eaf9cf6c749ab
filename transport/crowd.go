package transport

import (
	"runtime"
	"runtime/metrics"
)

// crowd tells whether other goroutines of the process wait for a thread to run on. It costs 0.1 us to ask, where
// runtime.Gosched costs 2 us if nobody waits: that wakes an idle thread, which then looks for work in vain.
// The zero value is ready. Not safe for concurrent use.
type crowd struct{ sample [1]metrics.Sample }

func (c *crowd) waits() bool {
	s := &c.sample[0]
	if s.Name == "" {
		s.Name = "/sched/goroutines/runnable:goroutines"
	}
	metrics.Read(c.sample[:])
	return s.Value.Kind() != metrics.KindUint64 || s.Value.Uint64() > 0
}

// yield lets those run who wait.
func (c *crowd) yield() {
	if c.waits() {
		runtime.Gosched()
	}
}
