//go:build unix && !linux

package perf

import (
	"time"

	"golang.org/x/sys/unix"
)

// processCPU returns the CPU time that this process has used, and false where the system does not tell.
func processCPU() (cpuTime, bool) {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		return cpuTime{}, false
	}
	return cpuTime{time.Duration(ru.Utime.Nano()), time.Duration(ru.Stime.Nano())}, true
}
