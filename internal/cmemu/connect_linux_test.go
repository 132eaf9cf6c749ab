package cmemu

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/mlx5emu"
	"github.com/ringside-rdma/ringside/internal/rdmacm"
	"github.com/ringside-rdma/ringside/internal/testutil"
)

var loopback = netip.MustParseAddr("127.0.0.1")

func patient(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), testutil.Patience)
	t.Cleanup(cancel)
	return ctx
}

// inNetwork, in the environment, has two addresses of this machine, besides the loopback one.
const inNetwork = "RINGSIDE_TEST_ADDRESSES"

// TestNetwork runs the tests of this package that need a device in a network of their own: elsewhere, another process may have the UDP
// port.
func TestNetwork(t *testing.T) {
	if os.Getenv(inNetwork) != "" {
		return
	}
	n := testutil.NewNetwork(t)
	n.RunAgain(t, "^Test", fmt.Sprintf("%s=%v,%v", inNetwork, n.Addrs[0], n.Second))
}

// twoAddresses returns the addresses, and skips a test that is not in such a network.
func twoAddresses(t testing.TB) (here, there netip.Addr) {
	t.Helper()
	v := os.Getenv(inNetwork)
	if v == "" {
		t.Skip("TestNetwork runs it")
	}
	a, b, _ := strings.Cut(v, ",")
	return netip.MustParseAddr(a), netip.MustParseAddr(b)
}

// shell runs a command that changes this machine's network.
func shell(t testing.TB, line string) {
	t.Helper()
	f := strings.Fields(line)
	if out, err := exec.Command(f[0], f[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
}

// newManager makes a manager with one device, both of which end with the test.
func newManager(t testing.TB) *Manager { return newManagerOf(t, mlx5emu.Config{}) }

func newManagerOf(t testing.TB, cfg mlx5emu.Config) *Manager {
	t.Helper()
	twoAddresses(t)
	d, err := mlx5emu.NewDevice(cfg)
	if err != nil {
		t.Fatal(err)
	}
	m := New([]*mlx5emu.Device{d})
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		m.empty(t)
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// empty says what is left of a manager that should have nothing.
func (m *Manager) empty(t testing.TB) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.ids) != 0 || len(m.ports) != 0 || len(m.channels) != 0 {
		t.Errorf("%d IDs, %d ports, %d channels are left", len(m.ids), len(m.ports), len(m.channels))
	}
}

// open opens a channel of this project's own client.
func (m *Manager) open(t testing.TB) *rdmacm.Channel {
	t.Helper()
	k, err := m.OpenKernel()
	if err != nil {
		t.Fatal(err)
	}
	c := rdmacm.OpenOn(k)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}
