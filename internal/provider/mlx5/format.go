//go:build linux && (amd64 || arm64)

package mlx5

import "github.com/ringside-rdma/ringside/verbs/ib"

// The formats of the device's queues, which no header of the kernel for user space has. Numbers are big-endian in memory; offsets
// are in bytes.

const (
	blockBytes = 64 // send elements begin on blocks of that size, and are counted in them
	unitBytes  = 16 // the size of an element is told in units, of which it has at most maxUnits
	maxUnits   = 63
	cqeBytes   = 64

	ctrlBytes  = 16
	raddrBytes = 16
	avBytes    = 48
	dataBytes  = 16
	umrBytes   = 48 // what a UMR changes
	mkeyBytes  = 64 // to what
	klmBytes   = 64 // one indirect memory key, and zeros

	ethBytes     = 16 // and, of an inline header, what does not fit
	ethHead      = 14 // where the header begins
	frameInline  = 18 // an Ethernet header with a VLAN tag
	shortestSend = 14 // bytes that a frame has at least

	inlineHead = 4 // the length of the data that follow

	bindBytes = ctrlBytes + umrBytes + mkeyBytes + klmBytes

	inlineSegment = 1 << 31 // in the length of a data segment: the data follow
	maxSGELen     = 1<<31 - 1
	endOfList     = 0x100 // the lkey of a data segment behind the last
)

// Opcodes of send elements.
const (
	codeSendInv  = 0x01
	codeWrite    = 0x08
	codeWriteImm = 0x09
	codeSend     = 0x0a
	codeSendImm  = 0x0b
	codeRead     = 0x10
	codeCmpSwap  = 0x11
	codeFetchAdd = 0x12
	codeUMR      = 0x25
)

// Flags of a send element's control segment.
const (
	ctrlSolicited  = 0x02
	ctrlCompletion = 0x08
	ctrlSmallFence = 0x20 // after what changed a memory key here
	ctrlFence      = 0x80 // after READs and atomics, too
)

// ctrlFlags are those of ib.SendFlags, by number.
var ctrlFlags = [8]uint32{
	0, ctrlFence, ctrlCompletion, ctrlFence | ctrlCompletion,
	ctrlSolicited, ctrlSolicited | ctrlFence, ctrlSolicited | ctrlCompletion, ctrlSolicited | ctrlFence | ctrlCompletion,
}

// A shape is what a send element has between its control segment and its data.
type shape uint8

const (
	noShape       shape = iota // there is no such operation
	frameShape                 // what to do with an Ethernet frame, and its beginning; see writeFrame
	plainShape                 // nothing
	remoteShape                // where in the peer's memory
	atomicShape                // that, and the operands
	datagramShape              // where on the network
	bindShape                  // a UMR, and no data
	invalShape                 // likewise
)

// An operation is how one opcode is done by a type of queue pair.
type operation struct {
	code   uint8 // the device's opcode
	shape  shape
	wc     ib.WCOpcode
	inline bool
	imm    immKind
}

// An immKind is what is in the last field of a control segment.
type immKind uint8

const (
	noImm immKind = iota
	immData
	immKey
)

type operations [16]operation // by ib.Opcode

var (
	rcOperations = operations{
		ib.OpRDMAWrite:        {codeWrite, remoteShape, ib.WCRDMAWrite, true, noImm},
		ib.OpRDMAWriteWithImm: {codeWriteImm, remoteShape, ib.WCRDMAWrite, true, immData},
		ib.OpSend:             {codeSend, plainShape, ib.WCSend, true, noImm},
		ib.OpSendWithImm:      {codeSendImm, plainShape, ib.WCSend, true, immData},
		ib.OpSendWithInv:      {codeSendInv, plainShape, ib.WCSend, true, immKey},
		ib.OpRDMARead:         {codeRead, remoteShape, ib.WCRDMARead, false, noImm},
		ib.OpAtomicCmpSwap:    {codeCmpSwap, atomicShape, ib.WCCompSwap, false, noImm},
		ib.OpAtomicFetchAdd:   {codeFetchAdd, atomicShape, ib.WCFetchAdd, false, noImm},
		ib.OpBindMW:           {codeUMR, bindShape, ib.WCBindMW, false, noImm},
		ib.OpLocalInv:         {codeUMR, invalShape, ib.WCLocalInv, false, immKey},
	}
	ucOperations = operations{
		ib.OpRDMAWrite:        rcOperations[ib.OpRDMAWrite],
		ib.OpRDMAWriteWithImm: rcOperations[ib.OpRDMAWriteWithImm],
		ib.OpSend:             rcOperations[ib.OpSend],
		ib.OpSendWithImm:      rcOperations[ib.OpSendWithImm],
		ib.OpBindMW:           rcOperations[ib.OpBindMW],
		ib.OpLocalInv:         rcOperations[ib.OpLocalInv],
	}
	udOperations = operations{
		ib.OpSend:        {codeSend, datagramShape, ib.WCSend, true, noImm},
		ib.OpSendWithImm: {codeSendImm, datagramShape, ib.WCSend, true, immData},
	}
	rawOperations = operations{
		ib.OpSend: {codeSend, frameShape, ib.WCSend, true, noImm},
	}
)

// operationsOf returns those of a type of queue pair, or nil.
func operationsOf(t ib.QPType) *operations {
	switch t {
	case ib.RC:
		return &rcOperations
	case ib.UC:
		return &ucOperations
	case ib.UD:
		return &udOperations
	case ib.RawPacket:
		return &rawOperations
	}
	return nil
}

// Opcodes of completions.
const (
	cqeRequest     = 0
	cqeRecvWrite   = 1 // RDMA WRITE with immediate
	cqeRecv        = 2
	cqeRecvImm     = 3
	cqeRecvInv     = 4
	cqeResize      = 5 // the last one in a queue's old memory
	cqeRequestErr  = 13
	cqeRecvErr     = 14
	cqeNever       = 15 // not written yet
	cqeFormatBits  = 0x0c
	cqeOwner       = 1
	cqeFresh       = cqeNever << 4
	noUserIndex    = 0xffffff // of queue pairs whose completions are told by number
	number24       = 0xffffff
	maxQueueBlocks = 1 << 15 // so that 16 bits of a counter tell old elements from new ones
)

// statuses are what error completions say, by syndrome; 0 stands for none of these.
var statuses = [0x23]ib.WCStatus{
	0x01: ib.WCLocalLengthErr, 0x02: ib.WCLocalQPOpErr, 0x04: ib.WCLocalProtErr, 0x05: ib.WCFlushErr, 0x06: ib.WCMWBindErr,
	0x10: ib.WCBadRespErr, 0x11: ib.WCLocalAccessErr, 0x12: ib.WCRemoteInvalidReqErr, 0x13: ib.WCRemoteAccessErr,
	0x14: ib.WCRemoteOpErr, 0x15: ib.WCRetryExceeded, 0x16: ib.WCRNRRetryExceeded, 0x22: ib.WCRemoteAbortedErr,
}

// statusOf is how a request ended, and what to tell its device's vendor. A syndrome that is not known is a general error; it is
// in bits 8 to 15 of the vendor's code then.
func statusOf(syndrome, vendor uint8) (ib.WCStatus, uint32) {
	if int(syndrome) < len(statuses) && statuses[syndrome] != 0 {
		return statuses[syndrome], uint32(vendor)
	}
	return ib.WCGeneralErr, uint32(syndrome)<<8 | uint32(vendor)
}

// A size is how much memory a queue takes.
type size struct {
	blocks   uint32 // of a send queue; a power of two, or 0
	requests uint32 // that fit whatever they are
	inline   int    // bytes that fit

	slots uint32 // of a receive queue; a power of two, or 0
	shift uint8  // a slot has 1<<shift bytes

	apart int // the send queue begins at a multiple of so many bytes
}

func (s *size) recvBytes() int { return int(s.slots) << s.shift }
func (s *size) sendBytes() int { return int(s.blocks) * blockBytes }

// sendAt is where the send queue begins: behind the receive queue.
func (s *size) sendAt() int { return (s.recvBytes() + s.apart - 1) / s.apart * s.apart }
