package testutil

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
)

// A RoutedNet is two network namespaces with a router between them, in a third: what goes wrong on the way between two hosts can
// be made to go wrong there, unseen by both.
type RoutedNet struct {
	t      testing.TB
	A, B   string     // namespaces, as ip(8) names them; child processes are started there with StartChildIn
	Router string     // the one between
	Addr   [2]NetAddr // of A and of B
}

var routedNets atomic.Int32 // that were made, for their names

// NetAddr is a host's addresses.
type NetAddr struct{ V4, V6 netip.Addr }

// The devices of a RoutedNet: HostDev in A and B, RouterDevA and RouterDevB in the router.
const (
	HostDev    = "up0"
	RouterDevA = "ra"
	RouterDevB = "rb"
)

// NewRoutedNet makes the network, whose devices have an MTU of 4500 bytes; it is gone at the end of the test. Without root,
// ip(8) or network namespaces, the test is skipped.
func NewRoutedNet(t testing.TB) *RoutedNet {
	t.Helper()
	needNamespaces(t)
	name := fmt.Sprint("ringside-", os.Getpid(), "-", routedNets.Add(1))
	n := &RoutedNet{t: t, A: name + "a", B: name + "b", Router: name + "r", Addr: [2]NetAddr{
		{netip.MustParseAddr("10.97.1.2"), netip.MustParseAddr("fd97:1::2")}, {netip.MustParseAddr("10.97.2.2"), netip.MustParseAddr("fd97:2::2")}}}
	t.Cleanup(func() {
		for _, ns := range []string{n.A, n.B, n.Router} {
			exec.Command("ip", "netns", "delete", ns).Run()
		}
	})
	if out, err := exec.Command("ip", "netns", "add", n.A).CombinedOutput(); err != nil {
		Skip(t, fmt.Sprintf("no network namespaces here: ip netns add: %v: %s", err, out))
	}
	n.run("netns add " + n.B)
	n.run("netns add " + n.Router)
	for _, ns := range []string{n.A, n.B, n.Router} {
		n.In(ns, "link set lo up")
	}
	for i, ns := range []string{n.A, n.B} {
		dev := []string{RouterDevA, RouterDevB}[i]
		v4, v6 := fmt.Sprintf("10.97.%d.1", i+1), fmt.Sprintf("fd97:%d::1", i+1)
		n.In(ns, "link add "+HostDev+" mtu 4500 type veth peer name "+dev+" mtu 4500 netns "+n.Router)
		n.In(ns, "address add "+n.Addr[i].V4.String()+"/24 dev "+HostDev)
		n.In(ns, "address add "+n.Addr[i].V6.String()+"/64 dev "+HostDev+" nodad")
		n.In(n.Router, "address add "+v4+"/24 dev "+dev)
		n.In(n.Router, "address add "+v6+"/64 dev "+dev+" nodad")
		n.In(ns, "link set "+HostDev+" up")
		n.In(n.Router, "link set "+dev+" up")
		n.In(ns, "route add default via "+v4)
		n.In(ns, "-6 route add default via "+v6)
	}
	if out, err := exec.Command("ip", "netns", "exec", n.Router, "sh", "-c",
		"echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding").CombinedOutput(); err != nil {
		t.Fatalf("forwarding: %v: %s", err, out)
	}
	return n
}

// needNamespaces skips a test where network namespaces cannot be made, or need not be tested.
func needNamespaces(t testing.TB) {
	t.Helper()
	if os.Getenv("RINGSIDE_SOFT_ROCE") != "" {
		t.Skip("it takes no such machine, in which it is only slower: it runs outside")
	}
	if os.Geteuid() != 0 {
		Skip(t, "network namespaces take root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		Skip(t, "network namespaces take ip(8), of iproute2")
	}
}

// In runs ip(8) in a namespace.
func (n *RoutedNet) In(ns, args string) {
	n.t.Helper()
	if v6, ok := strings.CutPrefix(args, "-6 "); ok {
		n.run("-6 -n " + ns + " " + v6)
		return
	}
	n.run("-n " + ns + " " + args)
}

func (n *RoutedNet) run(args string) {
	n.t.Helper()
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		n.t.Fatalf("ip %s: %v: %s", args, err, out)
	}
}

// BlockUDP has the router drop UDP that comes from a side (RouterDevA or RouterDevB), without a word; AllowUDP ends that.
func (n *RoutedNet) BlockUDP(from string) {
	n.In(n.Router, "rule add pref 10 iif "+from+" ipproto udp blackhole")
	n.In(n.Router, "-6 rule add pref 10 iif "+from+" ipproto udp blackhole")
}

// AllowUDP ends BlockUDP.
func (n *RoutedNet) AllowUDP(from string) {
	n.In(n.Router, "rule delete pref 10 iif "+from+" ipproto udp blackhole")
	n.In(n.Router, "-6 rule delete pref 10 iif "+from+" ipproto udp blackhole")
}

// NarrowLink gives the router's link to B a smaller MTU. told: who sends longer packets hears of it (ICMP).
func (n *RoutedNet) NarrowLink(mtu int, told bool) {
	if !told {
		n.In(n.Router, "rule add pref 11 iif lo ipproto icmp blackhole")
		n.In(n.Router, "-6 rule add pref 11 iif lo ipproto ipv6-icmp blackhole")
	}
	n.In(n.Router, fmt.Sprintf("link set %s mtu %d", RouterDevB, mtu))
}
