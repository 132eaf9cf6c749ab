package udp

import (
	"bytes"
	"testing"
)

// What the system had no room for is sent next, whole and to where it was to go.
func TestShift(t *testing.T) {
	var b txBatch
	b.init(3)
	to := [3]*Peer{{}, {}, {}}
	for i := range 3 {
		copy(b.slot(i), bytes.Repeat([]byte{byte(i)}, 50+i))
		b.set(i, 50+i, to[i])
	}
	if n := b.shift(1, 3); n != 2 {
		t.Fatalf("%d packets are left", n)
	}
	for i := 1; i < 3; i++ {
		if !bytes.Equal(b.slot(i - 1)[:50+i], bytes.Repeat([]byte{byte(i)}, 50+i)) || b.peers[i-1] != to[i] {
			t.Errorf("packet %d is not the first any more", i)
		}
	}
}
