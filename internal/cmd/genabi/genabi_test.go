package main

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

const pkg = "../../abi"

// What is committed is what genabi writes, from headers of the version that it was written from.
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
	m := regexp.MustCompile(`from the headers of Linux (\S+) `).FindSubmatch(committed)
	if m == nil {
		t.Fatalf("%s does not say which headers it is from", wanted[0].name)
	}
	if string(m[1]) != version {
		testutil.Skip(t, "the headers here are of Linux "+version+", and internal/abi is from those of "+string(m[1]))
	}
	files, err := generate(include)
	if errors.Is(err, errNoCompiler) {
		testutil.Skip(t, err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.skipped != nil {
			t.Logf("%s is not compared: %v", f.name, f.skipped)
			continue
		}
		have, err := os.ReadFile(filepath.Join(pkg, f.name))
		if err != nil {
			t.Error(err)
		} else if have, text := shared(have, f.text); !bytes.Equal(have, text) {
			t.Errorf("%s is not what genabi writes: go generate ./internal/abi\n%s", f.name, firstDifference(have, text))
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
