package testutil

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
)

// ICRC computes the invariant CRC of a RoCEv2 packet (IBA A17.3.3.2), which has the IP header in front and room for the CRC at its end, from
// what these headers say. It knows nothing of package roce, which supposes a part of them.
func ICRC(ip []byte) uint32 {
	const ones = 8 // bytes in place of the header of a link that RoCEv2 does not have
	b := append(bytes.Repeat([]byte{0xff}, ones), ip[:len(ip)-4]...)
	h := b[ones:]
	n := 40
	if h[0]>>4 == 4 {
		n = int(h[0]&0xf) * 4
		h[1] = 0xff               // type of service
		h[8] = 0xff               // time to live
		h[10], h[11] = 0xff, 0xff // checksum
	} else {
		h[0] |= 0xf // traffic class and flow label
		h[1], h[2], h[3] = 0xff, 0xff, 0xff
		h[7] = 0xff // hop limit
	}
	h[n+6], h[n+7] = 0xff, 0xff // UDP's checksum
	h[n+8+4] = 0xff             // of the BTH: FECN, BECN and what is reserved beside them
	return crc32.ChecksumIEEE(b)
}

// HasICRC reports whether a packet is long enough for one and has the invariant CRC that belongs to it.
func HasICRC(ip []byte) bool {
	n := 40 + 8 + 12 + 4
	if len(ip) > 0 && ip[0]>>4 == 4 {
		n = int(ip[0]&0xf)*4 + 8 + 12 + 4
	}
	return len(ip) >= n && ICRC(ip) == binary.LittleEndian.Uint32(ip[len(ip)-4:])
}
