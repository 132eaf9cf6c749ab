package main

import (
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestModuleInfo(t *testing.T) {
	text := "license=GPL\x00alias=rdma-netlink-subsys-4\x00alias=rtnl-link-x\x00depends=ib-core,udp_tunnel,crc32\x00name=rdma-x\x00intree=Y\x00\x00"
	want := moduleInfo{name: "rdma_x", depends: []string{"ib_core", "udp_tunnel", "crc32"}}
	if got := parseModuleInfo([]byte(text)); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := parseModuleInfo([]byte("depends=\x00")); len(got.depends) != 0 {
		t.Errorf("a module that needs nothing needs %q", got.depends)
	}
	if _, err := readModuleInfo([]byte("not ELF")); err == nil {
		t.Error("no error for what is no module")
	}
}

func TestModuleOrder(t *testing.T) {
	g := moduleGraph{
		"rxe": {"ib_uverbs", "ib_core", "tunnel"}, "ib_uverbs": {"ib_core"}, "ib_core": nil, "tunnel": {"udp"}, "udp": nil,
		"siw": {"ib_core", "libcrc"}, "libcrc": nil, "other": {"missing"},
	}
	parsed, err := parseModuleGraph(g.encode())
	if err != nil {
		t.Fatal(err)
	}
	order, err := parsed.order("rxe", "siw", "rxe")
	if err != nil {
		t.Fatal(err)
	}
	if len(order) != 7 {
		t.Errorf("%d modules: %q", len(order), order)
	}
	for i, name := range order {
		for _, d := range g[name] {
			if !slices.Contains(order[:i], d) {
				t.Errorf("%s comes before %s, which it needs: %q", name, d, order)
			}
		}
	}
	if slices.Index(order, "rxe") > slices.Index(order, "siw") {
		t.Errorf("what was wanted first comes last: %q", order)
	}
}

func TestModuleOrderRefused(t *testing.T) {
	g := moduleGraph{"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"gone"}}
	if _, err := g.order("a"); err == nil || !strings.Contains(err.Error(), "needs itself") {
		t.Errorf("a circle: %v", err)
	}
	if _, err := g.order("d"); err == nil || !strings.Contains(err.Error(), "gone, needed by d") {
		t.Errorf("a missing module: %v", err)
	}
	if _, err := parseModuleGraph([]byte("no colon here\n")); err == nil {
		t.Error("a line without colon is no error")
	}
}
