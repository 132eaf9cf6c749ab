package softnic

// Shared memory layouts. All words are host-endian (both sides are on one host) and naturally aligned. "owner" is the side
// that allocated the chunk (the receiver), "peer" the one that sends. Every field has one writer unless it says otherwise.

const (
	cacheLine = 64

	// A block is the receiving half of a connected QP. Offsets in bytes.
	blkState  = 0   // u32, owner, release: qpClosed, qpReady; the peer loads it (acquire) with busy raised
	blkAccess = 4   // u32, owner: the QP's remote access rights (ib.Access), and noResources
	blkQKey   = 8   // u32, owner, atomic: the Q_Key of a UD QP; the peer loads it with busy raised
	blkRNR    = 12  // u32, owner, atomic: the QP's MinRNRTimer, for a peer that found no receive
	blkTail   = 64  // u32, owner, release: receives posted so far; descriptors below it are visible
	blkHead   = 68  // u32, owner, release: completions consumed so far; read by the peer only in SRQ and UD mode
	blkBusy   = 128 // u32, peer, release: 1 while the peer executes an operation on this QP (hazard)
	blkRings  = 256 // descriptors, completions, scatter lists; see geometry

	// Values of blkState. A block is zeroed when it is handed out.
	qpClosed uint32 = 0 // drop what arrives: the QP is not receiving
	qpReady  uint32 = 1 // RTR, RTS, SQD or SQE

	// noResources in blkAccess: the QP has no responder resources (MaxDestRdAtomic is 0), so that nothing which has an answer of its own is
	// for it.
	noResources uint32 = 1 << 31

	// A receive descriptor is 16 bytes, owner-written, published by blkTail:
	//	u64 address, u32 length, u32 region handle
	// With handle == sgeList, the address is a count of elements in the slot's scatter list and length their sum.
	descWords           = 2
	descsPerLine        = cacheLine / (descWords * 8)
	sgeList      uint32 = 1<<32 - 1

	// A completion is 16 bytes (32 in SRQ and UD mode), peer-written; the release store of the first word publishes it:
	//	u32 sequence (index + 1), u32 byte length
	//	u32 immediate or invalidated rkey, u8 opcode, u8 flags, u8 status, u8 0
	//	u32 SRQ slot, u32 source QPN                         (SRQ and UD mode)
	//	u64 0
	cqeWordsRQ  = 2
	cqeWordsSRQ = 4

	// A port is how a CQ of the owner hears from the peer. Offsets in bytes.
	portMode    = 0   // u32, owner, release: portScan or portBits
	portArmed   = 64  // u32, owner sets (armAny, armSolicited), peer and owner clear by CAS
	portSummary = 128 // u64, both, by atomic OR and swap: bit w set: word w of the bitmap may be non-zero
	portBitmap  = 192 // u64[portWords], both, by atomic OR and swap: QPs with new completions
	portWords   = 64
	portQPs     = portWords * 64
	portSize    = portBitmap + portWords*8

	portScan uint32 = 0 // the owner looks at every QP's ring: no bit needs to be set
	portBits uint32 = 1 // set the QP's bit after publishing

	armNone      uint32 = 0
	armAny       uint32 = 1
	armSolicited uint32 = 2

	// A shared receive queue is a ring of entries that peers claim. Offsets in bytes.
	srqHead    = 0   // u64, peers and owner, CAS upwards: the next entry to claim
	srqEntries = 128 // entries of srqWords words, then scatter lists
	srqWords   = 4
	srqClaim   = 0         // u64: the entry's sequence number in the upper 32 bits, claimer's tag in the lower; see srq.go
	srqAddr    = 1         // u64 address, as in a descriptor
	srqLenHdl  = 2         // u32 length, u32 region handle
	srqFree    = 0         // claim tag: nobody has it
	srqSkip    = 1<<32 - 1 // claim tag: not a receive, step over it

	// Completion flag bits in shared completions.
	cqeImm       uint8 = 1 << 0
	cqeInv       uint8 = 1 << 1
	cqeSolicited uint8 = 1 << 2
	cqeRDMA      uint8 = 1 << 3 // a WRITE_WITH_IMM consumed the receive
)

// geometry is where the parts of a block lie; both sides compute it from the same numbers.
type geometry struct {
	depth    uint32 // receives and completions, a power of two
	cqeWords uint32
	sges     uint32 // elements of a receive
	srq      bool   // no descriptors: receives come from a shared receive queue
}

func (g geometry) descOff() uint32 { return blkRings }

func (g geometry) cqeOff() uint32 {
	if g.srq {
		return blkRings
	}
	return blkRings + g.depth*descWords*8
}

func (g geometry) sgeOff() uint32 { return g.cqeOff() + g.depth*g.cqeWords*8 }

func (g geometry) size() uint32 {
	n := g.sgeOff()
	if !g.srq && g.sges > 1 {
		n += g.depth * g.sges * 16
	}
	return (n + cacheLine - 1) &^ (cacheLine - 1)
}

// valid reports whether a geometry that a peer announced is one that size cannot overflow with.
func (g geometry) valid() bool {
	return g.depth > 0 && g.depth <= maxDepth && g.depth&(g.depth-1) == 0 && g.sges >= 1 && g.sges <= maxSGE &&
		(g.cqeWords == cqeWordsRQ && !g.srq || g.cqeWords == cqeWordsSRQ && g.srq)
}

// srqSize is the size of a shared receive queue's memory.
func srqSize(ring, sges uint32) uint32 {
	n := uint32(srqEntries) + ring*srqWords*8
	if sges > 1 {
		n += ring * sges * 16
	}
	return (n + cacheLine - 1) &^ (cacheLine - 1)
}

// Limits of the software NIC.
const (
	maxDepth    = 1 << 15
	maxSRQDepth = 1 << 17
	maxSGE      = 32
	maxInline   = 1024
	maxCQE      = 1 << 22
	maxMRs      = 1 << 16
	maxPaths    = 128 // max_rd_atomic
	maxUDMTU    = 4096
	udRingSize  = 512 // completions that one peer NIC may have outstanding at a UD QP
	srqRingMax  = 256 // completions that one QP may have outstanding when it uses an SRQ
)
