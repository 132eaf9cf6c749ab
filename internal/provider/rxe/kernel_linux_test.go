package rxe

import (
	"cmp"
	"encoding/binary"
	"math/bits"
	"slices"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

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
	uverbstest.Objects
	mu       sync.Mutex
	t        testing.TB
	nextMap  uint64
	maps     map[uint64]*kring
	cqs      map[uint32]*kring
	qps      map[uint32]*fakeQP
	srqs     map[uint32]*kring
	commands []uint32 // of the write interface, in order, without doorbells
	bells    int
	errs     map[uint32]syscall.Errno // command -> what it ends with
	during   map[uint32]func()        // command -> called when it has come
	deform   func(r *kring)           // called with each new queue
	number   uint32                   // of the next queue pair; 0: as it comes
	capsEx   uint64
	bell     func() // instead of all commands, for a benchmark
}

// newFake opens a device whose kernel is the test. Everything must be closed by the end of it.
func newFake(t testing.TB) (*fakeKernel, *rxeContext) {
	t.Helper()
	littleEndian(t)
	k := &fakeKernel{t: t, maps: map[uint64]*kring{}, cqs: map[uint32]*kring{}, qps: map[uint32]*fakeQP{}, srqs: map[uint32]*kring{}, errs: map[uint32]syscall.Errno{}, during: map[uint32]func(){}, capsEx: 7 << 38}
	k.Init(t)
	c, err := uverbs.NewContext(uverbs.NewFile(k, "rxe9", 14), nil, nil)
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

// newRing makes a queue of at least n elements that can be told apart, of at least size bytes.
func (k *fakeKernel) newRing(n, size int) (*kring, uint64) {
	log2 := max(bits.Len(uint(size-1)), 6)
	slots := 1 << bits.Len(uint(n))
	total := (dataAt + slots<<log2 + 4095) &^ 4095
	mem, err := unix.Mmap(-1, 0, total, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		k.t.Fatal(err)
	}
	r := &kring{mem, 1 << log2, uint32(slots - 1)}
	r.setGeometry(log2, slots-1)
	if k.deform != nil {
		k.deform(r)
	}
	k.nextMap += 1 << 20
	k.maps[k.nextMap] = r
	return r, k.nextMap
}

func mminfo(at []byte, off uint64, r *kring) {
	le.PutUint64(at[0:], off)
	le.PutUint32(at[8:], uint32(len(r.mem)))
}

func (k *fakeKernel) Mmap(offset int64, n int) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	r := k.maps[uint64(offset)]
	if r == nil || n > len(r.mem) {
		return nil, unix.EINVAL
	}
	delete(k.maps, uint64(offset)) // each can be mapped once
	k.Mapped++
	return r.mem[:n], nil
}

// Munmap leaves the memory, for the test may look at it once more, but spoils it: the provider must not.
func (k *fakeKernel) Munmap(mem []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.Mapped--
	return unix.Mprotect(mem, unix.PROT_NONE)
}

func (k *fakeKernel) Close() error { return nil }

func (k *fakeKernel) Write([]byte) (int, syscall.Errno) { return 0, unix.ENOSYS }

// Ring answers prepared commands.
func (k *fakeKernel) Ring(cmd []byte) (int, syscall.Errno) {
	if k.bell != nil {
		k.bell()
		return len(cmd), 0
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if int(le.Uint16(cmd[4:]))*4 != len(cmd) {
		k.t.Errorf("a command of %d bytes, written in %d", le.Uint16(cmd[4:])*4, len(cmd))
	}
	return len(cmd), k.write(le.Uint32(cmd), cmd[8:], nil, nil)
}

// Ioctl answers the methods that the provider uses.
func (k *fakeKernel) Ioctl(cmd []byte, addr uint64) syscall.Errno {
	k.mu.Lock()
	defer k.mu.Unlock()
	object, method := le.Uint16(cmd[2:]), le.Uint16(cmd[4:])
	var attrs [8]struct {
		data []byte // in the buffer
		v    []byte // the 8 bytes of the attribute
	}
	for i := range int(le.Uint16(cmd[6:])) {
		a := cmd[24+16*i:][:16]
		id, n := le.Uint16(a[0:]), int(le.Uint16(a[2:]))
		switch id {
		case 0x1000:
			id = 6
		case 0x1001:
			id = 7
		}
		attrs[id].v = a[8:]
		if at := le.Uint64(a[8:]) - addr; n > 0 && at < uint64(len(cmd)) {
			attrs[id].data = cmd[at:][:n]
		} else {
			attrs[id].data = a[8:][:n]
		}
	}
	const device, asyncEvent = 0, 16
	switch {
	case object == device && method == 0: // INVOKE_WRITE
		return k.write(uint32(le.Uint64(attrs[2].v)), attrs[0].data, attrs[1].data, attrs[7].data)
	case object == device && method == 2: // QUERY_PORT
		r := attrs[1].data
		le.PutUint32(r[4:], 1<<31)
		le.PutUint32(r[16:], 1024)
		le.PutUint16(r[20:], 1)
		r[26], r[27], r[28], r[37] = 4, 5, 3, 2
	case object == device && method == 3: // GET_CONTEXT
		le.PutUint32(attrs[0].data, 1)
		le.PutUint64(attrs[1].data, 1)
	case object == asyncEvent && method == 0:
		le.PutUint64(attrs[0].v, uint64(k.Async[0]))
	default:
		k.t.Errorf("unexpected method %d of object %d", method, object)
		return unix.EPROTONOSUPPORT
	}
	return 0
}

func (k *fakeKernel) write(cmd uint32, in, out, uhw []byte) syscall.Errno {
	if cmd == 28 { // POST_SEND: the doorbell
		if qp := k.qps[le.Uint32(in[8:])]; qp == nil || le.Uint32(in[12:]) != 0 || le.Uint32(in[16:]) != 0 || le.Uint32(in[20:]) < 56 {
			k.t.Errorf("doorbell %x", in)
		}
		k.bells++
		return k.errs[cmd]
	}
	k.commands = append(k.commands, cmd)
	if f := k.during[cmd]; f != nil {
		k.mu.Unlock()
		f()
		k.mu.Lock()
	}
	if e := k.errs[cmd]; e != 0 {
		return e
	}
	switch cmd {
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
	case 3:
		le.PutUint32(out, k.Handle("pd"))
	case 4:
		return k.Destroy(le.Uint32(in), "pd")
	case 5: // CREATE_AH
		le.PutUint32(out, k.Handle("ah"))
		le.PutUint32(uhw, 77)
	case 8:
		return k.Destroy(le.Uint32(in), "ah")
	case 9: // REG_MR
		h := k.Handle("mr")
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], h<<8|1)
		le.PutUint32(out[8:], h<<8|1)
	case 13:
		return k.Destroy(le.Uint32(in), "mr")
	case 14: // ALLOC_MW
		h := k.Handle("mw")
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], h<<8|0x20)
	case 16:
		return k.Destroy(le.Uint32(in), "mw")
	case 18: // CREATE_CQ
		r, off := k.newRing(int(le.Uint32(in[16:])), 48)
		h := k.Handle("cq")
		k.cqs[h], k.Cookies[h] = r, le.Uint64(in[8:])
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], r.mask)
		mminfo(uhw, off, r)
	case 19: // RESIZE_CQ
		old := k.cqs[le.Uint32(in[8:])]
		r, off := k.newRing(int(le.Uint32(in[12:])), 48)
		for old.posted() > 0 {
			e := old.take()
			copy(r.slot(r.producer()), e)
			r.setProducer(r.producer() + 1)
		}
		k.cqs[le.Uint32(in[8:])] = r
		le.PutUint32(out, r.mask)
		mminfo(uhw, off, r)
	case 20:
		return k.Destroy(le.Uint32(in[8:]), "cq")
	case 23: // REQ_NOTIFY_CQ
	case 24: // CREATE_QP
		h := k.Handle("qp")
		q := &fakeQP{num: cmp.Or(k.number, 0x10+h)}
		size := max(16*int(le.Uint32(in[40:])), int(le.Uint32(in[48:])))
		var sqAt, rqAt uint64
		q.sq, sqAt = k.newRing(int(le.Uint32(in[32:])), 208+size)
		mminfo(uhw[16:], sqAt, q.sq)
		if in[54] == 0 {
			q.rq, rqAt = k.newRing(int(le.Uint32(in[36:])), 40+16*int(le.Uint32(in[44:])))
			mminfo(uhw[0:], rqAt, q.rq)
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
	case 27:
		return k.Destroy(le.Uint32(in[8:]), "qp")
	case 32: // CREATE_SRQ
		r, off := k.newRing(int(le.Uint32(in[20:])), 40+16*int(le.Uint32(in[24:])))
		h := k.Handle("srq")
		k.srqs[h], k.Cookies[h] = r, le.Uint64(in[8:])
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], r.mask)
		copy(out[8:12], in[24:28])
		mminfo(uhw, off, r)
	case 33: // MODIFY_SRQ
	case 34:
		le.PutUint32(out[8:], 5)
	case 35:
		return k.Destroy(le.Uint32(in[8:]), "srq")
	default:
		k.t.Errorf("unexpected command %d", cmd)
		return unix.ENOSYS
	}
	return 0
}

func (k *fakeKernel) count(cmd uint32) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := 0
	for _, c := range k.commands {
		if c == cmd {
			n++
		}
	}
	return n
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
