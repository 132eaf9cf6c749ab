package rdmacm

import (
	"fmt"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// PortSpace is a namespace of ports, and with it the kind of queue pair.
type PortSpace uint16

const (
	TCP PortSpace = abi.RDMA_PS_TCP // reliable connections
	UDP PortSpace = abi.RDMA_PS_UDP // datagrams: a connection only tells one side the other's QP
)

func (p PortSpace) String() string {
	switch p {
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	}
	return fmt.Sprintf("PortSpace(%#x)", uint16(p))
}

// UDPQKey is the Q_Key of queue pairs of the port space UDP, unless the two sides agree on another (RDMA_UDP_QKEY of
// include/rdma/rdma_cm.h).
const UDPQKey ib.QKey = 0x01234567

// EventType is what happened to an ID. Values are enum rdma_cm_event_type's (include/rdma/rdma_cm.h, which is no uapi header).
type EventType uint32

const (
	EventAddrResolved EventType = iota
	EventAddrError
	EventRouteResolved
	EventRouteError
	EventConnectRequest
	EventConnectResponse
	EventConnectError
	EventUnreachable
	EventRejected
	EventEstablished
	EventDisconnected
	EventDeviceRemoval
	EventMulticastJoin
	EventMulticastError
	EventAddrChange
	EventTimewaitExit
)

var eventNames = [...]string{"address resolved", "address error", "route resolved", "route error", "connect request",
	"connect response", "connect error", "unreachable", "rejected", "established", "disconnected", "device removal",
	"multicast join", "multicast error", "address change", "timewait exit"}

func (t EventType) String() string {
	if uint64(t) < uint64(len(eventNames)) {
		return eventNames[t]
	}
	return fmt.Sprintf("EventType(%d)", uint32(t))
}

// Reason is why a connection was rejected on InfiniBand or RoCE (IBA 12.6.7.2; enum ib_cm_rej_reason of
// include/rdma/ib_cm.h).
type Reason uint16

// The reasons that mean something to a caller. The others only have names.
const (
	ReasonTimeout          Reason = 4
	ReasonInvalidServiceID Reason = 8  // nobody listens on the port
	ReasonStaleConnection  Reason = 10 // the QP's number is still in timewait: use a fresh QP
	ReasonInvalidGID       Reason = 12 // the addresses do not fit the packet, or the listener's device
	ReasonConsumer         Reason = 28 // the program on the other side said no
)

var reasonNames = map[Reason]string{
	1: "no QP", 2: "no EE context", 3: "no resources", 4: "timeout", 5: "unsupported request", 6: "invalid communication ID",
	7: "invalid communication instance", 8: "invalid service ID", 9: "invalid transport type", 10: "stale connection",
	11: "RDC does not exist", 12: "invalid GID", 13: "invalid LID", 14: "invalid SL", 15: "invalid traffic class",
	16: "invalid hop limit", 17: "invalid packet rate", 18: "invalid alternate GID", 19: "invalid alternate LID",
	20: "invalid alternate SL", 21: "invalid alternate traffic class", 22: "invalid alternate hop limit",
	23: "invalid alternate packet rate", 24: "port and CM redirection", 25: "port redirection", 26: "invalid path MTU",
	27: "insufficient responder resources", 28: "consumer defined", 29: "invalid RNR retry count",
	30: "duplicate local communication ID", 31: "invalid class version", 32: "invalid flow label",
	33: "invalid alternate flow label", 35: "vendor option not supported",
}

func (r Reason) String() string {
	if s, ok := reasonNames[r]; ok {
		return s
	}
	return fmt.Sprintf("Reason(%d)", uint16(r))
}

// SIDRStatus is the answer to a request of the port space UDP (IBA 12.11.2; enum ib_cm_sidr_status of
// include/rdma/ib_cm.h).
type SIDRStatus uint8

const (
	SIDRUnsupported SIDRStatus = 1 // nobody listens on the port
	SIDRRejected    SIDRStatus = 2 // the program on the other side said no
)

var sidrNames = [...]string{"success", "service ID not supported", "rejected by service provider", "no QP", "redirect",
	"version not supported"}

func (s SIDRStatus) String() string {
	if int(s) < len(sidrNames) {
		return sidrNames[s]
	}
	return fmt.Sprintf("SIDRStatus(%d)", uint8(s))
}

// Private data, in bytes, that the messages of InfiniBand and RoCE carry (IBA 12.6 and 12.11, and the 36 bytes that
// the IP addressing takes from a request: annex A11).
const (
	MaxConnectData    = 56
	MaxAcceptData     = 196
	MaxRejectData     = 148
	MaxUDPConnectData = 180
	MaxUDPAcceptData  = 136
	MaxUDPRejectData  = 136
	// MaxPrivateData is the most that the kernel can be given: iWARP takes as much, in every message.
	MaxPrivateData = 255
)
