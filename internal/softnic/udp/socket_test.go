package udp_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/udp"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func TestMain(m *testing.M) { testutil.Main(m) }

func listen(t testing.TB, addr string) *udp.Socket {
	t.Helper()
	s, err := udp.Listen(netip.MustParseAddrPort(addr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// loopbacks are the addresses that this host has for itself.
func loopbacks(t *testing.T) []string {
	all := []string{"127.0.0.1:0"}
	if c, err := net.ListenPacket("udp6", "[::1]:0"); err == nil {
		c.Close()
		all = append(all, "[::1]:0")
	}
	return all
}

func bytesOf(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)*7 + seed
	}
	return b
}

// A connection over sockets of this host, with and without packets that get lost.
func TestConnection(t *testing.T) {
	for _, addr := range loopbacks(t) {
		for _, loss := range []int{0, 20} { // one in so many
			a, b := listen(t, addr), listen(t, addr)
			cfg := wire.Config{DestQP: 2, MTU: 4096, SQPSN: ib.MaxPSN - 5, RQPSN: 100, AckTimeout: 20 * time.Millisecond, RetryCount: 250, // a loaded machine may take its time
				RNRRetry: 7, MinRNRTimer: 10,
				MaxRdAtomic: 4, MaxDestRdAtomic: 4, SendDepth: 128}
			x := newEndpoint(t, a, b.Local(), 1, cfg)
			cfg.DestQP, cfg.SQPSN, cfg.RQPSN = 1, cfg.RQPSN, cfg.SQPSN
			y := newEndpoint(t, b, a.Local(), 2, cfg)
			if loss > 0 {
				r := rand.New(rand.NewPCG(1, 2))
				x.lose = func() bool { return r.IntN(loss) == 0 }
			}
			y.recvs = 1000
			copy(y.mem[memLen/2:], bytesOf(memLen/2, 3))
			var stop atomic.Bool
			served := make(chan struct{})
			go func() {
				defer close(served)
				y.serve(&stop)
			}()
			var reads [][]byte
			for i := range 200 {
				for x.req.Queued() > 100 {
					n := x.req.Queued()
					x.run(func() bool { return x.req.Queued() < n })
				}
				n := []int{0, 1, 64, 4096, 10000}[i%5]
				switch i % 4 {
				case 0:
					x.post(wire.Request{Op: ib.OpSend}, bytesOf(n, byte(i)), nil)
				case 1:
					x.post(wire.Request{Op: ib.OpRDMAWriteWithImm, Addr: memAddr + 100, RKey: memRKey, Imm: uint32(i)}, bytesOf(n, byte(i)), nil)
				case 2:
					to := make([]byte, n)
					reads = append(reads, to)
					x.post(wire.Request{Op: ib.OpRDMARead, Addr: memAddr + memLen/2, RKey: memRKey}, nil, to)
				case 3:
					x.post(wire.Request{Op: ib.OpAtomicFetchAdd, Addr: memAddr, RKey: memRKey, CompareAdd: 1}, nil, make([]byte, 8))
				}
			}
			x.finish()
			stop.Store(true)
			<-served
			for i, st := range x.done {
				if st != ib.WCSuccess {
					t.Fatalf("%s: request %d ends with %v", addr, i, st)
				}
			}
			if len(y.got) != 100 {
				t.Fatalf("%s: %d messages", addr, len(y.got))
			}
			for i, m := range y.got {
				k := i / 2 * 4
				want := bytesOf([]int{0, 1, 64, 4096, 10000}[k%5], byte(k))
				if m.st != ib.WCSuccess || i%2 == 0 && !bytes.Equal(m.data, want) || i%2 == 1 && m.Imm != uint32(k+1) {
					t.Errorf("%s: message %d: %+v, %d bytes", addr, i, m.Message, len(m.data))
				}
			}
			for _, r := range reads {
				if !bytes.Equal(r, bytesOf(memLen/2, 3)[:len(r)]) {
					t.Errorf("%s: READ of %d bytes brought others", addr, len(r))
				}
			}
			if n := binary.NativeEndian.Uint64(y.mem); n != 50 {
				t.Errorf("%s: the sum of 50 additions is %d", addr, n)
			}
			if lost := x.req.Counters.Timeouts + x.req.Counters.Implied + x.req.Counters.Resent; (lost > 0) != (loss > 0) {
				t.Logf("%s: %+v", addr, x.req.Counters)
			}
		}
	}
}

// Whatever is no packet, or not from where it says, is counted and dropped.
func TestJunk(t *testing.T) {
	s := listen(t, "127.0.0.1:0")
	peer := listen(t, "127.0.0.1:0")
	c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(s.Local()))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var icrc roce.ICRC
	icrc.Init(c.LocalAddr().(*net.UDPAddr).AddrPort(), s.Local())
	header := func(op roce.Opcode) []byte {
		b := make([]byte, op.HeaderLen())
		(&roce.Packet{Opcode: op, DestQP: 7}).PutHeader(b, 0)
		return b
	}
	good := icrc.Put(header(roce.Op(roce.RC, roce.SendOnly)))
	var other roce.ICRC
	other.Init(peer.Local(), s.Local())
	for _, b := range [][]byte{nil, {1}, good[:12], bytes.Repeat([]byte{0xff}, 60), other.Put(header(roce.Op(roce.RC, roce.SendOnly))), make([]byte, 60000),
		icrc.Put(append([]byte{0xff}, header(roce.Op(roce.RC, roce.SendOnly))[1:]...)), icrc.Put(header(roce.Op(roce.RC, roce.Acknowledge))[:12:12]), good} {
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	came := 0
	for deadline := time.Now().Add(testutil.Patience); s.Counters.Received < 9 && time.Now().Before(deadline); {
		if _, _, err := s.Receive(deadline, func(src netip.AddrPort, p *roce.Packet) {
			came++
			if p.DestQP != 7 || src != c.LocalAddr().(*net.UDPAddr).AddrPort() {
				t.Errorf("%+v from %v", p, src)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	d := &s.Counters.Dropped
	if came != 1 || s.Counters.Received != 9 || d[roce.DropShort] != 4 || d[roce.DropICRC] != 1 || d[roce.DropLength] != 1 || d[roce.DropOpcode] != 1 ||
		d[roce.DropVersion] != 1 {
		t.Errorf("%d packets came, %+v", came, s.Counters)
	}
}

func TestListenRefuses(t *testing.T) {
	for _, a := range []string{"0.0.0.0:4791", "[::]:4791", "224.0.0.1:4791", "192.0.2.1:4791"} {
		if s, err := udp.Listen(netip.MustParseAddrPort(a)); err == nil {
			s.Close()
			t.Errorf("%s: no error", a)
		}
	}
	s := listen(t, "127.0.0.1:0")
	for _, a := range []string{"[::1]:4791", "127.0.0.1:0", "0.0.0.0:4791"} {
		if _, err := s.Peer(netip.MustParseAddrPort(a)); err == nil {
			t.Errorf("peer at %s: no error", a)
		}
	}
	if _, err := udp.Listen(s.Local()); err == nil {
		t.Error("a port that is taken: no error")
	}
}

// Close ends a Wait, and Wake does.
func TestCloseWakes(t *testing.T) {
	for what, f := range map[string]func(*udp.Socket){"close": func(s *udp.Socket) { s.Close() }, "wake": (*udp.Socket).Wake} {
		s := listen(t, "127.0.0.1:0")
		s.SetDeadline(time.Now().Add(time.Hour)) // before it is woken: a goroutine may be late, and would undo that
		ended := make(chan error)
		go func() { ended <- s.Wait() }()
		time.Sleep(10 * time.Millisecond)
		f(s)
		if err := <-ended; errors.Is(err, net.ErrClosed) != (what == "close") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestNothingAllocates(t *testing.T) {
	a, b := listen(t, "127.0.0.1:0"), listen(t, "127.0.0.1:0")
	p, err := a.Peer(b.Local())
	if err != nil {
		t.Fatal(err)
	}
	h := &roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly)}
	came := 0
	count := func(netip.AddrPort, *roce.Packet) { came++ }
	round := func() {
		for range 40 { // more than a batch
			if _, ok := p.Packet(h, 100); !ok {
				t.Error("no room")
			}
			p.Commit()
		}
		a.Flush()
		for range 4 {
			if _, _, err := b.Receive(time.Time{}, count); err != nil {
				t.Error(err)
			}
		}
	}
	round()
	if n := testing.AllocsPerRun(50, round); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if came < 40 {
		t.Errorf("%d packets came", came)
	}
}

// Packets from many addresses leave nothing in memory, whether anybody expects them or not; and those that
// nobody expects are not handed on.
func TestStrangersCostNoMemory(t *testing.T) {
	s := listen(t, "127.0.0.1:0")
	known := listen(t, "127.0.0.1:0")
	var senders []*udp.Socket
	var peers []*udp.Peer
	for i := range 20 {
		x := listen(t, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 1, byte(i + 1)}), 0).String())
		p, err := x.Peer(s.Local())
		if err != nil {
			t.Fatal(err)
		}
		senders, peers = append(senders, x), append(peers, p)
	}
	p, err := known.Peer(s.Local())
	if err != nil {
		t.Fatal(err)
	}
	asked, came := 0, 0
	s.Expect = func(src netip.AddrPort, _ *roce.Packet) bool {
		asked++
		return src == known.Local() || src.Port()%2 == 0
	}
	take := func(src netip.AddrPort, _ *roce.Packet) {
		if came++; src != known.Local() && src.Port()%2 != 0 {
			t.Errorf("a packet from %v is handed on", src)
		}
	}
	h := &roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly)}
	round := func() {
		for i := range senders {
			peers[i].Packet(h, 100)
			peers[i].Commit()
			senders[i].Flush()
		}
		p.Packet(h, 100)
		p.Commit()
		known.Flush()
		for range 4 {
			if _, _, err := s.Receive(time.Time{}, take); err != nil {
				t.Error(err)
			}
		}
	}
	round()
	if n := testing.AllocsPerRun(50, round); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if asked < 50*21 || came < 50 || s.Counters.Dropped[roce.DropICRC] != 0 {
		t.Errorf("asked of %d packets, %d came, %+v", asked, came, s.Counters)
	}
}
