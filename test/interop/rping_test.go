package main

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"
)

func TestAdvertAsThePrograms(t *testing.T) {
	want := advert{addr: 0x0102030405060708, rkey: 0x0a0b0c0d, size: 64}
	const wire = "0102030405060708" + "0a0b0c0d" + "00000040"
	if got := hex.EncodeToString(encodeAdvert(nil, want)); got != wire {
		t.Errorf("encoded %s, want %s", got, wire)
	}
	b, err := hex.DecodeString(wire)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := decodeAdvert(b); err != nil || got != want {
		t.Errorf("decoded %+v, %v; want %+v", got, err, want)
	}
}

func TestAdvertsThatAreNone(t *testing.T) {
	for _, s := range []string{
		"", "0102030405060708" + "0a0b0c0d" + "000040", "0102030405060708" + "0a0b0c0d" + "0000004000",
		"0102030405060708" + "0a0b0c0d" + "00000000", // nothing to read
		"0102030405060708" + "0a0b0c0d" + "00010000", // more than any client has
		"0102030405060708" + "0a0b0c0d" + "ffffffff",
		"ffffffffffffffff" + "0a0b0c0d" + "00000002", // around the end of the address space
	} {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		if a, err := decodeAdvert(b); err == nil {
			t.Errorf("%s was read as %+v", s, a)
		}
	}
}

// What rping was seen to print as client, of 64 bytes.
var seenPings = map[int]string{
	0: `rdma-ping-0: ABCDEFGHIJKLMNOPQRSTUVWXYZ[\]^_` + "`abcdefghijklmnopqr",
	1: `rdma-ping-1: BCDEFGHIJKLMNOPQRSTUVWXYZ[\]^_` + "`abcdefghijklmnopqrs",
}

func TestPingAsTheProgramMakesIt(t *testing.T) {
	b := make([]byte, 64)
	for n, want := range seenPings {
		fillPing(b, n)
		if string(b) != want+"\x00" {
			t.Errorf("ping %d is %q, want %q", n, b, want)
		}
		if err := checkPing(b, n); err != nil {
			t.Error(err)
		}
		b[20] ^= 1
		if err := checkPing(b, n); err == nil {
			t.Error("a wrong byte was not noticed")
		}
	}
	// The letters go on from the first after the last, also in their own right.
	fillPing(b, 57)
	if want := "rdma-ping-57: zABCDEF"; !strings.HasPrefix(string(b), want) {
		t.Errorf("%q, want %q", b, want)
	}
	fillPing(b, 58)
	if want := "rdma-ping-58: ABCDEF"; !strings.HasPrefix(string(b), want) {
		t.Errorf("%q, want %q", b, want)
	}
	// The largest number fits into the smallest ping.
	b = b[:rpingMin]
	fillPing(b, 1<<31-1)
	if want := "rdma-ping-2147483647: \x00"; string(b) != want {
		t.Errorf("%q, want %q", b, want)
	}
}

// FuzzRpingServer is what a server makes of a client's message and memory: it asks for nothing but what the client has named,
// and answers no more than it has read.
func FuzzRpingServer(f *testing.F) {
	f.Add(encodeAdvert(nil, advert{1 << 40, 17, 64}), []byte(seenPings[0]+"\x00"))
	f.Add(make([]byte, advertLen), []byte(seenPings[1]))
	f.Add(bytes.Repeat([]byte{0xff}, advertLen), []byte{})
	f.Add([]byte{1, 2, 3}, []byte{0})
	f.Fuzz(func(t *testing.T, message, memory []byte) {
		if a, err := decodeAdvert(message); err == nil {
			if a.size < 1 || a.size > rpingMax || a.addr+uint64(a.size) < a.addr {
				t.Errorf("%x was read as %+v", message, a)
			}
			if again := encodeAdvert(nil, a); !bytes.Equal(again, message) {
				t.Errorf("%x was read as %x", message, again)
			}
		}
		n, err := pongLength(memory)
		if err == nil && (n < 1 || n > len(memory) || memory[n-1] != 0 || bytes.IndexByte(memory[:n-1], 0) >= 0) {
			t.Errorf("of %q, %d bytes are answered", memory, n)
		}
		if len(memory) >= rpingMin && checkPing(memory, 3) == nil && (err != nil || n != len(memory)) {
			t.Errorf("%q is ping 3, but has %d bytes, %v", memory, n, err)
		}
	})
}

func TestArgumentsOfRpingThatMakeNoSense(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"rping", "server client"},
		{"rping -s -c", "none of the others"},
		{"rping -c", "name the server"},
		{"rping -s -I 10.77.0.1", "the client's"},
		{"rping -c -a 10.77.0.1 -p 0", "port 0"},
		{"rping -s -p 65536", "port 65536"},
		{"rping -s -S 22", "22 bytes"},
		{"rping -s -S 65536", "65536 bytes"},
		{"rping -s -C -1", "-1 pings"},
		{"rping -s 10.77.0.1", "unknown command"},
		{"rping -s --ib-dev nothing", "no such device"},
		{"rping -s -a 192.0.2.1 --ib-dev soft0", "none of this software NIC's addresses"},
		{"rping -c -a 127.0.0.1 -I 192.0.2.1 --ib-dev soft0", "none of this software NIC's addresses"},
	} {
		t.Run(c.args, func(t *testing.T) { fails(t, c.args, c.want) })
	}
}

// fails runs the command, which must fail and say want.
func fails(t *testing.T, args, want string) {
	var out, errs strings.Builder
	code := run(t.Context(), strings.Fields(args), &out, &errs)
	if code != 1 || !strings.Contains(errs.String(), want) {
		t.Errorf("exit status %d, %q; want 1 with %q", code, errs.String(), want)
	}
}
