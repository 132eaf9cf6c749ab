package cmemu

import (
	"errors"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/cm"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// An id is what programs know by a number: a struct rdma_cm_id of the kernel's. It is a cm.Handler, which hears what becomes of its
// connection.
type id struct {
	m     *Manager
	space uint16
	typ   ib.QPType
	psn   ib.PSN // that this side expects first

	run sync.Mutex // held by the command that is being executed, and before m.mu

	// What only commands change, and so read with run held alone: written with m.mu held, too, since others read it with that.
	src, dst   sockaddr
	at         place  // the device; zero: none yet
	path       path   // once the state is routeResolved, or there was a request
	reuse      bool   // RDMA_OPTION_ID_REUSEADDR
	afOnly     bool   // RDMA_OPTION_ID_AFONLY
	afOnlySet  bool   // by the program
	tos        uint8  // RDMA_OPTION_ID_TOS
	ackTimeout *uint8 // RDMA_OPTION_ID_ACK_TIMEOUT; nil: not set
	listens    []place

	// Guarded by m.mu.
	state    state
	num      uint32
	ch       *Channel
	uid      uint64
	bound    portKey // the port that it has
	dead     bool    // nothing is heard of it any more
	reported uint32  // events that were delivered
	backlog  uint32  // requests that there is room for
	conn     *cm.Conn
	phase    phase
	said     terms       // what this side has told the peer
	reply    *roce.REP   // of the peer's
	qkey     uint32      // of datagrams
	timewait *time.Timer // nil: no connection has ended
	forget   func()      // what the device was told of the peer; nil: nothing
}

// state is what the kernel calls rdma_cm_state.
type state uint8

const (
	idle state = iota
	addrBound
	addrResolved
	routeResolved
	connecting // or connected: RDMA_CM_CONNECT
	disconnected
	listening
)

// phase is how far a connection is: the states of the kernel's ib_cm, as far as they matter.
type phase uint8

const (
	noConn phase = iota
	reqSent
	reqReceived
	repReceived
	repSent
	established
	over
)

// terms are what one side of a connection says that the attributes of its queue pair follow from.
type terms struct {
	retryCount, rnrRetry uint8
	responder, initiator uint8 // READs and atomics that are answered, and sent
}

// path is the way to the peer.
type path struct {
	mtu              ib.MTU
	flow             uint32
	tclass, hops, sl uint8
	life             uint8 // packet lifetime, 4.096 us << life
}

// packetLife is the kernel's CMA_IBOE_PACKET_LIFETIME.
const packetLife = 16

func newID(m *Manager, space uint16, typ ib.QPType) *id {
	return &id{m: m, space: space, typ: typ, psn: ib.PSN(rand.Uint32()) & ib.MaxPSN}
}

func createID(w *call) syscall.Errno {
	var resp abi.CMCreateIDResp
	q, errno := argFor[abi.CMCreateID](w, len(bytesOf(&resp)))
	if errno != 0 {
		return errno
	}
	typ := ib.QPType(q.QPType)
	switch q.PS {
	case abi.RDMA_PS_TCP:
		typ = ib.RC
	case abi.RDMA_PS_IB: // librdmacm makes one to see whether the kernel knows AF_IB
	case abi.RDMA_PS_UDP:
		typ = ib.UD
	case abi.RDMA_PS_IPOIB:
		return unix.EPROTONOSUPPORT
	default:
		return unix.EINVAL
	}
	m := w.c.m
	x := newID(m, q.PS, typ)
	x.uid, x.qkey = q.UID, defaultQKey
	m.mu.Lock()
	errno = m.add(x, w.c)
	resp.ID = x.num
	m.mu.Unlock()
	if errno != 0 {
		return errno
	}
	if errno = w.write(q.Response, bytesOf(&resp)); errno != 0 {
		m.mu.Lock()
		mine := m.remove(x)
		m.mu.Unlock()
		if mine {
			m.destroy(x)
		}
	}
	return errno
}

func destroyID(w *call) syscall.Errno {
	var resp abi.CMDestroyIDResp
	q, errno := argFor[abi.CMDestroyID](w, len(bytesOf(&resp)))
	if errno != 0 {
		return errno
	}
	m := w.c.m
	m.mu.Lock()
	x, errno := w.c.find(q.ID)
	if errno == 0 {
		m.remove(x)
	}
	m.mu.Unlock()
	if errno != 0 {
		return errno
	}
	resp.EventsReported = m.destroy(x)
	return w.write(q.Response, bytesOf(&resp))
}

// destroy ends an ID that was taken out of the tables, with all that it stands for, and returns how many of its events were delivered.
func (m *Manager) destroy(x *id) (reported uint32) {
	x.run.Lock()
	defer x.run.Unlock()
	m.mu.Lock()
	x.dead = true
	var orphans []*id
	x.ch.setEvents(slices.DeleteFunc(slices.Clone(x.ch.events), func(e *event) bool {
		if e.of == x && e.made != nil && m.remove(e.made) {
			orphans = append(orphans, e.made)
		}
		return e.of == x
	}))
	reported = x.reported
	conn, port := x.conn, x.src.port
	if x.timewait != nil {
		x.timewait.Stop()
	}
	if x.forget != nil {
		x.forget()
	}
	m.mu.Unlock()
	x.unlisten(x.listens, port)
	m.mu.Lock()
	m.freePort(x)
	m.mu.Unlock()
	if conn != nil {
		x.at.Manage(func(_ *cm.Engine, now time.Duration) error { // if the device is closed, there is no peer to tell
			conn.Abandon(now)
			return nil
		})
	}
	for _, o := range orphans {
		m.destroy(o)
	}
	return reported
}

// set changes what commands change.
func (x *id) set(f func()) {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	f()
}

// queue has an event delivered, if the ID has a name for it. Called with m.mu held.
func (x *id) queue(kind uint32, status int32, param []byte, ece abi.CMECE) {
	if x.dead || x.uid == 0 { // a request that was not accepted: the program finds out when it tries
		return
	}
	x.ch.put(&event{of: x, resp: eventOf(x.uid, x.num, kind, status, param, ece)})
}

// queueMore is queue for what a command leads to: ENOMEM, if the program does not take its events.
func (x *id) queueMore(kind uint32, status int32) syscall.Errno {
	if x.ch.full() {
		return unix.ENOMEM
	}
	x.queue(kind, status, nil, abi.CMECE{})
	return 0
}

func eventOf(uid uint64, num, kind uint32, status int32, param []byte, ece abi.CMECE) abi.CMEventResp {
	r := abi.CMEventResp{UID: uid, ID: num, Event: kind, Status: uint32(status), ECE: ece}
	copy(bytesOf(&r)[abi.CMEventRespConnOffset:][:len(bytesOf(&r.Param))], param)
	return r
}

// The events (enum rdma_cm_event_type of rdma_cma.h).
const (
	eventAddrResolved    = 0
	eventAddrError       = 1
	eventRouteResolved   = 2
	eventConnectRequest  = 4
	eventConnectResponse = 5
	eventUnreachable     = 7
	eventRejected        = 8
	eventEstablished     = 9
	eventDisconnected    = 10
	eventTimewaitExit    = 15
)

// Replied implements cm.Handler.
func (x *id) Replied(r *roce.REP) {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	x.reply, x.phase = r, repReceived
	x.meet(r.QPN)
	p := abi.CMConnParam{QPNum: r.QPN, PrivateDataLen: uint8(len(r.Private)), SRQ: bit(r.SRQ), ResponderResources: r.InitiatorDepth,
		InitiatorDepth: r.ResponderResources, FlowControl: bit(r.FlowControl), RNRRetryCount: r.RNRRetryCount}
	copy(p.PrivateData[:], r.Private[:])
	x.queue(eventConnectResponse, 0, bytesOf(&p), eceOf(r.VendorID, r.VendorOptions))
}

// meet has the device know where the peer's queue pair is. Called with m.mu held, in a handler of the Engine's.
func (x *id) meet(qpn uint32) {
	if x.dead {
		return
	}
	x.forget = x.at.dev.Meet(x.dst.gid(), ib.QPN(qpn), x.conn.UDPPort(false))
}

// Established implements cm.Handler.
func (x *id) Established() {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	x.phase = established
	x.queue(eventEstablished, 0, nil, abi.CMECE{})
}

// Resolved implements cm.Handler.
func (x *id) Resolved(r *roce.SIDRREP) {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	x.phase = over
	p := abi.CMUDParam{PrivateDataLen: uint8(len(r.Private))}
	copy(p.PrivateData[:], r.Private[:])
	if r.Status != cm.StatusSuccess {
		x.queue(eventUnreachable, int32(r.Status), bytesOf(&p), abi.CMECE{})
		return
	}
	x.qkey = r.QKey
	p.QPNum, p.QKey, p.AHAttr = r.QPN, r.QKey, x.addressHandle()
	x.queue(eventEstablished, 0, bytesOf(&p), abi.CMECE{})
}

// addressHandle is where the peer is.
func (x *id) addressHandle() abi.AHAttr {
	p := &x.path
	return abi.AHAttr{IsGlobal: 1, PortNum: 1, SL: p.sl,
		GRH: abi.GlobalRoute{DGID: x.dst.gid(), FlowLabel: p.flow, SGIDIndex: uint8(x.at.GIDIndex()), HopLimit: p.hops, TrafficClass: p.tclass}}
}

// defaultQKey is the Q_Key of datagrams for which the program says none, RDMA_UDP_QKEY.
const defaultQKey = 0x01234567

// timewait is how long after a connection its queue pair should not have another: what is on the way may arrive until then.
const timewait = time.Second

// Ended implements cm.Handler.
func (x *id) Ended(err error) {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	x.phase = over
	var rejected *cm.RejectError
	switch {
	case errors.Is(err, net.ErrClosed): // the device is
	case errors.Is(err, cm.ErrDisconnected):
		x.state = disconnected
		x.queue(eventDisconnected, 0, nil, abi.CMECE{})
		if !x.dead {
			x.timewait = time.AfterFunc(timewait, x.timewaitOver)
		}
	case errors.As(err, &rejected):
		p := abi.CMConnParam{PrivateDataLen: cm.MaxReject}
		copy(p.PrivateData[:cm.MaxReject], rejected.Private)
		x.queue(eventRejected, int32(rejected.Reason), bytesOf(&p), abi.CMECE{})
	case errors.Is(err, cm.ErrGivenUp):
		x.queue(eventRejected, int32(roce.RejectTimeout), bytesOf(&abi.CMConnParam{PrivateDataLen: cm.MaxReject}), abi.CMECE{})
	default:
		x.queue(eventUnreachable, -int32(unix.ETIMEDOUT), nil, abi.CMECE{})
	}
}

func (x *id) timewaitOver() {
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	x.queue(eventTimewaitExit, 0, nil, abi.CMECE{})
}

// eceOf is what the peer's library says to ours, for the enhanced connection establishment. What managers of this project say to each
// other is not for it.
func eceOf(vendor, options uint32) abi.CMECE {
	if vendor == cm.Vendor {
		return abi.CMECE{}
	}
	return abi.CMECE{VendorID: vendor, AttrMod: options}
}

func bit(v bool) uint8 {
	if v {
		return 1
	}
	return 0
}
