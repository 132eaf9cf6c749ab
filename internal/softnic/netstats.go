package softnic

import (
	"net/netip"

	"github.com/ringside-rdma/ringside/internal/roce"
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

// NetStats are what the NIC has counted at one of its addresses since it was opened there.
type NetStats struct {
	Addr     netip.AddrPort
	Conns    int // RC and UC queue pairs that are connected from here
	Counters []NetCounter
	SendErr  error // why the system has refused to send a packet, the last time; nil: it has not
}

// A NetCounter is how often something has happened.
type NetCounter struct {
	Name  string // as in "drop_icrc": what is dropped before a connection sees it begins with drop
	Value uint64
}

// NetStats returns the counters of all addresses that the NIC has been opened at. It stops the packets of each for a moment.
func (n *NIC) NetStats() []NetStats {
	ports := n.netPorts.Load()
	if ports == nil {
		return nil
	}
	all := make([]NetStats, 0, len(*ports))
	for _, p := range *ports {
		all = append(all, p.stats())
	}
	return all
}

func (p *netPort) stats() NetStats {
	p.mu.Lock()
	defer p.unlock()
	s, d, c := p.sock.Stats(), &p.drops, p.left
	for _, w := range p.qps {
		c.add(w)
	}
	return NetStats{Addr: p.sock.Local(), Conns: len(p.qps), SendErr: s.SendErr, Counters: []NetCounter{
		{"tx_packets", s.Sent}, {"rx_packets", s.Received}, {"tx_refused", s.NotSent}, {"tx_full", s.Full},
		{"drop_short", s.Dropped[roce.DropShort]}, {"drop_version", s.Dropped[roce.DropVersion]},
		{"drop_opcode", s.Dropped[roce.DropOpcode]}, {"drop_padding", s.Dropped[roce.DropPad]},
		{"drop_length", s.Dropped[roce.DropLength]}, {"drop_icrc", s.Dropped[roce.DropICRC]},
		{"drop_no_qp", d.NoQP}, {"drop_source", d.Source}, {"drop_pkey", d.PKey}, {"drop_service", d.Service},
		{"drop_qkey", d.QKey}, {"drop_no_room", d.Room}, {"drop_state", d.State},
		{"req_packets", c.req.Sent}, {"req_resent", c.req.Resent}, {"req_resent_single", c.req.Single}, {"req_timeouts", c.req.Timeouts},
		{"req_seq_naks", c.req.SeqNAKs}, {"req_rnr_naks", c.req.RNRNAKs}, {"req_implied_naks", c.req.Implied},
		{"req_dropped", c.req.Dropped},
		{"resp_packets", c.resp.Received}, {"resp_duplicates", c.resp.Duplicates}, {"resp_out_of_sequence", c.resp.Missed},
		{"resp_no_receive", c.resp.NoReceive}, {"resp_refused_access", c.resp.Access}, {"resp_refused_invalid", c.resp.Invalid},
		{"resp_refused_operation", c.resp.Operation}, {"resp_dropped", c.resp.Dropped},
		{"uc_tx_packets", c.ureq}, {"uc_rx_packets", c.uc.Received}, {"uc_missed", c.uc.Missed}, {"uc_no_receive", c.uc.NoReceive},
		{"uc_refused", c.uc.Refused}, {"uc_dropped", c.uc.Dropped},
	}}
}
