package rpc

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// frameOf returns a frame with header h, whose payload length is set from payload.
func frameOf(h header, bulk []mr.RemoteKey, payload string) []byte {
	h.bulk, h.payload = len(bulk), len(payload)
	b := make([]byte, headerLen+len(bulk)*bulkLen)
	putHeader(b, &h)
	for i := range bulk {
		_ = putBulk(b[headerLen+i*bulkLen:], bulk[i])
	}
	return append(b, payload...)
}

// examples returns the blocks of indented hexadecimal digits below the last heading of docs/protocol.md, without spaces.
func examples(t *testing.T) (blocks []string) {
	t.Helper()
	text, err := os.ReadFile("../docs/protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := bytes.Cut(text, []byte("\n## Examples\n"))
	if !ok {
		t.Fatal("docs/protocol.md has no examples")
	}
	inside := false
	for line := range strings.Lines(string(text)) {
		digits, indented := strings.CutPrefix(line, "    ")
		if indented && !inside {
			blocks = append(blocks, "")
		}
		if inside = indented; indented {
			blocks[len(blocks)-1] += strings.Join(strings.Fields(digits), "")
		}
	}
	return blocks
}

// The golden frames are the examples of docs/protocol.md.
func TestFrameGolden(t *testing.T) {
	cases := []struct {
		name    string
		h       header
		bulk    []mr.RemoteKey
		payload string
		hex     string
	}{
		{
			name: "request", h: header{kind: kindRequest, word: 7, id: makeID(3, 0x1_0002), timeout: 250_000}, payload: "hi",
			hex: "0101000007000000" + "0300000002000100" + "90d0030000000000" + "0000000002000000" + "6869",
		},
		{
			name: "request with a bulk argument", h: header{kind: kindRequest, word: 0x10001, id: makeID(0, 1)},
			bulk: []mr.RemoteKey{{Addr: 0x7f0011223344, Len: 4096, RKey: 0xa1b2c3d4, Access: ib.AccessRemoteRead}},
			hex: "0101000001000100" + "0000000001000000" + "0000000000000000" + "0100000000000000" +
				"44332211007f0000" + "0010000000000000" + "d4c3b2a104000000",
		},
		{
			name: "response", h: header{kind: kindResponse, id: makeID(3, 0x1_0002)}, payload: "ho",
			hex: "0102000000000000" + "0300000002000100" + "0000000000000000" + "0000000002000000" + "686f",
		},
		{
			name: "status", h: header{kind: kindResponse, word: uint32(ResourceExhausted), flags: flagNotExecuted, id: makeID(5, 9)}, payload: "\x12\x04full",
			hex: "0102010008000000" + "0500000009000000" + "0000000000000000" + "0000000006000000" + "120466756c6c",
		},
		{
			name: "cancel", h: header{kind: kindCancel, id: makeID(3, 0x1_0002)},
			hex: "0103000000000000" + "0300000002000100" + "0000000000000000" + "0000000000000000",
		},
		{
			name: "goaway", h: header{kind: kindGoAway, word: uint32(Unavailable)}, payload: "\x12\x03bye",
			hex: "010400000e000000" + "0000000000000000" + "0000000000000000" + "0000000005000000" + "1203627965",
		},
		{
			name: "resolve", h: header{kind: kindResolve, id: makeID(1, 1)}, payload: "a.B/C",
			hex: "0105000000000000" + "0100000001000000" + "0000000000000000" + "0000000005000000" + "612e422f43",
		},
	}
	documented := examples(t)
	if len(documented) != len(cases) {
		t.Fatalf("docs/protocol.md has %d examples, and there are %d here", len(documented), len(cases))
	}
	for i, tc := range cases {
		if documented[i] != tc.hex {
			t.Errorf("%s: docs/protocol.md has\n%s, want\n%s", tc.name, documented[i], tc.hex)
		}
		t.Run(tc.name, func(t *testing.T) {
			b := frameOf(tc.h, tc.bulk, tc.payload)
			if got := hex.EncodeToString(b); got != tc.hex {
				t.Fatalf("encoded\n%s, want\n%s", got, tc.hex)
			}
			h, err := parseHeader(b)
			if err != nil {
				t.Fatal(err)
			}
			want := tc.h
			want.bulk, want.payload = len(tc.bulk), len(tc.payload)
			if h != want {
				t.Fatalf("decoded %+v, want %+v", h, want)
			}
			for i, d := range tc.bulk {
				if got, err := parseBulk(b[headerLen+i*bulkLen:]); err != nil || got != d {
					t.Fatalf("bulk %d: %+v %v, want %+v", i, got, err, d)
				}
			}
		})
	}
}

// Every single field that is out of its range is refused.
func TestFrameRefused(t *testing.T) {
	request := frameOf(header{kind: kindRequest, word: 1, id: 1}, nil, "payload")
	with := func(frame []byte, at int, v ...byte) []byte {
		b := append([]byte(nil), frame...)
		copy(b[at:], v)
		return b
	}
	goaway := frameOf(header{kind: kindGoAway}, nil, "")
	cancel := frameOf(header{kind: kindCancel, id: 1}, nil, "")
	resolve := frameOf(header{kind: kindResolve, id: 1}, nil, "x")
	response := frameOf(header{kind: kindResponse, id: 1}, nil, "")
	for name, b := range map[string][]byte{
		"empty":                  nil,
		"short header":           request[:headerLen-1],
		"version 0":              with(request, 0, 0),
		"version 2":              with(request, 0, 2),
		"kind 0":                 with(request, 1, 0),
		"kind 6":                 with(request, 1, 6),
		"request flags":          with(request, 2, 1),
		"request high flags":     with(request, 3, 0x80),
		"request deadline":       with(request, 16, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff),
		"bulk count too large":   with(request, 24, maxBulk+1),
		"bulk count beyond end":  with(request, 24, 1),
		"reserved":               with(request, 26, 1),
		"payload short":          with(request, 28, 6),
		"payload long":           with(request, 28, 8),
		"payload huge":           with(request, 28, 0xff, 0xff, 0xff, 0xff),
		"truncated":              request[:len(request)-1],
		"response flags":         with(response, 2, 2),
		"response with deadline": with(response, 16, 1),
		"response with bulk":     append(with(response, 24, 1), make([]byte, bulkLen)...),
		"cancel with word":       with(cancel, 4, 1),
		"cancel with payload":    append(with(cancel, 28, 1), 0),
		"goaway with id":         with(goaway, 8, 1),
		"goaway with flags":      with(goaway, 2, 1),
		"resolve with word":      with(resolve, 4, 1),
		"resolve without name":   with(resolve, 28, 0)[:headerLen],
		"resolve long name":      frameOf(header{kind: kindResolve}, nil, string(make([]byte, maxMethodName+1))),
	} {
		if _, err := parseHeader(b); !errors.Is(err, errFrame) {
			t.Errorf("%s: %v, want a malformed frame", name, err)
		}
	}
	for name, k := range map[string]mr.RemoteKey{
		"wraps":          {Addr: math.MaxUint64 - 10, Len: 100, Access: ib.AccessRemoteRead},
		"too long":       {Len: math.MaxUint64, Access: ib.AccessRemoteRead},
		"no access":      {Len: 1},
		"local access":   {Len: 1, Access: ib.AccessLocalWrite},
		"atomic access":  {Len: 1, Access: ib.AccessRemoteRead | ib.AccessRemoteAtomic},
		"unknown access": {Len: 1, Access: 1 << 31},
	} {
		var b [bulkLen]byte
		if putBulk(b[:], k) == nil {
			t.Errorf("bulk %s: was encoded", name)
		}
		binary.LittleEndian.PutUint64(b[0:], k.Addr)
		binary.LittleEndian.PutUint64(b[8:], k.Len)
		binary.LittleEndian.PutUint32(b[20:], uint32(k.Access))
		if _, err := parseBulk(b[:]); !errors.Is(err, errFrame) {
			t.Errorf("bulk %s: %v, want a malformed frame", name, err)
		}
	}
}

func TestTimeoutMicros(t *testing.T) {
	for d, want := range map[time.Duration]uint64{
		-time.Second: 1, 0: 1, 1: 1, time.Microsecond: 1, time.Microsecond + 1: 2, time.Second: 1e6,
		math.MaxInt64: maxTimeoutMicros,
	} {
		if got := timeoutMicros(d); got != want {
			t.Errorf("timeoutMicros(%v) = %d, want %d", d, got, want)
		}
	}
}

// FuzzFrame: whatever a peer sends, parsing does not panic, and what is accepted can be encoded again to the same bytes.
func FuzzFrame(f *testing.F) {
	f.Add(frameOf(header{kind: kindRequest, word: 7, id: 1, timeout: 99}, nil, "hello"))
	f.Add(frameOf(header{kind: kindRequest, word: 7, id: 1}, []mr.RemoteKey{{Addr: 1, Len: 2, RKey: 3, Access: ib.AccessRemoteRead}, {Addr: 4, Len: 5, RKey: 6, Access: bulkAccess}}, "x"))
	f.Add(frameOf(header{kind: kindResponse, word: 5, flags: 1}, nil, "\x12\x01x\x1a\x06\x0a\x01t\x12\x01v"))
	f.Add(frameOf(header{kind: kindResponse, word: 99}, nil, "\x12\x02\xff\xfe"))
	f.Add(frameOf(header{kind: kindCancel, id: 1 << 40}, nil, ""))
	f.Add(frameOf(header{kind: kindGoAway, word: 14}, nil, "\x12\x03bye"))
	f.Add(frameOf(header{kind: kindResolve}, nil, "name"))
	f.Add(make([]byte, headerLen))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHeader(b)
		if err != nil {
			if !errors.Is(err, errFrame) {
				t.Fatalf("error %v is not errFrame", err)
			}
			return
		}
		again := make([]byte, headerLen)
		putHeader(again, &h)
		if !reflect.DeepEqual(again, b[:headerLen]) {
			t.Fatalf("header % x encodes as % x", b[:headerLen], again)
		}
		for i := range h.bulk {
			at := b[headerLen+i*bulkLen:]
			d, err := parseBulk(at)
			if err != nil {
				continue
			}
			var bb [bulkLen]byte
			if err := putBulk(bb[:], d); err != nil {
				t.Fatal(err)
			}
			if string(bb[:]) != string(at[:bulkLen]) {
				t.Fatalf("descriptor % x encodes as % x", at[:bulkLen], bb)
			}
		}
		if h.kind == kindResponse || h.kind == kindGoAway {
			e, err := parseStatus(h.word, h.flags, b[headerLen:])
			if err != nil {
				return
			}
			if _, err := parseStatus(uint32(e.Code), h.flags, appendStatus(nil, e)); err != nil {
				t.Fatalf("status %v does not survive: %v", e, err)
			}
		}
	})
}
