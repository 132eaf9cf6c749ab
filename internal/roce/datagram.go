package roce

import (
	"encoding/binary"
	"net/netip"
)

// Headers of what AppendDatagram makes.
const (
	hops = 64
)

// AppendDatagram appends the IP packet that carries a UDP payload, as Linux sends it and the invariant CRC expects it: of IPv4 not
// to be fragmented, with the identification id, which is usually 0. The addresses are of one family. The checksum of UDP is 0, for
// none, over IPv4, as rxe has it.
func AppendDatagram(b []byte, src, dst netip.AddrPort, id uint16, payload []byte) []byte {
	s, d := src.Addr().Unmap(), dst.Addr().Unmap()
	at := len(b)
	n := udpLen + len(payload)
	if s.Is4() {
		s4, d4 := s.As4(), d.As4()
		b = append(b, 4<<4|ip4Len/4, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(ip4Len+n))
		b = binary.BigEndian.AppendUint16(b, id)
		b = append(b, dontFragment, 0, hops, protoUDP, 0, 0)
		b = append(append(b, s4[:]...), d4[:]...)
		binary.BigEndian.PutUint16(b[at+10:], ^sum(0, b[at:]))
	} else {
		s16, d16 := s.As16(), d.As16()
		b = append(b, 6<<4, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(n))
		b = append(b, protoUDP, hops)
		b = append(append(b, s16[:]...), d16[:]...)
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
