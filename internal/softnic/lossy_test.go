package softnic

import (
	"bytes"
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic/simnet"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// unreliableNets are the networks of TestUnreliableLosses.
var unreliableNets = map[string]simnet.Faults{
	"clean": {Delay: 5 * time.Microsecond, Jitter: 20 * time.Microsecond},
	"lossy": {Delay: 5 * time.Microsecond, Jitter: 10 * time.Microsecond, Loss: 0.04, Duplicate: 0.04, Corrupt: 0.02,
		Reorder: 0.05, ReorderBy: 400 * time.Microsecond},
	"cut": {Delay: 50 * time.Microsecond, Jitter: 50 * time.Microsecond, Every: 5 * time.Millisecond, For: 2 * time.Millisecond},
}

// On a network that loses packets, delivers them twice, damages them, and changes their order, a datagram comes as often as its packet
// arrives, and a message of UC if its packets have come one after the other: so one of a single packet may come twice, too, and late, as with
// adapters (IBA 9.8.2.2). What comes is whole, and what does not leaves no trace. The sender knows nothing of it.
func TestUnreliableLosses(t *testing.T) {
	for name, faults := range unreliableNets {
		for _, typ := range []ib.QPType{ib.UC, ib.UD} {
			var sent, came int
			for seed := range uint64(10) {
				s, c := unreliable(t, simnet.New(seed, faults), typ, faults.Lossy())
				sent, came = sent+s, came+c
				if t.Failed() {
					t.Fatalf("%s, %v, seed %d", name, typ, seed)
				}
			}
			if faults.Lossy() && (came >= sent || came < sent/3) || !faults.Lossy() && came != sent {
				t.Errorf("%s, %v: %d of %d messages have come", name, typ, came, sent)
			}
		}
	}
}

// unreliable sends messages over a network, and returns how many, and how many of them have come.
func unreliable(t *testing.T, net *simnet.Network, typ ib.QPType, lossy bool) (sent, came int) {
	const messages, room, base = 50, 1024, 128 << 10
	var ends [2]*end
	addrs := [2]netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}
	for i := range ends {
		n, err := OpenSim(net, addrs[i])
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		ends[i] = makeEnd(t, n, endConfig{typ: typ, depth: 128})
		defer ends[i].close()
	}
	a, b := ends[0], ends[1]
	wr := ib.SendWR{Opcode: ib.OpSendWithImm, Flags: ib.SendSignaled}
	head := 0
	if typ == ib.UD {
		a.ready()
		b.ready()
		ah, err := a.pd.CreateAH(ib.AHAttr{DGID: ib.GIDFromAddr(addrs[1]), SGIDIndex: 1, Port: 1})
		if err != nil {
			t.Fatal(err)
		}
		defer ah.Close()
		wr.AH, wr.RemoteQPN, wr.RemoteQKey = ah.Num(), b.q.QPN(), testQKey
		head = ib.GRHLen
	} else {
		connectUC(ends, addrs)
	}
	for i := range 2 * messages {
		b.recv(uint64(i), b.sge(base+i*room, room))
	}
	length := func(i int) int { return i * 37 % 700 }
	for i := range messages {
		copy(a.buf, bytes.Repeat([]byte{byte(i)}, length(i)))
		wr.ID, wr.Imm, wr.SGEs = uint64(i), uint32(i), a.sge(0, length(i))
		a.send(wr)
		if wc := a.poll(); wc.Status != ib.WCSuccess || wc.ID != uint64(i) {
			t.Fatalf("message %d: %+v", i, wc)
		}
		net.Advance(200 * time.Microsecond)
	}
	net.Advance(20 * time.Millisecond)
	seen := map[uint32]bool{}
	last, receives := -1, uint64(0)
	for wcs := [1]ib.WC{}; b.cq.Poll(wcs[:]) == 1; receives++ {
		wc := &wcs[0]
		i := int(wc.Imm)
		if wc.Status != ib.WCSuccess || wc.ID != receives || wc.Flags&ib.WCWithImm == 0 || i >= messages || int(wc.ByteLen) != head+length(i) {
			t.Errorf("receive %d: %+v", receives, *wc)
			return
		}
		if got := b.buf[base+int(wc.ID)*room+head:][:length(i)]; !bytes.Equal(got, bytes.Repeat([]byte{byte(i)}, length(i))) {
			t.Errorf("message %d is % x", i, got)
		}
		if !lossy && i <= last || typ == ib.UC && length(i) > 256 && seen[wc.Imm] {
			t.Errorf("message %d has come after message %d", i, last)
		}
		last, seen[wc.Imm] = i, true
	}
	// Each packet is a datagram, so that the network knows how many must have come.
	if c := net.Counters(); typ == ib.UD && receives != c.Sent-c.Lost+c.Repeated-c.CutOff-c.Refused {
		t.Errorf("%d datagrams have come, and the network says %+v", receives, c)
	}
	return messages, len(seen)
}

// connectUC takes two ends on a simulated network, at these addresses, to RTS.
func connectUC(ends [2]*end, addrs [2]netip.Addr) {
	for i, e := range ends {
		e.t.Helper()
		e.init()
		to := ib.AHAttr{DGID: ib.GIDFromAddr(addrs[1-i]), SGIDIndex: 1, Port: 1}
		rtr := ib.QPAttr{State: ib.RTR, AH: to, PathMTU: ib.MTU256, DestQPN: ends[1-i].q.QPN()}
		if err := e.q.Modify(context.Background(), &rtr, ib.AttrState|ib.AttrAV|ib.AttrPathMTU|ib.AttrDestQPN|ib.AttrRQPSN); err != nil {
			e.t.Fatal(err)
		}
		if err := e.q.Modify(context.Background(), &ib.QPAttr{State: ib.RTS}, ib.AttrState|ib.AttrSQPSN); err != nil {
			e.t.Fatal(err)
		}
	}
}

// simPair makes two ends, at these addresses of a simulated network that loses nothing.
func simPair(t *testing.T, typ ib.QPType) (net *simnet.Network, ends [2]*end, addrs [2]netip.Addr) {
	net = simnet.New(1, simnet.Faults{Delay: 5 * time.Microsecond})
	addrs = [2]netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}
	for i := range ends {
		n, err := OpenSim(net, addrs[i])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { n.Close() })
		ends[i] = newEnd(t, n, endConfig{typ: typ})
	}
	return net, ends, addrs
}

// Requests behind one that is executed here are sent with those before it: of UC nothing else would come that has them sent.
func TestUnreliableBehindLocal(t *testing.T) {
	net, ends, addrs := simPair(t, ib.UC)
	a, b := ends[0], ends[1]
	connectUC(ends, addrs)
	w, err := a.pd.(driver.MWAllocator).AllocMW()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	send := ib.SendWR{Opcode: ib.OpSend, SGEs: a.sge(0, 600)}
	key := w.RKey() + 1
	bind := ib.SendWR{Opcode: ib.OpBindMW, Bind: &ib.BindMW{Window: w.Handle(), RKey: key, MRLKey: a.mr.LKey(), Addr: addrOf(a.buf), Length: 64, Access: ib.AccessRemoteRead}}
	invalidate := ib.SendWR{Opcode: ib.OpLocalInv, InvalidateRKey: key}
	wrs := []ib.SendWR{send, bind, send, invalidate, send}
	wrs[4].ID, wrs[4].Flags = 5, ib.SendSignaled
	for i := range 3 {
		b.recv(uint64(i), b.sge(i*1024, 1024))
	}
	if n, err := a.q.PostSend(wrs); n != len(wrs) || err != nil {
		t.Fatalf("%d are posted: %v", n, err)
	}
	net.Advance(time.Second)
	var wcs [4]ib.WC
	if n := a.cq.Poll(wcs[:]); n != 1 || wcs[0].ID != 5 || wcs[0].Status != ib.WCSuccess {
		t.Errorf("%d have ended: %+v", n, wcs[:max(n, 0)])
	}
	if n := b.cq.Poll(wcs[:]); n != 3 {
		t.Errorf("%d messages have come", n)
	}
}
