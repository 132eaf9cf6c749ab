package emulate

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// While a call is answered here, the kernel has the thread wait for nothing but the answer, and its death. What waits for long has to
// look for signals itself.

// signalPause is how long signals may have to wait for a thread that waits.
const signalPause = 50 * time.Millisecond

// A waiter is a thread whose call waits for something that may not come.
type waiter struct {
	tgid, tid int
	before    uint64 // signals to the process that nobody had taken at the last look
}

// signalled reports whether the kernel waits for the thread: to handle a signal, or to stop with the process.
func (w *waiter) signalled() bool {
	st, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.tid))
	if err != nil {
		return false
	}
	set := func(name string) uint64 {
		n, _ := strconv.ParseUint(field(st, name), 16, 64)
		return n
	}
	blocked := set("SigBlk")
	if set("SigPnd")&^blocked != 0 {
		return true
	}
	// A signal to the process is for a thread that the kernel has chosen, and which takes it at once if it does not wait as this one.
	all := set("ShdPnd") &^ blocked
	again := all&w.before != 0 || all != 0 && field(st, "Threads") == "1"
	w.before = all
	return again || w.stopped()
}

// stopped reports whether other threads have stopped, as they do if a signal stops the process.
func (w *waiter) stopped() bool {
	dir := fmt.Sprintf("/proc/%d/task/", w.tgid)
	threads, _ := os.ReadDir(dir)
	for _, t := range threads {
		st, err := os.ReadFile(dir + t.Name() + "/status")
		if err == nil && strings.HasPrefix(field(st, "State"), "T ") {
			return true
		}
	}
	return false
}
