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
		} else if !bytes.Equal(have, f.text) {
			t.Errorf("%s is not what genabi writes: go generate ./internal/abi\n%s", f.name, firstDifference(have, f.text))
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
