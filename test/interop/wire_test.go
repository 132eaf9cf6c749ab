package main

import (
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What ibv_rc_pingpong was seen to send.
const seen = "0000:000011:bdcb12:00000000000000000000ffff0a4d0002\x00"

func TestAddressAsTheProgramsWriteIt(t *testing.T) {
	gid, err := ib.ParseGID("10.77.0.2")
	if err != nil {
		t.Fatal(err)
	}
	want := qp.Endpoint{GID: gid, QPN: 0x11, PSN: 0xbdcb12}
	got, err := decodeAddress([]byte(seen))
	if err != nil || got != want {
		t.Errorf("decoded %+v, %v; want %+v", got, err, want)
	}
	if b := encodeAddress(nil, want); string(b) != seen {
		t.Errorf("encoded %q, want %q", b, seen)
	}
}

func TestAddressesThatAreNone(t *testing.T) {
	for _, s := range []string{
		"", seen[1:], seen + "\x00", seen[:len(seen)-1] + "0", strings.Replace(seen, ":", "-", 1),
		strings.Replace(seen, "bdcb12", "bdcb1g", 1), strings.Replace(seen, "bdcb12", "+dcb12", 1),
		strings.Replace(seen, "bdcb12", "0xbdcb", 1), strings.Replace(seen, "0a4d", "0a4 ", 1),
	} {
		if e, err := decodeAddress([]byte(s)); err == nil {
			t.Errorf("%q was read as %+v", s, e)
		}
	}
}

func FuzzDecodeAddress(f *testing.F) {
	f.Add([]byte(seen))
	f.Add([]byte(strings.Repeat("0", addressLen)))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeAddress(b)
		if err != nil {
			return
		}
		if again := encodeAddress(nil, e); !strings.EqualFold(string(again), string(b)) {
			t.Errorf("%q was read as %q", b, again)
		}
	})
}

func FuzzParseHello(f *testing.F) {
	h := hello{seed: 7, rounds: 3, mtu: 1024, at: qp.Endpoint{QPN: 17, PSN: 0xabcdef, GID: ib.GID{15: 1}},
		window: mr.RemoteKey{Addr: 1 << 40, Len: windowSize, RKey: 99}}
	f.Add(h.String())
	f.Add("")
	f.Fuzz(func(t *testing.T, line string) {
		h, err := parseHello(line)
		if err != nil {
			return
		}
		if again, err := parseHello(h.String()); err != nil || again != h {
			t.Errorf("%q was read as %+v, and that as %+v, %v", line, h, again, err)
		}
	})
}
