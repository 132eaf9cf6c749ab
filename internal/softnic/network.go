package softnic

import (
	"net/netip"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/udp"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
)

// A socket is what a netPort has of its network: packets, and the time. A turn of the port calls it a handful of times, however
// many packets it moves; what is called for each packet is the wire.Output of a peer. SetDeadline, Wait, Local and Close are for
// any goroutine, the rest is guarded by the port's mu.
type socket interface {
	// Local returns the address that packets leave from.
	Local() netip.AddrPort
	// Peer returns where the packets for an address go. own: a software NIC is there.
	Peer(to netip.AddrPort, own bool) (netPeer, error)
	// Receive hands packets to fn, which may use them until it returns, and says how many these were, and whether there may be more.
	Receive(fn func(netip.AddrPort, *roce.Packet)) (n int, more bool, err error)
	// Received returns, within fn and what the socket asks before it, the packet in question as it came, with its invariant CRC.
	Received() []byte
	// Flush sends what was committed, and reports whether all is gone; Queued is what is left, Room what fits besides.
	Flush() bool
	Queued() int
	Room() int
	// Now returns the time since the socket was opened.
	Now() time.Duration
	// SetDeadline bounds a Wait, also one that waits already; neverWake does not.
	SetDeadline(at time.Duration)
	// Wait waits for packets or the deadline; it may return early. An error says that the socket was closed.
	Wait() error
	Close() error
	// TellIP has packets that are received come with all of roce.Packet.IP that can be had, or no longer.
	TellIP(on bool)
	// Stats are what the socket has counted.
	Stats() *udp.Counters
}

// A netPeer is where packets go.
type netPeer interface {
	wire.Output
	Addr() netip.AddrPort
	// Move has packets go elsewhere, once those that were committed have been flushed.
	Move(to netip.AddrPort)
	// SetIP sets the traffic class, but for its ECN bits, and the hop limit (0: the system's) of packets; IP returns them.
	SetIP(class, hops uint8)
	IP() roce.IP
	// Last returns the packet that the last Commit was for, with its invariant CRC, until the next Packet or Flush.
	Last() []byte
}

// output is a netPeer that shows what leaves to observers, and does not flush when the socket is full: that would be a system call
// with a lock held.
type output struct {
	netPeer
	port *netPort
	w    *wireQP // whose packets these are; nil: datagrams of any queue pair
}

// Packet implements wire.Output.
func (o *output) Packet(h *roce.Packet, n int) ([]byte, bool) {
	if o.port.sock.Room() == 0 {
		return nil, false
	}
	return o.netPeer.Packet(h, n)
}

// Commit implements wire.Output.
func (o *output) Commit() {
	o.netPeer.Commit()
	if l := o.port.nic.taps.Load(); l != nil {
		o.tapSent(*l)
	}
}

// udpSocket is a socket of the host, in real time.
type udpSocket struct {
	*udp.Socket
	opened time.Time
}

func (s *udpSocket) Peer(to netip.AddrPort, own bool) (netPeer, error) {
	peer, err := s.Socket.Peer(to)
	if err != nil {
		return nil, err
	}
	if own {
		peer.AllowPieces()
	}
	return peer, nil
}

func (s *udpSocket) Receive(fn func(netip.AddrPort, *roce.Packet)) (n int, more bool, err error) {
	return s.Socket.Receive(time.Time{}, fn)
}

func (s *udpSocket) Stats() *udp.Counters { return &s.Counters }

func (s *udpSocket) Now() time.Duration { return time.Since(s.opened) }

func (s *udpSocket) SetDeadline(at time.Duration) {
	if at == neverWake {
		s.Socket.SetDeadline(time.Time{})
		return
	}
	s.Socket.SetDeadline(s.opened.Add(at))
}
