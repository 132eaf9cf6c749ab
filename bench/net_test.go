package main

import (
	"maps"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// Two processes have nothing in common, what a dead one has left can be found by its names, and the host's own subnets are left alone.
func TestNetNames(t *testing.T) {
	const maxDevice = 15 // IFNAMSIZ, without the zero
	seen := map[string]bool{}
	var taken []netip.Prefix
	for _, pid := range []int{1, 2, 257, 4194304} { // the last is the greatest there is; 1 and 257 would have the same subnet
		n, err := namesFor(pid, taken)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{n.space, n.devA, n.devB, n.client, n.server, n.stranger} {
			if seen[name] {
				t.Errorf("process %d: %s is another's", pid, name)
			}
			seen[name] = true
		}
		if len(n.devA) > maxDevice || len(n.devB) > maxDevice {
			t.Errorf("process %d: devices %q and %q", pid, n.devA, n.devB)
		}
		for _, name := range []string{n.space, n.devA} {
			if owner, ok := ownerOf(name); !ok || owner != pid {
				t.Errorf("%s is process %d's, not %d's", name, owner, pid)
			}
		}
		taken = append(taken, netip.MustParsePrefix(n.client+"/24"))
	}
	for _, name := range []string{"eth0", "ringside-bench", "ringside-bench-x", "ringside-bench--1", "rsbench-a", "rsbencha", "rsbench7b", "rsbench0a", "ringside0"} {
		if pid, ok := ownerOf(name); ok {
			t.Errorf("%s is said to be process %d's", name, pid)
		}
	}
	if _, err := namesFor(7, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("without a subnet: %v", err)
	}
}

// The CPU time is that of the whole processes, and so is what they have moved in it: the warm-up is part of both.
func TestNetCPU(t *testing.T) {
	const out = `{"path": "udp", "results": [{"messages": 4000, "warmup": 1000, "megabytes_per_second": 1400}]}`
	for kind, want := range map[string]values{"bw": {"rate": 0, "bw": 1.4, "cpu": 2}, "rate": {"rate": 0, "bw": 1.4}} {
		v, err := netPerf{"write", kind, 1000, 4000, "udp", ""}.values([]byte(out), 10*time.Millisecond)
		if err != nil || !maps.Equal(v, want) {
			t.Errorf("%s: %v, %v", kind, v, err)
		}
	}
	if v, err := (netPerf{path: "tcp"}).values([]byte(out), 0); err == nil {
		t.Errorf("another path gave %v", v)
	}
}
