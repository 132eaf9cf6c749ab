package softnic

import (
	"fmt"
	"sync"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// holdings is what a link keeps that must not grow with the number of connections that have come and gone.
type holdings struct{ chunks, blocks, leaving, ports, sent, wakers, srqs, connects, views, assists int }

func (l *link) holds() holdings {
	l.mu.Lock()
	defer l.mu.Unlock()
	ports := 0
	for _, p := range l.ports {
		ports += len(p)
	}
	return holdings{len(l.chunks), l.ownedBlk, len(l.leaving), ports, len(l.sent), len(l.wakers), len(l.srqs), len(l.connects),
		len(l.views), len(l.assists)}
}

func (n *NIC) onlyLink(t testing.TB) *link {
	t.Helper()
	var found *link
	n.eachLink(func(l *link) { found = l })
	if found == nil {
		t.Fatal("there is no link")
	}
	return found
}

// exchange sends one message from a to b.
func exchange(a, b *end) {
	a.t.Helper()
	b.recv(2, b.sge(0, 64))
	a.send(ib.SendWR{ID: 1, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: a.sge(0, 64)})
	if wc := a.poll(); wc.Status != ib.WCSuccess {
		a.t.Fatalf("send: %+v", wc)
	}
	if wc := b.poll(); wc.Status != ib.WCSuccess {
		a.t.Fatalf("recv: %+v", wc)
	}
}

// Two NICs that stay joined for long see many connections, each with a CQ and a channel of its own, come and go.
func TestConnectionsLeaveNothingBehind(t *testing.T) {
	cycles := 2000
	if testing.Short() || raceEnabled {
		cycles = 200
	}
	paths(t, func(t *testing.T, na, nb *NIC) {
		var fds, maps int
		var first holdings
		settled := func() (h holdings) {
			testutil.Eventually(t, "everything but chunks is released", func() bool {
				h = nb.onlyLink(t).holds()
				return h == (holdings{chunks: h.chunks, sent: h.sent}) && na.onlyLink(t).holds().leaving == 0
			})
			return h
		}
		cfg := endConfig{typ: ib.RC, depth: 4, size: 4096, private: true}
		for i := range cycles {
			if i == 10 {
				first, fds, maps = settled(), testutil.OpenFDs(), testutil.SharedMappings()
			}
			x, y := makeEnd(t, na, cfg), makeEnd(t, nb, cfg)
			x.connect(y)
			y.connect(x)
			if i%8 == 0 {
				exchange(x, y)
			}
			x.close()
			y.close()
		}
		testutil.Eventually(t, fmt.Sprintf("the link holds what it did after 10 cycles: %+v", first), func() bool {
			h := settled()
			return h.chunks <= max(first.chunks, 2) && h.sent <= first.sent // blocks on their way may need a second chunk
		})
		testutil.Eventually(t, fmt.Sprintf("%d descriptors and %d mappings", fds, maps), func() bool {
			return testutil.OpenFDs() <= fds && testutil.SharedMappings() <= maps+2
		})
	})
}

// Shared receive queues and datagram QPs have memory that the peer maps: it goes when they go.
func TestReceiveQueuesLeaveNothingBehind(t *testing.T) {
	paths(t, func(t *testing.T, na, nb *NIC) {
		var maps int
		for i := range 60 {
			if i == 10 {
				testutil.Eventually(t, "queues are dropped", func() bool { return len(srqsOf(na)) == 0 })
				maps = testutil.SharedMappings()
			}
			pd, err := nb.AllocPD()
			if err != nil {
				t.Fatal(err)
			}
			s, err := pd.(*PD).CreateSRQ(driver.SRQConfig{MaxWR: 16, MaxSGE: 2})
			if err != nil {
				t.Fatal(err)
			}
			x := makeEnd(t, na, endConfig{typ: ib.RC, depth: 4, size: 4096, private: true})
			y := makeEndIn(t, nb, pd, endConfig{typ: ib.RC, depth: 4, size: 4096, private: true, srq: s})
			x.connect(y)
			y.connect(x)
			if n, err := s.PostRecv([]ib.RecvWR{{ID: 5, SGEs: y.sge(0, 64)}}); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			x.send(ib.SendWR{ID: 1, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: x.sge(0, 64)})
			if wc := x.poll(); wc.Status != ib.WCSuccess {
				t.Fatalf("send: %+v", wc)
			}
			if wc := y.poll(); wc.Status != ib.WCSuccess || wc.ID != 5 {
				t.Fatalf("recv: %+v", wc)
			}
			x.close()
			y.q.Close()
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			y.close()
		}
		testutil.Eventually(t, "queues are dropped", func() bool { return len(srqsOf(na)) == 0 })
		testutil.Eventually(t, "no more mappings than before", func() bool { return testutil.SharedMappings() <= maps })
	})
}

func srqsOf(n *NIC) (ids []uint32) {
	n.eachLink(func(l *link) {
		l.mu.Lock()
		defer l.mu.Unlock()
		for id := range l.srqs {
			ids = append(ids, id)
		}
	})
	return ids
}

// A CQ that outlives its peers must not keep the memory of the links to them.
func TestCQOutlivesLinks(t *testing.T) {
	server := openNIC(t, true)
	if server.sharedE != nil {
		t.Skip(server.sharedE)
	}
	pd, err := server.AllocPD()
	if err != nil {
		t.Fatal(err)
	}
	defer pd.Close()
	cq, err := server.CreateCQ(driver.CQConfig{Entries: 64})
	if err != nil {
		t.Fatal(err)
	}
	defer cq.Close()
	maps := 0
	for i := range 30 {
		if i == 5 {
			maps = testutil.SharedMappings()
		}
		client, err := Open()
		if err != nil {
			t.Fatal(err)
		}
		client.viaDoor = true
		y := makeEndOn(t, server, pd, cq, endConfig{typ: ib.RC, depth: 4, size: 4096, private: true})
		x := makeEnd(t, client, endConfig{typ: ib.RC, depth: 4, size: 4096, private: true})
		y.connect(x)
		x.connect(y)
		exchange(x, y)
		if i%2 == 0 { // either side may be the first to go
			y.close()
		}
		x.close()
		if err := client.Close(); err != nil {
			t.Fatal(err)
		}
		y.close()
	}
	c := cq.(*CQ)
	testutil.Eventually(t, "the CQ has no ports of links that have ended", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.ports) == 0
	})
	testutil.Eventually(t, "no more mappings than before", func() bool { return testutil.SharedMappings() <= maps })
}

// QPs of one CQ (and so of one channel) that connect at once over a link which they make: all of them are told of the channel
// before they use it.
func TestConnectAllAtOnce(t *testing.T) {
	rounds := 30
	if testing.Short() || raceEnabled {
		rounds = 8
	}
	for range rounds {
		paths(t, func(t *testing.T, na, nb *NIC) {
			const k = 12
			cfg := endConfig{typ: ib.RC, depth: 4, size: 4096, private: true}
			xs, ys := make([]*end, k), make([]*end, k)
			for i := range xs {
				if i == 0 {
					xs[i], ys[i] = makeEnd(t, na, cfg), makeEnd(t, nb, cfg)
				} else {
					xs[i], ys[i] = makeEndOn(t, na, xs[0].pd, xs[0].cq, cfg), makeEndOn(t, nb, ys[0].pd, ys[0].cq, cfg)
				}
			}
			var wg sync.WaitGroup
			for i := range xs {
				wg.Go(func() { xs[i].connect(ys[i]) })
				wg.Go(func() { ys[i].connect(xs[i]) })
			}
			wg.Wait()
			if t.Failed() {
				return
			}
			for i := range xs {
				exchange(xs[i], ys[i])
			}
			for i := k - 1; i >= 0; i-- { // the first owns the CQ and the PD
				xs[i].close()
				ys[i].close()
			}
		})
	}
}
