package siw

import (
	"context"
	"encoding/binary"
	"math/bits"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/internal/uverbs/uverbstest"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// The other side of the provider, played by the test: commands are answered as siw does, and the queues are memory that the
// test reads and writes in the kernel's stead. Offsets are those of the kernel's headers, written out: package abi is part of
// what is tested.

var le = binary.LittleEndian

// A kqueue is a queue as the kernel sees it.
type kqueue struct {
	mem  []byte
	elem int
	n    uint64
	get  uint64 // the kernel's position: of a CQ, where it puts the next
}

func (q *kqueue) slot(i uint64) []byte { return q.mem[int(i&(q.n-1))*q.elem:][:q.elem] }
func (q *kqueue) control() []byte      { return q.mem[int(q.n)*q.elem:][:4] }

// flagsAt is where the flags of all elements are.
const flagsAt = 8

// take takes the next element of a send or receive queue as the kernel does: it copies it, and clears its flags, 16 bits of them.
func (q *kqueue) take() []byte {
	s := q.slot(q.get)
	if le.Uint16(s[flagsAt:])&1 == 0 {
		return nil
	}
	e := append([]byte(nil), s...)
	le.PutUint16(s[flagsAt:], 0)
	q.get++
	return e
}

// complete puts a completion, and reports whether there was room. opcode 8 is a receive's.
func (q *kqueue) complete(id uint64, opcode byte, status uint16, n, qpn uint32) bool {
	s := q.slot(q.get)
	if s[flagsAt] != 0 {
		return false
	}
	le.PutUint64(s[0:], id)
	s[9] = opcode
	le.PutUint16(s[10:], status)
	le.PutUint32(s[12:], n)
	le.PutUint64(s[24:], uint64(qpn))
	s[flagsAt] = 1
	q.get++
	return true
}

type fakeQP struct {
	sq, rq *kqueue // rq is nil with an SRQ
	num    uint32
	ord    byte
	states []byte // that MODIFY_QP has set
	access uint32
}

type fakeKernel struct {
	uverbstest.Kernel
	t     testing.TB
	qpns  map[uint32]bool // in use
	cqs   map[uint32]*kqueue
	qps   map[uint32]*fakeQP
	srqs  map[uint32]*kqueue
	bells int
	onErr func(*fakeQP) // when a queue pair is moved to Err: the kernel flushes
	limit uint32
	state byte // that QUERY_QP answers with
}

// newFake opens a device whose kernel is the test. Everything must be closed by the end of it.
func newFake(t testing.TB) (*fakeKernel, *siwContext) {
	t.Helper()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the bytes that are written out are little-endian")
	}
	const driver = 18
	k := &fakeKernel{t: t, qpns: map[uint32]bool{}, cqs: map[uint32]*kqueue{}, qps: map[uint32]*fakeQP{}, srqs: map[uint32]*kqueue{}}
	k.Init(t, driver)
	k.Own, k.Method, k.Offset = k.own, k.method, 0x8f000 // one of the next is SIW_INVAL_UOBJ_KEY
	c, err := uverbs.NewContext(uverbs.NewFile(k, "siw9", driver), nil, make([]byte, 8))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return k, newContext(c)
}

// newQueue makes a queue, and returns where it can be mapped.
func (k *fakeKernel) newQueue(want, elem, tail int) (*kqueue, uint64) {
	n := 1 << bits.Len(uint(want-1))
	mem, at := k.Share(n*elem + tail)
	return &kqueue{mem: mem, elem: elem, n: uint64(n)}, at
}

func (k *fakeKernel) method(id uint32, attrs uverbstest.Attrs) syscall.Errno {
	switch id {
	case 0x00020000: // QUERY_PORT
		r := attrs[1].Data
		r[26], r[27], r[28], r[37] = 4, 5, 3, 2
		le.PutUint32(r[4:], 1<<32-1)
		le.PutUint32(r[16:], 1)
		return 0
	case 0x00030000: // GET_CONTEXT
		if len(attrs[uverbstest.DriverOut].Data) != 8 {
			return unix.EINVAL
		}
	}
	return uverbstest.AsUsual
}

func (k *fakeKernel) own(c *uverbstest.Command) syscall.Errno {
	in, out, uhw := c.In, c.Out, c.DriverOut
	switch c.Number {
	case 28: // POST_SEND: the doorbell
		if qp := k.qps[le.Uint32(in[8:])]; qp == nil || le.Uint32(in[12:]) != 0 {
			k.t.Errorf("doorbell %x", in)
		}
		k.bells++
		return uverbstest.AsUsual
	case 0x80000001: // QUERY_DEVICE
		le.PutUint32(out[156:], 1000) // max_srq
		out[171] = 1
	case 9: // REG_MR
		if len(c.DriverIn) != 8 || len(uhw) != 8 {
			return unix.EINVAL
		}
		h := k.Handle("mr")
		stag := h<<8 | uint32(c.DriverIn[0])
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], stag)
		le.PutUint32(out[8:], stag)
		le.PutUint32(uhw, stag)
	case 18: // CREATE_CQ
		q, at := k.newQueue(int(le.Uint32(in[16:])), 32, 8)
		h := k.Handle("cq")
		k.cqs[h], k.Cookies[h] = q, le.Uint64(in[8:])
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], le.Uint32(in[16:]))
		le.PutUint32(uhw[4:], uint32(q.n))
		le.PutUint64(uhw[8:], at)
	case 24: // CREATE_QP
		h := k.Handle("qp")
		q := &fakeQP{num: 1, ord: 16}
		for k.qpns[q.num] {
			q.num++ // the lowest that is free
		}
		k.qpns[q.num] = true
		var at uint64
		q.sq, at = k.newQueue(int(le.Uint32(in[32:])), 120, 0)
		le.PutUint32(uhw[0:], q.num)
		le.PutUint32(uhw[4:], uint32(q.sq.n))
		le.PutUint64(uhw[16:], at)
		if in[54] == 0 {
			q.rq, at = k.newQueue(int(le.Uint32(in[36:])), 112, 0)
			le.PutUint32(uhw[8:], uint32(q.rq.n))
			le.PutUint64(uhw[24:], at)
		}
		k.qps[h], k.Cookies[h] = q, le.Uint64(in[8:])
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], q.num)
		copy(out[8:28], in[32:52])
	case 25: // QUERY_QP: a state of whomever, and the two depths the wrong way around
		q := k.qps[le.Uint32(in[8:])]
		out[108], out[113], out[114] = k.state, 1, q.ord
	case 26: // MODIFY_QP
		q := k.qps[le.Uint32(in[64:])]
		mask := le.Uint32(in[68:])
		if mask&8 != 0 {
			q.access = le.Uint32(in[88:])
		}
		if mask&1 != 0 {
			q.states = append(q.states, in[96])
			if in[96] == 6 && k.onErr != nil {
				k.onErr(q)
			}
		}
	case 27:
		delete(k.qpns, k.qps[le.Uint32(in[8:])].num)
		return uverbstest.AsUsual
	case 32: // CREATE_SRQ
		q, at := k.newQueue(int(le.Uint32(in[20:])), 112, 0)
		h := k.Handle("srq")
		k.srqs[h], k.Cookies[h] = q, le.Uint64(in[8:])
		le.PutUint32(out[0:], h)
		copy(out[4:], in[20:28])
		le.PutUint32(uhw[0:], uint32(q.n))
		le.PutUint64(uhw[8:], at)
	case 33: // MODIFY_SRQ
		k.limit = le.Uint32(in[12:])
	default:
		return uverbstest.AsUsual
	}
	return 0
}

// A bench is a queue pair with its queues on both sides.
type bench struct {
	t        testing.TB
	k        *fakeKernel
	c        *siwContext
	pd       driver.PD
	scq, rcq *cq
	srq      *srq
	q        *qp
	kq       *fakeQP
	ks, kr   *kqueue // the completion queues
	channel  driver.CompChannel
}

type benchOpts struct {
	depth, entries int
	srq, sigAll    bool
	oneCQ          bool
	channel        bool
}

func newBench(t testing.TB, o benchOpts) *bench {
	t.Helper()
	k, c := newFake(t)
	b := &bench{t: t, k: k, c: c}
	if o.depth == 0 {
		o.depth = 8
	}
	if o.entries == 0 {
		o.entries = 16
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	b.pd, err = c.AllocPD()
	must(err)
	t.Cleanup(func() { must(b.pd.Close()) })
	if o.channel {
		b.channel, err = c.CreateCompChannel()
		must(err)
		t.Cleanup(func() { must(b.channel.Close()) })
	}
	newCQ := func() *cq {
		q, err := c.CreateCQ(driver.CQConfig{Entries: o.entries, Channel: b.channel})
		must(err)
		t.Cleanup(func() { must(q.Close()) })
		return q.(*cq)
	}
	b.scq = newCQ()
	if b.rcq = b.scq; !o.oneCQ {
		b.rcq = newCQ()
	}
	b.ks, b.kr = k.cqs[b.scq.handle], k.cqs[b.rcq.handle]
	cfg := driver.QPConfig{Type: ib.RC, SendCQ: b.scq, RecvCQ: b.rcq, SignalAll: o.sigAll, Cap: ib.QPCap{MaxSendWR: o.depth, MaxSendSGE: 4}}
	if o.srq {
		s, err := b.pd.(driver.SRQCreator).CreateSRQ(driver.SRQConfig{MaxWR: o.depth, MaxSGE: 2})
		must(err)
		t.Cleanup(func() { must(s.Close()) })
		b.srq, cfg.SRQ = s.(*srq), s
	} else {
		cfg.Cap.MaxRecvWR, cfg.Cap.MaxRecvSGE = o.depth, 2
	}
	q, err := b.pd.CreateQP(cfg)
	must(err)
	b.q = q.(*qp)
	b.kq = k.qps[b.q.Handle]
	t.Cleanup(func() { must(q.Close()) })
	must(q.Modify(context.Background(), &ib.QPAttr{State: ib.Init, Port: 1, Access: ib.AccessRemoteWrite}, ib.AttrState|ib.AttrPort|ib.AttrPKeyIndex|ib.AttrAccess))
	return b
}

// connected is a bench whose queue pair the connection manager has moved to RTS.
func connected(t testing.TB, o benchOpts) *bench {
	t.Helper()
	b := newBench(t, o)
	b.q.Moved(ib.RTS)
	return b
}

func (b *bench) post(wrs ...ib.SendWR) {
	b.t.Helper()
	if n, err := b.q.PostSend(wrs); n != len(wrs) || err != nil {
		b.t.Fatalf("%d of %d accepted: %v", n, len(wrs), err)
	}
}

// poll returns what Poll gives.
func (b *bench) poll(q *cq) []ib.WC {
	b.t.Helper()
	wcs := make([]ib.WC, 64)
	n := q.Poll(wcs)
	if n < 0 {
		b.t.Fatalf("Poll: %v", q.Err())
	}
	return wcs[:n]
}

// sent takes the next send element and completes it, if it is to be.
func (b *bench) sent(status uint16) []byte {
	b.t.Helper()
	e := b.kq.sq.take()
	if e == nil {
		b.t.Fatal("nothing is in the send queue")
	}
	if e[flagsAt]&4 != 0 || status != 0 {
		b.complete(e, status)
	}
	return e
}

func (b *bench) complete(e []byte, status uint16) {
	b.t.Helper()
	if !b.ks.complete(le.Uint64(e), e[11], status, le.Uint32(e[32:]), b.kq.num) {
		b.t.Fatal("the completion queue has overrun")
	}
}
