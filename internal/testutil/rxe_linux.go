package testutil

import (
	"net/netip"
	"os"
	"os/exec"
	"testing"
)

// An RXENet joins the kernel's rxe to a software NIC: a veth pair, whose other end is in a network namespace of its own, since rxe
// has the UDP port on all addresses of its namespace.
type RXENet struct {
	Device    string     // the rxe device, at RXE
	RXE, Soft netip.Addr // the ends; their MTU is 9000
	Namespace string     // of the other end, as ip(8) names it
}

// NewRXENet makes the network. Outside the machine of test/soft-roce the test is skipped.
func NewRXENet(t *testing.T) *RXENet {
	t.Helper()
	if os.Getenv("RINGSIDE_SOFT_ROCE") == "" {
		Skip(t, "go run ./test/soft-roce -- go test has a kernel to talk to")
	}
	n := &RXENet{Device: "rxe-udp", RXE: netip.MustParseAddr("10.99.0.1"), Soft: netip.MustParseAddr("10.99.0.2"), Namespace: "ringside-udp"}
	remove := func() {
		exec.Command("rdma", "link", "delete", n.Device).Run()
		exec.Command("ip", "link", "delete", "udp-a").Run()
		exec.Command("ip", "netns", "delete", n.Namespace).Run()
	}
	remove()
	t.Cleanup(remove)
	for _, args := range [][]string{
		{"ip", "netns", "add", n.Namespace},
		{"ip", "link", "add", "udp-a", "mtu", "9000", "type", "veth", "peer", "name", "udp-b", "netns", n.Namespace},
		{"ip", "address", "add", n.RXE.String() + "/24", "dev", "udp-a"},
		{"ip", "link", "set", "udp-a", "up"},
		{"ip", "-n", n.Namespace, "address", "add", n.Soft.String() + "/24", "dev", "udp-b"},
		{"ip", "-n", n.Namespace, "link", "set", "udp-b", "mtu", "9000", "up"},
		{"ip", "-n", n.Namespace, "link", "set", "lo", "up"},
		{"rdma", "link", "add", n.Device, "type", "rxe", "netdev", "udp-a"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	return n
}
