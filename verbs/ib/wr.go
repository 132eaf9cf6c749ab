package ib

import "fmt"

// SGE is one scatter/gather element: Length bytes at Addr, covered by the region LKey. Get one from mr.MR.SGE
// rather than by hand. For a region registered without ZeroBased, Addr is the virtual address of the bytes.
type SGE struct {
	Addr   uint64
	Length uint32
	LKey   LKey
}

// Opcode is what a send work request does (IBA 10.8.2). Values are enum ib_wr_opcode's.
type Opcode uint8

const (
	OpRDMAWrite        Opcode = 0
	OpRDMAWriteWithImm Opcode = 1
	OpSend             Opcode = 2
	OpSendWithImm      Opcode = 3
	OpRDMARead         Opcode = 4
	OpAtomicCmpSwap    Opcode = 5
	OpAtomicFetchAdd   Opcode = 6
	OpLocalInv         Opcode = 7 // invalidate a local memory window's rkey
	OpBindMW           Opcode = 8 // bind a type 2 memory window
	OpSendWithInv      Opcode = 9
	OpFlush            Opcode = 14 // what was written to the peer's memory before becomes visible, or persistent (IBA A19)
	OpAtomicWrite      Opcode = 15 // write 8 bytes that nobody sees a part of, after all earlier requests (IBA A19)
)

func (o Opcode) String() string {
	switch o {
	case OpRDMAWrite:
		return "RDMA_WRITE"
	case OpRDMAWriteWithImm:
		return "RDMA_WRITE_WITH_IMM"
	case OpSend:
		return "SEND"
	case OpSendWithImm:
		return "SEND_WITH_IMM"
	case OpRDMARead:
		return "RDMA_READ"
	case OpAtomicCmpSwap:
		return "ATOMIC_CMP_AND_SWP"
	case OpAtomicFetchAdd:
		return "ATOMIC_FETCH_AND_ADD"
	case OpLocalInv:
		return "LOCAL_INV"
	case OpBindMW:
		return "BIND_MW"
	case OpSendWithInv:
		return "SEND_WITH_INV"
	case OpFlush:
		return "FLUSH"
	case OpAtomicWrite:
		return "ATOMIC_WRITE"
	}
	return fmt.Sprintf("Opcode(%d)", uint8(o))
}

// SendFlags modify a send work request. Values are enum ib_send_flags'.
type SendFlags uint8

const (
	// SendFence holds the request back until all earlier RDMA READs and atomics of the QP are complete (IBA 10.8.3.3).
	SendFence SendFlags = 1 << 0
	// SendSignaled asks for a completion. Requests without it complete silently unless they fail or are flushed; their queue slot is
	// given back by the next completion of the same send queue.
	SendSignaled SendFlags = 1 << 1
	// SendSolicited raises a solicited event at the receiver (IBA 11.4.2.2).
	SendSolicited SendFlags = 1 << 2
	// SendChecksum has the device fill in the checksums of a frame's IPv4 header, and of TCP or UDP. RawPacket only; needs
	// CapFrameChecksum.
	SendChecksum SendFlags = 1 << 4
)

// AHNum names an address handle within its context; see verbs.AH.
type AHNum uint32

// SendWR is a send work request (IBA 11.4.1.1). The library reads it during PostSend only; the memory that SGEs
// name belongs to the device until the request completes.
type SendWR struct {
	ID     uint64 // returned in WC.ID
	Opcode Opcode
	Flags  SendFlags

	// Imm is the immediate value of the *WithImm opcodes; the peer's WC.Imm has the same value on any architecture.
	Imm uint32
	// InvalidateRKey is the peer's window that OpSendWithInv invalidates, or the local one of OpLocalInv.
	InvalidateRKey RKey

	// SGEs are the local buffers: the source of sends and writes, the destination of reads and of an atomic's old
	// value (8 bytes).
	SGEs []SGE
	// Inline is the payload itself, copied during PostSend, with no registered memory involved. It is used when it is
	// not empty; SGEs must then be empty, the opcode one of SEND*, RDMA_WRITE* or ATOMIC_WRITE, and its length at most the QP's
	// MaxInline.
	//
	// RawPacket alone can have both: Inline is the beginning of the frame then, and what SGEs name follows it.
	Inline []byte

	RemoteAddr uint64 // RDMA, atomics, OpFlush, OpAtomicWrite; the two kinds of atomics need 8-byte alignment
	RKey       RKey   // likewise
	Flush      Flush  // OpFlush only

	CompareAdd uint64 // compare value of OpAtomicCmpSwap, addend of OpAtomicFetchAdd
	Swap       uint64 // new value of OpAtomicCmpSwap

	// UD only: where the datagram goes.
	AH         AHNum
	RemoteQPN  QPN
	RemoteQKey QKey // with the top bit set, the sending QP's own Q_Key is used (IBA 10.2.5)

	Bind *BindMW // OpBindMW only
}

// Flush says what an OpFlush does with the peer's memory that the request's RKey opens (IBA A19.4.1).
type Flush struct {
	Placement FlushPlacement // at least one
	Level     FlushLevel
	Length    uint32 // bytes from RemoteAddr on; FlushRange only
}

// FlushPlacement is a set of what a flush guarantees of data that the QP wrote before, when it completes. Values are enum
// ib_placement_type's.
type FlushPlacement uint8

const (
	FlushGlobal     FlushPlacement = 1 << 0 // whoever looks sees it, CPUs and devices; needs AccessFlushGlobal
	FlushPersistent FlushPlacement = 1 << 1 // it outlives a loss of power; needs AccessFlushPersistent
)

// FlushLevel is how much is flushed. Values are enum ib_selectivity_level's.
type FlushLevel uint8

const (
	FlushRange  FlushLevel = 0 // Length bytes from RemoteAddr on
	FlushRegion FlushLevel = 1 // the whole region; RemoteAddr and Length do not count
)

// BindMW binds a type 2 memory window (IBA 10.6.7.2.3): peers that hold RKey may then do Access on Length bytes at
// Addr of the region, until the window is invalidated. mr.Window fills one.
type BindMW struct {
	Window uint32 // the provider's handle of the window
	// RKey is the key that the window takes: the caller chooses its low 8 bits, the rest must be the window's.
	RKey   RKey
	MRLKey LKey // region, registered with AccessMWBind
	Addr   uint64
	Length uint64
	Access Access
}

// RecvWR is a receive work request: where an incoming message goes. A UD receive starts with a 40-byte GRH area.
type RecvWR struct {
	ID   uint64
	SGEs []SGE
}

// PayloadLen is the number of bytes the request's buffers hold.
func (wr *SendWR) PayloadLen() uint64 {
	if len(wr.Inline) > 0 {
		return uint64(len(wr.Inline))
	}
	return SGELen(wr.SGEs)
}

// SGELen returns the sum of the elements' lengths.
func SGELen(sges []SGE) uint64 {
	var n uint64
	for i := range sges {
		n += uint64(sges[i].Length)
	}
	return n
}
