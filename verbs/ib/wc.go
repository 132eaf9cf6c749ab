package ib

import "fmt"

// WCStatus is how a work request ended (IBA 11.6.2). Values are enum ib_wc_status'. A WCStatus other than WCSuccess
// is an error that errors.Is can look for.
type WCStatus uint8

const (
	WCSuccess               WCStatus = 0
	WCLocalLengthErr        WCStatus = 1  // a message longer than the receive buffer, or than the device can do
	WCLocalQPOpErr          WCStatus = 2  // an inconsistent work request
	WCLocalEECOpErr         WCStatus = 3  // (RD only)
	WCLocalProtErr          WCStatus = 4  // an SGE's lkey, range or rights do not fit
	WCFlushErr              WCStatus = 5  // the QP went to the error state before the request was done
	WCMWBindErr             WCStatus = 6  // a window could not be bound
	WCBadRespErr            WCStatus = 7  // the responder sent something unexpected
	WCLocalAccessErr        WCStatus = 8  // protection error on the responder's local buffer of a WRITE_WITH_IMM
	WCRemoteInvalidReqErr   WCStatus = 9  // the responder refused the message: too long, operation not enabled
	WCRemoteAccessErr       WCStatus = 10 // rkey, range or rights do not fit on the responder
	WCRemoteOpErr           WCStatus = 11 // the responder failed locally
	WCRetryExceeded         WCStatus = 12 // the peer does not answer
	WCRNRRetryExceeded      WCStatus = 13 // the peer has no receive posted
	WCLocalRDDViolErr       WCStatus = 14 // (RD only)
	WCRemoteInvalidRDReqErr WCStatus = 15 // (RD only)
	WCRemoteAbortedErr      WCStatus = 16
	WCInvalidEECNErr        WCStatus = 17 // (RD only)
	WCInvalidEECStateErr    WCStatus = 18 // (RD only)
	WCFatalErr              WCStatus = 19 // the device failed
	WCResponseTimeoutErr    WCStatus = 20
	WCGeneralErr            WCStatus = 21 // anything else; see WC.VendorErr
	wcStatusCount                    = 22
)

var wcStatusText = [wcStatusCount]string{
	"success", "local length error", "local QP operation error", "local EE context operation error",
	"local protection error", "work request flushed: the QP is in the error state", "memory window bind error",
	"bad response", "local access error", "remote invalid request", "remote access error: wrong rkey, range or rights",
	"remote operation error", "transport retry counter exceeded: the peer does not answer",
	"RNR retry counter exceeded: the peer has no receive posted", "local RDD violation", "remote invalid RD request",
	"operation aborted", "invalid EE context number", "invalid EE context state", "fatal device error",
	"response timeout", "general error",
}

// Error describes the status; it also names WCSuccess, which is no error.
func (s WCStatus) Error() string {
	if int(s) < len(wcStatusText) {
		return wcStatusText[s]
	}
	return fmt.Sprintf("unknown completion status %d", uint8(s))
}

func (s WCStatus) String() string { return s.Error() }

// WCOpcode says what completed. Values are enum ib_wc_opcode's as libibverbs has them; receives have bit 7 set.
type WCOpcode uint8

const (
	WCSend            WCOpcode = 0
	WCRDMAWrite       WCOpcode = 1
	WCRDMARead        WCOpcode = 2
	WCCompSwap        WCOpcode = 3
	WCFetchAdd        WCOpcode = 4
	WCBindMW          WCOpcode = 5
	WCLocalInv        WCOpcode = 6
	WCFlush           WCOpcode = 8
	WCAtomicWrite     WCOpcode = 9
	WCRecv            WCOpcode = 128
	WCRecvRDMAWithImm WCOpcode = 129
	wcRecvBit         WCOpcode = 128
)

// IsRecv reports whether a receive work request completed.
func (o WCOpcode) IsRecv() bool { return o&wcRecvBit != 0 }

func (o WCOpcode) String() string {
	switch o {
	case WCSend:
		return "SEND"
	case WCRDMAWrite:
		return "RDMA_WRITE"
	case WCRDMARead:
		return "RDMA_READ"
	case WCCompSwap:
		return "COMP_SWAP"
	case WCFetchAdd:
		return "FETCH_ADD"
	case WCBindMW:
		return "BIND_MW"
	case WCLocalInv:
		return "LOCAL_INV"
	case WCFlush:
		return "FLUSH"
	case WCAtomicWrite:
		return "ATOMIC_WRITE"
	case WCRecv:
		return "RECV"
	case WCRecvRDMAWithImm:
		return "RECV_RDMA_WITH_IMM"
	}
	return fmt.Sprintf("WCOpcode(%d)", uint8(o))
}

// WCOpcodeOf returns the completion opcode of a send work request's opcode.
func WCOpcodeOf(o Opcode) WCOpcode {
	switch o {
	case OpRDMAWrite, OpRDMAWriteWithImm:
		return WCRDMAWrite
	case OpRDMARead:
		return WCRDMARead
	case OpAtomicCmpSwap:
		return WCCompSwap
	case OpAtomicFetchAdd:
		return WCFetchAdd
	case OpBindMW:
		return WCBindMW
	case OpLocalInv:
		return WCLocalInv
	case OpFlush:
		return WCFlush
	case OpAtomicWrite:
		return WCAtomicWrite
	}
	return WCSend
}

// WCFlags say which optional fields of a completion are set. Values are enum ib_wc_flags'.
type WCFlags uint8

const (
	WCGRH     WCFlags = 1 << 0 // the receive buffer starts with a valid 40-byte GRH
	WCWithImm WCFlags = 1 << 1 // Imm is valid
	// WCChecksumOK: a frame came in that is IPv4, and its header's checksum, and that of TCP or UDP, are right. Without it they may
	// be wrong, or not known. RawPacket only.
	WCChecksumOK WCFlags = 1 << 2
	WCWithInv    WCFlags = 1 << 3 // InvalidatedRKey is valid
)

// WC is a work completion (IBA 11.4.2.1). If Status is not WCSuccess, only ID, Status, QPN and VendorErr are valid.
type WC struct {
	ID              uint64
	Status          WCStatus
	Opcode          WCOpcode
	Flags           WCFlags
	SL              uint8
	PKeyIndex       uint16
	SLID            LID
	ByteLen         uint32 // bytes received, the 40-byte GRH included on UD; bytes read for RDMA READ and atomics
	Imm             uint32 // valid if Flags has WCWithImm
	InvalidatedRKey RKey   // valid if Flags has WCWithInv
	QPN             QPN    // the local QP
	SrcQPN          QPN    // the sending QP; UD receives only
	VendorErr       uint32 // the device's own error code, for a report to its vendor
}
