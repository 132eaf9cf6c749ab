package testutil

import (
	"sync/atomic"
	"testing"
)

// Hog keeps n processes spinning until the test ends, so that timing assumptions which hold only on an idle machine
// show. n = runtime.NumCPU() leaves every core with half of its time.
func Hog(t testing.TB, n int) {
	t.Helper()
	for range n {
		StartChild(t, "testutil.hog")
	}
}

func spin() {
	var turns atomic.Uint64
	for {
		turns.Add(1)
	}
}
