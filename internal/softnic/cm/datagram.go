package cm

import (
	"net/netip"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Datagrams have no connections: who wants to send some asks which queue pair takes a service's (IBA 12.11), and that is all. A question,
// on both sides, is a Conn until it is answered.
//
//	active                              passive
//	Resolve     SIDR_REQ ->             Service.Request
//	Resolved     <- SIDR_REP            Conn.Answer

// The most that questions and answers carry for programs, in bytes.
const (
	MaxQuestion = 216 - roce.IPHelloLen
	MaxAnswer   = 136
)

// An Answer says which queue pair takes a service's datagrams, or that none does.
type Answer struct {
	Status  uint8 // as in roce.SIDRREP
	QPN     ib.QPN
	QKey    uint32
	Private []byte // at most MaxAnswer
}

// Statuses of an Answer.
const (
	StatusSuccess     = 0
	StatusUnsupported = 1
	StatusRejected    = 2
)

// ListenDatagrams has s take questions for a port of the space for datagrams, which is not 0.
func (e *Engine) ListenDatagrams(port uint16, s Service) error {
	if e.datagrams[port] != nil {
		return ErrPortInUse
	}
	e.datagrams[port] = s
	return nil
}

// UnlistenDatagrams ends that.
func (e *Engine) UnlistenDatagrams(port uint16) { delete(e.datagrams, port) }

// Resolve asks which queue pair takes the datagrams of the service at peer. The local port is the caller's. h hears of the answer.
func (e *Engine) Resolve(now time.Duration, port uint16, peer netip.AddrPort, private []byte, h Handler) (*Conn, error) {
	if len(private) > MaxQuestion {
		return nil, tooLong("a question", private, MaxQuestion)
	}
	c := e.newConn(netip.AddrPortFrom(peer.Addr(), roce.Port))
	c.h, c.state, c.peer, c.local = h, asking, peer, netip.AddrPortFrom(e.cfg.Local, port)
	c.tid = uint64(e.cfg.Rand())<<32 | uint64(c.localID)
	m := &roce.SIDRREQ{RequestID: c.localID, PKey: roce.DefaultPKey, ServiceID: roce.PortSpaceUDP.ServiceID(peer.Port())}
	(&roce.IPHello{Src: c.local, Dst: peer}).Put(m.Private[:])
	copy(m.Private[roce.IPHelloLen:], private)
	c.send(now, c.tid, m, timeout(responseTimeout), maxRetries)
	return c, nil
}

// Question is what the peer has asked; nil: it is no question.
func (c *Conn) Question() *roce.SIDRREQ { return c.question }

// Answer answers a question. Nothing is heard of it any more.
func (c *Conn) Answer(now time.Duration, a *Answer) error {
	if len(a.Private) > MaxAnswer {
		return tooLong("an answer", a.Private, MaxAnswer)
	}
	if c.state != asked {
		return ErrGivenUp
	}
	c.h = nil
	m := &roce.SIDRREP{RequestID: c.remoteID, Status: a.Status, QPN: uint32(a.QPN), QKey: a.QKey, ServiceID: c.question.ServiceID}
	copy(m.Private[:], a.Private)
	c.once(c.tid, m)
	c.keep(now, refused)
	return nil
}

// questionPatience is how long a question waits for its answer. Who asks does not say how long it does.
const questionPatience = time.Minute

// asks takes a SIDR_REQ.
func (e *Engine) asks(from netip.AddrPort, tid uint64, m *roce.SIDRREQ, now time.Duration) {
	key := requestKey{from: from, id: m.RequestID, datagram: true}
	if old := e.requests[key]; old != nil {
		if old.tid == tid {
			if old.state == refused {
				old.repeat()
			}
			return
		}
		if old.state == asked {
			return
		}
		old.forget()
	}
	var hello roce.IPHello
	s := e.datagrams[uint16(m.ServiceID)]
	status := uint8(StatusUnsupported)
	if m.ServiceID>>16 == uint64(roce.PortSpaceUDP) && s != nil && hello.Decode(m.Private[:], m.ServiceID) == nil &&
		hello.Dst.Addr() == e.cfg.Local && hello.Src.Addr() == from.Addr() {
		c := e.newConn(from)
		c.state, c.tid, c.question, c.remoteID, c.local, c.peer = asked, tid, m, m.RequestID, hello.Dst, hello.Src
		h, _ := s.Request(c)
		if h != nil {
			c.h = h
			e.requests[key] = c
			c.wake(now + questionPatience)
			return
		}
		c.forget()
		status = StatusRejected
	}
	e.Counters.Refused++
	e.send(from, tid, &roce.SIDRREP{RequestID: m.RequestID, ServiceID: m.ServiceID, Status: status})
}

// answered takes a SIDR_REP.
func (e *Engine) answered(from netip.AddrPort, m *roce.SIDRREP) {
	c := e.conns[m.RequestID]
	if c == nil || c.remote != from || c.state != asking {
		e.Counters.Strange++
		return
	}
	c.stop()
	c.forget()
	if h := c.h; h != nil {
		c.h = nil
		h.Resolved(m)
	}
}
