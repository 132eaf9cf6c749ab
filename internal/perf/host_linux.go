package perf

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	defer f.Close()
	return parseCPUInfo(bufio.NewScanner(f))
}

// parseCPUInfo finds the processor's name in /proc/cpuinfo: "model name" on x86; arm64 has only numbers.
func parseCPUInfo(s *bufio.Scanner) string {
	part := map[string]string{}
	for s.Scan() {
		k, v, ok := strings.Cut(s.Text(), ":")
		if !ok {
			continue
		}
		k, v = strings.TrimSpace(k), strings.TrimSpace(v)
		if k == "model name" && v != "" {
			return v
		}
		if _, seen := part[k]; !seen {
			part[k] = v
		}
	}
	if part["CPU part"] != "" {
		return "implementer " + part["CPU implementer"] + " part " + part["CPU part"]
	}
	return "unknown"
}

// processCPU returns the CPU time that this process has used, and false where the system does not tell.
func processCPU() (cpuTime, bool) {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		return cpuTime{}, false
	}
	return cpuTime{time.Duration(ru.Utime.Nano()), time.Duration(ru.Stime.Nano())}, true
}

// pinThread binds the calling thread to one processor.
func pinThread(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	return unix.SchedSetaffinity(0, &set)
}

// pinProcess binds every thread of the process to one processor, those to come included, until restore is called.
func pinProcess(cpu int) (restore func(), err error) {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return nil, err
	}
	old := map[int]unix.CPUSet{}
	restore = func() {
		for tid, set := range old {
			_ = unix.SchedSetaffinity(tid, &set)
		}
	}
	var set unix.CPUSet
	set.Set(cpu)
	for _, t := range tasks {
		tid, err := strconv.Atoi(t.Name())
		if err != nil {
			continue
		}
		var was unix.CPUSet
		if unix.SchedGetaffinity(tid, &was) != nil {
			continue // it has ended
		}
		if err := unix.SchedSetaffinity(tid, &set); err != nil && !errors.Is(err, unix.ESRCH) {
			restore()
			return nil, fmt.Errorf("cannot run on processor %d (--cpu): %w", cpu, err)
		}
		old[tid] = was
	}
	return restore, nil
}

// allowedCPUs returns the processors that the calling thread may run on.
func allowedCPUs() (unix.CPUSet, error) {
	var set unix.CPUSet
	err := unix.SchedGetaffinity(0, &set)
	return set, err
}

// anyCPU returns the first processor of those.
func anyCPU() int {
	set, err := allowedCPUs()
	for i := range 8 * len(set) * 8 {
		if err == nil && set.IsSet(i) {
			return i
		}
	}
	return 0
}

func unpinThread(set unix.CPUSet) { _ = unix.SchedSetaffinity(0, &set) }

// osYield lets another process have the processor: with more pollers than processors, the peer may be waiting for it.
func osYield() { unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }
