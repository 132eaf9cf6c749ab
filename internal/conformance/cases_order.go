package conformance

import (
	"fmt"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

var _ = addCases("ordering and fences", 0,
	testCase{name: "order/write-then-send", run: writeThenSend},
	testCase{name: "order/read-after-write", run: readAfterWrite},
	testCase{name: "order/mixed-completions", run: mixedCompletions},
	testCase{name: "order/fence-after-read", run: fenceAfterRead},
	testCase{name: "order/fence-after-atomic", needs: ib.CapAtomic, run: fenceAfterAtomic},
	testCase{name: "order/read-depth", run: readDepth},
	testCase{name: "order/read-depth-zero", run: readDepthZero},
	testCase{name: "order/atomic-depth-zero", needs: ib.CapAtomic, run: atomicDepthZero},
)

// IBA 9.5: a SEND after WRITEs says that the writes are there.
func writeThenSend(c *C) {
	l := c.pair(ib.RC)
	for round := range 50 {
		seed := uint64(round + 1)
		n := 1 + round*617%30000
		l.a.mem.fill(0, n, seed)
		l.b.recv(seed)
		l.a.post(ib.SendWR{ID: 1, Opcode: ib.OpRDMAWrite, SGEs: l.a.mem.sges(0, n), RemoteAddr: l.b.mem.Addr, RKey: l.b.mem.RKey},
			wrSend(2))
		l.b.received(want{ID: seed, Op: ib.WCRecv})
		l.b.mem.has("WRITE before a SEND", 0, n, seed)
		l.a.sent(want{ID: 2, Op: ib.WCSend, Len: anyLen})
	}
}

func readAfterWrite(c *C) {
	l := c.pair(ib.RC)
	for round := range 50 {
		seed := uint64(round + 1)
		n := 1 + round*617%20000
		l.a.mem.fill(0, n, seed)
		l.a.post(wrWrite(1, l.a.mem.sges(0, n), l.b.mem, 8), wrRead(2, l.a.mem.sges(30000, n), l.b.mem, 8))
		l.a.sent(want{ID: 1, Op: ib.WCRDMAWrite, Len: anyLen}, want{ID: 2, Op: ib.WCRDMARead, Len: n})
		l.a.mem.has("READ after WRITE", 30000, n, seed)
	}
}

// Requests of all kinds complete in the order of posting (IBA 10.8.3.2).
func mixedCompletions(c *C) {
	l := c.pair(ib.RC)
	atomics := c.A.dev.Attr.Caps.Has(ib.CapAtomic)
	for range 5 {
		var wrs []ib.SendWR
		var wants []want
		for i := range 40 {
			id := uint64(i)
			local := l.a.mem.sges(i*256, 8)
			switch i % 5 {
			case 0:
				wrs = append(wrs, wrWrite(id, local, l.b.mem, 8*i))
				wants = append(wants, want{ID: id, Op: ib.WCRDMAWrite, Len: anyLen})
			case 1:
				wrs = append(wrs, wrRead(id, local, l.b.mem, 8*i))
				wants = append(wants, want{ID: id, Op: ib.WCRDMARead, Len: 8})
			case 2:
				l.b.recv(id, l.b.mem.sge(32000+i*8, 8))
				wrs = append(wrs, wrSend(id, local...))
				wants = append(wants, want{ID: id, Op: ib.WCSend, Len: anyLen})
			case 3:
				if !atomics {
					wrs = append(wrs, wrRead(id, local, l.b.mem, 8*i))
					wants = append(wants, want{ID: id, Op: ib.WCRDMARead, Len: 8})
					break
				}
				wrs = append(wrs, wrAdd(id, local, l.b.mem, 8*i, 1))
				wants = append(wants, want{ID: id, Op: ib.WCFetchAdd, Len: 8})
			case 4:
				wr := wrWrite(id, local, l.b.mem, 8*i)
				if !c.A.fencesStall() {
					wr.Flags |= ib.SendFence
				}
				wrs = append(wrs, wr)
				wants = append(wants, want{ID: id, Op: ib.WCRDMAWrite, Len: anyLen})
			}
		}
		l.a.post(wrs...)
		l.a.sent(wants...)
		l.b.rcq.wait(8)
	}
}

// A fenced SEND of the buffer that a READ fills sends what was read (IBA 10.8.3.3).
func fenceAfterRead(c *C) {
	l := c.pair(ib.RC)
	for round := range 50 {
		seed := uint64(round + 1)
		n := 1 + round*617%20000
		l.b.mem.fill(0, n, seed)
		l.a.mem.set(0, n, 0)
		l.b.recv(seed, l.b.mem.sge(30000, n))
		send := wrSend(2, l.a.mem.sge(0, n))
		send.Flags |= ib.SendFence
		l.a.post(wrRead(1, l.a.mem.sges(0, n), l.b.mem, 0), send)
		l.b.received(want{ID: seed, Op: ib.WCRecv, Len: n})
		l.b.mem.has("fenced SEND of what was read", 30000, n, seed)
		l.a.sent(want{ID: 1, Op: ib.WCRDMARead, Len: n}, want{ID: 2, Op: ib.WCSend, Len: anyLen})
	}
}

func fenceAfterAtomic(c *C) {
	l := c.pair(ib.RC)
	for round := range 50 {
		l.b.mem.write(0, wordBytes(uint64(round)))
		write := wrWrite(2, l.a.mem.sges(0, 8), l.b.mem, 64)
		write.Flags |= ib.SendFence
		l.a.post(wrAdd(1, l.a.mem.sges(0, 8), l.b.mem, 0, 1), write)
		l.a.sent(want{ID: 1, Op: ib.WCFetchAdd, Len: 8}, want{ID: 2, Op: ib.WCRDMAWrite, Len: anyLen})
		if got := word(l.b.mem.read(64, 8)); got != uint64(round) {
			c.Fatalf("fenced WRITE of an atomic's old value wrote %d, want %d", got, round)
		}
	}
}

// More READs than may be in flight at once are posted: the requester keeps the rest back (IBA 9.7.3.1 and 11.2.5.2).
func readDepth(c *C) {
	for _, depth := range []uint8{1, 2} {
		l := c.pair(ib.RC, func(o *linkOpts) { o.rdAtomic, o.destRdAtomic = depth, depth })
		l.b.mem.fill(0, 60000, 4)
		var wrs []ib.SendWR
		var wants []want
		for i := range 60 {
			wrs = append(wrs, wrRead(uint64(i), l.a.mem.sges(i*1000, 1000), l.b.mem, i*1000))
			wants = append(wants, want{ID: uint64(i), Op: ib.WCRDMARead, Len: 1000})
		}
		l.a.post(wrs...)
		l.a.sent(wants...)
		l.a.mem.has(fmt.Sprintf("60 READs with max_rd_atomic %d", depth), 0, 60000, 4)
		if attr := l.a.query().Attr; attr.MaxRdAtomic < depth {
			c.Errorf("Query: max_rd_atomic %d, asked for %d", attr.MaxRdAtomic, depth)
		}
	}
}

// A responder that was told to serve no READs refuses one: invalid request by IBA 9.9.3 (as rxe does it), or, as mlx5
// takes the QP's read right away in this case, an access error.
func readDepthZero(c *C) {
	depthZero(c, c.pair(ib.RC, noResources), func(l link) ib.SendWR { return wrRead(1, l.a.mem.sges(0, 64), l.b.mem, 0) })
	depthZero(c, c.pair(ib.RC, noResources), func(l link) ib.SendWR { return wrRead(1, nil, l.b.mem, 0) })
}

func atomicDepthZero(c *C) {
	depthZero(c, c.pair(ib.RC, noResources), func(l link) ib.SendWR { return wrAdd(1, l.a.mem.sges(0, 8), l.b.mem, 0, 1) })
	depthZero(c, c.pair(ib.RC, noResources), func(l link) ib.SendWR { return wrCAS(1, l.a.mem.sges(0, 8), l.b.mem, 0, 4, 1) })
}

// noResources connects for requests without an answer of their own only.
func noResources(o *linkOpts) { o.destRdAtomic = 0 }

// depthZero checks that a request with an answer of its own is refused by a peer that has no responder resources for it. It is one too many,
// and so an invalid request (IBA 9.7.5.2); drivers for ConnectX say it by taking the rights away (mlx5_ib's to_mlx5_access_flags).
func depthZero(c *C, l link, wr func(l link) ib.SendWR) {
	c.Helper()
	l.a.mem.canary()
	l.b.mem.canary()
	l.a.post(wr(l))
	l.a.sentOneOf(1, ib.WCRemoteInvalidReqErr, ib.WCRemoteAccessErr)
	l.a.mem.intact("sink of a refused request")
	l.b.mem.intact("target of a refused request")
	l.a.inState(ib.Err)
	l.b.inState(ib.Err)
}
