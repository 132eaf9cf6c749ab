package cm

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Whatever a peer says, to a listener or to who has dialled it, in whatever order: nothing breaks, and what is kept is bounded.
func FuzzEngine(f *testing.F) {
	n, a, b, s := pairOf(f, 10)
	client, _ := connected(n, a, b, s)
	client.c.Disconnect(n.now)
	n.run(time.Second)
	seed := func(x *node) (all []byte) {
		for _, m := range x.sent {
			var mad [roce.MADLen]byte
			roce.PutMAD(mad[:], 1, m)
			all = append(all, mad[:]...)
		}
		return all
	}
	f.Add(seed(a), uint32(0))
	f.Add(append(seed(a), seed(a)...), uint32(0x5a5a5a5a))
	f.Add(append(seed(b), seed(a)...), uint32(0xffffffff))
	f.Fuzz(func(t *testing.T, data []byte, choices uint32) {
		n := newNetwork(t, 1)
		b := n.node(1)
		s := b.listen(3)
		choose := func(of uint32) uint32 {
			x := choices % of
			choices = choices/of ^ choices<<27
			return x
		}
		var dialled []*side
		for len(data) >= roce.MADLen {
			mad := bytes.Clone(data[:roce.MADLen])
			data = data[roce.MADLen:]
			if choose(2) == 0 { // names that this side knows
				for id, c := range b.e.conns {
					if c != nil {
						mad[24+4], mad[24+5], mad[24+6], mad[24+7] = byte(id>>24), byte(id>>16), byte(id>>8), byte(id)
					}
				}
			}
			b.e.Receive(managerAt(addrs[choose(3)]), mad, n.now)
			switch choose(8) {
			case 0:
				if len(dialled) < 4 {
					d := &side{x: b}
					d.c, _ = b.e.Connect(n.now, 0, netip.AddrPortFrom(addrs[0], testPort), &Params{QPN: ib.QPN(10 + len(dialled)), MTU: ib.MTU1024}, d)
					dialled = append(dialled, d)
				}
			case 1:
				n.now += time.Second
				b.e.Expire(n.now)
			}
			for _, x := range append(dialled, s.came...) {
				switch choose(6) {
				case 0:
					x.c.Accept(n.now, &Params{QPN: 99})
				case 1:
					x.c.Ready()
				case 2:
					x.c.Disconnect(n.now)
				case 3:
					x.c.Abandon(n.now)
				}
			}
			if len(b.e.conns) > 7+maxMemory || len(b.e.timers) > len(b.e.conns) || len(b.e.old) > maxMemory {
				t.Fatalf("%d connections, %d timers, %d old", len(b.e.conns), len(b.e.timers), len(b.e.old))
			}
		}
		for _, x := range append(dialled, s.came...) {
			x.c.Abandon(n.now)
		}
		for range 1000 { // hours
			n.now += time.Minute / 4
			b.e.Expire(n.now)
		}
		if e := b.e; len(e.conns)+len(e.requests)+len(e.peers)+len(e.timers)+len(e.old)+len(e.bound)+e.leaving != 0 {
			t.Errorf("left: %+v", e)
		}
	})
}
