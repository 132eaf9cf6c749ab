package cm

import (
	"encoding/binary"
	"net/netip"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What comes from peers.

// request takes a REQ.
func (e *Engine) request(from netip.AddrPort, tid uint64, m *roce.REQ, now time.Duration) {
	if old := e.requests[requestKey{from: from, guid: m.CAGUID, id: m.LocalID}]; old != nil {
		if old.tid == tid {
			old.asked(now)
			return
		}
		if old.state != over && old.state != refused {
			e.refuse(from, tid, m, roce.RejectStale, nil)
			return
		}
		old.forget() // the peer uses its name of it again
	}
	var hello roce.IPHello
	s := e.services[uint16(m.ServiceID)]
	if reason, info := e.check(from, m, &hello); reason != 0 {
		e.refuse(from, tid, m, reason, info)
		return
	}
	key := qpKey{m.CAGUID, from, m.QPN}
	if old := e.peers[key]; old != nil && (old.state != over || now-old.overAt < timewait) && old.state != refused {
		// The queue pair has a connection: the peer has forgotten it, or is not who it was (IBA 12.9.8.3.1).
		e.refuse(from, tid, m, roce.RejectStale, nil)
		old.Disconnect(now)
		return
	}
	c := e.newConn(from)
	c.state, c.tid, c.request, c.remoteID, c.guid, c.peerQPN = reqReceived, tid, m, m.LocalID, m.CAGUID, m.QPN
	c.local, c.peer = hello.Dst, hello.Src
	c.selective = m.VendorID == Vendor && m.VendorOptions == OptionSelective
	h, reason := s.Request(c)
	if h == nil {
		c.forget()
		e.refuse(from, tid, m, reason, nil)
		return
	}
	c.h = h
	e.requests[c.requestKey()] = c
	e.peers[key] = c
	c.wake(now + c.patience())
}

// check returns why a request cannot be a service's, and what is to be said to that; 0: it can.
func (e *Engine) check(from netip.AddrPort, m *roce.REQ, hello *roce.IPHello) (roce.RejectReason, []byte) {
	local := ib.GIDFromAddr(e.cfg.Local)
	switch {
	case m.LocalID == 0:
		return roce.RejectInvalidCommID, nil
	case m.ServiceID>>16 != uint64(roce.PortSpaceTCP) || e.services[uint16(m.ServiceID)] == nil:
		return roce.RejectInvalidService, nil
	case m.Transport != roce.TransportRC:
		return roce.RejectInvalidTransport, nil
	case m.RemoteGID != local:
		return roce.RejectInvalidGID, local[:]
	case m.LocalGID != ib.GIDFromAddr(from.Addr()):
		return roce.RejectInvalidGID, nil
	case m.QPN <= roce.GSIQP:
		return roce.RejectNoQP, nil
	case m.MTU < ib.MTU256 || m.MTU > e.cfg.MTU:
		return roce.RejectInvalidMTU, []byte{byte(e.cfg.MTU)}
	case hello.Decode(m.Private[:], m.ServiceID) != nil:
		return roce.RejectUnsupported, nil
	case hello.Dst.Addr() != e.cfg.Local || hello.Src.Addr() != from.Addr():
		return roce.RejectInvalidGID, nil
	}
	return 0, nil
}

// refuse refuses a request that is not remembered. The same one is refused again.
func (e *Engine) refuse(to netip.AddrPort, tid uint64, m *roce.REQ, reason roce.RejectReason, info []byte) {
	e.Counters.Refused++
	r := &roce.REJ{RemoteID: m.LocalID, Reason: reason}
	r.InfoLen = uint8(copy(r.Info[:], info))
	e.send(to, tid, r)
}

// asked hears the same request again: it gets the same answer.
func (c *Conn) asked(now time.Duration) {
	switch c.state {
	case reqReceived:
		c.e.send(c.remote, c.tid, &roce.MRA{LocalID: c.localID, RemoteID: c.remoteID, ServiceTimeout: serviceTimeout})
		c.wake(now + timeout(serviceTimeout) + c.patience())
	case repSent, refused:
		c.repeat()
	}
}

// patience is how long the peer goes on asking if it hears nothing.
func (c *Conn) patience() time.Duration {
	m := c.request
	return min(timeout(m.RemoteResponseTimeout)*time.Duration(m.MaxCMRetries+1)+time.Second, maxPatience)
}

// reply takes a REP.
func (e *Engine) reply(from netip.AddrPort, tid uint64, m *roce.REP, now time.Duration) {
	c := e.find(from, m.RemoteID, m.LocalID)
	if c == nil || c.request != nil {
		// What was asked for was given up. The peer does not wait for ever for its confirmation, but less if it is told.
		if c == nil && e.conns[m.RemoteID] == nil {
			e.send(from, tid, &roce.REJ{LocalID: m.RemoteID, RemoteID: m.LocalID, Rejected: 1, Reason: roce.RejectInvalidCommID})
		}
		return
	}
	switch c.state {
	case reqSent:
	case repReceived:
		e.send(from, c.tid, &roce.MRA{LocalID: c.localID, RemoteID: c.remoteID, Received: 1, ServiceTimeout: serviceTimeout})
		return
	case established, refused:
		c.repeat() // the RTU, or why there is none
		return
	default:
		return
	}
	if tid != c.tid || m.LocalID == 0 || m.QPN <= roce.GSIQP {
		e.Counters.Strange++
		return
	}
	c.stop()
	c.remoteID, c.guid, c.peerQPN, c.reply = m.LocalID, m.CAGUID, m.QPN, m
	if old := e.peers[c.qpKey()]; old != nil && old.state != over && old.state != refused {
		c.reject(now, 1, roce.RejectStale, nil)
		c.ended(&RejectError{Reason: roce.RejectStale})
		return
	}
	e.peers[c.qpKey()] = c
	c.state = repReceived
	c.selective = c.selective && m.VendorID == Vendor && m.VendorOptions == OptionSelective
	c.h.Replied(m)
}

// acknowledged takes an MRA: the peer has what was sent, and needs longer.
func (e *Engine) acknowledged(from netip.AddrPort, m *roce.MRA, now time.Duration) {
	c := e.find(from, m.RemoteID, m.LocalID)
	if c != nil && (c.state == reqSent && m.Received == 0 || c.state == repSent && m.Received == 1) {
		c.wake(now + timeout(m.ServiceTimeout))
	}
}

// rejected takes a REJ.
func (e *Engine) rejected(from netip.AddrPort, m *roce.REJ, now time.Duration) {
	var c *Conn
	if m.RemoteID == 0 && m.Reason == roce.RejectTimeout { // the peer has not heard this side's name of the request
		c = e.requests[requestKey{from: from, guid: infoGUID(m), id: m.LocalID}]
	} else {
		c = e.find(from, m.RemoteID, m.LocalID)
	}
	if c == nil {
		return
	}
	switch c.state {
	case reqSent:
		c.stop()
		c.forget()
		c.ended(&RejectError{Reason: m.Reason, Private: m.Private[:]})
	case dreqSent:
		c.over(now)
		c.ended(ErrDisconnected)
	case established:
		if c.request != nil { // the peer has confirmed, and has nothing left to reject
			e.Counters.Strange++
			return
		}
		fallthrough // the peer waits no longer for the confirmation, which was lost or is on its way
	case repReceived, reqReceived, repSent:
		var err error = &RejectError{Reason: m.Reason, Private: m.Private[:]}
		if m.Reason == roce.RejectTimeout {
			err = ErrGivenUp
		}
		c.over(now)
		c.ended(err)
	}
}

// disconnected takes a DREQ. Whether there is such a connection or not: there is none any more.
func (e *Engine) disconnected(from netip.AddrPort, tid uint64, m *roce.DREQ, now time.Duration) {
	if c := e.conns[m.RemoteID]; c != nil && c.remote == from && c.remoteID == m.LocalID {
		if c.qpn != m.RemoteQPN {
			e.Counters.Strange++
			return
		}
		switch c.state {
		case repReceived, repSent, established, dreqSent:
			c.over(now)
			c.ended(ErrDisconnected)
		}
	}
	e.send(from, tid, &roce.DREP{LocalID: m.RemoteID, RemoteID: m.LocalID})
}

// guidInfo writes a node's GUID to what a REJ says.
func guidInfo(info *[72]byte, guid uint64) int {
	binary.BigEndian.PutUint64(info[:], guid)
	return 8
}

func infoGUID(m *roce.REJ) uint64 {
	if m.InfoLen < 8 {
		return 0
	}
	return binary.BigEndian.Uint64(m.Info[:])
}
