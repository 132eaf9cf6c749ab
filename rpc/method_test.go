package rpc

import (
	"strings"
	"testing"
)

func TestMethodTable(t *testing.T) {
	var tab methodTable
	if tab.find(0) != nil || tab.find(1) != nil || tab.resolve([]byte("x")) != nil {
		t.Fatal("an empty table finds something")
	}
	add := func(spec Spec) *method {
		t.Helper()
		m := &method{spec: spec}
		if err := tab.add(m); err != nil {
			t.Fatal(err)
		}
		return m
	}
	one := add(Spec{Number: 1})
	seven := add(Spec{Number: 7, Name: "seven"})
	a := add(Spec{Name: "a"})
	b := add(Spec{Name: "b"})
	three := add(Spec{Number: 3})
	for n, want := range map[uint32]*method{
		0: nil, 1: one, 2: nil, 3: three, 7: seven, 8: nil, uint32(MaxMethod): nil, uint32(firstNamed) - 1: nil,
		uint32(firstNamed): a, uint32(firstNamed) + 1: b, uint32(firstNamed) + 2: nil, 1<<32 - 1: nil,
	} {
		if got := tab.find(n); got != want {
			t.Errorf("find(%d) = %v, want %v", n, got, want)
		}
	}
	if tab.resolve([]byte("seven")) != seven || seven.id != 7 || tab.resolve([]byte("b")) != b || b.id != firstNamed+1 {
		t.Error("resolve")
	}
	for _, bad := range []Spec{
		{}, {Number: MaxMethod + 1}, {Number: 7}, {Name: "a"}, {Number: 9, Name: "b"}, {Name: "\xff"}, {Name: strings.Repeat("x", 256)},
	} {
		if err := tab.add(&method{spec: bad}); err == nil {
			t.Errorf("%+v was registered", bad)
		}
	}
	n := 0
	tab.each(func(*method) { n++ })
	if n != 5 {
		t.Errorf("%d methods, want 5", n)
	}
}
