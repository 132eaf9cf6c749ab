package main

import (
	"bytes"
	"debug/dwarf"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

const pkg = "../../abi"

// What is committed is what genabi writes: all of it, from headers of the very version that it was written from.
func TestUpToDate(t *testing.T) {
	const include = "/usr/include"
	if _, err := os.Stat(include + "/rdma"); errors.Is(err, fs.ErrNotExist) {
		testutil.Skip(t, "no "+include+"/rdma: Debian has it in linux-libc-dev")
	}
	version, err := headerVersion(include)
	if err != nil {
		t.Fatal(err)
	}
	committed, err := os.ReadFile(filepath.Join(pkg, wanted[0].name))
	if err != nil {
		t.Fatal(err)
	}
	if have := madeFrom(committed); release(have) != release(version) {
		testutil.Skip(t, "the headers here are of Linux "+version+", and internal/abi is from those of "+have)
	}
	files, err := generate(include)
	if errors.Is(err, errNoCompiler) {
		testutil.Skip(t, err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		have, err := os.ReadFile(filepath.Join(pkg, f.name))
		if err != nil {
			t.Error(err)
			continue
		}
		if difference := compare(have, f.text); difference != "" {
			t.Errorf("%s is not what genabi writes: go generate ./internal/abi\n%s", f.name, difference)
		}
		if f.skipped != nil {
			t.Logf("%s is compared with what another architecture's compiler says, by the rule they have in common: %v", f.name, f.skipped)
		}
	}
}

// madeFrom returns the version of Linux that a generated file says it is from.
func madeFrom(text []byte) string {
	if m := regexp.MustCompile(`^.* from the headers of Linux (\d+(\.\d+)*)`).FindSubmatch(text); m != nil {
		return string(m[1])
	}
	return "no version"
}

// release is a version without its patch level.
func release(version string) string {
	parts := strings.SplitN(version, ".", 3)
	return strings.Join(parts[:min(len(parts), 2)], ".")
}

// compare says where two generated files differ: of one version all of them must be alike, else what is shared below their headings.
func compare(a, b []byte) string {
	if madeFrom(a) != madeFrom(b) {
		_, a, _ = bytes.Cut(a, []byte("\n"))
		_, b, _ = bytes.Cut(b, []byte("\n"))
		a, b = shared(a, b)
	}
	if bytes.Equal(a, b) {
		return ""
	}
	return firstDifference(a, b)
}

// A number that is missing is seen if the headers are of the very version.
func TestCompare(t *testing.T) {
	const all, less = "\tA  = 1\n\tB  = 2\n", "\tA = 1\n"
	for _, c := range []struct {
		version, text string
		same          bool
	}{
		{"6.1.2", all, true}, {"6.1.2", less, false}, {"6.1.3", less, true}, {"6.1", less, true}, {"6.1.3", "\tA = 2\n", false},
	} {
		if d := compare([]byte(heading("6.1.2")+all), []byte(heading(c.version)+c.text)); (d == "") != c.same {
			t.Errorf("6.1.2 and %s, %q: %q", c.version, c.text, d)
		}
	}
}

// shared returns what two such files must have alike: all but numbers that only one of them has, as patch levels of one version of Linux
// differ in the newest, and how many there are of a kind.
func shared(a, b []byte) (x, y []byte) {
	number := regexp.MustCompile(`(?m)^\t([A-Z]\w*) += \S+$`)
	names := func(text []byte) map[string]bool {
		m := map[string]bool{}
		for _, l := range number.FindAllSubmatch(text, -1) {
			m[string(l[1])] = !bytes.HasSuffix(l[1], []byte("_MAX"))
		}
		return m
	}
	inA, inB := names(a), names(b)
	keep := func(text []byte) []byte {
		var out [][]byte
		for _, line := range bytes.Split(text, []byte("\n")) {
			if m := number.FindSubmatch(line); m == nil || inA[string(m[1])] && inB[string(m[1])] {
				out = append(out, bytes.Join(bytes.Fields(line), []byte(" "))) // whatever the column
			}
		}
		return bytes.Join(out, []byte("\n"))
	}
	return keep(a), keep(b)
}

// A number that has changed, or a line that is none, is seen.
func TestShared(t *testing.T) {
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"\tA  = 1\n\tB  = 2\n\tX_MAX = 3", "\tA = 1\n\tX_MAX = 2", true},
		{"\tA  = 1\n\tB  = 2", "\tA = 1\n\tB = 3", false},
		{"\tA  = 1\ntype T struct {", "\tA = 1\ntype U struct {", false},
	} {
		if x, y := shared([]byte(c.a), []byte(c.b)); bytes.Equal(x, y) != c.same {
			t.Errorf("%q and %q: %q, %q", c.a, c.b, x, y)
		}
	}
}

// A struct that an architecture may lay out in another way than the next is refused.
func TestNatural(t *testing.T) {
	number := func(size int64) dwarf.Type {
		return &dwarf.UintType{BasicType: dwarf.BasicType{CommonType: dwarf.CommonType{ByteSize: size}}}
	}
	of := func(kind string, size int64, fields ...*dwarf.StructField) *dwarf.StructType {
		return &dwarf.StructType{CommonType: dwarf.CommonType{ByteSize: size}, Kind: kind, Field: fields}
	}
	at := func(offset int64, t dwarf.Type) *dwarf.StructField {
		return &dwarf.StructField{ByteOffset: offset, Type: t}
	}
	packed := of("struct", 5, at(0, number(1)), at(1, number(4)))
	for i, c := range []struct {
		t    *dwarf.StructType
		good bool
	}{
		{of("struct", 8, at(0, number(1)), at(4, number(4))), true},
		{of("union", 8, at(0, number(1)), at(0, number(8))), true},
		{of("struct", 8, at(0, &dwarf.ArrayType{Type: number(2), Count: 3}), at(6, number(1))), true},
		{packed, false},
		{of("struct", 16, at(0, number(4)), at(8, number(4))), false}, // aligned by an attribute
		{of("struct", 12, at(0, number(8)), at(8, number(4))), false}, // as on a system of 32 bits
		{of("struct", 16, at(0, number(16))), false},
		{of("struct", 10, at(0, &dwarf.ArrayType{Type: packed, Count: 2})), false},
	} {
		if err := natural(c.t); (err == nil) != c.good {
			t.Errorf("%d: %v", i, err)
		}
	}
}

func TestCamel(t *testing.T) {
	for c, want := range map[string]string{
		"max_send_wr": "MaxSendWR", "qp_handle": "QPHandle", "lkey": "LKey", "sgid_index": "SGIDIndex",
		"__data": "Data", "pad_1": "Pad1", "sin6_addr": "Sin6Addr", "reserved": "Reserved",
	} {
		if got := camel(c); got != want {
			t.Errorf("camel(%q) = %q, want %q", c, got, want)
		}
	}
}

// Enums of bits are written in hexadecimal, numberings in decimal.
func TestMasks(t *testing.T) {
	for _, c := range []struct {
		values []int64
		want   bool
	}{
		{[]int64{1, 2, 4, 8}, true},
		{[]int64{0, 1, 2, 4, 7}, true},
		{[]int64{0, 1, 2, 3, 4}, false},
		{[]int64{2, 3, 4, 8, 9, 10, 255}, false},
		{[]int64{0x1000, 0x1001}, true},
		{[]int64{1, 2}, false},
	} {
		var g group
		for _, v := range c.values {
			g.consts = append(g.consts, constant{value: v})
		}
		if got := g.masks(); got != c.want {
			t.Errorf("masks(%v) = %v", c.values, got)
		}
	}
}
