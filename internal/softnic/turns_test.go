package softnic

import (
	"net/netip"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/simnet"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// sentInTurns steps until the network has been given all packets, and checks that no turn has sent too many of them, and for how long they
// have waited.
func sentInTurns(t *testing.T, net *simnet.Network, first, all uint64, wait time.Duration) {
	t.Helper()
	const most = (maxFilled + 1) * 128 // the socket's room
	began, was := net.Now(), net.Counters().Sent
	if was-first > most {
		t.Errorf("the first turn sends %d packets", was-first)
	}
	for was < first+all {
		if !net.Step() {
			t.Fatalf("%d of %d packets were sent, and nothing happens any more", was-first, all)
		}
		now := net.Counters().Sent
		if now-was > most {
			t.Errorf("a turn sends %d packets", now-was)
		}
		was = now
	}
	if took := net.Now() - began; took > wait {
		t.Errorf("the turns have waited for %v, at most %v was to be expected", took, wait)
	}
}

// The answer to one READ does not keep the port from what else it has to do, and waits for nothing else.
func TestLongAnswerInTurns(t *testing.T) {
	net, ends, addrs := simPair(t, ib.RC)
	a, b := ends[0], ends[1]
	at := func(i int) netip.AddrPort { return netip.AddrPortFrom(addrs[i], roce.Port) }
	a.wire(wireTo{gid: 1, addr: at(1), qpn: b.q.QPN(), from: 70, at: 500})
	b.wire(wireTo{gid: 1, addr: at(0), qpn: a.q.QPN(), from: 500, at: 70})
	const size = 1 << 20
	sock := a.n.sim.port.sock // a requester of ours would ask for a part at a time
	peer, err := sock.Peer(at(1), false)
	if err != nil {
		t.Fatal(err)
	}
	read := roce.Packet{Opcode: roce.Op(roce.RC, roce.ReadRequest), PKey: roce.DefaultPKey, DestQP: uint32(b.q.QPN()), PSN: 70, AckReq: true,
		Addr: addrOf(b.buf), RKey: uint32(b.mr.RKey()), Len: size}
	if _, ok := peer.Packet(&read, 0); !ok {
		t.Fatal("no room")
	}
	peer.Commit()
	sock.Flush()
	first := net.Counters().Sent
	for net.Counters().Sent == first {
		net.Step() // until it has come
	}
	sentInTurns(t, net, first, uint64(size/restartMTU.Bytes()), 0)
}

// Nor does a message of an unreliable connection, which nothing else slows down.
func TestLongMessageInTurns(t *testing.T) {
	net, ends, addrs := simPair(t, ib.UC)
	a, b := ends[0], ends[1]
	connectUC(ends, addrs)
	const size = 1 << 20
	b.recv(1, b.sge(0, size))
	a.send(ib.SendWR{ID: 2, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: a.sge(0, size)})
	sentInTurns(t, net, 0, size/256, blockedRetry) // for a poller, who would go on at once
	for i, e := range []*end{b, a} {
		if wc := e.poll(); wc.ID != uint64(i+1) || wc.Status != ib.WCSuccess {
			t.Errorf("%+v", wc)
		}
	}
}
