package transport_test

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
)

// softOnly skips what only software NICs have, and takes the environment's wish away.
func softOnly(t *testing.T) {
	if transporttest.Device != "soft0" {
		t.Skip("one path")
	}
	t.Setenv("RINGSIDE_PATH", "")
}

// allPaths are the ways for software NICs to meet, or the one that the environment names: tests are then run for each. It skips other devices.
func allPaths(t *testing.T) []transport.Path {
	paths := []transport.Path{transport.PathMemory, transport.PathUDP, transport.PathTCP}
	if p := os.Getenv("RINGSIDE_PATH"); p != "" {
		paths = []transport.Path{transport.Path(p)}
	}
	softOnly(t)
	return paths
}

func TestPathChoice(t *testing.T) {
	softOnly(t)
	for _, tc := range []struct {
		dialler, listener transport.Path
		want              string // rung
		reasons           [2]string
		refused           string
	}{
		{"", "", "inproc", [2]string{}, ""},
		{transport.PathMemory, "", "inproc", [2]string{}, ""},
		{"", transport.PathMemory, "inproc", [2]string{}, ""},
		{transport.PathUDP, transport.PathUDP, "udp", [2]string{"Config.Path is udp", "Config.Path is udp"}, ""},
		{transport.PathUDP, "", "udp", [2]string{"Config.Path is udp", "the peer wants UDP"}, ""},
		{"", transport.PathUDP, "udp", [2]string{"the peer wants UDP", "Config.Path is udp"}, ""},
		{transport.PathMemory, transport.PathUDP, "", [2]string{}, "UDP is wanted (Config.Path), and not offered by both sides"},
		{transport.PathUDP, transport.PathMemory, "", [2]string{}, "UDP is wanted (Config.Path), and not offered by both sides"},
		{transport.PathTCP, transport.PathTCP, "tcp", [2]string{"no UDP: Config.Path is tcp", "no shared memory: Config.Path is tcp"}, ""},
		{transport.PathTCP, "", "tcp", [2]string{"no shared memory: Config.Path is tcp", "no UDP: the peer wants TCP"}, ""},
		{"", transport.PathTCP, "tcp", [2]string{"no shared memory: the peer wants TCP", "no UDP: Config.Path is tcp"}, ""},
		{transport.PathMemory, transport.PathTCP, "", [2]string{}, "TCP is wanted (Config.Path), and not offered by both sides"},
		{transport.PathTCP, transport.PathMemory, "", [2]string{}, "TCP is wanted (Config.Path), and not offered by both sides"},
		{transport.PathTCP, transport.PathUDP, "", [2]string{}, "TCP is wanted (Config.Path), and not offered by both sides"},
	} {
		t.Run("dial "+string(tc.dialler)+" listen "+string(tc.listener), func(t *testing.T) {
			l := listen(t, &transport.Config{Device: transporttest.Device, Path: tc.listener})
			cfg := &transport.Config{Device: transporttest.Device, Path: tc.dialler}
			if tc.refused != "" {
				c, err := transport.Dial(t.Context(), l.Addr().String(), cfg)
				var he *transport.HandshakeError
				if !errors.As(err, &he) || he.Code != transport.RefusedUnreachable || !strings.Contains(err.Error(), tc.refused) {
					t.Fatalf("Dial: %v, %v; want %q", c, err, tc.refused)
				}
				return
			}
			a, b := transporttest.Connect(t, l, cfg)
			for i, c := range []*transport.Conn{a, b} {
				p := c.Path()
				if p.Rung != tc.want || !p.SameHost || !strings.Contains(strings.Join(p.Reasons, "; "), tc.reasons[i]) {
					t.Errorf("path %v, want %s and %q", p, tc.want, tc.reasons[i])
				}
			}
			if err := a.Send(t.Context(), []byte("across")); err != nil {
				t.Fatal(err)
			}
			recvEqual(t, b, []byte("across"))
		})
	}
}

func TestPathRefused(t *testing.T) {
	softOnly(t)
	if _, err := transport.Listen(t.Context(), "127.0.0.1:0", &transport.Config{Path: "carrier pigeon"}); err == nil || !strings.Contains(err.Error(), `"carrier pigeon"`) {
		t.Errorf("Listen: %v", err)
	}
	os.Setenv("RINGSIDE_PATH", "tin cans")
	if _, err := transport.Dial(t.Context(), "127.0.0.1:1", nil); err == nil || !strings.Contains(err.Error(), `RINGSIDE_PATH`) {
		t.Errorf("Dial: %v", err)
	}
}
