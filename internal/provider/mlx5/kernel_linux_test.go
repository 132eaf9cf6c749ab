//go:build amd64 || arm64

package mlx5

import (
	"encoding/binary"
	"errors"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/internal/uverbs/uverbstest"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// The other side of the provider, played by the test: commands are answered as the kernel's mlx5 driver does, and the queues and
// registers are memory that the test reads and writes in the device's stead. Offsets are written out: the formats are what is
// tested.

var (
	le = binary.LittleEndian
	be = binary.BigEndian
)

// A fakeCQ is a completion queue as the device has it.
type fakeCQ struct {
	ring, record []byte
	n, next      uint32 // completions of the ring, and written ever
	number       uint32
	flags        uint16
	uarPage      uint16
}

// add writes a completion, of which byte 63 is the opcode shifted by 4; the owner bit is filled in.
func (q *fakeCQ) add(c [64]byte) {
	c[63] = c[63]&^1 | byte(q.next/q.n&1)
	copy(q.ring[64*(q.next%q.n):], c[:])
	q.next++
}

// A fakeQP is a queue pair as the device has it.
type fakeQP struct {
	sq, rq, record []byte
	number, index  uint32
	srq            *fakeSRQ
	scq, rcq       *fakeCQ
	request        []byte // the driver's part
	states         []byte // that MODIFY_QP has set
	posted         uint16 // blocks that completions were written for
	received       uint16
}

type fakeSRQ struct {
	mem, record []byte
	stride      int
	number      uint32
	front       uint16
}

// A fakeKernel answers commands. What is exported to tests are its fields.
type fakeKernel struct {
	uverbstest.Kernel
	t          testing.TB
	resp       abi.Mlx5AllocUcontextResp
	request    abi.Mlx5AllocUcontextReqV2
	link       byte   // of all ports
	gids       uint32 // slots of a port's table
	cqs        map[uint32]*fakeCQ
	qps        map[uint32]*fakeQP
	srqs       map[uint32]*fakeSRQ
	pages      map[uint32][]byte // UAR pages, by their number
	nc         uint32            // the page that was asked for to arm CQs
	mac        [6]byte
	resized    func(old, fresh *fakeCQ)
	pageID     uint32 // of the first UAR
	badPort    uint32 // of which nothing can be learnt
	caps       uint32 // more of the device's flags
	flow       []byte // the last CREATE_FLOW
	moderation []byte // the last MODIFY_CQ
}

const uarPageBytes = 4096

// goodResponse is what a ConnectX-6 might say.
func goodResponse() abi.Mlx5AllocUcontextResp {
	return abi.Mlx5AllocUcontextResp{QPTabSize: 1 << 17, BFRegSize: 512, CacheLineSize: 64, MaxSQDescSz: 1024, MaxRQDescSz: 512,
		MaxSendWQEBB: 32768, MaxRecvWR: 32768, MaxSRQRecvWR: 32768, NumPorts: 1, ResponseLength: 72, CQEVersion: 1, CmdsSuppUHW: 3,
		EthMinInline: 1, LogUARSize: 12, NumUARsPerPage: 1}
}

// newFake opens a device whose kernel is the test. Everything must be closed by the end of it.
func newFake(t testing.TB, change ...func(*fakeKernel)) (*fakeKernel, *mlx5Context) {
	t.Helper()
	k, c, err := openFake(t, change...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return k, c
}

func openFake(t testing.TB, change ...func(*fakeKernel)) (*fakeKernel, *mlx5Context, error) {
	t.Helper()
	const driver = 1
	k := &fakeKernel{t: t, resp: goodResponse(), link: 2, gids: 256, cqs: map[uint32]*fakeCQ{}, qps: map[uint32]*fakeQP{}, srqs: map[uint32]*fakeSRQ{},
		pages: map[uint32][]byte{}, mac: [6]byte{2, 0, 0, 0, 0, 9}}
	k.Init(t, driver)
	k.Own, k.Method = k.own, k.method
	for _, f := range change {
		f(k)
	}
	t.Cleanup(func() {
		for _, p := range k.pages {
			unix.Munmap(p)
		}
	})
	req := contextRequest()
	u, err := uverbs.NewContext(uverbs.NewFile(k, "mlx5_9", driver), uverbs.Bytes(&req), uverbs.Bytes(&k.resp))
	if err != nil {
		t.Fatal(err)
	}
	c, err := newContext(u, &k.resp)
	return k, c, err
}

func (k *fakeKernel) page(id uint32) []byte {
	p := k.pages[id]
	if p == nil {
		var err error
		if p, err = unix.Mmap(-1, 0, uarPageBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS); err != nil {
			k.t.Fatal(err)
		}
		k.pages[id] = p
	}
	return p
}

func (k *fakeKernel) Mmap(offset int64, n int) ([]byte, error) {
	k.Mu.Lock()
	defer k.Mu.Unlock()
	if n != uarPageBytes || offset%uarPageBytes != 0 {
		k.t.Errorf("%d bytes are mapped at %#x", n, offset)
		return nil, unix.EINVAL
	}
	k.Mapped++
	return k.page(uint32(offset / uarPageBytes)), nil
}

// Munmap leaves the memory, for the test may look at it once more.
func (k *fakeKernel) Munmap([]byte) error {
	k.Mu.Lock()
	defer k.Mu.Unlock()
	k.Mapped--
	return nil
}

func (k *fakeKernel) Ring([]byte) (int, syscall.Errno) {
	k.t.Error("a doorbell by system call")
	return 0, unix.ENOSYS
}

func (k *fakeKernel) method(id uint32, attrs uverbstest.Attrs) syscall.Errno {
	switch id {
	case 0x00020000: // QUERY_PORT
		port := uint32(attrs[0].Value[0])
		if port == 0 || port > uint32(k.resp.NumPorts) {
			return unix.EINVAL
		}
		if port == k.badPort {
			return unix.EIO
		}
		r := attrs[1].Data
		le.PutUint32(r[4:], 1<<30)
		le.PutUint32(r[16:], k.gids)
		le.PutUint16(r[20:], 128)
		le.PutUint16(r[22:], 7)
		r[26], r[27], r[28], r[37] = 4, 5, 5, k.link
	case 0x00030000: // GET_CONTEXT
		copy(uverbs.Bytes(&k.request), attrs[uverbstest.DriverIn].Data)
		copy(attrs[uverbstest.DriverOut].Data, uverbs.Bytes(&k.resp))
		return uverbstest.AsUsual
	case 0x00050000: // QUERY_GID_TABLE
		for i, typ := range []uint32{1, 2, 2} { // RoCE v1 at index 0, v2 at 1, and behind what can be named
			g := attrs[2].Data[32*i:]
			if i == 2 {
				i = 256
			}
			g[0], g[15] = 0xfd, 1
			le.PutUint32(g[16:], uint32(i))
			le.PutUint32(g[20:], 1)
			le.PutUint32(g[24:], typ)
		}
		le.PutUint64(attrs[3].Data, 3)
	case abi.UVERBS_METHOD_REG_DMABUF_MR<<16 | abi.UVERBS_OBJECT_MR:
		if int32(le.Uint32(attrs[abi.UVERBS_ATTR_REG_DMABUF_MR_FD].Data)) == -1 {
			return unix.EBADF
		}
		h := k.Handle("mr")
		le.PutUint64(attrs[abi.UVERBS_ATTR_REG_DMABUF_MR_HANDLE].Value, uint64(h))
		le.PutUint32(attrs[abi.UVERBS_ATTR_REG_DMABUF_MR_RESP_LKEY].Data, h<<8|0x42)
		le.PutUint32(attrs[abi.UVERBS_ATTR_REG_DMABUF_MR_RESP_RKEY].Data, h<<8|0x42)
	case 0x10001008: // a UAR
		if e := k.Errs[0x1008]; e != 0 {
			return e
		}
		h := k.Handle("uar")
		id := k.pageID + uint32(len(k.pages))
		k.page(id)
		if le.Uint64(attrs[0x1001].Value) == abi.MLX5_IB_UAPI_UAR_ALLOC_TYPE_NC {
			k.nc = id
		}
		le.PutUint64(attrs[0x1000].Value, uint64(h))
		le.PutUint64(attrs[0x1002].Data, uint64(id)*uarPageBytes)
		le.PutUint32(attrs[0x1003].Data, uarPageBytes)
		le.PutUint32(attrs[0x1004].Data, id)
		if k.Tweak != nil {
			k.Tweak(0x1008, attrs[0x1002].Data, attrs[0x1003].Data)
		}
	case 0x10011008:
		return k.Destroy(uint32(le.Uint64(attrs[0x1000].Value)), "uar")
	default:
		return uverbstest.AsUsual
	}
	return 0
}

func (k *fakeKernel) own(c *uverbstest.Command) syscall.Errno {
	in, out, uhwIn, uhwOut := c.In, c.Out, c.DriverIn, c.DriverOut
	switch c.Number {
	case 0x80000001: // QUERY_DEVICE
		le.PutUint32(out[52:], 1000)
		le.PutUint32(out[56:], 32768)
		le.PutUint32(out[60:], 1<<24|k.caps) // windows of type 2B
		le.PutUint32(out[64:], 30)
		le.PutUint32(out[68:], 30)
		le.PutUint32(out[76:], 1<<22-1)
		le.PutUint32(out[108:], 1)
		le.PutUint32(out[156:], 1000)
		out[171] = 1
		le.PutUint16(out[280:], 65535)
		le.PutUint16(out[282:], 4095)
	case 3: // ALLOC_PD
		le.PutUint32(uhwOut, 0x77)
		return uverbstest.AsUsual
	case 5: // CREATE_AH
		le.PutUint32(uhwOut, 16)
		copy(uhwOut[4:], k.mac[:])
		return uverbstest.AsUsual
	case 18: // CREATE_CQ
		n := le.Uint32(in[16:]) + 1
		h := k.Handle("cq")
		k.cqs[h] = &fakeCQ{ring: memoryAt(le.Uint64(uhwIn[0:]), int(n)*64), record: memoryAt(le.Uint64(uhwIn[8:]), 8), n: n, number: 0x400 + h,
			flags: le.Uint16(uhwIn[22:]), uarPage: le.Uint16(uhwIn[24:])}
		if le.Uint32(uhwIn[16:]) != 64 || uhwIn[20] != 0 {
			k.t.Errorf("create_cq %x", uhwIn)
		}
		k.Cookies[h] = le.Uint64(in[8:])
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], n-1)
		le.PutUint32(uhwOut[0:], 0x400+h)
	case 0x80000039: // MODIFY_CQ
		k.moderation = append([]byte(nil), in...)
	case 19: // RESIZE_CQ
		q := k.cqs[le.Uint32(in[8:])]
		n := le.Uint32(in[12:]) + 1
		old := *q
		q.ring, q.n = memoryAt(le.Uint64(uhwIn[0:]), int(n)*64), n
		if k.resized != nil {
			k.resized(&old, q)
		} else {
			old.add([64]byte{63: 5 << 4})
		}
		q.next = old.next
		le.PutUint32(out, n-1)
	case 24: // CREATE_QP
		h := k.Handle("qp")
		buf, sq, rq := le.Uint64(uhwIn[0:]), int(le.Uint32(uhwIn[16:]))*64, int(le.Uint32(uhwIn[20:]))<<le.Uint32(uhwIn[24:])
		sends := buf + uint64(rq)
		if in[53] == 8 { // RAW_PACKET
			sends = le.Uint64(uhwIn[40:])
		}
		q := &fakeQP{rq: memoryAt(buf, rq), sq: memoryAt(sends, sq), record: memoryAt(le.Uint64(uhwIn[8:]), 8), number: 0x100 + uint32(len(k.qps)),
			index: le.Uint32(uhwIn[32:]), scq: k.cqs[le.Uint32(in[20:])], rcq: k.cqs[le.Uint32(in[24:])], request: slices.Clone(uhwIn)}
		if in[54] != 0 {
			q.srq = k.srqs[le.Uint32(in[28:])]
		}
		k.qps[h], k.Cookies[h] = q, le.Uint64(in[8:])
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], q.number)
	case 25: // QUERY_QP
		if s := k.qps[le.Uint32(in[8:])].states; len(s) > 0 {
			out[108] = s[len(s)-1]
		}
	case 26: // MODIFY_QP
		q := k.qps[le.Uint32(in[64:])]
		if le.Uint32(in[68:])&1 != 0 {
			q.states = append(q.states, in[96])
			if in[96] == 0 {
				q.posted, q.received = 0, 0
			}
		}
	case 32: // CREATE_SRQ
		h := k.Handle("srq")
		stride := 32
		for stride < 16+16*int(le.Uint32(in[24:])) {
			stride *= 2
		}
		slots := 1
		for slots < int(le.Uint32(in[20:]))+1 {
			slots *= 2
		}
		k.srqs[h] = &fakeSRQ{mem: memoryAt(le.Uint64(uhwIn[0:]), slots*stride), record: memoryAt(le.Uint64(uhwIn[8:]), 4), stride: stride, number: 0x900 + h}
		k.Cookies[h] = le.Uint64(in[8:])
		le.PutUint32(out[0:], h)
		le.PutUint32(out[4:], uint32(slots-1))
		copy(out[8:12], in[24:28])
		le.PutUint32(uhwOut[0:], 0x900+h)
	case 0x80000032: // CREATE_FLOW
		k.flow = slices.Clone(in)
		le.PutUint32(out[4:], k.Handle("flow"))
	case 0x80000033:
		return k.Destroy(le.Uint32(in[4:]), "flow")
	default:
		return uverbstest.AsUsual
	}
	return 0
}

// A bench is a queue pair with its queues, and what it was made on.
type bench struct {
	t  testing.TB
	k  *fakeKernel
	c  *mlx5Context
	pd *pd
	cq *cq
	qp *qp
	kq *fakeQP
	kc *fakeCQ
}

// bare is a bench without queue pair.
func bare(t testing.TB, change ...func(*fakeKernel)) *bench {
	t.Helper()
	k, c := newFake(t, change...)
	b := &bench{t: t, k: k, c: c}
	p, err := c.AllocPD()
	if err != nil {
		t.Fatal(err)
	}
	b.pd = p.(*pd)
	b.cq = b.newCQ(63, nil)
	b.kc = k.cqs[b.cq.handle]
	t.Cleanup(func() { b.close(b.cq, b.pd) })
	return b
}

func newBench(t testing.TB, typ ib.QPType, change ...func(*driver.QPConfig)) *bench {
	t.Helper()
	return bare(t).with(typ, change...)
}

// with makes the bench's queue pair.
func (b *bench) with(typ ib.QPType, change ...func(*driver.QPConfig)) *bench {
	b.t.Helper()
	b.qp = b.newQP(typ, change...)
	b.kq = b.k.qps[b.qp.Handle]
	b.t.Cleanup(func() { b.close(b.qp) })
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

func (b *bench) newCQ(n int, ch driver.CompChannel) *cq {
	b.t.Helper()
	q, err := b.c.CreateCQ(driver.CQConfig{Entries: n, Channel: ch})
	if err != nil {
		b.t.Fatal(err)
	}
	return q.(*cq)
}

func (b *bench) config(typ ib.QPType, change ...func(*driver.QPConfig)) driver.QPConfig {
	cfg := driver.QPConfig{Type: typ, SendCQ: b.cq, RecvCQ: b.cq, Cap: ib.QPCap{MaxSendWR: 16, MaxRecvWR: 16, MaxSendSGE: 4, MaxRecvSGE: 3, MaxInline: 64}}
	for _, f := range change {
		f(&cfg)
	}
	return cfg
}

func (b *bench) newQP(typ ib.QPType, change ...func(*driver.QPConfig)) *qp {
	b.t.Helper()
	q, err := b.pd.CreateQP(b.config(typ, change...))
	if err != nil {
		b.t.Fatal(err)
	}
	b.to(q.(*qp), ib.RTS)
	return q.(*qp)
}

func (b *bench) to(q *qp, s ib.QPState) {
	b.t.Helper()
	if err := q.Modify(b.t.Context(), &ib.QPAttr{State: s}, ib.AttrState); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) post(wrs ...ib.SendWR) {
	b.t.Helper()
	if n, err := b.qp.PostSend(wrs); n != len(wrs) || err != nil {
		b.t.Fatalf("%d of %d: %v", n, len(wrs), err)
	}
}

func (b *bench) recv(wrs ...ib.RecvWR) {
	b.t.Helper()
	if n, err := b.qp.PostRecv(wrs); n != len(wrs) || err != nil {
		b.t.Fatalf("%d of %d: %v", n, len(wrs), err)
	}
}

// poll polls n completions, and that there are no more.
func (b *bench) poll(n int) []ib.WC {
	b.t.Helper()
	wcs := make([]ib.WC, n+1)
	if got := b.cq.Poll(wcs); got != n {
		b.t.Fatalf("%d completions, want %d: %v", got, n, b.cq.Err())
	}
	return wcs[:n]
}

// cqeOf is a completion of the queue pair, with an opcode and a counter.
func (q *fakeQP) cqeOf(code byte, counter uint16) (c [64]byte) {
	index := q.index
	if index == noUserIndex { // CQE version 0
		if index = 0; q.srq != nil {
			index = q.srq.number
		}
	}
	be.PutUint32(c[32:], index)
	be.PutUint32(c[56:], q.number)
	be.PutUint16(c[60:], counter)
	c[63] = code << 4
	return c
}

// takeSend is the device's: the next posted request, whose completion is returned, too.
func (q *fakeQP) takeSend() (wqe []byte, done [64]byte) {
	n := len(q.sq) / 64
	at := int(q.posted) % n * 64
	units := int(q.sq[at+7] & 63)
	for i := range units {
		wqe = append(wqe, q.sq[(at+16*i)%len(q.sq):][:16]...)
	}
	done = q.cqeOf(0, q.posted)
	done[56] = wqe[3]
	q.posted += uint16((units + 3) / 4)
	return wqe, done
}

// sends is how many blocks of requests the device knows of.
func (q *fakeQP) sends() uint16 { return uint16(be.Uint32(q.record[4:])) }

// complete lets the device do everything that is posted; requests that ask for a completion get one.
func (q *fakeQP) complete() (wqes [][]byte) {
	for q.posted != q.sends() {
		w, done := q.takeSend()
		wqes = append(wqes, w)
		if w[11]&8 != 0 {
			q.scq.add(done)
		}
	}
	return wqes
}

// register is the half of the send register of a page that turn names.
func (k *fakeKernel) register(page uint32, reg, half int) []byte {
	return k.pages[page][0x800+512*reg+256*half:][:256]
}

func write(t *testing.T, fd int, b []byte) {
	t.Helper()
	if _, err := unix.Write(fd, b); err != nil {
		t.Fatal(err)
	}
}

func mustBe(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}
