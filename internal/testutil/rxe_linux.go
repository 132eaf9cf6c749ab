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

// OverIPv6 is the same network by the ends' IPv6 addresses.
func (n *RXENet) OverIPv6() *RXENet {
	v6 := *n
	v6.RXE, v6.Soft = netip.MustParseAddr("fd99::1"), netip.MustParseAddr("fd99::2")
	return &v6
}

// rxeNetDev is the network device of rxe.
const rxeNetDev = "udp-a"

// NewRXENet makes the network. Outside the machine of test/soft-roce the test is skipped.
func NewRXENet(t *testing.T) *RXENet {
	t.Helper()
	if os.Getenv("RINGSIDE_SOFT_ROCE") == "" {
		Skip(t, "go run ./test/soft-roce -- go test has a kernel to talk to")
	}
	n := &RXENet{Device: "rxe-udp", RXE: netip.MustParseAddr("10.99.0.1"), Soft: netip.MustParseAddr("10.99.0.2"), Namespace: "ringside-udp"}
	v6 := n.OverIPv6()
	remove := func() {
		exec.Command("rdma", "link", "delete", n.Device).Run()
		exec.Command("ip", "link", "delete", rxeNetDev).Run()
		exec.Command("ip", "netns", "delete", n.Namespace).Run()
	}
	remove()
	t.Cleanup(remove)
	for _, args := range [][]string{
		{"ip", "netns", "add", n.Namespace},
		{"ip", "link", "add", rxeNetDev, "mtu", "9000", "type", "veth", "peer", "name", "udp-b", "netns", n.Namespace},
		// The kernel's end looks for neighbours from its link-local address, which it would have only once nobody has claimed it for a second.
		{"sh", "-c", "echo 0 >/proc/sys/net/ipv6/conf/" + rxeNetDev + "/accept_dad"},
		{"ip", "address", "add", n.RXE.String() + "/24", "dev", rxeNetDev},
		{"ip", "address", "add", v6.RXE.String() + "/64", "dev", rxeNetDev, "nodad"},
		{"ip", "link", "set", rxeNetDev, "up"},
		{"ip", "-n", n.Namespace, "address", "add", n.Soft.String() + "/24", "dev", "udp-b"},
		{"ip", "-n", n.Namespace, "address", "add", v6.Soft.String() + "/64", "dev", "udp-b", "nodad"},
		{"ip", "-n", n.Namespace, "link", "set", "udp-b", "mtu", "9000", "up"},
		{"ip", "-n", n.Namespace, "link", "set", "lo", "up"},
		{"rdma", "link", "add", n.Device, "type", "rxe", "netdev", rxeNetDev},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	return n
}
