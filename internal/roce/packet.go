package roce

import (
	"encoding/binary"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Packet is what stands between the UDP header and the invariant CRC. Of the extension headers, only those that the
// opcode has mean anything.
type Packet struct {
	Opcode    Opcode
	Solicited bool // the receiver's completion raises an event (SE)
	Migrated  bool // the state of path migration (M); this library sends false, as rxe does
	AckReq    bool // the responder must acknowledge
	FECN      bool // congestion was met on the way
	BECN      bool // tell the sender that congestion was met
	PKey      uint16
	DestQP    uint32 // 24 bits
	PSN       ib.PSN

	// DETH
	QKey  uint32
	SrcQP uint32 // 24 bits
	// FETH: bits 3..0 placement, bits 5..4 selectivity (A19.4.2)
	FETH uint32
	// RETH and AtomicETH
	Addr uint64
	RKey uint32
	Len  uint32 // bytes of the whole message; RETH only
	Swap uint64 // the new value of a compare-and-swap, or what a fetch-and-add adds
	Cmp  uint64
	// AETH
	Syndrome Syndrome
	MSN      uint32 // 24 bits
	// AtomicAckETH
	Original uint64
	// ImmDt, as it is on the wire
	Imm uint32
	// IETH
	InvKey uint32

	// IP is what the IP header said of a packet that was received, as far as whoever received it knows. Decode and PutHeader leave
	// it alone.
	IP IP

	// Payload is a part of the buffer that was decoded, without the padding.
	Payload []byte
}

// A Drop is why a packet is not one. It is an error, but one that costs no memory, since a flood of packets must cost none.
type Drop uint8

const (
	DropShort   Drop = iota + 1 // shorter than the headers that its opcode has
	DropVersion                 // a transport version other than 0
	DropOpcode                  // an opcode that does not exist, or that this library does not speak
	DropPad                     // padding that the payload does not have, or of none
	DropLength                  // a payload where there can be none, or of a length that there cannot be
	DropICRC                    // the invariant CRC does not match
	Drops                       // how many reasons there are, and one
)

var dropNames = [Drops]string{
	DropShort: "shorter than its headers", DropVersion: "unknown transport version", DropOpcode: "unknown opcode",
	DropPad: "bad padding", DropLength: "bad length", DropICRC: "bad ICRC",
}

func (d Drop) Error() string {
	if d < Drops && dropNames[d] != "" {
		return "roce: packet dropped: " + dropNames[d]
	}
	return "roce: packet dropped"
}

// Bits of bytes of the BTH (IBA 9.2).
const (
	bitSE      = 1 << 7 // byte 1
	bitM       = 1 << 6
	shiftPad   = 4
	maskPad    = 3
	maskTVer   = 0xf
	bitFECN    = 1 << 7 // byte 4
	bitBECN    = 1 << 6
	bitAckReq  = 1 << 7 // byte 8
	byteMasked = 4      // the one that the invariant CRC takes for ones

	mask24 = 1<<24 - 1
)

// FECN reports whether a packet of at least BTHLen bytes says that it has met congestion.
func FECN(b []byte) bool { return b[4]&bitFECN != 0 }

// Decode takes a packet apart. b is what stands between the UDP header and the invariant CRC; p.Payload refers to it.
// Decode checks that the packet is one. What is wrong with one that a responder has to answer, such as a packet in the middle of a
// message that is not full, it leaves to that. Its error is a Drop; p is then as it was.
func (p *Packet) Decode(b []byte) error {
	if len(b) < BTHLen {
		return DropShort
	}
	op := Opcode(b[0])
	info := &opcodes[op]
	switch {
	case b[1]&maskTVer != 0:
		return DropVersion
	case info.headerLen == 0:
		return DropOpcode
	case len(b) < int(info.headerLen):
		return DropShort
	}
	pad := int(b[1]>>shiftPad) & maskPad
	payload := b[info.headerLen:]
	switch {
	case info.has&hasPayload == 0:
		if len(payload) != 0 {
			return DropLength
		}
		if pad != 0 {
			return DropPad
		}
	case pad > len(payload):
		return DropPad
	case len(payload)&3 != 0, op == Op(RC, AtomicWrite) && len(payload) != 8:
		return DropLength
	}
	payload = payload[:len(payload)-pad]
	p.Opcode = op
	p.Solicited = b[1]&bitSE != 0
	p.Migrated = b[1]&bitM != 0
	p.PKey = binary.BigEndian.Uint16(b[2:])
	p.FECN = b[4]&bitFECN != 0
	p.BECN = b[4]&bitBECN != 0
	p.DestQP = binary.BigEndian.Uint32(b[4:]) & mask24
	p.AckReq = b[8]&bitAckReq != 0
	p.PSN = ib.PSN(binary.BigEndian.Uint32(b[8:]) & mask24)
	p.Payload = payload
	if info.headerLen > BTHLen {
		p.decodeExtensions(info.has, b[BTHLen:])
	}
	return nil
}

// decodeExtensions reads the headers of h from b, which has them all.
func (p *Packet) decodeExtensions(h has, b []byte) {
	if h&hasDETH != 0 {
		p.QKey = binary.BigEndian.Uint32(b)
		p.SrcQP = binary.BigEndian.Uint32(b[4:]) & mask24
		b = b[dethLen:]
	}
	if h&hasFETH != 0 {
		p.FETH = binary.BigEndian.Uint32(b)
		b = b[fethLen:]
	}
	if h&hasRETH != 0 {
		p.Addr = binary.BigEndian.Uint64(b)
		p.RKey = binary.BigEndian.Uint32(b[8:])
		p.Len = binary.BigEndian.Uint32(b[12:])
		b = b[rethLen:]
	}
	if h&hasAtomicETH != 0 {
		p.Addr = binary.BigEndian.Uint64(b)
		p.RKey = binary.BigEndian.Uint32(b[8:])
		p.Swap = binary.BigEndian.Uint64(b[12:])
		p.Cmp = binary.BigEndian.Uint64(b[20:])
		b = b[atomicETHLen:]
	}
	if h&hasAETH != 0 {
		p.Syndrome = Syndrome(b[0])
		p.MSN = binary.BigEndian.Uint32(b) & mask24
		b = b[aethLen:]
	}
	if h&hasAtomicAckETH != 0 {
		p.Original = binary.BigEndian.Uint64(b)
		b = b[atomicAckETHLen:]
	}
	if h&hasImm != 0 {
		p.Imm = binary.BigEndian.Uint32(b)
		b = b[immLen:]
	}
	if h&hasIETH != 0 {
		p.InvKey = binary.BigEndian.Uint32(b)
	}
}

// Pad returns how many zero bytes follow a payload of n bytes.
func Pad(n int) int { return -n & 3 }

// PutHeader writes the BTH and the extension headers of p to b, which must have room for p.Opcode.HeaderLen(), and returns that
// length. The padding is that of a payload of n bytes; p.Payload is not looked at, since payloads are gathered from elsewhere.
func (p *Packet) PutHeader(b []byte, n int) int {
	info := &opcodes[p.Opcode]
	b = b[:info.headerLen]
	b[0] = byte(p.Opcode)
	b[1] = byte(Pad(n) << shiftPad)
	if p.Solicited {
		b[1] |= bitSE
	}
	if p.Migrated {
		b[1] |= bitM
	}
	binary.BigEndian.PutUint16(b[2:], p.PKey)
	binary.BigEndian.PutUint32(b[4:], p.DestQP&mask24)
	if p.FECN {
		b[4] |= bitFECN
	}
	if p.BECN {
		b[4] |= bitBECN
	}
	binary.BigEndian.PutUint32(b[8:], uint32(p.PSN)&mask24)
	if p.AckReq {
		b[8] |= bitAckReq
	}
	p.putExtensions(info.has, b[BTHLen:])
	return len(b)
}

func (p *Packet) putExtensions(h has, b []byte) {
	if h&hasDETH != 0 {
		binary.BigEndian.PutUint32(b, p.QKey)
		binary.BigEndian.PutUint32(b[4:], p.SrcQP&mask24)
		b = b[dethLen:]
	}
	if h&hasFETH != 0 {
		binary.BigEndian.PutUint32(b, p.FETH)
		b = b[fethLen:]
	}
	if h&hasRETH != 0 {
		binary.BigEndian.PutUint64(b, p.Addr)
		binary.BigEndian.PutUint32(b[8:], p.RKey)
		binary.BigEndian.PutUint32(b[12:], p.Len)
		b = b[rethLen:]
	}
	if h&hasAtomicETH != 0 {
		binary.BigEndian.PutUint64(b, p.Addr)
		binary.BigEndian.PutUint32(b[8:], p.RKey)
		binary.BigEndian.PutUint64(b[12:], p.Swap)
		binary.BigEndian.PutUint64(b[20:], p.Cmp)
		b = b[atomicETHLen:]
	}
	if h&hasAETH != 0 {
		binary.BigEndian.PutUint32(b, uint32(p.Syndrome)<<24|p.MSN&mask24)
		b = b[aethLen:]
	}
	if h&hasAtomicAckETH != 0 {
		binary.BigEndian.PutUint64(b, p.Original)
		b = b[atomicAckETHLen:]
	}
	if h&hasImm != 0 {
		binary.BigEndian.PutUint32(b, p.Imm)
		b = b[immLen:]
	}
	if h&hasIETH != 0 {
		binary.BigEndian.PutUint32(b, p.InvKey)
		b = b[iethLen:]
	}
	clear(b) // the reserved bytes of a CNP
}
