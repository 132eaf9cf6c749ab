package pcap

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"
	"time"
)

func TestGolden(t *testing.T) {
	var b bytes.Buffer
	w, err := NewWriter(&b, "test")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Packet(time.Unix(1, 2), []byte{0x45, 1, 2, 3, 4}, ""); err != nil {
		t.Fatal(err)
	}
	if err := w.Packet(time.Unix(5, 0), []byte{0x60, 1, 2, 3}, "why"); err != nil {
		t.Fatal(err)
	}
	want := "0a0d0d0a" + "28000000" + "4d3c2b1a" + "01000000" + "ffffffffffffffff" + "04000400" + "74657374" + "00000000" + "28000000" +
		"01000000" + "20000000" + "6500" + "0000" + "00000000" + "09000100" + "09000000" + "00000000" + "20000000" +
		"06000000" + "28000000" + "00000000" + "00000000" + "02ca9a3b" + "05000000" + "05000000" + "4501020304000000" + "28000000" +
		"06000000" + "30000000" + "00000000" + "01000000" + "00f2052a" + "04000000" + "04000000" + "60010203" + "01000300" + "77687900" + "00000000" + "30000000"
	if got := hex.EncodeToString(b.Bytes()); got != want {
		t.Errorf("wrote\n%s, want\n%s", got, want)
	}
}

type full struct{ left int }

var errFull = errors.New("disk full")

func (f *full) Write(b []byte) (int, error) {
	if f.left--; f.left < 0 {
		return 0, errFull
	}
	return len(b), nil
}

func TestWriteFails(t *testing.T) {
	if _, err := NewWriter(&full{0}, "test"); !errors.Is(err, errFull) {
		t.Error(err)
	}
	w, err := NewWriter(&full{1}, "test")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Packet(time.Now(), make([]byte, 10), ""); !errors.Is(err, errFull) {
		t.Error(err)
	}
}

func TestPacketsDoNotAllocate(t *testing.T) {
	w, err := NewWriter(&full{1 << 30}, "test")
	if err != nil {
		t.Fatal(err)
	}
	ip, now := make([]byte, 1000), time.Now()
	if n := testing.AllocsPerRun(100, func() { w.Packet(now, ip, "a comment") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
