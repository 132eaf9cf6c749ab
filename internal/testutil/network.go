package testutil

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// A Network is two network namespaces, joined by a pair of virtual Ethernet devices: two hosts, as far as UDP goes.
type Network struct {
	Namespaces [2]string // as ip(8) names them
	Addrs      [2]netip.Addr
	// Second is another address of the first: of its loopback device.
	Second netip.Addr
}

// NewNetwork makes one, for the length of the test. It takes root; without, the test is skipped.
func NewNetwork(t testing.TB) *Network {
	t.Helper()
	if os.Getenv("RINGSIDE_SOFT_ROCE") != "" {
		t.Skip("it takes no such machine, in which it is only slower: it runs outside")
	}
	if os.Geteuid() != 0 {
		Skip(t, "network namespaces take root")
	}
	pid := os.Getpid()
	n := &Network{Addrs: [2]netip.Addr{netip.MustParseAddr("10.97.0.1"), netip.MustParseAddr("10.97.0.2")}, Second: netip.MustParseAddr("10.97.1.1")}
	for i := range n.Namespaces {
		n.Namespaces[i] = fmt.Sprintf("ringside-test-%d-%d", pid, i)
	}
	a, b := n.Namespaces[0], n.Namespaces[1]
	remove := func() {
		exec.Command("ip", "netns", "delete", a).Run()
		exec.Command("ip", "netns", "delete", b).Run()
	}
	remove()
	t.Cleanup(remove)
	for i, line := range []string{
		"netns add " + a,
		"netns add " + b,
		"-n " + a + " link add veth type veth peer name veth netns " + b,
		"-n " + a + " address add " + n.Addrs[0].String() + "/24 dev veth",
		"-n " + b + " address add " + n.Addrs[1].String() + "/24 dev veth",
		"-n " + a + " address add " + n.Second.String() + "/32 dev lo",
		"-n " + a + " link set veth up",
		"-n " + b + " link set veth up",
		"-n " + a + " link set lo up",
		"-n " + b + " link set lo up",
	} {
		out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput()
		switch {
		case err != nil && i == 0:
			Skip(t, fmt.Sprintf("no network namespaces here: ip %s: %v: %s", line, err, out))
		case err != nil:
			t.Fatalf("ip %s: %v: %s", line, err, out)
		}
	}
	return n
}

// RunAgain runs tests of the test binary, those that run (as go test has it) matches, in the first namespace, with additional
// environment entries.
func (n *Network) RunAgain(t *testing.T, run string, env ...string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("ip", "netns", "exec", n.Namespaces[0], exe, "-test.v", "-test.count=1", "-test.run", run)
	if testing.Short() {
		cmd.Args = append(cmd.Args, "-test.short")
	}
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Errorf("%v:\n%s", err, out)
	}
}
