package cycles

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// checkKernel asks whether the kernel itself trusts the TSC: only then have the counters of all processors been found
// to be in step.
func checkKernel() error {
	b, err := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
	if err != nil {
		return fmt.Errorf("cannot tell which clock the kernel uses: %w", err)
	}
	return trusts(strings.TrimSpace(string(b)), readInProcess)
}

// trusts reports whether a kernel that uses a clock trusts the TSC. A guest's kvm-clock is the TSC with the host's
// parameters; whether the counters of all virtual processors are in step is the host's to say
// (PVCLOCK_TSC_STABLE_BIT of arch/x86/include/asm/pvclock-abi.h). The kernel does not show that, but lets processes read the clock
// without a system call only if it is so.
func trusts(source string, inProcess func() bool) error {
	switch {
	case source == "tsc":
		return nil
	case source != "kvm-clock":
		return fmt.Errorf("the kernel uses the clock %q rather than the TSC", source)
	case !inProcess():
		return errors.New("the kernel's clock is kvm-clock, and the host does not say that the TSCs of all processors are in step")
	}
	return nil
}

// readInProcess reports whether the clock is read without a system call, which costs at least twice as much.
func readInProcess() bool {
	base := time.Now()
	var ts unix.Timespec
	return 2*fastest(func() { time.Since(base) }) < fastest(func() {
		unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // not the vDSO's: a system call
	})
}

// fastest returns the fewest ticks that f takes.
func fastest(f func()) uint64 {
	least := ^uint64(0)
	for range 1000 {
		t := Now()
		f()
		least = min(least, Now()-t)
	}
	return least
}
