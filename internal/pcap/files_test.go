package pcap

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// packet is a UDP datagram to the discard port over IPv4, which tshark has nothing to say about, with the number n in it.
func packet(n byte) *Packet {
	b := []byte{0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 17, 0, 0, 127, 0, 0, 1, 127, 0, 0, 1, 0, 9, 0, 9, 0, 12, 0, 0, n, 0, 0, 0}
	var s uint32
	for i := 0; i < 20; i += 2 {
		s += uint32(b[i])<<8 | uint32(b[i+1])
	}
	s = ^(s&0xffff + s>>16)
	b[10], b[11] = byte(s>>8), byte(s)
	return &Packet{Time: time.Unix(int64(n), 0), Data: b, Direction: Out}
}

func names(t *testing.T, dir string) (all []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

// Files of a ring begin with all interfaces, and hold the newest packets; each can be read by itself.
func TestRing(t *testing.T) {
	for _, c := range []struct {
		name  string
		size  int64
		count int
		want  []string
		data  []string // the first byte of each packet's payload, file by file
	}{
		{"one", 0, 0, []string{"f"}, []string{"0102030405060708090a0b0c"}},
		{"ring", 200, 10, []string{"f0", "f1", "f2", "f3", "f4", "f5"}, nil},
		{"two digits", 200, 11, []string{"f00", "f01", "f02", "f03", "f04", "f05"}, nil},
		{"any number", 200, 0, []string{"f", "f1", "f2", "f3", "f4", "f5"}, nil},
		{"over", 200, 2, []string{"f0", "f1"}, []string{"090a", "0b0c"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			f := &Files{Name: filepath.Join(dir, "f"), Size: c.size, Count: c.count, App: "test"}
			if err := f.Open(); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if _, err := f.AddInterface(Interface{Name: "i"}); err != nil {
					t.Fatal(err)
				}
			}
			for n := range byte(12) {
				k := packet(n + 1)
				k.Interface = 1
				if err := f.Packet(k); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.Statistics(1, time.Unix(20, 0), 12, 0); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			if got := names(t, dir); !slices.Equal(got, c.want) {
				t.Fatalf("files %q, want %q", got, c.want)
			}
			for i, want := range c.data {
				b, err := os.ReadFile(filepath.Join(dir, c.want[i]))
				if err != nil {
					t.Fatal(err)
				}
				got := ""
				for _, p := range testutil.Tshark(t, b, "data.data", "frame.interface_id") {
					got += p[0][:2]
					if p[1] != "1" {
						t.Errorf("a packet of interface %s", p[1])
					}
				}
				if got != want {
					t.Errorf("%s has the packets %s, want %s", c.want[i], got, want)
				}
			}
		})
	}
}

func TestFilesFail(t *testing.T) {
	f := &Files{Name: filepath.Join(t.TempDir(), "none", "f"), App: "test"}
	if err := f.Open(); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	var out bytes.Buffer
	f = &Files{Name: "-", Out: &out, App: "test"}
	if err := errors.Join(f.Open(), f.Flush()); err != nil || out.Len() == 0 {
		t.Errorf("%d bytes, %v", out.Len(), err)
	}
	f = &Files{Name: "-", Out: &full{0}, App: "test"}
	if err := errors.Join(f.Open(), f.Close()); !errors.Is(err, errFull) {
		t.Error(err)
	}
}
