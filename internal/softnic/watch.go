package softnic

import (
	"io"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// watch is the observers of a NIC: their connections.
type watch struct {
	mu     sync.Mutex
	closed bool
	conns  map[io.Closer]bool
	wg     sync.WaitGroup // of those that were called, and did not call
}

// Counters returns what observers are told: see observe.NIC.
func (n *NIC) Counters() *observe.NIC {
	c := &observe.NIC{Device: deviceName, GID: n.gid.String(), Ports: []observe.Port{}, QPs: []observe.QP{}}
	if ports := n.netPorts.Load(); ports != nil {
		for _, p := range *ports {
			c.Ports = append(c.Ports, p.counters())
		}
	}
	if p, some := n.streams.counters(); some {
		c.Ports = append(c.Ports, p)
	}
	n.eachQP(func(q *QP) { c.QPs = append(c.QPs, q.counters()) })
	slices.SortFunc(c.QPs, func(a, b observe.QP) int { return int(a.QPN) - int(b.QPN) })
	return c
}

// counters stops the packets of the port for a moment.
func (p *netPort) counters() observe.Port {
	var c portCounters
	c.add(p, false)
	return c.port(p.path(), p.sock.Local().String())
}

func (q *QP) counters() observe.QP {
	c := observe.QP{QPN: uint32(q.qpn), Type: q.typ.String()}
	q.rcq.mu.Lock()
	c.Receives = q.got
	if q.srq == nil {
		c.ReceiveRoom = int(atomic.LoadUint32(&q.posted) - atomic.LoadUint32(&q.head))
	}
	q.rcq.mu.Unlock()
	q.sq.Lock()
	w := q.wire
	c.State, c.Requests, c.Waiting, c.RNR, c.PeerQPN = ib.QPState(q.state.Load()).String(), q.done, int(q.pendLen), q.rnrs, uint32(q.attr.DestQPN)
	if q.link != nil {
		c.Path, c.Peer = q.link.path, q.link.peer.String()
	}
	q.sq.Unlock()
	if w != nil {
		c.Path, c.Peer, c.Wire = w.path(), w.out.Addr().String(), w.counters()
		c.RNR += c.Wire.RNRNAKs
	}
	return c
}

// counters returns what the connection has sent and met.
func (w *wireQP) counters() *observe.Wire {
	w.port.mu.Lock()
	defer w.port.unlock()
	var c connCounters
	c.add(w)
	o := c.wire()
	return &o
}
