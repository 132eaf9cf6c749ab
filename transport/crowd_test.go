package transport

import (
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func TestCrowd(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // whoever else is to run has to wait for us
	var c crowd
	testutil.Eventually(t, "nobody waits", func() bool { return !c.waits() })
	var stop atomic.Bool
	done := make(chan struct{})
	go func() {
		for !stop.Load() {
			runtime.Gosched()
		}
		close(done)
	}()
	testutil.Eventually(t, "a goroutine waits", c.waits)
	stop.Store(true)
	<-done
}

func BenchmarkCrowd(b *testing.B) {
	var c crowd
	b.ReportAllocs()
	for b.Loop() {
		c.waits()
	}
}
