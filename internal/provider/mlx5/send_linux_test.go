//go:build amd64 || arm64

package mlx5

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// unhex is hexadecimal with whatever spaces.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func sge(addr uint64, n uint32) ib.SGE { return ib.SGE{Addr: addr, Length: n, LKey: 0x4200} }

// The bytes of requests of each kind.
func TestSendElements(t *testing.T) {
	for _, c := range []struct {
		name string
		typ  ib.QPType
		wr   ib.SendWR
		want string
	}{
		{"a send of nothing", ib.RC, ib.SendWR{Opcode: ib.OpSend}, `0000000a 00010001 00000000 00000000`},
		{"two elements and an empty one", ib.RC, ib.SendWR{Opcode: ib.OpSend, SGEs: []ib.SGE{sge(0x1000, 5), sge(1, 0), sge(0x2000, 6)}},
			`0000000a 00010003 00000000 00000000 00000005 00004200 0000000000001000 00000006 00004200 0000000000002000`},
		{"send with invalidate", ib.RC, ib.SendWR{Opcode: ib.OpSendWithInv, InvalidateRKey: 0xabcd12, Flags: ib.SendSolicited},
			`00000001 00010001 00000002 00abcd12`},
		{"read, fenced", ib.RC, ib.SendWR{Opcode: ib.OpRDMARead, SGEs: []ib.SGE{sge(0x10, 0x7fffffff)}, RemoteAddr: 0x1122334455667788, RKey: 0x99, Flags: ib.SendFence | ib.SendSignaled},
			`00000010 00010003 00000088 00000000 1122334455667788 00000099 00000000 7fffffff 00004200 0000000000000010`},
		{"compare and swap", ib.RC, ib.SendWR{Opcode: ib.OpAtomicCmpSwap, SGEs: []ib.SGE{sge(0x10, 8)}, RemoteAddr: 0x20, RKey: 0x99, CompareAdd: 5, Swap: 6},
			`00000011 00010004 00000000 00000000 0000000000000020 00000099 00000000 0000000000000006 0000000000000005 00000008 00004200 0000000000000010`},
		{"fetch and add", ib.RC, ib.SendWR{Opcode: ib.OpAtomicFetchAdd, SGEs: []ib.SGE{sge(0x10, 8)}, RemoteAddr: 0x20, RKey: 0x99, CompareAdd: 5, Swap: 6},
			`00000012 00010004 00000000 00000000 0000000000000020 00000099 00000000 0000000000000005 0000000000000000 00000008 00004200 0000000000000010`},
		{"inline write with immediate", ib.UC, ib.SendWR{Opcode: ib.OpRDMAWriteWithImm, Inline: []byte("abcde"), Imm: 0x01020304, RemoteAddr: 0x20, RKey: 0x99},
			`00000009 00010003 00000000 01020304 0000000000000020 00000099 00000000 80000005 61626364 65`},
		{"local invalidate", ib.RC, ib.SendWR{Opcode: ib.OpLocalInv, InvalidateRKey: 0x1234},
			`00000025 00010008 00000000 00001234
			98000000 00000000 0000000020006000 0000000000000000 0000000000000000 0000000000000000 0000000000000000
			40000000 ffffff00 0000000000000000` + strings.Repeat("00", 48)},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, c.typ)
			b.post(c.wr)
			b.wrote(c.name, c.want)
		})
	}
}

// wrote compares the first request in the send queue, and how long it says that it is, with what is to be there in hexadecimal digits.
func (b *bench) wrote(what, want string) {
	b.t.Helper()
	w := unhex(b.t, want)
	sameBytes(b.t, what, b.kq.sq, w)
	if units := int(b.kq.sq[7]); units != (len(w)+15)/16 {
		b.t.Errorf("%d units of %d bytes", units, len(w))
	}
}

// A window is bound to some bytes of a region, and the request behind waits until it is.
func TestBindElements(t *testing.T) {
	b := newBench(t, ib.RC)
	mem := make([]byte, 8192)
	m, err := b.pd.RegisterMR(driver.MRConfig{Mem: mem, Access: ib.AccessLocalWrite | ib.AccessRemote | ib.AccessMWBind, FD: -1})
	if err != nil {
		t.Fatal(err)
	}
	w, err := b.pd.AllocMW()
	if err != nil {
		t.Fatal(err)
	}
	first := w.RKey()
	key := first&^0xff | 0x77
	base := m.(*uverbs.Region).Base
	bind := ib.BindMW{Window: w.Handle(), RKey: key, MRLKey: m.LKey(), Addr: base + 100, Length: 50, Access: ib.AccessRemoteRead | ib.AccessRemoteAtomic}
	b.post(ib.SendWR{Opcode: ib.OpBindMW, Bind: &bind}, ib.SendWR{Opcode: ib.OpSend}, ib.SendWR{Opcode: ib.OpSend},
		ib.SendWR{Opcode: ib.OpLocalInv, InvalidateRKey: key}, ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendFence})
	want := fmt.Sprintf(`00000025 0001000c 00000000 %08x
		b0000000 00040000 00000000203c6041 0000000000000000 0000000000000000 0000000000000000 0000000000000000
		00005000 00010077 0000000000000000 %016x 0000000000000032 `+strings.Repeat("00", 32)+`
		00000032 %08x %016x`, uint32(first), base+100, uint32(m.LKey()), base+100) + strings.Repeat("00", 48)
	sameBytes(t, "bind", b.kq.sq, unhex(t, want))
	sameBytes(t, "behind it", b.kq.sq[192:], unhex(t, `0000030a 00010001 00000020 00000000`))
	sameBytes(t, "behind that", b.kq.sq[256:], unhex(t, `0000040a 00010001 00000000 00000000`))
	sameBytes(t, "behind the invalidate", b.kq.sq[448:], unhex(t, `0000070a 00010001 00000080 00000000`))
	if w.RKey() != key {
		t.Errorf("the window has key %#x, want %#x", w.RKey(), key)
	}
	for what, change := range map[string]struct {
		f    func(*ib.BindMW)
		want error
	}{
		"another window":      {func(x *ib.BindMW) { x.Window++ }, uverbs.ErrNoWindow},
		"another region":      {func(x *ib.BindMW) { x.MRLKey++ }, uverbs.ErrWindowDomains},
		"another key":         {func(x *ib.BindMW) { x.RKey += 256 }, uverbs.ErrWindowKey},
		"nothing":             {func(x *ib.BindMW) { x.Length = 0 }, errWindowSize},
		"beyond the region":   {func(x *ib.BindMW) { x.Length = 8192 - 99 }, errWindowSize},
		"before the region":   {func(x *ib.BindMW) { x.Addr = base - 1 }, errWindowSize},
		"behind it":           {func(x *ib.BindMW) { x.Addr = base + 8193 }, errWindowSize},
		"all of it, and more": {func(x *ib.BindMW) { x.Length = ^uint64(0) }, errWindowSize},
	} {
		x := bind
		change.f(&x)
		n, err := b.qp.PostSend([]ib.SendWR{{Opcode: ib.OpBindMW, Bind: &x}})
		if n != 0 || !errors.Is(err, driver.ErrInvalidWR) {
			t.Errorf("%s: %d, %v", what, n, err)
		}
		mustBe(t, what, err, change.want)
	}
	if w.RKey() != key {
		t.Errorf("a refused bind has changed the key to %#x", w.RKey())
	}
	b.close(w, m)
	readOnly, err := b.pd.RegisterMR(driver.MRConfig{Mem: mem, Access: ib.AccessMWBind, FD: -1})
	if err != nil {
		t.Fatal(err)
	}
	w2, err := b.pd.AllocMW()
	if err != nil {
		t.Fatal(err)
	}
	x := ib.BindMW{Window: w2.Handle(), RKey: w2.RKey() + 1, MRLKey: readOnly.LKey(), Addr: base, Length: 1, Access: ib.AccessRemoteWrite}
	_, err = b.qp.PostSend([]ib.SendWR{{Opcode: ib.OpBindMW, Bind: &x}})
	mustBe(t, "writes to what may not be written", err, errLocalWrite)
	b.close(w2, readOnly)
}

// What is refused is what package driver refuses, for every type, opcode and form of data.
func TestRefusedRequests(t *testing.T) {
	forms := map[string]func(*ib.SendWR){
		"nothing":            func(*ib.SendWR) {},
		"an element of 8":    func(wr *ib.SendWR) { wr.SGEs = []ib.SGE{sge(0, 8)} },
		"an element of 9":    func(wr *ib.SendWR) { wr.SGEs = []ib.SGE{sge(0, 9)} },
		"too many elements":  func(wr *ib.SendWR) { wr.SGEs = make([]ib.SGE, 5) },
		"inline":             func(wr *ib.SendWR) { wr.Inline = make([]byte, 8) },
		"too long inline":    func(wr *ib.SendWR) { wr.Inline = make([]byte, 1<<12) },
		"inline and element": func(wr *ib.SendWR) { wr.Inline, wr.SGEs = make([]byte, 8), []ib.SGE{sge(0, 8)} },
	}
	b := bare(t)
	ah, err := b.pd.CreateAH(ib.AHAttr{Port: 1, SGIDIndex: 1, DGID: ib.GID{1}})
	if err != nil {
		t.Fatal(err)
	}
	defer ah.Close()
	for _, typ := range []ib.QPType{ib.RC, ib.UC, ib.UD} {
		q := b.newQP(typ)
		c := q.Cap()
		for op := range ib.Opcode(20) {
			for form, change := range forms {
				wr := ib.SendWR{Opcode: op, AH: ah.Num()}
				change(&wr)
				want := driver.CheckSendWR(typ, &c, &wr)
				if op == ib.OpBindMW && want == nil {
					continue
				}
				if (op == ib.OpFlush || op == ib.OpAtomicWrite) && typ == ib.RC {
					want = driver.ErrNoPlacement
				}
				_, err := q.PostSend([]ib.SendWR{wr})
				if err != want {
					t.Errorf("%v: %v with %s: %v, want %v", typ, op, form, err, want)
				}
				b.to(q, ib.Reset)
				b.to(q, ib.RTS)
			}
		}
		b.close(q)
	}
	b.with(ib.RC)
	for _, n := range []uint32{1 << 31, 1<<31 + 5, 1<<32 - 1} {
		if n, err := b.qp.PostSend([]ib.SendWR{{Opcode: ib.OpSend, SGEs: []ib.SGE{sge(0, n)}}}); n != 0 || err != errSGELen {
			t.Errorf("a long element: %d, %v", n, err)
		}
		if n, err := b.qp.PostRecv([]ib.RecvWR{{SGEs: []ib.SGE{sge(0, n)}}}); n != 0 || err != errSGELen {
			t.Errorf("a long element to receive: %d, %v", n, err)
		}
	}
	if n, err := b.qp.PostSend([]ib.SendWR{{Opcode: ib.OpBindMW}}); n != 0 || err != driver.ErrNoBind {
		t.Errorf("a bind of nothing: %d, %v", n, err)
	}
	if be.Uint32(b.kq.record[4:]) != 0 {
		t.Error("the device was told of a request that was refused")
	}
}

// How the device is told: a single short request whole, in turns to both halves of the register; several, and long ones, by the first
// word of the last.
func TestDoorbells(t *testing.T) {
	b := newBench(t, ib.RC, func(cfg *driver.QPConfig) { cfg.Cap.MaxInline, cfg.Cap.MaxSendSGE = 300, 16 })
	send := func(n int) ib.SendWR { return ib.SendWR{Opcode: ib.OpSend, Inline: bytes.Repeat([]byte{0x5a}, n)} }
	half := 0
	at := 0 // block
	check := func(what string, whole bool, blocks int) {
		t.Helper()
		reg := b.k.register(b.qp.reg.page, 0, half)
		n := 8
		if whole {
			n = 64 * blocks
		}
		for i := range n { // across the end of the queue
			if reg[i] != b.kq.sq[(at*64+i)%len(b.kq.sq)] {
				t.Fatalf("%s: byte %d at the register is %#x", what, i, reg[i])
			}
		}
		for i := n; i < len(reg); i++ {
			if reg[i] != 0 {
				t.Fatalf("%s: byte %d at the register was written", what, i)
			}
		}
		at += blocks
		clear(reg)
		if got := be.Uint32(b.kq.record[4:]); got != uint32(at) {
			t.Fatalf("%s: doorbell record %d, want %d", what, got, at)
		}
		half ^= 1
	}
	for round := range 40 {
		what := fmt.Sprintf("round %d", round)
		b.post(send(20))
		check(what+": one", true, 1)
		b.post(send(200))
		check(what+": one of 4 blocks", true, 4)
		b.post(send(256))
		check(what+": one of 5", false, 5)
		b.post(ib.SendWR{Opcode: ib.OpSend})
		check(what+": one without data", false, 1)
		if n, err := b.qp.PostSend([]ib.SendWR{send(20), {Opcode: 99}}); n != 1 || err != driver.ErrOpcode {
			t.Fatal(n, err)
		}
		check(what+": one of two", true, 1)
		at += 2
		b.post(send(1), send(1), ib.SendWR{Opcode: ib.OpSend, Inline: []byte{1}, Flags: ib.SendSignaled})
		check(what+": three", false, 1)
		b.kq.complete()
		b.poll(1)
	}
}

// Elements of all sizes, at all places of the queue, are put together again by the device.
func TestElementsRoundTheEnd(t *testing.T) {
	for _, typ := range []ib.QPType{ib.RC, ib.UD} {
		b := newBench(t, typ, func(cfg *driver.QPConfig) { cfg.Cap = ib.QPCap{MaxSendWR: 4, MaxSendSGE: 12, MaxInline: 180} })
		var num ib.AHNum
		head := 16
		if typ == ib.UD {
			ah, err := b.pd.CreateAH(ib.AHAttr{Port: 1, SGIDIndex: 1, DGID: ib.GID{1}, FlowLabel: 9})
			if err != nil {
				t.Fatal(err)
			}
			defer ah.Close()
			num, head = ah.Num(), 64
		}
		for i := range 720 {
			wr := ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, AH: num, RemoteQPN: 5, RemoteQKey: 6}
			want := make([]byte, 0, 200)
			if i%2 == 0 {
				for j := range i % 13 {
					wr.SGEs = append(wr.SGEs, sge(uint64(i), uint32(j+1)))
					want = be.AppendUint64(be.AppendUint32(be.AppendUint32(want, uint32(j+1)), 0x4200), uint64(i))
				}
			} else {
				for j := range i/2%180 + 1 {
					wr.Inline = append(wr.Inline, byte(i+j))
				}
				want = append(be.AppendUint32(want, 1<<31|uint32(len(wr.Inline))), wr.Inline...)
			}
			b.post(wr)
			w := b.kq.complete()[0]
			if got := w[head:][:len(want)]; !bytes.Equal(got, want) || len(w) != head+(len(want)+15)&^15 {
				t.Fatalf("%v: request %d is\n%x, want\n%x in it", typ, i, w, want)
			}
			if wc := b.poll(1)[0]; wc.ID != wr.ID || wc.Status != 0 {
				t.Fatalf("%v: request %d: %+v", typ, i, wc)
			}
		}
	}
}

// As many requests as were granted, and not one more, until completions were polled; unsignalled ones go with the next that has
// one.
func TestQueueFull(t *testing.T) {
	b := newBench(t, ib.RC)
	wr := []ib.SendWR{{Opcode: ib.OpSend, SGEs: []ib.SGE{sge(1, 1)}}}
	limit := b.qp.Cap().MaxSendWR
	if limit < 16 {
		t.Fatal(limit)
	}
	for range 5 {
		for range limit - 1 {
			b.post(wr[0])
		}
		last := wr[0]
		last.Flags, last.ID = ib.SendSignaled, 7
		b.post(last)
		for range 2 {
			if n, err := b.qp.PostSend(wr); n != 0 || err != driver.ErrQueueFull {
				t.Fatalf("%d, %v", n, err)
			}
			b.kq.complete() // that is not enough: its completion has to be polled
		}
		if wc := b.poll(1)[0]; wc.ID != 7 {
			t.Errorf("%+v", wc)
		}
	}
	if n, err := b.qp.PostSend(make([]ib.SendWR, limit+1)); n != 0 && err == nil {
		t.Error(n, err)
	}
	recvs := make([]ib.RecvWR, b.qp.Cap().MaxRecvWR+1)
	if n, err := b.qp.PostRecv(recvs); n != len(recvs)-1 || err != driver.ErrQueueFull {
		t.Errorf("%d receives of %d: %v", n, len(recvs)-1, err)
	}
	if got := be.Uint32(b.kq.record[0:]); got != uint32(len(recvs)-1) {
		t.Errorf("doorbell record %d", got)
	}
}

func TestStates(t *testing.T) {
	b := newBench(t, ib.RC)
	send, recv := []ib.SendWR{{Opcode: ib.OpSend}}, []ib.RecvWR{{}}
	for s := ib.Reset; s <= ib.Err; s++ {
		b.to(b.qp, s)
		_, err := b.qp.PostSend(send)
		if (s < ib.RTS) != errors.Is(err, driver.ErrState) {
			t.Errorf("send in %v: %v", s, err)
		}
		_, err = b.qp.PostRecv(recv)
		if (s == ib.Reset) != errors.Is(err, driver.ErrState) {
			t.Errorf("receive in %v: %v", s, err)
		}
	}
	b.c.Remove()
	_, err := b.qp.PostSend(send)
	mustBe(t, "send", err, driver.ErrDeviceRemoved)
	_, err = b.qp.PostRecv(recv)
	mustBe(t, "receive", err, driver.ErrDeviceRemoved)
	mustBe(t, "arm", b.cq.Arm(false), driver.ErrDeviceRemoved)
	if n := b.cq.Poll(make([]ib.WC, 1)); n != -1 {
		t.Errorf("poll: %d", n)
	}
	mustBe(t, "poll", b.cq.Err(), driver.ErrDeviceRemoved)
}

// Nothing on the data path allocates, errors included.
func TestAllocs(t *testing.T) {
	b := newBench(t, ib.RC)
	wrs := []ib.SendWR{{Opcode: ib.OpRDMAWrite, SGEs: []ib.SGE{sge(1, 64)}, Flags: ib.SendSignaled}, {Opcode: ib.OpSend, Inline: make([]byte, 32), Flags: ib.SendSignaled}}
	bad := []ib.SendWR{{Opcode: ib.OpSend, SGEs: make([]ib.SGE, 99)}}
	recv := []ib.RecvWR{{SGEs: []ib.SGE{sge(1, 64)}}}
	wcs := make([]ib.WC, 8)
	sent, received := uint16(0), uint16(0)
	if n := testing.AllocsPerRun(200, func() {
		if n, err := b.qp.PostSend(wrs); n != 2 {
			t.Fatal(err)
		}
		b.qp.PostSend(bad)
		if n, err := b.qp.PostRecv(recv); n != 1 {
			t.Fatal(err)
		}
		for i, code := range []byte{codeWrite, codeSend} {
			c := b.kq.cqeOf(cqeRequest, sent+uint16(i))
			c[56] = code
			b.kc.add(c)
		}
		b.kc.add(b.kq.cqeOf(cqeRecv, received))
		sent, received = sent+2, received+1
		if n := b.cq.Poll(wcs); n != 3 {
			t.Fatal(n, b.cq.Err())
		}
		b.cq.Poll(wcs)
		if err := b.cq.Arm(true); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// A window is bound to a region of another device's memory as to any.
func TestBindDMABuf(t *testing.T) {
	b := newBench(t, ib.RC)
	m, err := b.pd.RegisterDMABuf(driver.DMABufConfig{FD: 1, Offset: 4096, Length: 8192, IOVA: 0x10000, Access: ib.AccessLocalWrite | ib.AccessRemoteRead | ib.AccessMWBind})
	if err != nil {
		t.Fatal(err)
	}
	o, err := b.pd.AllocMW()
	if err != nil {
		t.Fatal(err)
	}
	bind := ib.BindMW{Window: o.Handle(), RKey: o.RKey() + 1, MRLKey: m.LKey(), Addr: 0x10000 + 8000, Length: 192, Access: ib.AccessRemoteRead}
	b.post(ib.SendWR{Opcode: ib.OpBindMW, Bind: &bind})
	for _, addr := range []uint64{0xffff, 0x10000 + 8001, 0x10000 + 8192, 8000} {
		bind.Addr = addr
		_, err := b.qp.PostSend([]ib.SendWR{{Opcode: ib.OpBindMW, Bind: &bind}})
		mustBe(t, "bytes outside of the region", err, errWindowSize)
	}
	bind.Addr = 0x10000
	b.close(m)
	_, err = b.qp.PostSend([]ib.SendWR{{Opcode: ib.OpBindMW, Bind: &bind}})
	mustBe(t, "a closed region", err, uverbs.ErrWindowDomains)
	b.close(o)
}

// A window that cannot be had leaves nothing behind, and what is said is why.
func TestNoWindow(t *testing.T) {
	b := bare(t)
	b.k.Errs[14] = unix.ENOMEM
	_, err := b.pd.AllocMW()
	mustBe(t, "no memory", err, unix.ENOMEM)
	delete(b.k.Errs, 14)
	o, err := b.pd.AllocMW()
	if err != nil {
		t.Fatal(err)
	}
	b.k.Tweak = func(cmd uint32, out, _ []byte) {
		if cmd == 14 {
			le.PutUint32(out[4:], uint32(o.RKey()))
		}
	}
	if _, err = b.pd.AllocMW(); err == nil || !strings.Contains(err.Error(), "another memory window's") {
		t.Errorf("a number that is in use: %v", err)
	}
	b.k.Errs[16] = unix.EBUSY
	_, err = b.pd.AllocMW()
	mustBe(t, "and it stays", err, driver.ErrBusy)
	mustBe(t, "the window, likewise", o.Close(), driver.ErrBusy)
	delete(b.k.Errs, 16)
	for h, kind := range b.k.Live {
		if kind == "mw" && h != o.Handle() {
			delete(b.k.Live, h)
		}
	}
	b.k.Tweak = nil
	b.close(o)

	b = bare(t, func(k *fakeKernel) { k.Errs[0x80000001] = unix.EIO })
	_, err = b.pd.AllocMW()
	mustBe(t, "a device that has gone", err, driver.ErrDeviceRemoved)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("it is said to have no windows: %v", err)
	}
	b = bare(t, func(k *fakeKernel) {
		k.Tweak = func(cmd uint32, out, _ []byte) {
			if cmd == 0x80000001 {
				le.PutUint32(out[60:], 0)
			}
		}
	})
	_, err = b.pd.AllocMW()
	mustBe(t, "a device without", err, errors.ErrUnsupported)
}

// Binds that fail, or are flushed, leave the window the key that the last one gave it that did not.
func TestFailedBind(t *testing.T) {
	versions(t, func(t *testing.T, b *bench) {
		b.with(ib.RC)
		m, err := b.pd.RegisterMR(driver.MRConfig{Mem: make([]byte, 4096), Access: ib.AccessLocalWrite | ib.AccessRemote | ib.AccessMWBind, FD: -1})
		if err != nil {
			t.Fatal(err)
		}
		var windows [2]driver.MW
		for i := range windows {
			if windows[i], err = b.pd.AllocMW(); err != nil {
				t.Fatal(err)
			}
		}
		first := [2]ib.RKey{windows[0].RKey(), windows[1].RKey()}
		bind := func(i int, add ib.RKey) ib.SendWR {
			return ib.SendWR{Opcode: ib.OpBindMW, Bind: &ib.BindMW{Window: windows[i].Handle(), RKey: first[i] + add, MRLKey: m.LKey(),
				Addr: m.(*uverbs.Region).Base, Length: 1, Access: ib.AccessRemoteRead}}
		}
		keys := func(what string, add0, add1 ib.RKey) {
			t.Helper()
			if got, want := [2]ib.RKey{windows[0].RKey(), windows[1].RKey()}, [2]ib.RKey{first[0] + add0, first[1] + add1}; got != want {
				t.Errorf("%s: %#x, want %#x", what, got, want)
			}
		}
		for round := range ib.RKey(6) { // the numbers of requests go round
			b.post(bind(0, 1), bind(1, 1), ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled})
			b.kq.complete()
			b.poll(1)
			b.post(bind(0, 2), bind(0, 3+round), bind(1, 2), bind(0, 9))
			keys("posted", 9, 2)
			b.kq.takeSend()
			for range 3 {
				_, c := b.kq.takeSend()
				c[55], c[63] = 6, cqeRequestErr<<4
				b.kc.add(c)
			}
			if round%2 == 0 {
				wcs := b.poll(3)
				if wcs[0].Status != ib.WCMWBindErr || wcs[0].Opcode != ib.WCBindMW {
					t.Errorf("%+v", wcs[0])
				}
				keys("the second has failed", 2, 1)
			}
			b.to(b.qp, ib.Reset)
			keys("the second has failed, polled or not", 2, 1)
			b.to(b.qp, ib.RTS)
		}
		b.close(windows[0], windows[1], m)
	})
}
