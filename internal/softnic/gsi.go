package softnic

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/cm"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A gsi is queue pair 1 of a netPort: the connection manager's. There is one once somebody has used it, here or a peer. Guarded by
// the port's mu.
type gsi struct {
	port   *netPort
	engine *cm.Engine
	psn    ib.PSN
}

// openGSI returns the port's queue pair 1. Called with mu held.
func (p *netPort) openGSI() *gsi {
	if p.gsi == nil {
		g := &gsi{port: p}
		g.engine = cm.New(cm.Config{Local: p.sock.Local().Addr(), GUID: p.nic.guid, MTU: wireMTU(p.mtu), Rand: rand.Uint32, Out: g})
		p.gsi = g
	}
	return p.gsi
}

// gsiFor reports whether a stranger finds queue pair 1: where peers look for it, it is there from the first of them on; elsewhere, once it
// was used here, for others at the own address. Called with mu held.
func (p *netPort) gsiFor(src netip.AddrPort) bool {
	if at := p.sock.Local(); at.Port() != roce.Port {
		return p.gsi != nil && src.Addr() == at.Addr()
	}
	p.openGSI()
	return true
}

// receiveMAD takes a packet to queue pair 1. Called with mu held.
func (p *netPort) receiveMAD(src netip.AddrPort, pkt *roce.Packet) {
	switch g := p.gsi; {
	case pkt.QKey != roce.GSIQKey:
		p.drops.QKey++
	case pkt.SrcQP != roce.GSIQP:
		p.drops.Source++
	default:
		g.engine.Receive(p.managerOf(src), pkt.Payload, p.now)
	}
}

// managerOf is where the answers to a datagram go: to the port where connection managers look for each other, whatever port the datagram
// has left from. What comes from the own address can only be another software NIC's, which had to take another port, and sends from
// there.
func (p *netPort) managerOf(src netip.AddrPort) netip.AddrPort {
	if src.Addr() == p.sock.Local().Addr() && src != p.sock.Local() {
		return src
	}
	return netip.AddrPortFrom(src.Addr(), roce.Port)
}

// expire does what is due.
func (g *gsi) expire() {
	if at := g.engine.Deadline(); at != 0 && at <= g.port.now {
		g.engine.Expire(g.port.now)
	}
}

// Send implements cm.Output. What the socket has no room for is lost, as it could be on the way.
func (g *gsi) Send(to netip.AddrPort, b *[roce.MADLen]byte) {
	sock := g.port.sock
	peer, err := sock.Peer(to, false)
	if err != nil {
		return
	}
	pkt := &g.port.pkt
	*pkt = roce.Packet{Opcode: roce.Op(roce.UD, roce.SendOnly), PKey: roce.DefaultPKey, DestQP: roce.GSIQP, PSN: g.psn, QKey: roce.GSIQKey, SrcQP: roce.GSIQP}
	out := output{netPeer: peer, port: g.port}
	payload, ok := peer.Packet(pkt, roce.MADLen)
	if !ok {
		return
	}
	g.psn = g.psn.Add(1)
	copy(payload, b[:])
	out.Commit()
}

// manage has f do something with the connection manager.
func (p *netPort) manage(f func(e *cm.Engine, now time.Duration) error) error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return driver.ErrClosed
	}
	p.now = p.sock.Now()
	err := f(p.openGSI().engine, p.now)
	p.sock.Flush()
	p.wakeInTime()
	p.unlock()
	return err
}

// linger is how long the NIC's end waits for peers to hear of the end of their connections.
const linger = 500 * time.Millisecond

// sayGoodbye waits for that.
func (p *netPort) sayGoodbye(until time.Time) {
	for pause := 100 * time.Microsecond; time.Now().Before(until); pause = min(2*pause, 10*time.Millisecond) {
		p.mu.Lock()
		left := p.gsi != nil && p.gsi.engine.Leaving() > 0
		p.unlock()
		if !left {
			return
		}
		time.Sleep(pause)
	}
}

// cmPort returns the port of an address for the connection manager, and the index of the GID.
func (n *NIC) cmPort(a netip.Addr) (*netPort, int, error) {
	p, index, err := n.gsiPort(a)
	if err != nil {
		return nil, 0, err
	}
	if p.sock.Local().Port() != roce.Port {
		return nil, 0, fmt.Errorf("%w: UDP port %d at %v, where connection managers look for each other, belongs to another process or software NIC "+
			"(the kernel's rxe has it on all addresses): use another address, or end who has it and open the device again: %w",
			driver.ErrUnreachable, roce.Port, a, syscall.EADDRINUSE)
	}
	return p, index, nil
}

// gsiPort is cmPort, whichever UDP port the port has.
func (n *NIC) gsiPort(a netip.Addr) (*netPort, int, error) {
	index := n.gids.indexOf(a)
	if index == 0 {
		return nil, 0, fmt.Errorf("%w: %v is none of this software NIC's addresses, which are those of the host's interfaces but for link-local ones",
			driver.ErrUnreachable, a)
	}
	p, err := n.netPortAt(index)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", driver.ErrUnreachable, err)
	}
	return p, index, nil
}

// A CMPort is the connection manager at one of the NIC's addresses, for those who connect their queue pairs themselves: CMDial and
// CMListen do both. It is valid as long as the NIC is open.
type CMPort struct {
	port *netPort
	gid  int
}

// CMPort returns the connection manager at an address. The error matches driver.ErrUnreachable.
func (n *NIC) CMPort(a netip.Addr) (CMPort, error) {
	p, index, err := n.gsiPort(a)
	return CMPort{p, index}, err
}

// Standard reports whether it has the UDP port where connection managers look for each other. Without, nobody finds it, and it can only
// ask who has that port at the same address, if that is a software NIC.
func (p CMPort) Standard() bool { return p.port.sock.Local().Port() == roce.Port }

// Addr is the address.
func (p CMPort) Addr() netip.Addr { return p.port.sock.Local().Addr() }

// GIDIndex is the index of the address in the table of GIDs.
func (p CMPort) GIDIndex() int { return p.gid }

// MTU is the largest path MTU that the net device has room for.
func (p CMPort) MTU() ib.MTU { return wireMTU(p.port.mtu) }

// Manage has f do something with the connection manager, now. Services and handlers of the Engine are called with the locks held that
// f is called with, by whoever moves the NIC's packets: neither may wait, nor call the NIC.
func (p CMPort) Manage(f func(e *cm.Engine, now time.Duration) error) error { return p.port.manage(f) }

// indexOf returns the index of an address; 0: there is none.
func (t *gidTable) indexOf(a netip.Addr) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.refresh()
	for i, s := range t.slots {
		if s.there && s.addr == a.Unmap() {
			return i + 1
		}
	}
	return 0
}

// addresses returns all of a family, or all.
func (t *gidTable) addresses(all, v4 bool) (list []netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.refresh()
	for _, s := range t.slots {
		if s.there && (all || s.addr.Is4() == v4) {
			list = append(list, s.addr)
		}
	}
	return list
}
