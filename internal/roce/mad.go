package roce

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The connection manager's datagrams are SENDs from QP 1 to QP 1 of MADLen bytes with the Q_Key of management (IBA 12, 13.4).
const (
	MADLen  = 256
	GSIQP   = 1
	GSIQKey = 0x80010000

	madHeaderLen = 24

	madVersion = 1
	classCM    = 0x07
	cmVersion  = 2
	methodSend = 0x03
)

// A CMAttr says which message of the connection manager a datagram is (IBA 12.6, table 99).
type CMAttr uint16

const (
	CMREQ     CMAttr = 0x10 // request for communication
	CMMRA     CMAttr = 0x11 // message receipt acknowledgement: the answer takes longer
	CMREJ     CMAttr = 0x12 // reject
	CMREP     CMAttr = 0x13 // reply to a request
	CMRTU     CMAttr = 0x14 // ready to use
	CMDREQ    CMAttr = 0x15 // request for disconnection
	CMDREP    CMAttr = 0x16 // reply to that
	CMSIDRREQ CMAttr = 0x17 // service ID resolution request: who answers datagrams there?
	CMSIDRREP CMAttr = 0x18
)

var cmNames = map[CMAttr]string{CMREQ: "REQ", CMMRA: "MRA", CMREJ: "REJ", CMREP: "REP", CMRTU: "RTU", CMDREQ: "DREQ",
	CMDREP: "DREP", CMSIDRREQ: "SIDR_REQ", CMSIDRREP: "SIDR_REP"}

func (a CMAttr) String() string {
	if s, ok := cmNames[a]; ok {
		return s
	}
	return fmt.Sprintf("CM attribute %#x", uint16(a))
}

// A CMMessage is one of the structs below.
type CMMessage interface {
	Attr() CMAttr
	// put writes the message to b, which is zero, and has MADLen-madHeaderLen bytes.
	put(b []byte)
	// get reads the message from b, of MADLen-madHeaderLen bytes.
	get(b []byte)
}

// PutMAD writes a datagram of MADLen bytes to b. All messages of one exchange have the transaction ID of its first. Private
// data that a message has no room for is cut off.
func PutMAD(b []byte, tid uint64, m CMMessage) {
	b = b[:MADLen]
	clear(b)
	b[0] = madVersion
	b[1] = classCM
	b[2] = cmVersion
	b[3] = methodSend
	binary.BigEndian.PutUint64(b[8:], tid)
	binary.BigEndian.PutUint16(b[16:], uint16(m.Attr()))
	m.put(b[madHeaderLen:])
	if o := vendorOptions(m); o != nil {
		binary.BigEndian.PutUint32(b[20:], *o)
	}
}

// vendorOptions is what stands in the header's attribute modifier of a REQ and a REP; nil: nothing does.
func vendorOptions(m CMMessage) *uint32 {
	switch m := m.(type) {
	case *REQ:
		return &m.VendorOptions
	case *REP:
		return &m.VendorOptions
	}
	return nil
}

// A MADError is why a management datagram is not a message of the connection manager. Like a Drop, it costs no memory.
type MADError uint8

const (
	MADLength  MADError = iota + 1 // other than MADLen
	MADClass                       // of another class, version or method
	MADUnknown                     // a message that is not known
)

func (e MADError) Error() string {
	switch e {
	case MADLength:
		return "roce: management datagram of a wrong length"
	case MADClass:
		return "roce: management datagram that is not the connection manager's"
	}
	return "roce: message of the connection manager that is not known"
}

// DecodeMAD takes a datagram apart. Private data has its full length always: the message does not say how much was meant. The error
// is a MADError.
func DecodeMAD(b []byte) (tid uint64, m CMMessage, err error) {
	if len(b) != MADLen {
		return 0, nil, MADLength
	}
	if b[0] != madVersion || b[1] != classCM || b[2] != cmVersion || b[3] != methodSend {
		return 0, nil, MADClass
	}
	tid = binary.BigEndian.Uint64(b[8:])
	switch CMAttr(binary.BigEndian.Uint16(b[16:])) {
	case CMREQ:
		m = new(REQ)
	case CMMRA:
		m = new(MRA)
	case CMREJ:
		m = new(REJ)
	case CMREP:
		m = new(REP)
	case CMRTU:
		m = new(RTU)
	case CMDREQ:
		m = new(DREQ)
	case CMDREP:
		m = new(DREP)
	case CMSIDRREQ:
		m = new(SIDRREQ)
	case CMSIDRREP:
		m = new(SIDRREP)
	default:
		return tid, nil, MADUnknown
	}
	m.get(b[madHeaderLen:])
	if o := vendorOptions(m); o != nil {
		*o = binary.BigEndian.Uint32(b[20:])
	}
	return tid, m, nil
}

// A REQ asks for a connection (IBA 12.6.5). Only reliable and unreliable connections on one path, without an end-to-end
// context, are spoken.
type REQ struct {
	LocalID uint32 // the sender's name of the connection
	// VendorID (24 bits) and VendorOptions are the enhanced connection establishment: what the sender's vendor calls by these bits
	// is offered, and taken by a REP with the same VendorID and some of the bits. Who does not know the vendor answers 0.
	VendorID, VendorOptions uint32
	ServiceID               uint64
	CAGUID                  uint64 // the sender's node
	QKey                    uint32
	QPN                     uint32 // 24 bits: the sender's queue pair
	// ResponderResources is how many READs and atomics the sender takes at once, InitiatorDepth how many it would like to
	// send. The receiver's are the other way round.
	ResponderResources, InitiatorDepth uint8
	RemoteResponseTimeout              uint8  // 5 bits, 4.096 us x 2^n: how soon the sender wants the reply
	LocalResponseTimeout               uint8  // 5 bits: how soon the sender replies itself
	Transport                          uint8  // 2 bits: 0 RC, 1 UC
	FlowControl                        bool   // end to end, IBA 9.7.7.2
	StartingPSN                        ib.PSN // what the receiver of this message is to start with
	RetryCount, RNRRetryCount          uint8  // 3 bits each: for the receiver's requests
	PKey                               uint16
	MTU                                ib.MTU // of the path
	SRQ                                bool
	MaxCMRetries                       uint8  // 4 bits
	LocalLID, RemoteLID                uint16 // RoCE has none
	LocalGID, RemoteGID                ib.GID
	FlowLabel                          uint32 // 20 bits
	PacketRate                         uint8  // 6 bits
	TrafficClass, HopLimit, SL         uint8  // SL: 4 bits
	SubnetLocal                        bool
	LocalAckTimeout                    uint8 // 5 bits: for the receiver's requests
	Private                            [92]byte
}

// Transports of a REQ.
const (
	TransportRC = 0
	TransportUC = 1
)

func (*REQ) Attr() CMAttr { return CMREQ }

func (m *REQ) put(b []byte) {
	be := binary.BigEndian
	be.PutUint32(b, m.LocalID)
	be.PutUint32(b[4:], m.VendorID&mask24)
	be.PutUint64(b[8:], m.ServiceID)
	be.PutUint64(b[16:], m.CAGUID)
	be.PutUint32(b[28:], m.QKey)
	put24(b[32:], m.QPN, m.ResponderResources)
	b[39] = m.InitiatorDepth
	b[43] = m.RemoteResponseTimeout<<3 | m.Transport&3<<1 | bit(m.FlowControl, 0)
	put24(b[44:], uint32(m.StartingPSN), m.LocalResponseTimeout<<3|m.RetryCount&7)
	be.PutUint16(b[48:], m.PKey)
	b[50] = uint8(m.MTU)<<4 | m.RNRRetryCount&7
	b[51] = m.MaxCMRetries<<4 | bit(m.SRQ, 3)
	be.PutUint16(b[52:], m.LocalLID)
	be.PutUint16(b[54:], m.RemoteLID)
	copy(b[56:], m.LocalGID[:])
	copy(b[72:], m.RemoteGID[:])
	be.PutUint32(b[88:], m.FlowLabel<<12|uint32(m.PacketRate&0x3f))
	b[92] = m.TrafficClass
	b[93] = m.HopLimit
	b[94] = m.SL<<4 | bit(m.SubnetLocal, 3)
	b[95] = m.LocalAckTimeout << 3
	copy(b[140:], m.Private[:])
}

func (m *REQ) get(b []byte) {
	be := binary.BigEndian
	m.LocalID = be.Uint32(b)
	m.VendorID = be.Uint32(b[4:]) & mask24
	m.ServiceID = be.Uint64(b[8:])
	m.CAGUID = be.Uint64(b[16:])
	m.QKey = be.Uint32(b[28:])
	m.QPN, m.ResponderResources = get24(b[32:])
	m.InitiatorDepth = b[39]
	m.RemoteResponseTimeout = b[43] >> 3
	m.Transport = b[43] >> 1 & 3
	m.FlowControl = b[43]&1 != 0
	psn, low := get24(b[44:])
	m.StartingPSN = ib.PSN(psn)
	m.LocalResponseTimeout = low >> 3
	m.RetryCount = low & 7
	m.PKey = be.Uint16(b[48:])
	m.MTU = ib.MTU(b[50] >> 4)
	m.RNRRetryCount = b[50] & 7
	m.MaxCMRetries = b[51] >> 4
	m.SRQ = b[51]&(1<<3) != 0
	m.LocalLID = be.Uint16(b[52:])
	m.RemoteLID = be.Uint16(b[54:])
	copy(m.LocalGID[:], b[56:])
	copy(m.RemoteGID[:], b[72:])
	flow := be.Uint32(b[88:])
	m.FlowLabel = flow >> 12
	m.PacketRate = uint8(flow & 0x3f)
	m.TrafficClass = b[92]
	m.HopLimit = b[93]
	m.SL = b[94] >> 4
	m.SubnetLocal = b[94]&(1<<3) != 0
	m.LocalAckTimeout = b[95] >> 3
	copy(m.Private[:], b[140:])
}

// A REP accepts a REQ (IBA 12.6.8). Names and numbers are the sender's, as in REQ.
type REP struct {
	LocalID, RemoteID                  uint32 // the sender's and the receiver's name of the connection
	VendorID, VendorOptions            uint32 // as in REQ
	QKey                               uint32
	QPN                                uint32 // 24 bits
	StartingPSN                        ib.PSN // what the receiver of this message is to start with
	ResponderResources, InitiatorDepth uint8
	TargetAckDelay                     uint8 // 5 bits
	FailoverAccepted                   uint8 // 2 bits
	FlowControl                        bool
	RNRRetryCount                      uint8 // 3 bits
	SRQ                                bool
	CAGUID                             uint64
	Private                            [196]byte
}

func (*REP) Attr() CMAttr { return CMREP }

func (m *REP) put(b []byte) {
	be := binary.BigEndian
	be.PutUint32(b, m.LocalID)
	be.PutUint32(b[4:], m.RemoteID)
	be.PutUint32(b[8:], m.QKey)
	put24(b[12:], m.QPN, uint8(m.VendorID>>16))
	b[19] = uint8(m.VendorID >> 8)
	put24(b[20:], uint32(m.StartingPSN), uint8(m.VendorID))
	b[24] = m.ResponderResources
	b[25] = m.InitiatorDepth
	b[26] = m.TargetAckDelay<<3 | m.FailoverAccepted&3<<1 | bit(m.FlowControl, 0)
	b[27] = m.RNRRetryCount<<5 | bit(m.SRQ, 4)
	be.PutUint64(b[28:], m.CAGUID)
	copy(b[36:], m.Private[:])
}

func (m *REP) get(b []byte) {
	be := binary.BigEndian
	m.LocalID = be.Uint32(b)
	m.RemoteID = be.Uint32(b[4:])
	m.QKey = be.Uint32(b[8:])
	qpn, high := get24(b[12:])
	psn, low := get24(b[20:])
	m.QPN = qpn
	m.VendorID = uint32(high)<<16 | uint32(b[19])<<8 | uint32(low)
	m.StartingPSN = ib.PSN(psn)
	m.ResponderResources = b[24]
	m.InitiatorDepth = b[25]
	m.TargetAckDelay = b[26] >> 3
	m.FailoverAccepted = b[26] >> 1 & 3
	m.FlowControl = b[26]&1 != 0
	m.RNRRetryCount = b[27] >> 5
	m.SRQ = b[27]&(1<<4) != 0
	m.CAGUID = be.Uint64(b[28:])
	copy(m.Private[:], b[36:])
}

// An RTU ends the three-way handshake (IBA 12.6.9).
type RTU struct {
	LocalID, RemoteID uint32
	Private           [224]byte
}

func (*RTU) Attr() CMAttr { return CMRTU }

func (m *RTU) put(b []byte) { putIDs(b, m.LocalID, m.RemoteID, m.Private[:]) }

func (m *RTU) get(b []byte) { m.LocalID, m.RemoteID = getIDs(b, m.Private[:]) }

// A DREQ ends a connection (IBA 12.6.10).
type DREQ struct {
	LocalID, RemoteID uint32
	RemoteQPN         uint32 // 24 bits: the receiver's queue pair
	Private           [220]byte
}

func (*DREQ) Attr() CMAttr { return CMDREQ }

func (m *DREQ) put(b []byte) {
	putIDs(b, m.LocalID, m.RemoteID, nil)
	put24(b[8:], m.RemoteQPN, 0)
	copy(b[12:], m.Private[:])
}

func (m *DREQ) get(b []byte) {
	m.LocalID, m.RemoteID = getIDs(b, nil)
	m.RemoteQPN, _ = get24(b[8:])
	copy(m.Private[:], b[12:])
}

// A DREP answers a DREQ (IBA 12.6.11).
type DREP struct {
	LocalID, RemoteID uint32
	Private           [224]byte
}

func (*DREP) Attr() CMAttr { return CMDREP }

func (m *DREP) put(b []byte) { putIDs(b, m.LocalID, m.RemoteID, m.Private[:]) }

func (m *DREP) get(b []byte) { m.LocalID, m.RemoteID = getIDs(b, m.Private[:]) }

// A REJ refuses a message, or ends the handshake (IBA 12.6.7).
type REJ struct {
	LocalID, RemoteID uint32
	Rejected          uint8 // 2 bits: 0 a REQ, 1 a REP, 2 no message
	Reason            RejectReason
	InfoLen           uint8 // 7 bits: how much of Info means anything
	Info              [72]byte
	Private           [148]byte
}

// A RejectReason is why a message was refused (IBA 12.6.7.2, table 108).
type RejectReason uint16

const (
	RejectNoQP             RejectReason = 1
	RejectNoResources      RejectReason = 3
	RejectTimeout          RejectReason = 4
	RejectUnsupported      RejectReason = 5
	RejectInvalidCommID    RejectReason = 6
	RejectInvalidService   RejectReason = 8
	RejectInvalidTransport RejectReason = 9
	RejectStale            RejectReason = 10
	RejectInvalidGID       RejectReason = 12
	RejectInvalidMTU       RejectReason = 26
	RejectResponder        RejectReason = 27
	RejectConsumer         RejectReason = 28
	RejectDuplicateCommID  RejectReason = 30
)

var rejectNames = map[RejectReason]string{RejectNoQP: "no queue pair", RejectNoResources: "no resources", RejectTimeout: "timeout",
	RejectUnsupported: "unsupported request", RejectInvalidCommID: "invalid communication ID", RejectInvalidService: "nobody listens there",
	RejectInvalidTransport: "invalid transport type", RejectStale: "stale connection", RejectInvalidGID: "invalid GID",
	RejectInvalidMTU: "invalid path MTU", RejectResponder: "insufficient responder resources", RejectConsumer: "refused by the program",
	RejectDuplicateCommID: "duplicate communication ID"}

func (r RejectReason) String() string {
	if s, ok := rejectNames[r]; ok {
		return s
	}
	return fmt.Sprintf("reason %d", uint16(r))
}

func (*REJ) Attr() CMAttr { return CMREJ }

func (m *REJ) put(b []byte) {
	putIDs(b, m.LocalID, m.RemoteID, nil)
	b[8] = m.Rejected << 6
	b[9] = m.InfoLen << 1
	binary.BigEndian.PutUint16(b[10:], uint16(m.Reason))
	copy(b[12:], m.Info[:])
	copy(b[84:], m.Private[:])
}

func (m *REJ) get(b []byte) {
	m.LocalID, m.RemoteID = getIDs(b, nil)
	m.Rejected = b[8] >> 6
	m.InfoLen = b[9] >> 1
	m.Reason = RejectReason(binary.BigEndian.Uint16(b[10:]))
	copy(m.Info[:], b[12:])
	copy(m.Private[:], b[84:])
}

// An MRA says that a message has come, and that the answer takes longer (IBA 12.6.6).
type MRA struct {
	LocalID, RemoteID uint32
	Received          uint8 // 2 bits: 0 a REQ, 1 a REP
	ServiceTimeout    uint8 // 5 bits, 4.096 us x 2^n
	Private           [222]byte
}

func (*MRA) Attr() CMAttr { return CMMRA }

func (m *MRA) put(b []byte) {
	putIDs(b, m.LocalID, m.RemoteID, nil)
	b[8] = m.Received << 6
	b[9] = m.ServiceTimeout << 3
	copy(b[10:], m.Private[:])
}

func (m *MRA) get(b []byte) {
	m.LocalID, m.RemoteID = getIDs(b, nil)
	m.Received = b[8] >> 6
	m.ServiceTimeout = b[9] >> 3
	copy(m.Private[:], b[10:])
}

// A SIDRREQ asks which queue pair takes a service's datagrams (IBA 12.11.1).
type SIDRREQ struct {
	RequestID uint32
	PKey      uint16
	ServiceID uint64
	Private   [216]byte
}

func (*SIDRREQ) Attr() CMAttr { return CMSIDRREQ }

func (m *SIDRREQ) put(b []byte) {
	be := binary.BigEndian
	be.PutUint32(b, m.RequestID)
	be.PutUint16(b[4:], m.PKey)
	be.PutUint64(b[8:], m.ServiceID)
	copy(b[16:], m.Private[:])
}

func (m *SIDRREQ) get(b []byte) {
	be := binary.BigEndian
	m.RequestID = be.Uint32(b)
	m.PKey = be.Uint16(b[4:])
	m.ServiceID = be.Uint64(b[8:])
	copy(m.Private[:], b[16:])
}

// A SIDRREP answers a SIDRREQ (IBA 12.11.2).
type SIDRREP struct {
	RequestID uint32
	Status    uint8 // 0 is success; 1 unsupported, 2 rejected, 3 no queue pair, 4 redirect
	InfoLen   uint8
	QPN       uint32 // 24 bits
	ServiceID uint64
	QKey      uint32
	Info      [72]byte
	Private   [136]byte
}

func (*SIDRREP) Attr() CMAttr { return CMSIDRREP }

func (m *SIDRREP) put(b []byte) {
	be := binary.BigEndian
	be.PutUint32(b, m.RequestID)
	b[4] = m.Status
	b[5] = m.InfoLen
	put24(b[8:], m.QPN, 0)
	be.PutUint64(b[12:], m.ServiceID)
	be.PutUint32(b[20:], m.QKey)
	copy(b[24:], m.Info[:])
	copy(b[96:], m.Private[:])
}

func (m *SIDRREP) get(b []byte) {
	be := binary.BigEndian
	m.RequestID = be.Uint32(b)
	m.Status = b[4]
	m.InfoLen = b[5]
	m.QPN, _ = get24(b[8:])
	m.ServiceID = be.Uint64(b[12:])
	m.QKey = be.Uint32(b[20:])
	copy(m.Info[:], b[24:])
	copy(m.Private[:], b[96:])
}

// put24 writes a number of 24 bits and the byte behind it.
func put24(b []byte, v uint32, low uint8) { binary.BigEndian.PutUint32(b, v<<8|uint32(low)) }

func get24(b []byte) (v uint32, low uint8) {
	w := binary.BigEndian.Uint32(b)
	return w >> 8, uint8(w)
}

func bit(set bool, shift uint8) uint8 {
	if set {
		return 1 << shift
	}
	return 0
}

func putIDs(b []byte, local, remote uint32, private []byte) {
	binary.BigEndian.PutUint32(b, local)
	binary.BigEndian.PutUint32(b[4:], remote)
	copy(b[8:], private)
}

func getIDs(b []byte, private []byte) (local, remote uint32) {
	copy(private, b[8:])
	return binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])
}

// An IPHello is the start of a REQ's or a SIDRREQ's private data between programs that know each other by IP address
// (annex A11).
type IPHello struct{ Src, Dst netip.AddrPort }

// IPHelloLen is the length of an IPHello; what the program sends follows.
const IPHelloLen = 36

// PortSpace is the part of a service ID above the port, for programs that know each other by IP address.
type PortSpace uint16

const (
	PortSpaceTCP PortSpace = 0x0106 // reliable connections
	PortSpaceUDP PortSpace = 0x0111 // datagrams
)

// ServiceID returns the service ID of a port, as Linux forms it (A11.2).
func (p PortSpace) ServiceID(port uint16) uint64 { return uint64(p)<<16 + uint64(port) }

// Put writes h to the start of private data. Its destination port is part of the service ID, and not written.
func (h *IPHello) Put(b []byte) {
	b = b[:IPHelloLen]
	clear(b)
	b[1] = 4 << 4
	if !h.Src.Addr().Unmap().Is4() {
		b[1] = 6 << 4
	}
	binary.BigEndian.PutUint16(b[2:], h.Src.Port())
	putIP(b[4:20], h.Src.Addr())
	putIP(b[20:36], h.Dst.Addr())
}

// Decode reads h from the start of private data; the port of h.Dst is that of the service ID.
func (h *IPHello) Decode(b []byte, service uint64) error {
	if len(b) < IPHelloLen {
		return fmt.Errorf("roce: private data of %d bytes is shorter than an IP address header", len(b))
	}
	version := b[1] >> 4
	if b[0] != 0 || version != 4 && version != 6 {
		return fmt.Errorf("roce: private data does not start with an IP address header: version %#x, IP version %d", b[0], version)
	}
	h.Src = netip.AddrPortFrom(getIP(b[4:20], version), binary.BigEndian.Uint16(b[2:]))
	h.Dst = netip.AddrPortFrom(getIP(b[20:36], version), uint16(service))
	return nil
}

// An IPv4 address is in the last four bytes.
func putIP(b []byte, a netip.Addr) {
	if a = a.Unmap(); a.Is4() {
		a4 := a.As4()
		copy(b[12:], a4[:])
		return
	}
	a16 := a.As16()
	copy(b, a16[:])
}

func getIP(b []byte, version uint8) netip.Addr {
	if version == 4 {
		return netip.AddrFrom4([4]byte(b[12:16]))
	}
	return netip.AddrFrom16([16]byte(b))
}
