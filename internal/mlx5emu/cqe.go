package mlx5emu

import (
	"encoding/binary"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A cqe is a CQE64, as the device writes it: big endian.
type cqe [64]byte

// Where the fields are.
const (
	cqeRight     = 28 // u8: of a frame, which checksums are right
	cqeHeaders   = 29 // u8: of a frame, what headers it has
	cqeSLID      = 22 // u16: of a datagram
	cqeRemoteQPN = 24 // u32: 24 bits of it, above them SL and GRH
	cqeUserIndex = 32 // u32: 24 bits
	cqeImm       = 36 // u32
	cqeByteCount = 44 // u32
	cqeTime      = 48 // u64; in error CQEs the last two bytes are syndromes
	cqeVendor    = 54 // u8
	cqeSyndrome  = 55 // u8
	cqeQPN       = 56 // u32: opcode of the send WQE, 24 bits of QPN
	cqeCounter   = 60 // u16
	cqeOwner     = 63 // u8: opcode, format, solicited, owner
)

// Opcodes of CQEs.
const (
	cqeRequester     = 0
	cqeRecvWriteImm  = 1
	cqeRecvSend      = 2
	cqeRecvSendImm   = 3
	cqeRecvSendInv   = 4
	cqeResize        = 5
	cqeRequesterErr  = 13
	cqeResponderErr  = 14
	grhPresent       = 1 << 28
	cqeL3Right       = 1 << 1
	cqeL4Right       = 1 << 2
	cqeOwnerBit      = 1
	cqeUserIndexMask = 1<<24 - 1
)

var be = binary.BigEndian

func be32(b []byte) uint32 { return be.Uint32(b) }

func (e *cqe) setOpcode(op byte) { e[cqeOwner] = op << 4 }

func (e *cqe) setOwner(second bool) {
	e[cqeOwner] &^= cqeOwnerBit
	if second {
		e[cqeOwner] |= cqeOwnerBit
	}
}

// The syndromes of failed work requests, with ours for want of a vendor's.
var syndromes = map[ib.WCStatus]byte{
	ib.WCLocalLengthErr: 0x01, ib.WCLocalQPOpErr: 0x02, ib.WCLocalProtErr: 0x04, ib.WCFlushErr: 0x05, ib.WCMWBindErr: 0x06,
	ib.WCBadRespErr: 0x10, ib.WCLocalAccessErr: 0x11, ib.WCRemoteInvalidReqErr: 0x12, ib.WCRemoteAccessErr: 0x13, ib.WCRemoteOpErr: 0x14,
	ib.WCRetryExceeded: 0x15, ib.WCRNRRetryExceeded: 0x16, ib.WCRemoteAbortedErr: 0x22,
}

// syndromeOther is none that drivers know: they say general error.
const syndromeOther = 0x7f

func syndromeOf(st ib.WCStatus) byte {
	if s, ok := syndromes[st]; ok {
		return s
	}
	return syndromeOther
}

// A sendID is the ID that a send request has in the software NIC: what its CQE will need. A recvID likewise.
type sendID uint64

// makeSendID makes that of the WQE at index, which is so many basic blocks long.
func makeSendID(life uint16, op byte, signaled bool, index uint16, bbs int) sendID {
	id := sendID(life)<<48 | sendID(op)<<24 | sendID(uint8(bbs))<<16 | sendID(index)
	if signaled {
		id |= 1 << 32
	}
	return id
}

func (i sendID) life() uint16   { return uint16(i >> 48) }
func (i sendID) opcode() byte   { return byte(i >> 24) }
func (i sendID) index() uint16  { return uint16(i) }
func (i sendID) end() uint16    { return uint16(i) + uint16(uint8(i>>16)) } // the index behind it
func (i sendID) signaled() bool { return i>>32&1 != 0 }

// requester fills the CQE of a send request of the queue pair qpn.
func (e *cqe) requester(wc *ib.WC, qpn uint32) {
	id := sendID(wc.ID)
	be.PutUint32(e[cqeQPN:], uint32(id.opcode())<<24|qpn)
	be.PutUint16(e[cqeCounter:], id.index())
	if wc.Status != ib.WCSuccess {
		e.failed(cqeRequesterErr, wc.Status)
		return
	}
	be.PutUint32(e[cqeByteCount:], wc.ByteLen)
	e.setOpcode(cqeRequester)
}

func (e *cqe) failed(op byte, st ib.WCStatus) {
	e[cqeVendor], e[cqeSyndrome] = byte(st), syndromeOf(st)
	e.setOpcode(op)
}

// responder fills the CQE of a receive.
func (e *cqe) responder(wc *ib.WC, qpn uint32, counter uint16) {
	be.PutUint32(e[cqeQPN:], qpn)
	be.PutUint16(e[cqeCounter:], counter)
	if wc.Status != ib.WCSuccess {
		e.failed(cqeResponderErr, wc.Status)
		return
	}
	be.PutUint32(e[cqeByteCount:], wc.ByteLen)
	remote := uint32(wc.SrcQPN)
	if wc.Flags&ib.WCGRH != 0 {
		remote |= grhPresent
	}
	be.PutUint32(e[cqeRemoteQPN:], remote)
	switch {
	case wc.Opcode == ib.WCRecvRDMAWithImm:
		e.setOpcode(cqeRecvWriteImm)
		be.PutUint32(e[cqeImm:], wc.Imm)
	case wc.Flags&ib.WCWithImm != 0:
		e.setOpcode(cqeRecvSendImm)
		be.PutUint32(e[cqeImm:], wc.Imm)
	case wc.Flags&ib.WCWithInv != 0:
		e.setOpcode(cqeRecvSendInv)
		be.PutUint32(e[cqeImm:], uint32(wc.InvalidatedRKey))
	default:
		e.setOpcode(cqeRecvSend)
	}
}
