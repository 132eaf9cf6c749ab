package emulate

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// While a call is answered here, the kernel has the thread wait for nothing but the answer, and its death. What waits for long has to
// look for signals itself.

// signalPause is how long signals may have to wait for a thread that waits.
const signalPause = 50 * time.Millisecond

// held are the threads, of all processes, whose calls are being answered. It is safe for concurrent use.
type held struct {
	mu    sync.Mutex
	calls map[int]call // by thread
}

func (h *held) enter(c call) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls[c.TID] = c
}

// leave takes a call away that was answered. Its thread may have made another one since.
func (h *held) leave(c call) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.calls[c.TID] == c {
		delete(h.calls, c.TID)
	}
}

func (h *held) threads() []int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Keys(h.calls))
}

// A waiter is a thread whose call waits for something that may not come.
type waiter struct {
	tgid, tid int
	held      *held
	before    uint64 // signals to the process that nobody had taken at the last look, and that were for no thread before this one
}

// signalled reports whether the kernel waits for the thread: to handle a signal, or to stop with the process.
func (w *waiter) signalled() bool {
	st, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.tid))
	if err != nil {
		return false
	}
	blocked := signals(st, "SigBlk")
	if signals(st, "SigPnd")&^blocked != 0 {
		return true
	}
	// A signal to the process is for a thread that the kernel has chosen, and which takes it at once if it is not held as this one.
	all := signals(st, "ShdPnd") &^ blocked
	if all != 0 {
		all &^= w.others()
	}
	again := all&w.before != 0 || all != 0 && field(st, "Threads") == "1"
	w.before = all
	return again || w.stopped()
}

// others are the signals to the process that the kernel has rather chosen another held thread for: it asks the first thread, and then
// the others in turn, and tells the first one that does not block the signal. If this one were told to begin anew instead, the program
// would get errno 512. Whoever is before it does that, and has time to take the signal, before this one is asked again.
func (w *waiter) others() uint64 {
	var set uint64
	for _, tid := range w.held.threads() {
		if w.tid == w.tgid || tid != w.tgid && tid >= w.tid {
			continue
		}
		// Of threads of other processes, there is no such file.
		if st, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/status", w.tgid, tid)); err == nil {
			set |= ^signals(st, "SigBlk")
		}
	}
	const child = 1 << (unix.SIGCHLD - 1) // is for the parent, which is the thread that has forked
	return set &^ child
}

// signals are those that a line of a thread's status has.
func signals(status []byte, name string) uint64 {
	n, _ := strconv.ParseUint(field(status, name), 16, 64)
	return n
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
