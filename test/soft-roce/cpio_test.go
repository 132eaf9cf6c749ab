package main

import (
	"bytes"
	"strconv"
	"strings"
	"testing"
)

func TestCpioBytes(t *testing.T) {
	tr := tree{}
	tr.file("a/f", 0o644, []byte("hello"))
	var b bytes.Buffer
	if err := tr.writeTo(&b); err != nil {
		t.Fatal(err)
	}
	// Per entry: magic, then inode, mode, uid, gid, links, time, size, two pairs of device numbers, length of the name, checksum.
	want := "070701" + "00000001" + "000041ED" + "00000000" + "00000000" + "00000001" + "00000000" + "00000000" +
		"00000000" + "00000000" + "00000000" + "00000000" + "00000002" + "00000000" + "a\x00" +
		"070701" + "00000002" + "000081A4" + "00000000" + "00000000" + "00000001" + "00000000" + "00000005" +
		"00000000" + "00000000" + "00000000" + "00000000" + "00000004" + "00000000" + "a/f\x00\x00\x00" + "hello\x00\x00\x00" +
		"070701" + "00000000" + "00000000" + "00000000" + "00000000" + "00000001" + "00000000" + "00000000" +
		"00000000" + "00000000" + "00000000" + "00000000" + "0000000B" + "00000000" + "TRAILER!!!\x00\x00\x00\x00"
	if got := b.String(); got != want {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
}

func sampleTree() tree {
	tr := tree{}
	tr.file("init", 0o755, []byte("\x7fELF..."))
	tr.file("usr/lib/x/empty", 0o600, nil)
	tr.symlink("usr/bin/sh", "dash")
	tr.folder("proc")
	tr.device("dev/console", 0o600, 5, 1)
	return tr
}

func TestCpioParsesBack(t *testing.T) {
	var b bytes.Buffer
	if err := sampleTree().writeTo(&b); err != nil {
		t.Fatal(err)
	}
	got, order := parseCpio(t, b.Bytes())
	for name, n := range sampleTree() {
		g, ok := got[name]
		if !ok || g.mode != n.mode || !bytes.Equal(g.data, n.data) || g.major != n.major || g.minor != n.minor {
			t.Errorf("%s: got %+v, want %+v", name, g, n)
		}
	}
	// The kernel makes no folders by itself.
	seen := map[string]bool{"": true}
	for _, name := range order {
		if i := strings.LastIndexByte(name, '/'); i >= 0 && !seen[name[:i]] {
			t.Errorf("%s comes before its folder", name)
		}
		seen[name] = true
	}
	if len(order) != 10 {
		t.Errorf("%d entries, want 10: %q", len(order), order)
	}
}

// parseCpio reads an archive by the format's description (Documentation/driver-api/early-userspace/buffer-format.rst).
func parseCpio(t *testing.T, b []byte) (tree, []string) {
	t.Helper()
	tr, order := tree{}, []string(nil)
	for {
		if len(b) < 110 || string(b[:6]) != "070701" {
			t.Fatalf("no header at %q", b[:min(len(b), 20)])
		}
		var f [13]uint32
		for i := range f {
			v, err := strconv.ParseUint(string(b[6+8*i:14+8*i]), 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			f[i] = uint32(v)
		}
		nameEnd := 110 + int(f[11])
		name := strings.TrimSuffix(string(b[110:nameEnd]), "\x00")
		data := (nameEnd + 3) &^ 3
		end := data + int(f[6])
		if name == "TRAILER!!!" {
			if rest := b[(end+3)&^3:]; len(rest) > 0 {
				t.Fatalf("%d bytes after the end", len(rest))
			}
			return tr, order
		}
		if _, twice := tr[name]; twice {
			t.Fatalf("%s is there twice", name)
		}
		tr[name] = node{mode: f[1], data: b[data:end], major: f[9], minor: f[10]}
		order = append(order, name)
		b = b[(end+3)&^3:]
	}
}
