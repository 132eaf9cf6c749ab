package softnic

import (
	"net/netip"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What observers see of packets on a network.

// tapSent shows them the packet that has been committed to o. Called with the port's mu held.
func (o *output) tapSent(l taps) {
	pkt := o.netPeer.Last()
	r := observe.Record{Time: time.Now().UnixNano(), Out: true, Src: o.port.sock.Local(), Dst: o.netPeer.Addr(), IP: o.netPeer.IP(), Length: len(pkt)}
	if w := o.w; w != nil {
		r.QPN, r.PeerQPN = uint32(w.q.qpn), w.cfg.DestQP
		if w.req != nil && !roce.Opcode(pkt[0]).IsResponse() {
			r.Again = w.req.Again()
		}
	} else {
		r.QPN, r.PeerQPN = o.port.pkt.SrcQP, o.port.pkt.DestQP
	}
	l.put(&r, pkt)
}

// findTapped is find, and shows observers the packet if nobody expects it.
func (p *netPort) findTapped(l taps, src netip.AddrPort, pkt *roce.Packet) bool {
	drops := p.drops.byVerdict()
	found := p.find(src, pkt)
	if !found {
		p.show(l, src, pkt, p.drops.since(drops))
	}
	return found
}

// acceptTapped is accept, and shows observers the packet and what became of it.
func (p *netPort) acceptTapped(l taps, src netip.AddrPort, pkt *roce.Packet) {
	w := p.conn
	var was met
	if w != nil {
		was = w.met()
	}
	drops := p.drops.byVerdict()
	p.accept(src, pkt)
	v := p.drops.since(drops)
	if w != nil && v == observe.Taken {
		v = was.verdict(w.met())
	}
	p.show(l, src, pkt, v)
}

// show shows observers a packet that was received, as it came: the invariant CRC of one that nobody expects was not looked at. Called with
// mu held.
func (p *netPort) show(l taps, src netip.AddrPort, pkt *roce.Packet, v observe.Verdict) {
	r := observe.Record{Time: time.Now().UnixNano(), Src: src, Dst: p.sock.Local(), QPN: pkt.DestQP, IP: pkt.IP, Verdict: v}
	if pkt.Opcode.Service() == roce.UD {
		r.PeerQPN = pkt.SrcQP
	} else if w := p.qps[ib.QPN(pkt.DestQP)]; w != nil {
		r.PeerQPN = w.cfg.DestQP
	}
	b := p.received()
	r.Length = len(b)
	r.Marked = pkt.FECN && !roce.FECN(b)
	l.put(&r, b)
}

// received is the packet that is being received, as it came. Called with mu held.
func (p *netPort) received() []byte {
	if p.faults != nil && p.faults.came != nil {
		return p.faults.came
	}
	return p.sock.Received()
}

// tapNone shows observers what was received and is no packet. Called with mu held.
func (p *netPort) tapNone(src netip.AddrPort, b []byte, d roce.Drop) {
	if l := p.nic.taps.Load(); l != nil && len(b) <= observe.MaxData {
		l.put(&observe.Record{Time: time.Now().UnixNano(), Src: src, Dst: p.sock.Local(), Verdict: observe.Dropped(d), Length: len(b)}, b)
	}
}

// byVerdict is the counters as observers call them.
func (d *dropCounters) byVerdict() (n [observe.Verdicts]uint64) {
	n[observe.NoQP], n[observe.Stranger], n[observe.PKey], n[observe.Service] = d.NoQP, d.Source, d.PKey, d.Service
	n[observe.QKey], n[observe.NoRoom], n[observe.State], n[observe.Probes] = d.QKey, d.Room, d.State, d.Probes
	return n
}

// since is why the last packet was dropped, if it was, since the counters were before.
func (d *dropCounters) since(before [observe.Verdicts]uint64) observe.Verdict {
	for v, n := range d.byVerdict() {
		if n != before[v] {
			return observe.Verdict(v)
		}
	}
	return observe.Taken
}

// met is how often a connection has had something to say against a packet.
type met struct {
	resp    wire.ResponderCounters
	useless uint64
}

// met returns what the connection has met. Called with the port's mu held.
func (w *wireQP) met() (m met) {
	if w.resp != nil {
		m.resp = w.resp.Counters
	}
	w.q.sq.Lock()
	if w.req != nil {
		m.useless = w.req.Counters.Dropped
	}
	w.q.sq.Unlock()
	if w.uresp != nil {
		m.useless += w.uresp.Counters.Dropped
	}
	return m
}

// verdict is on the packet that came between m and now.
func (m *met) verdict(now met) observe.Verdict {
	switch was, is := &m.resp, &now.resp; {
	case is.Refused() != was.Refused():
		return observe.Refused
	case is.NoReceive != was.NoReceive:
		return observe.NotReady
	case is.Duplicates != was.Duplicates:
		return observe.Duplicate
	case is.Missed != was.Missed:
		return observe.Early
	case is.Dropped != was.Dropped, now.useless != m.useless:
		return observe.Useless
	}
	return observe.Taken
}
