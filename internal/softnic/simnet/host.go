package simnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
)

// batch is how many packets can be committed before they have to be flushed, as on a UDP socket.
const batch = 128

// A Host is one address of a Network, and the socket of one NIC there. But for Local, Now, SetDeadline and Close it is for one
// goroutine at a time.
type Host struct {
	net   *Network
	local netip.AddrPort
	tx    []outgoing
	pkt   roce.Packet
	came  []byte // what pkt was decoded from
	flows map[netip.AddrPort]*roce.ICRC

	// What Step calls: to receive and to look at timers, and to do what was put off.
	turn func()
	work func() bool

	// Guarded by net.mu.
	inbox  []datagram
	wakeAt time.Duration
	closed bool
}

type datagram struct {
	src netip.AddrPort
	ip  roce.IP
	b   []byte
}

// outgoing is a packet that waits for a Flush.
type outgoing struct {
	to        netip.AddrPort
	ip        roce.IP
	b, traced []byte // traced: what of it the checksum of the network covers
	kept      bool   // nothing happens to it
}

// Attach takes an address. turn is called when packets have come or the deadline has; work, which reports whether there was any,
// before time passes. Both are called by whoever steps, with no lock held.
func (n *Network) Attach(addr netip.Addr, turn func(), work func() bool) (*Host, error) {
	h := &Host{net: n, local: netip.AddrPortFrom(addr, roce.Port), flows: map[netip.AddrPort]*roce.ICRC{}, wakeAt: never, turn: turn, work: work}
	n.mu.Lock()
	defer n.mu.Unlock()
	if !addr.IsValid() || addr.IsUnspecified() || addr.IsMulticast() {
		return nil, fmt.Errorf("simnet: %v is not the address of a host", addr)
	}
	if slices.ContainsFunc(n.hosts, func(o *Host) bool { return o.local == h.local }) {
		return nil, fmt.Errorf("simnet: %v is taken", addr)
	}
	n.hosts = append(slices.Clone(n.hosts), h)
	return h, nil
}

// Close leaves the network. What is on its way to the host arrives nowhere.
func (h *Host) Close() error {
	n := h.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if h.closed {
		return net.ErrClosed
	}
	h.closed = true
	n.hosts = slices.DeleteFunc(slices.Clone(n.hosts), func(o *Host) bool { return o == h })
	h.wakeAt, h.inbox = never, nil
	return nil
}

// Local returns the host's address, and the standard UDP port.
func (h *Host) Local() netip.AddrPort { return h.local }

// Now returns the network's time.
func (h *Host) Now() time.Duration { return h.net.Now() }

// SetDeadline sets when the host's turn comes if no packet does.
func (h *Host) SetDeadline(at time.Duration) {
	h.net.mu.Lock()
	h.wakeAt = at
	h.net.news()
	h.net.mu.Unlock()
}

// Wait refuses: nobody waits for a Host, its turn comes.
func (h *Host) Wait() error { return errors.ErrUnsupported }

// Queued returns how many packets wait for a Flush.
func (h *Host) Queued() int { return len(h.tx) }

// Room returns how many packets can be committed before a Flush is needed.
func (h *Host) Room() int { return batch - len(h.tx) }

// Flush sends what was committed.
func (h *Host) Flush() bool {
	if len(h.tx) == 0 {
		return true
	}
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	for i := range h.tx {
		o := &h.tx[i]
		if !h.closed {
			h.net.send(h.local, o)
		}
	}
	h.tx = h.tx[:0]
	return true
}

// Receive hands fn the packets that have arrived, which may use them until it returns.
func (h *Host) Receive(fn func(netip.AddrPort, *roce.Packet)) (packets int, more bool, err error) {
	h.net.mu.Lock()
	list := h.inbox
	h.inbox = nil
	h.net.mu.Unlock()
	for _, d := range list {
		b, err := h.flow(d.src).Split(d.b, false)
		if err == nil {
			err = h.pkt.Decode(b)
		}
		if err != nil {
			h.net.mu.Lock()
			h.net.count.Refused++
			h.net.mu.Unlock()
			continue
		}
		h.pkt.IP = d.ip
		h.came = d.b
		fn(d.src, &h.pkt)
	}
	return len(list), false, nil
}

// Received returns, within the fn of Receive, the packet that it is called with as it came.
func (h *Host) Received() []byte { return h.came }

// flow returns what checks packets from src.
func (h *Host) flow(src netip.AddrPort) *roce.ICRC {
	f := h.flows[src]
	if f == nil {
		f = new(roce.ICRC)
		f.Init(src, h.local)
		h.flows[src] = f
	}
	return f
}

// Peer returns where packets for an address go.
func (h *Host) Peer(to netip.AddrPort) (*Peer, error) {
	a := netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if a.Addr().Is4() != h.local.Addr().Is4() || a.Port() == 0 || a.Addr().IsUnspecified() {
		return nil, fmt.Errorf("simnet: packets do not go from %v to %v", h.local, to)
	}
	p := &Peer{host: h, addr: a}
	p.SetIP(0, 0)
	p.icrc.Init(h.local, a)
	return p, nil
}

// A Peer is where packets go. It is a wire.Output.
type Peer struct {
	host   *Host
	addr   netip.AddrPort
	ip     roce.IP
	icrc   roce.ICRC
	head   [roce.MaxHeaderLen]byte // without addresses of memory
	b      []byte                  // of the packet that is being made
	header int                     // its length
	kept   bool
}

// Packet implements wire.Output.
func (p *Peer) Packet(h *roce.Packet, n int) ([]byte, bool) {
	if p.host.Room() == 0 {
		return nil, false
	}
	b := make([]byte, roce.MaxHeaderLen+n+roce.Pad(n)+roce.ICRCLen)
	p.header = h.PutHeader(b, n)
	end := p.header + n + roce.Pad(n)
	p.b = b[:end]
	traced := *h
	traced.Addr = 0
	traced.PutHeader(p.head[:], n)
	p.kept = h.Opcode == roce.Op(roce.RC, roce.Acknowledge) && h.Syndrome.Status() != 0
	return b[p.header : p.header+n : p.header+n], true
}

// Commit implements wire.Output.
func (p *Peer) Commit() {
	traced := append(slices.Clone(p.head[:p.header]), p.b[p.header:]...)
	p.host.tx = append(p.host.tx, outgoing{p.addr, p.ip, p.icrc.Put(p.b), traced, p.kept})
	p.b = nil
}

// Addr returns where the packets go.
func (p *Peer) Addr() netip.AddrPort { return p.addr }

// Move has packets go elsewhere from now on.
func (p *Peer) Move(to netip.AddrPort) {
	p.addr = to
	p.icrc.Init(p.host.local, to)
}

// hops is the hop limit of packets that are given none.
const hops = 64

// SetIP sets the traffic class and the hop limit of packets from now on; 0: 64. Nobody marks congestion, so the ECN bits are 0.
func (p *Peer) SetIP(class, limit uint8) {
	p.ip = roce.IP{Class: class &^ 3, Hops: limit}
	if limit == 0 {
		p.ip.Hops = hops
	}
}

// IP returns what the IP headers of packets say.
func (p *Peer) IP() roce.IP { return p.ip }

// Last returns the packet that the last Commit was for, until the next Packet or Flush.
func (p *Peer) Last() []byte { return p.host.tx[len(p.host.tx)-1].b }

// Abort implements wire.Output.
func (p *Peer) Abort() { p.b = nil }
