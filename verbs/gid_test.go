package verbs

import (
	"net/netip"
	"testing"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

func TestBestGID(t *testing.T) {
	gid := func(s string) ib.GID {
		g, err := ib.ParseGID(s)
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	// As a ConnectX port with two addresses has them: each as RoCE v1 and v2.
	table := []ib.GIDEntry{
		{Index: 0, GID: gid("fe80::1"), Type: ib.GIDRoCEv1},
		{Index: 1, GID: gid("fe80::1"), Type: ib.GIDRoCEv2},
		{Index: 2, GID: gid("10.0.0.1"), Type: ib.GIDRoCEv1},
		{Index: 3, GID: gid("10.0.0.1"), Type: ib.GIDRoCEv2},
		{Index: 4, GID: gid("10.0.1.1"), Type: ib.GIDRoCEv2},
		{Index: 5, GID: gid("2001:db8::1"), Type: ib.GIDRoCEv2},
		{Index: 6},
	}
	for near, want := range map[string]int{
		"": 3, "10.0.1.1": 4, "10.9.9.9": 3, "127.0.0.1": 3, "::1": 3, "2001:db8::2": 5, "fe80::1": 1, "fe80::1%eth0": 1, "::ffff:10.0.1.1": 4,
	} {
		var a netip.Addr
		if near != "" {
			a = netip.MustParseAddr(near)
		}
		if got := bestGID(table, a); got != want {
			t.Errorf("near %q: entry %d, want %d", near, got, want)
		}
	}
	if got := bestGID([]ib.GIDEntry{{Index: 7, GID: gid("fe80::1"), Type: ib.GIDSoft}}, netip.Addr{}); got != 0 {
		t.Errorf("the only entry: %d", got)
	}
	if got := bestGID(nil, netip.Addr{}); got != -1 {
		t.Errorf("an empty table: %d", got)
	}
}
