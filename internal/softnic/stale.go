package softnic

import (
	"net/netip"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A reliable queue pair answers to one other. So once a connection to a queue pair has heard of it, an older one to the same queue
// pair is over: the peer's process has died, and another one has come back and got the same numbers. Whoever only receives would
// never find out. (Connection managers call it stale, IBA 12.9.8.3.1, and go by what a request says. Here it takes a packet that
// fits the new connection's PSNs: nobody can end others' connections by claiming their queue pairs.)

// A peerQP is a queue pair of a peer.
type peerQP struct {
	at  netip.AddrPort
	qpn uint32
}

func (w *wireQP) peerQP() peerQP { return peerQP{w.out.Addr(), w.cfg.DestQP} }

// join adds a connection to the port's. Called with mu held.
func (p *netPort) join(w *wireQP) {
	p.qps[w.q.qpn] = w
	p.users.Add(1)
	if w.resp != nil {
		w.older = p.newest[w.peerQP()]
		p.newest[w.peerQP()] = w
	}
}

// leave undoes join. Called with mu held.
func (p *netPort) leave(w *wireQP) {
	delete(p.qps, w.q.qpn)
	p.users.Add(-1)
	k := w.peerQP()
	switch x := p.newest[k]; {
	case x == nil:
	case x == w && w.older == nil:
		delete(p.newest, k)
	case x == w:
		p.newest[k] = w.older
	default:
		for ; x != nil; x = x.older {
			if x.older == w {
				x.older = w.older
			}
		}
	}
	w.older = nil
}

// heard reports whether the peer has answered a request of this connection, or has made one. Called with port.mu held.
func (w *wireQP) heard() bool {
	if w.resp.Begun() {
		return true
	}
	w.q.sq.Lock()
	defer w.q.sq.Unlock()
	return w.req != nil && w.req.Heard()
}

// outdate ends the older connections to the peer's queue pair. Called with port.mu held.
func (w *wireQP) outdate() {
	for x := w.older; x != nil; x = x.older {
		x.abandon()
	}
	w.older = nil
}

// abandon ends the connection, on the NIC's worker: the peer has gone. The oldest request ends as one that nobody has answered for
// long enough.
func (w *wireQP) abandon() {
	q := w.q
	q.nic.later(func() {
		q.cfg.Lock()
		defer q.cfg.Unlock()
		q.sq.Lock()
		if q.wire != w || !connected(ib.QPState(q.state.Load())) {
			q.sq.Unlock()
			return
		}
		q.unanswered()
		q.sq.Unlock()
		q.toErrorLocked(ib.EventQPFatal, true)
	})
}

// connected reports whether a QP in that state can have a peer.
func connected(s ib.QPState) bool { return s == ib.RTR || s == ib.RTS || s == ib.SQD || s == ib.SQE }

// unanswered ends the request under way with RETRY_EXC_ERR, because the peer has gone. If there is none, the next that is posted ends
// so. What a requester on a network has been given is for it to end, so that it ends, too. Called with sq held, before the QP goes to ERR.
func (q *QP) unanswered() {
	switch w := q.wire; {
	case q.pendLen == 0 || !q.sending():
		q.lost = q.typ == ib.RC && ib.QPState(q.state.Load()) == ib.RTS
	case w != nil && w.given > 0:
		w.req.Fail(ib.WCRetryExceeded)
	default:
		q.completePending(ib.WCRetryExceeded, 0)
	}
}
