package wire

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/pcap"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func TestPackets(t *testing.T) {
	for _, c := range []struct{ n, want uint32 }{{0, 1}, {1, 1}, {256, 1}, {257, 2}, {512, 2}, {1 << 31, 1 << 23}} {
		if got := packets(c.n, 256); got != c.want {
			t.Errorf("%d bytes take %d packets, want %d", c.n, got, c.want)
		}
	}
	for _, c := range []struct {
		a, b ib.PSN
		want int32
	}{{1, 3, 2}, {3, 1, -2}, {ib.MaxPSN, 0, 1}, {0, ib.MaxPSN, -1}, {0, 1<<23 - 1, 1<<23 - 1}} {
		if got := distance(c.a, c.b); got != c.want {
			t.Errorf("from %d to %d: %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

// expected is what a node's requests must have done.
type expected struct {
	mem      []byte // of the peer
	messages []received
	reads    map[int][]byte // what a READ or an atomic must have brought, by request
}

// random posts a request, and applies it to what is expected.
func (x *node) random(r *rand.Rand, peer *node, e *expected) {
	size := []int{0, 1, 4, 7, 64, simMTU - 1, simMTU, simMTU + 1, 3 * simMTU, r.IntN(8 * simMTU)}[r.IntN(10)]
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	req := Request{Len: uint32(size), Solicited: r.IntN(4) == 0, Fence: r.IntN(8) == 0, Quiet: r.IntN(2) == 0}
	i := len(x.sends)
	switch kind := r.IntN(11); kind {
	case 0, 1, 2: // SEND
		req.Op = []ib.Opcode{ib.OpSend, ib.OpSendWithImm, ib.OpSendWithInv}[kind]
		m := Message{Len: req.Len, Solicited: req.Solicited}
		switch kind {
		case 1:
			req.Imm = r.Uint32()
			m.HasImm, m.Imm = true, req.Imm
		case 2:
			req.InvKey = r.Uint32()
			m.HasInv, m.Imm = true, req.InvKey
		}
		e.messages = append(e.messages, received{m, data, ib.WCSuccess})
	case 3, 4: // WRITE
		req.Op, req.RKey, req.Addr = ib.OpRDMAWrite, memKey, uint64(r.IntN(len(e.mem)-size+1))
		copy(e.mem[req.Addr:], data)
		if kind == 4 {
			req.Op, req.Imm = ib.OpRDMAWriteWithImm, r.Uint32()
			e.messages = append(e.messages, received{Message{Len: req.Len, Write: true, HasImm: true, Imm: req.Imm, Solicited: req.Solicited}, nil, ib.WCSuccess})
		}
	case 5, 6: // READ, of what nobody writes
		req.Op, req.RKey, req.Addr = ib.OpRDMARead, roKey, uint64(r.IntN(len(peer.readOnly)-size+1))
		e.reads[i] = bytes.Clone(peer.readOnly[req.Addr:][:size])
	case 9:
		req.Op, req.RKey, req.Len, req.Flush = ib.OpFlush, memKey, 0, ib.Flush{Placement: ib.FlushGlobal, Level: ib.FlushLevel(r.IntN(2)), Length: uint32(size)}
	case 10:
		data = binary.NativeEndian.AppendUint64(nil, r.Uint64())
		req.Op, req.RKey, req.Addr, req.Len = ib.OpAtomicWrite, memKey, uint64(r.IntN(len(e.mem)/8)*8), 8
		copy(e.mem[req.Addr:], data)
	default:
		req.Op, req.RKey, req.Addr, req.Len = ib.OpAtomicFetchAdd, memKey, uint64(r.IntN(len(e.mem)/8)*8), 8
		req.CompareAdd = r.Uint64()
		at := e.mem[req.Addr:][:8]
		if kind == 8 {
			req.Op, req.Swap = ib.OpAtomicCmpSwap, r.Uint64()
			if r.IntN(2) == 0 {
				req.CompareAdd = binary.NativeEndian.Uint64(at)
			}
		}
		e.reads[i] = bytes.Clone(at)
		atomicOn(at, req.Op, req.CompareAdd, req.Swap)
	}
	x.post(req, data)
}

// Random requests both ways over a network that loses, doubles, delays, overtakes and changes packets, a receiver that is
// late, and an output that is full now and then: each is executed once, in order, and all succeed.
func runRandom(t *testing.T, seed uint64, ops int, trace bool) *network {
	n := newNetwork(t, seed, func(c *Config) { c.Selective, c.Congestion = seed%2 == 1, seed%4 >= 2 })
	r := n.r
	if trace {
		n.trace = t.Logf
	}
	share := func(most float64) float64 {
		if r.IntN(3) == 0 {
			return 0
		}
		return r.Float64() * most
	}
	n.loss, n.duplicate, n.corrupt, n.full = share(0.1), share(0.1), share(0.05), share(0.2)
	n.jitter = []time.Duration{0, 1, 30, 300}[r.IntN(4)] * time.Microsecond
	var exp [2]expected
	left := [2]int{ops, ops}
	for i, x := range n.nodes {
		// Of seven losses in a row there is always somebody.
		x.req.cfg.RetryCount, x.req.retries = 200, 200
		exp[i] = expected{mem: make([]byte, len(x.mem)), reads: map[int][]byte{}}
		peer := n.nodes[1-i]
		var act func()
		act = func() {
			for range r.IntN(4) {
				if left[i] > 0 && x.req.Queued() < x.req.cfg.SendDepth {
					left[i]--
					x.random(r, peer, &exp[i])
				}
			}
			x.recvs += r.IntN(3)
			x.pump()
			if left != [2]int{} || !n.ended() { // its receives are wanted to the end
				n.after(time.Duration(r.IntN(40))*time.Microsecond, act)
			}
		}
		n.after(0, act)
	}
	n.run(func() bool { return left == [2]int{} && n.ended() || t.Failed() })
	for i, x := range n.nodes {
		peer := n.nodes[1-i]
		if !bytes.Equal(peer.mem, exp[i].mem) {
			t.Errorf("seed %d: node %d's memory is not what its peer has made of it", seed, 1-i)
		}
		if len(peer.got) != len(exp[i].messages) {
			t.Fatalf("seed %d: node %d has %d messages, want %d", seed, 1-i, len(peer.got), len(exp[i].messages))
		}
		for k, m := range exp[i].messages {
			if got := peer.got[k]; got.Message != m.Message || got.st != m.st || !m.Write && !bytes.Equal(got.data, m.data) {
				t.Fatalf("seed %d: node %d: message %d is %+v %v, want %+v", seed, 1-i, k, got.Message, got.st, m.Message)
			}
		}
		for k, want := range exp[i].reads {
			if !bytes.Equal(x.sinks[k], want) {
				t.Fatalf("seed %d: node %d: request %d has brought the wrong bytes", seed, i, k)
			}
		}
		if k := slices.IndexFunc(x.done, func(st ib.WCStatus) bool { return st != ib.WCSuccess }); k >= 0 {
			t.Fatalf("seed %d: node %d: request %d ends with %v", seed, i, k, x.done[k])
		}
	}
	return n
}

// SEED=n runs one seed and says what happens; SEEDS=n runs more of them than the test does by itself.
func TestRandom(t *testing.T) {
	number := func(name string) int {
		s := os.Getenv(name)
		if s == "" {
			return -1
		}
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return n
	}
	if seed := number("SEED"); seed >= 0 {
		runRandom(t, uint64(seed), 200, true)
		return
	}
	seeds := 300
	if testing.Short() {
		seeds = 30
	}
	seeds = max(seeds, number("SEEDS"))
	var resent, naks, rnr, implied, timeouts, single uint64
	for seed := range seeds {
		for _, x := range runRandom(t, uint64(seed), 200, false).nodes {
			c := &x.req.Counters
			resent, naks, rnr, implied, timeouts, single = resent+c.Resent, naks+c.SeqNAKs, rnr+c.RNRNAKs, implied+c.Implied, timeouts+c.Timeouts, single+c.Single
		}
		if t.Failed() {
			t.Fatalf("to repeat: SEED=%d", seed)
		}
	}
	if resent == 0 || naks == 0 || rnr == 0 || implied == 0 || timeouts == 0 || single == 0 {
		t.Errorf("not all was tried: %d packets sent again (%d by themselves), %d sequence NAKs, %d RNR NAKs, %d responses asked for again, %d timeouts",
			resent, single, naks, rnr, implied, timeouts)
	}
}

// The same seed gives the same run.
func TestReproducible(t *testing.T) {
	a, b := runRandom(t, 7, 200, false), runRandom(t, 7, 200, false)
	if a.now != b.now || a.order != b.order || a.nodes[0].req.Counters != b.nodes[0].req.Counters {
		t.Errorf("two runs of a seed took %v and %v", a.now, b.now)
	}
}

// Without losses, nothing is sent twice, and each packet is as long as it can be.
func TestQuietNetwork(t *testing.T) {
	n := newNetwork(t, 1, nil)
	a, b := n.nodes[0], n.nodes[1]
	b.recvs = 1
	data := payloadOf(10*simMTU + 3)
	a.post(Request{Op: ib.OpSend, Len: uint32(len(data))}, data)
	a.post(Request{Op: ib.OpRDMARead, Len: 5 * simMTU, RKey: roKey, Addr: 8}, nil)
	a.pump()
	n.run(n.ended)
	if c := a.req.Counters; c.Sent != 12 || c.Resent != 0 || c.Timeouts != 0 || c.Dropped != 0 {
		t.Errorf("%+v", c)
	}
	if len(b.got) != 1 || !bytes.Equal(b.got[0].data, data) || !bytes.Equal(a.sinks[1], b.readOnly[8:][:5*simMTU]) {
		t.Error("wrong bytes")
	}
}

func payloadOf(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7)
	}
	return b
}

// What a request that is refused ends with, on both sides; what was posted before it succeeds, and after it is flushed.
func TestRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Config)
		before func(a, b *node)
		req    Request
		want   ib.WCStatus
		recv   ib.WCStatus // of the receive that it has taken
		late   bool        // it is found out when what follows has been executed
	}{
		"WRITE, wrong key":             {req: Request{Op: ib.OpRDMAWrite, Len: 8, RKey: 1}, want: ib.WCRemoteAccessErr},
		"WRITE, read only":             {req: Request{Op: ib.OpRDMAWrite, Len: 8, RKey: roKey}, want: ib.WCRemoteAccessErr},
		"WRITE, out of range":          {req: Request{Op: ib.OpRDMAWrite, Len: 1000, RKey: memKey, Addr: 1<<14 - 999}, want: ib.WCRemoteAccessErr},
		"WRITE, wraps":                 {req: Request{Op: ib.OpRDMAWrite, Len: 1000, RKey: memKey, Addr: 1<<64 - 500}, want: ib.WCRemoteAccessErr},
		"READ, wrong key":              {req: Request{Op: ib.OpRDMARead, Len: 8, RKey: 1}, want: ib.WCRemoteAccessErr},
		"READ, not allowed":            {change: func(c *Config) { c.MaxDestRdAtomic = 0 }, req: Request{Op: ib.OpRDMARead, Len: 8, RKey: memKey}, want: ib.WCRemoteInvalidReqErr},
		"READ, more packets than PSNs": {req: Request{Op: ib.OpRDMARead, Len: 1 << 31, RKey: memKey}, want: ib.WCLocalLengthErr},
		"atomic, misaligned":           {req: Request{Op: ib.OpAtomicFetchAdd, Len: 8, RKey: memKey, Addr: 4}, want: ib.WCRemoteInvalidReqErr},
		"atomic, read only":            {req: Request{Op: ib.OpAtomicCmpSwap, Len: 8, RKey: roKey}, want: ib.WCRemoteAccessErr},
		"ATOMIC_WRITE, misaligned":     {req: Request{Op: ib.OpAtomicWrite, Len: 8, RKey: memKey, Addr: 4}, want: ib.WCRemoteInvalidReqErr},
		"ATOMIC_WRITE, read only":      {req: Request{Op: ib.OpAtomicWrite, Len: 8, RKey: roKey}, want: ib.WCRemoteAccessErr},
		"ATOMIC_WRITE, local memory":   {before: func(a, b *node) { a.badAt = 1 }, req: Request{Op: ib.OpAtomicWrite, Len: 8, RKey: memKey}, want: ib.WCLocalProtErr},
		"ATOMIC_WRITE, not allowed":    {change: func(c *Config) { c.MaxDestRdAtomic = 0 }, req: Request{Op: ib.OpAtomicWrite, Len: 8, RKey: memKey}, want: ib.WCRemoteInvalidReqErr},
		"FLUSH, out of range":          {req: Request{Op: ib.OpFlush, RKey: memKey, Addr: 1 << 14, Flush: ib.Flush{Placement: ib.FlushGlobal, Length: 1}}, want: ib.WCRemoteAccessErr},
		"FLUSH, no right":              {req: Request{Op: ib.OpFlush, RKey: memKey, Flush: ib.Flush{Placement: ib.FlushPersistent}}, want: ib.WCRemoteAccessErr},
		"FLUSH, no placement":          {req: Request{Op: ib.OpFlush, RKey: memKey}, want: ib.WCRemoteInvalidReqErr},
		"FLUSH, unknown level":         {req: Request{Op: ib.OpFlush, RKey: memKey, Flush: ib.Flush{Placement: ib.FlushGlobal, Level: 2}}, want: ib.WCRemoteInvalidReqErr},
		"FLUSH, not allowed":           {change: func(c *Config) { c.MaxDestRdAtomic = 0 }, req: Request{Op: ib.OpFlush, RKey: memKey, Flush: ib.Flush{Placement: ib.FlushGlobal}}, want: ib.WCRemoteInvalidReqErr},
		"SEND, too long":               {before: func(a, b *node) { b.recvs, b.recvLen = 2, 600 }, req: Request{Op: ib.OpSend, Len: 700}, want: ib.WCRemoteInvalidReqErr, recv: ib.WCLocalLengthErr},
		"SEND, local memory":           {before: func(a, b *node) { a.badAt = 1 }, req: Request{Op: ib.OpSend, Len: 8}, want: ib.WCLocalProtErr},
		"READ, local memory":           {before: func(a, b *node) { a.badAt = 1 }, req: Request{Op: ib.OpRDMARead, Len: 8, RKey: memKey}, want: ib.WCLocalProtErr, late: true},
		"SEND, no receive ever":        {change: func(c *Config) { c.RNRRetry = 3 }, before: func(a, b *node) { b.recvs = 1 }, req: Request{Op: ib.OpSend, Len: 8}, want: ib.WCRNRRetryExceeded},
		"nobody answers":               {before: func(a, b *node) { a.net.after(100*time.Microsecond, func() { a.net.cut[1] = true }) }, req: Request{Op: ib.OpSend, Len: 8}, want: ib.WCRetryExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNetwork(t, 1, c.change)
			a, b := n.nodes[0], n.nodes[1]
			b.recvs = 10
			if c.before != nil {
				c.before(a, b)
			}
			a.post(Request{Op: ib.OpSend, Len: 600}, payloadOf(600))
			a.pump()
			n.run(n.ended)
			n.after(time.Millisecond, func() {
				a.post(c.req, make([]byte, min(c.req.Len, 1<<16)))
				a.post(Request{Op: ib.OpSend, Len: 8}, make([]byte, 8))
				a.pump()
			})
			n.run(func() bool { return len(a.done) == 3 })
			a.post(Request{Op: ib.OpSend, Len: 8}, make([]byte, 8))
			if want := []ib.WCStatus{ib.WCSuccess, c.want, ib.WCFlushErr, ib.WCFlushErr}; !slices.Equal(a.done, want) {
				t.Errorf("requests end with %v, want %v", a.done, want)
			}
			if len(b.got) == 0 || !bytes.Equal(b.got[0].data, payloadOf(600)) {
				t.Error("the message before is not there")
			}
			if len(b.got) != 1 && c.recv == ib.WCSuccess && !c.late || c.recv != ib.WCSuccess && (len(b.got) != 2 || b.got[1].st != c.recv) {
				t.Errorf("receives: %+v", b.got[1:])
			}
			if c.want >= ib.WCRemoteInvalidReqErr && c.want <= ib.WCRemoteOpErr && b.fatal != c.want {
				t.Errorf("the responder fails with %v, want %v", b.fatal, c.want)
			}
			if !bytes.Equal(b.mem, make([]byte, len(b.mem))) {
				t.Error("memory was written")
			}
			if n.nodes[0].req.Deadline() != 0 {
				t.Error("a timer runs on")
			}
		})
	}
}

// A request that cannot be sent ends after those before it, even if these must be sent again.
func TestLocalErrorKeepsOrder(t *testing.T) {
	n := newNetwork(t, 1, nil)
	a, b := n.nodes[0], n.nodes[1]
	b.recvs = 1
	a.badAt = 1
	n.cut[1] = true
	a.post(Request{Op: ib.OpSend, Len: 600}, payloadOf(600))
	a.post(Request{Op: ib.OpSend, Len: 600}, payloadOf(600))
	a.pump()
	n.after(time.Millisecond, func() { n.cut[1] = false })
	n.run(n.ended)
	if want := []ib.WCStatus{ib.WCSuccess, ib.WCLocalProtErr}; !slices.Equal(a.done, want) {
		t.Errorf("requests end with %v, want %v", a.done, want)
	}
}

// A region that is withdrawn while it is read.
func TestReadWithdrawn(t *testing.T) {
	n := newNetwork(t, 1, nil)
	a, b := n.nodes[0], n.nodes[1]
	n.full = 0.9 // so that the response takes a while
	a.post(Request{Op: ib.OpRDMARead, Len: 1 << 14, RKey: roKey}, nil)
	a.pump()
	n.after(30*time.Microsecond, func() { b.withdraw = true })
	n.run(n.ended)
	if a.done[0] != ib.WCRemoteAccessErr || b.fatal != ib.WCRemoteAccessErr {
		t.Errorf("READ ends with %v, the responder with %v", a.done[0], b.fatal)
	}
}

// A READ that is asked for once more, when its memory has been withdrawn because it had ended, harms nothing.
func TestReadAgainWithdrawn(t *testing.T) {
	for _, selective := range []bool{false, true} {
		n := newNetwork(t, 1, func(c *Config) { c.Selective = selective })
		a, b := n.nodes[0], n.nodes[1]
		a.post(Request{Op: ib.OpRDMARead, Len: 3 * simMTU, RKey: roKey, Addr: 16}, nil)
		first := a.req.nxt
		a.pump()
		n.run(n.ended)
		b.withdraw = true
		late := roce.Packet{Opcode: roce.Op(roce.RC, roce.ReadRequest), PSN: first, RKey: roKey, Addr: 16, Len: 3 * simMTU}
		b.resp.Receive(&late)
		b.pump()
		b.withdraw, b.recvs = false, 1
		a.post(Request{Op: ib.OpSend, Len: 8}, payloadOf(8))
		a.pump()
		n.run(n.ended)
		if a.done[0] != ib.WCSuccess || a.done[1] != ib.WCSuccess || b.resp.Failed() {
			t.Errorf("selective %v: requests end with %v, the responder with %v", selective, a.done, b.fatal)
		}
	}
}

// Atomics are executed once, however often they are asked for.
func TestAtomicReplay(t *testing.T) {
	n := newNetwork(t, 1, nil)
	a, b := n.nodes[0], n.nodes[1]
	n.cut[0] = true // the answers are lost
	for i := range 4 {
		a.post(Request{Op: ib.OpAtomicFetchAdd, Len: 8, RKey: memKey, CompareAdd: uint64(i + 1)}, nil)
	}
	a.pump()
	n.after(2*time.Millisecond, func() { n.cut[0] = false })
	n.run(n.ended)
	if got := binary.NativeEndian.Uint64(b.mem); got != 10 {
		t.Errorf("the sum is %d", got)
	}
	for i, want := range []uint64{0, 1, 3, 6} {
		if got := binary.NativeEndian.Uint64(a.sinks[i]); got != want {
			t.Errorf("addition %d has found %d, want %d", i, got, want)
		}
	}
	if b.resp.Counters.Duplicates == 0 {
		t.Error("nothing came twice")
	}
}

// A WRITE that comes again is acknowledged, but not the READ and the atomic behind it, whose answers may have been lost: rxe takes that
// for their answer, and completes them without a result.
func TestDuplicateBeforeResult(t *testing.T) {
	n := newNetwork(t, 1, nil)
	r := n.nodes[1].resp
	first := r.want
	write := roce.Packet{Opcode: roce.Op(roce.RC, roce.WriteOnly), PSN: first, RKey: memKey, Len: 8, Payload: make([]byte, 8), AckReq: true}
	r.Receive(&write)
	r.Receive(&roce.Packet{Opcode: roce.Op(roce.RC, roce.FetchAdd), PSN: first.Add(1), RKey: memKey, AckReq: true})
	r.Receive(&roce.Packet{Opcode: roce.Op(roce.RC, roce.ReadRequest), PSN: first.Add(2), RKey: roKey, Len: 8, AckReq: true})
	r.outHead = r.outTail // all answers are lost
	r.Receive(&write)
	if x := r.at(r.outHead); r.outTail-r.outHead != 1 || x.result || x.psn != first || x.syndrome != roce.Ack || r.Counters.Duplicates != 1 {
		t.Errorf("%d answers, of which the first is %+v; the WRITE has PSN %v", r.outTail-r.outHead, x, first)
	}
}

// RNR retries start anew with each message that gets through.
func TestRNRRetriesReset(t *testing.T) {
	n := newNetwork(t, 1, func(c *Config) { c.RNRRetry = 6 })
	a, b := n.nodes[0], n.nodes[1]
	var give func()
	give = func() {
		b.recvs++
		if !n.ended() {
			n.after(100*time.Microsecond, give) // two to three times the timer
		}
	}
	for range 20 {
		a.post(Request{Op: ib.OpSend, Len: 8}, make([]byte, 8))
	}
	n.after(100*time.Microsecond, give)
	a.pump()
	n.run(n.ended)
	if slices.ContainsFunc(a.done, func(st ib.WCStatus) bool { return st != ib.WCSuccess }) {
		t.Errorf("requests end with %v", a.done)
	}
	if a.req.Counters.RNRNAKs < 20 {
		t.Errorf("%d RNR NAKs", a.req.Counters.RNRNAKs)
	}
}

// Wireshark's dissector has nothing to say against what two connections say to each other, and sees all of it.
func TestTshark(t *testing.T) {
	var out bytes.Buffer
	w, err := pcap.NewWriter(&out, "ringside")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.AddInterface(pcap.Interface{Name: "sim"}); err != nil {
		t.Fatal(err)
	}
	n := newNetwork(t, 1, nil)
	n.tap, n.loss, n.duplicate = w, 0.05, 0.05
	var exp expected
	exp.mem, exp.reads = make([]byte, 1<<14), map[int][]byte{}
	for range 60 {
		n.nodes[0].random(n.r, n.nodes[1], &exp)
	}
	for _, b := range append(n.nodes[0].sends, n.nodes[1].readOnly) { // like nothing that Wireshark guesses
		for i := range b {
			b[i] = 0xee
		}
	}
	n.nodes[1].recvs = 60
	n.nodes[0].pump()
	n.run(n.ended)
	sent := n.nodes[0].req.Counters.Sent
	var requests, resent uint64
	last := uint64(0)
	for _, p := range testutil.Tshark(t, out.Bytes(), "ip.src", "infiniband.bth.opcode", "infiniband.bth.destqp", "infiniband.bth.psn", "infiniband.invariant.crc") {
		psn, err := strconv.ParseUint(p[3], 0, 32)
		younger := p[1] == "28" || p[1] == "29" // FLUSH and ATOMIC WRITE, which tshark (4.0) does not know
		if err != nil || p[4] == "" && !younger {
			t.Fatalf("%q", p)
		}
		if p[0] != ends[0].Addr().String() {
			continue
		}
		if requests++; p[2] != "0x000065" {
			t.Errorf("request to queue pair %s", p[2])
		}
		if distance(ib.PSN(last), ib.PSN(psn)) <= 0 && requests > 1 {
			resent++
		}
		last = psn
	}
	if requests != sent || resent == 0 {
		t.Errorf("tshark has seen %d requests of %d, and going back %d times", requests, sent, resent)
	}
}

// What the first byte of FuzzPackets' input asks for.
const (
	fuzzSelective = 1 << iota
	fuzzCongestion
	fuzzStream // with fuzzSelective
	fuzzOptions
)

// Whatever a peer sends, nothing but its own connection suffers: no panic, bounded work, memory only where it was allowed. The input is
// options, and packets with their lengths in front.
func FuzzPackets(f *testing.F) {
	add := func(ps ...roce.Packet) {
		var b []byte
		for i := range ps {
			p := make([]byte, ps[i].Opcode.HeaderLen()+len(ps[i].Payload)+roce.Pad(len(ps[i].Payload)))
			copy(p[ps[i].PutHeader(p, len(ps[i].Payload)):], ps[i].Payload)
			b = append(append(b, byte(len(p)), byte(len(p)>>8)), p...)
		}
		for options := range byte(fuzzOptions) {
			f.Add(append([]byte{options}, b...))
		}
	}
	const psn = 1000
	op := func(o uint8) roce.Opcode { return roce.Op(roce.RC, o) }
	full := make([]byte, simMTU)
	add(roce.Packet{Opcode: op(roce.SendFirst), PSN: psn, Payload: full}, roce.Packet{Opcode: op(roce.SendMiddle), PSN: psn + 1, Payload: full},
		roce.Packet{Opcode: op(roce.SendLast), PSN: psn + 2, Payload: []byte{1}, AckReq: true})
	add(roce.Packet{Opcode: op(roce.WriteFirst), PSN: psn, Payload: full, RKey: memKey, Len: simMTU + 8}, roce.Packet{Opcode: op(roce.WriteLastImm), PSN: psn + 1, Payload: full[:8]})
	add(roce.Packet{Opcode: op(roce.ReadRequest), PSN: psn, RKey: roKey, Len: 1 << 14}, roce.Packet{Opcode: op(roce.ReadRequest), PSN: psn + 3, RKey: roKey, Addr: 3 * simMTU, Len: 1<<14 - 3*simMTU},
		roce.Packet{Opcode: op(roce.FetchAdd), PSN: psn + 64, RKey: memKey, Swap: 5})
	add(roce.Packet{Opcode: roce.Op(roce.UC, roce.SendFirst), PSN: psn, Payload: full}, roce.Packet{Opcode: roce.Op(roce.UC, roce.WriteOnlyImm), PSN: psn + 3, RKey: memKey},
		roce.Packet{Opcode: roce.Op(roce.UC, roce.SendLast), PSN: psn + 4, Payload: full})
	for i := range uint8(8) {
		add(roce.Packet{Opcode: op(roce.Acknowledge), PSN: psn + ib.PSN(i), Syndrome: roce.Ack}, roce.Packet{Opcode: op(roce.Acknowledge), PSN: psn + ib.PSN(i), Syndrome: roce.RNRNak(ib.RNRTimer(i))},
			roce.Packet{Opcode: op(roce.Acknowledge), PSN: psn + ib.PSN(i), Syndrome: roce.NakPSN + roce.Syndrome(i)})
	}
	add(roce.Packet{Opcode: op(roce.ReadResponseFirst), PSN: psn + 2, Payload: full}, roce.Packet{Opcode: op(roce.ReadResponseMiddle), PSN: psn + 3, Payload: full},
		roce.Packet{Opcode: op(roce.ReadResponseLast), PSN: psn + 4, Payload: full[:1]}, roce.Packet{Opcode: op(roce.AtomicAcknowledge), PSN: psn + 5})
	// What comes early, gaps, and what says so; marks.
	add(roce.Packet{Opcode: op(roce.WriteLast), PSN: psn + 2, Payload: full[:8], AckReq: true, FECN: true}, roce.Packet{Opcode: op(roce.ReadRequest), PSN: psn + 5, RKey: roKey, Len: 3 * simMTU},
		roce.Packet{Opcode: op(roce.WriteMiddle), PSN: psn + 1, Payload: full}, roce.Packet{Opcode: op(roce.WriteFirst), PSN: psn, Payload: full, RKey: memKey, Len: 2*simMTU + 8},
		roce.Packet{Opcode: op(roce.ReadRequest), PSN: psn + 3, RKey: roKey, Len: 5 * simMTU, AckReq: true})
	add(roce.Packet{Opcode: op(roce.Acknowledge), PSN: psn - 1, Syndrome: roce.Ack, MSN: notesOf(5, 9), BECN: true}, roce.Packet{Opcode: op(roce.Acknowledge), PSN: psn, Syndrome: roce.NakPSN, MSN: 2<<12 | 2},
		roce.Packet{Opcode: op(roce.ReadResponseLast), PSN: psn + 4, Payload: full[:1], FECN: true}, roce.Packet{Opcode: op(roce.Acknowledge), PSN: psn + 6, Syndrome: roce.Ack, MSN: notesOf(0, 3)},
		roce.Packet{Opcode: roce.CNP})
	add(roce.Packet{Opcode: op(roce.AtomicWrite), PSN: psn, RKey: memKey, Len: 8, Payload: full[:8]}, roce.Packet{Opcode: op(roce.Flush), PSN: psn + 1, RKey: memKey, FETH: 1},
		roce.Packet{Opcode: op(roce.AtomicWrite), PSN: psn, RKey: memKey, Len: 8, Payload: full[:8]}, roce.Packet{Opcode: op(roce.ReadResponseOnly), PSN: psn + 6},
		roce.Packet{Opcode: op(roce.ReadResponseOnly), PSN: psn + 7, Payload: full[:4]})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == 0 {
			return
		}
		options := b[0]
		b = b[1:]
		pool := NewEarlyPool(1 << 20)
		n := newNetwork(t, 1, func(c *Config) {
			c.SQPSN, c.RQPSN, c.Early = psn, psn, pool
			c.Selective, c.Congestion, c.Stream = options&fuzzSelective != 0, options&fuzzCongestion != 0, options&(fuzzSelective|fuzzStream) == fuzzSelective|fuzzStream
		})
		n.loss = 1
		x := n.nodes[0]
		x.recvs = 3
		x.post(Request{Op: ib.OpSend, Len: 2 * simMTU}, make([]byte, 2*simMTU))
		x.post(Request{Op: ib.OpRDMARead, Len: 2*simMTU + 1, RKey: roKey}, nil)
		x.post(Request{Op: ib.OpAtomicFetchAdd, Len: 8, RKey: memKey}, nil)
		x.post(Request{Op: ib.OpRDMAWrite, Len: 8, RKey: memKey}, make([]byte, 8))
		x.post(Request{Op: ib.OpFlush, RKey: memKey, Flush: ib.Flush{Placement: ib.FlushGlobal}}, nil)
		x.post(Request{Op: ib.OpAtomicWrite, Len: 8, RKey: memKey}, make([]byte, 8))
		x.pump()
		was := bytes.Clone(x.readOnly)
		n.nodes[1].recvs = 3
		uc := NewUCResponder(x.req.cfg, target{n.nodes[1]})
		for len(b) >= 2 {
			k := min(int(binary.LittleEndian.Uint16(b)), len(b)-2)
			var p roce.Packet
			if p.Decode(b[2:2+k]) == nil {
				n.now += time.Microsecond
				switch p.Opcode.Service() {
				case roce.RC, roce.CNP.Service():
					x.takes(&p)
				case roce.UC:
					uc.Receive(&p)
				}
			}
			b = b[2+k:]
		}
		for range 3 {
			if d := x.req.Deadline(); d != 0 {
				n.now = max(n.now, d)
				x.req.Expire(n.now)
				x.pump()
			}
		}
		n.settle() // acknowledgements that take a moment
		if !bytes.Equal(was, x.readOnly) {
			t.Error("memory that is only readable was written")
		}
		most := int32(defaultWindow + 16)
		if x.req.cfg.Selective {
			most = 2 * selectiveWindow
		}
		if d := distance(x.req.una, x.req.nxt); d < 0 || d > most || len(x.req.asks) > x.req.cfg.MaxRdAtomic {
			t.Errorf("%v", x)
		}
		if c := &x.req.cc; c.window < minWindow || c.window > c.most || c.share < 0 || c.share > one {
			t.Errorf("%+v", *c)
		}
		if a := &x.resp.ahead; (a.n == 0) != (a.slots == nil) || a.held != pool.Lent() {
			t.Errorf("%d early packets, in %d slots; %d bytes held, %d lent", a.n, len(a.slots), a.held, pool.Lent())
		}
		for i := range x.resp.ahead.slots {
			if e := &x.resp.ahead.slots[i]; e.there && distance(x.resp.want, e.pkt.PSN) <= 0 {
				t.Errorf("the early packet %d is kept, when %d is expected", e.pkt.PSN, x.resp.want)
			}
		}
		if x.resp.Discard(); pool.Lent() != 0 {
			t.Errorf("%d bytes are lent after all is forgotten", pool.Lent())
		}
	})
}

func TestNothingAllocates(t *testing.T) {
	n := newNetwork(t, 1, nil)
	a, b := n.nodes[0], n.nodes[1]
	sink := &quiet{buf: make([]byte, 8192)}
	a.sends, a.sinks = [][]byte{make([]byte, 600)}, [][]byte{make([]byte, 600)}
	q := &quietQueue{}
	a.req.q = q
	var p roce.Packet
	ack := roce.Packet{Opcode: roce.Op(roce.RC, roce.Acknowledge), Syndrome: roce.Ack}
	write := Request{Op: ib.OpRDMAWrite, Len: 600, RKey: memKey}
	if got := testing.AllocsPerRun(100, func() {
		a.req.Post(&write)
		a.req.Pump(1, sink)
		for i := range 3 {
			p = roce.Packet{Opcode: roce.Op(roce.RC, []uint8{roce.WriteFirst, roce.WriteMiddle, roce.WriteLast}[i]), PSN: b.resp.want, RKey: memKey, Len: 600, AckReq: i == 2,
				Payload: sink.buf[:min(600-i*simMTU, simMTU)]}
			b.resp.Receive(&p)
		}
		b.resp.Pump(1, sink)
		ack.PSN = a.req.end.Add(-1)
		a.req.Receive(&ack, 2)
	}); got != 0 || q.failed || q.ended < 100 {
		t.Errorf("%v allocations, %d requests ended", got, q.ended)
	}
}

type quiet struct{ buf []byte }

func (q *quiet) Packet(_ *roce.Packet, n int) ([]byte, bool) { return q.buf[:n], true }
func (q *quiet) Commit()                                     {}
func (q *quiet) Abort()                                      {}

type quietQueue struct {
	ended  int
	failed bool
}

func (q *quietQueue) Gather(_, _ uint32, _ []byte) bool  { return true }
func (q *quietQueue) Scatter(_, _ uint32, _ []byte) bool { return true }
func (q *quietQueue) Complete(_ uint32, st ib.WCStatus) {
	q.ended++
	q.failed = q.failed || st != ib.WCSuccess
}

// A request with a fence is not sent before the responses to READs and atomics that came before it are there.
func TestFenceWaits(t *testing.T) {
	n := newNetwork(t, 1, nil)
	a, b := n.nodes[0], n.nodes[1]
	b.recvs = 2
	a.post(Request{Op: ib.OpRDMARead, Len: 3 * simMTU, RKey: roKey}, nil)
	a.post(Request{Op: ib.OpSend, Len: 8}, make([]byte, 8))
	a.post(Request{Op: ib.OpSend, Len: 8, Fence: true}, make([]byte, 8))
	a.pump()
	if a.req.Counters.Sent != 2 {
		t.Errorf("%d packets were sent before the response, want those of the READ and of the SEND without a fence", a.req.Counters.Sent)
	}
	n.run(n.ended)
	if len(b.got) != 2 || a.req.Counters.Sent != 3 {
		t.Errorf("%d messages, %d packets", len(b.got), a.req.Counters.Sent)
	}
}
