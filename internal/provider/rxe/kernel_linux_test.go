package rxe

import (
	"cmp"
	"encoding/binary"
	"math/bits"
	"slices"
	"syscall"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/internal/uverbs/uverbstest"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The other side of the provider, played by the test: commands are answered as rxe does, and the queues are memory that the
// test reads and writes in the kernel's stead. Offsets are those of the kernel's headers, written out: package abi is part of
// what is tested.

var le = binary.LittleEndian

// littleEndian skips a test on other machines: offsets are the same there, bytes are not.
func littleEndian(t testing.TB) {
	t.Helper()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the bytes that are written out are little-endian")
	}
}

// A kring is a queue as the kernel sees it.
type kring struct {
	mem  []byte
	elem int
	mask uint32
}

const (
	producerAt = 128
	consumerAt = 256
	dataAt     = 384
)

func (r *kring) producer() uint32     { return le.Uint32(r.mem[producerAt:]) }
func (r *kring) consumer() uint32     { return le.Uint32(r.mem[consumerAt:]) }
func (r *kring) setProducer(v uint32) { le.PutUint32(r.mem[producerAt:], v) }
func (r *kring) setConsumer(v uint32) { le.PutUint32(r.mem[consumerAt:], v) }
func (r *kring) slot(i uint32) []byte { return r.mem[dataAt+r.elem*int(i&r.mask):][:r.elem] }
func (r *kring) posted() uint32       { return (r.producer() - r.consumer()) & r.mask }
func (r *kring) take() (e []byte) {
	e = r.slot(r.consumer())
	r.setConsumer((r.consumer() + 1) & r.mask)
	return e
}
func (r *kring) newest() (e []byte) { return r.slot(r.producer() - 1) }
func (r *kring) setGeometry(v ...int) {
	le.PutUint32(r.mem[0:], uint32(v[0]))
	le.PutUint32(r.mem[4:], uint32(v[1]))
}
func (r *kring) fill(b byte) {
	clear(r.mem[dataAt:])
	for i := range r.mem[dataAt:] {
		r.mem[dataAt+i] = b
	}
}

// complete adds a completion: id, status, opcode, length, and the number of the queue pair.
func (r *kring) complete(id uint64, status, opcode, n, qpn uint32) []byte {
	e := r.slot(r.producer())
	for i := range e {
		e[i] = 0
	}
	le.PutUint64(e[0:], id)
	le.PutUint32(e[8:], status)
	le.PutUint32(e[12:], opcode)
	le.PutUint32(e[20:], n)
	le.PutUint32(e[28:], qpn)
	r.setProducer((r.producer() + 1) & r.mask)
	return e
}

type fakeQP struct {
	sq, rq   *kring // rq is nil with an SRQ
	num      uint32
	state    byte
	qkey     uint32
	modified []byte // the states that MODIFY_QP has set
}

type fakeKernel struct {
	uverbstest.Kernel
	t      testing.TB
	cqs    map[uint32]*kring
	qps    map[uint32]*fakeQP
	srqs   map[uint32]*kring
	bells  int
	deform func(r *kring) // called with each new queue
	number uint32         // of the next queue pair; 0: as it comes
	capsEx uint64
	bell   func() // instead of all commands, for a benchmark
}

// newFake opens a device whose kernel is the test. Everything must be closed by the end of it.
func newFake(t testing.TB) (*fakeKernel, *rxeContext) {
	t.Helper()
	littleEndian(t)
	const driver = 14
	k := &fakeKernel{t: t, cqs: map[uint32]*kring{}, qps: map[uint32]*fakeQP{}, srqs: map[uint32]*kring{}, capsEx: 7 << 38}
	k.Init(t, driver)
	k.Own, k.Method = k.own, k.method
	c, err := uverbs.NewContext(uverbs.NewFile(k, "rxe9", driver), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		k.bell = nil
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return k, newContext(c)
}

// newRing makes a queue of at least n elements that can be told apart, of at least size bytes, and tells of it.
func (k *fakeKernel) newRing(n, size int, mminfo []byte) *kring {
	log2 := max(bits.Len(uint(size-1)), 6)
	slots := 1 << bits.Len(uint(n))
	mem, off := k.Share(dataAt + slots<<log2)
	r := &kring{mem, 1 << log2, uint32(slots - 1)}
	r.setGeometry(log2, slots-1)
	if k.deform != nil {
		k.deform(r)
	}
	le.PutUint64(mminfo, off)
	le.PutUint32(mminfo[8:], uint32(len(mem)))
	return r
}

// Ring answers prepared commands.
func (k *fakeKernel) Ring(cmd []byte) (int, syscall.Errno) {
	if k.bell != nil {
		k.bell()
		return len(cmd), 0
	}
	return k.Kernel.Ring(cmd)
}

func (k *fakeKernel) method(id uint32, attrs uverbstest.Attrs) syscall.Errno {
	if id != 0x00020000 { // QUERY_PORT
		return uverbstest.AsUsual
	}
	r := attrs[1].Data
	le.PutUint32(r[4:], 1<<31)
	le.PutUint32(r[16:], 1024)
	le.PutUint16(r[20:], 1)
	r[26], r[27], r[28], r[37] = 4, 5, 3, 2
	return 0
}

func (k *fakeKernel) own(c *uverbstest.Command) syscall.Errno {
	in, out, uhw := c.In, c.Out, c.DriverOut
	switch c.Number {
	case 28: // POST_SEND: the doorbell
		if qp := k.qps[le.Uint32(in[8:])]; qp == nil || le.Uint32(in[12:]) != 0 || le.Uint32(in[16:]) != 0 || le.Uint32(in[20:]) < 56 {
			k.t.Errorf("doorbell %x", in)
		}
		k.bells++
		return uverbstest.AsUsual
	case 0x80000001: // QUERY_DEVICE
		le.PutUint32(out[52:], 1000)
		le.PutUint32(out[56:], 1<<20)
		le.PutUint32(out[60:], 1<<24) // windows of type 2B
		le.PutUint32(out[64:], 32)
		le.PutUint32(out[76:], 32767)
		le.PutUint32(out[108:], 1)
		le.PutUint32(out[156:], 1000)
		out[171] = 1
		le.PutUint64(out[224:], k.capsEx)
	case 5: // CREATE_AH
		le.PutUint32(uhw, 77)
		return uverbstest.AsUsual
	case 18: // CREATE_CQ
		r := k.newRing(int(le.Uint32(in[16:])), 48, uhw)
		h := k.Handle("cq")
		k.cqs[h], k.Cookies[h] = r, le.Uint64(in[8:])
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], r.mask)
	case 19: // RESIZE_CQ
		old := k.cqs[le.Uint32(in[8:])]
		r := k.newRing(int(le.Uint32(in[12:])), 48, uhw)
		for old.posted() > 0 {
			e := old.take()
			copy(r.slot(r.producer()), e)
			r.setProducer(r.producer() + 1)
		}
		k.cqs[le.Uint32(in[8:])] = r
		le.PutUint32(out, r.mask)
	case 24: // CREATE_QP
		h := k.Handle("qp")
		q := &fakeQP{num: cmp.Or(k.number, 0x10+h)}
		size := max(16*int(le.Uint32(in[40:])), int(le.Uint32(in[48:])))
		q.sq = k.newRing(int(le.Uint32(in[32:])), 208+size, uhw[16:])
		if in[54] == 0 {
			q.rq = k.newRing(int(le.Uint32(in[36:])), 40+16*int(le.Uint32(in[44:])), uhw)
		}
		k.qps[h], k.Cookies[h] = q, le.Uint64(in[8:])
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], q.num)
		copy(out[8:], in[32:52])
		le.PutUint32(out[16:], uint32(size/16))
		le.PutUint32(out[24:], uint32(size))
	case 25: // QUERY_QP
		q := k.qps[le.Uint32(in[8:])]
		out[108], out[116] = q.state, 1
		le.PutUint32(out[84:], q.qkey)
	case 26: // MODIFY_QP
		q := k.qps[le.Uint32(in[64:])]
		mask := le.Uint32(in[68:])
		if mask&0x40 != 0 {
			q.qkey = le.Uint32(in[72:])
		}
		if mask&1 != 0 {
			q.state = in[96]
			q.modified = append(q.modified, q.state)
			if q.state == 0 { // RESET clears the queues' memory and its own indices, but not the process's
				clear(q.sq.mem[dataAt:])
			}
		}
	case 32: // CREATE_SRQ
		r := k.newRing(int(le.Uint32(in[20:])), 40+16*int(le.Uint32(in[24:])), uhw)
		h := k.Handle("srq")
		k.srqs[h], k.Cookies[h] = r, le.Uint64(in[8:])
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], r.mask)
		copy(out[8:12], in[24:28])
	default:
		return uverbstest.AsUsual
	}
	return 0
}

// A bench is a queue pair with its queues, and what it was made on.
type bench struct {
	t  testing.TB
	k  *fakeKernel
	c  *rxeContext
	pd *pd
	cq *cq
	qp *qp
	kq *fakeQP
}

func newBench(t testing.TB, typ ib.QPType, change ...func(*driver.QPConfig)) *bench {
	t.Helper()
	k, c := newFake(t)
	b := &bench{t: t, k: k, c: c}
	p, err := c.AllocPD()
	if err != nil {
		t.Fatal(err)
	}
	b.pd = p.(*pd)
	b.cq = b.newCQ(127)
	b.qp = b.newQP(typ, change...)
	b.kq = k.qps[b.qp.Handle]
	k.bells = 0 // RTS rings, too
	t.Cleanup(func() { b.close(b.qp, b.cq, b.pd) })
	return b
}

func (b *bench) close(list ...interface{ Close() error }) {
	b.t.Helper()
	for _, o := range list {
		if err := o.Close(); err != nil {
			b.t.Errorf("close %T: %v", o, err)
		}
	}
}

func (b *bench) newCQ(n int) *cq {
	b.t.Helper()
	q, err := b.c.CreateCQ(driver.CQConfig{Entries: n})
	if err != nil {
		b.t.Fatal(err)
	}
	return q.(*cq)
}

func (b *bench) newQP(typ ib.QPType, change ...func(*driver.QPConfig)) *qp {
	b.t.Helper()
	cfg := driver.QPConfig{Type: typ, SendCQ: b.cq, RecvCQ: b.cq, Cap: ib.QPCap{MaxSendWR: 31, MaxRecvWR: 31, MaxSendSGE: 4, MaxRecvSGE: 3, MaxInline: 64}}
	for _, f := range change {
		f(&cfg)
	}
	q, err := b.pd.CreateQP(cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	b.to(q.(*qp), ib.RTS)
	return q.(*qp)
}

func (b *bench) to(q *qp, s ib.QPState) {
	b.t.Helper()
	if err := q.Modify(b.t.Context(), &ib.QPAttr{State: s, QKey: 0x1234}, ib.AttrState|ib.AttrQKey); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) kcq() *kring { return b.k.cqs[b.cq.handle] }

func (b *bench) post(wrs ...ib.SendWR) {
	b.t.Helper()
	if n, err := b.qp.PostSend(wrs); n != len(wrs) || err != nil {
		b.t.Fatalf("%d of %d: %v", n, len(wrs), err)
	}
}

// A field is a number at an offset of an element.
type field struct {
	at, bytes int
	v         uint64
}

// element is n bytes with these fields, and zeros elsewhere.
func element(n int, fields []field) []byte {
	b := make([]byte, n)
	for _, f := range fields {
		var v [8]byte
		le.PutUint64(v[:], f.v)
		copy(b[f.at:], v[:f.bytes])
	}
	return b
}

func sameBytes(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if slices.Equal(got, want) {
		return
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("%s: byte %d is %#x, want %#x\n got %x\nwant %x", what, i, got[i], want[i], got, want)
			return
		}
	}
}
