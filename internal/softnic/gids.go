package softnic

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// pathUDP is the path of QPs that are connected over a network, pathSim, over one in virtual time.
const (
	pathUDP = "udp"
	pathSim = "sim"
)

// A gidTable holds the NIC's GIDs: at index 0 the one that names it to other NICs of the host, behind it the addresses of the
// host, for RoCEv2 over UDP. An address keeps its index as long as the NIC is open, also if it goes and comes back.
type gidTable struct {
	mu    sync.Mutex
	asked time.Time // when the system was asked
	slots []gidSlot // slot i is at index i+1
	fixed bool      // the addresses are not the system's
}

type gidSlot struct {
	addr   netip.Addr
	mtu    int // of the net device
	netDev string
	there  bool
	port   *netPort // nil: was not needed yet
}

const (
	maxGIDs = 256
	// gidAge is how old what the system has said about addresses may be.
	gidAge = time.Second
)

// refresh asks the system which addresses there are. Called with mu held.
func (t *gidTable) refresh() {
	if t.fixed || !t.asked.IsZero() && time.Since(t.asked) < gidAge {
		return
	}
	t.asked = time.Now()
	for i := range t.slots {
		t.slots[i].there = false
	}
	ifs, err := net.Interfaces()
	if err != nil {
		return
	}
	for _, dev := range ifs {
		if dev.Flags&net.FlagUp == 0 {
			continue
		}
		addrs, _ := dev.Addrs()
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && !p.Addr().IsLinkLocalUnicast() {
				t.found(gidSlot{addr: p.Addr().Unmap(), mtu: dev.MTU, netDev: dev.Name, there: true})
			}
		}
	}
}

func (t *gidTable) found(s gidSlot) {
	for i := range t.slots {
		if old := &t.slots[i]; old.addr == s.addr {
			s.port = old.port
			*old = s
			return
		}
	}
	if len(t.slots) < maxGIDs-1 {
		t.slots = append(t.slots, s)
	}
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

// netPortAt returns the port of the GID at the index, which it opens if it is not open.
func (n *NIC) netPortAt(index int) (*netPort, error) {
	if !n.hasGID(index) || index == 0 {
		return nil, fmt.Errorf("the GID at index %d is no address of this host", index)
	}
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
	n.later(p.attachUDs)
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
