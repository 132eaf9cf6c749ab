package testutil

import "testing"

// Hog keeps n processes spinning until the test ends, so that timing assumptions which hold only on an idle machine
// show. n = runtime.NumCPU() leaves every core with half of its time.
func Hog(t testing.TB, n int) {
	t.Helper()
	for range n {
		StartChild(t, "testutil.hog")
	}
}

var spinSink uint64

func spin() {
	for x := uint64(1); ; x = x*6364136223846793005 + 1 {
		if x == 0 {
			spinSink++ // keeps the loop
		}
	}
}
