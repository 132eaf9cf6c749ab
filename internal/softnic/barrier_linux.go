package softnic

import (
	"sync"

	"golang.org/x/sys/unix"
)

// Commands of membarrier(2), linux/membarrier.h.
const (
	membarrierQuery             = 0
	membarrierGlobalExpedited   = 1 << 1
	membarrierRegisterGlobalExp = 1 << 2
)

func membarrier(cmd uintptr) (uintptr, error) {
	r, _, e := unix.Syscall(unix.SYS_MEMBARRIER, cmd, 0, 0)
	if e != 0 {
		return 0, e
	}
	return r, nil
}

// asymmetric reports whether this process takes part in asymmetric barriers: it is registered for, and may issue,
// membarrier's GLOBAL_EXPEDITED. If not (an old kernel, a seccomp filter), both sides use full fences instead.
var asymmetric = sync.OnceValue(func() bool {
	if forceFences {
		return false
	}
	r, err := membarrier(membarrierQuery)
	if err != nil || r&membarrierGlobalExpedited == 0 || r&membarrierRegisterGlobalExp == 0 {
		return false
	}
	_, err = membarrier(membarrierRegisterGlobalExp)
	return err == nil
})

// heavyBarrier is a full barrier on every core that runs a registered process: stores that those made before it are visible
// after it, and they see ours.
func heavyBarrier() {
	if asymmetric() {
		membarrier(membarrierGlobalExpedited) // cannot fail once registered
	}
}
