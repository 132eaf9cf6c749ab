package softnic

import (
	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
)

// A tap is an observer of the NIC's packets. Those who send and receive write to it with their locks held; its own lock comes last.
// It holds nobody up: what there is no room for is counted, and lost.
type tap struct {
	snap int // bytes of a packet that are wanted

	mu   ring.SpinLock
	ring *observe.Producer // nil: the observer has gone
}

// maxTaps is how many observers a NIC has at once.
const maxTaps = 8

// taps are the observers of a NIC, nil: there are none. A list is not changed once it is there.
type taps []*tap

// put shows the observers a packet that was on a wire, whole.
func (l taps) put(r *observe.Record, pkt []byte) {
	for _, t := range l {
		if b := t.begin(r, len(pkt)); b != nil {
			copy(b, pkt)
			t.end()
		}
	}
}

// begin returns room for the start of a packet of n bytes, which end shows the observer, or nil.
func (t *tap) begin(r *observe.Record, n int) []byte {
	t.mu.Lock()
	if t.ring != nil {
		if b := t.ring.Begin(r, min(n, t.snap)); b != nil {
			return b
		}
	}
	t.mu.Unlock()
	return nil
}

func (t *tap) end() {
	t.ring.Commit()
	t.mu.Unlock()
}

// stop ends the tap: when it returns, nobody writes to the ring any more.
func (t *tap) stop() {
	t.mu.Lock()
	t.ring = nil
	t.mu.Unlock()
}

// addTap shows t what is sent and received from now on. false: there are too many.
func (n *NIC) addTap(t *tap) bool {
	n.watch.mu.Lock()
	defer n.watch.mu.Unlock()
	var l taps
	if old := n.taps.Load(); old != nil {
		l = append(l, *old...)
	}
	if len(l) == maxTaps {
		return false
	}
	l = append(l, t)
	n.taps.Store(&l)
	return true
}

func (n *NIC) dropTap(t *tap) {
	n.watch.mu.Lock()
	var l taps
	for _, other := range *n.taps.Load() {
		if other != t {
			l = append(l, other)
		}
	}
	if len(l) == 0 {
		n.taps.Store(nil)
	} else {
		n.taps.Store(&l)
	}
	n.watch.mu.Unlock()
	t.stop()
}
