package perf

import (
	"fmt"
	"runtime"
)

// pinned runs f on one processor, by locking the goroutine to its thread and the thread to the processor; with
// cpu < 0 it just runs f.
//
// Locking has a price that is why it is not done without being asked for: when the runtime's monitor preempts a locked
// goroutine, which it does to whatever runs for 10 ms, another thread has to hand the processor back, which costs tens
// of microseconds. That shows in the maximum, not in p99.9.
func pinned(cpu int, f func() error) error {
	if cpu < 0 {
		return f()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	old, err := allowedCPUs()
	if err != nil {
		return fmt.Errorf("cannot tell which processors may be used: %w", err)
	}
	if err := pinThread(cpu); err != nil {
		return fmt.Errorf("cannot run on processor %d (--cpu): %w", cpu, err)
	}
	defer unpinThread(old)
	return f()
}

// AnyCPU returns a processor that this process may run on, for tests of pinning.
func AnyCPU() int { return anyCPU() }
