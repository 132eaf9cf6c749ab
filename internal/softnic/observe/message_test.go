package observe

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func TestMessages(t *testing.T) {
	r := Request{What: Packets, SnapLen: 100, Ring: 1 << 20, To: ib.GID{0xfd, 15: 7}}
	var got Request
	if err := got.Decode(r.Encode()); err != nil || got != r || !Is(r.Encode()) {
		t.Errorf("%+v, %v, want %+v", got, err, r)
	}
	a := Answer{GID: ib.GID{0xfd, 15: 8}, Program: "a program"}
	var back Answer
	if err := back.Decode(a.Encode()); err != nil || back != a {
		t.Errorf("%+v, %v, want %+v", back, err, a)
	}
	a.Program = strings.Repeat("x", 100) + "\x1b[31m"
	if err := back.Decode(a.Encode()); err != nil || len(back.Program) != maxProgram {
		t.Errorf("%+v, %v", back, err)
	}
	if err := back.Decode(append((&Answer{}).Encode(), "\x1b[31m"...)); err != nil || back.Program != "?[31m" {
		t.Errorf("%+v, %v", back, err)
	}
}

func FuzzMessages(f *testing.F) {
	f.Add((&Request{What: Counters}).Encode())
	f.Add((&Answer{Program: "x"}).Encode())
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r Request
		if r.Decode(b) == nil && (!Is(b) || !sameButZero(r.Encode(), b)) {
			t.Errorf("%x was read as %+v", b, r)
		}
		var a Answer
		if a.Decode(b) == nil && (len(a.Program) > maxProgram || !Is(b)) {
			t.Errorf("%x was read as %+v", b, a)
		}
	})
}

// sameButZero compares requests but for the word that nobody reads.
func sameButZero(a, b []byte) bool {
	b = bytes.Clone(b)
	copy(b[28:32], a[28:32])
	return bytes.Equal(a, b)
}

func FuzzNIC(f *testing.F) {
	b, _ := json.Marshal(NIC{Program: "\x1b", Ports: []Port{{Dropped: map[string]uint64{"no_qp": 1}}}, QPs: []QP{{QPN: 3, Wire: &Wire{Again: map[string]uint64{"timeout": 4}}}}})
	f.Add(b)
	f.Add([]byte("{}  "))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := DecodeNIC(b)
		if err != nil {
			return
		}
		out, err := EncodeNIC(n)
		if err != nil {
			t.Fatal(err)
		}
		again, err := DecodeNIC(out)
		if err != nil || !reflect.DeepEqual(again, n) {
			t.Errorf("%+v, %v, want %+v", again, err, n)
		}
		for _, c := range n.Program + n.GID {
			if c < ' ' || c > '~' {
				t.Errorf("%q cannot be printed", n.Program+n.GID)
			}
		}
	})
}

func TestVerdictsHaveNames(t *testing.T) {
	keys := map[string]bool{}
	for v := Taken + 1; v < Verdicts; v++ {
		if v.Key() == "" || v.String() == "" || keys[v.Key()] {
			t.Errorf("verdict %d: %q, %q", v, v.Key(), v)
		}
		keys[v.Key()] = true
	}
	if Verdicts.Key() != "" || Verdicts.String() != "" || Taken.String() != "" {
		t.Error("what is no verdict has a name")
	}
	for d := roce.DropShort; d < roce.Drops; d++ {
		if name := Dropped(d).String(); !strings.HasPrefix(name, "dropped: ") || !strings.HasSuffix(d.Error(), strings.TrimPrefix(name, "dropped: ")) {
			t.Errorf("%v is called %q", d, name)
		}
	}
}

// record is of a packet with so much payload.
func record(op roce.Opcode, src, dst string, path Path, payload int) *Record {
	r := &Record{Path: path, Out: true, QPN: 3, PeerQPN: 4, Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst)}
	p := roce.Packet{Opcode: op, PKey: roce.DefaultPKey, DestQP: 4, PSN: 9, Syndrome: roce.NakPSN}
	r.Data = make([]byte, op.HeaderLen()+payload+roce.Pad(payload))
	p.PutHeader(r.Data, payload)
	r.Length = len(r.Data) + roce.ICRCLen
	if path == UDP {
		var c roce.ICRC
		c.Init(r.Src, r.Dst)
		r.Data = c.Put(r.Data)
	}
	return r
}

func TestFilter(t *testing.T) {
	op := func(o uint8) roce.Opcode { return roce.Op(roce.RC, o) }
	for _, c := range []struct {
		words []string
		op    roce.Opcode
		want  bool
	}{
		{nil, op(roce.SendOnly), true},
		{[]string{"send"}, op(roce.SendLastInv), true},
		{[]string{"send"}, op(roce.WriteFirst), false},
		{[]string{"read", "write"}, op(roce.WriteLastImm), true},
		{[]string{"read"}, op(roce.ReadResponseOnly), false},
		{[]string{"response"}, op(roce.AtomicAcknowledge), true},
		{[]string{"atomic"}, op(roce.FetchAdd), true},
		{[]string{"nak"}, op(roce.Acknowledge), true},
		{[]string{"ack"}, op(roce.Acknowledge), false},
		{[]string{"RC_Send_Middle"}, op(roce.SendMiddle), true},
		{[]string{"rc_send_middle"}, roce.Op(roce.UC, roce.SendMiddle), false},
		{[]string{"cnp"}, roce.CNP, true},
		{[]string{"send"}, roce.CNP, false},
	} {
		var f Filter
		for _, w := range c.words {
			if err := f.AddOpcode(w); err != nil {
				t.Fatal(err)
			}
		}
		if got := f.Wants(record(c.op, "10.0.0.1:4791", "10.0.0.2:4791", UDP, 0)); got != c.want {
			t.Errorf("%q wants %v: %v", c.words, c.op, got)
		}
	}
	if err := new(Filter).AddOpcode("sned"); err == nil || !strings.Contains(err.Error(), "sned") {
		t.Error(err)
	}
	r := record(op(roce.SendOnly), "10.0.0.1:4791", "10.0.0.2:4791", UDP, 0)
	for _, q := range []uint32{3, 4} {
		if !(&Filter{QPNs: []uint32{1, q}}).Wants(r) {
			t.Errorf("QP %d is not wanted", q)
		}
	}
	if (&Filter{QPNs: []uint32{5}}).Wants(r) {
		t.Error("another QP is wanted")
	}
	for peer, want := range map[string]bool{"10.0.0.2:0": true, "10.0.0.2:4791": true, "10.0.0.2:1": false, "10.0.0.1:0": false} {
		if got := (&Filter{Peers: []netip.AddrPort{netip.MustParseAddrPort(peer)}}).Wants(r); got != want {
			t.Errorf("peer %s is wanted: %v", peer, got)
		}
	}
}

// Packets come out of Render with the invariant CRC that goes with their headers, whatever becomes of ports and identifications.
func TestRender(t *testing.T) {
	var x Renderer
	check := func(name string, r *Record, want string) {
		t.Helper()
		ip, length, comment := x.Render(r)
		if len(ip) != length || comment != want {
			t.Errorf("%s: %d of %d bytes, %q, want %q", name, len(ip), length, comment, want)
		}
		src, dst, id, udp := r.Src, r.Dst, uint16(0), ip[48:]
		if r.Src.Addr().Is4() {
			id, udp = uint16(ip[4])<<8|uint16(ip[5]), ip[28:]
		}
		h := ip[len(ip)-len(udp)-8:]
		src = netip.AddrPortFrom(src.Addr(), uint16(h[0])<<8|uint16(h[1]))
		dst = netip.AddrPortFrom(dst.Addr(), uint16(h[2])<<8|uint16(h[3]))
		var c roce.ICRC
		c.Init(src, dst)
		if got, ok := c.ID(udp); !ok || got != id {
			t.Errorf("%s: the ICRC goes with the identification %#x (%v), which is %#x", name, got, ok, id)
		}
	}
	send := roce.Op(roce.RC, roce.SendOnly)
	check("IPv4", record(send, "10.0.0.1:1", "10.0.0.2:4791", UDP, 5), "")
	check("IPv6", record(send, "[fd00::1]:1", "[fd00::2]:4791", UDP, 5), "")
	check("through memory", record(send, "[fd00::1]:1", "[fd00::2]:4791", Shm, 5), "")
	check("other ports", record(send, "10.0.0.1:1", "10.0.0.2:5000", UDP, 5), "UDP port 5000")
	// A ConnectX-4 Lx has sent this with the identification 0x718c.
	cnp, err := hex.DecodeString("8100ffff40000118000000000000000000000000000000000000000082fd002a")
	if err != nil {
		t.Fatal(err)
	}
	r := &Record{Src: netip.MustParseAddrPort("10.0.17.1:0"), Dst: netip.MustParseAddrPort("10.0.18.1:4791"), Data: cnp, Length: len(cnp)}
	check("another identification", r, "")
	if ip, _, _ := x.Render(r); ip[4] != 0x71 || ip[5] != 0x8c {
		t.Errorf("the identification is %x", ip[4:6])
	}
	// The same packet to another port: its checksum follows.
	var was, is roce.ICRC
	was.Init(r.Src, r.Dst)
	r.Dst = netip.AddrPortFrom(r.Dst.Addr(), 5000)
	is.Init(r.Src, r.Dst)
	n := len(cnp) - roce.ICRCLen
	binary.LittleEndian.PutUint32(cnp[n:], binary.LittleEndian.Uint32(cnp[n:])^was.Sum(cnp[:n])^is.Sum(cnp[:n]))
	r.Verdict, r.Again = Early, 1
	check("another identification and port", r, "sent again: timeout; out of order: one before it is missing; UDP port 5000")

	r = record(send, "[fd00::1]:1", "[fd00::2]:4791", Shm, 500)
	r.Data = r.Data[:40]
	if ip, length, _ := x.Render(r); len(ip) != 48+40 || length != 48+r.Length {
		t.Errorf("a packet that was cut off: %d of %d bytes", len(ip), length)
	}
}

func TestLine(t *testing.T) {
	r := record(roce.Op(roce.RC, roce.WriteOnly), "10.0.0.1:4791", "10.0.0.2:4791", UDP, 5)
	if got, want := Line(r, "soft0/1/udp", "why"), "Out soft0/1/udp 10.0.0.1:4791 > 10.0.0.2:4791: RC_RDMA_WRITE_ONLY QP 4 PSN 9 of 0 bytes at 0x0, rkey 0x0, 5 bytes (why)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	r = record(roce.Op(roce.RC, roce.Acknowledge), "10.0.0.1:4791", "10.0.0.2:4791", UDP, 0)
	r.Out = false
	if got, want := Line(r, "x", ""), "In  x 10.0.0.1:4791 > 10.0.0.2:4791: RC_ACKNOWLEDGE QP 4 PSN 9 NAK: PSN sequence error, MSN 0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
