package softnic

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/softnic/udp"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// loopbackPort gives the NIC one address, of the loopback device, and a UDP port there; 0: any.
func loopbackPort(t testing.TB, n *NIC, addr netip.AddrPort) *netPort {
	t.Helper()
	sock, err := udp.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	p, err := startPort(n, sock, simMTU)
	if err != nil {
		t.Fatal(err)
	}
	n.gids = gidTable{fixed: true, slots: []gidSlot{{addr: addr.Addr(), mtu: simMTU, netDev: "lo", there: true, port: p}}}
	n.netPorts.Store(&[]*netPort{p})
	return p
}

// ownLoopback is an address that only this run uses: what comes to it comes from nobody else.
func ownLoopback() netip.Addr {
	pid := os.Getpid()
	return netip.AddrFrom4([4]byte{127, byte(80 + pid>>16), byte(pid >> 8), byte(pid)})
}

const (
	phoenixQPN      = 0x4242
	phoenixSize     = 600
	phoenixMessages = 100
	phoenixTimeout  = 250 * time.Millisecond // of an acknowledgement: a busy machine has other things to do
)

// phoenix is a peer that can be killed, and started again with the same address, UDP port and queue pair number: its address and port are
// its argument. It sends what it receives back, and looks at its memory.
func init() {
	testutil.RegisterChild("softnic.phoenix", func(args []string) {
		t := childTB{}
		n, err := Open()
		if err != nil {
			t.Fatal(err)
		}
		p := loopbackPort(t, n, netip.MustParseAddrPort(args[0]))
		n.nextQPN = phoenixQPN
		e := makeEnd(t, n, endConfig{typ: ib.RC, size: 64 << 10})
		psn := ib.PSN(rand.Uint32()) & ib.MaxPSN
		fmt.Println("here:", p.sock.Local(), uint32(e.q.QPN()), uint32(psn), addrOf(e.buf), uint32(e.mr.RKey()))
		var to string
		var qpn, peerPSN uint32
		if _, err := fmt.Sscan(<-testutil.ChildInput(), &to, &qpn, &peerPSN); err != nil {
			t.Fatal(err)
		}
		for i := range e.buf {
			e.buf[i] = 0xbb
		}
		e.wire(wireTo{gid: 1, addr: netip.MustParseAddrPort(to), own: true, qpn: ib.QPN(qpn), from: psn, at: ib.PSN(peerPSN), timeout: phoenixTimeout})
		e.recv(0, e.sge(0, phoenixSize))
		fmt.Println("ready:")
		memory := bytes.Clone(e.buf)
		for i := 0; ; i++ {
			wc := e.pollFor(ib.WCRecv)
			if wc.ID != uint64(i) || wc.Status != ib.WCSuccess || wc.ByteLen != phoenixSize {
				t.Fatalf("message %d: %+v", i, wc)
			}
			copy(memory, e.buf[:phoenixSize])
			if !bytes.Equal(e.buf, memory) {
				t.Fatalf("message %d: other memory was written to", i)
			}
			e.recv(uint64(i+1), e.sge(0, phoenixSize))
			e.send(ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, Inline: memory[:8]})
		}
	})
}

// pollFor returns the next completion of a kind, however long that takes, and ends the process if another is an error.
func (e *end) pollFor(op ib.WCOpcode) ib.WC {
	var wc [1]ib.WC
	for {
		switch n := e.cq.Poll(wc[:]); {
		case n < 0:
			e.t.Fatalf("poll: %v", e.cq.Err())
		case n == 0:
			runtime.Gosched()
		case wc[0].Opcode == op:
			return wc[0]
		case wc[0].Status != ib.WCSuccess:
			e.t.Fatalf("%+v", wc[0])
		}
	}
}

// phoenixPeer is a child, and how to reach it.
type phoenixPeer struct {
	*testutil.Child
	at   netip.AddrPort
	psn  uint32
	mem  uint64
	rkey uint32
}

// startPhoenix starts one in a network namespace; "": in this one.
func startPhoenix(t *testing.T, namespace string, at netip.AddrPort) *phoenixPeer {
	t.Helper()
	p := &phoenixPeer{Child: testutil.StartChildIn(t, namespace, nil, "softnic.phoenix", at.String())}
	var qpn uint32
	var where string
	line := p.Expect("here:")
	if _, err := fmt.Sscan(line, &where, &qpn, &p.psn, &p.mem, &p.rkey); err != nil || qpn != phoenixQPN {
		t.Fatalf("%q: %v", line, err)
	}
	p.at = netip.MustParseAddrPort(where)
	return p
}

// connect makes an end of the port's NIC that is connected to the child.
func (p *phoenixPeer) connect(t *testing.T, port *netPort) *end {
	t.Helper()
	e := newEnd(t, port.nic, endConfig{typ: ib.RC, size: 64 << 10})
	psn := ib.PSN(rand.Uint32()) & ib.MaxPSN
	p.Send(fmt.Sprint(port.sock.Local(), " ", uint32(e.q.QPN()), " ", uint32(psn)))
	e.wire(wireTo{gid: 1, addr: p.at, own: true, qpn: phoenixQPN, from: psn, at: ib.PSN(p.psn), timeout: phoenixTimeout})
	p.Expect("ready:")
	return e
}

// echo has the child send messages back.
func (e *end) echo(mark byte) {
	e.t.Helper()
	for i := range phoenixMessages {
		copy(e.buf, bytes.Repeat([]byte{mark, byte(i)}, phoenixSize/2))
		e.recv(uint64(i), e.sge(8192, 64))
		e.send(ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, SGEs: e.sge(0, phoenixSize)})
		if wc := e.poll(); wc.Opcode != ib.WCRecv || wc.ID != uint64(i) || wc.Status != ib.WCSuccess || wc.ByteLen != 8 || !bytes.Equal(e.buf[8192:8200], e.buf[:8]) {
			e.t.Fatalf("echo %d: %+v, % x, want % x", i, wc, e.buf[8192:8200], e.buf[:8])
		}
	}
}

// A process is killed in the middle of what it is sent, and another comes back with its address, UDP port and queue pair number while it is
// still being sent to: the old connection ends with an error, and nothing of it disturbs the new one.
func TestPeerProcessRestarts(t *testing.T) {
	n := openNIC(t, false)
	addr := ownLoopback()
	port := loopbackPort(t, n, netip.AddrPortFrom(addr, 0))
	peer := startPhoenix(t, "", netip.AddrPortFrom(addr, 0))
	old := peer.connect(t, port)
	for round := range 3 {
		old.echo(byte(2 * round))
		const requests = 40
		for i := range requests {
			wr := ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: old.sge(0, phoenixSize)}
			if i%2 == 1 {
				wr.Opcode, wr.RemoteAddr, wr.RKey = ib.OpRDMAWrite, peer.mem, ib.RKey(peer.rkey)
				wr.SGEs = old.sge(0, 8) // which are there already
			}
			if i == requests/2 {
				peer.Kill()
			}
			old.send(wr)
		}
		next := startPhoenix(t, "", peer.at)
		e := next.connect(t, port)
		e.echo(byte(2*round + 1))
		failed := 0
		for range requests {
			switch wc := old.poll(); {
			case failed == 0 && wc.Status == ib.WCSuccess:
			case failed == 0 && wc.Status == ib.WCRetryExceeded, failed > 0 && wc.Status == ib.WCFlushErr:
				failed++
			default:
				t.Fatalf("%+v after %d that failed", wc, failed)
			}
		}
		if failed < requests/2 {
			t.Errorf("%d requests have failed; %d were posted after the peer had died", failed, requests/2)
		}
		if a, _ := old.q.Query(); a.State != ib.Err {
			t.Errorf("the old connection is in %v", a.State)
		}
		old, peer = e, next
	}
}
