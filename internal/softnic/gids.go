package softnic

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// pathUDP is the path of QPs that are connected over a network, pathSim, over one in virtual time, pathTCP, over a stream.
const (
	pathUDP = "udp"
	pathSim = "sim"
	pathTCP = "tcp"
)

// A gidTable holds the NIC's GIDs: at index 0 the one that names it to other NICs of the host, behind it the addresses of the
// host, for RoCEv2 over UDP. An address keeps its index as long as the NIC is open, also if it goes and comes back.
type gidTable struct {
	mu    sync.Mutex
	asked time.Time // when the system was asked
	slots []gidSlot // slot i is at index i+1
	fixed bool      // the addresses are not the system's

	system func() (list []gidSlot, down map[string]bool, err error) // hostAddrs, but in tests
	raise  func(ib.EventType)                                       // is told of what has changed
}

type gidSlot struct {
	addr    netip.Addr
	mtu     int // of the net device
	netDev  string
	there   bool      // the address can be used: its net device is up
	running bool      // and connected to something
	port    *netPort  // nil: was not needed yet
	gone    time.Time // since when the address is no net device's any more; zero: it is one's
}

const (
	maxGIDs = 256
	// gidAge is how old what the system has said about addresses may be.
	gidAge = time.Second
	// gidGrace is how long an address may be gone before the connections from it are: it may be about to be given to the host again.
	gidGrace = time.Second
)

// hostAddrs returns the addresses of the host's net devices, and which of these are down.
func hostAddrs() (list []gidSlot, down map[string]bool, err error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return nil, nil, err
	}
	return addrsOf(ifs, (*net.Interface).Addrs)
}

// addrsOf is hostAddrs for some net devices. What the system has said of some is not told without the rest: that would be gone.
func addrsOf(ifs []net.Interface, addrs func(*net.Interface) ([]net.Addr, error)) (list []gidSlot, down map[string]bool, err error) {
	down = map[string]bool{}
	for _, dev := range ifs {
		up := dev.Flags&net.FlagUp != 0
		if !up {
			down[dev.Name] = true
		}
		has, err := addrs(&dev)
		if err != nil {
			return nil, nil, fmt.Errorf("addresses of %s: %w", dev.Name, err)
		}
		for _, a := range has {
			if p, err := netip.ParsePrefix(a.String()); err == nil && !p.Addr().IsLinkLocalUnicast() {
				list = append(list, gidSlot{addr: p.Addr().Unmap(), mtu: dev.MTU, netDev: dev.Name, there: up, running: up && dev.Flags&net.FlagRunning != 0})
			}
		}
	}
	return list, down, nil
}

// refresh asks the system which addresses there are, if what it has said is too old. Called with mu held.
func (t *gidTable) refresh() {
	if t.asked.IsZero() || time.Since(t.asked) >= gidAge {
		t.look(time.Now())
	}
}

// neighbour reports whether g is a unique local address of a site (RFC 4193, 3.1: its first 48 bits) that one of the table's is of.
func (t *gidTable) neighbour(g ib.GID) bool {
	if g[0] != softGID {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.refresh()
	return slices.ContainsFunc(t.slots, func(s gidSlot) bool {
		a := s.addr.As16()
		return s.addr.Is6() && [6]byte(a[:]) == [6]byte(g[:])
	})
}

// look asks the system which addresses there are, and tells of what has changed. false: the system has not said, and all is as it was.
// Called with mu held.
func (t *gidTable) look(now time.Time) bool {
	if t.fixed {
		return true
	}
	list, down, err := t.system()
	if err != nil {
		return false
	}
	first, state, was := t.asked.IsZero(), t.state(), slices.Clone(t.slots)
	t.asked = now
	for i := range t.slots {
		s := &t.slots[i]
		s.there, s.running = false, false
		if !down[s.netDev] && s.gone.IsZero() { // a device that is down may have kept its addresses, or not: IPv6 takes them away
			s.gone = now
		}
	}
	for _, s := range list {
		t.found(s)
	}
	if first {
		return true
	}
	if !slices.EqualFunc(was, t.slots, func(a, b gidSlot) bool { return a.there == b.there }) {
		t.raise(ib.EventGIDChange)
	}
	switch s := t.state(); {
	case s == state:
	case s == ib.PortActive:
		t.raise(ib.EventPortActive)
	default:
		t.raise(ib.EventPortErr)
	}
	return true
}

// found takes an address that the system has. Of several net devices that have it, one that is up counts, first of all one that is
// connected to something, and of two such the one with the smaller MTU, as packets may go there.
func (t *gidTable) found(s gidSlot) {
	for i := range t.slots {
		if old := &t.slots[i]; old.addr == s.addr {
			worse := !s.there || old.running && !s.running || old.running == s.running && s.mtu >= old.mtu
			if old.there && worse { // it was found on another already
				return
			}
			s.port = old.port
			*old = s
			return
		}
	}
	if s.there && len(t.slots) < maxGIDs-1 {
		t.slots = append(t.slots, s)
	}
}

// state is that of the NIC's port: it is down when all net devices that the NIC is in use on are. Through memory, the NIC is reached
// nevertheless. Called with mu held.
func (t *gidTable) state() ib.PortState {
	used := false
	for i := range t.slots {
		if s := &t.slots[i]; s.port != nil {
			if used = true; s.running {
				return ib.PortActive
			}
		}
	}
	if used {
		return ib.PortDown
	}
	return ib.PortActive
}

// portState is state as of now.
func (t *gidTable) portState() ib.PortState {
	t.mu.Lock()
	defer t.mu.Unlock()
	if slices.ContainsFunc(t.slots, func(s gidSlot) bool { return s.port != nil }) {
		t.refresh()
	}
	return t.state()
}

// lookAtNet looks at the addresses, and ends the connections from those that are gone for good. It returns when it is to be called again,
// whatever the system announces until then; the zero time: there is no need.
func (n *NIC) lookAtNet(now time.Time) (next time.Time) {
	t := &n.gids
	t.mu.Lock()
	if !t.look(now) { // what was gone may be back
		t.mu.Unlock()
		return now.Add(gidAge)
	}
	var over []*netPort
	for i := range t.slots {
		switch s := &t.slots[i]; {
		case s.port == nil || s.gone.IsZero():
		case now.Sub(s.gone) >= gidGrace:
			over = append(over, s.port)
		case next.IsZero() || s.gone.Add(gidGrace).Before(next):
			next = s.gone.Add(gidGrace)
		}
	}
	t.mu.Unlock()
	for _, p := range over {
		p.abandon()
	}
	return next
}

// abandon ends the reliable connections from the port's address, which is the host's no more.
func (p *netPort) abandon() {
	p.mu.Lock()
	for _, w := range p.qps {
		if w.resp != nil {
			w.abandon()
		}
	}
	p.unlock()
}

// list returns the table; own is the GID at index 0.
func (t *gidTable) list(own ib.GID) []ib.GIDEntry {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.refresh()
	l := []ib.GIDEntry{{GID: own, Type: ib.GIDSoft, PortNum: 1}}
	for i, s := range t.slots {
		if s.there {
			l = append(l, ib.GIDEntry{Index: i + 1, GID: s.addr.As16(), Type: ib.GIDRoCEv2, NetDev: s.netDev, PortNum: 1, MTU: wireMTU(s.mtu)})
		}
	}
	return l
}

// hasGID reports whether there is a GID at the index.
func (n *NIC) hasGID(index int) bool {
	if index == 0 {
		return true
	}
	n.gids.mu.Lock()
	defer n.gids.mu.Unlock()
	n.gids.refresh()
	return index > 0 && index <= len(n.gids.slots) && n.gids.slots[index-1].there
}

// netPortAt returns the port of the GID at the index, which it opens if it is not open. All UD QPs that receive do so there when it returns:
// who has an address may send, and be answered. No UD QP's cfg may be held.
func (n *NIC) netPortAt(index int) (*netPort, error) {
	n.followNet()
	if !n.hasGID(index) || index == 0 {
		return nil, fmt.Errorf("the GID at index %d is no address of this host", index)
	}
	p, err := n.gidPort(index)
	if err == nil {
		p.attach.Do(p.attachUDs)
	}
	return p, err
}

// gidPort is netPortAt, less UD QPs.
func (n *NIC) gidPort(index int) (*netPort, error) {
	n.gids.mu.Lock()
	defer n.gids.mu.Unlock()
	s := &n.gids.slots[index-1]
	if s.port != nil {
		return s.port, nil
	}
	p, err := openPort(n, s.addr, s.mtu)
	if err != nil {
		return nil, err
	}
	s.port = p
	var all []*netPort
	if old := n.netPorts.Load(); old != nil {
		all = append(all, *old...)
	}
	all = append(all, p)
	n.netPorts.Store(&all)
	return p, nil
}

// UDPPort implements driver.UDPPorter.
func (n *NIC) UDPPort(port uint8, index int) (uint16, error) {
	if port != 1 {
		return 0, errPort(port)
	}
	p, err := n.netPortAt(index)
	if err != nil {
		return 0, err
	}
	return p.sock.Local().Port(), nil
}
