package softnic

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/softnic/simnet"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A peer that restarts: its process dies, and another one comes back at the same address and UDP port, with a queue pair of the same
// number.

// wireTo is where an end is connected to over a network.
type wireTo struct {
	gid      int // of its own, to send from
	addr     netip.AddrPort
	own      bool // the peer's NIC is one of ours, and so the connection selective
	qpn      ib.QPN
	from, at ib.PSN        // of its own first packet, and of the peer's
	timeout  time.Duration // of an acknowledgement; 0: restartTimeout
}

const (
	restartMTU     = ib.MTU256
	restartTimeout = 8 * time.Millisecond // of an acknowledgement
	restartRetries = 5
)

// wire takes the QP to RTS, over a network.
func (e *end) wire(to wireTo) {
	e.t.Helper()
	e.init()
	a := ib.QPAttr{State: ib.RTR, AH: ib.AHAttr{DGID: ib.GIDFromAddr(to.addr.Addr()), SGIDIndex: to.gid, Port: 1}, PathMTU: restartMTU, DestQPN: to.qpn,
		RQPSN: to.at, MaxDestRdAtomic: 4, MinRNRTimer: 1}
	if to.own {
		a.AH.UDPPort = to.addr.Port()
	}
	err := e.q.Modify(context.Background(), &a, ib.AttrState|ib.AttrAV|ib.AttrPathMTU|ib.AttrDestQPN|ib.AttrRQPSN|ib.AttrMaxDestRdAtomic|ib.AttrMinRNRTimer)
	if err != nil {
		e.t.Fatal(err)
	}
	if to.timeout == 0 {
		to.timeout = restartTimeout
	}
	a = ib.QPAttr{State: ib.RTS, MaxRdAtomic: 4, AckTimeout: ib.AckTimeoutFor(to.timeout), RetryCount: restartRetries, RNRRetry: 7, SQPSN: to.from}
	err = e.q.Modify(context.Background(), &a, ib.AttrState|ib.AttrMaxRdAtomic|ib.AttrAckTimeout|ib.AttrRetryCount|ib.AttrRNRRetry|ib.AttrSQPSN)
	if err != nil {
		e.t.Fatal(err)
	}
}

// simRestart is the host that stays, on a network where the other's process dies.
type simRestart struct {
	*testing.T
	net   *simnet.Network
	own   bool
	a     *NIC
	addrs [2]netip.Addr
}

func newSimRestart(t *testing.T, seed uint64, own bool) *simRestart {
	x := &simRestart{T: t, own: own, net: simnet.New(seed, simnet.Faults{Delay: 10 * time.Microsecond, Jitter: 10 * time.Microsecond, Loss: 0.01}),
		addrs: [2]netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}}
	x.a = x.open(0)
	return x
}

func (x *simRestart) open(side int) *NIC {
	x.Helper()
	n, err := OpenSim(x.net, x.addrs[side])
	if err != nil {
		x.Fatal(err)
	}
	x.Cleanup(func() { n.Close() })
	return n
}

// die has the NIC's host leave the network: its process was killed.
func die(n *NIC) { n.sim.port.sock.Close() }

// pair connects a new end of the NIC that stays with a new one of b.
func (x *simRestart) pair(b *NIC) (ea, eb *end) {
	x.Helper()
	ea, eb = newEnd(x, x.a, endConfig{typ: ib.RC, size: 64 << 10}), newEnd(x, b, endConfig{typ: ib.RC, size: 64 << 10})
	for i := range eb.buf {
		ea.buf[i], eb.buf[i] = 0xaa, 0xbb
	}
	psn := [2]ib.PSN{ib.PSN(x.net.Uint32()) & ib.MaxPSN, ib.PSN(x.net.Uint32()) & ib.MaxPSN}
	at := func(side int) netip.AddrPort { return netip.AddrPortFrom(x.addrs[side], roce.Port) }
	ea.wire(wireTo{gid: 1, addr: at(1), own: x.own, qpn: eb.q.QPN(), from: psn[0], at: psn[1]})
	eb.wire(wireTo{gid: 1, addr: at(0), own: x.own, qpn: ea.q.QPN(), from: psn[1], at: psn[0]})
	return ea, eb
}

// talk sends n messages from one end to the other, and looks at each, and at the memory around it.
func talk(t testing.TB, from, to *end, n int, mark byte) {
	t.Helper()
	const size = 600 // of three packets
	background := bytes.Clone(to.buf)
	for i := range n {
		msg := bytes.Repeat([]byte{mark, byte(i)}, size/2)
		copy(from.buf, msg)
		to.recv(uint64(i), to.sge(1024, size))
		from.send(ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: from.sge(0, size)})
		if wc := from.poll(); wc.ID != uint64(i) || wc.Status != ib.WCSuccess {
			t.Fatalf("message %d, sent: %+v", i, wc)
		}
		if wc := to.poll(); wc.ID != uint64(i) || wc.Status != ib.WCSuccess || wc.ByteLen != size {
			t.Fatalf("message %d, received: %+v", i, wc)
		}
		copy(background[1024:], msg)
		if !bytes.Equal(to.buf, background) {
			t.Fatalf("message %d: the memory has something else", i)
		}
	}
}

// over checks that a connection has ended as one whose peer is gone: n requests that were posted, the first with RETRY_EXC_ERR, the
// others flushed, and the QP in ERR.
func over(t testing.TB, e *end, n int) {
	t.Helper()
	for i := range n {
		want := ib.WCFlushErr
		if i == 0 {
			want = ib.WCRetryExceeded
		}
		if wc := e.poll(); wc.Status != want {
			t.Fatalf("request %d of the connection whose peer is gone: %+v, want %v", i, wc, want)
		}
	}
	if a, err := e.q.Query(); err != nil || a.State != ib.Err {
		t.Errorf("the QP is in %v, %v", a.State, err)
	}
}

// restarts runs f for several seeds, between NICs of ours, and with what others are: go-back-N.
func restarts(t *testing.T, f func(x *simRestart)) {
	for seed := range uint64(8) {
		for _, own := range []bool{true, false} {
			t.Run(fmt.Sprintf("seed=%d,selective=%t", seed, own), func(t *testing.T) { f(newSimRestart(t, seed, own)) })
		}
	}
}

// Requests that nobody answers end in the time that retries take, whether somebody has come back in the peer's place or not.
func TestRequestsOfADeadPeer(t *testing.T) {
	restarts(t, func(x *simRestart) {
		b := x.open(1)
		ea, eb := x.pair(b)
		talk(x, ea, eb, 5, 1)
		die(b)
		const requests = 20
		began := x.net.Now()
		for i := range requests {
			ea.send(ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: ea.sge(0, 600)})
		}
		if x.net.Uint32()%2 == 0 {
			x.open(1)
		}
		over(x, ea, requests)
		// A timeout may take up to four times what is asked for (IBA 9.7.6.1.3). Here it is twice that at most: the pauses between what is
		// sent meanwhile double.
		if took, most := x.net.Now()-began, 2*(restartRetries+1)*ib.AckTimeoutFor(restartTimeout).Duration(); took > most {
			x.Errorf("that took %v, more than %v", took, most)
		}
	})
}

// A connection to the peer that has come back works while the old one still sends to the same queue pair, and none of that arrives
// there. The old one is over when the new one has heard of the peer.
func TestPeerRestarts(t *testing.T) {
	restarts(t, func(x *simRestart) {
		b := x.open(1)
		old, eb := x.pair(b)
		talk(x, old, eb, 5, 1)
		talk(x, eb, old, 5, 2)
		die(b)
		// What it had sent, and was not answered, comes to its successor: messages, and WRITEs where the memory was.
		const requests = 20
		for i := range requests {
			wr := ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: old.sge(0, 600)}
			if i%2 == 1 {
				wr.Opcode, wr.RemoteAddr, wr.RKey = ib.OpRDMAWrite, addrOf(eb.buf), eb.mr.RKey()
			}
			old.send(wr)
		}
		b2 := x.open(1)
		b2.nextQPN = eb.q.QPN()
		ea2, eb2 := x.pair(b2)
		if eb2.q.QPN() != eb.q.QPN() {
			x.Fatalf("the peer's QP has number %d, and had %d", eb2.q.QPN(), eb.q.QPN())
		}
		memory := bytes.Clone(eb2.buf)
		eb2.recv(99, eb2.sge(1024, 600))
		x.net.Advance(2 * restartTimeout) // the old connection sends again, to the new queue pair
		if n := eb2.q.(*QP).wire.resp.Counters.Received; n == 0 {
			x.Error("nothing of the old connection has come to the new queue pair")
		}
		if !bytes.Equal(eb2.buf, memory) {
			x.Fatal("the old connection has written to the memory of the new one's peer")
		}
		copy(ea2.buf, "the first that is meant")
		ea2.send(ib.SendWR{ID: 98, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: ea2.sge(0, 600)})
		if wc := ea2.poll(); wc.ID != 98 || wc.Status != ib.WCSuccess {
			x.Fatalf("%+v", wc)
		}
		if wc := eb2.poll(); wc.ID != 99 || wc.Status != ib.WCSuccess || !bytes.HasPrefix(eb2.buf[1024:], []byte("the first that is meant")) {
			x.Fatalf("%+v: %.30q", wc, eb2.buf[1024:])
		}
		talk(x, ea2, eb2, 20, 3)
		talk(x, eb2, ea2, 20, 4)
		over(x, old, requests)
		ctx, cancel := x.net.Timeout(time.Second)
		defer cancel()
		if e, err := x.a.AsyncEvent(ctx); err != nil || e.Type != ib.EventQPFatal || e.QP != driver.QP(old.q.(*QP)) {
			x.Errorf("%+v, %v", e, err)
		}
	})
}

// A connection that only receives hears of nothing that would end it, but of its successor.
func TestPeerRestartsUnnoticed(t *testing.T) {
	restarts(t, func(x *simRestart) {
		b := x.open(1)
		old, eb := x.pair(b)
		talk(x, eb, old, 5, 1)
		old.recv(7, old.sge(0, 600))
		die(b)
		b2 := x.open(1)
		b2.nextQPN = eb.q.QPN()
		ea2, eb2 := x.pair(b2)
		if a, _ := old.q.Query(); a.State != ib.RTS {
			x.Fatalf("the old connection is in %v before its peer is known to be another's", a.State)
		}
		if x.net.Uint32()%2 == 0 {
			talk(x, eb2, ea2, 1, 2) // its peer's request says so
		} else {
			talk(x, ea2, eb2, 1, 2) // or its answer
		}
		if wc := old.poll(); wc.ID != 7 || wc.Status != ib.WCFlushErr {
			x.Errorf("the receive ends with %+v", wc)
		}
		old.send(ib.SendWR{ID: 8, Opcode: ib.OpSend, SGEs: old.sge(0, 8)})
		over(x, old, 1)
	})
}

// With the connection, its requester ends, whatever it was doing: no answer that still comes, and no timer, finds a request there.
func TestAbandonedRequester(t *testing.T) {
	for _, op := range []ib.Opcode{ib.OpSend, ib.OpRDMARead} {
		t.Run(op.String(), func(t *testing.T) {
			x := newSimRestart(t, 1, true)
			b := x.open(1)
			ea, eb := x.pair(b)
			talk(x, ea, eb, 1, 1)
			const requests = 5
			for i := range requests {
				eb.recv(uint64(i), eb.sge(1024, 600))
				ea.send(ib.SendWR{ID: uint64(i), Opcode: op, Flags: ib.SendSignaled, SGEs: ea.sge(0, 600), RemoteAddr: addrOf(eb.buf), RKey: eb.mr.RKey()})
			}
			q := ea.q.(*QP)
			w := q.wire
			q.sq.Lock()
			given := w.given
			q.unanswered()
			if given != requests || w.given != 0 || !w.req.Failed() || w.req.Deadline() != 0 {
				t.Errorf("%d requests were given, %d are left; the requester has failed: %t, and waits until %v", given, w.given, w.req.Failed(), w.req.Deadline())
			}
			q.unlockSends()
			x.net.Advance(2 * restartTimeout)
			over(x, ea, requests)
		})
	}
}

// Connections to one queue pair of a peer come and go in any order.
func TestStaleConnections(t *testing.T) {
	x := newSimRestart(t, 1, true)
	p := x.a.sim.port
	var ends []*end
	add := func() *end {
		e := makeEnd(t, x.a, endConfig{typ: ib.RC, size: 4096})
		e.wire(wireTo{gid: 1, addr: netip.AddrPortFrom(x.addrs[1], roce.Port), own: true, qpn: 77})
		ends = append(ends, e)
		return e
	}
	check := func(what string, want ...int) {
		t.Helper()
		var got []int
		for w := p.newest[peerQP{netip.AddrPortFrom(x.addrs[1], roce.Port), 77}]; w != nil; w = w.older {
			for i, e := range ends {
				if e.q.(*QP) == w.q {
					got = append(got, i)
				}
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	add()
	add()
	add()
	check("three", 2, 1, 0)
	ends[1].close()
	check("without the middle", 2, 0)
	ends[2].close()
	check("without the newest", 0)
	add()
	ends[0].close()
	check("without the oldest", 3)
	ends[3].close()
	check("none")
	if len(p.newest) != 0 {
		t.Errorf("left: %v", p.newest)
	}
}

// What is kept of packets that came before others is the NIC's, and comes back with the QP's end, whichever that is.
func TestEarlyPacketsAreGivenBack(t *testing.T) {
	for name, end := range map[string]func(e *end) error{
		"ERR":   func(e *end) error { return e.q.Modify(t.Context(), &ib.QPAttr{State: ib.Err}, ib.AttrState) },
		"RESET": func(e *end) error { return e.q.Modify(t.Context(), &ib.QPAttr{State: ib.Reset}, ib.AttrState) },
		"close": func(e *end) error { return e.q.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			x := newSimRestart(t, 1, true)
			for range 2 {
				_, eb := x.pair(x.a)
				w := eb.q.(*QP).wire
				for i := range 3 {
					w.receive(&roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly), PSN: eb.q.(*QP).attr.RQPSN.Add(int32(2 + i)), Payload: make([]byte, 64)})
				}
				if x.a.early.Lent() == 0 {
					t.Fatal("nothing is kept")
				}
				if err := end(eb); err != nil {
					t.Fatal(err)
				}
				if n := x.a.early.Lent(); n != 0 {
					t.Errorf("%d bytes are left", n)
				}
			}
		})
	}
}

// What the observers of a port are told of is the same before and after connections have ended.
func TestCountersOfEndedConnections(t *testing.T) {
	x := newSimRestart(t, 1, true)
	b := x.open(1)
	ea, eb := x.pair(b)
	talk(x, ea, eb, 5, 1)
	ea.send(ib.SendWR{ID: 1, Opcode: ib.OpRDMAWrite, Flags: ib.SendSignaled, SGEs: ea.sge(0, 8), RemoteAddr: addrOf(eb.buf), RKey: eb.mr.RKey() + 1})
	if wc := ea.poll(); wc.Status != ib.WCRemoteAccessErr {
		t.Fatalf("%+v", wc)
	}
	here, there := x.a.Counters().Ports[0], b.Counters().Ports[0]
	if n := there.Total.RefusedBy[observe.RefusedAccess]; n != 1 || there.Total.Refused != 1 || here.Total.Sent < 16 || here.Conns != 1 {
		t.Errorf("%+v\n%+v", here, there)
	}
	ea.close()
	eb.close()
	here.Conns, there.Conns = 0, 0
	if is, was := x.a.Counters().Ports[0], here; !reflect.DeepEqual(is, was) {
		t.Errorf("%+v, and were %+v", is, was)
	}
	if is, was := b.Counters().Ports[0], there; !reflect.DeepEqual(is, was) {
		t.Errorf("%+v, and were %+v", is, was)
	}
}

// The port of a NIC on a simulated network is up, as such a network is.
func TestSimulatedPortIsActive(t *testing.T) {
	x := newSimRestart(t, 1, true)
	if a, err := x.a.QueryPort(1); err != nil || a.State != ib.PortActive {
		t.Errorf("%+v, %v", a, err)
	}
}
