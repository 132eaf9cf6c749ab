package softnic

import (
	"net/netip"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/udp"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// BenchmarkEchoUDP sends 64 bytes there and back over UDP, on one thread: the sum of both sides' costs, without waiting. Beside it,
// packets of the same length between sockets alone: the difference is what queue pairs cost.
func BenchmarkEchoUDP(b *testing.B) {
	b.Run("QP", func(b *testing.B) {
		x, y := newEnd(b, openNIC(b, true), endConfig{typ: ib.RC}), newEnd(b, openNIC(b, true), endConfig{typ: ib.RC})
		joinUDP(b, x, y, 0)
		wr := []ib.SendWR{{ID: 1, Opcode: ib.OpSend, Inline: make([]byte, 64)}}
		var wc [16]ib.WC
		xr, yr := []ib.RecvWR{{ID: 2, SGEs: x.sge(0, 64)}}, []ib.RecvWR{{ID: 2, SGEs: y.sge(0, 64)}}
		side := func(from, to *end, rr []ib.RecvWR) {
			to.q.PostRecv(rr)
			from.q.PostSend(wr)
			for to.cq.Poll(wc[:]) == 0 {
			}
		}
		b.ReportAllocs()
		for b.Loop() {
			side(x, y, yr)
			side(y, x, xr)
		}
	})
	b.Run("nothing", func(b *testing.B) { // what a poll costs that finds none: a message waits for half of one before it is seen
		x, y := newEnd(b, openNIC(b, true), endConfig{typ: ib.RC}), newEnd(b, openNIC(b, true), endConfig{typ: ib.RC})
		joinUDP(b, x, y, 0)
		var wc [16]ib.WC
		b.ReportAllocs()
		for b.Loop() {
			if x.cq.Poll(wc[:]) != 0 {
				b.Fatal("a completion of nothing")
			}
		}
	})
	b.Run("sockets", func(b *testing.B) {
		var socks [2]*udp.Socket
		var peers [2]*udp.Peer
		for i := range socks {
			var err error
			if socks[i], err = udp.Listen(netip.MustParseAddrPort("127.0.0.1:0")); err != nil {
				b.Fatal(err)
			}
			defer socks[i].Close()
		}
		for i := range peers {
			peers[i], _ = socks[i].Peer(socks[1-i].Local())
		}
		h := &roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly), PKey: roce.DefaultPKey, DestQP: 17}
		some := func(netip.AddrPort, *roce.Packet) {}
		b.ReportAllocs()
		for b.Loop() {
			for i := range socks {
				peers[i].Packet(h, 64)
				peers[i].Commit()
				socks[i].Flush()
				for n := 0; n == 0; {
					n, _, _ = socks[1-i].Receive(time.Time{}, some)
				}
			}
		}
	})
}
