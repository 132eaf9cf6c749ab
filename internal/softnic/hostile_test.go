package softnic

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/simnet"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// chooser makes decisions out of fuzz input, and of a seeded generator when that is used up.
type chooser struct {
	in  []byte
	rnd *rand.Rand
}

func newChooser(seed uint64, in []byte) *chooser {
	return &chooser{in: in, rnd: rand.New(rand.NewPCG(seed, 7))}
}

func (c *chooser) n(k int) int {
	if len(c.in) >= 2 {
		v := int(binary.LittleEndian.Uint16(c.in))
		c.in = c.in[2:]
		return v % k
	}
	return c.rnd.IntN(k)
}

// word is garbage of the kinds that hurt: small numbers, numbers near what is there, ends of ranges, anything.
func (c *chooser) word(old uint64) uint64 {
	switch c.n(9) {
	case 0:
		return 0
	case 1:
		return old + uint64(c.n(5)) - 2
	case 2:
		return old ^ 1<<c.n(64)
	case 3:
		return ^uint64(0) - uint64(c.n(3))
	case 4:
		return old&0xffffffff | uint64(c.rnd.Uint32())<<32
	case 5:
		return old&^0xffffffff | uint64(c.n(1<<12))
	case 6:
		return uint64(sgeList)<<32 | uint64(c.n(1<<12))
	case 7:
		return uint64(uint32(old)+uint32(c.n(4)))<<32 | uint64(uint32(old)+1)
	}
	return c.rnd.Uint64()
}

// reach is the shared memory between two NICs, mapped once more, so that it stays when their link has ended.
type reach struct {
	t       testing.TB
	regs    []*mem.Region
	hunting []*uint64  // words of blocks, ports and queues, where garbage matters most
	wide    [][]uint64 // everything
}

func (r *reach) words(reg *mem.Region) []uint64 {
	m, err := mem.MapFD(reg.FD(), 0, len(reg.Bytes()), true)
	if err != nil {
		r.t.Fatal(err)
	}
	r.regs = append(r.regs, m)
	w := words64(m.Bytes())
	r.wide = append(r.wide, w)
	return w
}

func (r *reach) close() {
	for _, m := range r.regs {
		m.Close()
	}
}

// add collects what n shares with peer.
func (r *reach) add(n, peer *NIC) {
	l := n.linkWith(peer)
	chunks := map[uint32][]uint64{}
	l.mu.Lock()
	for _, c := range l.chunks {
		chunks[c.id] = r.words(c.reg)
	}
	l.mu.Unlock()
	hunt := func(w []uint64, n int) {
		for i := range min(n, len(w)) {
			r.hunting = append(r.hunting, &w[i])
		}
	}
	n.eachInbound(func(in *inbound) {
		if in.link != l {
			return
		}
		if chunks[in.blk.chunk] == nil || chunks[in.port.mem.chunk] == nil {
			return // opened this moment, in a chunk of its own
		}
		b := chunks[in.blk.chunk][in.blk.off/8:][:len(in.blk.mem)/8]
		hunt(b, 2)
		hunt(b[blkTail/8:], 1)
		hunt(b[blkBusy/8:], 1)
		hunt(b[blkRings/8:], 40)
		hunt(b[in.geo.cqeOff()/8:], 40)
		hunt(b[min(in.geo.sgeOff(), in.geo.size())/8:], 40)
		hunt(chunks[in.port.mem.chunk][in.port.mem.off/8:], portSize/8)
	})
	n.eachSRQ(func(s *SRQ) { hunt(r.words(s.reg), 80) })
}

// hostileRound lets side B of a connection scribble over all shared memory while A uses it, and while A also has a
// connection to an honest NIC.
func hostileRound(t testing.TB, seed uint64, input []byte) {
	c := newChooser(seed, input)
	var opened []*NIC
	open := func() *NIC {
		n, err := Open()
		if err != nil {
			t.Fatal(err)
		}
		n.viaDoor, n.busyFor = true, shortBusy
		opened = append(opened, n)
		return n
	}
	na, nb, nc := open(), open(), open()
	if na.sharedE != nil {
		testutil.Skip(t, na.sharedE.Error())
	}
	typ := [...]ib.QPType{ib.RC, ib.RC, ib.UC, ib.UD}[c.n(4)]
	var srqA, srqB *SRQ
	pdA, pdB := allocPD(t, na), allocPD(t, nb)
	if typ == ib.RC && c.n(2) == 0 {
		srqA, srqB = newTestSRQ(t, pdA), newTestSRQ(t, pdB)
	}
	cfg := endConfig{typ: typ, depth: 8, size: 64 << 10, private: c.n(3) == 0, cqEntries: 256}
	cfgA, cfgB := cfg, cfg
	if srqA != nil {
		cfgA.srq, cfgB.srq = srqA, srqB
	}
	cfgB.private = c.n(3) == 0
	a, b := makeEndIn(t, na, pdA, cfgA), makeEndIn(t, nb, pdB, cfgB)
	x, y := makeEnd(t, na, endConfig{typ: ib.RC, depth: 8, size: 64 << 10}), makeEnd(t, nc, endConfig{typ: ib.RC, depth: 8, size: 64 << 10})
	x.connect(y)
	y.connect(x)
	// Memory that B was never given: a region of the same PD without remote rights, and one that is not registered.
	secret := makeSecret(t, a)
	var ahA, ahB driver.AH
	if typ == ib.UD {
		a.ready()
		b.ready()
		var err error
		if ahA, err = a.pd.CreateAH(ib.AHAttr{DGID: nb.gid, Port: 1}); err != nil {
			t.Fatal(err)
		}
		if ahB, err = b.pd.CreateAH(ib.AHAttr{DGID: na.gid, Port: 1}); err != nil {
			t.Fatal(err)
		}
	} else {
		a.connect(b)
		b.connect(a)
	}
	post := func(e *end, s *SRQ, i int) {
		wr := []ib.RecvWR{{ID: uint64(i), SGEs: e.sge(1024*(i%8), 200)}}
		if i%3 == 0 {
			wr[0].SGEs = append(wr[0].SGEs, e.sge(9000, 300)...)
		}
		if s != nil {
			s.PostRecv(wr)
		} else {
			e.q.PostRecv(wr)
		}
	}
	send := func(e, to *end, ah driver.AH, i int) {
		wr := ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: e.sge(128*(i%8), 100), RemoteAddr: addrOf(to.buf) + 64, RKey: to.mr.RKey()}
		if ah != nil {
			wr.AH, wr.RemoteQPN, wr.RemoteQKey = ah.Num(), to.q.QPN(), testQKey
		} else {
			switch i % 6 {
			case 1:
				wr.Opcode = ib.OpRDMAWrite
			case 2:
				wr.Opcode = ib.OpRDMAWriteWithImm
			case 3:
				wr.Opcode = ib.OpSendWithImm
			case 4:
				if typ == ib.RC {
					wr.Opcode = ib.OpRDMARead
				}
			case 5:
				if typ == ib.RC {
					wr.Opcode, wr.SGEs = ib.OpAtomicFetchAdd, e.sge(128, 8)
				}
			}
		}
		e.q.PostSend([]ib.SendWR{wr})
	}
	for i := range 6 {
		post(a, srqA, i)
		post(b, srqB, i)
		send(b, a, ahB, i)
		send(a, b, ahA, i)
	}
	la, lb := na.linkWith(nb), nb.linkWith(na)
	if la == nil || lb == nil {
		t.Fatalf("seed %d: the link is gone before anything was done to it", seed)
	}
	r := &reach{t: t}
	defer r.close()
	r.add(na, nb)
	r.add(nb, na)
	r.wide = append(r.wide, r.words(nb.liveReg)[:512])
	hunting, wide := r.hunting, r.wide
	scribble := func() {
		for range 1 + c.n(4) {
			var p *uint64
			if len(hunting) > 0 && c.n(4) > 0 {
				p = hunting[c.n(len(hunting))]
			} else {
				w := wide[c.n(len(wide))]
				if len(w) == 0 {
					continue
				}
				p = &w[c.n(min(len(w), 512))]
			}
			atomic.StoreUint64(p, c.word(atomic.LoadUint64(p)))
		}
	}
	var wcs [16]ib.WC
	for i := range 60 {
		scribble()
		switch c.n(8) {
		case 0, 1:
			post(a, srqA, i)
		case 2, 3, 4:
			send(a, b, ahA, i)
		case 5:
			a.cq.Arm(c.n(2) == 0)
		case 6:
			send(b, a, ahB, i) // B's own NIC trips over the garbage too: it must not fall
			b.cq.Poll(wcs[:])
		}
		for _, wc := range wcs[:max(0, a.cq.Poll(wcs[:]))] {
			if wc.Status == ib.WCSuccess && wc.Opcode == ib.WCRecv && wc.ByteLen > 500+ib.GRHLen {
				t.Errorf("seed %d: a receive of 500 bytes has taken %d", seed, wc.ByteLen)
			}
		}
		if i%20 == 0 {
			na.Progress()
			alive(x, y) // the honest connection works, with the same NIC
		}
		if c.n(40) == 0 {
			ctxModify(a)
		}
	}
	secret.check(seed)
	alive(x, y)
	// Everything can be closed, although busy words may be stuck: that ends the link.
	closeAll := func() {
		if ahA != nil {
			ahA.Close()
			ahB.Close()
		}
		secret.close()
		a.q.Close()
		if srqA != nil {
			if err := srqA.Close(); err != nil {
				t.Error(err)
			}
		}
		a.close()
		b.q.Close()
		if srqB != nil {
			srqB.Close()
		}
		// Nothing of A's memory has come to B, not in its own memory, and not in what both share.
		findSecret(t, seed, b.buf)
		var shared []byte
		for _, w := range r.wide {
			for i := range w {
				shared = binary.NativeEndian.AppendUint64(shared, atomic.LoadUint64(&w[i]))
			}
		}
		findSecret(t, seed, shared)
		b.close()
	}
	closeAll()
	secret.check(seed)
	alive(x, y)
	x.close()
	y.close()
	if why := la.reason(); why != nil && why.Error() == "" {
		t.Errorf("seed %d: the link ended without a reason", seed)
	}
	for _, n := range opened {
		if err := n.Close(); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
	}
}

// alive is exchange with the reason if the link has ended.
func alive(x, y *end) {
	x.t.Helper()
	if l := x.n.linkWith(y.n); l == nil {
		x.t.Fatal("the link to an honest NIC has ended")
	}
	exchange(x, y)
}

func allocPD(t testing.TB, n *NIC) driver.PD {
	pd, err := n.AllocPD()
	if err != nil {
		t.Fatal(err)
	}
	return pd
}

func newTestSRQ(t testing.TB, pd driver.PD) *SRQ {
	s, err := pd.(*PD).CreateSRQ(driver.SRQConfig{MaxWR: 16, MaxSGE: 2})
	if err != nil {
		t.Fatal(err)
	}
	return s.(*SRQ)
}

const testQKey ib.QKey = 77

// ready takes a UD QP to RTS.
func (e *end) ready() {
	e.t.Helper()
	a := ib.QPAttr{State: ib.Init, Port: 1, QKey: testQKey}
	for _, m := range []ib.QPAttrMask{ib.AttrState | ib.AttrPort | ib.AttrPKeyIndex | ib.AttrQKey, ib.AttrState, ib.AttrState | ib.AttrSQPSN} {
		if err := e.q.Modify(e.t.Context(), &a, m); err != nil {
			e.t.Fatal(err)
		}
		a.State++
	}
}

// ctxModify changes rights under way, which waits for peers in the middle of something.
func ctxModify(e *end) {
	a := ib.QPAttr{State: ib.RTS, Access: ib.AccessRemoteRead}
	e.q.Modify(e.t.Context(), &a, ib.AttrState|ib.AttrAccess)
}

func (n *NIC) linkWith(peer *NIC) *link {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.links[peer.gid]
}

// secretMem is memory next to what a peer was given.
type secretMem struct {
	t   testing.TB
	e   *end
	mr  driver.MR
	buf []byte
	raw []byte
}

func makeSecret(t testing.TB, e *end) *secretMem {
	s := &secretMem{t: t, e: e, buf: heapBytes(8192), raw: heapBytes(8192)}
	for i := range s.buf {
		s.buf[i], s.raw[i] = secretText[i%len(secretText)], secretText[i%len(secretText)]
	}
	var err error
	if s.mr, err = e.pd.RegisterMR(driver.MRConfig{Mem: s.buf, FD: -1, Access: ib.AccessLocalWrite}); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *secretMem) check(seed uint64) {
	s.t.Helper()
	for i := range s.buf {
		if c := secretText[i%len(secretText)]; s.buf[i] != c || s.raw[i] != c {
			s.t.Fatalf("seed %d: memory that the peer was not given has changed at %d", seed, i)
		}
	}
}

// secretText is what the memory is full of: parts of 15 bytes or more, and words at multiples of 8, have one of its halves.
const secretText = "told to nobody!!"

// findSecret fails the test if b has some of the secret.
func findSecret(t testing.TB, seed uint64, b []byte) {
	t.Helper()
	for _, half := range []string{secretText[:8], secretText[8:]} {
		if i := bytes.Index(b, []byte(half)); i >= 0 {
			t.Fatalf("seed %d: the peer has got %q of memory that it was not given", seed, b[i:min(i+32, len(b))])
		}
	}
}

func (s *secretMem) close() { s.mr.Close() }

// A peer that writes garbage wherever it can: nothing of ours falls, and other peers do not notice.
func TestHostileMemory(t *testing.T) {
	testutil.CheckLeaks(t)
	seeds := 300
	if testing.Short() || raceEnabled {
		seeds = 40
	}
	var wg sync.WaitGroup
	for part := range 4 {
		wg.Go(func() {
			for s := part; s < seeds && !t.Failed(); s += 4 {
				hostileRound(t, uint64(s), nil)
			}
		})
	}
	wg.Wait()
}

// A queueRig is a sender of packets, and a queue pair whose shared queue another peer has mapped. wr is a message of 200 bytes.
type queueRig struct {
	net  *simnet.Network
	a, b *end
	srq  *SRQ
	wr   ib.SendWR
}

func newQueueRig(t *testing.T, typ ib.QPType) *queueRig {
	net, ends, addrs := simPair(t, typ)
	r := &queueRig{net: net, a: ends[0], b: ends[1]}
	r.wr = ib.SendWR{ID: 1, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: r.a.sge(0, 200)}
	if typ == ib.UD {
		r.a.ready()
		r.b.ready()
		ah, err := r.a.pd.CreateAH(ib.AHAttr{DGID: ib.GIDFromAddr(addrs[1]), SGIDIndex: 1, Port: 1})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ah.Close() })
		r.srq = r.b.q.(*QP).srq // its own
		r.wr.AH, r.wr.RemoteQPN, r.wr.RemoteQKey = ah.Num(), r.b.q.QPN(), testQKey
		return r
	}
	pd := allocPD(t, r.b.n)
	r.srq = newTestSRQ(t, pd)
	r.b = makeEndIn(t, r.b.n, pd, endConfig{typ: typ, size: 4096, srq: r.srq})
	t.Cleanup(r.b.close) // last
	t.Cleanup(func() { r.srq.Close() })
	t.Cleanup(func() { r.b.q.Close() })
	at := func(side int) netip.AddrPort { return netip.AddrPortFrom(addrs[side], roce.Port) }
	r.a.wire(wireTo{gid: 1, addr: at(1), own: true, qpn: r.b.q.QPN()})
	r.b.wire(wireTo{gid: 1, addr: at(0), own: true, qpn: r.a.q.QPN()})
	return r
}

func (r *queueRig) post(sges []ib.SGE) {
	r.b.t.Helper()
	if n, err := r.srq.PostRecv([]ib.RecvWR{{ID: 2, SGEs: sges}}); n != 1 || err != nil {
		r.b.t.Fatal(n, err)
	}
}

// A peer that shares a receive queue has its entries lead elsewhere: what comes from a network goes to no memory but receives'.
func TestHostileEntries(t *testing.T) {
	const size = 500
	for typ, fails := range map[ib.QPType]ib.WCStatus{ib.RC: ib.WCRemoteOpErr, ib.UD: ib.WCSuccess} { // the sender of a datagram hears nothing
		for _, list := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v list=%v", typ, list), func(t *testing.T) {
				r := newQueueRig(t, typ)
				secret := makeSecret(t, r.b) // no receive was ever posted to it
				defer secret.close()
				words := r.srq.entries[srqAddr:]
				if list {
					r.post(append(r.b.sge(0, 8), r.b.sge(8, size-8)...))
					words = r.srq.lists[2:]
				} else {
					r.post(r.b.sge(0, size))
				}
				words[0], words[1] = addrOf(secret.buf), uint64(uint32(words[1]))|uint64(secret.mr.LKey())<<32
				r.a.send(r.wr)
				if wc := r.a.poll(); wc.ID != 1 || wc.Status != fails {
					t.Errorf("sent: %+v", wc)
				}
				if wc := r.b.poll(); wc.ID != 2 || wc.Status != ib.WCLocalProtErr {
					t.Errorf("received: %+v", wc)
				}
				r.net.Advance(time.Millisecond)
				secret.check(1)
			})
		}
	}
}

// A receive of which such a peer says that it is longer ends the queue pair that gets a message in it, and nothing else at its address.
func TestHostileLength(t *testing.T) {
	for _, typ := range []ib.QPType{ib.RC, ib.UD} {
		t.Run(typ.String(), func(t *testing.T) {
			r := newQueueRig(t, typ)
			q := r.b.q.(*QP)
			r.post(r.b.sge(0, 100))
			r.srq.entries[srqLenHdl] += 400
			r.a.send(r.wr)
			if wc := r.a.poll(); wc.ID != 1 || wc.Status != ib.WCSuccess {
				t.Errorf("sent: %+v", wc)
			}
			testutil.Eventually(t, "the queue pair ends", func() bool {
				var wcs [1]ib.WC
				if n := r.b.cq.Poll(wcs[:]); n != 0 && wcs[0].Status != ib.WCFlushErr {
					t.Fatalf("received: %d, %+v", n, wcs[0])
				}
				return q.State() == ib.Err
			})
			var links []*link
			if in := q.in.Load(); in != nil {
				links = append(links, in.link)
			}
			if ins := q.ins.Load(); ins != nil {
				for _, in := range *ins {
					links = append(links, in.link)
				}
			}
			if len(links) == 0 {
				t.Error("no link is left")
			}
			for _, l := range links {
				if err := l.reason(); err != nil {
					t.Errorf("all that is at the address has ended: %v", err)
				}
			}
		})
	}
}

func FuzzHostileMemory(f *testing.F) {
	f.Add(uint64(1), []byte{})
	f.Add(uint64(2), []byte{1, 0, 0, 0, 2, 0, 3, 0, 4, 0, 0, 0, 1, 0})
	f.Add(uint64(3), []byte{3, 0, 1, 0, 1, 0, 9, 0, 9, 0})
	f.Fuzz(func(t *testing.T, seed uint64, in []byte) { hostileRound(t, seed, in) })
}

// shortBusy has peers that stay busy cut off sooner, so that tests end sooner.
const shortBusy = 100 * time.Millisecond
