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
	for n, i := range []Interface{{}, {Name: "soft", Description: "a NIC"}} {
		if got, err := w.AddInterface(i); got != n || err != nil {
			t.Fatalf("interface %d, %v, want %d", got, err, n)
		}
	}
	if err := w.Packet(&Packet{Time: time.Unix(1, 2), Data: []byte{0x45, 1, 2, 3, 4}}); err != nil {
		t.Fatal(err)
	}
	if err := w.Packet(&Packet{Interface: 1, Time: time.Unix(5, 0), Direction: Out, Data: []byte{0x60, 1, 2, 3}, Length: 9, Lost: 7, Comment: "why"}); err != nil {
		t.Fatal(err)
	}
	if err := w.Statistics(1, time.Unix(5, 1), 8, 7); err != nil {
		t.Fatal(err)
	}
	want := "0a0d0d0a" + "28000000" + "4d3c2b1a" + "01000000" + "ffffffffffffffff" + "04000400" + "74657374" + "00000000" + "28000000" +
		"01000000" + "20000000" + "6500" + "0000" + "00000000" + "09000100" + "09000000" + "00000000" + "20000000" +
		"01000000" + "34000000" + "6500" + "0000" + "00000000" + "02000400" + "736f6674" + "03000500" + "61204e4943000000" +
		"09000100" + "09000000" + "00000000" + "34000000" +
		"06000000" + "28000000" + "00000000" + "00000000" + "02ca9a3b" + "05000000" + "05000000" + "4501020304000000" + "28000000" +
		"06000000" + "44000000" + "01000000" + "01000000" + "00f2052a" + "04000000" + "09000000" + "60010203" +
		"01000300" + "77687900" + "02000400" + "02000000" + "04000800" + "0700000000000000" + "00000000" + "44000000" +
		"05000000" + "34000000" + "01000000" + "01000000" + "01f2052a" + "04000800" + "0800000000000000" + "05000800" + "0700000000000000" +
		"00000000" + "34000000"
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
	w, err := NewWriter(&full{2}, "test")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.AddInterface(Interface{}); err != nil {
		t.Error(err)
	}
	if err := w.Packet(&Packet{Time: time.Now(), Data: make([]byte, 10)}); !errors.Is(err, errFull) {
		t.Error(err)
	}
}

func TestPacketsDoNotAllocate(t *testing.T) {
	w, err := NewWriter(&full{1 << 30}, "test")
	if err != nil {
		t.Fatal(err)
	}
	k := &Packet{Time: time.Now(), Data: make([]byte, 1000), Comment: "a comment", Direction: In, Lost: 1}
	if n := testing.AllocsPerRun(100, func() { w.Packet(k) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
