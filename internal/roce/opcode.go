package roce

import "fmt"

// An Opcode is byte 0 of a packet: the type of the queue pair in the upper three bits, the operation below
// (IBA 9.2, table 38).
type Opcode uint8

// A Service is the upper three bits of an Opcode.
type Service uint8

const (
	RC Service = 0x00
	UC Service = 0x20
	UD Service = 0x60
)

// What an Opcode's lower five bits say.
const (
	SendFirst          = 0x00
	SendMiddle         = 0x01
	SendLast           = 0x02
	SendLastImm        = 0x03
	SendOnly           = 0x04
	SendOnlyImm        = 0x05
	WriteFirst         = 0x06
	WriteMiddle        = 0x07
	WriteLast          = 0x08
	WriteLastImm       = 0x09
	WriteOnly          = 0x0a
	WriteOnlyImm       = 0x0b
	ReadRequest        = 0x0c
	ReadResponseFirst  = 0x0d
	ReadResponseMiddle = 0x0e
	ReadResponseLast   = 0x0f
	ReadResponseOnly   = 0x10
	Acknowledge        = 0x11
	AtomicAcknowledge  = 0x12
	CompareSwap        = 0x13
	FetchAdd           = 0x14
	SendLastInv        = 0x16
	SendOnlyInv        = 0x17
	Flush              = 0x1c // A19
	AtomicWrite        = 0x1d // A19
)

// CNP is the opcode of a congestion notification (A17.9.3): BECN is set, 16 reserved bytes follow the BTH.
const CNP Opcode = 0x81

const cnpLen = 16

// Probes is a service of this library's own, of opcodes that are the manufacturer's to define (table 38): a Probe of some length
// is answered by a ProbeAnswer of that length, with the same number (in the place of the Q_Key), if its queue pair exists. So a
// software NIC finds out whether packets of that length pass both ways between it and another.
const (
	Probes      Service = 0xc0
	Probe       Opcode  = 0xc0
	ProbeAnswer Opcode  = 0xc1
)

// Op makes an Opcode.
func Op(s Service, op uint8) Opcode { return Opcode(s) | Opcode(op) }

// Service returns the type of queue pair that the packet is for.
func (o Opcode) Service() Service { return Service(o & 0xe0) }

// Op returns what the packet does: SendFirst to AtomicWrite.
func (o Opcode) Op() uint8 { return uint8(o & 0x1f) }

// Known reports whether there is such a packet.
func (o Opcode) Known() bool { return opcodes[o].name != "" }

// First reports whether the packet begins a message.
func (o Opcode) First() bool { return opcodes[o].has&isFirst != 0 }

// Last reports whether the packet ends a message.
func (o Opcode) Last() bool { return opcodes[o].has&isLast != 0 }

// HasPayload reports whether a payload may follow the headers.
func (o Opcode) HasPayload() bool { return opcodes[o].has&hasPayload != 0 }

// HasImm reports whether the packet has an immediate value.
func (o Opcode) HasImm() bool { return opcodes[o].has&hasImm != 0 }

// HasInv reports whether the packet has a key to invalidate.
func (o Opcode) HasInv() bool { return opcodes[o].has&hasIETH != 0 }

// HasRETH reports whether the packet names a range of remote memory.
func (o Opcode) HasRETH() bool { return opcodes[o].has&hasRETH != 0 }

// IsResponse reports whether the packet goes from a responder to a requester.
func (o Opcode) IsResponse() bool {
	return opcodes[o].has&hasAETH != 0 || o == Opcode(RC)|ReadResponseMiddle
}

// HeaderLen returns the length in bytes of the BTH and the extension headers, 0 for an opcode that is not known.
func (o Opcode) HeaderLen() int { return int(opcodes[o].headerLen) }

func (o Opcode) String() string {
	if !o.Known() {
		return fmt.Sprintf("opcode %#02x", uint8(o))
	}
	return opcodes[o].name
}

// has is what a packet has after its BTH, in the order in which it stands there, and what the packet is to its message.
type has uint16

const (
	hasDETH has = 1 << iota
	hasFETH
	hasRETH
	hasAtomicETH
	hasAETH
	hasAtomicAckETH
	hasImm
	hasIETH
	hasPayload
	isFirst
	isLast
	isOnly = isFirst | isLast
)

// Lengths in bytes of extension headers.
const (
	dethLen         = 8
	fethLen         = 4
	rethLen         = 16
	atomicETHLen    = 28
	aethLen         = 4
	atomicAckETHLen = 8
	immLen          = 4
	iethLen         = 4
)

type opcodeInfo struct {
	name      string
	has       has
	headerLen uint8
}

// opcodes has a name for those that are known.
var opcodes = func() (t [256]opcodeInfo) {
	lengths := [...]uint8{dethLen, fethLen, rethLen, atomicETHLen, aethLen, atomicAckETHLen, immLen, iethLen} // by bit of has
	add := func(s Service, op uint8, prefix, name string, h has) {
		n := uint8(BTHLen)
		for i, l := range lengths {
			if h&(1<<i) != 0 {
				n += l
			}
		}
		t[Op(s, op)] = opcodeInfo{name: prefix + name, has: h, headerLen: n}
	}
	connected := func(s Service, prefix string) {
		add(s, SendFirst, prefix, "SEND_FIRST", hasPayload|isFirst)
		add(s, SendMiddle, prefix, "SEND_MIDDLE", hasPayload)
		add(s, SendLast, prefix, "SEND_LAST", hasPayload|isLast)
		add(s, SendLastImm, prefix, "SEND_LAST_WITH_IMMEDIATE", hasImm|hasPayload|isLast)
		add(s, SendOnly, prefix, "SEND_ONLY", hasPayload|isOnly)
		add(s, SendOnlyImm, prefix, "SEND_ONLY_WITH_IMMEDIATE", hasImm|hasPayload|isOnly)
		add(s, WriteFirst, prefix, "RDMA_WRITE_FIRST", hasRETH|hasPayload|isFirst)
		add(s, WriteMiddle, prefix, "RDMA_WRITE_MIDDLE", hasPayload)
		add(s, WriteLast, prefix, "RDMA_WRITE_LAST", hasPayload|isLast)
		add(s, WriteLastImm, prefix, "RDMA_WRITE_LAST_WITH_IMMEDIATE", hasImm|hasPayload|isLast)
		add(s, WriteOnly, prefix, "RDMA_WRITE_ONLY", hasRETH|hasPayload|isOnly)
		add(s, WriteOnlyImm, prefix, "RDMA_WRITE_ONLY_WITH_IMMEDIATE", hasRETH|hasImm|hasPayload|isOnly)
	}
	connected(RC, "RC_")
	connected(UC, "UC_")
	add(RC, ReadRequest, "RC_", "RDMA_READ_REQUEST", hasRETH|isOnly)
	add(RC, ReadResponseFirst, "RC_", "RDMA_READ_RESPONSE_FIRST", hasAETH|hasPayload|isFirst)
	add(RC, ReadResponseMiddle, "RC_", "RDMA_READ_RESPONSE_MIDDLE", hasPayload)
	add(RC, ReadResponseLast, "RC_", "RDMA_READ_RESPONSE_LAST", hasAETH|hasPayload|isLast)
	add(RC, ReadResponseOnly, "RC_", "RDMA_READ_RESPONSE_ONLY", hasAETH|hasPayload|isOnly)
	add(RC, Acknowledge, "RC_", "ACKNOWLEDGE", hasAETH|isOnly)
	add(RC, AtomicAcknowledge, "RC_", "ATOMIC_ACKNOWLEDGE", hasAETH|hasAtomicAckETH|isOnly)
	add(RC, CompareSwap, "RC_", "COMPARE_SWAP", hasAtomicETH|isOnly)
	add(RC, FetchAdd, "RC_", "FETCH_ADD", hasAtomicETH|isOnly)
	add(RC, SendLastInv, "RC_", "SEND_LAST_WITH_INVALIDATE", hasIETH|hasPayload|isLast)
	add(RC, SendOnlyInv, "RC_", "SEND_ONLY_WITH_INVALIDATE", hasIETH|hasPayload|isOnly)
	add(RC, Flush, "RC_", "FLUSH", hasFETH|hasRETH|isOnly)
	add(RC, AtomicWrite, "RC_", "ATOMIC_WRITE", hasRETH|hasPayload|isOnly)
	add(UD, SendOnly, "UD_", "SEND_ONLY", hasDETH|hasPayload|isOnly)
	add(UD, SendOnlyImm, "UD_", "SEND_ONLY_WITH_IMMEDIATE", hasDETH|hasImm|hasPayload|isOnly)
	add(Probes, Probe.Op(), "", "PROBE", hasDETH|hasPayload|isOnly)
	add(Probes, ProbeAnswer.Op(), "", "PROBE_ANSWER", hasDETH|hasPayload|isOnly)
	t[CNP] = opcodeInfo{name: "CNP", has: isOnly, headerLen: BTHLen + cnpLen}
	return t
}()
