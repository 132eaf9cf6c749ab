package udp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
)

const (
	// batchLen is how many packets a system call sends at most.
	batchLen = 128
	// messages is how many messages a system call receives at most; a message is a packet, or several of one length.
	messages = 16
	// slotLen is the length of a packet's buffer.
	slotLen = roce.MaxPacket + roce.ICRCLen + 4
	// flowSlots is how many senders' addresses are remembered for checking, a power of two.
	flowSlots = 1 << 8
	// bufferLen is what the socket is to hold in each direction, bytes: a few windows of packets.
	bufferLen = 4 << 20
)

// A Socket sends and receives packets. It is for one goroutine at a time, but for Local, Wait, SetDeadline and Wake. A Wait ends
// when the socket is closed.
type Socket struct {
	sys   sysSocket
	local netip.AddrPort
	tx    txBatch // packets to be sent: those below queued
	rx    rxBatch
	qued  int
	flows []flow // by hash of the address: who makes up addresses costs no memory
	pkt   roce.Packet
	came  []byte // what pkt was decoded from
	ask   int    // how many messages to receive next
	most  int    // of the socket's buffer: packets behind so much count as marked; 0: none do
	ahead int    // bytes that were received since the buffer was empty
	ecn   uint8  // the bits of what is sent

	// Expect, if it is set, is asked of each packet before its invariant CRC is computed, which costs more than the rest: false
	// drops the packet, and whoever said so counts it. It is set before the first Receive.
	Expect func(src netip.AddrPort, p *roce.Packet) bool

	Counters Counters
	// OnDrop, if it is set, is called from Receive for what is no packet, with what it was until the call returns.
	OnDrop func(src netip.AddrPort, b []byte, d roce.Drop)
}

// Counters say what a Socket has done.
type Counters struct {
	Sent     uint64 // packets
	Received uint64
	Late     uint64             // of the messages received, that met a socket's buffer which had begun to fill
	NotSent  uint64             // packets that the system refused to send: no route, longer than a link on the way allows
	SendErr  error              // why, the last of them
	Full     uint64             // times that no more packets could be sent at once
	Dropped  [roce.Drops]uint64 // received packets that are none, by why
}

// Add adds o.
func (c *Counters) Add(o *Counters) {
	c.Sent += o.Sent
	c.Received += o.Received
	c.Late += o.Late
	c.NotSent += o.NotSent
	c.Full += o.Full
	if o.SendErr != nil {
		c.SendErr = o.SendErr
	}
	for why, n := range o.Dropped {
		c.Dropped[why] += n
	}
}

// A flow is where packets come from, and what checks them.
type flow struct {
	src  netip.AddrPort
	icrc roce.ICRC
}

// Listen opens a socket on an address of this host, which must be a certain one: the invariant CRC covers it. Port 0 is any
// that is free; roce.Port is where others expect it.
func Listen(local netip.AddrPort) (*Socket, error) {
	a := netip.AddrPortFrom(local.Addr().Unmap(), local.Port())
	if !a.Addr().IsValid() || a.Addr().IsUnspecified() || a.Addr().IsMulticast() {
		return nil, fmt.Errorf("udp: %v is not the address of an interface: the invariant CRC needs to know which it is", local)
	}
	s := &Socket{flows: make([]flow, flowSlots)}
	var err error
	if s.local, err = s.sys.open(a); err != nil {
		return nil, fmt.Errorf("udp: %v: %w", a, err)
	}
	s.most = s.sys.room() / 2
	s.tx.init(batchLen)
	s.rx.init(messages, a.Addr().Is4())
	s.ask = 1
	return s, nil
}

// Local returns the address that packets leave from.
func (s *Socket) Local() netip.AddrPort { return s.local }

// Close ends the socket, and a Wait that waits.
func (s *Socket) Close() error { return s.sys.close() }

// Wake ends a Receive or a Wait that waits.
func (s *Socket) Wake() { s.sys.setDeadline(time.Unix(1, 0)) }

// SetDeadline bounds a Wait, also one that waits already; a zero time does not.
func (s *Socket) SetDeadline(t time.Time) { s.sys.setDeadline(t) }

// Wait waits until there are packets to receive, or until the deadline of SetDeadline. It takes none, and so may run beside a
// goroutine that receives without waiting. It may return early. An error says that the socket was closed. While nobody waits,
// packets that come wake nobody.
func (s *Socket) Wait() error {
	err := s.sys.sleep()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// A Peer is where packets go. It is a wire.Output; what is committed leaves with the socket's next Flush, or when there is no room
// for more.
type Peer struct {
	s    *Socket
	addr netip.AddrPort
	icrc roce.ICRC
	// pieces: packets may leave in one piece, and be taken apart on their way. The IPv4 identifications count up then, of which the
	// invariant CRC knows nothing. This library does not mind; others do.
	pieces bool
	class  uint8     // as SetIP was given it, without the ECN bits
	hops   uint8     // the same
	ip     ipControl // that have the system do it
	n      int       // bytes of the packet that is being made
}

// Peer returns the peer at an address, which is of the family of the socket's.
func (s *Socket) Peer(addr netip.AddrPort) (*Peer, error) {
	a := netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	if a.Addr().Is4() != s.local.Addr().Is4() || a.Port() == 0 || a.Addr().IsUnspecified() {
		return nil, fmt.Errorf("udp: packets do not go from %v to %v", s.local, addr)
	}
	p := &Peer{s: s}
	p.Move(a)
	return p, nil
}

// Move has the peer be at another address, of the socket's family. Nothing for it may be queued.
func (p *Peer) Move(addr netip.AddrPort) {
	p.addr = addr
	p.icrc.Init(p.s.local, addr)
}

// SetIP sets the traffic class and the hop limit of packets that have not been flushed yet. The class' ECN bits mean nothing: they are the
// socket's. A hop limit of 0 is the system's. Only Linux can be told.
func (p *Peer) SetIP(class, hops uint8) {
	p.class, p.hops = class&^maskECN, hops
	p.ip.of(&p.s.sys, p.s.local.Addr().Is4(), p.class|p.s.ecn, hops)
}

// IP returns the traffic class and the hop limit of the packets, as far as they were set.
func (p *Peer) IP() roce.IP { return roce.IP{Class: p.class | p.s.ecn, Hops: p.hops} }

// AllowPieces says that the peer is one of this library's.
func (p *Peer) AllowPieces() { p.pieces = true }

// Room returns how many packets can be committed before the socket's Flush.
func (p *Peer) Room() int { return p.s.Room() }

// Packet implements wire.Output.
func (p *Peer) Packet(h *roce.Packet, n int) ([]byte, bool) {
	s := p.s
	if s.qued == batchLen {
		if s.Flush(); s.qued == batchLen {
			s.Counters.Full++
			return nil, false
		}
	}
	b := s.tx.slot(s.qued)
	k := h.PutHeader(b, n)
	p.n = k + n + roce.Pad(n)
	clear(b[k+n : p.n])
	return b[k : k+n : k+n], true
}

// Commit implements wire.Output.
func (p *Peer) Commit() {
	b := p.icrc.Put(p.s.tx.slot(p.s.qued)[:p.n])
	p.s.tx.set(p.s.qued, len(b), p)
	p.s.qued++
}

// Abort implements wire.Output.
func (p *Peer) Abort() {}

// Last returns the packet that the last Commit was for, with its invariant CRC. It is valid until the next call of Packet or Flush.
func (p *Peer) Last() []byte { return p.s.tx.slot(p.s.qued - 1)[:p.n+roce.ICRCLen] }

// Addr returns where the packets go.
func (p *Peer) Addr() netip.AddrPort { return p.addr }

// Queued returns how many packets wait for a Flush.
func (s *Socket) Queued() int { return s.qued }

// Room returns how many packets can be committed before a Flush is needed.
func (s *Socket) Room() int { return batchLen - s.qued }

// Flush hands what was committed to the system. What the system refuses for good is dropped, as a network might; what it has
// no room for stays for the next Flush. It reports whether all is gone.
func (s *Socket) Flush() bool {
	for done := 0; s.qued > 0; {
		n, err := s.send(done, s.qued-done)
		s.Counters.Sent += uint64(n)
		done += n
		if err != nil && !again(err) && done < s.qued {
			s.Counters.NotSent++
			s.Counters.SendErr = err
			done++
			err = nil
		}
		if done == s.qued || err != nil {
			s.qued = s.tx.shift(done, s.qued)
			break
		}
	}
	return s.qued == 0
}

// AllowECN has networks mark packets that they would otherwise drop later: whoever sends must slow down for it. Where the system
// cannot say so, nothing changes. It is called before there are peers.
func (s *Socket) AllowECN() {
	if s.sys.allowECN(s.local.Addr().Is4()) == nil {
		s.ecn = capable
	}
}

// TellIP has Receive tell the hop limits and flow labels of packets from now on, or no longer, where the system can; it always tells their traffic classes.
func (s *Socket) TellIP(on bool) {
	n := 0
	if on {
		n = 1
	}
	s.sys.tellIP(s.local.Addr().Is4(), n)
}

// The ECN bits of a traffic class (RFC 3168).
const (
	maskECN = 3
	capable = 2 // ECT(0)
	markCE  = 3
)

// skbLen is about what a message takes in the socket's buffer besides its bytes.
const skbLen = 1024

// waited notes that a message of n bytes was received, and reports whether it has met a buffer that had begun to fill.
func (s *Socket) waited(n int) bool {
	before := s.ahead
	s.ahead += n + skbLen
	return s.most > 0 && before > s.most
}

// Receive hands packets to fn, which may use them until it returns, and returns how many these were, and whether there may be more. If there are none, it
// waits until the deadline; without one (a zero time) it does not wait. It may return without any before that. Packets whose
// invariant CRC does not match, and those that are none, are counted and dropped; those that nobody expects (Expect) are dropped.
// FECN is set in those that have met congestion: the network has marked them, or so much was in front of them in the socket's buffer
// that it would soon have been full.
func (s *Socket) Receive(deadline time.Time, fn func(src netip.AddrPort, p *roce.Packet)) (packets int, more bool, err error) {
	// To look for a second message when there is but one costs a tenth of the way from one program to another. So where none
	// was, one is asked for, and many behind it.
	n, err := s.receive(s.ask)
	if n == 0 && err == nil && !deadline.IsZero() {
		s.SetDeadline(deadline)
		if err = s.Wait(); err == nil {
			n, err = s.receive(s.ask)
		}
	}
	if err != nil {
		return 0, false, err
	}
	more = n == messages
	asked := s.ask
	if s.ask = 1; n > 0 {
		s.ask = messages
	}
	if s.ahead > s.most && s.most > 0 { // it may have got shorter: senders have slowed down
		if w := s.sys.waiting(); w >= 0 {
			s.ahead = w
		}
	}
	for i := range n {
		piece, size, src, ip := s.rx.get(i)
		s.pkt.IP = ip
		marked := ip.Class&maskECN == markCE
		if s.waited(len(piece)) {
			s.Counters.Late++
			marked = true
		}
		for left := true; left; left = len(piece) > 0 { // an empty packet is one, too
			b := piece[:min(size, len(piece))]
			piece = piece[len(b):]
			packets++
			s.take(b, src, marked, fn)
		}
	}
	if n < asked {
		s.ahead = 0
	}
	return packets, more, nil
}

// take takes one packet. What is cheap to see is looked at first: a flood of packets for nobody, or of none, is to cost little.
func (s *Socket) take(b []byte, src netip.AddrPort, marked bool, fn func(src netip.AddrPort, p *roce.Packet)) {
	s.Counters.Received++
	s.came = b
	err := s.pkt.Decode(b[:max(0, len(b)-roce.ICRCLen)])
	if err == nil {
		if s.Expect != nil && !s.Expect(src, &s.pkt) {
			return
		}
		_, err = s.flow(src).Split(b, true)
	}
	if err != nil {
		if d, ok := err.(roce.Drop); ok && int(d) < len(s.Counters.Dropped) {
			s.Counters.Dropped[d]++
			if s.OnDrop != nil {
				s.OnDrop(src, b, d)
			}
		}
		return
	}
	s.pkt.FECN = s.pkt.FECN || marked
	fn(src, &s.pkt)
}

// Received returns, within Expect and the fn of Receive, the packet that they are called with, byte by byte as it came, with its invariant
// CRC. It is valid until they return. A mark of the network or the socket's buffer is not in it.
func (s *Socket) Received() []byte { return s.came }

// flow returns what checks packets from src.
func (s *Socket) flow(src netip.AddrPort) *roce.ICRC {
	a := src.Addr().As16()
	h := binary.BigEndian.Uint32(a[12:])*0x9e3779b1 ^ uint32(src.Port())*0x85ebca6b
	f := &s.flows[h>>16&(flowSlots-1)]
	if f.src != src {
		f.src = src
		f.icrc.Init(src, s.local)
	}
	return &f.icrc
}
