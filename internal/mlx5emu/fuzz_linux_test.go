package mlx5emu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// An arena is the memory of a client that does not exist: from base on, and nothing else. What is outside is an error, and all of it when it
// has gone.
type arena struct {
	mu   sync.Mutex
	mem  []byte
	gone bool
}

const arenaBase = 0x10000

var errOutside = errors.New("outside of the client's memory")

func (a *arena) at(va uint64, n int) ([]byte, error) {
	off := va - arenaBase
	if a.gone || off > uint64(len(a.mem)) || uint64(n) > uint64(len(a.mem))-off {
		return nil, errOutside
	}
	return a.mem[off:][:n], nil
}

// vanish is the end of the client's process.
func (a *arena) vanish() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.gone = true
}

func (a *arena) ReadAt(p []byte, va uint64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	b, err := a.at(va, len(p))
	copy(p, b)
	return err
}

func (a *arena) WriteAt(p []byte, va uint64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	b, err := a.at(va, len(p))
	copy(b, p)
	return err
}

// Check implements Memory.
func (a *arena) Check(va, n uint64, _ bool) error {
	if n > 1<<30 {
		return unix.EFAULT
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	_, err := a.at(va, int(n))
	return err
}

func (a *arena) Register(pd *softnic.PD, start, length, iova uint64, access ib.Access) (driver.MR, error) {
	if a.Check(start, length, access&ib.AccessLocalWrite != 0) != nil {
		return nil, unix.EFAULT
	}
	return pd.RegisterForeign(a, start, length, iova, access)
}

// noFiles passes nothing anywhere.
type noFiles struct{ n int }

func (f *noFiles) Pass(int) (int, error) {
	if f.n++; f.n > 20 {
		return 0, unix.EMFILE
	}
	return 100 + f.n, nil
}

// command builds an INVOKE_WRITE command in the arena, its parts from the address at on. It returns the command.
func command(a *arena, at uint64, cmd uint32, core, uhw []byte) []byte {
	var attrs []byte
	put := func(id, n uint16, data uint64) {
		b := make([]byte, attrSize)
		le.PutUint16(b, id)
		le.PutUint16(b[2:], n)
		le.PutUint16(b[4:], 1)
		le.PutUint64(b[8:], data)
		attrs = append(attrs, b...)
	}
	part := func(id uint16, p []byte) {
		if len(p) == 0 {
			return
		}
		if len(p) <= 8 {
			var b [8]byte
			copy(b[:], p)
			put(id, uint16(len(p)), le.Uint64(b[:]))
			return
		}
		a.WriteAt(p, at)
		put(id, uint16(len(p)), at)
		at += 512
	}
	part(abi.UVERBS_ATTR_CORE_IN, core)
	part(abi.UVERBS_ATTR_UHW_IN, uhw)
	put(abi.UVERBS_ATTR_WRITE_CMD, 8, uint64(cmd))
	put(abi.UVERBS_ATTR_CORE_OUT, 512, arenaBase+replyAt)
	put(abi.UVERBS_ATTR_UHW_OUT, 256, arenaBase+replyAt+512)
	h := make([]byte, headerSize)
	le.PutUint16(h, uint16(headerSize+len(attrs)))
	le.PutUint16(h[6:], uint16(len(attrs)/attrSize))
	le.PutUint32(h[16:], abi.RDMA_DRIVER_MLX5)
	return append(h, attrs...)
}

const (
	replyAt = 0x1000 // in the arena: answers
	partsAt = 0x2000 // and parts of commands
	cqDB    = 0x800
	qpDB    = 0x840 // two of 64 bytes
	cqAt    = 0x4000
	qpAt    = 0x8000
	mrAt    = 0x20000
	arenaLn = 0x40000
	rawSQ   = 0x1000 // behind the receives: sends of raw packet queue pairs
)

// An arenaClient drives a device out of an arena: a client whose every byte a fuzzer may choose.
type arenaClient struct {
	t      testing.TB
	d      *Device
	a      *arena
	c      *Context
	files  noFiles
	pd, cq uint32
	key    uint32
	qpn    [2]uint32
}

func (c *arenaClient) write(cmd uint32, core, uhw []byte) (reply []byte, errno syscall.Errno) {
	errno = c.c.Ioctl(command(c.a, arenaBase+partsAt, cmd, core, uhw), &c.files)
	return c.a.mem[replyAt:][:1024], errno
}

func (c *arenaClient) must(cmd uint32, core, uhw []byte) []byte {
	c.t.Helper()
	r, errno := c.write(cmd, core, uhw)
	if errno != 0 {
		c.t.Fatalf("command %#x: %v", cmd, errno)
	}
	return r
}

// openArena opens a device, and makes a region and a CQ.
func openArena(t testing.TB, d *Device) *arenaClient {
	t.Helper()
	a := &arena{mem: make([]byte, arenaLn)}
	ctx, err := d.Open(a)
	if err != nil {
		t.Fatal(err)
	}
	c := &arenaClient{t: t, d: d, a: a, c: ctx}
	c.must(abi.IB_USER_VERBS_CMD_GET_CONTEXT, make([]byte, 8), bytesOf(&abi.Mlx5AllocUcontextReqV2{TotalNumBFRegs: 4, NumLowLatencyBFRegs: 1, MaxCQEVersion: 1}))
	c.pd = le.Uint32(c.must(abi.IB_USER_VERBS_CMD_ALLOC_PD, make([]byte, 8), nil))
	r := c.must(abi.IB_USER_VERBS_CMD_REG_MR, bytesOf(&abi.RegMR{Start: arenaBase + mrAt, HCAVA: arenaBase + mrAt, Length: 0x8000, PDHandle: c.pd, AccessFlags: uint32(everything | ib.AccessMWBind)}), nil)
	c.key = le.Uint32(r[4:])
	c.cq = le.Uint32(c.must(abi.IB_USER_VERBS_CMD_CREATE_CQ, bytesOf(&abi.CreateCQ{CQE: 127, CompChannel: -1}),
		bytesOf(&abi.Mlx5CreateCQ{BufAddr: arenaBase + cqAt, DBAddr: arenaBase + cqDB, CQESize: 64})))
	return c
}

// newQP makes the first or second queue pair, and returns its handle.
func (c *arenaClient) newQP(i int, typ ib.QPType) (handle uint32) {
	c.t.Helper()
	at := uint64(arenaBase + qpAt + i*0x8000)
	u := abi.Mlx5CreateQP{BufAddr: at, DBAddr: arenaBase + qpDB + uint64(i)*64, SQWQECount: 64, RQWQECount: 16, RQWQEShift: 5, Uidx: uint32(i), Flags: abi.MLX5_QP_FLAG_BFREG_INDEX, BFRegIndex: 1}
	if typ == ib.RawPacket {
		u.SQBufAddr = at + rawSQ
		u.Flags |= selfFlags
	}
	r := c.must(abi.IB_USER_VERBS_CMD_CREATE_QP, bytesOf(&abi.CreateQP{PDHandle: c.pd, SendCQHandle: c.cq, RecvCQHandle: c.cq, MaxSendWR: 8, MaxRecvWR: 8, MaxSendSGE: 2, MaxRecvSGE: 2, QPType: uint8(typ)}),
		bytesOf(&u))
	c.qpn[i] = le.Uint32(r[4:])
	return le.Uint32(r)
}

// connect takes a queue pair to RTS. Reliable ones try so often, and wait that long for an answer: 4.096 µs, doubled timeout times.
func (c *arenaClient) connect(handle uint32, typ ib.QPType, peer uint32, gid ib.GID, timeout, retries uint8) {
	c.t.Helper()
	for _, s := range []ib.QPState{ib.Init, ib.RTR, ib.RTS} {
		m := abi.ModifyQP{QPHandle: handle, QPState: uint8(s), AttrMask: uint32(changes[typ][[2]ib.QPState{s - 1, s}].need | ib.AttrState),
			QPAccessFlags: uint32(ib.AccessRemote), QKey: 1, PathMTU: 3, DestQPNum: peer, PortNum: 1, MaxRdAtomic: 2, MaxDestRdAtomic: 2, Timeout: timeout, RetryCnt: retries, RNRRetry: retries,
			Dest: abi.QPDest{DGID: gid, IsGlobal: 1, PortNum: 1}}
		c.must(abi.IB_USER_VERBS_CMD_MODIFY_QP, bytesOf(&m), nil)
	}
}

// newArenaClient makes a device, and two queue pairs that are connected with each other, on one CQ, with a region.
func newArenaClient(t testing.TB, typ ib.QPType) *arenaClient {
	d, err := NewDevice(Config{Manual: true, Numbered: true})
	if err != nil {
		t.Fatal(err)
	}
	c := openArena(t, d)
	for i := range 2 {
		h := c.newQP(i, typ)
		c.connect(h, typ, 0x100+uint32(1-i), d.nic.GID(), 10, 1)
		if typ == ib.RawPacket {
			rule := abi.CreateFlow{QPHandle: h, FlowAttr: abi.FlowAttr{Type: uint32(i), Port: 1}} // all frames, and the rest
			c.must(extended|abi.IB_USER_VERBS_EX_CMD_CREATE_FLOW, bytesOf(&rule), nil)
		}
	}
	return c
}

// pages of doorbells: static, the first.
func (c *arenaClient) ring(at int, word []byte) { copy(c.c.pages.mem[c.uarView()+at:], word) }

// A bystander is another client of the device, which a software NIC is connected to: what the first client does is nothing to them.
type bystander struct {
	*arenaClient
	nic  *softnic.NIC
	pd   driver.PD
	cq   driver.CQ
	qp   driver.QP
	mr   driver.MR
	mem  []byte
	n    uint16 // messages each way
	cqes uint32
}

func newBystander(t testing.TB, d *Device) *bystander {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	b := &bystander{arenaClient: openArena(t, d), mem: make([]byte, 64)}
	for i := range 128 {
		b.a.mem[cqAt+64*i+63] = 0xf0
	}
	var err error
	b.nic, err = softnic.Open()
	must(err)
	b.pd, err = b.nic.AllocPD()
	must(err)
	b.mr, err = b.pd.RegisterMR(driver.MRConfig{Mem: b.mem, Access: ib.AccessLocalWrite, FD: -1})
	must(err)
	b.cq, err = b.nic.CreateCQ(driver.CQConfig{Entries: 16})
	must(err)
	b.qp, err = b.pd.CreateQP(driver.QPConfig{Type: ib.RC, SendCQ: b.cq, RecvCQ: b.cq, Cap: ib.QPCap{MaxSendWR: 4, MaxRecvWR: 4, MaxSendSGE: 1, MaxRecvSGE: 1, MaxInline: 64}})
	must(err)
	h := b.newQP(0, ib.RC)
	b.connect(h, ib.RC, uint32(b.qp.QPN()), b.nic.GID(), 20, 7)
	for _, s := range []ib.QPState{ib.Init, ib.RTR, ib.RTS} {
		must(b.qp.Modify(context.Background(), &ib.QPAttr{State: s, Port: 1, AH: ib.AHAttr{DGID: d.nic.GID(), Port: 1}, PathMTU: ib.MTU1024, DestQPN: ib.QPN(b.qpn[0]),
			AckTimeout: 20, RetryCount: 7, RNRRetry: 7, MinRNRTimer: 1}, changes[ib.RC][[2]ib.QPState{s - 1, s}].need|ib.AttrState))
	}
	return b
}

// exchange sends a message each way.
func (b *bystander) exchange() {
	b.t.Helper()
	out, in := fmt.Appendf(nil, "message %d of the bystander", b.n), fmt.Appendf(nil, "message %d to the bystander", b.n)
	if _, err := b.qp.PostRecv([]ib.RecvWR{{SGEs: []ib.SGE{{Addr: addrOf(b.mem), Length: uint32(len(b.mem)), LKey: b.mr.LKey()}}}}); err != nil {
		b.t.Fatal(err)
	}
	w := b.a.mem[qpAt+sqOff+int(b.n%64)*64:][:64]
	copy(w, sendWQEBytes(opSend, b.n, b.qpn[0], segInline(out)))
	be.PutUint32(b.a.mem[qpDB+4:], uint32(b.n+1))
	b.ring(uarSend, w[:8])
	b.await(cqeRequester)
	b.polled(ib.WCRecv)
	if !bytes.Equal(b.mem[:len(out)], out) {
		b.t.Fatalf("the software NIC has received %q, not %q", b.mem[:len(out)], out)
	}
	const at = arenaBase + mrAt
	copy(b.a.mem[qpAt+int(b.n%16)*32:], append(segData(at, 64, b.key), dataEnd...))
	be.PutUint32(b.a.mem[qpDB:], uint32(b.n+1))
	if _, err := b.qp.PostSend([]ib.SendWR{{Opcode: ib.OpSend, Flags: ib.SendSignaled, Inline: in}}); err != nil {
		b.t.Fatal(err)
	}
	b.await(cqeRecvSend)
	b.polled(ib.WCSend)
	if got := b.a.mem[mrAt:][:len(in)]; !bytes.Equal(got, in) {
		b.t.Fatalf("the bystander has received %q, not %q", got, in)
	}
	b.n++
}

// await steps until the bystander has its next completion.
func (b *bystander) await(op byte) {
	b.t.Helper()
	e := b.a.mem[cqAt+64*int(b.cqes%128):][:64]
	b.until("a completion of the bystander's", func() bool { return e[63]>>4 != 15 && uint32(e[63]&1) == b.cqes/128&1 })
	if e[63]>>4 != op {
		b.t.Fatalf("the bystander's completion has the opcode %d, and the syndrome %#x", e[63]>>4, e[cqeSyndrome])
	}
	b.cqes++
	be.PutUint32(b.a.mem[cqDB:], b.cqes)
}

// polled steps until the software NIC has its next completion.
func (b *bystander) polled(op ib.WCOpcode) {
	b.t.Helper()
	var wcs [1]ib.WC
	b.until("a completion of the software NIC's", func() bool { return b.cq.Poll(wcs[:]) == 1 })
	if wcs[0].Status != ib.WCSuccess || wcs[0].Opcode != op {
		b.t.Fatalf("the software NIC's completion: %+v", wcs[0])
	}
}

func (b *bystander) until(what string, done func() bool) {
	b.t.Helper()
	testutil.Eventually(b.t, what, func() bool {
		for range 100 {
			b.d.Step()
			if done() {
				return true
			}
		}
		return false
	})
}

func (b *bystander) close() {
	if err := errors.Join(b.qp.Close(), b.cq.Close(), b.mr.Close(), b.pd.Close(), b.nic.Close()); err != nil {
		b.t.Error(err)
	}
}

// sqOff is where sends lie behind the receives.
const sqOff = 16 << 5

// sendWQEBytes is a send WQE that is signalled, with what follows its control segment.
func sendWQEBytes(op byte, idx uint16, qpn uint32, rest ...[]byte) []byte {
	body := bytes.Join(rest, nil)
	w := make([]byte, 16, 64)
	be.PutUint32(w, uint32(idx)<<8|uint32(op))
	be.PutUint32(w[4:], qpn<<8|uint32(1+len(body)/16))
	w[11] = ceUpdate
	return append(w, body...)
}

func (c *arenaClient) uarView() int { return abi.MLX5_IB_MMAP_NC_PAGE * mmapCommandPages * pageSize }

// Where FuzzClient scribbles to end the client's process, and its context.
const (
	vanishes = 0xffff
	ends     = 0xfffe
)

// FuzzClient writes what it likes into queues, doorbell records and registers, and ends when it likes: its memory, or the context. The device must
// not be harmed, come to rest, touch nothing but what it was given, and serve others as if there were nobody else.
func FuzzClient(f *testing.F) {
	wqe := sendWQEBytes
	const key = 0x1842
	mr := uint64(arenaBase + mrAt)
	seed := func(typ byte, blocks uint16, sq []byte, recvs uint16, rq []byte) {
		f.Add(typ, blocks, sq, recvs, rq, []byte{})
		// And then there is no memory any more when something is posted, and no client.
		f.Add(typ, blocks, sq, recvs, rq, []byte{vanishes >> 8, vanishes & 0xff, 0, uarSend >> 8, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8, ends >> 8, ends & 0xff, 0})
		f.Add(typ, blocks+1, sq, recvs, rq, []byte{ends >> 8, ends & 0xff, 0})
	}
	seed(2, 1, wqe(opSend, 0, 0x100, segData(mr, 64, key)), 1, append(segData(mr+64, 64, key), dataEnd...))
	seed(2, 1, wqe(opWrite, 0, 0x100, segRemote(mr, key), segInline([]byte("abc"))), 0, nil)
	seed(2, 1, wqe(opRead, 0, 0x100, segRemote(mr, key), segData(mr+100, 50, key)), 0, nil)
	seed(2, 1, wqe(opFetchAdd, 0, 0x100, segRemote(mr, key), segAtomic(1, 2), segData(mr+8, 8, key)), 0, nil)
	seed(2, 3, wqe(opUMR, 0, 0x100, make([]byte, umrCtrlSize+umrMkeySize)), 0, nil)
	seed(2, 200, wqe(opNop, 0, 0x100), 30, nil)
	seed(3, 1, wqe(opSend, 0, 0x100, segData(mr, 0, key)), 1, segData(mr, 0, key))
	seed(4, 2, wqe(opSend, 0, 0x100, make([]byte, avSize), segData(mr, 8, key)), 1, segData(mr, 64, key))
	seed(5, 1, wqe(opSend, 0, firstRaw+1, segEth(0, []byte("to you, from me, a frame")), segData(mr, 100, key)), 1, append(segData(mr+0x1000, 2000, key), dataEnd...))
	seed(5, 2, wqe(opSend, 0, firstRaw+1, segEth(ethL3Checksum|ethL4Checksum, udpFrame), segInline([]byte("abc"))), 1, append(segData(mr+0x1000, 2000, key), dataEnd...))
	f.Fuzz(func(t *testing.T, typ byte, blocks uint16, sq []byte, recvs uint16, rq []byte, more []byte) {
		kind := [4]ib.QPType{ib.UD, ib.RawPacket, ib.RC, ib.UC}[typ%4] // those of the seeds are 2 to 5
		c := newArenaClient(t, kind)
		d := c.d
		defer d.Close()
		other := newBystander(t, d)
		defer other.close()
		copy(c.a.mem[qpAt+0x8000:][:sqOff], rq)
		if kind == ib.RawPacket {
			copy(c.a.mem[qpAt:][:sqOff], rq)
			be.PutUint32(c.a.mem[qpDB:], uint32(recvs))
			copy(c.a.mem[qpAt+rawSQ:][:64*64], sq)
		} else {
			copy(c.a.mem[qpAt+sqOff:][:64*64], sq)
		}
		be.PutUint32(c.a.mem[qpDB+4:], uint32(blocks))
		be.PutUint32(c.a.mem[qpDB+64:], uint32(recvs))
		outside, from := bytes.Clone(c.a.mem[mrAt+0x8000:]), mrAt+0x8000
		c.ring(uarSend, []byte{1})
		rest := func() {
			for range 10000 {
				if !d.Step() {
					return
				}
			}
			t.Fatal("the device does not come to rest")
		}
		rest()
		for over := false; len(more) >= 3 && !over; rest() { // and what a client may scribble over later
			at := int(more[0])<<8 | int(more[1])
			n := min(int(more[2]), len(more)-3)
			switch {
			case at == vanishes:
				c.a.vanish()
			case at == ends:
				if err := c.c.Close(); err != nil {
					t.Fatal(err)
				}
				outside, from, over = bytes.Clone(c.a.mem), 0, true
			case at < pageSize-8:
				c.ring(at&^7, more[3:][:min(n, 8)])
			default:
				copy(c.a.mem[at%0x18000:], more[3:][:n])
			}
			more = more[3+n:]
		}
		other.exchange()
		if !bytes.Equal(outside, c.a.mem[from:]) {
			t.Fatal("memory was written outside of the region, or of a client that has gone")
		}
	})
}

// FuzzIoctl executes what it is given, and each command of what it is given after it has a context. Others are not disturbed.
func FuzzIoctl(f *testing.F) {
	a := &arena{mem: make([]byte, arenaLn)}
	f.Add(command(a, arenaBase+partsAt, abi.IB_USER_VERBS_CMD_ALLOC_PD, make([]byte, 8), nil), []byte{})
	f.Add(command(a, arenaBase+partsAt, abi.IB_USER_VERBS_CMD_CREATE_CQ, make([]byte, 32), make([]byte, 32)), bytesOf(&abi.CreateCQ{CQE: 5}))
	f.Add(command(a, arenaBase+partsAt, abi.IB_USER_VERBS_CMD_CREATE_QP, make([]byte, 56), make([]byte, 56)), bytesOf(&abi.CreateQP{PDHandle: 1, SendCQHandle: 3, RecvCQHandle: 3, QPType: 2}))
	f.Add(command(a, arenaBase+partsAt, abi.IB_USER_VERBS_CMD_MODIFY_QP, make([]byte, 112), nil), bytesOf(&abi.ModifyQP{QPHandle: 4, AttrMask: 1, QPState: 6}))
	f.Add(command(a, arenaBase+partsAt, abi.IB_USER_VERBS_CMD_DESTROY_QP, make([]byte, 16), nil), bytesOf(&abi.DestroyQP{QPHandle: 4}))
	f.Add(command(a, arenaBase+partsAt, abi.IB_USER_VERBS_CMD_REG_MR, make([]byte, 40), nil), bytesOf(&abi.RegMR{Start: arenaBase, HCAVA: arenaBase, Length: 5, PDHandle: 1, AccessFlags: 7}))
	f.Add(command(a, arenaBase+partsAt, extended|abi.IB_USER_VERBS_EX_CMD_CREATE_FLOW, make([]byte, 64), nil), bytesOf(&abi.CreateFlow{QPHandle: 4, FlowAttr: abi.FlowAttr{Port: 1, Size: 40, NumOfSpecs: 1}}))
	f.Add(command(a, arenaBase+partsAt, abi.IB_USER_VERBS_CMD_CREATE_SRQ, make([]byte, 32), make([]byte, 32)), bytesOf(&abi.CreateSRQ{PDHandle: 1, MaxWR: 7, MaxSGE: 2}))
	for k, m := range methods {
		h := make([]byte, headerSize)
		le.PutUint16(h, uint16(headerSize+attrSize*len(m.attrs)))
		le.PutUint16(h[2:], uint16(k>>16))
		le.PutUint16(h[4:], uint16(k))
		le.PutUint16(h[6:], uint16(len(m.attrs)))
		le.PutUint32(h[16:], 1)
		for _, s := range m.attrs {
			b := make([]byte, attrSize)
			le.PutUint16(b, s.id)
			le.PutUint16(b[2:], uint16(s.min))
			le.PutUint64(b[8:], arenaBase+partsAt)
			h = append(h, b...)
		}
		f.Add(h, []byte{})
	}
	f.Fuzz(func(t *testing.T, cmd, parts []byte) {
		c := newArenaClient(t, ib.RC)
		d := c.d
		defer d.Close()
		other := newBystander(t, d)
		defer other.close()
		copy(c.a.mem[partsAt:], parts)
		for len(cmd) >= headerSize {
			n := max(min(int(le.Uint16(cmd)), len(cmd)), headerSize)
			c.c.Ioctl(cmd[:n:n], &c.files)
			c.c.Write(parts, &c.files)
			cmd = cmd[n:]
		}
		for range 100 {
			if !d.Step() {
				break
			}
		}
		other.exchange()
	})
}
