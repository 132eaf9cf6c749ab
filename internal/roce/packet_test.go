package roce

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Each packet in full: what stands between the UDP header and the invariant CRC.
var golden = map[string]struct {
	packet Packet
	n      int // bytes of payload, which is "hello roce" repeated
	hex    string
}{
	"RC SEND_ONLY": {
		Packet{Opcode: Op(RC, SendOnly), PKey: DefaultPKey, DestQP: 0x11, AckReq: true, PSN: 0x123456}, 10,
		"0420ffff0000001180123456" + "68656c6c6f20726f6365" + "0000",
	},
	"every flag": {
		Packet{Opcode: Op(UC, SendLastImm), Solicited: true, Migrated: true, AckReq: true, FECN: true, BECN: true, PKey: 0x8001,
			DestQP: 0xfffffe, PSN: ib.MaxPSN, Imm: 0x01020304}, 1,
		"23f08001c0fffffe80ffffff" + "01020304" + "68" + "000000",
	},
	"RC RDMA_WRITE_ONLY_WITH_IMMEDIATE": {
		Packet{Opcode: Op(RC, WriteOnlyImm), PKey: DefaultPKey, DestQP: 1, PSN: 2, Addr: 0x0102030405060708, RKey: 0x11121314, Len: 4,
			Imm: 0x21222324}, 4,
		"0b00ffff0000000100000002" + "0102030405060708" + "11121314" + "00000004" + "21222324" + "68656c6c",
	},
	"RC RDMA_READ_REQUEST": {
		Packet{Opcode: Op(RC, ReadRequest), PKey: DefaultPKey, DestQP: 1, PSN: 2, Addr: 1 << 63, RKey: 5, Len: 1 << 31}, 0,
		"0c00ffff0000000100000002" + "8000000000000000" + "00000005" + "80000000",
	},
	"RC RDMA_READ_RESPONSE_ONLY": {
		Packet{Opcode: Op(RC, ReadResponseOnly), PKey: DefaultPKey, DestQP: 1, PSN: 2, Syndrome: Ack, MSN: 0xabcdef}, 3,
		"1010ffff0000000100000002" + "1fabcdef" + "68656c" + "00",
	},
	"RC ACKNOWLEDGE, receiver not ready": {
		Packet{Opcode: Op(RC, Acknowledge), PKey: DefaultPKey, DestQP: 1, PSN: 2, Syndrome: RNRNak(14), MSN: 7}, 0,
		"1100ffff0000000100000002" + "2e000007",
	},
	"RC ATOMIC_ACKNOWLEDGE": {
		Packet{Opcode: Op(RC, AtomicAcknowledge), PKey: DefaultPKey, DestQP: 1, PSN: 2, Syndrome: Ack, MSN: 7, Original: 0x0102030405060708}, 0,
		"1200ffff0000000100000002" + "1f000007" + "0102030405060708",
	},
	"RC COMPARE_SWAP": {
		Packet{Opcode: Op(RC, CompareSwap), PKey: DefaultPKey, DestQP: 1, PSN: 2, Addr: 0x10, RKey: 5, Swap: 0xa1a2a3a4a5a6a7a8, Cmp: 0xb1b2b3b4b5b6b7b8}, 0,
		"1300ffff0000000100000002" + "0000000000000010" + "00000005" + "a1a2a3a4a5a6a7a8" + "b1b2b3b4b5b6b7b8",
	},
	"RC SEND_ONLY_WITH_INVALIDATE": {
		Packet{Opcode: Op(RC, SendOnlyInv), PKey: DefaultPKey, DestQP: 1, PSN: 2, InvKey: 0x12345678}, 0,
		"1700ffff0000000100000002" + "12345678",
	},
	"RC FLUSH": {
		Packet{Opcode: Op(RC, Flush), PKey: DefaultPKey, DestQP: 1, PSN: 2, FETH: 0x12, Addr: 0x10, RKey: 5, Len: 6}, 0,
		"1c00ffff0000000100000002" + "00000012" + "0000000000000010" + "00000005" + "00000006",
	},
	"UD SEND_ONLY_WITH_IMMEDIATE": {
		Packet{Opcode: Op(UD, SendOnlyImm), PKey: DefaultPKey, DestQP: 1, PSN: 2, QKey: 0x11111111, SrcQP: 0x22, Imm: 0x01020304}, 2,
		"6520ffff0000000100000002" + "11111111" + "00000022" + "01020304" + "6865" + "0000",
	},
	"CNP": {
		Packet{Opcode: CNP, PKey: DefaultPKey, BECN: true, DestQP: 0x118}, 0,
		"8100ffff4000011800000000" + "00000000000000000000000000000000",
	},
}

func payload(n int) []byte {
	return bytes.Repeat([]byte("hello roce"), n/10+1)[:n]
}

// encode makes the packet p with a payload.
func encode(p *Packet, payload []byte) []byte {
	b := make([]byte, p.Opcode.HeaderLen()+len(payload)+Pad(len(payload)))
	copy(b[p.PutHeader(b, len(payload)):], payload)
	return b
}

func TestGoldenPackets(t *testing.T) {
	for name, c := range golden {
		want := unhex(t, c.hex)
		if got := encode(&c.packet, payload(c.n)); !bytes.Equal(got, want) {
			t.Errorf("%s: encoded\n%x, want\n%x", name, got, want)
		}
		var got Packet
		if err := got.Decode(want); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !bytes.Equal(got.Payload, payload(c.n)) {
			t.Errorf("%s: payload %q", name, got.Payload)
		}
		got.Payload = nil
		if !reflect.DeepEqual(got, c.packet) {
			t.Errorf("%s: decoded %+v, want %+v", name, got, c.packet)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	send := golden["RC SEND_ONLY"].hex
	for name, c := range map[string]struct {
		hex  string
		want Drop
	}{
		"nothing":                       {"", DropShort},
		"BTH cut off":                   {send[:22], DropShort},
		"RETH cut off":                  {golden["RC RDMA_READ_REQUEST"].hex[:54], DropShort},
		"version":                       {"0421ffff0000001180123456" + "68656c6c6f20726f63650000", DropVersion},
		"opcode of RD":                  {"4400ffff0000001180123456", DropOpcode},
		"opcode of no service":          {"ff00ffff0000001180123456", DropOpcode},
		"UC READ":                       {"2c00ffff0000001180123456" + "00000000000000000000000000000000", DropOpcode},
		"UD SEND_FIRST":                 {"6000ffff0000001180123456" + "0000000000000000", DropOpcode},
		"more padding than payload":     {"0430ffff0000001180123456", DropPad},
		"padding of no payload":         {"1110ffff0000001180123456" + "1f000000", DropPad},
		"payload of an acknowledgement": {"1100ffff0000001180123456" + "1f000000" + "00000000", DropLength},
		"not a multiple of four":        {"0420ffff0000001180123456" + "68656c6c6f20726f6365", DropLength},
		"ATOMIC_WRITE of four bytes":    {"1d00ffff0000001180123456" + "00000000000000000000000000000000" + "01020304", DropLength},
	} {
		var p Packet
		if err := p.Decode(unhex(t, c.hex)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if p.PKey != 0 {
			t.Errorf("%s: the packet was changed", name)
		}
	}
}

func TestDrops(t *testing.T) {
	seen := map[string]bool{}
	for d := range Drops + 2 {
		if named := d > 0 && d < Drops; seen[d.Error()] && named {
			t.Errorf("%d: %v", d, d)
		} else if named {
			seen[d.Error()] = true
		} else if got := d.Error(); got != "roce: packet dropped" {
			t.Errorf("%d, which is none: %s", d, got)
		}
	}
	if seen[Drop(0).Error()] {
		t.Error("a reason has no name")
	}
}

func TestFECN(t *testing.T) {
	for _, marked := range []bool{false, true} {
		b := make([]byte, BTHLen)
		(&Packet{Opcode: Op(RC, SendOnly), PKey: DefaultPKey, FECN: marked, BECN: !marked, DestQP: 1<<24 - 1}).PutHeader(b, 0)
		if FECN(b) != marked {
			t.Errorf("% x: %v", b, !marked)
		}
	}
}

func TestOpcodes(t *testing.T) {
	has := func(o Opcode, s string) bool { return strings.Contains(o.String(), s) }
	known := 0
	for i := range 256 {
		o := Opcode(i)
		if !o.Known() {
			if o.HeaderLen() != 0 {
				t.Errorf("%v has headers", o)
			}
			continue
		}
		known++
		if n := o.HeaderLen(); n < BTHLen || n > MaxHeaderLen || n&3 != 0 {
			t.Errorf("%v: %d bytes of headers", o, n)
		}
		if o.IsResponse() && (o.HasImm() || o.HasInv() || o.HasRETH()) {
			t.Errorf("%v is a response with what only requests have", o)
		}
		if first, last := has(o, "FIRST"), has(o, "LAST"); has(o, "SEND") || has(o, "WRITE_") || has(o, "READ_RESPONSE") {
			if only := !has(o, "MIDDLE") && !first && !last; o.First() != (first || only) || o.Last() != (last || only) {
				t.Errorf("%v: first %v, last %v", o, o.First(), o.Last())
			}
		}
		for n := range 6 {
			udp := 8 + o.HeaderLen() + n + Pad(n) + ICRCLen
			if got := o.Datagram(n); got != udp {
				t.Errorf("%v: a datagram of %d bytes with %d of payload, want %d", o, got, n, udp)
			}
		}
	}
	if known != 12+12+13+2+1+2 {
		t.Errorf("%d opcodes", known)
	}
}

func TestSyndromes(t *testing.T) {
	for s, want := range map[Syndrome]ib.WCStatus{Ack: ib.WCSuccess, NakPSN: ib.WCSuccess, RNRNak(3): ib.WCSuccess, NakInvalid: ib.WCRemoteInvalidReqErr,
		NakAccess: ib.WCRemoteAccessErr, NakOperation: ib.WCRemoteOpErr, NakInvalidRD: ib.WCRemoteInvalidReqErr} {
		if got := s.Status(); got != want {
			t.Errorf("%v: %v, want %v", s, got, want)
		}
	}
	if timer, ok := RNRNak(31).IsRNR(); !ok || timer != 31 {
		t.Errorf("RNR NAK of timer 31 is %v, %v", timer, ok)
	}
	for _, s := range []Syndrome{Ack, NakPSN, NakAccess} {
		if _, ok := s.IsRNR(); ok {
			t.Errorf("%v is an RNR NAK", s)
		}
		if s.IsAck() != (s == Ack) {
			t.Errorf("%v: IsAck is %v", s, s.IsAck())
		}
	}
}

// Bad packets may come in floods.
func TestNothingAllocates(t *testing.T) {
	var p Packet
	buf := make([]byte, 256)
	good := encode(&Packet{Opcode: Op(RC, SendOnly)}, payload(100))
	bad := []byte{0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	var c ICRC
	c.Init(src4, dst4)
	withSum := c.Put(good)
	wrong := append(good[:len(good):len(good)], 1, 2, 3, 4)
	if n := testing.AllocsPerRun(100, func() {
		p.PutHeader(buf, 100)
		if p.Decode(good) != nil || p.Decode(bad) == nil {
			t.Error("good and bad confused")
		}
		if _, err := c.Split(withSum, true); err != nil {
			t.Error(err)
		}
		if _, err := c.Split(wrong, true); err == nil {
			t.Error("no error")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// What is decoded and encoded again is what it was, but for bits that are reserved.
func FuzzDecode(f *testing.F) {
	for _, c := range golden {
		f.Add(unhex(f, c.hex))
	}
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 256 {
		if o := Opcode(i); o.Known() {
			b := make([]byte, o.HeaderLen())
			for j := range b {
				b[j] = byte(r.Uint32())
			}
			b[0], b[1] = byte(o), 0
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var p, q Packet
		if p.Decode(b) != nil {
			return
		}
		c := encode(&p, p.Payload)
		if len(c) != len(b) {
			t.Fatalf("%x was encoded as %x", b, c)
		}
		if !bytes.Equal(c[p.Opcode.HeaderLen():][:len(p.Payload)], p.Payload) {
			t.Fatalf("payload of %x is %x", c, p.Payload)
		}
		if err := q.Decode(c); err != nil {
			t.Fatalf("%x: %v", c, err)
		}
		if d := encode(&q, q.Payload); !bytes.Equal(c, d) {
			t.Fatalf("%x became %x", c, d)
		}
		p.Payload, q.Payload = nil, nil
		if !reflect.DeepEqual(p, q) {
			t.Fatalf("%+v became %+v", p, q)
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	pkt := encode(&Packet{Opcode: Op(RC, SendOnly), PKey: DefaultPKey, DestQP: 0x11, PSN: 7}, payload(64))
	var p Packet
	for b.Loop() {
		if p.Decode(pkt) != nil {
			b.Fatal()
		}
	}
}

func BenchmarkPutHeader(b *testing.B) {
	p := Packet{Opcode: Op(RC, SendOnly), PKey: DefaultPKey, DestQP: 0x11, PSN: 7}
	buf := make([]byte, MaxHeaderLen)
	for b.Loop() {
		p.PutHeader(buf, 64)
	}
}
