package mlx5emu

import (
	"bytes"
	"errors"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// An arena is the memory of a client that does not exist: from base on, and nothing else. What is outside is an error.
type arena struct {
	mu  sync.Mutex
	mem []byte
}

const arenaBase = 0x10000

var errOutside = errors.New("outside of the client's memory")

func (a *arena) at(va uint64, n int) ([]byte, error) {
	off := va - arenaBase
	if off > uint64(len(a.mem)) || uint64(n) > uint64(len(a.mem))-off {
		return nil, errOutside
	}
	return a.mem[off:][:n], nil
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
	_, err := a.at(va, int(n))
	return err
}

func (a *arena) Register(pd *softnic.PD, start, length, iova uint64, access ib.Access) (driver.MR, error) {
	if length > 1<<30 {
		return nil, unix.EFAULT
	}
	b, err := a.at(start, int(length))
	if err != nil {
		return nil, unix.EFAULT
	}
	return pd.RegisterMRAt(driver.MRConfig{Mem: b, Access: access, FD: -1}, iova)
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
	cqAt    = 0x4000
	qpAt    = 0x8000
	mrAt    = 0x20000
	arenaLn = 0x40000
	rawSQ   = 0x1000 // behind the receives: sends of raw packet queue pairs
)

// An arenaClient drives a device out of an arena: a client whose every byte a fuzzer may choose.
type arenaClient struct {
	t     testing.TB
	a     *arena
	c     *Context
	files noFiles
	key   uint32
	qpn   [2]uint32
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

// newArenaClient makes two queue pairs that are connected with each other, on one CQ, with a region.
func newArenaClient(t testing.TB, typ ib.QPType) (*Device, *arenaClient) {
	d, err := NewDevice(Config{Manual: true, Numbered: true})
	if err != nil {
		t.Fatal(err)
	}
	a := &arena{mem: make([]byte, arenaLn)}
	ctx, err := d.Open(a)
	if err != nil {
		t.Fatal(err)
	}
	c := &arenaClient{t: t, a: a, c: ctx}
	c.must(abi.IB_USER_VERBS_CMD_GET_CONTEXT, make([]byte, 8), bytesOf(&abi.Mlx5AllocUcontextReqV2{TotalNumBFRegs: 4, NumLowLatencyBFRegs: 1, MaxCQEVersion: 1}))
	pd := le.Uint32(c.must(abi.IB_USER_VERBS_CMD_ALLOC_PD, make([]byte, 8), nil))
	r := c.must(abi.IB_USER_VERBS_CMD_REG_MR, bytesOf(&abi.RegMR{Start: arenaBase + mrAt, HCAVA: arenaBase + mrAt, Length: 0x8000, PDHandle: pd, AccessFlags: uint32(everything | ib.AccessMWBind)}), nil)
	c.key = le.Uint32(r[4:])
	cq := le.Uint32(c.must(abi.IB_USER_VERBS_CMD_CREATE_CQ, bytesOf(&abi.CreateCQ{CQE: 127, CompChannel: -1}),
		bytesOf(&abi.Mlx5CreateCQ{BufAddr: arenaBase + cqAt, DBAddr: arenaBase + 0x800, CQESize: 64})))
	for i := range 2 {
		at := uint64(arenaBase + qpAt + i*0x8000)
		u := abi.Mlx5CreateQP{BufAddr: at, DBAddr: arenaBase + 0x840 + uint64(i)*64, SQWQECount: 64, RQWQECount: 16, RQWQEShift: 5, Uidx: uint32(i), Flags: abi.MLX5_QP_FLAG_BFREG_INDEX, BFRegIndex: 1}
		if typ == ib.RawPacket {
			u.SQBufAddr = at + rawSQ
			u.Flags |= selfFlags
		}
		r := c.must(abi.IB_USER_VERBS_CMD_CREATE_QP, bytesOf(&abi.CreateQP{PDHandle: pd, SendCQHandle: cq, RecvCQHandle: cq, MaxSendWR: 8, MaxRecvWR: 8, MaxSendSGE: 2, MaxRecvSGE: 2, QPType: uint8(typ)}),
			bytesOf(&u))
		h := le.Uint32(r)
		c.qpn[i] = le.Uint32(r[4:])
		peer := 0x100 + uint32(1-i)
		for _, s := range []ib.QPState{ib.Init, ib.RTR, ib.RTS} {
			m := abi.ModifyQP{QPHandle: h, QPState: uint8(s), AttrMask: uint32(changes[typ][[2]ib.QPState{s - 1, s}].need | ib.AttrState),
				QPAccessFlags: uint32(ib.AccessRemote), QKey: 1, PathMTU: 3, DestQPNum: peer, PortNum: 1, MaxRdAtomic: 2, MaxDestRdAtomic: 2, Timeout: 10, RetryCnt: 1, RNRRetry: 1,
				Dest: abi.QPDest{DGID: d.nic.GID(), IsGlobal: 1, PortNum: 1}}
			c.must(abi.IB_USER_VERBS_CMD_MODIFY_QP, bytesOf(&m), nil)
		}
		if typ == ib.RawPacket {
			rule := abi.CreateFlow{QPHandle: h, FlowAttr: abi.FlowAttr{Type: uint32(i), Port: 1}} // all frames, and the rest
			c.must(extended|abi.IB_USER_VERBS_EX_CMD_CREATE_FLOW, bytesOf(&rule), nil)
		}
	}
	return d, c
}

// pages of doorbells: static, the first.
func (c *arenaClient) ring(at int, word []byte) { copy(c.c.pages.mem[c.uarView()+at:], word) }

func (c *arenaClient) uarView() int { return abi.MLX5_IB_MMAP_NC_PAGE * mmapCommandPages * pageSize }

// FuzzClient writes what it likes into queues, doorbell records and registers. The device must not be harmed, come to rest, and touch
// nothing but what it was given.
func FuzzClient(f *testing.F) {
	wqe := func(op byte, idx uint16, qpn uint32, rest ...[]byte) []byte {
		body := bytes.Join(rest, nil)
		w := make([]byte, 16, 64)
		be.PutUint32(w, uint32(idx)<<8|uint32(op))
		be.PutUint32(w[4:], qpn<<8|uint32(1+len(body)/16))
		w[11] = ceUpdate
		return append(w, body...)
	}
	const key = 0x1842
	mr := uint64(arenaBase + mrAt)
	seed := func(typ byte, blocks uint16, sq []byte, recvs uint16, rq []byte) {
		f.Add(typ, blocks, sq, recvs, rq, []byte{})
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
		d, c := newArenaClient(t, kind)
		defer d.Close()
		const sqOff = 16 << 5
		copy(c.a.mem[qpAt+0x8000:][:sqOff], rq)
		if kind == ib.RawPacket {
			copy(c.a.mem[qpAt:][:sqOff], rq)
			be.PutUint32(c.a.mem[0x840:], uint32(recvs))
			copy(c.a.mem[qpAt+rawSQ:][:64*64], sq)
		} else {
			copy(c.a.mem[qpAt+sqOff:][:64*64], sq)
		}
		be.PutUint32(c.a.mem[0x840+4:], uint32(blocks))
		be.PutUint32(c.a.mem[0x880:], uint32(recvs))
		outside := bytes.Clone(c.a.mem[mrAt+0x8000:])
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
		for len(more) > 4 { // and what a client may scribble over later
			at := int(more[0])<<8 | int(more[1])
			switch n := min(int(more[2]), len(more)-3); {
			case at < pageSize-8:
				c.ring(at&^7, more[3:][:min(n, 8)])
				more = more[3+n:]
			default:
				copy(c.a.mem[at%0x18000:], more[3:][:n])
				more = more[3+n:]
			}
			rest()
		}
		if !bytes.Equal(outside, c.a.mem[mrAt+0x8000:]) {
			t.Fatal("memory outside of the region was written")
		}
	})
}

// FuzzIoctl executes what it is given, and each command of what it is given after it has a context.
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
		d, c := newArenaClient(t, ib.RC)
		defer d.Close()
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
	})
}
