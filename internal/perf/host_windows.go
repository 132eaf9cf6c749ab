package perf

import (
	"time"

	"golang.org/x/sys/windows"
)

// processCPU returns the CPU time that this process has used, and false where the system does not tell.
func processCPU() (cpuTime, bool) {
	var created, exited, kernel, user windows.Filetime
	if err := windows.GetProcessTimes(windows.CurrentProcess(), &created, &exited, &kernel, &user); err != nil {
		return cpuTime{}, false
	}
	// A FILETIME that holds a duration counts 100 ns units.
	d := func(f windows.Filetime) time.Duration {
		return time.Duration(uint64(f.HighDateTime)<<32|uint64(f.LowDateTime)) * 100
	}
	return cpuTime{d(user), d(kernel)}, true
}
