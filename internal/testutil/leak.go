package testutil

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// A Snapshot is what a process holds at one moment: goroutines on every system; on Linux also file descriptors,
// mappings of files (memfds and shared anonymous memory included, the Go heap not), and its uid's files in /dev/shm.
type Snapshot struct {
	goroutines goleak.Option
	held       map[string]int // description -> how many
}

// TakeSnapshot records what the process holds now.
func TakeSnapshot() *Snapshot {
	wakeNetpoller()
	return &Snapshot{goroutines: goleak.IgnoreCurrent(), held: holdings()}
}

// wakeNetpoller makes the runtime open the descriptors of its own, which it keeps for good: they are not leaks.
func wakeNetpoller() {
	if l, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		l.Close()
	}
}

// Diff lists what is held now beyond the snapshot, one a line, or "" if there is nothing. Goroutines get up to two
// seconds to end; the rest is compared once.
func (s *Snapshot) Diff() string {
	var b strings.Builder
	runtime.GC() // see SharedMappings
	now := holdings()
	var names []string
	for name, n := range now {
		if n > s.held[name] {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(&b, "  %s: %d more than before (%d -> %d)\n", name, now[name]-s.held[name], s.held[name], now[name])
	}
	if err := goleak.Find(s.goroutines, goleak.IgnoreAnyFunction("github.com/ringside-rdma/ringside/internal/testutil.readInput")); err != nil {
		fmt.Fprintf(&b, "  %v\n", err)
	}
	return b.String()
}

func (s *Snapshot) waitDiff(d time.Duration) (left string) {
	within(d, func() bool {
		left = s.Diff()
		return left == ""
	})
	return left
}

// CheckLeaks takes a snapshot and, when the test and its other clean-ups are over, fails the test if more is held than
// at the time of the call. Call it first in a test that is not parallel to others of its package; things that the
// process makes once and keeps (an opened software NIC's socket) must exist before.
func CheckLeaks(t testing.TB) {
	t.Helper()
	before := TakeSnapshot()
	t.Cleanup(func() {
		if t.Failed() || t.Skipped() {
			return // an early end leaves things behind, and the reason is already told
		}
		if left := before.waitDiff(10 * time.Second); left != "" {
			t.Errorf("left over:\n%s", left)
		}
	})
}

// OpenFDs returns how many file descriptors the process has open, or -1 where that cannot be known.
func OpenFDs() int {
	runtime.GC()
	return count("fd ")
}

// SharedMappings returns how many mappings of files (memfds included) the process has, or -1 where that cannot be known.
// It collects garbage first: some memory is unmapped when the collector has found that nobody can look at it any more.
func SharedMappings() int {
	runtime.GC()
	return count("mapping ")
}

func count(prefix string) int {
	if _, err := os.Stat("/proc/self/maps"); err != nil {
		return -1
	}
	total := 0
	for name, n := range holdings() {
		if strings.HasPrefix(name, prefix) {
			total += n
		}
	}
	return total
}
