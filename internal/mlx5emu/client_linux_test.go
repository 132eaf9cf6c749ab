package mlx5emu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A client that knows mlx5's formats and nothing else: it writes commands, WQEs and doorbells by hand.

var le = binary.NativeEndian

type client struct {
	t     testing.TB
	dev   *Device
	f     *uverbs.File
	uar   [2][]byte // NC, BF
	page  [2]uint32
	pd    uint32
	bell  int // where the next send doorbell goes
	async int
}

// newDevice makes a device that ends with the test.
func newDevice(t testing.TB, cfg Config) *Device {
	t.Helper()
	d, err := NewDevice(cfg)
	if err != nil {
		t.Fatal(err)
	}
	_, more := inUse.LoadOrStore(t, &[]func(){})
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if more { // the test's first device is closed last
			return
		}
		l, _ := inUse.LoadAndDelete(t)
		for _, f := range *l.(*[]func()) {
			f()
		}
	})
	return d
}

// inUse is what has to stay until a test's device is closed: registered memory must not be unmapped before.
var inUse sync.Map // testing.TB -> *[]func()

// afterDevice has f called when the test's device is closed.
func afterDevice(t testing.TB, f func()) {
	l, ok := inUse.Load(t)
	if !ok {
		t.Fatal("memory before there is a device")
	}
	*l.(*[]func()) = append(*l.(*[]func()), f)
}

// connect opens a device with dynamic UARs, and makes a protection domain.
func connect(t testing.TB, d *Device) *client {
	t.Helper()
	k, err := d.OpenKernel()
	if err != nil {
		t.Fatal(err)
	}
	c := &client{t: t, dev: d, f: uverbs.NewFile(k, d.Name(), abi.RDMA_DRIVER_MLX5), async: -1}
	t.Cleanup(func() {
		if c.async >= 0 {
			unix.Close(c.async)
		}
		c.f.Close()
	})
	req := abi.Mlx5AllocUcontextReqV2{TotalNumBFRegs: 16, NumLowLatencyBFRegs: 4, MaxCQEVersion: 1, LibCaps: abi.MLX5_LIB_CAP_4K_UAR | abi.MLX5_LIB_CAP_DYN_UAR}
	var resp abi.Mlx5AllocUcontextResp
	info, err := c.f.GetContext(uverbs.Bytes(&req), uverbs.Bytes(&resp))
	if err != nil {
		t.Fatal(err)
	}
	c.async = info.AsyncFD
	if resp.TotBFRegs != 0 || resp.CQEVersion != 1 || resp.ResponseLength != 72 {
		t.Fatalf("context: %+v", resp)
	}
	for i, typ := range []uint64{abi.MLX5_IB_UAPI_UAR_ALLOC_TYPE_NC, abi.MLX5_IB_UAPI_UAR_ALLOC_TYPE_BF} {
		c.uar[i], c.page[i] = c.allocUAR(typ)
	}
	var pdn [4]byte
	if c.pd, err = c.f.AllocPD(pdn[:]); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *client) allocUAR(typ uint64) ([]byte, uint32) {
	c.t.Helper()
	var offset [8]byte
	var length, page [4]byte
	var h uint32
	if err := c.f.Call("alloc_uar", abi.MLX5_IB_OBJECT_UAR, abi.MLX5_IB_METHOD_UAR_OBJ_ALLOC,
		uverbs.NewHandle(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_HANDLE, &h), uverbs.Const(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_TYPE, typ),
		uverbs.Out(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_MMAP_OFFSET, offset[:]), uverbs.Out(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_MMAP_LENGTH, length[:]),
		uverbs.Out(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_PAGE_ID, page[:])); err != nil {
		c.t.Fatal(err)
	}
	mem, err := c.f.Mmap(int64(le.Uint64(offset[:])), int(le.Uint32(length[:])))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { c.f.Munmap(mem) })
	return mem, le.Uint32(page[:])
}

// reg registers memory.
func (c *client) reg(b []byte, access ib.Access) uverbs.MRInfo {
	c.t.Helper()
	m, err := c.f.RegMR(c.pd, addrOf(b), uint64(len(b)), addrOf(b), access, nil, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	return m
}

const everything = ib.AccessLocalWrite | ib.AccessRemote

// errno is the kernel's word for what has gone wrong.
func errno(err error) syscall.Errno {
	var e *uverbs.CmdError
	if errors.As(err, &e) {
		return e.Errno
	}
	return 0
}

// A cqueue is a completion queue, as its owner has it.
type cqueue struct {
	c       *client
	h, cqn  uint32
	buf, db []byte
	n, ci   uint32
	sn      uint32
}

func (c *client) newCQ(n uint32, channel int) *cqueue {
	c.t.Helper()
	q := &cqueue{c: c, n: n, buf: mapAt(c.t, 0, int(max(n*64, pageSize))), db: mapAt(c.t, 0, pageSize)}
	for i := range n {
		q.buf[64*i+63] = 0xf0
	}
	u := abi.Mlx5CreateCQ{BufAddr: addrOf(q.buf), DBAddr: addrOf(q.db), CQESize: 64, Flags: abi.MLX5_IB_CREATE_CQ_FLAGS_UAR_PAGE_INDEX, UARPageIndex: uint16(c.page[0])}
	var resp abi.Mlx5CreateCQResp
	h, entries, err := c.f.CreateCQ(int(n-1), channel, uint64(0xc000+n), uverbs.Bytes(&u), uverbs.Bytes(&resp))
	if err != nil {
		c.t.Fatal(err)
	}
	if entries != int(n-1) {
		c.t.Fatalf("a CQ of %d entries, not %d", entries, n-1)
	}
	q.h, q.cqn = h, resp.CQN
	return q
}

// A completion is a CQE.
type completion struct {
	cqe
	op, send byte // opcodes of CQE and WQE
	syndrome byte
	n        uint32
	index    uint16
	imm      uint32
	qpn      uint32
	user     uint32
}

// poll takes the next CQE, if there is one.
func (q *cqueue) poll() (completion, bool) {
	b := q.buf[64*(q.ci&(q.n-1)):][:64]
	if b[63]>>4 == 15 || (b[63]&1 != 0) != (q.ci&q.n != 0) {
		return completion{}, false
	}
	e := completion{cqe: cqe(b), op: b[63] >> 4, send: b[56], syndrome: b[55], n: be32(b[44:]), index: be.Uint16(b[60:]), imm: be32(b[36:]),
		qpn: be32(b[56:]) & 0xffffff, user: be32(b[32:])}
	q.ci++
	be.PutUint32(q.db, q.ci&0xffffff)
	return e, true
}

// wait takes the next CQE.
func (q *cqueue) wait() completion {
	q.c.t.Helper()
	var e completion
	q.c.until("a completion", func() (ok bool) { e, ok = q.poll(); return ok })
	return e
}

// until steps the device, or waits for its engine, until done.
func (c *client) until(what string, done func() bool) {
	c.t.Helper()
	if !c.dev.cfg.Manual {
		testutil.Eventually(c.t, what, done)
		return
	}
	testutil.Eventually(c.t, what, func() bool { c.dev.Step(); return done() })
}

// arm asks for an event.
func (q *cqueue) arm(solicited bool) {
	v := q.sn&3<<28 | q.ci&0xffffff
	if solicited {
		v |= armSolicited
	}
	be.PutUint32(q.db[4:], v)
	var b [8]byte
	be.PutUint32(b[:], v)
	be.PutUint32(b[4:], q.cqn)
	copy(q.c.uar[0][uarArm:], b[:])
}

// A queuePair is one, as its owner has it.
type queuePair struct {
	c          *client
	h, qpn     uint32
	typ        ib.QPType
	rq, sq, db []byte
	sqn, rqn   uint32
	shift      uint32
	cur, rhead uint32
	buf        []byte
}

type qpOptions struct {
	typ      ib.QPType
	srq      int // handle; -1: none
	uidx     uint32
	sqn, rqn uint32
	shift    uint32
	flags    uint32
}

func (c *client) newQP(scq, rcq *cqueue, o qpOptions) *queuePair {
	c.t.Helper()
	q, err := c.tryQP(scq, rcq, o)
	if err != nil {
		c.t.Fatal(err)
	}
	return q
}

func (c *client) tryQP(scq, rcq *cqueue, o qpOptions) (*queuePair, error) {
	c.t.Helper()
	if o.typ == 0 {
		o.typ = ib.RC
	}
	if o.sqn == 0 {
		o.sqn = 512
	}
	if o.rqn == 0 && o.srq < 0 {
		o.rqn, o.shift = 64, 5
	}
	sends := o.rqn << o.shift
	if o.typ == ib.RawPacket {
		sends = (sends + pageSize - 1) &^ (pageSize - 1)
	}
	buf := mapAt(c.t, 0, int(o.sqn*64+sends))
	q := &queuePair{c: c, typ: o.typ, buf: buf, rq: buf[:o.rqn<<o.shift], sq: buf[sends:], db: mapAt(c.t, 0, pageSize), sqn: o.sqn, rqn: o.rqn, shift: o.shift}
	u := abi.Mlx5CreateQP{BufAddr: addrOf(buf), DBAddr: addrOf(q.db), SQWQECount: o.sqn, RQWQECount: o.rqn, RQWQEShift: o.shift,
		Flags: abi.MLX5_QP_FLAG_UAR_PAGE_INDEX | abi.MLX5_QP_FLAG_SCATTER_CQE | o.flags, Uidx: o.uidx, BFRegIndex: c.page[1]}
	if o.typ == ib.RawPacket {
		u.SQBufAddr = addrOf(q.sq)
	}
	cmd := abi.CreateQP{UserHandle: 0xa000 + uint64(o.uidx), PDHandle: c.pd, SendCQHandle: scq.h, RecvCQHandle: rcq.h, MaxSendWR: 64, MaxRecvWR: 64,
		MaxSendSGE: 2, MaxRecvSGE: 2, MaxInlineData: 64, QPType: uint8(o.typ)}
	if o.srq >= 0 {
		cmd.IsSRQ, cmd.SRQHandle, cmd.MaxRecvWR = 1, uint32(o.srq), 0
	}
	var resp abi.Mlx5CreateQPResp
	info, err := c.f.CreateQP(&cmd, uverbs.Bytes(&u), uverbs.Bytes(&resp))
	if err != nil {
		return nil, err
	}
	q.h, q.qpn = info.Handle, uint32(info.QPN)
	return q, nil
}

// modify changes the queue pair, and fails the test if it cannot be.
func (q *queuePair) modify(a ib.QPAttr, mask ib.QPAttrMask) {
	q.c.t.Helper()
	if err := q.c.f.ModifyQP(q.h, &a, mask, ib.LinkEthernet); err != nil {
		q.c.t.Fatal(err)
	}
}

// attributes of a connection to a queue pair of the same device.
func (q *queuePair) attrs(peer uint32) ib.QPAttr {
	return ib.QPAttr{Port: 1, Access: ib.AccessRemote, QKey: 0x1111, PathMTU: ib.MTU1024, DestQPN: ib.QPN(peer), RQPSN: 1, SQPSN: 1,
		MaxDestRdAtomic: 4, MaxRdAtomic: 4, MinRNRTimer: 1, AckTimeout: 20, RetryCount: 7, RNRRetry: 7,
		AH: ib.AHAttr{DGID: q.c.dev.nic.GID(), HopLimit: 64, Port: 1}}
}

func (q *queuePair) toInit() {
	q.c.t.Helper()
	a := q.attrs(0)
	a.State = ib.Init
	q.modify(a, changes[q.typ][[2]ib.QPState{ib.Reset, ib.Init}].need|ib.AttrState)
}

// connectTo takes the queue pair from RESET to RTS.
func (q *queuePair) connectTo(peer uint32) {
	q.c.t.Helper()
	q.connectAt(q.c.dev, peer)
}

// connectAt is connectTo a queue pair of another device.
func (q *queuePair) connectAt(d *Device, peer uint32) {
	q.c.t.Helper()
	q.toInit()
	for _, s := range []ib.QPState{ib.RTR, ib.RTS} {
		a := q.attrs(peer)
		a.State, a.AH.DGID = s, d.nic.GID()
		q.modify(a, changes[q.typ][[2]ib.QPState{s - 1, s}].need|ib.AttrState)
	}
}

func (q *queuePair) state() ib.QPState {
	q.c.t.Helper()
	a, err := q.c.f.QueryQP(q.h)
	if err != nil {
		q.c.t.Fatal(err)
	}
	return a.State
}

// post writes a WQE: the segments behind the control segment, of which op, flags and imm are given. It does not ring.
func (q *queuePair) post(op, flags byte, imm uint32, rest ...[]byte) uint32 {
	body := bytes.Join(rest, nil)
	ds := (16 + len(body) + 15) / 16
	w := make([]byte, (ds*16+63)&^63)
	be.PutUint32(w, q.cur&0xffff<<8|uint32(op))
	be.PutUint32(w[4:], q.qpn<<8|uint32(ds))
	w[11] = flags
	be.PutUint32(w[12:], imm)
	copy(w[16:], body)
	at := q.cur
	for i := 0; i < len(w); i += 64 {
		copy(q.sq[(q.cur&(q.sqn-1))*64:][:64], w[i:])
		q.cur++
	}
	return at
}

// ring rings for everything that was posted; at is the last WQE.
func (q *queuePair) ring(at uint32) {
	be.PutUint32(q.db[4:], q.cur&0xffff)
	first := q.sq[(at&(q.sqn-1))*64:]
	reg := q.c.uar[1][uarSend+q.c.bell*sendRegStep:]
	q.c.bell ^= 1
	if first[7]&0x3f <= 4 { // BlueFlame
		copy(reg[8:64], first[8:64])
	}
	copy(reg[:8], first[:8])
}

func (q *queuePair) send(op, flags byte, imm uint32, rest ...[]byte) {
	q.ring(q.post(op, flags, imm, rest...))
}

// recv posts a receive.
func (q *queuePair) recv(segs ...[]byte) {
	e := q.rq[(q.rhead&(q.rqn-1))<<q.shift:][:1<<q.shift]
	clear(e)
	b := append(bytes.Join(segs, nil), dataEnd...)
	copy(e, b)
	q.rhead++
	be.PutUint32(q.db, q.rhead&0xffff)
}

var dataEnd = []byte{6: 1, 15: 0} // of byte count 0 and the key that is none

func segData(addr uint64, n, lkey uint32) []byte {
	b := make([]byte, 16)
	be.PutUint32(b, n)
	be.PutUint32(b[4:], lkey)
	be.PutUint64(b[8:], addr)
	return b
}

func segRemote(addr uint64, rkey uint32) []byte {
	b := make([]byte, 16)
	be.PutUint64(b, addr)
	be.PutUint32(b[8:], rkey)
	return b
}

func segInline(p []byte) []byte {
	b := make([]byte, (4+len(p)+15)&^15)
	be.PutUint32(b, inlineBit|uint32(len(p)))
	copy(b[4:], p)
	return b
}

func segAtomic(swapAdd, cmp uint64) []byte {
	b := make([]byte, 16)
	be.PutUint64(b, swapAdd)
	be.PutUint64(b[8:], cmp)
	return b
}

// A pair is two connected queue pairs of one client, and memory that both may use.
type pair struct {
	*client
	a, b   *queuePair
	ca, cb *cqueue
	ma, mb []byte
	ka, kb uint32
}

func newPair(t testing.TB, cfg Config, typ ib.QPType) *pair {
	t.Helper()
	return newPairOf(t, newDevice(t, cfg), typ)
}

// newPairOf makes a pair of another client of a device.
func newPairOf(t testing.TB, d *Device, typ ib.QPType) *pair {
	t.Helper()
	c := connect(t, d)
	p := &pair{client: c, ca: c.newCQ(128, -1), cb: c.newCQ(128, -1), ma: mapAt(t, 0, 4*pageSize), mb: mapAt(t, 0, 4*pageSize)}
	p.ka, p.kb = uint32(c.reg(p.ma, everything).LKey), uint32(c.reg(p.mb, everything).LKey)
	p.a = c.newQP(p.ca, p.ca, qpOptions{typ: typ, srq: -1, uidx: 1})
	p.b = c.newQP(p.cb, p.cb, qpOptions{typ: typ, srq: -1, uidx: 2})
	p.a.connectTo(p.b.qpn)
	p.b.connectTo(p.a.qpn)
	return p
}
