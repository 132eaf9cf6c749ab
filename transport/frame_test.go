package transport

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestHeaderGolden holds the layout of docs/protocol.md.
func TestHeaderGolden(t *testing.T) {
	for _, c := range []struct {
		h    header
		body string
		want string
	}{
		{makeHeader(msgData, 0, 0, 3), "abc", "01 00 0000 03000000 616263"},
		{makeHeader(msgData, flagLow, 0x1234, 0), "", "01 01 3412 00000000"},
		{makeHeader(msgRTS, 0, 1, 0x00070002), strings.Repeat("\x00", remoteLen), "02 00 0100 02000700" + strings.Repeat("00", remoteLen)},
		{makeHeader(msgFIN, flagCancelled, 0, 5), "", "03 02 0000 05000000"},
		{makeHeader(msgCancel, 0, 0, 5), "", "04 00 0000 05000000"},
		{makeHeader(msgCredit, 0, 64, 0), "", "05 00 4000 00000000"},
		{makeHeader(msgCredit, flagLow, 0, 0), "", "05 01 0000 00000000"},
		{makeHeader(msgEOS, 0, 2, 0), "", "06 00 0200 00000000"},
		{makeHeader(msgImm, 0, 3, 0xdeadbeef), "", "07 00 0300 efbeadde"},
	} {
		var b [headerLen]byte
		c.h.put(b[:])
		got := append(b[:], c.body...)
		if want := unhex(t, c.want); !bytes.Equal(got, want) {
			t.Errorf("%v: % x, want % x", c.h.typ(), got, want)
		}
		h, err := parseHeader(got)
		if err != nil || h != c.h {
			t.Errorf("%v: parsed %#x, %v", c.h.typ(), uint64(h), err)
		}
	}
}

func TestHeaderRefused(t *testing.T) {
	for name, s := range map[string]string{
		"empty":               "",
		"short":               "01000000000000",
		"type 0":              "0000000000000000",
		"type 8":              "0800000000000000",
		"immediate with body": "070000000000000000",
		"low immediate":       "0701000000000000",
		"length too small":    "01000000020000006162" + "63",
		"length too large":    "0100000004000000616263",
		"length wraps":        "01000000ffffffff616263",
		"flags of data":       "0102000000000000",
		"unknown flags":       "0180000000000000",
		"short RTS":           "020000000000000000",
		"long RTS":            "0200000000000000" + strings.Repeat("00", remoteLen+1),
		"FIN with body":       "030000000000000000",
		"low FIN":             "0301000000000000",
		"cancel with body":    "040000000000000000",
		"credit with nothing": "0500000000000000",
		"credit with arg":     "0500010001000000",
		"credit with body":    "050001000000000000",
		"EOS with arg":        "0600000001000000",
	} {
		if _, err := parseHeader(unhex(t, s)); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRTSRefused(t *testing.T) {
	good := mr.RemoteKey{Addr: 4096, Len: 100, RKey: 7, Access: ib.AccessRemoteRead}
	if _, err := parseRTS(must(good.MarshalBinary()), 100); err != nil {
		t.Errorf("good: %v", err)
	}
	empty, large := good, good
	empty.Len = 0
	large.Len = 101
	for name, k := range map[string]mr.RemoteKey{"empty": empty, "large": large} {
		if _, err := parseRTS(must(k.MarshalBinary()), 100); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
	wraps := bytes.Repeat([]byte{0xff}, 8)
	wraps = append(wraps, 100, 0, 0, 0, 0, 0, 0, 0)
	wraps = append(wraps, make([]byte, 8)...)
	if _, err := parseRTS(wraps, 100); !errors.Is(err, ErrProtocol) {
		t.Errorf("wraps: %v", err)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func FuzzMessage(f *testing.F) {
	for _, s := range []string{"0100000003000000616263", "0500400000000000", "0200000000000000" + strings.Repeat("11", remoteLen), "0302000005000000", ""} {
		f.Add(unhex(f, s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHeader(b)
		if err != nil {
			if !errors.Is(err, ErrProtocol) {
				t.Fatalf("error %v", err)
			}
			return
		}
		var back [headerLen]byte
		h.put(back[:])
		if !bytes.Equal(back[:], b[:headerLen]) {
			t.Fatalf("% x encodes to % x", b[:headerLen], back)
		}
		if h.typ() == msgRTS {
			if k, err := parseRTS(b[headerLen:], 1<<20); err == nil && (k.Len == 0 || k.Len > 1<<20 || k.Addr+k.Len < k.Addr) {
				t.Fatalf("accepted %v", k)
			}
		}
	})
}

func sampleHello() *hello {
	h := &hello{
		Features: 1 << 63, PIDNS: 2, MountNS: 3, UID: 4, PID: 5, QPN: 0x123456, PSN: 0xabcdef, MaxMessage: 1 << 20, Slot: 8192, Window: 128,
		Rendezvous: 8, MTU: ib.MTU4096, ReadsOut: 16, ReadsIn: 15, Port: 1, LID: 9,
		Devices: []PeerDevice{{Provider: "soft", Name: "soft0"}, {Provider: "rxe", Name: "rxe0"}}, Name: "päule", PrivateData: []byte{1, 2, 3},
	}
	for i := range h.HostID {
		h.HostID[i] = byte(i)
		h.GID[i] = byte(0xf0 + i)
		h.Devices[0].GID[i] = byte(0xf0 + i)
	}
	return h
}

func TestHelloGolden(t *testing.T) {
	h := sampleHello()
	b := h.append(nil)
	want := unhex(t, "0000000000000080"+"000102030405060708090a0b0c0d0e0f"+"0200000000000000"+"0300000000000000"+"04000000"+"05000000"+
		"f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"+"56341200"+"efcdab00"+"00001000"+"00200000"+"80000000"+"0800"+"05100f01"+"0900"+
		"02"+"000000"+"0300"+"0000"+
		"f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"+"04736f6674"+"05736f667430"+
		"00000000000000000000000000000000"+"03727865"+"0472786530"+
		"0670c3a4756c65"+"010203")
	if !bytes.Equal(b, want) {
		t.Errorf("hello is\n% x, want\n% x", b, want)
	}
	got, err := parseHello(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(h, got); d != "" {
		t.Error(d)
	}
	for n := range b {
		if _, err := parseHello(b[:n]); err == nil {
			t.Errorf("accepted the first %d of %d bytes", n, len(b))
		}
	}
	if _, err := parseHello(append(b, 0)); err == nil {
		t.Error("accepted a byte too many")
	}
	if f := appendFrame(nil, bootReady, []byte("x")); !bytes.Equal(f, unhex(t, "52534445 0100 03 00 01000000 78")) {
		t.Errorf("frame % x", f)
	}
}

// With the feature bit for UDP, the hello ends with where.
func TestHelloUDP(t *testing.T) {
	h := sampleHello()
	plain := h.append(nil)
	h.Features = featureUDP | featureViaUDP
	h.UDP = udpEnd{GID: ib.GID{10: 0xff, 11: 0xff, 12: 10, 15: 9}, Port: 4791, MTU: ib.MTU1024}
	b := h.append(nil)
	if want := append(append(unhex(t, "0600000000000000"), plain[8:]...), unhex(t, "00000000000000000000ffff0a000009"+"b712"+"03"+"00")...); !bytes.Equal(b, want) {
		t.Errorf("hello is\n% x, want\n% x", b, want)
	}
	got, err := parseHello(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(h, got); d != "" {
		t.Error(d)
	}
	for what, bad := range map[string]func(h *hello){
		"no address":          func(h *hello) { h.UDP.GID = ib.GID{} },
		"no port":             func(h *hello) { h.UDP.Port = 0 },
		"no MTU":              func(h *hello) { h.UDP.MTU = 0 },
		"wanted, not offered": func(h *hello) { h.Features = featureViaUDP },
	} {
		h := *h
		bad(&h)
		if _, err := parseHello(h.append(nil)); err == nil {
			t.Errorf("accepted: %s", what)
		}
	}
	if _, err := parseHello(b[:len(b)-1]); err == nil {
		t.Error("accepted a truncated hello")
	}
}

// Of a listener that has chosen TCP, the hello ends with the token, and why.
func TestHelloTCP(t *testing.T) {
	h := sampleHello()
	plain := h.append(nil)
	h.Features = featureTCP | featureViaTCP | featureStream
	h.Stream, h.StreamWhy = streamToken{0: 0xaa, 15: 0xbb}, "no way"
	b := h.append(nil)
	if want := append(append(unhex(t, "3800000000000000"), plain[8:]...), unhex(t, "aa"+strings.Repeat("00", 14)+"bb"+"0600"+"6e6f20776179")...); !bytes.Equal(b, want) {
		t.Errorf("hello is\n% x, want\n% x", b, want)
	}
	got, err := parseHello(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(h, got); d != "" {
		t.Error(d)
	}
	for n := range b {
		if _, err := parseHello(b[:n]); err == nil {
			t.Errorf("accepted the first %d of %d bytes", n, len(b))
		}
	}
	// What a dialler says has no bytes that others would stumble over.
	h.Features, h.Stream, h.StreamWhy = featureTCP|featureViaTCP, streamToken{}, ""
	if b := h.append(nil); len(b) != len(plain) {
		t.Errorf("the offer takes %d bytes", len(b)-len(plain))
	}
	h.Features = featureViaTCP
	if _, err := parseHello(h.append(nil)); err == nil {
		t.Error("accepted: wanted, not offered")
	}
	h.Features, h.StreamWhy = featureTCP|featureStream, "\x1b[2J"+strings.Repeat("long ", 1000)
	if got, err := parseHello(h.append(nil)); err != nil || len(got.StreamWhy) > maxReason || strings.Contains(got.StreamWhy, "\x1b") {
		t.Errorf("a reason of %d bytes, %v", len(h.StreamWhy), err)
	}
}

// With the connection manager's feature bit, the hello ends with where to connect.
func TestHelloCM(t *testing.T) {
	h := sampleHello()
	plain := h.append(nil)
	h.Features = featureCM
	h.CMPort, h.CMToken = 0x4321, cmToken{0: 0xaa, 15: 0xbb}
	h.Sync = mr.RemoteKey{Addr: 0x1122334455667788, Len: 1, RKey: 0x99, Access: ib.AccessRemoteRead}
	b := h.append(nil)
	if want := append(append(unhex(t, "0100000000000000"), plain[8:]...), unhex(t, "2143"+"aa"+strings.Repeat("00", 14)+"bb"+
		"8877665544332211"+"0100000000000000"+"99000000"+"04000000")...); !bytes.Equal(b, want) {
		t.Errorf("hello is\n% x, want\n% x", b, want)
	}
	got, err := parseHello(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(h, got); d != "" {
		t.Error(d)
	}
	for n := range b {
		if _, err := parseHello(b[:n]); err == nil {
			t.Errorf("accepted the first %d of %d bytes", n, len(b))
		}
	}
}

func TestHelloRefused(t *testing.T) {
	for name, f := range map[string]func(*hello){
		"QPN":             func(h *hello) { h.QPN = 1 << 24 },
		"PSN":             func(h *hello) { h.PSN = 1 << 24 },
		"MTU 0":           func(h *hello) { h.MTU = 0 },
		"MTU 6":           func(h *hello) { h.MTU = 6 },
		"no message":      func(h *hello) { h.MaxMessage = 0 },
		"huge messages":   func(h *hello) { h.MaxMessage = maxMaxMessage + 1 },
		"small slots":     func(h *hello) { h.Slot = minEager - 1 },
		"large slots":     func(h *hello) { h.Slot = maxEager + 1 },
		"window 1":        func(h *hello) { h.Window = 1 },
		"window huge":     func(h *hello) { h.Window = 1 << 31 },
		"no rendezvous":   func(h *hello) { h.Rendezvous = 0 },
		"many rendezvous": func(h *hello) { h.Rendezvous = 257 },
		"name":            func(h *hello) { h.Name = "\xff" },
		"device name":     func(h *hello) { h.Devices[0].Name = "\xff" },
		"private data":    func(h *hello) { h.PrivateData = make([]byte, maxPrivateData+1) },
	} {
		h := sampleHello()
		f(h)
		if _, err := parseHello(h.append(nil)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzHello(f *testing.F) {
	f.Add(sampleHello().append(nil))
	f.Add([]byte{})
	withCM := sampleHello()
	withCM.Features |= featureCM
	withCM.Sync = mr.RemoteKey{Addr: 1 << 40, Len: 1, RKey: 7, Access: ib.AccessRemoteRead}
	f.Add(withCM.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHello(b)
		if err != nil {
			return
		}
		again, err := parseHello(h.append(nil))
		if err != nil {
			t.Fatalf("encoded again, it is refused: %v", err)
		}
		if d := cmp.Diff(h, again); d != "" {
			t.Fatal(d)
		}
	})
}

func FuzzBootFrame(f *testing.F) {
	f.Add(appendFrame(nil, bootHello, sampleHello().append(nil)), uint8(bootHello))
	f.Add(appendReject(nil, refuse(RefusedBusy, nil, "busy")), uint8(bootAccept))
	f.Add(appendGoodbye(nil, goodbyeAborted, "bye\n"), uint8(bootGoodbye))
	f.Fuzz(func(t *testing.T, b []byte, want uint8) {
		body, err := readFrame(bytes.NewReader(b), bootKind(want))
		if err == nil && len(body) > maxBootBody {
			t.Fatalf("%d bytes", len(body))
		}
		if _, reason, err := readGoodbye(bytes.NewReader(b)); err == nil && len(reason) > maxReason {
			t.Fatalf("reason of %d bytes", len(reason))
		}
	})
}

func TestErrors(t *testing.T) {
	e := &CloseError{Err: ErrPeerClosed, Reason: "out of cheese", Remote: true}
	if !errors.Is(e, ErrPeerClosed) || !strings.Contains(e.Error(), "it says: out of cheese") {
		t.Error(e)
	}
	h := refuse(RefusedBusy, net.ErrClosed, "too many")
	if !errors.Is(h, ErrRefused) || !errors.Is(h, net.ErrClosed) || !strings.Contains(h.Error(), "refused here (busy): too many") {
		t.Error(h)
	}
	if HandshakeCode(99).String() != "HandshakeCode(99)" || msgType(99).String() != "type 99" || PollMode(9).String() != "PollMode(9)" {
		t.Error("unknown values must print their number")
	}
	if _, err := ParsePollMode("eager"); err == nil {
		t.Error("ParsePollMode accepted nonsense")
	}
}

func TestConfigRefused(t *testing.T) {
	for name, c := range map[string]Config{
		"MaxMessage": {MaxMessage: -1}, "EagerSize": {EagerSize: 1}, "SendDepth": {SendDepth: 1}, "RecvDepth": {RecvDepth: 1 << 20},
		"RendezvousDepth": {RendezvousDepth: 1000}, "Name": {Name: strings.Repeat("x", 256)}, "PrivateData": {PrivateData: make([]byte, 5000)},
		"duration": {Linger: -1},
	} {
		if _, err := c.populate(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
