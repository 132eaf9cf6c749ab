package softnic

import (
	"context"
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic/simnet"
	"github.com/ringside-rdma/ringside/internal/softnic/udp"
)

// A simulation is what a NIC on a network in virtual time has instead of goroutines and an address of the host. Whoever polls and
// finds nothing, or would sleep, steps the network, and with it all its NICs: their work that was put off, their retries, what
// their ports receive, and their timers.
type simulation struct {
	net  *simnet.Network
	port *netPort
}

// simMTU is of the simulated net device: packets of the largest path MTU fit.
const simMTU = 4096 + wireOverhead

// OpenSim makes a NIC at an address of a simulated network, which is its GID at index 1. It has no other way to meet NICs.
func OpenSim(network *simnet.Network, addr netip.Addr) (*NIC, error) {
	n := newNIC()
	n.regions.random = network.Uint32
	for i := 0; i < len(n.gid); i += 4 {
		binary.BigEndian.PutUint32(n.gid[i:], network.Uint32())
	}
	n.identify()
	n.regions.init(heapBytes(maxMRs*4), -1)
	p := newNetPort(n, simMTU, netLink(n))
	p.congestion = true
	host, err := network.Attach(addr, func() { p.round() }, n.catchUp)
	if err != nil {
		return nil, err
	}
	p.sock = &simSocket{Host: host}
	close(p.ended) // it has no drive
	n.sim = &simulation{network, p}
	n.gids = gidTable{fixed: true, slots: []gidSlot{{addr: addr, mtu: simMTU, netDev: "sim", there: true, running: true, port: p}}}
	n.netPorts.Store(&[]*netPort{p})
	return n, nil
}

// simSocket is a host of a simulated network. It counts nothing: the network does.
type simSocket struct {
	*simnet.Host
	stats udp.Counters
}

// Peer implements socket. own means nothing: no packet is taken apart on its way.
func (s *simSocket) Peer(to netip.AddrPort, own bool) (netPeer, error) {
	p, err := s.Host.Peer(to)
	if err != nil {
		return nil, err
	}
	return p, nil
}

// TellIP implements socket: it always does.
func (s *simSocket) TellIP(bool) {}

func (s *simSocket) Stats() *udp.Counters { return &s.stats }

// catchUp does what was put off, and reports whether there was anything.
func (n *NIC) catchUp() (some bool) {
	for f, ok := n.work.tryTake(); ok; f, ok = n.work.tryTake() {
		f()
		some = true
	}
	if n.stalled.Load() > 0 {
		n.progressStalled()
	}
	return some
}

// idle is called by who has polled and found nothing.
func (n *NIC) idle() {
	if n.sim != nil {
		n.sim.net.Step()
	}
}

func (n *NIC) newWaker() (waker, error) {
	if n.sim != nil {
		return &simWaker{net: n.sim.net, c: make(chan struct{}, 1)}, nil
	}
	return newWaker()
}

// simWaker is a waker whose sleepers step the network.
type simWaker struct {
	net    *simnet.Network
	c      chan struct{}
	mu     sync.Mutex // orders wakes and close
	closed atomic.Bool
}

func (w *simWaker) wake() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed.Load() {
		return
	}
	select {
	case w.c <- struct{}{}:
	default:
	}
}

func (w *simWaker) wait(ctx context.Context) error {
	err := w.net.Sleep(ctx, w.c)
	if w.closed.Load() {
		return driver.ErrClosed
	}
	return err
}

func (w *simWaker) waitThread() error { return w.wait(context.Background()) }

func (w *simWaker) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closed.Swap(true) {
		close(w.c)
	}
}

func (w *simWaker) fd() int { return -1 }
