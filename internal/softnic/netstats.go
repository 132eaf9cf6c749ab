package softnic

import (
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/softnic/udp"
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

// add adds o.
func (d *dropCounters) add(o *dropCounters) {
	d.NoQP += o.NoQP
	d.Source += o.Source
	d.PKey += o.PKey
	d.Service += o.Service
	d.QKey += o.QKey
	d.Room += o.Room
	d.State += o.State
	d.Probes += o.Probes
}

// portCounters are sums over ports.
type portCounters struct {
	sock  udp.Counters
	drops dropCounters
	conns connCounters // those that have ended, too
	alive int          // of these, that have not
	ended endCounters
}

// add adds what p has counted; done: nobody uses it any more. It stops the packets of the port for a moment.
func (c *portCounters) add(p *netPort, done bool) {
	p.mu.Lock()
	defer p.unlock()
	c.sock.Add(p.sock.Stats())
	c.drops.add(&p.drops)
	c.conns.addSums(&p.left)
	for _, w := range p.qps {
		c.conns.add(w)
	}
	c.alive += len(p.qps)
	if p.stream != nil {
		c.ended.count(p.stream, done)
	}
}

// port is the sums as observers are told of them.
func (c *portCounters) port(path, address string) observe.Port {
	k := &c.sock
	o := observe.Port{Path: path, Address: address, Sent: k.Sent, Received: k.Received, NotSent: k.NotSent, Full: k.Full, Dropped: map[string]uint64{},
		Ended: c.ended.byWhy(), Conns: c.alive, Total: c.conns.wire()}
	if k.SendErr != nil {
		o.Refusal = k.SendErr.Error()
	}
	drops := c.drops.byVerdict()
	for d := roce.DropShort; d < roce.Drops; d++ {
		drops[observe.Dropped(d)] += k.Dropped[d]
	}
	for v, n := range drops {
		if n > 0 {
			o.Dropped[observe.Verdict(v).Key()] = n
		}
	}
	return o
}

// connCounters are sums over connections.
type connCounters struct {
	req  wire.RequesterCounters
	resp wire.ResponderCounters
	ureq uint64 // packets that UC QPs have sent
	uc   wire.UCResponderCounters
}

// addSums adds o.
func (c *connCounters) addSums(o *connCounters) {
	c.req.Add(&o.req)
	c.resp.Add(&o.resp)
	c.ureq += o.ureq
	c.uc.Add(&o.uc)
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
