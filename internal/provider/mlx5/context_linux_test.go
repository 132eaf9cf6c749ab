//go:build amd64 || arm64

package mlx5

import (
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/internal/uverbs/uverbstest"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What the kernel is asked for when a context is made, byte for byte.
func TestContextRequest(t *testing.T) {
	k, _ := newFake(t)
	got := uverbs.Bytes(&k.request)
	if want := unhex(t, "10000000 08000000 00000000 00000000 01000000 00000000 0300000000000000"); !slices.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
}

// A kernel that says what cannot be is refused when the device is opened, with what it said.
func TestBadResponses(t *testing.T) {
	for _, c := range []struct {
		say    string
		change func(*abi.Mlx5AllocUcontextResp)
	}{
		{"response_length = 0", func(r *abi.Mlx5AllocUcontextResp) { r.ResponseLength = 0 }},
		{"response_length = 63", func(r *abi.Mlx5AllocUcontextResp) { r.ResponseLength = 63 }},
		{"response_length = 73", func(r *abi.Mlx5AllocUcontextResp) { r.ResponseLength = 73 }},
		{"max_sq_desc_sz = 0", func(r *abi.Mlx5AllocUcontextResp) { r.MaxSQDescSz = 0 }},
		{"max_sq_desc_sz = 176", func(r *abi.Mlx5AllocUcontextResp) { r.MaxSQDescSz = 176 }},
		{"max_sq_desc_sz = 1023", func(r *abi.Mlx5AllocUcontextResp) { r.MaxSQDescSz = 1023 }},
		{"max_rq_desc_sz = 0", func(r *abi.Mlx5AllocUcontextResp) { r.MaxRQDescSz = 0 }},
		{"max_rq_desc_sz = 24", func(r *abi.Mlx5AllocUcontextResp) { r.MaxRQDescSz = 24 }},
		{"max_send_wqebb = 2", func(r *abi.Mlx5AllocUcontextResp) { r.MaxSendWQEBB = 2 }},
		{"max_send_wqebb = 1000", func(r *abi.Mlx5AllocUcontextResp) { r.MaxSendWQEBB = 1000 }},
		{"max_send_wqebb = 98304", func(r *abi.Mlx5AllocUcontextResp) { r.MaxSendWQEBB = 3 << 15 }},
		{"max_recv_wr = 0", func(r *abi.Mlx5AllocUcontextResp) { r.MaxRecvWR = 0 }},
		{"max_recv_wr = 100", func(r *abi.Mlx5AllocUcontextResp) { r.MaxRecvWR = 100 }},
		{"max_srq_recv_wr = 32767", func(r *abi.Mlx5AllocUcontextResp) { r.MaxSRQRecvWR = 32767 }},
		{"num_ports = 0", func(r *abi.Mlx5AllocUcontextResp) { r.NumPorts = 0 }},
		{"cqe_version = 2", func(r *abi.Mlx5AllocUcontextResp) { r.CQEVersion = 2 }},
		{"bf_reg_size = 64", func(r *abi.Mlx5AllocUcontextResp) { r.BFRegSize = 64 }},
		{"bf_reg_size = 384", func(r *abi.Mlx5AllocUcontextResp) { r.BFRegSize = 384 }},
		{"bf_reg_size = 1024", func(r *abi.Mlx5AllocUcontextResp) { r.BFRegSize = 1024 }},
		{"bf_reg_size = 2147483648", func(r *abi.Mlx5AllocUcontextResp) { r.BFRegSize = 1 << 31 }},
		{"num_uars_per_page = 0", func(r *abi.Mlx5AllocUcontextResp) { r.NumUARsPerPage = 0 }},
		{"num_uars_per_page = 1000", func(r *abi.Mlx5AllocUcontextResp) { r.NumUARsPerPage = 1000 }},
		{"num_uars_per_page = 4294967295", func(r *abi.Mlx5AllocUcontextResp) { r.NumUARsPerPage = 1<<32 - 1 }},
		{"log_uar_size = 30", func(r *abi.Mlx5AllocUcontextResp) { r.LogUARSize = 30 }},
		{"tot_bfregs = 3", func(r *abi.Mlx5AllocUcontextResp) { r.TotBFRegs = 3 }},
		{"tot_bfregs = 514", func(r *abi.Mlx5AllocUcontextResp) { r.TotBFRegs = 514 }},
		{"tot_bfregs = 4294967294", func(r *abi.Mlx5AllocUcontextResp) { r.TotBFRegs = 1<<32 - 2 }},
	} {
		_, _, err := openFake(t, func(k *fakeKernel) { c.change(&k.resp) })
		if err == nil || !strings.Contains(err.Error(), c.say+",") || !strings.Contains(err.Error(), "mlx5_9") {
			t.Errorf("%s: %v", c.say, err)
		}
	}
	// What is more than the formats have room for is cut down.
	r := goodResponse()
	r.MaxSendWQEBB, r.MaxRecvWR, r.MaxSRQRecvWR, r.MaxSQDescSz, r.MaxRQDescSz = 1<<31, 1<<31, 1<<31, 65520, 65520
	i, err := learn(&r)
	if err != nil || i.maxBlocks != 1<<15 || i.maxSlots != 1<<15 || i.maxSRQSlots != 1<<15 || i.maxSend != 63*16 || i.maxRecv != 1<<15 {
		t.Errorf("%+v, %v", i, err)
	}
}

// The doorbell pages that a kernel gives are looked at before they are used, and all are given back.
func TestBadUARs(t *testing.T) {
	for say, tweak := range map[string]func(offset, length []byte){
		"page of 4095 bytes":        func(_, length []byte) { le.PutUint32(length, 4095) },
		"page of 8192 bytes":        func(_, length []byte) { le.PutUint32(length, 8192) },
		"page of 4294967295 bytes":  func(_, length []byte) { le.PutUint32(length, 1<<32-1) },
		"offset 0x123":              func(offset, _ []byte) { le.PutUint64(offset, 0x123) },
		"offset 0xfffffffffffff000": func(offset, _ []byte) { le.PutUint64(offset, 0xfffffffffffff000) },
	} {
		_, _, err := openFake(t, func(k *fakeKernel) {
			k.Tweak = func(cmd uint32, offset, length []byte) {
				if cmd == 0x1008 {
					tweak(offset, length)
				}
			}
		})
		if err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("%s: %v", say, err)
		}
	}
	_, _, err := openFake(t, func(k *fakeKernel) { k.pageID = 1 << 16 })
	if err == nil || !strings.Contains(err.Error(), "16 bits") {
		t.Errorf("a page with a long number: %v", err)
	}
	_, _, err = openFake(t, func(k *fakeKernel) { k.Errs[0x1008] = unix.ENOMEM })
	mustBe(t, "no UAR", err, unix.ENOMEM)
}

// Registers: some have one queue pair each, the others are shared, by those that have least of them.
func TestRegisters(t *testing.T) {
	b := bare(t)
	var list []*qp
	shared := map[*sendReg]int{}
	for i := range 40 {
		q := b.newQP(ib.RC)
		list = append(list, q)
		if got, want := q.reg.shared, i >= dedicatedRegs; got != want {
			t.Errorf("queue pair %d: shared %v", i, got)
		}
		if q.reg.shared {
			shared[q.reg]++
		} else if q.reg.used != 1 {
			t.Errorf("queue pair %d: a register that %d have", i, q.reg.used)
		}
		kq := b.k.qps[q.Handle]
		if flags, page := le.Uint32(kq.request[28:]), le.Uint32(kq.request[36:]); flags != abi.MLX5_QP_FLAG_UAR_PAGE_INDEX || page != q.reg.page {
			t.Errorf("queue pair %d: flags %#x, page %d", i, flags, page)
		}
	}
	for r, n := range shared {
		if n != 4 || r.used != 4 {
			t.Errorf("a register that %d have, or %d", n, r.used)
		}
	}
	if len(shared) != allRegs-dedicatedRegs || len(b.k.pages) != 1+allRegs/2 {
		t.Errorf("%d shared registers, %d pages", len(shared), len(b.k.pages))
	}
	free := list[3].reg
	b.close(list[3])
	if list[3] = b.newQP(ib.RC); list[3].reg != free {
		t.Error("the register of a closed queue pair is not used again")
	}
	b.k.Errs[0x1008] = unix.ENOMEM
	list = append(list, b.newQP(ib.RC))
	for _, q := range list {
		b.close(q)
	}
}

// Without more pages the registers that are there are shared; without any there is an error.
func TestNoMoreRegisters(t *testing.T) {
	b := bare(t)
	b.k.Errs[0x1008] = unix.ENOMEM
	if _, err := b.pd.CreateQP(b.config(ib.RC)); !errors.Is(err, unix.ENOMEM) {
		t.Errorf("%v", err)
	}
	delete(b.k.Errs, 0x1008)
	b.with(ib.RC)
	b.post(ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled})
	b.kq.complete()
	b.poll(1)
}

// On a kernel without UAR objects the registers are mapped when the device is opened, and the kernel chooses among them.
func TestFixedRegisters(t *testing.T) {
	choice := uint32(0)
	b := bare(t, func(k *fakeKernel) {
		k.resp.TotBFRegs = 16
		k.Tweak = func(cmd uint32, _, uhw []byte) {
			if cmd == 24 {
				le.PutUint32(uhw, choice)
			}
		}
	})
	if len(b.k.pages) != 8 || b.kc.flags != 0 {
		t.Errorf("%d pages, the completion queue has flags %d", len(b.k.pages), b.kc.flags)
	}
	if err := b.cq.Arm(false); err != nil || be.Uint32(b.k.pages[0][0x24:]) != b.kc.number {
		t.Errorf("armed: %x, %v", b.k.pages[0][0x20:0x28], err)
	}
	send := ib.SendWR{Opcode: ib.OpSend, Inline: make([]byte, 40), Flags: ib.SendSignaled}
	for _, choice = range []uint32{0, 1, 4, 9, 29} {
		q := b.newQP(ib.RC)
		kq := b.k.qps[q.Handle]
		if le.Uint32(kq.request[28:]) != 0 {
			t.Errorf("flags %#x", le.Uint32(kq.request[28:]))
		}
		for turn := range 4 {
			if n, err := q.PostSend([]ib.SendWR{send}); n != 1 {
				t.Fatal(err)
			}
			half, n := turn&1, 64
			if choice == 0 { // shared by many, and without BlueFlame
				half, n = 0, 8
			}
			reg := b.k.register(choice/4, int(choice%4), half)
			sameBytes(t, "the register", reg, kq.sq[64*turn:][:n])
			if n == 8 && be.Uint64(reg[8:]) != 0 {
				t.Error("more than a word was written")
			}
			clear(reg)
		}
		b.close(q)
	}
	choice = 32
	if _, err := b.pd.CreateQP(b.config(ib.RC)); !errors.Is(err, ErrDevice) || !strings.Contains(err.Error(), "register 32 of 32") {
		t.Errorf("a register that is not there: %v", err)
	}
}

// A device without BlueFlame is told by single words.
func TestNoBlueFlame(t *testing.T) {
	b := bare(t, func(k *fakeKernel) { k.resp.BFRegSize = 0 }).with(ib.RC)
	b.post(ib.SendWR{Opcode: ib.OpSend, Inline: make([]byte, 40)})
	reg := b.k.register(b.k.nc, 0, 0)
	sameBytes(t, "the register", reg, b.kq.sq[:8])
	if be.Uint64(reg[8:]) != 0 {
		t.Error("more than a word was written")
	}
}

// What the kernel does not list among the device's features is found out, and once.
func TestCapsFoundOut(t *testing.T) {
	const getContext, regDMABuf = 0x00030000, abi.UVERBS_METHOD_REG_DMABUF_MR<<16 | abi.UVERBS_OBJECT_MR
	for _, x := range []struct {
		dmaBuf   syscall.Errno
		optional byte
		want     ib.DeviceCaps
	}{
		{unix.EBADF, 1, ib.CapDMABuf | ib.CapRelaxedOrdering},
		{unix.EBADF, 0, ib.CapDMABuf},
		{unix.EOPNOTSUPP, 1, ib.CapRelaxedOrdering},
		{unix.EPROTONOSUPPORT, 0, 0},
		{unix.EINVAL, 0, 0},
	} {
		asked := 0
		_, c := newFake(t, func(k *fakeKernel) {
			method := k.Method
			k.Method = func(id uint32, a uverbstest.Attrs) syscall.Errno {
				switch e := method(id, a); id {
				case getContext:
					a[0].Data[0], a[1].Data[0] = 1, x.optional // num_comp_vectors, core_support
					return 0
				case regDMABuf:
					asked++
					return x.dmaBuf
				default:
					return e
				}
			}
		})
		for range 2 {
			a, err := c.QueryDevice()
			if got := a.Caps & (ib.CapDMABuf | ib.CapRelaxedOrdering); got != x.want || err != nil || asked != 1 {
				t.Errorf("%+v: %v, %v, asked %d times", x, got, err, asked)
			}
		}
	}
}

// Queues are as large as was asked for, or it is said why they cannot be.
func TestSizes(t *testing.T) {
	b := bare(t)
	a, err := b.c.QueryDevice()
	if err != nil {
		t.Fatal(err)
	}
	if want := ib.CapUC | ib.CapUD | ib.CapResizeCQ | ib.CapMW2 | ib.CapSRQ | ib.CapAtomic | ib.CapImm; !a.Caps.Has(want) || a.MaxInline < 512 || a.MaxSGE != 30 {
		t.Errorf("%+v", a)
	}
	for _, typ := range []ib.QPType{ib.RC, ib.UC, ib.UD} {
		for _, c := range []ib.QPCap{
			{}, {MaxSendWR: 1}, {MaxRecvWR: 1}, {MaxSendWR: 1, MaxRecvWR: 1, MaxSendSGE: a.MaxSGE, MaxRecvSGE: a.MaxSGE, MaxInline: a.MaxInline},
			{MaxSendWR: 100, MaxRecvWR: 100, MaxSendSGE: 1, MaxRecvSGE: 1}, {MaxSendWR: 5000, MaxRecvWR: 32768, MaxSendSGE: 2, MaxRecvSGE: 3, MaxInline: 33},
		} {
			q, err := b.pd.CreateQP(b.config(typ, func(cfg *driver.QPConfig) { cfg.Cap = c }))
			if err != nil {
				t.Errorf("%v: %+v: %v", typ, c, err)
				continue
			}
			got := q.Cap()
			if got.MaxSendWR < c.MaxSendWR || got.MaxRecvWR < c.MaxRecvWR || got.MaxSendSGE < c.MaxSendSGE || got.MaxInline < c.MaxInline ||
				c.MaxRecvWR > 0 && got.MaxRecvSGE < c.MaxRecvSGE {
				t.Errorf("%v: %+v of %+v", typ, got, c)
			}
			b.close(q)
		}
		for say, c := range map[string]ib.QPCap{
			"negative":        {MaxSendWR: -1},
			"64 SGEs a send":  {MaxSendWR: 1, MaxSendSGE: 64},
			"inline data":     {MaxSendWR: 1, MaxInline: 2000},
			"send requests":   {MaxSendWR: 40000},
			"blocks":          {MaxSendWR: 10923, MaxSendSGE: 12},
			"SGEs a receive":  {MaxRecvWR: 1, MaxRecvSGE: 33},
			"40000 receives:": {MaxRecvWR: 40000},
		} {
			_, err := b.pd.CreateQP(b.config(typ, func(cfg *driver.QPConfig) { cfg.Cap = c }))
			if err == nil && !(say == "blocks" && typ == ib.UD) || err != nil && !strings.Contains(err.Error(), say) && say != "blocks" {
				t.Errorf("%v: %s: %v", typ, say, err)
			}
		}
	}
	if _, err := b.pd.CreateQP(b.config(9)); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("a type that is not known: %v", err)
	}
	for _, n := range []int{0, -5, 1 << 22} {
		if _, err := b.c.CreateCQ(driver.CQConfig{Entries: n}); err == nil {
			t.Errorf("a completion queue of %d entries", n)
		}
	}
}

// What is made of objects that the kernel describes wrongly, or refuses, is taken back.
func TestBadObjects(t *testing.T) {
	b := bare(t)
	for name, c := range map[string]struct {
		cmd   uint32
		tweak func(out, uhw []byte)
		make  func() error
		want  error
	}{
		"completion queue of another size": {18, func(out, _ []byte) { le.PutUint32(out[4:], 62) }, b.makeCQ, ErrDevice},
		"completion queue, long number":    {18, func(_, uhw []byte) { le.PutUint32(uhw, 1<<24) }, b.makeCQ, ErrDevice},
		"queue pair, long number":          {24, func(out, _ []byte) { le.PutUint32(out[4:], 1<<24) }, b.makeQP, ErrDevice},
		"shared queue of another size":     {32, func(out, _ []byte) { le.PutUint32(out[4:], 6) }, b.makeSRQ, ErrDevice},
		"shared queue without a number":    {32, func(_, uhw []byte) { le.PutUint32(uhw, 0) }, b.makeSRQ, ErrDevice},
		"no completion queue":              {18, nil, b.makeCQ, unix.ENOMEM},
		"no queue pair":                    {24, nil, b.makeQP, unix.ENOMEM},
		"no shared queue":                  {32, nil, b.makeSRQ, unix.ENOMEM},
	} {
		if c.tweak == nil {
			b.k.Errs[c.cmd] = unix.ENOMEM
		}
		b.k.Tweak = func(cmd uint32, out, uhw []byte) {
			if cmd == c.cmd && c.tweak != nil {
				c.tweak(out, uhw)
			}
		}
		mustBe(t, name, c.make(), c.want)
		b.k.Tweak = nil
		delete(b.k.Errs, c.cmd)
	}
	if b.c.qps.full != 0 {
		t.Errorf("%d queue pairs are left", b.c.qps.full)
	}
}

func (b *bench) makeCQ() error {
	_, err := b.c.CreateCQ(driver.CQConfig{Entries: 63})
	return err
}

func (b *bench) makeQP() error {
	_, err := b.pd.CreateQP(b.config(ib.RC))
	return err
}

func (b *bench) makeSRQ() error {
	_, err := b.pd.CreateSRQ(driver.SRQConfig{MaxWR: 7, MaxSGE: 1})
	return err
}

// A queue pair whose kernel has given another's number, in completions that go by number.
func TestNumberTwice(t *testing.T) {
	b := bare(t, version0).with(ib.RC)
	b.k.Tweak = func(cmd uint32, out, _ []byte) {
		if cmd == 24 {
			le.PutUint32(out[4:], b.kq.number)
		}
	}
	mustBe(t, "the second", b.makeQP(), ErrDevice)
	b.post(ib.SendWR{ID: 1, Opcode: ib.OpSend, Flags: ib.SendSignaled})
	b.kq.complete()
	b.poll(1)
}

// The kernel refuses to end a queue that is in use: it goes on.
func TestBusy(t *testing.T) {
	b := newBench(t, ib.RC)
	for _, cmd := range []uint32{20, 27} {
		b.k.Errs[cmd] = unix.EBUSY
	}
	mustBe(t, "the completion queue", b.cq.Close(), driver.ErrBusy)
	mustBe(t, "the queue pair", b.qp.Close(), driver.ErrBusy)
	b.post(ib.SendWR{ID: 1, Opcode: ib.OpSend, Flags: ib.SendSignaled})
	b.kq.complete()
	b.poll(1)
	clear(b.k.Errs)
}

// Handles of destinations, on both link layers.
func TestAddressVectors(t *testing.T) {
	attr := ib.AHAttr{Port: 1, SGIDIndex: 1, DGID: ib.GID{0xfd, 15: 2}, HopLimit: 64, TrafficClass: 3, FlowLabel: 0x12345, SL: 5, DLID: 9}
	for _, c := range []struct {
		name   string
		link   byte
		change func(*ib.AHAttr)
		want   string // from byte 12 on
	}{
		{"RoCE v2", 2, func(*ib.AHAttr) {}, "0a00 e341 00000000 020000000009 03 40 00112345 fd000000000000000000000000000002"},
		{"RoCE v1", 2, func(a *ib.AHAttr) { a.SGIDIndex = 0 }, "0a00 0000 00000000 020000000009 03 40 00012345 fd000000000000000000000000000002"},
		{"InfiniBand", 1, func(a *ib.AHAttr) { a.DGID = ib.GID{} }, "0500 0009 00000000 000000000000 00 00 00000000 00000000000000000000000000000000"},
		{"InfiniBand, beyond the subnet", 1, func(*ib.AHAttr) {}, "0500 0009 00000000 000000000000 03 40 40112345 fd000000000000000000000000000002"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := bare(t, func(k *fakeKernel) { k.link = c.link }).with(ib.UD)
			a := attr
			c.change(&a)
			h, err := b.pd.CreateAH(a)
			if err != nil {
				t.Fatal(err)
			}
			b.post(ib.SendWR{Opcode: ib.OpSend, AH: h.Num(), RemoteQPN: 0x654321, RemoteQKey: 0x80000001})
			sameBytes(t, "the element", b.kq.sq, unhex(t, "0000000a 00010004 00000000 00000000 80000001 00000000 80654321"+c.want))
			b.close(h)
			if n, err := b.qp.PostSend([]ib.SendWR{{Opcode: ib.OpSend, AH: h.Num()}}); n != 0 || err != driver.ErrNoAH {
				t.Errorf("a closed handle: %d, %v", n, err)
			}
		})
	}
	b := bare(t)
	for say, a := range map[string]ib.AHAttr{"no port 2": {Port: 2}, "no port 0": {}, "no GID at index 7": {Port: 1, SGIDIndex: 7}} {
		if _, err := b.pd.CreateAH(a); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("%s: %v", say, err)
		}
	}
	// Of two ports, one that cannot be asked concerns only who wants it.
	b = bare(t, func(k *fakeKernel) { k.resp.NumPorts, k.badPort = 2, 2 })
	h, err := b.pd.CreateAH(attr)
	if err != nil {
		t.Fatal(err)
	}
	b.close(h)
	other := attr
	other.Port = 2
	_, err = b.pd.CreateAH(other)
	mustBe(t, "a port that fails", err, unix.EIO)
	b.k.mac = [6]byte{}
	_, err = b.pd.CreateAH(attr)
	mustBe(t, "no MAC address", err, ErrDevice)
	b = bare(t, func(k *fakeKernel) { k.resp.CmdsSuppUHW = 0 })
	_, err = b.pd.CreateAH(attr)
	mustBe(t, "an old kernel", err, errors.ErrUnsupported)
}

// The source port of RoCEv2 packets is in the range that it must be in, and the same for the same label.
func TestUDPSource(t *testing.T) {
	seen := map[uint16]bool{}
	for range 100 {
		p := udpSource(0)
		seen[p] = true
		if p < 0xc000 {
			t.Errorf("%#x", p)
		}
	}
	if len(seen) < 2 {
		t.Error("always the same port")
	}
	for label, want := range map[uint32]uint16{1: 0xc001, 0x4000: 0xc001, 0xfffff: 0xc000 | 0x3fff ^ 0x3f, 0x100001: 0xc001} {
		if got := udpSource(label); got != want {
			t.Errorf("label %#x: %#x, want %#x", label, got, want)
		}
	}
}

// Numbers are used again late, and a table does not grow while it has free ones.
func TestTable(t *testing.T) {
	var x table[int]
	v := new(int)
	first, err := x.add(v)
	if err != nil || first != 1 || x.get(1) != v || x.get(2) != nil || x.get(1<<24) != nil {
		t.Fatal(first, err)
	}
	x.remove(first)
	for i := range 3 * 4096 {
		n, err := x.add(v)
		if err != nil || n == 0 || n >= 4096 {
			t.Fatalf("%d: %d, %v", i, n, err)
		}
		x.remove(n)
		if i < 4000 && n == first {
			t.Fatalf("%d is used again after %d", n, i)
		}
	}
	all := map[uint32]bool{}
	for range 10000 {
		n, err := x.add(v)
		if err != nil || all[n] {
			t.Fatal(n, err)
		}
		all[n] = true
	}
	x.room = 1 << 24
	x.full = 1<<24 - 1
	if _, err := x.add(v); err == nil {
		t.Error("more than there are numbers")
	}
}

// The kernel gives the number of a queue pair that it has destroyed to the next at once, while completions of it are queued.
func TestNumberAgain(t *testing.T) {
	versions(t, func(t *testing.T, b *bench) {
		b.with(ib.RC)
		old := b.newQP(ib.RC)
		number := b.k.qps[old.Handle].number
		old.PostSend([]ib.SendWR{{ID: 99, Opcode: ib.OpSend, Flags: ib.SendSignaled}})
		b.k.qps[old.Handle].complete()
		type made struct {
			q   driver.QP
			err error
		}
		next, ended := make(chan made, 1), false
		b.k.Tweak = func(cmd uint32, out, _ []byte) {
			switch cmd {
			case 24:
				le.PutUint32(out[4:], number)
				for _, q := range b.k.qps {
					if q.srq == nil && q != b.kq && len(q.states) == 0 {
						q.number = number
					}
				}
			case 27:
				if ended {
					return
				}
				ended = true
				if n, err := old.PostSend([]ib.SendWR{{Opcode: ib.OpSend}}); n != 0 || err != driver.ErrClosed {
					t.Errorf("a doorbell for the number: %d, %v", n, err)
				}
				b.k.Mu.Unlock()
				go func() {
					q, err := b.pd.CreateQP(b.config(ib.RC))
					next <- made{q, err}
				}()
				select {
				case m := <-next:
					next <- m
				case <-time.After(20 * time.Millisecond):
				}
				b.k.Mu.Lock()
			}
		}
		b.close(old)
		m := <-next
		b.k.Tweak = nil
		if m.err != nil {
			t.Fatal(m.err)
		}
		q := m.q.(*qp)
		b.to(q, ib.RTS)
		q.PostSend([]ib.SendWR{{ID: 1, Opcode: ib.OpSend, Flags: ib.SendSignaled}})
		b.k.qps[q.Handle].complete()
		if wc := b.poll(1)[0]; wc.ID != 1 || wc.QPN != q.QPN() || uint32(wc.QPN) != number {
			t.Errorf("%+v", wc)
		}
		b.close(q)
	})
}

// What the kernel describes wrongly, and then does not destroy, keeps what the device may use of it: nobody else is given that.
func TestBadObjectsThatStay(t *testing.T) {
	for name, c := range map[string]struct {
		create, destroy uint32
		tweak           func(out, uhw []byte)
		make            func(*bench) error
	}{
		"completion queue": {18, 20, func(out, _ []byte) { le.PutUint32(out[4:], 62) }, (*bench).makeCQ},
		"queue pair":       {24, 27, func(out, _ []byte) { le.PutUint32(out[4:], 1<<24) }, (*bench).makeQP},
		"shared queue":     {32, 35, func(out, _ []byte) { le.PutUint32(out[4:], 6) }, (*bench).makeSRQ},
	} {
		t.Run(name, func(t *testing.T) {
			b := bare(t)
			records, queuePairs := 0, 0
			b.k.Tweak = func(cmd uint32, out, uhw []byte) {
				if cmd == c.create {
					c.tweak(out, uhw)
					records = len(b.c.records.free) // nobody else takes one
				}
			}
			b.k.Errs[c.destroy] = unix.EBUSY
			err := c.make(b)
			mustBe(t, "it", err, ErrDevice)
			mustBe(t, "that it stays", err, driver.ErrBusy)
			b.k.Tweak = nil
			clear(b.k.Errs)
			if c.create == 24 {
				queuePairs = 1
			}
			if len(b.c.records.free) != records || len(b.c.left) != 1 || b.c.qps.full != queuePairs {
				t.Errorf("%d records are free, %d were; %d memories stay; %d numbers of queue pairs are in use", len(b.c.records.free), records,
					len(b.c.left), b.c.qps.full)
			}
			b.c.left[0][0]++ // it is mapped
			if q := b.newQP(ib.RC); queuePairs > 0 && q.reg == b.c.uars.dedicated[0] {
				t.Error("its doorbell register is another's, too")
			} else {
				b.close(q)
			}
			for h := range b.k.Live { // what the kernel has been told to forget, at the end of the context
				if o := b.k.Live[h]; o != "pd" && o != "uar" && h != b.cq.handle {
					delete(b.k.Live, h)
				}
			}
		})
	}
}

// A GID index has 8 bits in commands and work requests, and a port may have fewer slots: others are refused, not cut short.
func TestGIDIndexes(t *testing.T) {
	for _, link := range []byte{1, 2} {
		for _, c := range []struct {
			slots uint32
			index int
			ok    bool
		}{{256, 0, true}, {256, 1, true}, {256, -1, false}, {256, 256, false}, {1000, 256, false}, {1000, 257, false}, {1, 1, false}, {1, 0, true}} {
			b := bare(t, func(k *fakeKernel) { k.link, k.gids = link, c.slots })
			to := ib.AHAttr{Port: 1, SGIDIndex: c.index, DGID: ib.GID{0xfd, 15: 2}}
			h, err := b.pd.CreateAH(to)
			if (err == nil) != c.ok || err != nil && !strings.Contains(err.Error(), " index ") {
				t.Errorf("link %d, index %d of %d: %v", link, c.index, c.slots, err)
			}
			if err == nil {
				b.close(h)
			}
			b.with(ib.RC)
			err = b.qp.Modify(t.Context(), &ib.QPAttr{AH: to}, ib.AttrAV)
			if (err == nil) != c.ok || err != nil && !strings.Contains(err.Error(), " index ") {
				t.Errorf("link %d, queue pair, index %d of %d: %v", link, c.index, c.slots, err)
			}
		}
	}
	// Within a subnet of InfiniBand no GID is used.
	b := bare(t, func(k *fakeKernel) { k.link, k.gids = 1, 1 })
	h, err := b.pd.CreateAH(ib.AHAttr{Port: 1, SGIDIndex: 5, DLID: 9})
	if err != nil {
		t.Fatal(err)
	}
	b.close(h)
}
