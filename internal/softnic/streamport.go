package softnic

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/softnic/stream"
	"github.com/ringside-rdma/ringside/internal/softnic/udp"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A queue pair whose peer is reached by neither memory nor UDP is connected by a TCP connection of its own, which the program makes. Its
// packets go there as they would on a network, through a netPort that is for this queue pair only: so polling, posting and sleeping are
// the same. What TCP does is not done twice: nothing is sent again, and there are no acknowledgements' timers but one, for a peer that
// says nothing. The end of the stream is the peer's death, and whatever is no packet for the queue pair ends the stream.

// streamSocket is one end of a stream as a port's socket.
type streamSocket struct {
	*stream.Socket
	opened  time.Time
	stats   udp.Counters // what Stats has returned
	awaited bool         // drive waits, or is about to wait, for room; guarded by the port's mu
	refused error        // why the port does not take the last packet; guarded by the port's mu
}

var _ socket = (*streamSocket)(nil)

// Peer implements socket. There is only one.
func (s *streamSocket) Peer(netip.AddrPort, bool) (netPeer, error) { return s, nil }

// Move implements netPeer.
func (s *streamSocket) Move(netip.AddrPort) {}

// SetIP implements netPeer: whoever has made the connection says what TCP's packets are to be like.
func (s *streamSocket) SetIP(uint8, uint8) {}

// IP implements netPeer.
func (s *streamSocket) IP() roce.IP { return roce.IP{} }

// TellIP implements socket.
func (s *streamSocket) TellIP(bool) {}

// Receive implements socket. Its error is why nothing comes any more.
func (s *streamSocket) Receive(fn func(netip.AddrPort, *roce.Packet)) (int, bool, error) {
	n, more := s.Socket.Receive(func(p *roce.Packet) error {
		s.refused = nil
		fn(s.Addr(), p)
		return s.refused
	})
	if n > 0 {
		return n, more, nil
	}
	return 0, false, s.Err()
}

func (s *streamSocket) Now() time.Duration { return time.Since(s.opened) }

func (s *streamSocket) SetDeadline(at time.Duration) {
	if at == neverWake {
		s.Socket.SetDeadline(time.Time{})
		return
	}
	s.Socket.SetDeadline(s.opened.Add(at))
}

func (s *streamSocket) Stats() *udp.Counters {
	c := &s.Socket.Counters
	s.stats = udp.Counters{Sent: c.Sent, Received: c.Received, Full: c.Full, SendErr: s.refusal()}
	return &s.stats
}

// refusal is what the system has given the stream up for; nil: it has not. One that ends otherwise is refused nothing.
func (s *streamSocket) refusal() error {
	if err := s.SendErr(); errors.Is(err, stream.ErrLost) {
		return err
	}
	return nil
}

// endCounters say how streams have ended.
type endCounters struct {
	Here   uint64 // by the queue pair, which was closed or reset
	ByPeer uint64
	Lost   uint64 // given up by the system of this side
	Broken uint64 // something came that is no packet for the queue pair
}

// count counts a stream, whose queue pair has done with it if done.
func (c *endCounters) count(s *streamSocket, done bool) {
	switch err := s.SendErr(); {
	case errors.Is(err, stream.ErrLost):
		c.Lost++
	case errors.Is(err, stream.ErrEnded):
		c.ByPeer++
	case err != nil:
		c.Broken++
	case done:
		c.Here++
	}
}

// byWhy are those that have occurred, as observers are told of them.
func (c *endCounters) byWhy() map[string]uint64 {
	m := map[string]uint64{}
	for why, n := range map[string]uint64{observe.EndedHere: c.Here, observe.EndedByPeer: c.ByPeer, observe.EndedLost: c.Lost, observe.EndedBroken: c.Broken} {
		if n > 0 {
			m[why] = n
		}
	}
	return m
}

// streamPorts are the ports of a NIC that are ends of streams.
type streamPorts struct {
	mu   sync.Mutex
	link *link                      // that all of them write through; nil: there was none yet
	all  atomic.Pointer[[]*netPort] // replaced under mu
	used bool                       // there was one, ever; guarded by mu
	left portCounters               // of those that are gone; guarded by mu
}

// maxPolled is how many streams pollers look at. Of more, the system says which have something: to ask each would take longer than that.
const maxPolled = 8

// polled returns the streams that pollers are to look at; nil: none.
func (s *streamPorts) polled() *[]*netPort {
	if l := s.all.Load(); l != nil && len(*l) <= maxPolled {
		return l
	}
	return nil
}

// port makes a port of one end of a stream. Nobody else knows of it before it is added.
func (s *streamPorts) port(n *NIC, sock *stream.Socket) *netPort {
	s.mu.Lock()
	if s.link == nil {
		s.link = netLink(n)
	}
	p := newNetPort(n, simMTU, s.link)
	s.mu.Unlock()
	p.stream = &streamSocket{Socket: sock, opened: time.Now()}
	p.sock, p.recv = p.stream, p.receiveStream
	return p
}

// add has pollers look at a port. Its queue pair has joined it: what comes for nobody would end the stream.
func (s *streamPorts) add(p *netPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*netPort
	if l := s.all.Load(); l != nil {
		all = append(all, *l...)
	}
	all = append(all, p)
	s.all.Store(&all)
	s.used = true
}

// counters are those of all streams together, those that are gone included; false: there was none.
func (s *streamPorts) counters() (p observe.Port, some bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.left
	if all := s.all.Load(); all != nil {
		for _, p := range *all {
			c.add(p, false)
		}
	}
	return c.port(pathTCP, ""), s.used
}

// finish forgets a port whose queue pair has done with it, but for what it has counted.
func (s *streamPorts) finish(p *netPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left.add(p, true)
	all := slices.DeleteFunc(slices.Clone(*s.all.Load()), func(o *netPort) bool { return o == p })
	if len(all) == 0 {
		s.all.Store(nil)
		return
	}
	s.all.Store(&all)
}

// UseStream implements driver.StreamUser.
func (q *QP) UseStream(c *net.TCPConn) error {
	q.cfg.Lock()
	defer q.cfg.Unlock()
	switch s := ib.QPState(q.state.Load()); {
	case q.closed.Load():
		return driver.ErrClosed
	case q.typ != ib.RC:
		return fmt.Errorf("%w: a stream is for reliable connections, not for %v queue pairs", errors.ErrUnsupported, q.typ)
	case s != ib.Init:
		return fmt.Errorf("%w: a QP is given a stream in %v, and this one is in %v", driver.ErrState, ib.Init, s)
	case q.stream != nil:
		return fmt.Errorf("%w: the QP has a stream already", driver.ErrState)
	case q.nic.sim != nil:
		return fmt.Errorf("%w: streams of a NIC on a simulated network", errors.ErrUnsupported)
	}
	s, err := stream.New(c)
	if err != nil {
		return err
	}
	q.stream = s
	return nil
}

// StreamErr implements driver.StreamUser.
func (q *QP) StreamErr() error {
	q.sq.Lock()
	defer q.sq.Unlock()
	return q.cut
}

// toRTRStream is toRTR for a peer at the other end of a stream. Called with cfg held.
func (q *QP) toRTRStream(attr *ib.QPAttr, mask ib.QPAttrMask) error {
	p := q.nic.streams.port(q.nic, q.stream)
	if err := q.connectWire(p, p.stream, attr, mask, wire.Config{Selective: true, Stream: true}); err != nil {
		return err
	}
	q.stream = nil // it is the port's
	q.nic.streams.add(p)
	go p.drive()
	return nil
}

// receiveStream takes a packet. The peer is the only one who can have sent it: one that is not for the queue pair breaks the protocol.
// Called with mu held.
func (p *netPort) receiveStream(src netip.AddrPort, pkt *roce.Packet) {
	if pkt.Opcode.Service() != roce.RC || !p.expect(src, pkt) {
		p.stream.refused = fmt.Errorf("%w: %v for queue pair %d", stream.ErrProtocol, pkt.Opcode, pkt.DestQP)
		return
	}
	p.deliver(src, pkt)
}

// streamEnded has the queue pair fail: nothing comes any more. Called with mu held.
func (p *netPort) streamEnded() {
	if p.closed {
		return
	}
	p.closed = true
	err := p.stream.Err()
	switch {
	case errors.Is(err, stream.ErrProtocol):
		err = fmt.Errorf("%w: %w", errPeerFault, err)
	case errors.Is(err, stream.ErrEnded):
		err = fmt.Errorf("%w: %w", errPeerGone, err)
	}
	for _, w := range p.qps {
		p.nic.later(func() { w.streamDown(err) })
	}
}

// streamDown moves the QP to ERR as linkDown does.
func (w *wireQP) streamDown(err error) {
	q := w.q
	q.cfg.Lock()
	defer q.cfg.Unlock()
	if q.closed.Load() || q.epoch.Load() != w.epoch {
		return
	}
	q.sq.Lock()
	s := ib.QPState(q.state.Load())
	q.cut = fmt.Errorf("stream to %v: %w", w.out.Addr(), err)
	if s != ib.RTR && s != ib.RTS && s != ib.SQD {
		q.sq.Unlock()
		return
	}
	q.unanswered()
	q.sq.Unlock()
	q.toErrorLocked(ib.EventQPFatal, true)
}
