package softnic

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/simnet"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What was posted with a handle that was closed since does not go where the next one leads.
func TestAHNumbers(t *testing.T) {
	n, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	seen := map[ib.AHNum]bool{}
	for range 3 {
		a, b := new(AH), new(AH)
		for _, ah := range []*AH{a, b} {
			if err := n.addAH(ah); err != nil {
				t.Fatal(err)
			}
			if seen[ah.num] || ah.num&ahIndex == 0 || ah.num&ahIndex > 2 {
				t.Errorf("number %#x", ah.num)
			}
			seen[ah.num] = true
			if n.ah(ah.num) != ah {
				t.Errorf("%#x is another's", ah.num)
			}
		}
		for num := range seen {
			if got := n.ah(num); got != nil && got.num != num {
				t.Errorf("%#x, whose handle has ended, leads to %#x", num, got.num)
			}
		}
		for _, ah := range []*AH{a, b} {
			n.dropAH(ah)
			if n.ah(ah.num) != nil {
				t.Errorf("%#x is there after its end", ah.num)
			}
		}
	}
	for num := range seen {
		if n.ah(num) != nil {
			t.Errorf("%#x has come back", num)
		}
	}
}

// A datagram that has arrived is there, although its sender goes before it is polled.
func TestDatagramsOutliveTheirSender(t *testing.T) {
	paths(t, func(t *testing.T, a, b *NIC) {
		to := newEnd(t, b, endConfig{typ: ib.UD})
		c, err := Open() // the sender, which goes
		if err != nil {
			t.Fatal(err)
		}
		c.viaDoor = a.viaDoor
		from := makeEnd(t, c, endConfig{typ: ib.UD})
		to.ready()
		from.ready()
		const n = 3
		for i := range n {
			to.recv(uint64(i), to.sge(i*100, 100))
		}
		ah, err := from.pd.CreateAH(ib.AHAttr{DGID: b.GID(), Port: 1})
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			from.send(ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, AH: ah.Num(), RemoteQPN: to.q.QPN(), RemoteQKey: testQKey, SGEs: from.sge(0, 8+i)})
			if wc := from.poll(); wc.Status != ib.WCSuccess {
				t.Fatalf("%+v", wc)
			}
		}
		if err := ah.Close(); err != nil {
			t.Fatal(err)
		}
		from.close()
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		for b.hasLink(c.GID()) {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(5 * time.Millisecond) // for the worker, which closes the block if it does
		for i := range n {
			if wc := to.poll(); wc.ID != uint64(i) || wc.Status != ib.WCSuccess || int(wc.ByteLen) != ib.GRHLen+8+i {
				t.Fatalf("receive %d: %+v", i, wc)
			}
		}
		// Then the block goes.
		q := to.q.(*QP)
		for end := time.Now().Add(20 * time.Second); len(*q.ins.Load()) != 0; {
			if time.Now().After(end) {
				t.Fatal("the block of the peer that has gone stays")
			}
			time.Sleep(time.Millisecond)
		}
	})
}

// What a queue pair has received into a shared queue's receives, and nobody has polled, goes with its reset: the receives are the queue's.
func TestResetGivesReceivesBack(t *testing.T) {
	paths(t, func(t *testing.T, na, n *NIC) {
		pd := allocPD(t, n)
		srq, err := pd.(*PD).CreateSRQ(driver.SRQConfig{MaxWR: 4, MaxSGE: 1})
		if err != nil {
			t.Fatal(err)
		}
		to := makeEndIn(t, n, pd, endConfig{typ: ib.UD, size: 4096, srq: srq.(*SRQ)})
		defer to.close() // last
		defer srq.Close()
		defer to.q.Close()
		from := newEnd(t, na, endConfig{typ: ib.UD, size: 4096})
		from.ready()
		ah, err := from.pd.CreateAH(ib.AHAttr{DGID: n.GID(), Port: 1})
		if err != nil {
			t.Fatal(err)
		}
		defer ah.Close()
		q := to.q.(*QP)
		arrived := func() int {
			q.rcq.mu.Lock()
			defer q.rcq.mu.Unlock()
			return q.countReceives()
		}
		for range 3 {
			to.ready()
			for i := range 2 {
				if _, err := srq.PostRecv([]ib.RecvWR{{SGEs: to.sge(0, 100)}}); err != nil {
					t.Fatal(err)
				}
				testutil.Eventually(t, "a datagram arrives", func() bool { // the first ones may be for the queue pair before its reset
					from.send(ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled, AH: ah.Num(), RemoteQPN: q.qpn, RemoteQKey: testQKey, SGEs: from.sge(0, 8)})
					if wc := from.poll(); wc.Status != ib.WCSuccess {
						t.Fatalf("%+v", wc)
					}
					return arrived() == i+1
				})
			}
			if err := to.q.Modify(t.Context(), &ib.QPAttr{State: ib.Reset}, ib.AttrState); err != nil {
				t.Fatal(err)
			}
		}
		if used := srq.(*SRQ).outstanding(); used != 0 {
			t.Errorf("%d receives are missing", used)
		}
	})
}

// When a peer goes, what it has taken of a queue pair's receives and not filled is posted again. What the other peers have filled
// is theirs, also if nobody has polled it yet.
func TestDatagramsOfOthersStay(t *testing.T) {
	paths(t, func(t *testing.T, other, n *NIC) {
		goes, err := Open()
		if err != nil {
			t.Fatal(err)
		}
		goes.viaDoor = other.viaDoor
		to := newEnd(t, n, endConfig{typ: ib.UD, depth: 8, size: 4096})
		stays := newEnd(t, other, endConfig{typ: ib.UD, depth: 8, size: 4096})
		leaves := makeEnd(t, goes, endConfig{typ: ib.UD, depth: 8, size: 4096})
		q := to.q.(*QP)
		for _, e := range []*end{to, stays, leaves} {
			e.ready()
		}
		ah := map[*end]driver.AH{}
		for _, e := range []*end{stays, leaves} {
			if ah[e], err = e.pd.CreateAH(ib.AHAttr{DGID: n.GID(), Port: 1}); err != nil {
				t.Fatal(err)
			}
		}
		defer ah[stays].Close()
		send := func(e *end, length int) {
			t.Helper()
			e.send(ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled, AH: ah[e].Num(), RemoteQPN: q.qpn, RemoteQKey: testQKey, SGEs: e.sge(0, length)})
			if wc := e.poll(); wc.Status != ib.WCSuccess {
				t.Fatalf("%+v", wc)
			}
		}
		receive := func(id uint64, length int) {
			t.Helper()
			if wc := to.poll(); wc.ID != id || wc.Status != ib.WCSuccess || int(wc.ByteLen) != ib.GRHLen+length {
				t.Fatalf("%+v, want %d with %d bytes", wc, id, length)
			}
		}
		for i, e := range []*end{stays, leaves} {
			to.recv(uint64(i), to.sge(0, 100))
			send(e, 8+i)
			receive(uint64(i), 8+i)
		}

		for id := range uint64(3) {
			to.recv(10+id, to.sge(0, 100))
		}
		send(stays, 20)
		v := goes.linkWith(n).udView(q.qpn).pv
		if !v.peek(&v.slot) || !v.take(&v.slot) { // as somebody who dies while copying
			t.Fatal("there is no receive to take")
		}
		send(stays, 21)
		if err := ah[leaves].Close(); err != nil {
			t.Fatal(err)
		}
		leaves.close()
		if err := goes.Close(); err != nil {
			t.Fatal(err)
		}
		testutil.Eventually(t, "the block of the peer that has gone is given up", func() bool {
			q.cfg.Lock()
			defer q.cfg.Unlock()
			return len(*q.ins.Load()) == 1
		})
		receive(10, 20)
		receive(12, 21)
		send(stays, 22)
		receive(11, 22)
		if !n.hasLink(other.GID()) {
			t.Error("the link to the peer that stays has ended")
		}
	})
}

// A UD queue pair receives after RESET, however many receives it had before that no datagram took.
func TestDatagramsAfterUnusedReceives(t *testing.T) {
	const depth = 4
	post := func(e *end) {
		for id := range uint64(depth) {
			e.recv(id, e.sge(0, 100))
		}
	}
	modify := func(e *end, s ib.QPState) {
		e.t.Helper()
		if err := e.q.Modify(e.t.Context(), &ib.QPAttr{State: s}, ib.AttrState); err != nil {
			e.t.Fatal(err)
		}
	}
	for name, unused := range map[string]func(e *end){
		"reset": func(e *end) {
			for range 3 {
				e.ready()
				post(e)
				modify(e, ib.Reset)
			}
		},
		"flushed": func(e *end) {
			e.ready()
			modify(e, ib.Err)
			for range 3 {
				post(e)
				for id := range uint64(depth) {
					if wc := e.poll(); wc.ID != id || wc.Status != ib.WCFlushErr {
						e.t.Fatalf("%+v", wc)
					}
				}
			}
			modify(e, ib.Reset)
		},
	} {
		t.Run(name, func(t *testing.T) {
			paths(t, func(t *testing.T, a, b *NIC) {
				cfg := endConfig{typ: ib.UD, depth: depth, size: 4096}
				from, to := newEnd(t, a, cfg), newEnd(t, b, cfg)
				unused(to)
				from.ready()
				to.ready()
				post(to)
				ah, err := from.pd.CreateAH(ib.AHAttr{DGID: b.GID(), Port: 1})
				if err != nil {
					t.Fatal(err)
				}
				defer ah.Close()
				from.send(ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled, AH: ah.Num(), RemoteQPN: to.q.QPN(), RemoteQKey: testQKey, SGEs: from.sge(0, 8)})
				if wc := from.poll(); wc.Status != ib.WCSuccess {
					t.Fatalf("%+v", wc)
				}
				if wc := to.poll(); wc.ID != 0 || wc.Status != ib.WCSuccess || wc.ByteLen != ib.GRHLen+8 {
					t.Fatalf("%+v", wc)
				}
			})
		})
	}
}

// A datagram that arrives while Poll is at another one, and just before the queue pair goes to ERR, has arrived: its receive is not
// flushed.
func TestDatagramBeforeErr(t *testing.T) {
	n := openNIC(t, true)
	if n.sharedE != nil {
		testutil.Skip(t, n.sharedE.Error())
	}
	to := newEnd(t, n, endConfig{typ: ib.UD, depth: 8, size: 4096})
	memory := &wakefulShelf{shelf: make(shelf, 4096)}
	mr, err := to.pd.(*PD).RegisterForeign(memory, 0, 4096, 0, ib.AccessLocalWrite)
	if err != nil {
		t.Fatal(err)
	}
	defer mr.Close()
	to.ready()
	receive := func(id uint64) { to.recv(id, []ib.SGE{{Addr: 100 * id, Length: 100, LKey: mr.LKey()}}) }
	var from [2]*end // in the order in which Poll looks for their datagrams
	var wrs [2][]ib.SendWR
	for i := range from {
		e := newEnd(t, openNIC(t, true), endConfig{typ: ib.UD, depth: 8, size: 4096})
		from[i] = e
		e.ready()
		ah, err := e.pd.CreateAH(ib.AHAttr{DGID: n.GID(), Port: 1})
		if err != nil {
			t.Fatal(err)
		}
		defer ah.Close()
		wrs[i] = []ib.SendWR{{Opcode: ib.OpSend, AH: ah.Num(), RemoteQPN: to.q.QPN(), RemoteQKey: testQKey, SGEs: e.sge(0, 8)}}
		receive(uint64(i))
		e.send(wrs[i][0])
		if wc := to.poll(); wc.ID != uint64(i) || wc.Status != ib.WCSuccess {
			t.Fatalf("%+v", wc)
		}
	}

	for id := range uint64(3) {
		receive(id)
	}
	from[1].send(wrs[1][0])
	memory.woken = func() { // called by Poll, which is past from[0]'s ring
		if k, err := from[0].q.PostSend(wrs[0]); k != 1 {
			t.Error(err)
		}
		if err := to.q.Modify(t.Context(), &ib.QPAttr{State: ib.Err}, ib.AttrState); err != nil {
			t.Error(err)
		}
		memory.woken = nil
	}
	var wcs [4]ib.WC
	k := 0
	testutil.Eventually(t, "all receives have completed", func() bool {
		k += max(0, to.cq.Poll(wcs[k:]))
		return k >= 3
	})
	for i, st := range []ib.WCStatus{ib.WCSuccess, ib.WCSuccess, ib.WCFlushErr} {
		if wc := wcs[i]; wc.ID != uint64(i) || wc.Status != st {
			t.Errorf("%+v, want receive %d with %v", wc, i, st)
		}
	}
	if k := to.cq.Poll(wcs[:]); k != 0 {
		t.Errorf("%d more completions", k)
	}
	for _, e := range from {
		if !n.hasLink(e.n.GID()) {
			t.Error("the link to a peer has ended")
		}
	}
}

// wakefulShelf is a shelf that says when it is about to be written to.
type wakefulShelf struct {
	shelf
	woken func()
}

func (s *wakefulShelf) WriteAt(p []byte, va uint64) error {
	if s.woken != nil {
		s.woken()
	}
	return s.shelf.WriteAt(p, va)
}

func (n *NIC) hasLink(g ib.GID) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.links[g] != nil
}

// shelf is memory that is reached as another process' is.
type shelf []byte

func (s shelf) ReadAt(p []byte, va uint64) error  { copy(p, s[va:]); return nil }
func (s shelf) WriteAt(p []byte, va uint64) error { copy(s[va:], p); return nil }

// Datagrams and atomics allocate nothing, whosever the memory is that they come from and go to.
func TestForeignAllocatesNothing(t *testing.T) {
	n := openNIC(t, false)
	n.shared = false // else receives would be staged
	foreign := func(e *end, mem shelf) (ib.LKey, ib.RKey) {
		mr, err := e.pd.(*PD).RegisterForeign(mem, 0, uint64(len(mem)), 0, ib.AccessLocalWrite|ib.AccessRemote)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { mr.Close() })
		return mr.LKey(), mr.RKey()
	}
	const warm = 300 // receive queues make their places when they are used first
	var wc [4]ib.WC
	nothing := func(what string, e, to *end, recv []ib.RecvWR, send []ib.SendWR) {
		t.Helper()
		f := func() {
			to.q.PostRecv(recv)
			e.q.PostSend(send)
			for i := len(send) + len(recv); i > 0; {
				k := e.cq.Poll(wc[:])
				if k += to.cq.Poll(wc[k:]); k > 0 && wc[0].Status != ib.WCSuccess {
					t.Fatalf("%s: %+v", what, wc[0])
				}
				i -= k
			}
		}
		for range warm {
			f()
		}
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: %v allocations", what, n)
		}
	}

	from, to := newEnd(t, n, endConfig{typ: ib.UD}), newEnd(t, n, endConfig{typ: ib.UD})
	from.ready()
	to.ready()
	ah, err := from.pd.CreateAH(ib.AHAttr{DGID: n.GID(), Port: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer ah.Close()
	src, dst := shelf(bytes.Repeat([]byte("datagram"), 125)), make(shelf, 2048)
	fk, _ := foreign(from, src)
	tk, _ := foreign(to, dst)
	for _, own := range []bool{false, true} {
		sges := []ib.SGE{{Addr: 0, Length: 1000, LKey: fk}}
		if own {
			sges = from.sge(0, 1000)
			copy(from.buf, src)
		}
		clear(dst)
		nothing("datagram", from, to, []ib.RecvWR{{SGEs: []ib.SGE{{Addr: 0, Length: 500, LKey: tk}, {Addr: 500, Length: 1000, LKey: tk}}}},
			[]ib.SendWR{{Opcode: ib.OpSend, Flags: ib.SendSignaled, AH: ah.Num(), RemoteQPN: to.q.QPN(), RemoteQKey: testQKey, SGEs: sges}})
		if !bytes.Equal(dst[ib.GRHLen:][:len(src)], src) || dst[0] != 6<<4 {
			t.Errorf("from memory of its own %t, something else has arrived: %q", own, dst)
		}
	}

	a, b := newEnd(t, n, endConfig{typ: ib.RC}), newEnd(t, n, endConfig{typ: ib.RC})
	a.connect(b)
	b.connect(a)
	ak, _ := foreign(a, make(shelf, 64))
	_, bk := foreign(b, make(shelf, 64))
	nothing("atomic", a, b, nil, []ib.SendWR{{Opcode: ib.OpAtomicFetchAdd, Flags: ib.SendSignaled, CompareAdd: 1, RemoteAddr: 8, RKey: bk, SGEs: []ib.SGE{{Addr: 0, Length: 8, LKey: ak}}}})

	// From a network.
	sim, err := OpenSim(simnet.New(1, simnet.Faults{}), netip.MustParseAddr("10.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	defer sim.Close()
	at := makeEnd(t, sim, endConfig{typ: ib.UD})
	defer at.close()
	at.ready()
	u := sim.sim.port.uds[at.q.QPN()]
	pkt := &roce.Packet{Opcode: roce.Op(roce.UD, roce.SendOnly), QKey: uint32(testQKey), Payload: make([]byte, 100)}
	recv := []ib.RecvWR{{SGEs: at.sge(0, 200)}}
	f := func() {
		at.q.PostRecv(recv)
		u.receive(netip.AddrPortFrom(netip.MustParseAddr("10.0.0.2"), roce.Port), pkt)
		if at.cq.Poll(wc[:]) != 1 || wc[0].Status != ib.WCSuccess {
			t.Fatalf("%+v", wc[0])
		}
	}
	for range warm {
		f()
	}
	if n := testing.AllocsPerRun(100, f); n != 0 {
		t.Errorf("a datagram from a network: %v allocations", n)
	}
}
