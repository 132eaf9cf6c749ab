package ib

import (
	"fmt"
	"strings"
	"time"
)

// DeviceAttr is what a device is and can do (IBA 11.2.1.2). Limits are maxima over the whole device.
type DeviceAttr struct {
	Firmware        string
	NodeGUID        GUID
	SysImageGUID    GUID
	VendorID        uint32
	VendorPartID    uint32
	HWVersion       uint32
	Ports           int
	MaxMRSize       uint64 // bytes of one memory region
	PageSizeCap     uint64 // bit n set: pages of 1<<n bytes can be registered
	MaxQP           int
	MaxQPWR         int // outstanding work requests on one queue
	MaxSGE          int
	MaxSGERead      int // SGEs of an RDMA READ
	MaxCQ           int
	MaxCQE          int // entries of one CQ
	MaxMR           int
	MaxPD           int
	MaxQPRdAtomic   int // RDMA READs and atomics in flight to one QP as target
	MaxQPInitRdAtom int // ... from one QP as initiator
	MaxMW           int
	MaxAH           int
	MaxSRQ          int
	MaxSRQWR        int
	MaxSRQSGE       int
	MaxPKeys        int
	MaxInline       int // bytes of inline data that every QP can be given
	MinFrameInline  int // bytes at the beginning of a frame that requests of RawPacket QPs must have inline
	Caps            DeviceCaps

	// How long the events of a CQ can be made to wait: for so many completions, and so long. 0 where they cannot be.
	MaxModerateCount  int
	MaxModeratePeriod time.Duration
}

// DeviceCaps is the set of optional features.
type DeviceCaps uint64

const (
	CapMW2          DeviceCaps = 1 << iota // type 2 memory windows, LOCAL_INV and SEND_WITH_INV
	CapSRQ                                 // shared receive queues
	CapAtomic                              // atomics, atomic among the operations of this device
	CapAtomicGlobal                        // atomics are atomic with the CPU's as well
	CapResizeCQ
	CapUD
	CapUC
	CapODP
	CapDMABuf          // regions of dma-bufs: mr.RegisterDMABuf
	CapRelaxedOrdering // AccessRelaxedOrdering is heeded where the device, and what it is plugged into, can; elsewhere it is ignored
	// CapImm: SEND and RDMA WRITE with immediate data. iWARP has none.
	CapImm
	// CapCMOnly is a restriction: queue pairs are connected by the connection manager only (qp.Listen, qp.QP.Dial), and
	// cannot be taken to RTR by hand. So it is on iWARP, where a connection is a TCP connection. Whoever dials also has to send
	// first, and a completion of a SEND or RDMA WRITE says that it is on its way, not that it has arrived: a later READ or
	// answer says that.
	CapCMOnly
	CapFlush           // FLUSH for global visibility (IBA A19)
	CapFlushPersistent // FLUSH for persistence, of memory that keeps its content
	CapAtomicWrite     // ATOMIC_WRITE (IBA A19)
	CapMWBounds        // memory windows hold peers to their bounds, and to the moment when they are invalidated
	CapRawPacket       // RawPacket queue pairs
	CapFlowSteering    // flow rules, without which RawPacket queue pairs receive nothing
	CapFrameChecksum   // checksums of RawPacket queue pairs: SendChecksum, and WCChecksumOK of what is received
)

var capNames = []string{"mw2", "srq", "atomic", "atomic-global", "resize-cq", "ud", "uc", "odp", "dma-buf", "relaxed-ordering",
	"imm", "cm-only", "flush", "flush-persistent", "atomic-write", "mw-bounds", "raw-packet", "flow-steering", "frame-checksum"}

// Has reports whether every feature of want is there.
func (c DeviceCaps) Has(want DeviceCaps) bool { return c&want == want }

func (c DeviceCaps) String() string {
	var s []string
	for i, n := range capNames {
		if c&(1<<i) != 0 {
			s = append(s, n)
		}
	}
	return strings.Join(s, " ")
}

// PortState is a port's logical state. Values are enum ib_port_state's.
type PortState uint8

const (
	PortDown   PortState = 1
	PortInit   PortState = 2
	PortArmed  PortState = 3
	PortActive PortState = 4
)

func (s PortState) String() string {
	switch s {
	case PortDown:
		return "DOWN"
	case PortInit:
		return "INIT"
	case PortArmed:
		return "ARMED"
	case PortActive:
		return "ACTIVE"
	}
	return fmt.Sprintf("PortState(%d)", uint8(s))
}

// LinkLayer is what a port's packets travel on.
type LinkLayer uint8

const (
	LinkUnspecified LinkLayer = iota
	LinkInfiniBand
	LinkEthernet
	LinkMemory // the software NIC's direct paths
)

func (l LinkLayer) String() string {
	switch l {
	case LinkInfiniBand:
		return "InfiniBand"
	case LinkEthernet:
		return "Ethernet"
	case LinkMemory:
		return "memory"
	}
	return "unspecified"
}

// PortAttr is what a port is (IBA 11.2.1.3). Ports are numbered from 1.
type PortAttr struct {
	State      PortState
	MaxMTU     MTU
	ActiveMTU  MTU
	GIDTable   int // slots of the GID table
	PKeyTable  int
	MaxMessage uint32 // bytes
	LID        LID
	SMLID      LID
	LinkLayer  LinkLayer
}

// AHAttr is the address of a UD destination, or of an RC or UC peer's port (IBA 11.2.2.1).
//
// Over UDP, the software NIC's packets have the HopLimit (0: the system's) and the TrafficClass in their IP headers, without its two lowest
// bits, which are ECN's. The FlowLabel, which chooses a ConnectX's UDP source port, has no effect: a software NIC sends from one port. The
// kernel takes the hop limit of RC and UC queue pairs over Ethernet from the route.
type AHAttr struct {
	DGID         GID
	SGIDIndex    int
	HopLimit     uint8
	TrafficClass uint8
	FlowLabel    uint32
	DLID         LID
	SL           uint8
	Port         uint8
	// UDPPort is where the destination receives RoCEv2 packets, if both are software NICs (verbs.Context.UDPPort of the
	// destination's); these then do what others do not understand. 0: the destination is another device, at the standard port, 4791.
	UDPPort uint16
}

// EventType is an asynchronous event's kind (IBA 11.6.3). Values are enum ib_event_type's.
type EventType uint8

const (
	EventCQErr          EventType = 0 // a CQ overran; its QPs go to the error state
	EventQPFatal        EventType = 1 // a QP could not report an error by completion
	EventQPReqErr       EventType = 2 // invalid request received
	EventQPAccessErr    EventType = 3 // a peer's request broke protection
	EventCommEst        EventType = 4 // first message in RTR
	EventSQDrained      EventType = 5
	EventPathMig        EventType = 6
	EventPathMigErr     EventType = 7
	EventDeviceFatal    EventType = 8
	EventPortActive     EventType = 9
	EventPortErr        EventType = 10
	EventLIDChange      EventType = 11
	EventPKeyChange     EventType = 12
	EventSMChange       EventType = 13
	EventSRQErr         EventType = 14
	EventSRQLimit       EventType = 15 // fewer receives are posted than the armed limit
	EventLastWQEReached EventType = 16 // a QP in error has taken its last receive from the SRQ
	EventClientRereg    EventType = 17
	EventGIDChange      EventType = 18
)

var eventNames = [...]string{"CQ error", "QP fatal", "QP request error", "QP access error", "communication established",
	"SQ drained", "path migrated", "path migration error", "device fatal", "port active", "port error", "LID change",
	"P_Key change", "SM change", "SRQ error", "SRQ limit reached", "last WQE reached", "client reregister", "GID change"}

func (t EventType) String() string {
	if int(t) < len(eventNames) {
		return eventNames[t]
	}
	return fmt.Sprintf("EventType(%d)", uint8(t))
}

// QPAttr holds the attributes of a QP that can be modified or queried (IBA 11.2.5.2). Which of them a transition
// takes or needs depends on the QP's type; see package qp.
type QPAttr struct {
	State           QPState
	CurState        QPState // the state the caller believes the QP is in, for SQE and SQD
	PKeyIndex       uint16
	Port            uint8
	QKey            QKey   // UD
	Access          Access // what peers may do through this QP: remote read, write, atomic
	AH              AHAttr // RC, UC: the peer's address
	PathMTU         MTU
	DestQPN         QPN
	RQPSN           PSN
	SQPSN           PSN
	MaxDestRdAtomic uint8 // as target, RC
	MaxRdAtomic     uint8 // as initiator, RC
	MinRNRTimer     RNRTimer
	AckTimeout      AckTimeout
	RetryCount      uint8 // 0..7
	RNRRetry        uint8 // 0..7; 7 is forever
	SQDNotify       bool  // raise EventSQDrained when drained
}

// QPAttrMask says which attributes of a QPAttr a call sets. Values are enum ib_qp_attr_mask's.
type QPAttrMask uint32

const (
	AttrState           QPAttrMask = 1 << 0
	AttrCurState        QPAttrMask = 1 << 1
	AttrSQDNotify       QPAttrMask = 1 << 2
	AttrAccess          QPAttrMask = 1 << 3
	AttrPKeyIndex       QPAttrMask = 1 << 4
	AttrPort            QPAttrMask = 1 << 5
	AttrQKey            QPAttrMask = 1 << 6
	AttrAV              QPAttrMask = 1 << 7
	AttrPathMTU         QPAttrMask = 1 << 8
	AttrAckTimeout      QPAttrMask = 1 << 9
	AttrRetryCount      QPAttrMask = 1 << 10
	AttrRNRRetry        QPAttrMask = 1 << 11
	AttrRQPSN           QPAttrMask = 1 << 12
	AttrMaxRdAtomic     QPAttrMask = 1 << 13
	AttrMinRNRTimer     QPAttrMask = 1 << 15
	AttrSQPSN           QPAttrMask = 1 << 16
	AttrMaxDestRdAtomic QPAttrMask = 1 << 17
	AttrDestQPN         QPAttrMask = 1 << 20
)

var attrNames = []struct {
	bit  QPAttrMask
	name string
}{
	{AttrState, "State"}, {AttrCurState, "CurState"}, {AttrSQDNotify, "SQDNotify"}, {AttrAccess, "Access"},
	{AttrPKeyIndex, "PKeyIndex"}, {AttrPort, "Port"}, {AttrQKey, "QKey"}, {AttrAV, "AH"}, {AttrPathMTU, "PathMTU"},
	{AttrAckTimeout, "AckTimeout"}, {AttrRetryCount, "RetryCount"}, {AttrRNRRetry, "RNRRetry"}, {AttrRQPSN, "RQPSN"},
	{AttrMaxRdAtomic, "MaxRdAtomic"}, {AttrMinRNRTimer, "MinRNRTimer"}, {AttrSQPSN, "SQPSN"},
	{AttrMaxDestRdAtomic, "MaxDestRdAtomic"}, {AttrDestQPN, "DestQPN"},
}

// String names the attributes as the fields of QPAttr, separated by ", ".
func (m QPAttrMask) String() string {
	var s []string
	for _, n := range attrNames {
		if m&n.bit != 0 {
			s = append(s, n.name)
			m &^= n.bit
		}
	}
	if m != 0 {
		s = append(s, fmt.Sprintf("%#x", uint32(m)))
	}
	return strings.Join(s, ", ")
}

// QPCap is the size of a QP's queues.
type QPCap struct {
	MaxSendWR  int // outstanding send work requests
	MaxRecvWR  int // outstanding receive work requests; 0 with an SRQ
	MaxSendSGE int
	MaxRecvSGE int
	MaxInline  int // bytes of SendWR.Inline
}
