package stream

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// fakeSystem is a system's socket that moves what the test says, and then ends.
type fakeSystem struct {
	in    [][]byte // what each read finds; nil: nothing yet. Behind it is the end
	out   []byte
	takes []int // bytes that each write takes; behind it, all
	full  error // what a write ends with, instead
	end   error // what reading ends with; nil: io.EOF
	cut   bool
}

func (f *fakeSystem) read(b []byte) (int, error) {
	switch {
	case len(f.in) > 0:
	case f.end != nil:
		return 0, f.end
	default:
		return 0, io.EOF
	}
	n := copy(b, f.in[0])
	if f.in[0] = f.in[0][n:]; len(f.in[0]) == 0 {
		f.in = f.in[1:]
	}
	return n, nil
}

func (f *fakeSystem) write(b []byte) (int, error) {
	if f.full != nil {
		return 0, f.full
	}
	n := len(b)
	if len(f.takes) > 0 {
		n = min(n, f.takes[0])
		f.takes = f.takes[1:]
	}
	f.out = append(f.out, b[:n]...)
	return n, nil
}

func (f *fakeSystem) wait(bool) error       { return nil }
func (f *fakeSystem) setDeadline(time.Time) {}
func (f *fakeSystem) shutdown()             { f.cut = true }
func (f *fakeSystem) close() error          { return nil }

var here, there = netip.MustParseAddrPort("192.0.2.1:40000"), netip.MustParseAddrPort("192.0.2.2:7000")

// onFake returns a Socket on f.
func onFake(f *fakeSystem) *Socket { return newSocket(f, here, there) }

// commit sends a packet of n bytes of payload, each of which is x.
func commit(s *Socket, n int, x byte) bool {
	b, ok := s.Packet(&roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly), PKey: roce.DefaultPKey, DestQP: 5, PSN: ib.PSN(n)}, n)
	if !ok {
		return false
	}
	for i := range b {
		b[i] = x
	}
	s.Commit()
	return true
}

// lengths of payloads: whole words and others, the shortest and the longest.
var lengths = []int{0, 1, 2, 3, 4, 100, 4095, 4096}

// frames is what a Socket sends of packets of all lengths.
func frames(t testing.TB) []byte {
	f := &fakeSystem{}
	s := onFake(f)
	for i, n := range lengths {
		if !commit(s, n, byte(i)) {
			t.Fatal("there is no room")
		}
	}
	if !s.Flush() {
		t.Fatal("not all is gone")
	}
	return f.out
}

// drain receives all there is, and returns the lengths of the payloads.
func drain(t testing.TB, s *Socket) (got []int) {
	for s.Err() == nil {
		s.Receive(func(p *roce.Packet) error {
			if want := bytes.Repeat([]byte{byte(len(got) % len(lengths))}, len(p.Payload)); !bytes.Equal(p.Payload, want) || int(p.PSN) != len(want) {
				t.Errorf("packet %d: PSN %d, %d bytes, or others than were sent", len(got), p.PSN, len(p.Payload))
			}
			got = append(got, len(p.Payload))
			return nil
		})
	}
	return got
}

// dull reports whether byte at of frames is one in the middle of a long payload, of which there are many.
func dull(at, all int) bool {
	return at > 300 && at < all-100 && (at < all-4300 || at > all-4100)
}

// However the stream is cut into pieces, the packets are the same.
func TestEveryBoundary(t *testing.T) {
	all := frames(t)
	want := fmt.Sprint(lengths)
	for at := range len(all) {
		if dull(at, len(all)) {
			continue
		}
		s := onFake(&fakeSystem{in: [][]byte{bytes.Clone(all[:at]), nil, bytes.Clone(all[at:])}})
		if got := fmt.Sprint(drain(t, s)); got != want || s.Err() != ErrEnded {
			t.Fatalf("cut at byte %d: payloads of %v bytes, want %v; %v", at, got, want, s.Err())
		}
	}
	for _, size := range []int{1, 2, 3, 5, 4143} {
		f := &fakeSystem{}
		for b := bytes.Repeat(all, 3); len(b) > 0; {
			n := min(size, len(b))
			f.in = append(f.in, b[:n])
			b = b[n:]
		}
		if got := drain(t, onFake(f)); len(got) != 3*len(lengths) {
			t.Errorf("in pieces of %d bytes: %d packets", size, len(got))
		}
	}
}

// A stream on which nothing can be sent any more ends for both sides, when what has come before is read, and says why: that is the peer's
// doing only if its system has said so.
func TestWriteFails(t *testing.T) {
	all := frames(t)
	for no, want := range map[error]error{errors.New("no buffers, ever"): ErrLost, syscall.ETIMEDOUT: ErrLost, syscall.EPIPE: ErrEnded, syscall.ECONNRESET: ErrEnded} {
		f := &fakeSystem{in: [][]byte{all}, full: no}
		s := onFake(f)
		commit(s, 4, 1)
		if !s.Flush() || !errors.Is(s.SendErr(), want) || s.Err() != nil || !f.cut {
			t.Errorf("%v: it ends with %v, the stream has been ended: %t", no, s.SendErr(), f.cut)
		}
		commit(s, 4, 1)
		s.Flush()
		if got := drain(t, s); len(got) != len(lengths) || !errors.Is(s.Err(), want) || !errors.Is(s.Err(), no) || s.SendErr() != s.Err() || len(f.out) != 0 {
			t.Errorf("%v: %d packets were received, %d bytes sent; %v", no, len(got), len(f.out), s.Err())
		}
	}
}

// What the system says when it is read from is the peer's end only if that has ended it.
func TestReadFails(t *testing.T) {
	for no, want := range map[error]error{syscall.ETIMEDOUT: ErrLost, syscall.ECONNRESET: ErrEnded, io.EOF: ErrEnded} {
		s := onFake(&fakeSystem{end: no})
		if n, _ := s.Receive(nil); n != 0 || !errors.Is(s.Err(), want) || no != io.EOF && !errors.Is(s.Err(), no) {
			t.Errorf("%v: %v, want %v", no, s.Err(), want)
		}
	}
}

// A stream that ends within a packet says so.
func TestEndWithinPacket(t *testing.T) {
	all := frames(t)
	starts := map[int]bool{}
	for at := 0; at < len(all); at += headLen + int(binary.LittleEndian.Uint16(all[at:])) {
		starts[at] = true
	}
	for at := range len(all) {
		if dull(at, len(all)) {
			continue
		}
		s := onFake(&fakeSystem{in: [][]byte{bytes.Clone(all[:at])}})
		drain(t, s)
		if within := s.Err() != ErrEnded; !errors.Is(s.Err(), ErrEnded) || within == starts[at] {
			t.Fatalf("end at byte %d: %v", at, s.Err())
		}
	}
}

// Whatever the system takes at a time, all is sent, in order.
func TestEveryPieceSent(t *testing.T) {
	want := bytes.Repeat(frames(t), 40)
	for _, size := range []int{1, 7, 4143, 4144, 50000} {
		f := &fakeSystem{}
		s := onFake(f)
		full := 0
		for range 40 {
			for i, n := range lengths {
				for !commit(s, n, byte(i)) {
					full++
					f.takes = append(f.takes[:0], size, 0)
					if s.Flush() {
						t.Fatalf("pieces of %d bytes: all is gone at once", size)
					}
					if s.Room() == 0 && s.Queued() < sendLen/2 {
						t.Fatalf("%d bytes are queued, and there is room for %d packets", s.Queued(), s.Room())
					}
				}
			}
		}
		for len(f.out)+s.Queued() != len(want) {
			t.Fatalf("pieces of %d bytes: %d sent and %d queued, want %d", size, len(f.out), s.Queued(), len(want))
		}
		if s.Flush(); !bytes.Equal(f.out, want) || full == 0 {
			t.Errorf("pieces of %d bytes: other bytes than were committed, or it was never full (%d times)", size, full)
		}
	}
}

// frame is b, framed.
func frame(b []byte) []byte {
	return append(binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(nil, uint16(len(b))), mark), b...)
}

// packet is a SEND of n bytes.
func packet(n int) []byte {
	p := roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly), PKey: roce.DefaultPKey}
	b := make([]byte, p.Opcode.HeaderLen()+n+roce.Pad(n))
	p.PutHeader(b, n)
	return b
}

// What is no packet ends the stream, and what comes behind it is not looked at.
func TestGarbage(t *testing.T) {
	long := packet(4096)
	for name, b := range map[string][]byte{
		"a request of HTTP":     []byte("GET / HTTP/1.1\r\n\r\n"),
		"zeroes":                make([]byte, 64),
		"the mark is wrong":     {12, 0, 0x52, 0x54},
		"shorter than a BTH":    frame(packet(0)[:11]),
		"longer than a packet":  frame(append(long, make([]byte, roce.MaxPacket-len(long)+1)...)),
		"an unknown opcode":     frame(append([]byte{0xff}, packet(8)[1:]...)),
		"another version":       frame(append([]byte{4, 1}, packet(8)[2:]...)),
		"padding of no payload": frame(append([]byte{4, 0x30}, packet(0)[2:]...)),
		"a RETH that is short":  frame(append([]byte{0x0c}, packet(4)[1:]...)),
	} {
		f := &fakeSystem{in: [][]byte{frame(packet(4)), append(b, frame(packet(4))...)}}
		s := onFake(f)
		n := 0
		for s.Err() == nil {
			k, _ := s.Receive(func(*roce.Packet) error { return nil })
			n += k
		}
		if !errors.Is(s.Err(), ErrProtocol) || n != 1 || !f.cut {
			t.Errorf("%s: %d packets, %v, the stream ended: %v", name, n, s.Err(), f.cut)
		}
		if !commit(s, 4, 0) || !s.Flush() || len(f.out) != 0 {
			t.Errorf("%s: %d bytes are sent on the stream that has ended", name, len(f.out))
		}
	}
	// A packet that the port does not want is the same.
	f := &fakeSystem{in: [][]byte{frames(t)}}
	s, no := onFake(f), errors.New("not this one")
	n := 0
	s.Receive(func(*roce.Packet) error {
		if n++; n == 3 {
			return no
		}
		return nil
	})
	if s.Err() != no || n != 3 || !f.cut {
		t.Errorf("after %d packets: %v", n, s.Err())
	}
}

// FuzzReceive compares what a Socket makes of bytes in pieces with what it makes of all of them at once.
func FuzzReceive(f *testing.F) {
	f.Add(frames(f), uint16(1))
	f.Add(frames(f)[:77], uint16(13))
	f.Add(append(frame(packet(3)), "GET / HTTP/1.1"...), uint16(5))
	f.Add(frame(packet(0)[:11]), uint16(4))
	f.Add(frame(packet(4099)), uint16(4))
	f.Fuzz(func(t *testing.T, b []byte, size uint16) {
		run := func(size int) (got []string, err error) {
			x := &fakeSystem{}
			for rest := b; len(rest) > 0; rest = rest[min(size, len(rest)):] {
				x.in = append(x.in, bytes.Clone(rest[:min(size, len(rest))]), nil)
			}
			s := onFake(x)
			for s.Err() == nil {
				s.Receive(func(p *roce.Packet) error {
					if n := p.Opcode.HeaderLen() + len(p.Payload); n > roce.MaxPacket { // of which payload may be more than an MTU: the QP refuses it
						t.Errorf("a packet of %d bytes", n)
					}
					got = append(got, fmt.Sprintf("%+v", *p))
					return nil
				})
			}
			return got, s.Err()
		}
		pieces, err := run(max(1, int(size)))
		whole, err2 := run(len(b) + 1)
		if fmt.Sprint(pieces, err) != fmt.Sprint(whole, err2) {
			t.Errorf("in pieces of %d: %d packets, %v; at once: %d packets, %v", size, len(pieces), err, len(whole), err2)
		}
		if !errors.Is(err, ErrProtocol) && !errors.Is(err, ErrEnded) {
			t.Error(err)
		}
	})
}

// pair returns both ends of a stream of the system's.
func pair(t testing.TB) (a, b *Socket) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	for i, x := range []net.Conn{c, d} {
		s, err := New(x.(*net.TCPConn))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := s.Close(); err != nil && err != net.ErrClosed {
				t.Errorf("end %d: %v", i, err)
			}
		})
		a, b = b, s
	}
	return a, b
}

// A stream of which nobody reads takes no more, and waits for room; then all arrives.
func TestFull(t *testing.T) {
	a, b := pair(t)
	sent := 0
	a.AwaitRoom(true)
	for stuck := false; !stuck; { // the system moves more from one end to the other meanwhile
		for commit(a, lengths[sent%len(lengths)], byte(sent%len(lengths))) {
			sent++
		}
		left := a.Queued()
		a.SetDeadline(time.Now().Add(20 * time.Millisecond))
		if err := a.Wait(); err != nil {
			t.Fatal(err)
		}
		a.Flush()
		stuck = a.Queued() == left
	}
	a.SetDeadline(time.Time{})
	done := make(chan error, 1)
	go func() {
		for !a.Flush() {
			if err := a.Wait(); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for got := 0; got < sent; {
		n, _ := b.Receive(func(p *roce.Packet) error {
			if i := (got) % len(lengths); len(p.Payload) != lengths[i] {
				return fmt.Errorf("packet %d has %d bytes, want %d", got, len(p.Payload), lengths[i])
			}
			got++
			return nil
		})
		if b.Err() != nil {
			t.Fatal(b.Err())
		}
		if n == 0 {
			if err := b.Wait(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// A Wait ends with the deadline, with what comes, with the peer's end, and when the socket is closed.
func TestWait(t *testing.T) {
	a, b := pair(t)
	b.SetDeadline(time.Now().Add(time.Millisecond))
	if err := b.Wait(); err != nil {
		t.Fatal(err)
	}
	if n, _ := b.Receive(nil); n != 0 || b.Err() != nil {
		t.Fatal(n, b.Err())
	}
	b.SetDeadline(time.Time{})
	waited := make(chan error)
	wait := func() { waited <- b.Wait() }
	go wait()
	commit(a, 10, 1)
	a.Flush()
	if err := <-waited; err != nil {
		t.Fatal(err)
	}
	if n, _ := b.Receive(func(*roce.Packet) error { return nil }); n != 1 {
		t.Fatalf("%d packets", n)
	}
	go wait()
	commit(a, 10, 1) // what was committed before the end arrives
	a.Close()
	if err := <-waited; err != nil {
		t.Fatal(err)
	}
	n := 0
	testutil.Eventually(t, "the end came", func() bool {
		b.Receive(func(*roce.Packet) error { n++; return nil })
		return b.Err() != nil
	})
	if n != 1 || !errors.Is(b.Err(), ErrEnded) {
		t.Errorf("%d packets, %v", n, b.Err())
	}
	c, _ := pair(t)
	go func() { waited <- c.Wait() }()
	c.SetDeadline(time.Now().Add(time.Hour))
	c.Close()
	if err := <-waited; !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrClosed) && err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "waiting says that the socket is closed", func() bool { return c.Wait() != nil })
}

// The packet that observers get is one of RoCEv2, with its invariant CRC.
func TestLast(t *testing.T) {
	s := onFake(&fakeSystem{})
	commit(s, 3, 9)
	commit(s, 4095, 7)
	var icrc roce.ICRC
	icrc.Init(here, there)
	b, err := icrc.Split(s.Last(), false)
	var p roce.Packet
	if err != nil || p.Decode(b) != nil || len(p.Payload) != 4095 || p.Payload[0] != 7 {
		t.Errorf("%v, %+v", err, p)
	}
}

func TestNoAllocations(t *testing.T) {
	a, b := pair(t)
	fn := func(*roce.Packet) error { return nil }
	if n := testing.AllocsPerRun(100, func() {
		commit(a, 100, 1)
		a.Flush()
		for n := 0; n == 0; {
			n, _ = b.Receive(fn)
		}
	}); n != 0 {
		t.Errorf("a packet takes %v allocations", n)
	}
}
