package mlx5emu

import (
	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Ethernet frames, without the frame check sequence.

const (
	ethHeader = 14
	minFrame  = 60   // shorter ones are filled up with zeros, as the wire has none
	maxFrame  = 9216 // longer ones are lost at the port
)

// A frame is on the wire. Whoever has it only reads its bytes.
type frame struct {
	data []byte
	from *Context // whose it is, if it is one of the same device
}

// headers are where a frame's headers are, and what protocols they are of. An offset of 0 is one that is not there.
type headers struct {
	tagged   bool
	vlan     uint16
	typ      uint16 // behind the tag
	ip       int
	v6       bool
	protocol uint8 // of IP; that of IPv6 only if it comes right behind the header
	ports    int   // the TCP or UDP header; not of a fragment that is not the first
	end      int   // of the IP packet, as it says: padding may follow, or it may be cut
}

const (
	typeVLAN = 0x8100
	typeIPv4 = 0x0800
	typeIPv6 = 0x86dd
	protoTCP = 6
	protoUDP = 17
)

// parse finds the headers. What does not fit the frame is not there.
func parse(b []byte) (h headers) {
	at := ethHeader
	if h.typ = be.Uint16(b[12:]); h.typ == typeVLAN && len(b) >= ethHeader+4 {
		h.tagged, h.vlan, h.typ = true, be.Uint16(b[14:]), be.Uint16(b[16:])
		at += 4
	}
	p := b[at:]
	switch {
	case h.typ == typeIPv4 && len(p) >= 20 && p[0]>>4 == 4:
		n := int(p[0]&15) * 4
		if n < 20 || n > len(p) {
			return h
		}
		h.ip, h.protocol, h.end = at, p[9], at+int(be.Uint16(p[2:]))
		if be.Uint16(p[6:])&0x1fff == 0 {
			h.transport(b, at+n)
		}
	case h.typ == typeIPv6 && len(p) >= 40 && p[0]>>4 == 6:
		h.ip, h.v6, h.protocol, h.end = at, true, p[6], at+40+int(be.Uint16(p[4:]))
		h.transport(b, at+40)
	}
	return h
}

// transport takes note of a TCP or UDP header at off, if it is one.
func (h *headers) transport(b []byte, off int) {
	if h.protocol == protoTCP && off+20 <= len(b) || h.protocol == protoUDP && off+8 <= len(b) {
		h.ports = off
	}
}

// sum is the one's complement sum of b, on top of what came before.
func sum(s uint32, b []byte) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

// fold is the checksum that a sum makes.
func fold(s uint32) uint16 {
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}

// pseudo is the sum of what TCP and UDP count of the IP header.
func (h *headers) pseudo(b []byte) uint32 {
	s := uint32(h.protocol) + uint32(h.end-h.ports)
	if h.v6 {
		return sum(s, b[h.ip+8:h.ip+40])
	}
	return sum(s, b[h.ip+12:h.ip+20])
}

// counted reports whether there is a checksum of TCP or UDP that can be had: not of a fragment, nor of a packet that is cut.
func (h *headers) counted(b []byte) bool {
	return h.ports > 0 && h.checksumAt()+2 <= h.end && h.end <= len(b) && (h.v6 || be.Uint16(b[h.ip+6:])&0x3fff == 0)
}

// checksumAt is where the checksum of TCP or UDP is.
func (h *headers) checksumAt() int {
	if h.protocol == protoTCP {
		return h.ports + 16
	}
	return h.ports + 6
}

// fillChecksums puts those into a new frame that an Ethernet segment asks for.
func (f *frame) fillChecksums(flags uint8) {
	if flags == 0 {
		return
	}
	b := f.data
	h := parse(b)
	if flags&ethL3Checksum != 0 && h.ip > 0 && !h.v6 {
		p := b[h.ip:][:int(b[h.ip]&15)*4]
		be.PutUint16(p[10:], 0)
		be.PutUint16(p[10:], fold(sum(0, p)))
	}
	if flags&ethL4Checksum != 0 && h.counted(b) {
		at := h.checksumAt()
		be.PutUint16(b[at:], 0)
		c := fold(sum(h.pseudo(b), b[h.ports:h.end]))
		if c == 0 && h.protocol == protoUDP {
			c = 0xffff // 0 would be none
		}
		be.PutUint16(b[at:], c)
	}
}

// verify says what a CQE says of a frame: which of its checksums are right, and what the headers are.
func (f *frame) verify() (right, kind uint8) {
	const ipv6, ipv4 = 1 << 2, 2 << 2
	b := f.data
	h := parse(b)
	if h.ip == 0 {
		return 0, 0
	}
	switch {
	case h.v6:
		right, kind = right|cqeL3Right, ipv6
	default:
		kind = ipv4
		if fold(sum(0, b[h.ip:][:int(b[h.ip]&15)*4])) == 0 {
			right |= cqeL3Right
		}
	}
	if h.counted(b) {
		none := h.protocol == protoUDP && be.Uint16(b[h.checksumAt():]) == 0
		if none || fold(sum(h.pseudo(b), b[h.ports:h.end])) == 0 {
			right |= cqeL4Right
		}
	}
	return right, kind
}

// A filter is one spec of a flow rule: bytes of the frame, at offsets that depend on its headers, in the bits of a mask.
type filter struct {
	typ         uint32
	value, mask []byte
}

// filterSizes are those of a value, and so of a mask, in bytes.
var filterSizes = map[uint32]int{abi.FlowSpecEth: 16, abi.FlowSpecIPv4: 12, abi.FlowSpecIPv6: 40, abi.FlowSpecTCP: 4, abi.FlowSpecUDP: 4}

// unknownFields are the bytes of a mask, from there on, that the device cannot look at.
var unknownFields = map[uint32]int{abi.FlowSpecEth: 16, abi.FlowSpecIPv4: 10, abi.FlowSpecIPv6: 38, abi.FlowSpecTCP: 4, abi.FlowSpecUDP: 4}

// fields is what the frame b has where a filter of that type has its value; nil: it has no such header.
func (h *headers) fields(to []byte, typ uint32, b []byte) []byte {
	to = to[:0]
	switch {
	case typ == abi.FlowSpecEth:
		to = append(to, b[:12]...)
		to = be.AppendUint16(to, h.typ)
		return be.AppendUint16(to, h.vlan)
	case typ == abi.FlowSpecIPv4 && h.ip > 0 && !h.v6:
		p := b[h.ip:]
		return append(append(append(to, p[12:20]...), p[9], p[1]), p[8], p[6]>>5)
	case typ == abi.FlowSpecIPv6 && h.ip > 0 && h.v6:
		p := b[h.ip:]
		v := be.Uint32(p)
		to = append(to, p[8:40]...)
		to = be.AppendUint32(to, v&(1<<20-1))
		return append(to, p[6], byte(v>>20), p[7], 0)
	case h.ports > 0 && (typ == abi.FlowSpecTCP && h.protocol == protoTCP || typ == abi.FlowSpecUDP && h.protocol == protoUDP):
		p := b[h.ports:]
		return append(to, p[2], p[3], p[0], p[1])
	}
	return nil
}

// matches reports whether the filter matches a frame.
func (r *filter) matches(h *headers, b []byte) bool {
	var buf [40]byte
	got := h.fields(buf[:], r.typ, b)
	if got == nil {
		return false
	}
	if r.typ == abi.FlowSpecEth && (r.mask[14]|r.mask[15]) != 0 && !h.tagged {
		return false
	}
	for i := range r.mask {
		if (got[i]^r.value[i])&r.mask[i] != 0 {
			return false
		}
	}
	return true
}

// destination and source are a frame's addresses.
func (f *frame) destination() ib.MAC { return ib.MAC(f.data[:6]) }
func (f *frame) source() ib.MAC      { return ib.MAC(f.data[6:12]) }
