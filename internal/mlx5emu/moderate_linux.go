package mlx5emu

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// Moderation: the event of an armed CQ waits for more completions. Whether a card has its timer begin with the completion, as here, or
// with the event before is a mode of it that the kernel chooses.

// The limits of Linux' driver.
const (
	maxModerateCount  = 1<<16 - 1
	maxModeratePeriod = 1<<12 - 1 // microseconds
)

// moderation is a CQ's.
type moderation struct {
	count   uint32        // an event once so many completions wait for it; 0: however many they are
	period  time.Duration // or one has waited for so long; 0: however long
	waiting uint32        // completions that the event which is armed is for
	since   time.Time     // when the first of them came
}

// await has k completions raise the event that was armed: at once, or when their time has come.
func (n *cq) await(k uint32) {
	if n.waiting == 0 {
		n.since = time.Now()
	}
	n.waiting += k
	n.ripen()
}

// ripen raises the event if it is due, and reports whether it was.
func (n *cq) ripen() bool {
	m := &n.moderation
	due := m.count == 0 && m.period == 0 || m.count > 0 && m.waiting >= m.count || m.period > 0 && time.Since(m.since) >= m.period
	if m.waiting == 0 || !due {
		return false
	}
	n.fire()
	return true
}

// ripen raises the events that are due. later: some will be.
func (c *Context) ripen() (some, later bool) {
	for _, n := range c.cqs {
		switch {
		case n.waiting == 0:
		case n.ripen():
			some = true
		case n.period > 0:
			later = true
		}
	}
	return some, later
}

func writeModifyCQ(w *writeCmd) (response, syscall.Errno) {
	const moderate = 1 // IB_CQ_MODERATE, the only one
	c, q := w.c, structOf[abi.ExModifyCQ](w.core)
	switch {
	case q.AttrMask == 0 || q.Reserved != 0:
		return response{}, unix.EINVAL
	case q.AttrMask > moderate:
		return response{}, unix.EOPNOTSUPP
	}
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	n, ok := get[*cq](c, uint64(q.CQHandle))
	if !ok || q.Attr.CQPeriod > maxModeratePeriod {
		return response{}, unix.EINVAL
	}
	n.count, n.period = uint32(q.Attr.CQCount), time.Duration(q.Attr.CQPeriod)*time.Microsecond
	n.ripen()
	return response{}, 0
}
