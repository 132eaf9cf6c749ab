package softnic

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A flood of probes is answered in part, what it costs is bounded, and who probes later is answered again.
func TestProbeFlood(t *testing.T) {
	x := newHostileNet(t, "127.0.0.1", "")
	p := x.port
	p.mu.Lock()
	defer p.mu.Unlock()
	src := x.raw.LocalAddr().(*net.UDPAddr).AddrPort()
	probe := func(n int) (answered uint64) {
		p.sock.Flush()
		was := p.sock.Stats().Sent
		for range n {
			pkt := roce.Packet{Opcode: roce.Probe, PKey: roce.DefaultPKey, DestQP: uint32(x.bystander.q.QPN()), Payload: make([]byte, 64)}
			p.receive(src, &pkt)
		}
		p.sock.Flush()
		return p.sock.Stats().Sent - was
	}
	p.now = p.sock.Now() + time.Hour // this test's from here on
	if n := probe(10 * probeBurst); n != probeBurst || p.drops.Probes != 9*probeBurst {
		t.Errorf("%d of %d were answered, %d dropped", n, 10*probeBurst, p.drops.Probes)
	}
	p.now += 10 * probeEvery
	if n := probe(100); n != 10 {
		t.Errorf("%d were answered after the time for 10", n)
	}
	p.now += time.Second
	if n := probe(probeBurst + 1); n != probeBurst {
		t.Errorf("%d were answered after a second", n)
	}
}

// An acknowledgement waits for what is posted because of the message, and not for packets that are for nobody, nor for long for what else
// comes: a flood of them would hold it back, and with it the sender, whose window is full.
func TestFloodHoldsNoAcknowledgement(t *testing.T) {
	x, y := newEnd(t, openNIC(t, true), endConfig{typ: ib.RC}), newEnd(t, openNIC(t, true), endConfig{typ: ib.RC})
	joinUDP(t, x, y, 0)
	y.recv(1, y.sge(0, 64))
	y.recv(2, y.sge(0, 64))
	datagrams := newEnd(t, y.n, endConfig{typ: ib.UD})
	datagrams.ready()
	p := y.q.(*QP).wire.port
	raw, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(p.sock.Local()))
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	var crc roce.ICRC
	crc.Init(raw.LocalAddr().(*net.UDPAddr).AddrPort(), p.sock.Local())
	nobodys := crc.Put(bytesOf(&roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly), PKey: roce.DefaultPKey, DestQP: uint32(y.q.QPN()) ^ 0x5555}, 64))
	wrongQKey := crc.Put(bytesOf(&roce.Packet{Opcode: roce.Op(roce.UD, roce.SendOnly), PKey: roce.DefaultPKey, DestQP: uint32(datagrams.q.QPN()), QKey: uint32(testQKey) + 1}, 64))

	p.mu.Lock() // the port is this test's, which does what pollers do
	defer p.mu.Unlock()
	wait := func() (sent uint64) {
		t.Helper()
		x.send(ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: x.sge(0, 64)})
		for end := time.Now().Add(10 * time.Second); len(p.owing) == 0; {
			if p.turn(true); time.Now().After(end) {
				t.Fatal("no acknowledgement waits")
			}
		}
		return p.sock.Stats().Sent
	}
	flood := func(b []byte, c *uint64) {
		t.Helper()
		for range 3 {
			if _, err := raw.Write(b); err != nil {
				t.Fatal(err)
			}
		}
		was := *c
		if !p.turn(true) || *c == was {
			t.Fatal("the flood has not come")
		}
	}
	sent := wait()
	flood(nobodys, &p.drops.NoQP)
	if n := p.sock.Stats().Sent - sent; n != 1 || len(p.owing) != 0 {
		t.Errorf("%d packets were sent, %d acknowledgements wait", n, len(p.owing))
	}
	sent = wait()
	p.owingAt = p.now + time.Hour
	flood(wrongQKey, &p.drops.QKey)
	if n := p.sock.Stats().Sent - sent; n != 0 || len(p.owing) != 1 {
		t.Errorf("at once, %d packets were sent, %d acknowledgements wait", n, len(p.owing))
	}
	p.owingAt = p.now - wire.LateAck
	flood(wrongQKey, &p.drops.QKey)
	if n := p.sock.Stats().Sent - sent; n != 1 || len(p.owing) != 0 {
		t.Errorf("after a while, %d packets were sent, %d acknowledgements wait", n, len(p.owing))
	}
}

// A QP that ends acknowledges what it has executed, though the acknowledgement was waiting for company: the sender would repeat itself
// until it gives up on a message that was received.
func TestEndHoldsNoAcknowledgement(t *testing.T) {
	for name, end := range map[string]func(q driver.QP) error{
		"error":  func(q driver.QP) error { return q.Modify(t.Context(), &ib.QPAttr{State: ib.Err}, ib.AttrState) },
		"reset":  func(q driver.QP) error { return q.Modify(t.Context(), &ib.QPAttr{State: ib.Reset}, ib.AttrState) },
		"closed": driver.QP.Close,
	} {
		t.Run(name, func(t *testing.T) {
			x, y := newEnd(t, openNIC(t, true), endConfig{typ: ib.RC}), newEnd(t, openNIC(t, true), endConfig{typ: ib.RC})
			joinUDP(t, x, y, 0)
			y.recv(1, y.sge(0, 64))
			p := y.q.(*QP).wire.port
			p.mu.Lock() // until the message was received, the port is this test's
			x.send(ib.SendWR{ID: 2, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: x.sge(0, 64)})
			for end := time.Now().Add(10 * time.Second); len(p.owing) == 0; {
				if p.turn(true); time.Now().After(end) {
					p.mu.Unlock()
					t.Fatal("no acknowledgement waits")
				}
			}
			p.owing, y.q.(*QP).wire.owing = nil, false // the port's driver might send it before this goroutine runs again
			p.mu.Unlock()
			if err := end(y.q); err != nil {
				t.Fatal(err)
			}
			x.want(2, ib.WCSuccess, 64)
		})
	}
}

// eachWrongPacket calls f for each kind of packet that a port has no use for. feed has the port take the next one, from the socket's buffer
// on, in batches as they are received, with what is sent to it; called with the port's mu held.
func eachWrongPacket(t testing.TB, f func(name string, p *netPort, feed func())) {
	n, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	p := loopbackPort(t, n, netip.AddrPortFrom(ownLoopback(), 0))
	peer := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 9) // discard
	e := makeEnd(t, n, endConfig{typ: ib.RC})
	defer e.close()
	e.wire(wireTo{gid: 1, addr: peer, own: true, qpn: 5, at: 5000})
	qpn := uint32(e.q.QPN())
	for _, c := range []struct {
		name string
		src  netip.AddrPort
		pkt  roce.Packet
		crc  bool // matches
	}{
		{"stranger", netip.MustParseAddrPort("127.0.0.3:9"), roce.Packet{DestQP: qpn}, true},
		{"no QP", peer, roce.Packet{DestQP: qpn ^ 0x5555}, true},
		{"CRC", peer, roce.Packet{DestQP: qpn}, false},
		{"old PSN", peer, roce.Packet{DestQP: qpn, PSN: 4000, AckReq: true}, true},
		{"far PSN", peer, roce.Packet{DestQP: qpn, PSN: 900000, AckReq: true}, true},
		{"probe", peer, roce.Packet{DestQP: qpn, Opcode: roce.Probe}, true},
	} {
		if c.pkt.PKey = roce.DefaultPKey; c.pkt.Opcode == 0 {
			c.pkt.Opcode = roce.Op(roce.RC, roce.SendOnly)
		}
		raw := bytesOf(&c.pkt, 64)
		var crc roce.ICRC
		crc.Init(c.src, p.sock.Local())
		if raw = crc.Put(raw); !c.crc {
			raw[len(raw)-1] ^= 0xff
		}
		var pkt roce.Packet
		i := 0
		f(c.name, p, func() {
			if i++; i%16 == 1 {
				p.now = p.sock.Now()
				for k, w := range p.touched {
					p.touched[k], w.touched = nil, false
					w.pump(true)
				}
				p.touched = p.touched[:0]
				p.settle()
				p.sock.Flush()
			}
			if pkt.Decode(raw[:len(raw)-roce.ICRCLen]) != nil || !p.expect(c.src, &pkt) {
				return
			}
			if _, err := crc.Split(raw, true); err == nil {
				p.deliver(c.src, &pkt)
			}
		})
	}
}

// A flood of packets that the port has no use for costs no memory.
func TestWrongPacketsAllocateNothing(t *testing.T) {
	eachWrongPacket(t, func(name string, p *netPort, feed func()) {
		p.mu.Lock()
		defer p.mu.Unlock()
		allocs := 1.0
		for try := 0; try < 5 && allocs != 0; try++ { // what other goroutines allocate is counted, too, but not each time
			allocs = testing.AllocsPerRun(10, func() {
				for range 160 {
					feed()
				}
			})
		}
		if allocs != 0 {
			t.Errorf("%s: %v allocations for 160 packets", name, allocs)
		}
	})
}

// BenchmarkWrongPackets is what a packet costs that the port has no use for.
func BenchmarkWrongPackets(b *testing.B) {
	eachWrongPacket(b, func(name string, p *netPort, feed func()) {
		b.Run(name, func(b *testing.B) {
			p.mu.Lock()
			defer p.mu.Unlock()
			b.ReportAllocs()
			for b.Loop() {
				feed()
			}
		})
	})
}

// The request without an answer is the first that is posted once the peer is gone, also while the QP is on its way to ERR.
func TestPostedWhilePeerGoes(t *testing.T) {
	x, y := newEnd(t, openNIC(t, true), endConfig{typ: ib.RC}), newEnd(t, openNIC(t, true), endConfig{typ: ib.RC})
	joinUDP(t, x, y, 0)
	q := x.q.(*QP)
	q.cfg.Lock()
	q.sq.Lock()
	q.unanswered()
	q.sq.Unlock()
	x.send(ib.SendWR{ID: 1, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: x.sge(0, 64)})
	q.toErrorLocked(ib.EventQPFatal, true)
	q.cfg.Unlock()
	x.q.PostSend([]ib.SendWR{{ID: 2, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: x.sge(0, 64)}})
	for i, want := range []ib.WCStatus{ib.WCRetryExceeded, ib.WCFlushErr} {
		if wc := x.poll(); wc.ID != uint64(i+1) || wc.Status != want {
			t.Errorf("%+v, want %v", wc, want)
		}
	}
}
