package cm

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Conn is a connection, or an attempt at one. Its methods are for who has the Engine.
type Conn struct {
	e     *Engine
	h     Handler // nil: nobody cares any more
	state state

	remote            netip.AddrPort // the peer's connection manager: where its datagrams come from, and ours go
	local, peer       netip.AddrPort
	localID, remoteID uint32
	tid               uint64 // of the handshake
	guid              uint64 // the peer's
	qpn, peerQPN      uint32
	bound             uint16 // the port that it has of the Engine's; 0: none
	selective         bool   // OptionSelective was offered; active: and taken, once there is a reply

	request  *roce.REQ     // passive
	question *roce.SIDRREQ // likewise, of datagrams
	reply    *roce.REP     // active

	mad      [roce.MADLen]byte // what is sent again
	at       time.Duration     // when expire is to be called, or (old) when it is forgotten
	overAt   time.Duration
	timer    int           // place in e.timers, or -1
	interval time.Duration // after which it is sent again
	limit    time.Duration // of interval
	left     uint8         // times that it is sent again
}

// state is where a connection is.
//
//	active:   reqSent -> repReceived -> established      passive:  reqReceived -> repSent -> established
//	both:     established -> dreqSent -> over            refused: what a REJ was sent for    any -> forgotten
//	of datagrams: active asking, passive asked -> refused, which is answered here
type state uint8

const (
	reqSent state = iota
	repReceived
	reqReceived
	repSent
	established
	dreqSent
	over    // in timewait
	refused // a repeated message gets the same REJ
	asking
	asked
	forgotten
)

// Params is what one side of a connection says.
type Params struct {
	QPN                                ib.QPN
	PSN                                ib.PSN // that this side expects first
	ResponderResources, InitiatorDepth uint8
	RNRRetry                           uint8 // of the peer
	SRQ, FlowControl                   bool
	// VendorID and VendorOptions are as in roce.REQ: what is offered and, of who accepts, what is taken of an offer.
	VendorID, VendorOptions uint32
	Private                 []byte // at most MaxRequest, MaxReply

	// Of who dials only.
	RetryCount   uint8  // of both
	MTU          ib.MTU // of the path
	FlowLabel    uint32 // of the path
	TrafficClass uint8  // of the path
	// Bound says that the local port is the caller's: the Engine does not look who else has it, nor keeps it for this connection.
	Bound bool
}

// Connect asks who listens on peer for a connection. With port 0 the local one is chosen. h hears what becomes of it.
func (e *Engine) Connect(now time.Duration, port uint16, peer netip.AddrPort, p *Params, h Handler) (*Conn, error) {
	if len(p.Private) > MaxRequest {
		return nil, tooLong("a request", p.Private, MaxRequest)
	}
	switch {
	case port == 0:
		if port = e.FreePort(); port == 0 {
			return nil, ErrPortInUse
		}
	case !p.Bound && e.PortInUse(port):
		return nil, ErrPortInUse
	}
	c := e.newConn(netip.AddrPortFrom(peer.Addr(), roce.Port))
	c.h, c.state, c.qpn, c.peer = h, reqSent, uint32(p.QPN), peer
	c.local = netip.AddrPortFrom(e.cfg.Local, port)
	if !p.Bound {
		c.bound = port
		e.bound[port] = true
	}
	c.selective = p.VendorID == Vendor && p.VendorOptions == OptionSelective
	c.tid = uint64(e.cfg.Rand())<<32 | uint64(c.localID)
	m := &roce.REQ{LocalID: c.localID, VendorID: p.VendorID, VendorOptions: p.VendorOptions, ServiceID: roce.PortSpaceTCP.ServiceID(peer.Port()),
		CAGUID: uint64(e.cfg.GUID), QPN: uint32(p.QPN), ResponderResources: p.ResponderResources, InitiatorDepth: p.InitiatorDepth,
		RemoteResponseTimeout: responseTimeout, LocalResponseTimeout: responseTimeout, Transport: roce.TransportRC, FlowControl: p.FlowControl, StartingPSN: p.PSN,
		RetryCount: p.RetryCount, RNRRetryCount: p.RNRRetry, PKey: roce.DefaultPKey, MTU: p.MTU, SRQ: p.SRQ, MaxCMRetries: maxRetries,
		LocalLID: permissiveLID, RemoteLID: permissiveLID, LocalGID: ib.GIDFromAddr(e.cfg.Local), RemoteGID: ib.GIDFromAddr(peer.Addr()),
		FlowLabel: p.FlowLabel, TrafficClass: p.TrafficClass, PacketRate: rate10G, HopLimit: hopLimit, LocalAckTimeout: ackTimeout}
	(&roce.IPHello{Src: c.local, Dst: peer}).Put(m.Private[:])
	copy(m.Private[roce.IPHelloLen:], p.Private)
	c.send(now, c.tid, m, timeout(responseTimeout), maxRetries)
	return c, nil
}

// What a REQ says of a path that is not within an InfiniBand subnet (as Linux does).
const (
	permissiveLID = 0xffff
	hopLimit      = 64
	rate10G       = 3 // an enumeration (IBA 15.2.5.16); nobody throttles by it
)

func tooLong(what string, b []byte, most int) error {
	return fmt.Errorf("private data of %d bytes: at most %d fit into %s", len(b), most, what)
}

// LocalAddr and RemoteAddr are the programs' addresses.
func (c *Conn) LocalAddr() netip.AddrPort  { return c.local }
func (c *Conn) RemoteAddr() netip.AddrPort { return c.peer }

// REQ is what the peer has asked for; nil: this side has.
func (c *Conn) REQ() *roce.REQ { return c.request }

// Selective reports whether the connection may leave plain go-back-N, once Replied was called; of a request, whether it offers that.
func (c *Conn) Selective() bool { return c.selective }

// UDPPort is what the address vector of the queue pair is to have as ib.AHAttr.UDPPort: where the peer receives, if it is a software NIC
// of this library that the connection leaves plain go-back-N with. selective: that was agreed on. It need not be with peers at the own
// address, which are software NICs always: no other RoCE device could share it. Otherwise it is 0.
func (c *Conn) UDPPort(selective bool) uint16 {
	if selective || c.remote.Addr() == c.e.cfg.Local {
		return c.remote.Port()
	}
	return 0
}

// AckTimeout is what the queue pair is to wait for acknowledgements: what the peer has said, in a request or a reply.
func (c *Conn) AckTimeout() ib.AckTimeout {
	const most = 31
	switch {
	case c.request != nil && c.request.LocalAckTimeout != 0:
		return ib.AckTimeout(c.request.LocalAckTimeout)
	case c.reply != nil:
		return ib.AckTimeout(min(max(ackTimeout, c.reply.TargetAckDelay+1), most))
	}
	return ackTimeout
}

// send sends a message, and again until something is heard.
func (c *Conn) send(now time.Duration, tid uint64, m roce.CMMessage, limit time.Duration, retries uint8) {
	roce.PutMAD(c.mad[:], tid, m)
	c.interval, c.limit, c.left = firstRepeat, limit, retries
	c.wake(now + c.interval)
	c.repeat()
}

// once sends a message, and again if it is asked for.
func (c *Conn) once(tid uint64, m roce.CMMessage) {
	c.stop()
	roce.PutMAD(c.mad[:], tid, m)
	c.repeat()
}

func (c *Conn) repeat() { c.e.cfg.Out.Send(c.remote, &c.mad) }

// expire is called when nothing was heard for long enough.
func (c *Conn) expire(now time.Duration) {
	if c.state == reqReceived || c.state == asked {
		c.stop()
		c.forget()
		c.ended(ErrGivenUp)
		return
	}
	if c.left > 0 {
		c.left--
		c.e.Counters.Repeats++
		c.interval = min(2*c.interval, c.limit)
		c.wake(now + c.interval)
		c.repeat()
		return
	}
	switch c.state {
	case reqSent:
		c.giveUp()
		c.ended(ErrNoAnswer)
	case asking:
		c.forget()
		c.ended(ErrNoAnswer)
	case repSent:
		c.reject(now, 1, roce.RejectTimeout, nil)
		c.ended(ErrNoAnswer)
	case dreqSent:
		c.over(now)
		c.ended(ErrDisconnected) // the peer has gone, or it has not heard
	}
}

// giveUp tells the peer that no answer to the request is waited for any more. It may not know this side's name of it by now, but
// the node's.
func (c *Conn) giveUp() {
	m := &roce.REJ{LocalID: c.localID, Reason: roce.RejectTimeout}
	m.InfoLen = uint8(guidInfo(&m.Info, uint64(c.e.cfg.GUID)))
	c.once(c.tid, m)
	c.forget()
}

// Ready confirms the connection: this side's queue pair sends and receives. It is for who has heard Replied, and false if the connection
// is over by now.
func (c *Conn) Ready() bool {
	if c.state != repReceived {
		return false
	}
	c.state = established
	c.once(c.tid, &roce.RTU{LocalID: c.localID, RemoteID: c.remoteID})
	return true
}

// Accept takes a request: this side's queue pair receives. Established follows, or Ended.
func (c *Conn) Accept(now time.Duration, p *Params) error {
	if len(p.Private) > MaxReply {
		return tooLong("an acceptance", p.Private, MaxReply)
	}
	if c.state != reqReceived {
		return ErrGivenUp
	}
	c.state, c.qpn = repSent, uint32(p.QPN)
	m := &roce.REP{LocalID: c.localID, RemoteID: c.remoteID, QPN: c.qpn, StartingPSN: p.PSN, ResponderResources: p.ResponderResources,
		InitiatorDepth: p.InitiatorDepth, TargetAckDelay: ackDelay, FlowControl: p.FlowControl, RNRRetryCount: p.RNRRetry, SRQ: p.SRQ,
		VendorID: p.VendorID, VendorOptions: p.VendorOptions, CAGUID: uint64(c.e.cfg.GUID)}
	copy(m.Private[:], p.Private)
	c.send(now, c.tid, m, timeout(c.request.LocalResponseTimeout), max(c.request.MaxCMRetries, minRetries))
	return nil
}

// minRetries is how often an acceptance is sent again even if the peer says that less is enough.
const minRetries = 5

// Reject refuses a request, or the answer to one. Nothing is heard of it any more.
func (c *Conn) Reject(now time.Duration, reason roce.RejectReason, private []byte) error {
	if len(private) > MaxReject {
		return tooLong("a rejection", private, MaxReject)
	}
	var message uint8
	switch c.state {
	case reqReceived:
	case repReceived:
		message = 1
	default:
		return ErrGivenUp
	}
	c.h = nil
	c.reject(now, message, reason, private)
	return nil
}

// Heard says that the peer's queue pair has sent: its confirmation is on the way, or lost, and no more waited for. It is for who has
// called Accept, and false if nothing is waited for.
func (c *Conn) Heard() bool {
	if c.state != repSent {
		return false
	}
	c.stop()
	c.state = established
	return true
}

// reject refuses a message, 0 a REQ and 1 a REP or what was to follow it, and remembers that for a while.
func (c *Conn) reject(now time.Duration, message uint8, reason roce.RejectReason, private []byte) {
	m := &roce.REJ{LocalID: c.localID, RemoteID: c.remoteID, Rejected: message, Reason: reason}
	copy(m.Private[:], private)
	c.once(c.tid, m)
	c.keep(now, refused)
}

// Disconnect ends an established connection. Ended follows when the peer has heard it, or does not answer.
func (c *Conn) Disconnect(now time.Duration) {
	if c.state != established {
		return
	}
	c.state = dreqSent
	c.e.leaving++
	tid := uint64(c.e.cfg.Rand())<<32 | uint64(c.localID)
	c.send(now, tid, &roce.DREQ{LocalID: c.localID, RemoteID: c.remoteID, RemoteQPN: c.peerQPN}, timeout(responseTimeout), disconnectRetries)
}

// Abandon says that nobody waits for the connection any more, whatever has become of it: the peer is told, and h hears nothing.
func (c *Conn) Abandon(now time.Duration) {
	c.h = nil
	switch c.state {
	case reqSent:
		c.giveUp()
	case repReceived, repSent:
		c.reject(now, 1, roce.RejectConsumer, nil)
	case reqReceived:
		c.reject(now, 0, roce.RejectConsumer, nil)
	case established:
		c.Disconnect(now)
	case asking:
		c.forget()
	case asked:
		c.Answer(now, &Answer{Status: StatusRejected})
	}
}

// ended tells the handler.
func (c *Conn) ended(err error) {
	if h := c.h; h != nil {
		c.h = nil
		h.Ended(err)
	}
}

// over ends the connection, of which a DREQ that comes again is to be answered.
func (c *Conn) over(now time.Duration) { c.keep(now, over) }

// keep remembers the connection in its last state for a while, or as long as there are not too many.
func (c *Conn) keep(now time.Duration, s state) {
	c.stop()
	c.leave(s)
	c.at, c.overAt = now+memory, now
	e := c.e
	if e.old = append(e.old, c); len(e.old) > maxMemory {
		e.forgetOldest()
	}
}

// forget takes the connection out of all tables.
func (c *Conn) forget() {
	if c.state == forgotten {
		return
	}
	e := c.e
	c.stop()
	c.leave(forgotten)
	delete(e.conns, c.localID)
	if c.request != nil || c.question != nil {
		if k := c.requestKey(); e.requests[k] == c {
			delete(e.requests, k)
		}
	}
	if k := c.qpKey(); e.peers[k] == c {
		delete(e.peers, k)
	}
}

// leave changes to a state in which nothing goes on any more.
func (c *Conn) leave(s state) {
	e := c.e
	if c.state == dreqSent {
		e.leaving--
	}
	if c.bound != 0 {
		delete(e.bound, c.bound)
		c.bound = 0
	}
	c.state = s
}

func (c *Conn) requestKey() requestKey {
	return requestKey{c.remote, c.guid, c.remoteID, c.question != nil}
}
func (c *Conn) qpKey() qpKey { return qpKey{c.guid, c.remote, c.peerQPN} }
