package roce

import (
	"encoding/binary"
	"net/netip"
)

// An IP is what an IP header says besides the addresses and lengths. The invariant CRC covers the identification only.
type IP struct {
	ID    uint16 // IPv4's identification
	Class uint8  // traffic class, or type of service: DSCP, and the ECN bits, which are the two lowest
	Hops  uint8  // hop limit, or time to live; 0: not known
	Flow  uint32 // IPv6's flow label, 20 bits
}

// usualHops is the hop limit of what is made if none is known.
const usualHops = 64

// AppendDatagram appends the IP packet that carries a UDP payload, as Linux sends it and the invariant CRC expects it: of IPv4 not
// to be fragmented, with the identification id, which is usually 0. The addresses are of one family. The checksum of UDP is 0, for
// none, over IPv4, as rxe has it.
func AppendDatagram(b []byte, src, dst netip.AddrPort, id uint16, payload []byte) []byte {
	return (&IP{ID: id}).AppendDatagram(b, src, dst, payload)
}

// AppendDatagram is the function AppendDatagram with all of an IP header.
func (ip IP) AppendDatagram(b []byte, src, dst netip.AddrPort, payload []byte) []byte {
	if ip.Hops == 0 {
		ip.Hops = usualHops
	}
	s, d := src.Addr().Unmap(), dst.Addr().Unmap()
	at := len(b)
	n := udpLen + len(payload)
	if s.Is4() {
		b = append(b, make([]byte, ip4Len)...)
		ip.Put4((*[ip4Len]byte)(b[at:]), s, d, n)
	} else {
		b = append(b, make([]byte, ip6Len)...)
		ip.Put6((*[ip6Len]byte)(b[at:]), s, d, n)
	}
	udp := len(b)
	for _, v := range [...]uint16{src.Port(), dst.Port(), uint16(n), 0} {
		b = binary.BigEndian.AppendUint16(b, v)
	}
	b = append(b, payload...)
	if !s.Is4() { // which cannot do without (RFC 8200, 8.1)
		check := ^sum(sum(sum(protoUDP, b[udp-2*16:udp]), b[udp+4:udp+6]), b[udp:]) // the length counts twice
		if check == 0 {
			check = 0xffff
		}
		binary.BigEndian.PutUint16(b[udp+6:], check)
	}
	return b
}

// Put4 makes the IPv4 header of a UDP datagram of n bytes, its header included.
func (ip *IP) Put4(h *[ip4Len]byte, src, dst netip.Addr, n int) {
	s, d := src.As4(), dst.As4()
	h[0], h[1] = 4<<4|ip4Len/4, ip.Class
	binary.BigEndian.PutUint16(h[2:], uint16(ip4Len+n))
	binary.BigEndian.PutUint16(h[4:], ip.ID)
	h[6], h[7], h[8], h[9] = dontFragment, 0, ip.Hops, protoUDP
	h[10], h[11] = 0, 0
	copy(h[12:], s[:])
	copy(h[16:], d[:])
	binary.BigEndian.PutUint16(h[10:], ^sum(0, h[:]))
}

// Put6 makes the IPv6 header of a UDP datagram of n bytes, its header included.
func (ip *IP) Put6(h *[ip6Len]byte, src, dst netip.Addr, n int) {
	s, d := src.As16(), dst.As16()
	binary.BigEndian.PutUint32(h[:], 6<<28|uint32(ip.Class)<<20|ip.Flow&(1<<20-1))
	binary.BigEndian.PutUint16(h[4:], uint16(n))
	h[6], h[7] = protoUDP, ip.Hops
	copy(h[8:], s[:])
	copy(h[24:], d[:])
}

// Datagram is how long the UDP datagram of a packet is, whose payload is n bytes long: from UDP's header to the invariant CRC.
func (o Opcode) Datagram(n int) int { return udpLen + o.HeaderLen() + n + Pad(n) + ICRCLen }

// sum adds to the Internet checksum (RFC 1071).
func sum(to uint16, b []byte) uint16 {
	total := uint32(to)
	for ; len(b) >= 2; b = b[2:] {
		total += uint32(binary.BigEndian.Uint16(b))
		total = total&0xffff + total>>16
	}
	if len(b) > 0 {
		total += uint32(b[0]) << 8
	}
	total = total&0xffff + total>>16
	return uint16(total)
}
