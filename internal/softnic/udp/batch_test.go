package udp

import (
	"bytes"
	"net/netip"
	"testing"
)

// What the system had no room for is sent next, whole and to where it was to go.
func TestShift(t *testing.T) {
	var b batch
	b.init(3, true)
	to := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), uint16(100+i))
	}
	for i := range 3 {
		copy(b.slot(i), bytes.Repeat([]byte{byte(i)}, 50+i))
		b.set(i, 50+i, to(i))
	}
	if n := b.shift(1, 3); n != 2 {
		t.Fatalf("%d packets are left", n)
	}
	for i := 1; i < 3; i++ {
		if _, addr := b.get(i - 1); !bytes.Equal(b.slot(i - 1)[:50+i], bytes.Repeat([]byte{byte(i)}, 50+i)) || addr != to(i) {
			t.Errorf("packet %d is not the first any more: to %v", i, addr)
		}
	}
}
