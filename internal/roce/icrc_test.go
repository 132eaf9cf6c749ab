package roce

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

var (
	src4 = netip.MustParseAddrPort("10.0.0.1:49152")
	dst4 = netip.MustParseAddrPort("10.0.0.2:4791")
	src6 = netip.MustParseAddrPort("[fd00::1]:49152")
	dst6 = netip.MustParseAddrPort("[fd00::2]:4791")
)

// IP packets with the ICRC at their end.
var goldenICRC = map[string]string{
	"IPv4": "4500003800004000401126b30a0000010a000002" + "c00012b700240000" + "0420ffff000000118012345668656c6c6f20726f63650000" + "9cb1ec44",
	"IPv6": "6000000000241140fd000000000000000000000000000001fd000000000000000000000000000002" + "c00012b700240000" +
		"0420ffff000000118012345668656c6c6f20726f63650000" + "85022ff5",
	// Sent by rxe of Linux 6.1: the end of an RC SEND with immediate.
	"IPv6 of rxe": "6000000000201140fd990000000000000000000000000001fd990000000000000000000000000002" + "cafe12b700200000" +
		"0330ffff001234568000005a0000000404000000" + "98878e8c",
	// Sent by a ConnectX-4 Lx, which counts the identification.
	"CNP of a ConnectX-4 Lx": "45c2003c718c4000401191610a0011010a001201" + "000012b700280000" +
		"8100ffff400001180000000000000000000000000000000000000000" + "82fd002a",
}

// addresses reads source and destination of an IP packet, and returns the UDP payload.
func addresses(b []byte) (src, dst netip.AddrPort, id uint16, udp []byte) {
	n := ip4Len
	var s, d netip.Addr
	if b[0]>>4 == 4 {
		s, d = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		id = binary.BigEndian.Uint16(b[4:])
	} else {
		n = ip6Len
		s, d = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
	}
	h := b[n:]
	return netip.AddrPortFrom(s, binary.BigEndian.Uint16(h)), netip.AddrPortFrom(d, binary.BigEndian.Uint16(h[2:])), id, h[udpLen:]
}

func TestGoldenICRC(t *testing.T) {
	for name, packet := range goldenICRC {
		src, dst, id, udp := addresses(unhex(t, packet))
		if !testutil.HasICRC(unhex(t, packet)) {
			t.Errorf("%s: testutil wants another", name)
		}
		var c ICRC
		c.Init(src, dst)
		pkt, err := c.Split(udp, id != 0)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got, want := c.sum(pkt, id), binary.LittleEndian.Uint32(udp[len(pkt):]); got != want {
			t.Errorf("%s: ICRC %08x, want %08x", name, got, want)
		}
		if got, ok := c.ID(udp); !ok || got != id {
			t.Errorf("%s: identification %#x, %v, want %#x", name, got, ok, id)
		}
		if id != 0 {
			if _, err := c.Split(udp, false); err != DropICRC {
				t.Errorf("%s: an identification of %#x was accepted where 0 was expected: %v", name, id, err)
			}
		}
		// Congestion is marked on the way.
		if pkt[byteMasked] ^= 0xff; c.sum(pkt, id) != binary.LittleEndian.Uint32(udp[len(pkt):]) {
			t.Errorf("%s: the ICRC covers FECN and BECN", name)
		}
	}
}

// A FLUSH passes with the CRC that rxe gives it, too: that goes over the whole packet once more. Nothing else does, nor one that has changed.
func TestFlushOfRXE(t *testing.T) {
	with := func(c *ICRC, pkt []byte, id uint16) []byte {
		return binary.LittleEndian.AppendUint32(bytes.Clone(pkt), crc32.Update(c.sum(pkt, id), crc32.IEEETable, pkt))
	}
	for addr, to := range map[netip.AddrPort]netip.AddrPort{src4: dst4, src6: dst6} {
		var c ICRC
		c.Init(addr, to)
		p := Packet{Opcode: Op(RC, Flush), PKey: DefaultPKey, DestQP: 1, PSN: 2, AckReq: true, FETH: 0x12, Addr: 0x10, RKey: 5, Len: 6}
		pkt := make([]byte, p.Opcode.HeaderLen())
		p.PutHeader(pkt, 0)
		ids := []uint16{0}
		if c.n == ip4Len {
			ids = append(ids, 1, 0x1234, 0xffff)
		}
		for _, id := range ids {
			udp := with(&c, pkt, id)
			if got, err := c.Split(udp, true); err != nil || !bytes.Equal(got, pkt) {
				t.Errorf("%v, identification %#x: %v", addr, id, err)
			}
			if got, ok := c.ID(udp); !ok || got != id {
				t.Errorf("%v: identification %#x, %v, want %#x", addr, got, ok, id)
			}
			if _, err := c.Split(udp, false); (err == nil) != (id == 0) {
				t.Errorf("%v, identification %#x, where 0 was expected: %v", addr, id, err)
			}
			for i := range 8 * len(udp) {
				bad := bytes.Clone(udp)
				bad[i/8] ^= 1 << (i % 8)
				if _, err := c.Split(bad, false); err == nil {
					t.Errorf("%v: bit %d has changed, and it passes", addr, i)
				}
			}
		}
		for _, other := range [][]byte{append([]byte{byte(Op(RC, SendOnly))}, pkt[1:]...), append([]byte{byte(Op(UC, Flush))}, pkt[1:]...), append(bytes.Clone(pkt), 0, 0, 0, 0),
			append([]byte{byte(Op(RC, Flush))}, make([]byte, MaxPacket-1)...)} {
			for _, any := range []bool{false, true} {
				if _, err := c.Split(with(&c, other, 0), any); err == nil {
					t.Errorf("%v: %d bytes that begin with %#x pass", addr, len(other), other[0])
				}
			}
		}
	}
}

// Each of the 65,536 identifications passes, and next to nothing else does.
func TestAnyIdentification(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, n := range []int{BTHLen, BTHLen + 4, 100, 1040, MaxPacket} {
		t.Run(fmt.Sprintf("%d bytes", n), func(t *testing.T) {
			var c ICRC
			c.Init(src4, dst4)
			pkt := make([]byte, n)
			for i := range pkt {
				pkt[i] = byte(r.Uint32())
			}
			zero := c.Sum(pkt)
			for id := range 1 << 16 {
				if id > 1000 && id%17 != 0 && testing.Short() {
					continue
				}
				diff := c.sum(pkt, uint16(id)) ^ zero
				if got, ok := idFor(diff, n); !ok || got != uint16(id) {
					t.Fatalf("identification %#x was taken for %#x, %v", id, got, ok)
				}
				if _, ok := idFor(diff^1<<(id%32), n); ok {
					t.Fatalf("a wrong bit was not seen beside identification %#x", id)
				}
			}
			const tries = 1 << 20
			passed := 0
			for range tries {
				if _, ok := idFor(r.Uint32(), n); ok {
					passed++
				}
			}
			if want := tries >> 16; passed > 4*want {
				t.Errorf("%d of %d random checksums pass, expected about %d", passed, tries, want)
			}
		})
	}
}

// Every change of a packet on its way is seen, but that of the bits which routers may change.
func TestICRCSeesChanges(t *testing.T) {
	for _, ends := range [][2]netip.AddrPort{{src4, dst4}, {src6, dst6}} {
		var c ICRC
		c.Init(ends[0], ends[1])
		udp := c.Put(encode(&Packet{Opcode: Op(RC, SendOnly)}, payload(50)))
		for i := range udp {
			for bit := range 8 {
				udp[i] ^= 1 << bit
				if _, err := c.Split(udp, true); (err != nil) != (i != byteMasked) {
					t.Errorf("%v: bit %d of byte %d: %v", ends[0], bit, i, err)
				}
				udp[i] ^= 1 << bit
			}
		}
		for cut := range len(udp) {
			if _, err := c.Split(udp[:cut], true); err == nil {
				t.Errorf("%v: the first %d bytes pass", ends[0], cut)
			}
		}
		var other ICRC
		for _, e := range [][2]netip.AddrPort{{ends[1], ends[0]}, {ends[0], netip.AddrPortFrom(ends[1].Addr(), Port+1)}} {
			other.Init(e[0], e[1])
			if _, err := other.Split(udp, true); err == nil {
				t.Errorf("%v: the packet passes as one from %v to %v", ends[0], e[0], e[1])
			}
		}
		if _, err := c.Split(make([]byte, MaxPacket+ICRCLen+1), true); err == nil {
			t.Errorf("%v: a packet that is longer than any path MTU passes", ends[0])
		}
	}
}

func TestMappedAddresses(t *testing.T) {
	var a, b ICRC
	a.Init(src4, dst4)
	b.Init(netip.AddrPortFrom(netip.AddrFrom16(src4.Addr().As16()), src4.Port()), netip.AddrPortFrom(netip.AddrFrom16(dst4.Addr().As16()), dst4.Port()))
	if a != b {
		t.Error("an IPv4 address mapped to IPv6 makes a difference")
	}
}

func TestSourcePort(t *testing.T) {
	seen := map[uint16]bool{}
	for i := range uint32(1000) {
		p := SourcePort(0x11+i, 0x23)
		if p < 0xc000 {
			t.Fatalf("port %d is not a dynamic one", p)
		}
		seen[p] = true
	}
	if len(seen) < 500 {
		t.Errorf("1,000 connections have %d ports", len(seen))
	}
}

func FuzzSplit(f *testing.F) {
	for _, packet := range goldenICRC {
		_, _, _, udp := addresses(unhex(f, packet))
		f.Add(udp, true)
	}
	f.Fuzz(func(t *testing.T, udp []byte, v4 bool) {
		var c ICRC
		if c.Init(src4, dst4); !v4 {
			c.Init(src6, dst6)
		}
		c.Split(udp, true)
		if len(udp) < BTHLen || len(udp) > MaxPacket {
			return
		}
		if pkt, err := c.Split(c.Put(udp[:len(udp):len(udp)]), false); err != nil || len(pkt) != len(udp) {
			t.Fatalf("%d bytes came back as %d: %v", len(udp), len(pkt), err)
		}
	})
}

func BenchmarkICRC(b *testing.B) {
	for _, n := range []int{64, 1024, 4096} {
		b.Run(fmt.Sprintf("%d", n), func(b *testing.B) {
			var c ICRC
			c.Init(src4, dst4)
			udp := c.Put(make([]byte, BTHLen+n))
			b.SetBytes(int64(n))
			for b.Loop() {
				c.Sum(udp[:len(udp)-ICRCLen])
			}
		})
	}
}

func BenchmarkAnyIdentification(b *testing.B) {
	var c ICRC
	c.Init(src4, dst4)
	pkt := make([]byte, BTHLen+64)
	udp := binary.LittleEndian.AppendUint32(pkt, c.sum(pkt, 0x1234))
	for b.Loop() {
		if _, err := c.Split(udp, true); err != nil {
			b.Fatal(err)
		}
	}
}

func TestAppendDatagram(t *testing.T) {
	for _, name := range []string{"IPv4", "IPv6"} {
		want := unhex(t, goldenICRC[name])
		src, dst, _, udp := addresses(want)
		got := AppendDatagram([]byte("before"), src, dst, 0, udp)
		if string(got[:6]) != "before" {
			t.Errorf("%s: what was there is %q", name, got[:6])
		}
		got = got[6:]
		if name == "IPv6" {
			// The sum of everything, the checksum included, is all ones.
			pseudo := append(bytes.Clone(got[8:ip6Len]), 0, 0, 0, byte(len(got)-ip6Len), 0, 0, 0, protoUDP)
			if s := sum(sum(0, pseudo), got[ip6Len:]); s != 0xffff {
				t.Errorf("the checksum is off by %#x", ^s)
			}
			copy(got[ip6Len+6:], []byte{0, 0})
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: %x, want %x", name, got, want)
		}
	}
	if got := AppendDatagram(nil, src4, dst4, 0xabcd, make([]byte, 16)); binary.BigEndian.Uint16(got[4:]) != 0xabcd || sum(0, got[:ip4Len]) != 0xffff {
		t.Errorf("with an identification: % x", got[:ip4Len])
	}
	for _, c := range []struct {
		hex  string
		want uint16
	}{{"", 0}, {"01", 0x100}, {"ffff0001", 1}, {"ffff01", 0x100}, {"0001f203f4f5f6f7", 0xddf2}} { // the last is RFC 1071's example
		if got := sum(0, unhex(t, c.hex)); got != c.want {
			t.Errorf("sum of %s is %#x, want %#x", c.hex, got, c.want)
		}
	}
}

// UDP's checksum over IPv6 is right whatever the payload, and never 0, which would be none.
func TestChecksum6(t *testing.T) {
	src, dst := netip.MustParseAddrPort("[fd00::1]:49152"), netip.MustParseAddrPort("[fd00::2]:4791")
	checksum := func(payload []byte) uint16 {
		udp := AppendDatagram(nil, src, dst, 0, payload)[ip6Len:]
		total := uint32(protoUDP) + uint32(len(udp))
		for _, b := range [][]byte{src.Addr().AsSlice(), dst.Addr().AsSlice(), append(udp, 0)} {
			for ; len(b) > 1; b = b[2:] {
				total += uint32(b[0])<<8 + uint32(b[1])
			}
		}
		if total%0xffff != 0 {
			t.Errorf("%d bytes: the sum of all is %#x", len(payload), total)
		}
		return binary.BigEndian.Uint16(udp[6:])
	}
	r := rand.New(rand.NewPCG(3, 4))
	for n := range 300 {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(r.Uint32()) | 0x80 // carries
		}
		checksum(b)
	}
	word := []byte{0, 0}
	binary.BigEndian.PutUint16(word, checksum(word)) // what makes the sum all ones
	if got := checksum(word); got != 0xffff {
		t.Errorf("in the place of 0: %#x", got)
	}
}

// The longest and the shortest packet have an identification, what is longer or shorter has none.
func TestIDLength(t *testing.T) {
	var c ICRC
	c.Init(src4, dst4)
	for n := range MaxPacket + 3 {
		if n > BTHLen+1 && n < MaxPacket-1 {
			continue
		}
		pkt := make([]byte, n)
		var crc uint32
		if n >= BTHLen {
			crc = c.sum(pkt, 0xabc)
		}
		id, ok := c.ID(binary.LittleEndian.AppendUint32(pkt, crc))
		if want := n >= BTHLen && n <= MaxPacket; ok != want || ok && id != 0xabc {
			t.Errorf("%d bytes: %#x, %v", n, id, ok)
		}
	}
}
