package cycles

import (
	"fmt"
	"os"
	"strings"
)

// checkKernel asks whether the kernel itself trusts the TSC: only then have the counters of all processors been found
// to be in step.
func checkKernel() error {
	b, err := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
	if err != nil {
		return fmt.Errorf("cannot tell which clock the kernel uses: %w", err)
	}
	if s := strings.TrimSpace(string(b)); s != "tsc" {
		return fmt.Errorf("the kernel uses the clock %q rather than the TSC", s)
	}
	return nil
}
