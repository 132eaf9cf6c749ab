package transport_test

import (
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
)

// A peer over UDP that does not run for a second, as on a busy host, has not died.
func TestPeerAwayUDP(t *testing.T) {
	if transporttest.Device != "soft0" {
		t.Skip("only the software NIC has a path by UDP")
	}
	t.Setenv("RINGSIDE_PATH", "udp")
	const away, tooLong = time.Second, 1500 * time.Millisecond
	for range 10 {
		child, c, _ := dialChild(t, "echo", transport.Adaptive)
		msg := pattern(64, 1)
		if err := c.Send(t.Context(), msg); err != nil {
			t.Fatal(err)
		}
		recvEqual(t, c, msg)
		child.Stop()
		start := time.Now()
		if err := c.Send(t.Context(), msg); err != nil {
			t.Fatal(err)
		}
		time.Sleep(away)
		child.Continue()
		if d := time.Since(start); d > tooLong {
			t.Logf("again: it was away for %v", d)
			continue
		}
		recvEqual(t, c, msg)
		return
	}
	t.Skip("the host was too busy for a second that is a second")
}
