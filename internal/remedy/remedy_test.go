package remedy

import (
	"net/netip"
	"testing"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

func TestPortTexts(t *testing.T) {
	gid := func(i int, a string) ib.GIDEntry {
		return ib.GIDEntry{Index: i, GID: ib.GIDFromAddr(netip.MustParseAddr(a)), Type: ib.GIDRoCEv2}
	}
	eth := &ib.PortAttr{State: ib.PortDown, LinkLayer: ib.LinkEthernet}
	for _, c := range []struct{ got, want string }{
		{PortDown(1, &ib.PortAttr{State: ib.PortActive}, nil), ""},
		{PortDown(1, eth, []string{"veth0", "veth1"}), "port 1 is DOWN: `ip link set veth0 up`, or plug in its cable"},
		{PortDown(1, eth, nil), "port 1 is DOWN: `ip link set NETDEV up`, or plug in its cable"},
		{PortDown(2, &ib.PortAttr{State: ib.PortInit, LinkLayer: ib.LinkInfiniBand}, nil), "port 2 is INIT: plug in its cable, or run a subnet manager"},
		{NoGIDAt(1, 7, nil, []string{"veth0"}), "port 1 has no GID: `ip address add ADDRESS/PREFIX dev veth0` gives it one"},
		{NoGIDAt(1, 7, []ib.GIDEntry{gid(0, "fe80::1"), gid(1, "10.0.0.1")}, nil), "port 1 has no GID at index 7: it has 0 (fe80::1, RoCE v2), 1 (10.0.0.1, RoCE v2)"},
		{NoGIDAt(1, 7, []ib.GIDEntry{gid(0, "::1"), gid(1, "::2"), gid(2, "::3"), gid(3, "::4"), gid(4, "::5"), gid(5, "::6")}, nil),
			"port 1 has no GID at index 7: it has 0 (::1, RoCE v2), 1 (::2, RoCE v2), 2 (::3, RoCE v2), 3 (::4, RoCE v2), 2 more"},
	} {
		if c.got != c.want {
			t.Errorf("%s\nwant\n%s", c.got, c.want)
		}
	}
}
