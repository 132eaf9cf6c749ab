package cm

import (
	"container/heap"
	"net"
	"net/netip"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Config is what an Engine is made with.
type Config struct {
	Local netip.Addr // where the datagrams leave from
	GUID  ib.GUID    // names this side's restarts: another one each time
	MTU   ib.MTU     // the largest path MTU that there can be
	Rand  func() uint32
	Out   Output
}

// An Engine is the connection manager of an address.
type Engine struct {
	cfg       Config
	services  map[uint16]Service
	datagrams map[uint16]Service
	bound     map[uint16]bool // ports of active sides
	conns     map[uint32]*Conn
	requests  map[requestKey]*Conn // passive, by what the peer calls them
	peers     map[qpKey]*Conn      // by the peer's queue pair
	timers    timers
	old       []*Conn // that are over or refused, oldest first; some are forgotten
	leaving   int     // connections that wait for the answer to a DREQ
	b         [roce.MADLen]byte

	Counters Counters
}

// Counters say what an Engine has met.
type Counters struct {
	Malformed uint64 // datagrams that are none of the connection manager's
	Strange   uint64 // messages that fit no connection, or not its state
	Refused   uint64 // requests
	Repeats   uint64 // messages that were sent again because nothing was heard
}

// requestKey is a request as the peer knows it.
type requestKey struct {
	from     netip.AddrPort
	guid     uint64
	id       uint32
	datagram bool // a question
}

// qpKey is a queue pair of a peer.
type qpKey struct {
	guid uint64
	at   netip.AddrPort
	qpn  uint32
}

// New makes an Engine.
func New(cfg Config) *Engine {
	return &Engine{cfg: cfg, services: map[uint16]Service{}, datagrams: map[uint16]Service{}, bound: map[uint16]bool{}, conns: map[uint32]*Conn{},
		requests: map[requestKey]*Conn{}, peers: map[qpKey]*Conn{}}
}

// Listen has s take requests for a port, which is not 0.
func (e *Engine) Listen(port uint16, s Service) error {
	if e.PortInUse(port) {
		return ErrPortInUse
	}
	e.services[port] = s
	return nil
}

// Unlisten ends that. Requests that s has taken are not concerned.
func (e *Engine) Unlisten(port uint16) { delete(e.services, port) }

// PortInUse reports whether a port has a service, or is that of an active side.
func (e *Engine) PortInUse(port uint16) bool { return e.services[port] != nil || e.bound[port] }

// ephemeral is the first of the ports that are chosen for those who do not care (RFC 6335, 6).
const ephemeral = 49152

// FreePort returns a port that nobody has; 0: there is none.
func (e *Engine) FreePort() uint16 {
	const n = 1<<16 - ephemeral
	start := e.cfg.Rand() % n
	for i := range uint32(n) {
		if p := uint16(ephemeral + (start+i)%n); !e.PortInUse(p) {
			return p
		}
	}
	return 0
}

// Leaving returns how many connections wait until the peer has heard that they are over.
func (e *Engine) Leaving() int { return e.leaving }

// Close ends all connections, without another word to anybody.
func (e *Engine) Close() {
	for _, c := range e.conns {
		c.forget()
		c.ended(net.ErrClosed)
	}
	clear(e.services)
	clear(e.datagrams)
}

// Deadline returns when Expire is to be called; 0: there is nothing to wait for.
func (e *Engine) Deadline() time.Duration {
	var at time.Duration
	if len(e.timers) > 0 {
		at = e.timers[0].at
	}
	if len(e.old) > 0 && (at == 0 || e.old[0].at < at) {
		at = e.old[0].at
	}
	return at
}

// Expire does what is due.
func (e *Engine) Expire(now time.Duration) {
	for len(e.timers) > 0 && e.timers[0].at <= now {
		e.timers[0].expire(now)
	}
	for len(e.old) > 0 && (e.old[0].at <= now || e.old[0].state == forgotten) {
		e.forgetOldest()
	}
}

func (e *Engine) forgetOldest() {
	e.old[0].forget()
	e.old[0] = nil
	e.old = e.old[1:]
}

// send sends a message that nothing is remembered of.
func (e *Engine) send(to netip.AddrPort, tid uint64, m roce.CMMessage) {
	roce.PutMAD(e.b[:], tid, m)
	e.cfg.Out.Send(to, &e.b)
}

// newConn makes a connection with a name of its own.
func (e *Engine) newConn(remote netip.AddrPort) *Conn {
	c := &Conn{e: e, remote: remote, timer: -1}
	for c.localID == 0 || e.conns[c.localID] != nil {
		c.localID = e.cfg.Rand()
	}
	e.conns[c.localID] = c
	return c
}

// Receive takes the payload of a datagram that has come to queue pair 1. The UDP port of from is where answers go: that for RoCEv2,
// whatever port the datagram has left from, unless the sender is known to receive elsewhere.
func (e *Engine) Receive(from netip.AddrPort, b []byte, now time.Duration) {
	tid, m, err := roce.DecodeMAD(b)
	if err != nil {
		e.Counters.Malformed++
		return
	}
	switch m := m.(type) {
	case *roce.REQ:
		e.request(from, tid, m, now)
	case *roce.SIDRREQ:
		e.asks(from, tid, m, now)
	case *roce.SIDRREP:
		e.answered(from, m)
	case *roce.REP:
		e.reply(from, tid, m, now)
	case *roce.RTU:
		if c := e.find(from, m.RemoteID, m.LocalID); c != nil && c.state == repSent {
			c.stop()
			c.state = established
			c.h.Established()
		}
	case *roce.MRA:
		e.acknowledged(from, m, now)
	case *roce.REJ:
		e.rejected(from, m, now)
	case *roce.DREQ:
		e.disconnected(from, tid, m, now)
	case *roce.DREP:
		if c := e.find(from, m.RemoteID, m.LocalID); c != nil && c.state == dreqSent {
			c.over(now)
			c.ended(ErrDisconnected)
		}
	}
}

// find returns the connection that a message is about. The peer's name of it may not be known yet: then it is 0.
func (e *Engine) find(from netip.AddrPort, local, remote uint32) *Conn {
	c := e.conns[local]
	if c == nil || c.remote != from || c.remoteID != 0 && c.remoteID != remote {
		e.Counters.Strange++
		return nil
	}
	return c
}

// timers are the connections that something is to be done about in time, as container/heap wants it: the next one first.
type timers []*Conn

func (t timers) Len() int           { return len(t) }
func (t timers) Less(i, j int) bool { return t[i].at < t[j].at }
func (t timers) Swap(i, j int) {
	t[i], t[j] = t[j], t[i]
	t[i].timer, t[j].timer = i, j
}

func (t *timers) Push(x any) {
	c := x.(*Conn)
	c.timer = len(*t)
	*t = append(*t, c)
}

func (t *timers) Pop() any {
	last := len(*t) - 1
	c := (*t)[last]
	(*t)[last] = nil
	*t = (*t)[:last]
	c.timer = -1
	return c
}

// wake has c.expire called when the time has come.
func (c *Conn) wake(at time.Duration) {
	c.at = at
	if c.timer < 0 {
		heap.Push(&c.e.timers, c)
	} else {
		heap.Fix(&c.e.timers, c.timer)
	}
}

// stop undoes wake.
func (c *Conn) stop() {
	if c.timer >= 0 {
		heap.Remove(&c.e.timers, c.timer)
	}
}
