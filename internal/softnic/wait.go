package softnic

import (
	"runtime"
	"time"

	"github.com/ringside-rdma/ringside/internal/ring"
)

// spinUntil waits for cond, which another core is about to make true: spinning first, then sleeping. It returns false
// once limit has passed.
func spinUntil(limit time.Duration, cond func() bool) bool {
	var start time.Time
	for i := 0; !cond(); i++ {
		switch {
		case i < 100:
			ring.Pause()
		case i < 200:
			runtime.Gosched()
		default:
			if start.IsZero() {
				start = time.Now()
			} else if time.Since(start) > limit {
				return false
			}
			time.Sleep(20 * time.Microsecond)
		}
	}
	return true
}
