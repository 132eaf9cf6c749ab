package softnic

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// end is one side of a connected pair.
type end struct {
	t   testing.TB
	n   *NIC
	pd  driver.PD
	cq  driver.CQ
	ch  driver.CompChannel
	q   driver.QP
	mr  driver.MR
	reg *mem.Region
	buf []byte

	borrowed  bool // pd and cq belong to another
	resources uint8
}

type endConfig struct {
	typ     ib.QPType
	depth   int
	size    int
	private bool // ordinary memory
	srq     driver.SRQ
	// cqEntries makes the CQ deeper than one QP needs.
	cqEntries int
	// noResources: neither side's READs, nor what else has an answer, can be done.
	noResources bool
}

// newEnd makes an end that is closed with the test.
func newEnd(t testing.TB, n *NIC, cfg endConfig) *end {
	t.Helper()
	e := makeEnd(t, n, cfg)
	t.Cleanup(e.close)
	return e
}

// makeEnd makes an end that the caller closes.
func makeEnd(t testing.TB, n *NIC, cfg endConfig) *end {
	t.Helper()
	return makeEndIn(t, n, nil, cfg)
}

// makeEndIn is makeEnd in a PD that the end then owns.
func makeEndIn(t testing.TB, n *NIC, pd driver.PD, cfg endConfig) *end {
	t.Helper()
	return makeEndOn(t, n, pd, nil, cfg)
}

// makeEndOn is makeEnd in a PD and on a CQ; with a CQ given, both stay the caller's.
func makeEndOn(t testing.TB, n *NIC, pd driver.PD, cq driver.CQ, cfg endConfig) *end {
	t.Helper()
	if cfg.depth == 0 {
		cfg.depth = 64
	}
	if cfg.size == 0 {
		cfg.size = 1 << 20
	}
	e := &end{t: t, n: n, pd: pd, cq: cq, borrowed: cq != nil, resources: 16}
	if cfg.noResources {
		e.resources = 0
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if pd == nil {
		e.pd, err = n.AllocPD()
		must(err)
	}
	if cq == nil {
		e.ch, err = n.CreateCompChannel()
		must(err)
		e.cq, err = n.CreateCQ(driver.CQConfig{Entries: max(2*cfg.depth, cfg.cqEntries), Channel: e.ch})
		must(err)
	}
	mc := driver.MRConfig{FD: -1, Access: ib.AccessLocalWrite | ib.AccessRemote | ib.AccessMWBind}
	if cfg.private {
		e.buf = heapBytes(cfg.size)
	} else {
		e.reg, err = mem.Alloc(cfg.size, mem.Options{})
		must(err)
		e.buf = e.reg.Bytes()[:cfg.size]
		mc.FD = e.reg.FD()
	}
	mc.Mem = e.buf
	e.mr, err = e.pd.RegisterMR(mc)
	must(err)
	e.q, err = e.pd.CreateQP(driver.QPConfig{Type: cfg.typ, SendCQ: e.cq, RecvCQ: e.cq, SRQ: cfg.srq,
		Cap: ib.QPCap{MaxSendWR: cfg.depth, MaxRecvWR: cfg.depth, MaxSendSGE: 4, MaxRecvSGE: 4, MaxInline: 256}})
	must(err)
	return e
}

func (e *end) close() {
	all := []interface{ Close() error }{e.q, e.mr}
	if !e.borrowed {
		all = append(all, e.cq, e.ch, e.pd)
	}
	for _, c := range all {
		if err := c.Close(); err != nil && err != driver.ErrClosed {
			e.t.Errorf("close %T: %v", c, err)
		}
	}
	if e.reg != nil {
		e.reg.Close()
	}
}

func (e *end) init() {
	e.t.Helper()
	a := ib.QPAttr{State: ib.Init, Port: 1, Access: ib.AccessRemote}
	if err := e.q.Modify(context.Background(), &a, ib.AttrState|ib.AttrPort|ib.AttrPKeyIndex|ib.AttrAccess); err != nil {
		e.t.Fatal(err)
	}
}

// connect takes the QP to RTS, from RESET or INIT.
func (e *end) connect(peer *end) {
	e.t.Helper()
	e.connectTo(peer.n.gid, peer.q.QPN())
}

// connectTo is connect to a QP that may be another process's.
func (e *end) connectTo(gid ib.GID, qpn ib.QPN) {
	e.t.Helper()
	ctx := context.Background()
	if a, _ := e.q.Query(); a.State == ib.Reset {
		e.init()
	}
	a := ib.QPAttr{State: ib.RTR, AH: ib.AHAttr{DGID: gid, Port: 1}, PathMTU: ib.MTU4096, DestQPN: qpn,
		MaxDestRdAtomic: e.resources, MinRNRTimer: 1}
	if err := e.q.Modify(ctx, &a, ib.AttrState|ib.AttrAV|ib.AttrPathMTU|ib.AttrDestQPN|ib.AttrRQPSN|ib.AttrMaxDestRdAtomic|ib.AttrMinRNRTimer); err != nil {
		e.t.Fatal(err)
	}
	a = ib.QPAttr{State: ib.RTS, MaxRdAtomic: e.resources, AckTimeout: 18, RetryCount: 7, RNRRetry: 7}
	if err := e.q.Modify(ctx, &a, ib.AttrState|ib.AttrMaxRdAtomic|ib.AttrAckTimeout|ib.AttrRetryCount|ib.AttrRNRRetry|ib.AttrSQPSN); err != nil {
		e.t.Fatal(err)
	}
}

func (e *end) sge(off, n int) []ib.SGE {
	return []ib.SGE{{Addr: addrOf(e.buf) + uint64(off), Length: uint32(n), LKey: e.mr.LKey()}}
}

func (e *end) poll() ib.WC {
	e.t.Helper()
	var wc [1]ib.WC
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		switch n := e.cq.Poll(wc[:]); {
		case n < 0:
			e.t.Fatalf("poll: %v", e.cq.Err())
		case n == 1:
			return wc[0]
		}
	}
	e.t.Fatal("no completion")
	return ib.WC{}
}

func (e *end) send(wr ib.SendWR) {
	e.t.Helper()
	if n, err := e.q.PostSend([]ib.SendWR{wr}); n != 1 || err != nil {
		e.t.Fatalf("post send: %d, %v", n, err)
	}
}

func (e *end) recv(id uint64, sge []ib.SGE) {
	e.t.Helper()
	if n, err := e.q.PostRecv([]ib.RecvWR{{ID: id, SGEs: sge}}); n != 1 || err != nil {
		e.t.Fatalf("post recv: %d, %v", n, err)
	}
}

func openNIC(t testing.TB, viaDoor bool) *NIC {
	n, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	n.viaDoor = viaDoor
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// paths runs f over every direct path.
func paths(t *testing.T, f func(t *testing.T, a, b *NIC)) {
	t.Run("loop", func(t *testing.T) { n := openNIC(t, false); f(t, n, n) })
	t.Run("inproc", func(t *testing.T) { f(t, openNIC(t, false), openNIC(t, false)) })
	t.Run("shm", func(t *testing.T) {
		a, b := openNIC(t, true), openNIC(t, true)
		if a.sharedE != nil {
			t.Skip(a.sharedE)
		}
		f(t, a, b)
	})
}

func TestOperations(t *testing.T) {
	paths(t, func(t *testing.T, na, nb *NIC) {
		for _, private := range []bool{false, true} {
			t.Run(fmt.Sprintf("private=%v", private), func(t *testing.T) {
				a := newEnd(t, na, endConfig{typ: ib.RC, private: private})
				b := newEnd(t, nb, endConfig{typ: ib.RC, private: private})
				b.init()
				b.recv(7, b.sge(1000, 500))
				a.connect(b)
				b.connect(a)
				copy(a.buf, "hello, peer")
				a.send(ib.SendWR{ID: 1, Opcode: ib.OpSendWithImm, Imm: 42, Flags: ib.SendSignaled, SGEs: a.sge(0, 11)})
				if wc := a.poll(); wc.Status != ib.WCSuccess || wc.ID != 1 {
					t.Fatalf("send: %+v", wc)
				}
				wc := b.poll()
				if wc.Status != ib.WCSuccess || wc.ID != 7 || wc.ByteLen != 11 || wc.Imm != 42 || wc.Flags != ib.WCWithImm {
					t.Fatalf("recv: %+v", wc)
				}
				if !bytes.Equal(b.buf[1000:1011], []byte("hello, peer")) {
					t.Fatalf("received %q", b.buf[1000:1011])
				}
				remote := func(off int) uint64 { return addrOf(b.buf) + uint64(off) }
				a.send(ib.SendWR{ID: 2, Opcode: ib.OpRDMAWrite, Flags: ib.SendSignaled, SGEs: a.sge(0, 200<<10), RemoteAddr: remote(4096), RKey: b.mr.RKey()})
				if wc := a.poll(); wc.Status != ib.WCSuccess || wc.ID != 2 {
					t.Fatalf("write: %+v", wc)
				}
				if !bytes.Equal(b.buf[4096:4096+11], []byte("hello, peer")) {
					t.Fatal("write did not arrive")
				}
				copy(b.buf[4096:], "HELLO")
				a.send(ib.SendWR{ID: 3, Opcode: ib.OpRDMARead, Flags: ib.SendSignaled, SGEs: a.sge(300<<10, 100<<10), RemoteAddr: remote(4096), RKey: b.mr.RKey()})
				if wc := a.poll(); wc.Status != ib.WCSuccess || wc.ByteLen != 100<<10 {
					t.Fatalf("read: %+v", wc)
				}
				if string(a.buf[300<<10:300<<10+11]) != "HELLO, peer" {
					t.Fatalf("read %q", a.buf[300<<10:300<<10+11])
				}
				word := word64At(b.buf, 8)
				atomic.StoreUint64(word, 5)
				a.send(ib.SendWR{ID: 4, Opcode: ib.OpAtomicFetchAdd, Flags: ib.SendSignaled, SGEs: a.sge(16, 8), RemoteAddr: remote(8), RKey: b.mr.RKey(), CompareAdd: 10})
				if wc := a.poll(); wc.Status != ib.WCSuccess || a.buf[16] != 5 || atomic.LoadUint64(word) != 15 {
					t.Fatalf("fetch add: %+v %d %d", wc, a.buf[16], atomic.LoadUint64(word))
				}
				a.send(ib.SendWR{ID: 5, Opcode: ib.OpRDMAWrite, Flags: ib.SendSignaled, SGEs: a.sge(0, 8), RemoteAddr: remote(0), RKey: b.mr.RKey() + 1})
				if wc := a.poll(); wc.Status != ib.WCRemoteAccessErr {
					t.Fatalf("wrong rkey: %+v", wc)
				}
			})
		}
	})
}

func TestRNR(t *testing.T) {
	paths(t, func(t *testing.T, na, nb *NIC) {
		a, b := newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, nb, endConfig{typ: ib.RC})
		a.connect(b)
		b.connect(a)
		a.send(ib.SendWR{ID: 1, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: a.sge(0, 64)})
		time.Sleep(5 * time.Millisecond)
		b.recv(2, b.sge(0, 64))
		if wc := a.poll(); wc.Status != ib.WCSuccess {
			t.Fatal(wc)
		}
		if wc := b.poll(); wc.ID != 2 || wc.ByteLen != 64 {
			t.Fatal(wc)
		}
	})
}

// What is longer than a message can be is neither received into nor sent, in one element as little as in several.
func TestLongerThanAMessage(t *testing.T) {
	const size = 3 << 30
	paths(t, func(t *testing.T, na, nb *NIC) {
		a, b := newEnd(t, na, endConfig{typ: ib.RC}), newEnd(t, nb, endConfig{typ: ib.RC})
		a.connect(b)
		b.connect(a)
		long := func(e *end) []ib.SGE {
			mr, err := e.pd.(*PD).RegisterForeign(shelf(nil), 0, size, 0, ib.AccessLocalWrite) // there is nothing behind it
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { mr.Close() })
			return []ib.SGE{{Length: ib.MaxMessage + 1, LKey: mr.LKey()}}
		}
		to, from := long(b), long(a)
		for _, list := range [][]ib.SGE{to, {{Length: 1 << 30, LKey: to[0].LKey}, {Length: ib.MaxMessage - 1<<30 + 1, LKey: to[0].LKey}}} {
			if n, err := b.q.PostRecv([]ib.RecvWR{{ID: 1, SGEs: b.sge(0, 64)}, {ID: 2, SGEs: list}}); n != 1 || !errors.Is(err, driver.ErrInvalidWR) {
				t.Errorf("%d are posted: %v", n, err)
			}
			a.send(ib.SendWR{ID: 3, Opcode: ib.OpSend, SGEs: a.sge(0, 10)})
			if wc := b.poll(); wc.ID != 1 || wc.Status != ib.WCSuccess {
				t.Errorf("the receive in front of it: %+v", wc)
			}
		}
		a.send(ib.SendWR{ID: 4, Opcode: ib.OpRDMAWrite, SGEs: from, RemoteAddr: addrOf(b.buf), RKey: b.mr.RKey()})
		if wc := a.poll(); wc.ID != 4 || wc.Status != ib.WCLocalLengthErr {
			t.Errorf("sent: %+v", wc)
		}
	})
}

func BenchmarkPostPoll(b *testing.B) {
	for _, op := range []ib.Opcode{ib.OpRDMAWrite, ib.OpRDMARead} {
		b.Run(op.String(), func(b *testing.B) {
			na, nb := openNIC(b, true), openNIC(b, true)
			x, y := newEnd(b, na, endConfig{typ: ib.RC}), newEnd(b, nb, endConfig{typ: ib.RC})
			x.connect(y)
			y.connect(x)
			wr := []ib.SendWR{{ID: 1, Opcode: op, Flags: ib.SendSignaled, SGEs: x.sge(0, 8), RemoteAddr: addrOf(y.buf), RKey: y.mr.RKey()}}
			var wc [16]ib.WC
			x.send(wr[0])
			x.poll()
			b.ReportAllocs()
			for b.Loop() {
				x.q.PostSend(wr)
				for x.cq.Poll(wc[:]) == 0 {
				}
			}
		})
	}
}

// BenchmarkSend sends and receives on one thread: the sum of both sides' costs.
func BenchmarkSend(b *testing.B) {
	na, nb := openNIC(b, true), openNIC(b, true)
	x, y := newEnd(b, na, endConfig{typ: ib.RC}), newEnd(b, nb, endConfig{typ: ib.RC})
	x.connect(y)
	y.connect(x)
	wr := []ib.SendWR{{ID: 1, Opcode: ib.OpSend, Inline: make([]byte, 64)}}
	rr := []ib.RecvWR{{ID: 2, SGEs: y.sge(0, 64)}}
	y.recv(1, rr[0].SGEs)
	x.send(wr[0])
	y.poll()
	var wc [16]ib.WC
	b.ReportAllocs()
	for b.Loop() {
		y.q.PostRecv(rr)
		x.q.PostSend(wr)
		for y.cq.Poll(wc[:]) == 0 {
		}
	}
}
