package softnic

import (
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
)

// dropCounters say why packets were dropped that are packets, before a connection has seen them.
type dropCounters struct {
	NoQP    uint64 // no such queue pair, or one that is not connected
	Source  uint64 // the connection's peer has another address
	PKey    uint64
	Service uint64 // a packet of another transport service than the QP's
	QKey    uint64
	Room    uint64 // datagrams without a receive, or longer than it, or than the path MTU
	State   uint64 // the QP does not receive
	Probes  uint64 // more than are answered
}

// connCounters are sums over connections.
type connCounters struct {
	req  wire.RequesterCounters
	resp wire.ResponderCounters
	ureq uint64 // packets that UC QPs have sent
	uc   wire.UCResponderCounters
}

// add adds what w has counted. Called with port.mu held, but not the QP's sq.
func (c *connCounters) add(w *wireQP) {
	if w.resp != nil {
		c.resp.Add(&w.resp.Counters)
	}
	if w.uresp != nil {
		c.uc.Add(&w.uresp.Counters)
	}
	w.q.sq.Lock()
	defer w.q.sq.Unlock()
	if w.req != nil {
		c.req.Add(&w.req.Counters)
	}
	if w.ureq != nil {
		c.ureq += w.ureq.Sent
	}
}

// wire is the sums as observers are told of them.
func (c *connCounters) wire() observe.Wire {
	q, r := &c.req, &c.resp
	o := observe.Wire{Again: map[string]uint64{}, RefusedBy: map[string]uint64{},
		Sent: q.Sent + c.ureq, Resent: q.Resent, Single: q.Single, Timeouts: q.Timeouts, SeqNAKs: q.SeqNAKs, RNRNAKs: q.RNRNAKs, Implied: q.Implied, Useless: q.Dropped,
		Received: r.Received + c.uc.Received, Duplicates: r.Duplicates, Early: r.Missed + c.uc.Missed, NotReady: r.NoReceive + c.uc.NoReceive,
		Refused: r.Refused() + c.uc.Refused, Dropped: r.Dropped + c.uc.Dropped - c.uc.Refused - c.uc.NoReceive} // which UC counts as dropped as well
	for why, n := range q.Again {
		if n > 0 {
			o.Again[wire.Reason(why).String()] = n
		}
	}
	for why, n := range map[string]uint64{observe.RefusedInvalid: r.Invalid, observe.RefusedAccess: r.Access, observe.RefusedOperation: r.Operation,
		observe.RefusedSilently: c.uc.Refused} {
		if n > 0 {
			o.RefusedBy[why] = n
		}
	}
	return o
}
