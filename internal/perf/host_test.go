package perf

import (
	"runtime"
	"testing"
)

func TestThisHost(t *testing.T) {
	h := ThisHost()
	if h.OS != runtime.GOOS || h.Arch != runtime.GOARCH || h.Cores < 1 || h.GOMAXPROCS < 1 || h.PollCPU != -1 {
		t.Errorf("%+v", h)
	}
	for _, s := range h.texts()[:7] { // the device comes later
		if *s == "" {
			t.Errorf("something is empty in %+v", h)
		}
	}
	if c, ok := processCPU(); ok && c.total() <= 0 {
		t.Errorf("no CPU time was used so far: %+v", c)
	}
}

func TestPinnedWithout(t *testing.T) {
	ran := false
	if err := pinned(-1, func() error { ran = true; return nil }); err != nil || !ran {
		t.Errorf("ran: %v, %v", ran, err)
	}
}
