package siw

import (
	"context"
	"encoding/binary"
	"math/bits"
	"sync"
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
	uverbstest.Objects
	t       testing.TB
	mu      sync.Mutex
	nextMap uint64
	qpns    map[uint32]bool // in use
	maps    map[uint64]*kqueue
	cqs     map[uint32]*kqueue
	qps     map[uint32]*fakeQP
	srqs    map[uint32]*kqueue
	bells   int
	bellErr syscall.Errno
	deform  func(cmd uint32, uhw []byte) // changes what is answered to a creation
	onErr   func(*fakeQP)                // when a queue pair is moved to Err: the kernel flushes
	limit   uint32
	state   byte // that QUERY_QP answers with
	channel int  // where completion events are written
}

// newFake opens a device whose kernel is the test. Everything must be closed by the end of it.
func newFake(t testing.TB) (*fakeKernel, *siwContext) {
	t.Helper()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the bytes that are written out are little-endian")
	}
	k := &fakeKernel{t: t, nextMap: 0x8f000, qpns: map[uint32]bool{}, maps: map[uint64]*kqueue{}, cqs: map[uint32]*kqueue{}, qps: map[uint32]*fakeQP{},
		srqs: map[uint32]*kqueue{}}
	k.Init(t)
	c, err := uverbs.NewContext(uverbs.NewFile(k, "siw9", 18), nil, make([]byte, 8))
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

// newQueue makes a queue; each is mapped at a key of its own, one of which is SIW_INVAL_UOBJ_KEY.
func (k *fakeKernel) newQueue(want, elem, tail int) (*kqueue, uint64) {
	n := 1 << bits.Len(uint(want-1))
	mem, err := unix.Mmap(-1, 0, (n*elem+tail+4095)&^4095, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		k.t.Fatal(err)
	}
	q := &kqueue{mem: mem, elem: elem, n: uint64(n)}
	k.nextMap += 0x1000
	k.maps[k.nextMap] = q
	return q, k.nextMap
}

func (k *fakeKernel) Mmap(offset int64, n int) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	q := k.maps[uint64(offset)]
	if q == nil || n > len(q.mem) {
		return nil, unix.EINVAL
	}
	delete(k.maps, uint64(offset))
	k.Mapped++
	return q.mem[:n], nil
}

// Munmap leaves the memory to the test, but spoils it for the provider.
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
	k.mu.Lock()
	defer k.mu.Unlock()
	if int(le.Uint16(cmd[4:]))*4 != len(cmd) {
		k.t.Errorf("a command of %d bytes, written in %d", le.Uint16(cmd[4:])*4, len(cmd))
	}
	return len(cmd), k.write(le.Uint32(cmd), cmd[8:], nil, nil, nil)
}

func (k *fakeKernel) Ioctl(cmd []byte, addr uint64) syscall.Errno {
	k.mu.Lock()
	defer k.mu.Unlock()
	object, method := le.Uint16(cmd[2:]), le.Uint16(cmd[4:])
	var data [8][]byte
	var value [8][]byte
	for i := range int(le.Uint16(cmd[6:])) {
		a := cmd[24+16*i:][:16]
		id, n := le.Uint16(a[0:]), int(le.Uint16(a[2:]))
		switch id {
		case 0x1000:
			id = 6
		case 0x1001:
			id = 7
		}
		value[id] = a[8:]
		if at := le.Uint64(a[8:]) - addr; n > 0 && at < uint64(len(cmd)) {
			data[id] = cmd[at:][:n]
		} else {
			data[id] = a[8:][:n]
		}
	}
	switch {
	case object == 0 && method == 0: // INVOKE_WRITE
		return k.write(uint32(le.Uint64(value[2])), data[0], data[1], data[6], data[7])
	case object == 0 && method == 2: // QUERY_PORT
		data[1][26], data[1][27], data[1][28], data[1][37] = 4, 5, 3, 2
		le.PutUint32(data[1][4:], 1<<32-1)
		le.PutUint32(data[1][16:], 1)
	case object == 0 && method == 3: // GET_CONTEXT
		if len(data[7]) != 8 {
			return unix.EINVAL
		}
		le.PutUint32(data[0], 1)
		le.PutUint64(data[1], 1)
	case object == 16 && method == 0: // ASYNC_EVENT
		le.PutUint64(value[0], uint64(k.Async[0]))
	default:
		k.t.Errorf("unexpected method %d of object %d", method, object)
		return unix.EPROTONOSUPPORT
	}
	return 0
}

func (k *fakeKernel) write(cmd uint32, in, out, uhwIn, uhw []byte) syscall.Errno {
	deform := func() {
		if k.deform != nil {
			k.deform(cmd, uhw)
		}
	}
	switch cmd {
	case 28: // POST_SEND: the doorbell
		if qp := k.qps[le.Uint32(in[8:])]; qp == nil || le.Uint32(in[12:]) != 0 {
			k.t.Errorf("doorbell %x", in)
		}
		k.bells++
		return k.bellErr
	case 0x80000001: // QUERY_DEVICE
		le.PutUint32(out[156:], 1000) // max_srq
		out[171] = 1
	case 3:
		le.PutUint32(out, k.Handle("pd"))
	case 4:
		return k.Destroy(le.Uint32(in), "pd")
	case 9: // REG_MR
		if len(uhwIn) != 8 || len(uhw) != 8 {
			return unix.EINVAL
		}
		h := k.Handle("mr")
		stag := h<<8 | uint32(uhwIn[0])
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], stag)
		le.PutUint32(out[8:], stag)
		le.PutUint32(uhw, stag)
		deform()
	case 13:
		return k.Destroy(le.Uint32(in), "mr")
	case 17: // CREATE_COMP_CHANNEL: a pipe, of which the provider gets the reading end
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			k.t.Fatal(err)
		}
		k.t.Cleanup(func() { unix.Close(fds[1]) })
		k.channel = fds[1]
		le.PutUint32(out, uint32(fds[0]))
	case 18: // CREATE_CQ
		q, at := k.newQueue(int(le.Uint32(in[16:])), 32, 8)
		h := k.Handle("cq")
		k.cqs[h], k.Cookies[h] = q, le.Uint64(in[8:])
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], le.Uint32(in[16:]))
		le.PutUint32(uhw[4:], uint32(q.n))
		le.PutUint64(uhw[8:], at)
		deform()
	case 20:
		return k.Destroy(le.Uint32(in[8:]), "cq")
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
		le.PutUint32(out[8:], le.Uint32(in[32:]))
		le.PutUint32(out[12:], le.Uint32(in[36:]))
		le.PutUint32(out[16:], le.Uint32(in[40:]))
		le.PutUint32(out[20:], le.Uint32(in[44:]))
		le.PutUint32(out[24:], le.Uint32(in[48:]))
		deform()
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
		h := le.Uint32(in[8:])
		delete(k.qpns, k.qps[h].num)
		return k.Destroy(h, "qp")
	case 32: // CREATE_SRQ
		q, at := k.newQueue(int(le.Uint32(in[20:])), 112, 0)
		h := k.Handle("srq")
		k.srqs[h], k.Cookies[h] = q, le.Uint64(in[8:])
		le.PutUint32(out[0:], h)
		copy(out[4:], in[20:28])
		le.PutUint32(uhw[0:], uint32(q.n))
		le.PutUint64(uhw[8:], at)
		deform()
	case 33: // MODIFY_SRQ
		k.limit = le.Uint32(in[12:])
	case 35:
		return k.Destroy(le.Uint32(in[8:]), "srq")
	default:
		k.t.Errorf("unexpected command %d", cmd)
		return unix.ENOSYS
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
