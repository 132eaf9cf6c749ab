package qp_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// must returns v, or ends the test.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// node is one end of a connection on the software NIC.
type node struct {
	pd  *verbs.PD
	cq  *verbs.CQ
	mem *mr.MR // all local rights and all remote ones
	gid ib.GID
}

// nodes opens soft0 twice.
func nodes(t testing.TB) (a, b *node) {
	t.Helper()
	one := func() *node {
		ctx, err := verbs.Open("soft0")
		if err != nil {
			t.Fatal(err)
		}
		n := &node{pd: must(ctx.AllocPD()), cq: must(ctx.NewCQ(verbs.CQConfig{})), gid: must(ctx.GID(1, 0))}
		n.mem = must(mr.Alloc(n.pd, 1<<16, ib.AccessLocalWrite|ib.AccessRemote|ib.AccessMWBind))
		t.Cleanup(func() {
			for _, f := range []func() error{n.mem.Close, n.cq.Close, n.pd.Close, ctx.Close} {
				if err := f(); err != nil {
					t.Error(err)
				}
			}
		})
		return n
	}
	return one(), one()
}

func (n *node) qp(t testing.TB, cfg qp.Config) *qp.QP {
	t.Helper()
	cfg.SendCQ = n.cq
	q := must(qp.New(n.pd, &cfg))
	t.Cleanup(func() {
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	})
	return q
}

// connect brings two queue pairs to RTS.
func connect(t testing.TB, a, b *node, qa, qb *qp.QP, p qp.ConnectParams) {
	t.Helper()
	psnA, psnB := qp.RandomPSN(), qp.RandomPSN()
	ctx := t.Context()
	for _, q := range []*qp.QP{qa, qb} {
		if err := q.Init(ctx, 1, ib.AccessRemote); err != nil {
			t.Fatal(err)
		}
	}
	p.LocalPSN, p.Remote = psnA, qp.Endpoint{GID: b.gid, QPN: qb.QPN(), PSN: psnB}
	if err := qa.Connect(ctx, p); err != nil {
		t.Fatal(err)
	}
	p.LocalPSN, p.Remote = psnB, qp.Endpoint{GID: a.gid, QPN: qa.QPN(), PSN: psnA}
	if err := qb.Connect(ctx, p); err != nil {
		t.Fatal(err)
	}
}

// wait polls for n completions.
func (n *node) wait(t testing.TB, want int) []ib.WC {
	t.Helper()
	var all []ib.WC
	wcs := make([]ib.WC, 16)
	testutil.Eventually(t, fmt.Sprintf("%d completions arrived", want), func() bool {
		k, err := n.cq.Poll(wcs[:min(want-len(all), 16)])
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, wcs[:k]...)
		n.cq.Context().Progress()
		return len(all) == want
	})
	return all
}

func send(t testing.TB, q *qp.QP, wrs ...ib.SendWR) {
	t.Helper()
	if n, err := q.PostSend(wrs); n != len(wrs) || err != nil {
		t.Fatal(n, err)
	}
}

func recv(t testing.TB, q *qp.QP, wrs ...ib.RecvWR) {
	t.Helper()
	if n, err := q.PostRecv(wrs); n != len(wrs) || err != nil {
		t.Fatal(n, err)
	}
}

func TestSoftSendAndOneSided(t *testing.T) {
	for _, typ := range []ib.QPType{ib.RC, ib.UC} {
		t.Run(typ.String(), func(t *testing.T) {
			a, b := nodes(t)
			qa, qb := a.qp(t, qp.Config{Type: typ, SignalAll: true}), b.qp(t, qp.Config{Type: typ})
			connect(t, a, b, qa, qb, qp.ConnectParams{})
			if qa.Path() == "" || qa.State() != ib.RTS {
				t.Error(qa.Path(), qa.State())
			}
			recv(t, qb, ib.RecvWR{ID: 1, SGEs: []ib.SGE{b.mem.SGE(0, 64)}})
			copy(a.mem.Bytes(), "over there")
			send(t, qa, ib.SendWR{ID: 2, Opcode: ib.OpSendWithImm, Imm: 42, SGEs: []ib.SGE{a.mem.SGE(0, 10)}},
				ib.SendWR{ID: 3, Opcode: ib.OpRDMAWrite, SGEs: []ib.SGE{a.mem.SGE(0, 4)}, RemoteAddr: b.mem.Addr() + 100, RKey: b.mem.RKey()})
			for i, wc := range a.wait(t, 2) {
				if wc.Status != ib.WCSuccess || wc.ID != uint64(2+i) || wc.QPN != qa.QPN() {
					t.Errorf("%+v", wc)
				}
			}
			wc := b.wait(t, 1)[0]
			if wc.Status != ib.WCSuccess || wc.ID != 1 || wc.ByteLen != 10 || wc.Imm != 42 || string(b.mem.Bytes()[:10]) != "over there" {
				t.Errorf("%+v", wc)
			}
			if s := string(b.mem.Bytes()[100:104]); s != "over" {
				t.Errorf("wrote %q", s)
			}
			attr := must(qb.Query())
			if attr.DestQPN != qa.QPN() || attr.Port != 1 || attr.AH.DGID != a.gid {
				t.Errorf("%+v", attr)
			}
		})
	}
}

func TestSoftDatagram(t *testing.T) {
	a, b := nodes(t)
	qa, qb := a.qp(t, qp.Config{Type: ib.UD, SignalAll: true}), b.qp(t, qp.Config{Type: ib.UD})
	if err := errors.Join(qa.ActivateUD(t.Context(), 1, 7, 1), qb.ActivateUD(t.Context(), 1, 8, 2)); err != nil {
		t.Fatal(err)
	}
	ah := must(a.pd.NewAH(ib.AHAttr{DGID: b.gid, Port: 1}))
	defer ah.Close()
	recv(t, qb, ib.RecvWR{ID: 1, SGEs: []ib.SGE{b.mem.SGE(0, 100)}})
	send(t, qa, ib.SendWR{Opcode: ib.OpSend, Inline: []byte("hello"), AH: ah.Num(), RemoteQPN: qb.QPN(), RemoteQKey: 8})
	if wc := a.wait(t, 1)[0]; wc.Status != ib.WCSuccess {
		t.Error(wc.Status)
	}
	wc := b.wait(t, 1)[0]
	if wc.Status != ib.WCSuccess || wc.ByteLen != ib.GRHLen+5 || wc.SrcQPN != qa.QPN() || string(b.mem.Bytes()[ib.GRHLen:][:5]) != "hello" {
		t.Errorf("%+v", wc)
	}
}

func TestSoftSharedReceiveQueue(t *testing.T) {
	a, b := nodes(t)
	srq := must(qp.NewSRQ(b.pd, qp.SRQConfig{Depth: 16}))
	defer srq.Close()
	const pairs = 3
	var qas []*qp.QP
	for range pairs {
		qa, qb := a.qp(t, qp.Config{SignalAll: true}), must(qp.New(b.pd, &qp.Config{SendCQ: b.cq, SRQ: srq}))
		defer qb.Close()
		connect(t, a, b, qa, qb, qp.ConnectParams{})
		if _, err := qb.PostRecv(make([]ib.RecvWR, 1)); !errors.Is(err, verbs.ErrInvalidWR) {
			t.Error(err)
		}
		qas = append(qas, qa)
	}
	for i := range pairs + 1 {
		if n, err := srq.PostRecv([]ib.RecvWR{{ID: uint64(i), SGEs: []ib.SGE{b.mem.SGE(64*i, 64)}}}); n != 1 || err != nil {
			t.Fatal(err)
		}
	}
	if err := srq.SetLimit(2); err != nil {
		t.Fatal(err)
	}
	for _, qa := range qas {
		send(t, qa, ib.SendWR{Opcode: ib.OpSend, Inline: []byte("x")})
		a.wait(t, 1)
	}
	b.wait(t, pairs)
	e, err := b.pd.Context().AsyncEvent(t.Context())
	if err != nil || e.Type != ib.EventSRQLimit || e.Object != srq {
		t.Error(e, err)
	}
	if srq.Limit() != 0 {
		t.Errorf("the limit fires once, but is still %d", srq.Limit())
	}
}

// Fail flushes what is outstanding, in order; Reset makes the queue pair as new.
func TestSoftFlushAndReset(t *testing.T) {
	a, b := nodes(t)
	qa, qb := a.qp(t, qp.Config{}), b.qp(t, qp.Config{})
	for range 2 {
		connect(t, a, b, qa, qb, qp.ConnectParams{})
		recv(t, qa, ib.RecvWR{ID: 1, SGEs: []ib.SGE{a.mem.SGE(0, 1)}}, ib.RecvWR{ID: 2, SGEs: []ib.SGE{a.mem.SGE(0, 1)}})
		if err := qa.Fail(t.Context()); err != nil {
			t.Fatal(err)
		}
		send(t, qa, ib.SendWR{ID: 3, Opcode: ib.OpSend})
		var recvs []uint64
		for _, wc := range a.wait(t, 3) {
			if err := verbs.CheckWC("flushed", &wc); !errors.Is(err, ib.WCFlushErr) {
				t.Errorf("%+v", wc)
			}
			if wc.ID != 3 {
				recvs = append(recvs, wc.ID)
			}
		}
		if len(recvs) != 2 || recvs[0] != 1 || recvs[1] != 2 {
			t.Errorf("receives flushed in the order %v", recvs)
		}
		if err := errors.Join(qa.Reset(t.Context()), qb.Reset(t.Context())); err != nil {
			t.Fatal(err)
		}
		if qa.State() != ib.Reset {
			t.Error(qa.State())
		}
	}
}

// News of an error does not reach a connection that was made after it.
func TestSoftReconnectAfterFault(t *testing.T) {
	a, b := nodes(t)
	qa, qb := a.qp(t, qp.Config{SignalAll: true}), b.qp(t, qp.Config{})
	for range 200 {
		connect(t, a, b, qa, qb, qp.ConnectParams{})
		send(t, qa, ib.SendWR{Opcode: ib.OpRDMARead, SGEs: []ib.SGE{a.mem.SGE(0, 8)}, RemoteAddr: b.mem.Addr(), RKey: b.mem.RKey() + 1})
		wc := a.wait(t, 1)[0]
		if err := verbs.CheckWC("read", &wc); !errors.Is(err, ib.WCRemoteAccessErr) {
			t.Fatal(err)
		}
		if err := errors.Join(qa.Reset(t.Context()), qb.Reset(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSoftStates(t *testing.T) {
	a, _ := nodes(t)
	q := a.qp(t, qp.Config{})
	if n, err := q.PostSend([]ib.SendWR{{Opcode: ib.OpSend}}); n != 0 || !errors.Is(err, verbs.ErrState) {
		t.Errorf("sent in Reset: %v", err)
	}
	if n, err := q.PostRecv([]ib.RecvWR{{}}); n != 0 || !errors.Is(err, verbs.ErrState) {
		t.Errorf("received in Reset: %v", err)
	}
	var se *qp.StateError
	if err := q.Modify(t.Context(), &ib.QPAttr{State: ib.RTS}, ib.AttrState); !errors.As(err, &se) || se.From != ib.Reset {
		t.Error(err)
	}
	if err := q.Init(t.Context(), 99, 0); err == nil || errors.As(err, &se) {
		t.Errorf("port 99: %v", err)
	}
	if err := q.Init(t.Context(), 1, 0); err != nil {
		t.Fatal(err)
	}
	err := q.Connect(t.Context(), qp.ConnectParams{Remote: qp.Endpoint{GID: ib.GID{1, 2, 3}, QPN: 4}})
	if !errors.Is(err, verbs.ErrUnreachable) || !strings.Contains(err.Error(), "soft0") {
		t.Errorf("connected to nobody: %v", err)
	}
	if s := q.State(); s != ib.Init {
		t.Errorf("a Connect that failed leaves %s", s)
	}
}

func TestSoftPostingDoesNotAllocate(t *testing.T) {
	a, b := nodes(t)
	qa, qb := a.qp(t, qp.Config{}), b.qp(t, qp.Config{})
	connect(t, a, b, qa, qb, qp.ConnectParams{})
	rwr := []ib.RecvWR{{SGEs: []ib.SGE{b.mem.SGE(0, 64)}}}
	swr := []ib.SendWR{{Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: []ib.SGE{a.mem.SGE(0, 64)}}}
	wcs := make([]ib.WC, 4)
	if n := testing.AllocsPerRun(200, func() {
		qb.PostRecv(rwr)
		qa.PostSend(swr)
		for got := 0; got < 2; {
			n, _ := a.cq.Poll(wcs)
			m, _ := b.cq.Poll(wcs)
			got += n + m
		}
	}); n != 0 {
		t.Errorf("%v allocations for a message", n)
	}
}

// Two queue pairs of one process, connected to each other: a message, and what the receiver sees of it.
func Example() {
	ctx := context.Background()
	dev, err := verbs.Open("soft0")
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Close()
	pd := must(dev.AllocPD())
	defer pd.Close()
	cq := must(dev.NewCQ(verbs.CQConfig{}))
	defer cq.Close()
	buf := must(mr.Alloc(pd, 4096, ib.AccessLocalWrite))
	defer buf.Close()
	gid := must(dev.GID(1, 0))

	a := must(qp.New(pd, &qp.Config{SendCQ: cq}))
	defer a.Close()
	b := must(qp.New(pd, &qp.Config{SendCQ: cq}))
	defer b.Close()
	for _, q := range []struct{ self, peer *qp.QP }{{a, b}, {b, a}} {
		if err := q.self.Init(ctx, 1, 0); err != nil {
			log.Fatal(err)
		}
		defer q.self.Fail(ctx)
	}
	for _, q := range []struct{ self, peer *qp.QP }{{a, b}, {b, a}} {
		// Between processes the Endpoint travels over a socket, and the PSNs are qp.RandomPSN.
		if err := q.self.Connect(ctx, qp.ConnectParams{Remote: qp.Endpoint{GID: gid, QPN: q.peer.QPN(), PSN: 1}, LocalPSN: 1}); err != nil {
			log.Fatal(err)
		}
	}

	if _, err := b.PostRecv([]ib.RecvWR{{ID: 1, SGEs: []ib.SGE{buf.SGE(0, 64)}}}); err != nil {
		log.Fatal(err)
	}
	if _, err := a.PostSend([]ib.SendWR{{Opcode: ib.OpSend, Inline: []byte("hello, verbs")}}); err != nil {
		log.Fatal(err)
	}
	wcs := make([]ib.WC, 1)
	for n := 0; n == 0; {
		if n, err = cq.Poll(wcs); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Printf("%s of %d bytes: %s\n", wcs[0].Opcode, wcs[0].ByteLen, buf.Bytes()[:wcs[0].ByteLen])
	// Output: RECV of 12 bytes: hello, verbs
}
