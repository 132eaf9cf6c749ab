//go:build linux && (amd64 || arm64)

package main

import (
	"encoding/hex"
	"slices"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/netlink"
)

// Golden bytes, little-endian: what ip of iproute2 sends, but for the order of attributes, which the kernel does not
// mind. The words in hexadecimal are length and type of the header, then each attribute.
func TestMessages(t *testing.T) {
	w := newWiring("veth")
	a, b := w[0].ends[0], w[0].ends[1]
	for _, c := range []struct {
		name string
		m    netlink.Message
		want string
	}{
		{"veth", addVeth(a, b), "78000000 1000 0106 01000000 00000000" + strings.Repeat("00", 16) +
			"0a00 0300 766574683000 0000" + "0a00 0100 020000000001 0000" +
			"4000 1200" + "0900 0100 7665746800 000000" + "3000 0200" + "2c00 0100" + strings.Repeat("00", 16) +
			"0a00 0300 766574683100 0000" + "0a00 0100 020000000002 0000"},
		{"link up", setUp(3, 9000), "28000000 1000 0100 01000000 00000000" + "00000000 03000000 01000000 01000000" + "0800 0400 28230000"},
		{"link delete", delNetdev(3), "20000000 1100 0100 01000000 00000000" + "00000000 03000000 00000000 00000000"},
		{"neighbour", setNeighbour(3, b.addr, b.mac), "30000000 1c00 0105 01000000 00000000" +
			"02000000 03000000 8000 00 00" + "0800 0100 0a4d0002" + "0a00 0200 020000000002 0000"},
		{"route", addRoute(3, a.addr, b.addr, 101), "34000000 1800 0106 01000000 00000000" +
			"02200000 6503fd01 00000000" + "0800 0100 0a4d0002" + "0800 0400 03000000" + "0800 0700 0a4d0001"},
		{"rule", w.rules()[0].add(), "3c000000 2000 0106 01000000 00000000" + "02202000 65000001 00000000" +
			"0800 0600 0a000000" + "0700 0300 6c6f00 00" + "0800 0100 0a4d0002" + "0800 0200 0a4d0001"},
		{"local rule", localRule(0).remove(), "24000000 2100 0100 01000000 00000000" + "02000000 ff000001 00000000" + "0800 0600 00000000"},
	} {
		got := hex.EncodeToString(c.m.Finish(1))
		want := strings.ReplaceAll(c.want, " ", "")
		if got != want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, want)
		}
	}
}

// Each driver's devices have a pair of network devices, addresses and rules of their own.
func TestWiring(t *testing.T) {
	w := newWiring("ringside")
	want := []rdmaLink{{"rxe0", "rxe", "ringside0"}, {"rxe1", "rxe", "ringside1"}, {"siw0", "siw", "ringside2"}, {"siw1", "siw", "ringside3"}}
	if got := w.links(); !slices.Equal(got, want) {
		t.Errorf("links %v", got)
	}
	seen := map[any]bool{}
	for _, p := range w {
		for _, e := range p.ends {
			seen[e.netdev], seen[e.mac], seen[e.addr], seen[e.table] = true, true, true, true
		}
	}
	for _, r := range w.rules() {
		seen[r.priority] = true
		if r.priority >= localAfter {
			t.Errorf("rule %v comes after the one for local addresses", r)
		}
	}
	if len(seen) != 5*4 {
		t.Errorf("something is there twice: %v", seen)
	}
	if a := w[1].ends; a[0].addr.String() != "10.78.0.1" || a[1].addr.String() != "10.78.0.2" {
		t.Errorf("siw's addresses are %v and %v", a[0].addr, a[1].addr)
	}
}
