package softnic

import (
	"net/netip"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/udp"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// netTest is a QP whose peer on the network is the test, packet by packet.
type netTest struct {
	t    *testing.T
	e    *end
	port *netPort
	sock *udp.Socket
	psn  ib.PSN
}

func listenAt(t *testing.T, addr string) *udp.Socket {
	t.Helper()
	s, err := udp.Listen(netip.MustParseAddrPort(addr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func newNetTest(t *testing.T, srq bool) *netTest {
	t.Helper()
	n := openNIC(t, false)
	local := netip.MustParseAddr("127.0.0.1")
	index := 0
	gids, err := n.GIDs(1)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range gids {
		if g.GID.Addr() == local {
			index = g.Index
		}
	}
	x := &netTest{t: t, sock: listenAt(t, "127.0.0.1:0"), psn: 70}
	cfg := endConfig{typ: ib.RC}
	if srq {
		pd, err := n.AllocPD()
		if err != nil {
			t.Fatal(err)
		}
		if cfg.srq, err = pd.(driver.SRQCreator).CreateSRQ(driver.SRQConfig{MaxWR: 8, MaxSGE: 1}); err != nil {
			t.Fatal(err)
		}
		x.e = makeEndIn(t, n, pd, cfg)
		t.Cleanup(func() {
			x.e.q.Close()
			cfg.srq.Close() // before the PD, which the end closes
			x.e.close()
		})
	} else {
		x.e = newEnd(t, n, cfg)
	}
	x.e.init()
	err = x.e.q.Modify(t.Context(), &ib.QPAttr{State: ib.RTR, AH: ib.AHAttr{DGID: ib.GIDFromAddr(local), SGIDIndex: index, UDPPort: x.sock.Local().Port()},
		PathMTU: ib.MTU256, DestQPN: 99, RQPSN: x.psn, MaxDestRdAtomic: 4}, ib.AttrState|ib.AttrAV|ib.AttrPathMTU|ib.AttrDestQPN|ib.AttrRQPSN|ib.AttrMaxDestRdAtomic|ib.AttrMinRNRTimer)
	if err != nil {
		t.Fatal(err)
	}
	if x.port, err = n.netPortAt(index); err != nil {
		t.Fatal(err)
	}
	return x
}

// packet is one of a SEND that the QP would take.
func (x *netTest) packet(op uint8) *roce.Packet {
	return &roce.Packet{Opcode: roce.Op(roce.RC, op), PKey: roce.DefaultPKey, DestQP: uint32(x.e.q.QPN()), PSN: x.psn, AckReq: true}
}

func (x *netTest) send(from *udp.Socket, p *roce.Packet, n int) {
	x.t.Helper()
	to, err := from.Peer(x.port.sock.Local())
	if err != nil {
		x.t.Fatal(err)
	}
	b, ok := to.Packet(p, n)
	if !ok {
		x.t.Fatal("no room")
	}
	clear(b)
	to.Commit()
	from.Flush()
}

// counts waits until a counter of the port is one.
func (x *netTest) counts(what string, c *uint64) {
	x.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		x.port.mu.Lock()
		n := *c
		x.port.mu.Unlock()
		if n == 1 {
			return
		}
		if time.Now().After(end) {
			x.t.Fatalf("%s: counted %d times", what, n)
		}
	}
}

// Packets that do not belong to the connection are dropped, each for its reason, and the connection goes on.
func TestStrangePackets(t *testing.T) {
	x := newNetTest(t, false)
	x.e.recv(7, x.e.sge(0, 1000))
	d := &x.port.drops
	x.send(listenAt(t, "127.0.0.2:0"), x.packet(roce.SendOnly), 8)
	x.counts("another address", &d.Source)
	p := x.packet(roce.SendOnly)
	p.PKey = 0x1234
	x.send(x.sock, p, 8)
	x.counts("another partition", &d.PKey)
	p = x.packet(roce.SendOnly)
	p.DestQP ^= 0x555
	x.send(x.sock, p, 8)
	x.counts("another queue pair", &d.NoQP)
	p = x.packet(roce.SendOnly)
	p.Opcode = roce.Op(roce.UC, roce.SendOnly)
	x.send(x.sock, p, 8)
	x.counts("another service", &d.Service)
	var wcs [1]ib.WC
	if n := x.e.cq.Poll(wcs[:]); n != 0 {
		t.Fatalf("%+v", wcs)
	}
	x.send(x.sock, x.packet(roce.SendOnly), 8)
	if wc := x.e.poll(); wc.ID != 7 || wc.Status != ib.WCSuccess || wc.ByteLen != 8 {
		t.Errorf("%+v", wc)
	}
}

// A receive of an SRQ that a message was arriving in is flushed with its QP.
func TestTakenReceiveIsFlushed(t *testing.T) {
	x := newNetTest(t, true)
	srq := x.e.q.(*QP).srq
	if _, err := srq.PostRecv([]ib.RecvWR{{ID: 7, SGEs: x.e.sge(0, 1000)}}); err != nil {
		t.Fatal(err)
	}
	x.send(x.sock, x.packet(roce.SendFirst), 256)
	for end := time.Now().Add(20 * time.Second); srq.available() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the receive was not taken")
		}
	}
	if err := x.e.q.Modify(t.Context(), &ib.QPAttr{State: ib.Err}, ib.AttrState); err != nil {
		t.Fatal(err)
	}
	if wc := x.e.poll(); wc.ID != 7 || wc.Status != ib.WCFlushErr {
		t.Errorf("%+v", wc)
	}
}

// Queue pair 1 takes what connection managers send each other, and is there only where they look for it.
func TestStrangersAtQP1(t *testing.T) {
	x := newNetTest(t, false)
	mad := func(change func(*roce.Packet), n int) {
		p := &roce.Packet{Opcode: roce.Op(roce.UD, roce.SendOnly), PKey: roce.DefaultPKey, DestQP: roce.GSIQP, SrcQP: roce.GSIQP, QKey: roce.GSIQKey}
		change(p)
		x.send(x.sock, p, n)
	}
	d := &x.port.drops
	if x.port.sock.Local().Port() != roce.Port { // another process has it
		mad(func(*roce.Packet) {}, roce.MADLen)
		x.counts("no connection manager", &d.NoQP)
		return
	}
	mad(func(p *roce.Packet) { p.QKey = 1 }, roce.MADLen)
	x.counts("another Q_Key", &d.QKey)
	mad(func(p *roce.Packet) { p.SrcQP = 2 }, roce.MADLen)
	x.counts("another queue pair", &d.Source)
	mad(func(*roce.Packet) {}, 16)
	x.counts("no message", &x.port.gsi.engine.Counters.Malformed)
}

// What the timer waits for may lie in the socket, when nobody has looked there for a while.
func TestAcknowledgementBeforeTimer(t *testing.T) {
	const timeout = 4 * time.Millisecond
	x := newNetTest(t, false)
	err := x.e.q.Modify(t.Context(), &ib.QPAttr{State: ib.RTS, AckTimeout: ib.AckTimeoutFor(timeout), RetryCount: 7, RNRRetry: 7, MaxRdAtomic: 1},
		ib.AttrState|ib.AttrAckTimeout|ib.AttrRetryCount|ib.AttrRNRRetry|ib.AttrSQPSN|ib.AttrMaxRdAtomic)
	if err != nil {
		t.Fatal(err)
	}
	// The port is this test's until both are there: the acknowledgement, and the end of the time for it.
	x.port.mu.Lock()
	x.e.send(ib.SendWR{ID: 9, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: x.e.sge(0, 8)})
	x.port.turn(false)
	w := x.port.qps[x.e.q.QPN()]
	if n := w.req.Counters.Sent; n != 1 {
		t.Errorf("%d packets were sent", n)
	}
	ack := x.packet(roce.Acknowledge)
	ack.PSN, ack.AckReq, ack.Syndrome, ack.MSN = 0, false, roce.Ack, 1
	x.send(x.sock, ack, 0)
	time.Sleep(3 * timeout)
	x.port.turn(true)
	if n := w.req.Counters.Timeouts; n != 0 {
		t.Errorf("%d timeouts", n)
	}
	x.port.mu.Unlock()
	if wc := x.e.poll(); wc.ID != 9 || wc.Status != ib.WCSuccess {
		t.Errorf("%+v", wc)
	}
}
