package roce

import (
	"encoding/binary"
	"hash/crc32"
	"math/bits"
	"net/netip"
	"sync"
)

// The headers below the BTH, as far as the invariant CRC covers them.
const (
	ip4Len = 20
	ip6Len = 40
	udpLen = 8

	protoUDP     = 17
	dontFragment = 0x40 // byte 6 of an IPv4 header: every RoCEv2 packet has it (A17.4.5.2)
)

// afterOnes is the CRC of eight bytes of ones, which stand for the link's header that RoCEv2 does not have (A17.3.3.2).
const afterOnes = 0x2144df1c

// An ICRC knows the addresses of one direction of a flow, and computes the invariant CRC of its packets (IBA 7.8.1, A17.3.3.2):
// the CRC-32 of Ethernet, over all that no router changes on the way. It is for one goroutine at a time.
type ICRC struct {
	n   int // length of the IP header
	buf [ip6Len + udpLen + BTHLen]byte
}

// Init sets the addresses of the flow, which are of the same family; an IPv4 address that is mapped to IPv6 is one of IPv4.
func (c *ICRC) Init(src, dst netip.AddrPort) {
	s, d := src.Addr().Unmap(), dst.Addr().Unmap()
	*c = ICRC{n: ip6Len}
	if s.Is4() {
		c.n = ip4Len
		h := c.buf[:ip4Len]
		h[0] = 4<<4 | ip4Len/4
		h[1] = 0xff // type of service
		h[6] = dontFragment
		h[8] = 0xff // time to live
		h[9] = protoUDP
		h[10], h[11] = 0xff, 0xff // checksum
		s4, d4 := s.As4(), d.As4()
		copy(h[12:], s4[:])
		copy(h[16:], d4[:])
	} else {
		h := c.buf[:ip6Len]
		h[0], h[1], h[2], h[3] = 6<<4|0xf, 0xff, 0xff, 0xff // traffic class and flow label
		h[6] = protoUDP
		h[7] = 0xff // hop limit
		s16, d16 := s.As16(), d.As16()
		copy(h[8:], s16[:])
		copy(h[24:], d16[:])
	}
	h := c.buf[c.n:]
	binary.BigEndian.PutUint16(h, src.Port())
	binary.BigEndian.PutUint16(h[2:], dst.Port())
	h[6], h[7] = 0xff, 0xff // checksum
}

// Sum returns the invariant CRC of a packet, which reaches from the BTH to the padding and is at most 64,000 bytes long. An IPv4
// identification of 0 is assumed, which is what Linux gives to datagrams that must not be fragmented and leave an unconnected
// socket. On the wire the CRC's least significant byte comes first.
func (c *ICRC) Sum(pkt []byte) uint32 { return c.sum(pkt, 0) }

func (c *ICRC) sum(pkt []byte, id uint16) uint32 {
	datagram := udpLen + len(pkt) + ICRCLen
	if c.n == ip4Len {
		binary.BigEndian.PutUint16(c.buf[2:], uint16(ip4Len+datagram))
		binary.BigEndian.PutUint16(c.buf[4:], id)
	} else {
		binary.BigEndian.PutUint16(c.buf[4:], uint16(datagram))
	}
	binary.BigEndian.PutUint16(c.buf[c.n+4:], uint16(datagram))
	bth := c.buf[c.n+udpLen:][:BTHLen]
	copy(bth, pkt)
	bth[byteMasked] = 0xff
	sum := crc32.Update(afterOnes, crc32.IEEETable, c.buf[:c.n+udpLen+BTHLen])
	return crc32.Update(sum, crc32.IEEETable, pkt[BTHLen:])
}

// Put appends the invariant CRC to a packet that reaches from the BTH to the padding.
func (c *ICRC) Put(pkt []byte) []byte {
	return binary.LittleEndian.AppendUint32(pkt, c.Sum(pkt))
}

// Split checks the invariant CRC at the end of a UDP payload, and returns the packet before it. If anyID is true, the
// identification in the IPv4 header may be anything: an ordinary socket does not tell it, and most senders count it up. The
// CRC then finds what it would find with 16 bits less. The error is a Drop.
func (c *ICRC) Split(udp []byte, anyID bool) ([]byte, error) {
	n := len(udp) - ICRCLen
	switch {
	case n < BTHLen:
		return nil, DropShort
	case n > MaxPacket:
		return nil, DropLength
	}
	pkt := udp[:n:n]
	if _, ok := c.idOf(pkt, udp[n:], anyID); ok {
		return pkt, nil
	}
	return nil, DropICRC
}

// ID returns the IPv4 identification with which the invariant CRC at the end of a UDP payload matches: of a packet that was
// received, it is the only trace of it. false: none makes it match.
func (c *ICRC) ID(udp []byte) (id uint16, ok bool) {
	n := len(udp) - ICRCLen
	if n < BTHLen || n > MaxPacket {
		return 0, false
	}
	return c.idOf(udp[:n], udp[n:], true)
}

// idOf is ID; any: others than 0 will do.
func (c *ICRC) idOf(pkt, crc []byte, any bool) (id uint16, ok bool) {
	sum, got := c.Sum(pkt), binary.LittleEndian.Uint32(crc)
	any = any && c.n == ip4Len
	if id, ok = idIn(sum^got, len(pkt), any); !ok && len(pkt) == flushLen && pkt[0] == byte(Op(RC, Flush)) {
		// rxe (seen in Linux 6.12) does not know where the payload of a FLUSH is, which has none, and takes all of the packet for it: that is in
		// the CRC twice.
		return idIn(crc32.Update(sum, crc32.IEEETable, pkt)^got, 2*len(pkt), any)
	}
	return id, ok
}

// flushLen is the length of a FLUSH.
const flushLen = BTHLen + fethLen + rethLen

// idIn returns the identification of a packet whose CRC, which goes on for n bytes behind the UDP header, is off by diff; any: others than 0
// will do.
func idIn(diff uint32, n int, any bool) (id uint16, ok bool) {
	if diff == 0 || !any {
		return 0, diff == 0
	}
	return idFor(diff, n)
}

// MaxPacket is the length of the longest packet, of a path MTU of 4,096 bytes, from the BTH to the padding.
const MaxPacket = MaxHeaderLen + 4096

// idFor returns the identification, if there is one, that makes the CRC of an IPv4 packet of n bytes, from BTH to padding, differ by
// diff from what it is with the identification 0.
//
// A CRC is linear. Its register is a polynomial, which each byte multiplies by x^8 (modulo the generator) after the byte was added to
// its eight highest powers. So the identification, which is two bytes, adds a polynomial of the sixteen highest powers,
// multiplied by x^8 for itself and each byte that follows. That is taken back, and what is left must be of those powers only.
func idFor(diff uint32, n int) (id uint16, ok bool) {
	const before = 4 // bytes of the IP header before the identification
	v := multiply(diff, inverses()[ip4Len-before+udpLen+n])
	return bits.ReverseBytes16(uint16(v)), v>>16 == 0
}

// poly is the generator without x^32, its highest powers in the lowest bits, as in all that follows.
const poly = crc32.IEEE

// inverses has x^(-8i) at index i.
var inverses = sync.OnceValue(func() *[ip4Len + udpLen + MaxPacket + 1]uint32 {
	var t [ip4Len + udpLen + MaxPacket + 1]uint32
	p := uint32(1 << 31) // x^0
	for i := range t {
		t[i] = p
		for range 8 {
			if p>>31 != 0 {
				p = (p^poly)<<1 | 1
			} else {
				p <<= 1
			}
		}
	}
	return &t
})

// multiply returns the product of two polynomials, modulo the generator.
func multiply(a, b uint32) (product uint32) {
	for range 32 {
		product ^= b & uint32(int32(a)>>31)
		a <<= 1
		b = b>>1 ^ poly&-(b&1)
	}
	return product
}

// SourcePort returns the UDP source port of a connection between two queue pairs, as Linux chooses it: one that spreads
// connections over a network's paths (rdma_calc_flow_label and rdma_flow_label_to_udp_sport of include/rdma/ib_verbs.h).
func SourcePort(local, remote uint32) uint16 {
	v := uint64(local) * uint64(remote)
	v ^= v >> 20
	v ^= v >> 40
	label := uint32(v) & 0xfffff
	return uint16(label&0x3fff^label>>14) | 0xc000
}
