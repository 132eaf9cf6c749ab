//go:build !linux

package perf

import (
	"fmt"
	"runtime"
)

func kernelRelease() string { return "unknown" }

func cpuModel() string { return "unknown" }

type cpuSet struct{}

// pinThread binds the calling thread to one processor.
func pinThread(int) error {
	return fmt.Errorf("pinning a thread to a processor is not supported on %s: leave --cpu out", runtime.GOOS)
}

func pinProcess(cpu int) (restore func(), err error) { return nil, pinThread(cpu) }

func allowedCPUs() (cpuSet, error) { return cpuSet{}, nil }

func anyCPU() int { return 0 }

func unpinThread(cpuSet) {}

func osYield() {}
