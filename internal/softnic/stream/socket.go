package stream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
)

const (
	headLen  = 4 // of a frame
	mark     = 0x5352
	frameLen = headLen + roce.MaxPacket // of the longest one
	// sendLen and receiveLen are about what a system call moves: beyond some dozen packets, it costs no more for each byte.
	sendLen    = 32 * frameLen
	receiveLen = 16 * frameLen
)

// ErrEnded matches the reason of a stream that the peer, or its system, has ended.
var ErrEnded = errors.New("the stream was ended by the peer")

// ErrLost matches the reason of a stream that the system of this side has given up: the error wraps what it has said. The peer need not have
// ended it.
var ErrLost = errors.New("the system of this side has given the stream up")

// ErrProtocol matches the reason of a stream on which something came that is no packet.
var ErrProtocol = errors.New("what came on the stream is no packet")

// A Socket sends and receives the packets of one connection. It is for one goroutine at a time, but for Local, Addr, Wait, AwaitRoom
// and SetDeadline. It is a wire.Output; what is committed leaves with the next Flush.
type Socket struct {
	sys    system
	local  netip.AddrPort
	remote netip.AddrPort
	room   atomic.Bool // Wait waits for room, too

	tx   []byte // frames to be sent: those from head to tail
	head int
	tail int
	n    int   // bytes of the packet that is being made, or was committed last
	deaf bool  // nothing can be sent any more; what is committed is dropped
	fate error // what the system has said when it would not send any more
	icrc roce.ICRC
	last []byte // what Last or Received has returned

	rx  []byte // what has come: the first got bytes
	got int
	pkt roce.Packet
	cur []byte // what pkt was decoded from
	in  roce.ICRC
	err error // why nothing comes any more

	Counters Counters
}

// Counters say what a Socket has done.
type Counters struct {
	Sent     uint64 // packets
	Received uint64
	Full     uint64 // times that no more could be sent at once
}

// A system is the system's socket. Neither read nor write waits: they move what can be moved at once, which may be nothing. read
// returns io.EOF at the end.
type system interface {
	read(b []byte) (int, error)
	write(b []byte) (int, error)
	// wait waits until something can be read, or with room, written, or until the deadline. An error says that the socket was closed.
	wait(room bool) error
	setDeadline(t time.Time)
	// shutdown ends the stream for both sides; close frees the descriptor.
	shutdown()
	close() error
}

// New makes a Socket of a TCP connection, of which nobody reads or writes any more. c is closed then, which does not end the stream;
// if New fails, it stays as it was.
func New(c *net.TCPConn) (*Socket, error) {
	local, ok1 := c.LocalAddr().(*net.TCPAddr)
	remote, ok2 := c.RemoteAddr().(*net.TCPAddr)
	if !ok1 || !ok2 {
		return nil, fmt.Errorf("stream: %w", net.ErrClosed)
	}
	sys, err := open(c)
	if err != nil {
		return nil, fmt.Errorf("stream: %w", err)
	}
	return newSocket(sys, local.AddrPort(), remote.AddrPort()), nil
}

func newSocket(sys system, local, remote netip.AddrPort) *Socket {
	s := &Socket{sys: sys, local: plain(local), remote: plain(remote), tx: make([]byte, sendLen), rx: make([]byte, receiveLen)}
	s.icrc.Init(s.local, s.remote)
	s.in.Init(s.remote, s.local)
	return s
}

// plain is a without what means nothing in packets.
func plain(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}

// Local and Addr return both ends of the stream.
func (s *Socket) Local() netip.AddrPort { return s.local }

// Addr returns where the packets go.
func (s *Socket) Addr() netip.AddrPort { return s.remote }

// Packet implements wire.Output.
func (s *Socket) Packet(h *roce.Packet, n int) ([]byte, bool) {
	if s.Room() == 0 {
		s.Counters.Full++
		return nil, false
	}
	b := s.tx[s.tail+headLen:]
	k := h.PutHeader(b, n)
	s.n = k + n + roce.Pad(n)
	clear(b[k+n : s.n])
	return b[k : k+n : k+n], true
}

// Commit implements wire.Output.
func (s *Socket) Commit() {
	binary.LittleEndian.PutUint16(s.tx[s.tail:], uint16(s.n))
	binary.LittleEndian.PutUint16(s.tx[s.tail+2:], mark)
	s.tail += headLen + s.n
	s.Counters.Sent++
}

// Abort implements wire.Output.
func (s *Socket) Abort() {}

// Last returns the packet that the last Commit was for, as it would be on the wire, with an invariant CRC. It is valid until the next
// call of Last or Received; it is called before Packet or Flush is.
func (s *Socket) Last() []byte {
	s.last = s.icrc.Put(append(s.last[:0], s.tx[s.tail-s.n:s.tail]...))
	return s.last
}

// Room returns how many packets can be committed before a Flush is needed.
func (s *Socket) Room() int { return (len(s.tx) - s.tail) / frameLen }

// Queued returns how many bytes wait for a Flush.
func (s *Socket) Queued() int { return s.tail - s.head }

// Flush hands what was committed to the system, as far as that takes it; the rest stays for the next Flush. It reports whether all is
// gone. If the system refuses it for good, the stream ends for both sides, and Err says so once what has come until then is read.
func (s *Socket) Flush() bool {
	for s.head < s.tail && !s.deaf {
		n, err := s.sys.write(s.tx[s.head:s.tail])
		s.head += n
		if err != nil { // whoever cannot answer is not to be asked either; but what has come until now is still to be read
			s.deaf, s.fate = true, ended(err, 0)
			s.sys.shutdown()
		} else if n == 0 {
			break
		}
	}
	switch {
	case s.head == s.tail || s.deaf:
		s.head, s.tail = 0, 0
	case s.Room() == 0 && s.head >= len(s.tx)/4: // that much at least, lest all is moved for a few bytes each time
		s.tail = copy(s.tx, s.tx[s.head:s.tail])
		s.head = 0
	}
	return s.tail == 0
}

// Receive hands packets to fn, which may use them until it returns, and says how many these were, and whether there may be more. If fn
// returns an error, the stream ends for that reason. Receive does not wait.
func (s *Socket) Receive(fn func(*roce.Packet) error) (packets int, more bool) {
	if s.err != nil {
		return 0, false
	}
	n, err := s.sys.read(s.rx[s.got:])
	switch {
	case err != nil && s.fate != nil: // then Flush has ended it
		s.fail(s.fate)
		return 0, false
	case err != nil:
		s.fail(ended(err, s.got))
		return 0, false
	}
	s.got += n
	more = s.got == len(s.rx)
	b := s.rx[:s.got]
	for len(b) >= headLen {
		size := int(binary.LittleEndian.Uint16(b))
		if m := binary.LittleEndian.Uint16(b[2:]); m != mark || size < roce.BTHLen || size > roce.MaxPacket {
			s.fail(fmt.Errorf("%w: a frame of %d bytes, marked %#04x", ErrProtocol, size, m))
			break
		}
		if len(b) < headLen+size {
			break
		}
		s.cur = b[headLen : headLen+size]
		err := s.pkt.Decode(s.cur)
		b = b[headLen+size:]
		if err != nil {
			s.fail(fmt.Errorf("%w: %w", ErrProtocol, err))
			break
		}
		s.Counters.Received++
		packets++
		if err := fn(&s.pkt); err != nil {
			s.fail(err)
			break
		}
	}
	s.got = copy(s.rx, b)
	return packets, more
}

// Received returns, within the fn of Receive, the packet that it is called with, as it would have been on the wire, with an invariant CRC. It
// is valid until the next call of Last or Received.
func (s *Socket) Received() []byte {
	s.last = s.in.Put(append(s.last[:0], s.cur...))
	return s.last
}

// ended says how the stream has ended, with so many bytes of a packet left over.
func ended(err error, left int) error {
	switch {
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE): // the peer's system has answered that there is no such stream
		return fmt.Errorf("%w: %w", ErrEnded, err)
	case !errors.Is(err, io.EOF):
		return fmt.Errorf("%w: %w", ErrLost, err)
	case left > 0:
		return fmt.Errorf("%w in the middle of a packet", ErrEnded)
	}
	return ErrEnded
}

// fail ends the stream.
func (s *Socket) fail(err error) {
	s.err = err
	s.deaf = true
	s.sys.shutdown() // so that the peer notices
}

// Err returns why nothing comes any more, or nil.
func (s *Socket) Err() error { return s.err }

// SendErr returns why nothing can be sent any more, or nil. It may be known before Err, but is nothing else.
func (s *Socket) SendErr() error {
	if s.fate != nil {
		return s.fate
	}
	return s.err
}

// SetDeadline bounds a Wait, also one that waits already; a zero time does not.
func (s *Socket) SetDeadline(t time.Time) { s.sys.setDeadline(t) }

// AwaitRoom has the next Wait end, or not, when the system takes more to send.
func (s *Socket) AwaitRoom(yes bool) { s.room.Store(yes) }

// Wait waits until something has come, or there is room (AwaitRoom), or until the deadline. It may return early. An error says that
// the socket was closed.
func (s *Socket) Wait() error {
	err := s.sys.wait(s.room.Load())
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// Close sends what the system takes at once, and ends the stream, and a Wait that waits.
func (s *Socket) Close() error {
	s.Flush()
	s.deaf = true
	s.sys.shutdown()
	return s.sys.close()
}
