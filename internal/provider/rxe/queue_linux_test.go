package rxe

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Every kind of send request, byte by byte. What is not listed must be zero, although the slot was used before: the kernel
// keeps its own notes there.
func TestSendElements(t *testing.T) {
	sges := []ib.SGE{{Addr: 0x1000, Length: 0x100, LKey: 0x301}, {Addr: 0x2000, Length: 0x23, LKey: 0x402}}
	one := sges[:1]
	twoSGEs := []field{{184, 4, 0x123}, {188, 4, 0x123}, {196, 4, 2}, {208, 8, 0x1000}, {216, 4, 0x100}, {220, 4, 0x301}, {224, 8, 0x2000}, {232, 4, 0x23}, {236, 4, 0x402}}
	oneSGE := []field{{184, 4, 0x100}, {188, 4, 0x100}, {196, 4, 1}, {208, 8, 0x1000}, {216, 4, 0x100}, {220, 4, 0x301}}
	eight := []field{{184, 4, 8}, {188, 4, 8}, {196, 4, 1}, {208, 8, 0x1000}, {216, 4, 8}, {220, 4, 0x301}}
	eightSGE := []ib.SGE{{Addr: 0x1000, Length: 8, LKey: 0x301}}
	fiveInline := []field{{184, 4, 5}, {188, 4, 5}, {208, 1, 'h'}, {209, 4, 'e' | 'l'<<8 | 'l'<<16 | 'o'<<24}}
	hello := []byte("hello")
	rdma := []field{{24, 8, 0x7f0012345678}, {32, 4, 0xabcd}, {152, 8, 0x7f0012345678}}
	target := func(wr ib.SendWR) ib.SendWR { wr.RemoteAddr, wr.RKey = 0x7f0012345678, 0xabcd; return wr }
	all := func(parts ...[]field) (f []field) {
		for _, p := range parts {
			f = append(f, p...)
		}
		return f
	}
	for _, c := range []struct {
		name string
		typ  ib.QPType
		wr   ib.SendWR
		want []field // besides the ID
	}{
		{"SEND", ib.RC, ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: sges}, all([]field{{12, 4, 2}, {16, 4, 2}}, twoSGEs)},
		{"SEND of nothing", ib.RC, ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendFence | ib.SendSolicited}, []field{{12, 4, 2}, {16, 4, 5}}},
		{"SEND inline", ib.RC, ib.SendWR{Opcode: ib.OpSend, Inline: hello}, all([]field{{12, 4, 2}, {16, 4, 8}}, fiveInline)},
		{"SEND_WITH_IMM", ib.UC, ib.SendWR{Opcode: ib.OpSendWithImm, Imm: 0x01020304, SGEs: one}, all([]field{{12, 4, 3}, {20, 4, 0x04030201}}, oneSGE)},
		{"SEND_WITH_INV", ib.RC, ib.SendWR{Opcode: ib.OpSendWithInv, InvalidateRKey: 0x01020304, SGEs: one}, all([]field{{12, 4, 9}, {20, 4, 0x01020304}}, oneSGE)},
		{"WRITE", ib.RC, target(ib.SendWR{Opcode: ib.OpRDMAWrite, SGEs: sges}), all(rdma, twoSGEs)},
		{"WRITE_WITH_IMM inline", ib.UC, target(ib.SendWR{Opcode: ib.OpRDMAWriteWithImm, Imm: 0xa, Inline: hello}), all([]field{{12, 4, 1}, {16, 4, 8}, {20, 4, 0x0a000000}}, rdma, fiveInline)},
		{"READ", ib.RC, target(ib.SendWR{Opcode: ib.OpRDMARead, SGEs: sges}), all([]field{{12, 4, 4}}, rdma, twoSGEs)},
		{"CMP_SWAP", ib.RC, target(ib.SendWR{Opcode: ib.OpAtomicCmpSwap, CompareAdd: 0x1111, Swap: 0x2222, SGEs: eightSGE}),
			all([]field{{12, 4, 5}, {24, 8, 0x7f0012345678}, {32, 8, 0x1111}, {40, 8, 0x2222}, {48, 4, 0xabcd}, {152, 8, 0x7f0012345678}}, eight)},
		{"FETCH_ADD", ib.RC, target(ib.SendWR{Opcode: ib.OpAtomicFetchAdd, CompareAdd: 0x1111, SGEs: eightSGE}),
			all([]field{{12, 4, 6}, {24, 8, 0x7f0012345678}, {32, 8, 0x1111}, {48, 4, 0xabcd}, {152, 8, 0x7f0012345678}}, eight)},
		{"LOCAL_INV", ib.RC, ib.SendWR{Opcode: ib.OpLocalInv, InvalidateRKey: 0xdddd01}, []field{{12, 4, 7}, {20, 4, 0xdddd01}}},
		{"SEND of a datagram", ib.UD, ib.SendWR{Opcode: ib.OpSend, AH: 77, RemoteQPN: 0x55, RemoteQKey: 0x66, SGEs: one},
			all([]field{{12, 4, 2}, {24, 4, 0x55}, {28, 4, 0x66}, {36, 4, 77}}, oneSGE)},
		{"SEND of a datagram with the own Q_Key", ib.UD, ib.SendWR{Opcode: ib.OpSendWithImm, Imm: 1, AH: 77, RemoteQPN: 0x55, RemoteQKey: 1 << 31, SGEs: one},
			all([]field{{12, 4, 3}, {20, 4, 0x01000000}, {24, 4, 0x55}, {28, 4, 0x1234}, {36, 4, 77}}, oneSGE)},
		{"FLUSH of a range", ib.RC, target(ib.SendWR{Opcode: ib.OpFlush, Flags: ib.SendSignaled, Flush: ib.Flush{Placement: ib.FlushGlobal, Length: 0x300}}),
			[]field{{12, 4, 14}, {16, 4, 2}, {24, 8, 0x7f0012345678}, {32, 4, 0x300}, {36, 4, 0xabcd}, {40, 1, 1}, {152, 8, 0x7f0012345678}, {184, 4, 0x300}, {188, 4, 0x300}}},
		{"FLUSH of a region", ib.RC, target(ib.SendWR{Opcode: ib.OpFlush, Flush: ib.Flush{Placement: ib.FlushGlobal | ib.FlushPersistent, Level: ib.FlushRegion}}),
			[]field{{12, 4, 14}, {24, 8, 0x7f0012345678}, {36, 4, 0xabcd}, {40, 1, 3}, {41, 1, 1}, {152, 8, 0x7f0012345678}}},
		{"ATOMIC_WRITE inline", ib.RC, target(ib.SendWR{Opcode: ib.OpAtomicWrite, Inline: []byte("eightbyt")}),
			all([]field{{12, 4, 15}, {184, 4, 8}, {188, 4, 8}, {208, 8, 0x7479627468676965}}, rdma)},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, c.typ)
			b.kq.sq.fill(0xee)
			c.wr.ID = 0x1122334455667788
			b.post(c.wr)
			n := 208
			for _, f := range c.want {
				n = max(n, f.at+f.bytes)
			}
			got := b.kq.sq.slot(0)
			sameBytes(t, c.name, got[:n], element(n, append(c.want, field{0, 8, 0x1122334455667788})))
			for i, v := range got[n:] {
				if v != 0xee {
					t.Fatalf("byte %d was written", n+i)
				}
			}
			if b.kq.sq.producer() != 1 || b.k.bells != 1 {
				t.Errorf("producer %d, %d doorbells", b.kq.sq.producer(), b.k.bells)
			}
		})
	}
}

func TestRecvElements(t *testing.T) {
	b := newBench(t, ib.RC)
	b.kq.rq.fill(0xee)
	n, err := b.qp.PostRecv([]ib.RecvWR{{ID: 0x1122334455667788, SGEs: []ib.SGE{{Addr: 0x1000, Length: 0x100, LKey: 0x301}, {Addr: 0x2000, Length: 1, LKey: 0x302}}}, {ID: 2}})
	if n != 2 || err != nil || b.kq.rq.producer() != 2 || b.k.bells != 0 {
		t.Error(n, err, b.kq.rq.producer(), b.k.bells)
	}
	sameBytes(t, "two buffers", b.kq.rq.slot(0)[:72], element(72, []field{{0, 8, 0x1122334455667788}, {16, 4, 0x101}, {20, 4, 0x101}, {28, 4, 2},
		{40, 8, 0x1000}, {48, 4, 0x100}, {52, 4, 0x301}, {56, 8, 0x2000}, {64, 4, 1}, {68, 4, 0x302}}))
	sameBytes(t, "no buffer", b.kq.rq.slot(1)[:40], element(40, []field{{0, 8, 2}}))
	if n, err := b.qp.PostRecv([]ib.RecvWR{{}, {SGEs: make([]ib.SGE, 4)}}); n != 1 || !errors.Is(err, driver.ErrTooManySGEs) {
		t.Error(n, err)
	}

	s, err := b.pd.CreateSRQ(driver.SRQConfig{MaxWR: 7, MaxSGE: 2})
	if err != nil {
		t.Fatal(err)
	}
	kq := b.k.srqs[s.(*srq).Handle]
	kq.fill(0xee)
	if n, err := s.PostRecv([]ib.RecvWR{{ID: 9, SGEs: []ib.SGE{{Addr: 0x5000, Length: 6, LKey: 7}}}}); n != 1 || err != nil {
		t.Error(n, err)
	}
	sameBytes(t, "in an SRQ", kq.slot(0)[:56], element(56, []field{{0, 8, 9}, {16, 4, 6}, {20, 4, 6}, {28, 4, 1}, {40, 8, 0x5000}, {48, 4, 6}, {52, 4, 7}}))
	q := b.newQP(ib.RC, func(c *driver.QPConfig) { c.SRQ = s; c.Cap.MaxRecvWR = 0 })
	if _, err := q.PostRecv([]ib.RecvWR{{}}); !errors.Is(err, driver.ErrHasSRQ) {
		t.Error(err)
	}
	b.close(q, s)
	if _, err := s.PostRecv([]ib.RecvWR{{}}); !errors.Is(err, driver.ErrClosed) {
		t.Error(err)
	}
	if err := s.SetLimit(1); !errors.Is(err, driver.ErrClosed) || s.Limit() != 0 || b.k.Count(33)+b.k.Count(34) != 0 {
		t.Error("a closed SRQ's limit is still set or asked for", err)
	}
}

// Completions as the kernel writes them, and as the program gets them.
func TestPoll(t *testing.T) {
	b := newBench(t, ib.RC)
	kcq := b.kcq()
	kcq.fill(0xee)
	qpn := b.kq.num
	kcq.complete(1, 0, 0, 64, qpn)
	kcq.complete(2, 0, 1, 64, qpn)
	kcq.complete(3, 0, 2, 64, qpn)
	e := kcq.complete(4, 0, 128, 100, qpn|0xff000000) // a number has 24 bits
	le.PutUint32(e[32:], 0x12345678)
	le.PutUint32(e[36:], 3)          // GRH, immediate
	le.PutUint32(e[24:], 0x04030201) // big-endian
	le.PutUint16(e[40:], 5)
	le.PutUint16(e[42:], 6)
	e[44] = 7
	e = kcq.complete(5, 0, 128, 100, qpn)
	le.PutUint32(e[36:], 5) // GRH, invalidated; but no source, so no datagram, and no GRH
	le.PutUint32(e[24:], 0xabcd01)
	e = kcq.complete(6, 0, 0, 100, qpn)
	le.PutUint32(e[36:], 2) // a send's flags are those of what was sent
	le.PutUint32(e[24:], 0xabcd01)
	kcq.complete(7, 0, 8, 0, qpn)
	kcq.complete(8, 0, 9, 8, qpn)
	kcq.complete(9, 10, 0, 0, qpn)
	kcq.complete(10, 1<<31, 1<<31, 0, qpn)
	wcs := make([]ib.WC, 20)
	for i := range wcs {
		wcs[i] = ib.WC{ID: 99, Imm: 99, InvalidatedRKey: 99, Flags: 0xff, Status: 99, VendorErr: 99}
	}
	if n := b.cq.Poll(wcs[:3]); n != 3 || kcq.consumer() != 3 {
		t.Fatal(n, kcq.consumer())
	}
	if n := b.cq.Poll(wcs[3:]); n != 7 || kcq.consumer() != 10 {
		t.Fatal(n, kcq.consumer())
	}
	num := ib.QPN(qpn)
	for i, want := range []ib.WC{
		{ID: 1, Opcode: ib.WCSend, ByteLen: 64, QPN: num},
		{ID: 2, Opcode: ib.WCRDMAWrite, ByteLen: 64, QPN: num},
		{ID: 3, Opcode: ib.WCRDMARead, ByteLen: 64, QPN: num},
		{ID: 4, Opcode: ib.WCRecv, ByteLen: 100, QPN: num, SrcQPN: 0x345678, Flags: ib.WCGRH | ib.WCWithImm, Imm: 0x01020304, PKeyIndex: 5, SLID: 6, SL: 7},
		{ID: 5, Opcode: ib.WCRecv, ByteLen: 100, QPN: num, Flags: ib.WCWithInv, InvalidatedRKey: 0xabcd01},
		{ID: 6, Opcode: ib.WCSend, ByteLen: 100, QPN: num},
		{ID: 7, Opcode: ib.WCFlush, QPN: num},
		{ID: 8, Opcode: ib.WCAtomicWrite, ByteLen: 8, QPN: num},
		{ID: 9, Status: ib.WCRemoteAccessErr, QPN: num},
		{ID: 10, Status: ib.WCGeneralErr, QPN: num},
	} {
		if wcs[i] != want {
			t.Errorf("got  %+v\nwant %+v", wcs[i], want)
		}
	}
	if n := b.cq.Poll(wcs); n != 0 {
		t.Error(n)
	}
	if n := b.cq.Poll(nil); n != 0 {
		t.Error(n)
	}
	if b.qp.State() != ib.Err {
		t.Error("a failed request of an RC queue pair does not tell its state")
	}
}

// Requests and completions in bunches of any size, many times around both queues: all come, in order.
func TestWrapAround(t *testing.T) {
	b := newBench(t, ib.RC)
	kcq, sq, rq := b.kcq(), b.kq.sq, b.kq.rq
	rnd := rand.New(rand.NewPCG(1, 2))
	var posted, taken, polled, recvs, received uint64
	wcs := make([]ib.WC, 40)
	for range 3000 {
		wrs := make([]ib.SendWR, rnd.IntN(20))
		for i := range wrs {
			wrs[i] = ib.SendWR{ID: posted + uint64(i), Opcode: ib.OpSend, SGEs: []ib.SGE{{Addr: posted + uint64(i), Length: 1}}}
		}
		room := int(31 - (posted - taken))
		n, err := b.qp.PostSend(wrs)
		if n != min(len(wrs), room) || (n < len(wrs)) != errors.Is(err, driver.ErrQueueFull) {
			t.Fatalf("%d of %d requests into a room of %d: %v", n, len(wrs), room, err)
		}
		posted += uint64(n)
		if n, err = b.qp.PostRecv(make([]ib.RecvWR, rnd.IntN(9))); err != nil && !errors.Is(err, driver.ErrQueueFull) {
			t.Fatal(err)
		}
		recvs += uint64(n)
		if recvs-received != uint64(rq.posted()) || recvs-received > 31 {
			t.Fatal(recvs, received, rq.posted())
		}
		for range rnd.IntN(5) {
			if rq.posted() > 0 {
				rq.take()
				received++
			}
		}
		for range rnd.IntN(16) {
			if sq.posted() == 0 || kcq.posted() == kcq.mask {
				break
			}
			e := sq.take()
			if id := le.Uint64(e[0:]); id != taken || le.Uint64(e[208:]) != taken {
				t.Fatalf("request %d where %d is next", id, taken)
			}
			kcq.complete(taken, 0, 0, 0, b.kq.num)
			taken++
		}
		got := b.cq.Poll(wcs[:rnd.IntN(len(wcs))])
		for i := range wcs[:max(got, 0)] {
			if wcs[i].ID != polled {
				t.Fatalf("completion %d where %d is next", wcs[i].ID, polled)
			}
			polled++
		}
		for _, r := range []*kring{sq, rq, kcq} {
			if r.producer() > r.mask || r.consumer() > r.mask {
				t.Fatalf("indices %d and %d of %d slots are not masked", r.producer(), r.consumer(), r.mask+1)
			}
		}
	}
	if posted < 3000 || polled < 2000 {
		t.Error(posted, polled)
	}
}

// One slot stays empty: a full queue would look like an empty one.
func TestQueueFull(t *testing.T) {
	b := newBench(t, ib.RC)
	if c := b.qp.Cap(); c.MaxSendWR != 31 || c.MaxRecvWR != 31 || b.cq.Entries() != 127 {
		t.Errorf("%+v, %d entries", c, b.cq.Entries())
	}
	if n, err := b.qp.PostSend(make([]ib.SendWR, 100)); n != 31 || !errors.Is(err, driver.ErrQueueFull) || b.k.bells != 1 {
		t.Error(n, err, b.k.bells)
	}
	if n, err := b.qp.PostSend(make([]ib.SendWR, 1)); n != 0 || !errors.Is(err, driver.ErrQueueFull) || b.k.bells != 1 {
		t.Error(n, err, b.k.bells)
	}
	b.kq.sq.take()
	if n, err := b.qp.PostSend(make([]ib.SendWR, 2)); n != 1 || !errors.Is(err, driver.ErrQueueFull) {
		t.Error(n, err)
	}
	if n, err := b.qp.PostRecv(make([]ib.RecvWR, 100)); n != 31 || !errors.Is(err, driver.ErrQueueFull) {
		t.Error(n, err)
	}
	// A bad request in the middle: those before it go out.
	b.kq.sq.setConsumer(b.kq.sq.producer())
	wrs := make([]ib.SendWR, 5)
	wrs[3].Opcode = 99
	if n, err := b.qp.PostSend(wrs); n != 3 || !errors.Is(err, driver.ErrOpcode) || b.kq.sq.posted() != 3 || b.k.bells != 3 {
		t.Error(n, err, b.kq.sq.posted(), b.k.bells)
	}
}

// Whatever the kernel's memory says, nothing outside of the mapping is touched, which would end the test, and nothing is
// counted beyond the queue.
func TestHostileIndices(t *testing.T) {
	b := newBench(t, ib.RC)
	kcq := b.kcq()
	wcs := make([]ib.WC, 1000)
	for i := range uint32(2000) {
		v := i * 2654435761
		b.kq.sq.setConsumer(v)
		b.kq.rq.setConsumer(^v)
		kcq.setProducer(v)
		b.kq.sq.setProducer(v * 3) // the process's own index, which it does not read back
		b.kq.rq.setProducer(v * 5)
		kcq.setConsumer(v * 7)
		if n, _ := b.qp.PostSend(make([]ib.SendWR, 100)); n > 31 {
			t.Fatal(n)
		}
		if n, _ := b.qp.PostRecv(make([]ib.RecvWR, 100)); n > 31 {
			t.Fatal(n)
		}
		if n := b.cq.Poll(wcs); n > 127 {
			t.Fatal(n)
		}
		b.kq.sq.setGeometry(40, -1) // read once
		kcq.setGeometry(0, 0)
	}
}

// A queue that cannot be is refused, and what the kernel has made is destroyed.
func TestHostileGeometry(t *testing.T) {
	littleEndian(t)
	mem := func(shift, mask uint32, n int) []byte {
		b := make([]byte, n)
		if n >= 8 {
			le.PutUint32(b[0:], shift)
			le.PutUint32(b[4:], mask)
		}
		return b
	}
	for _, c := range []struct {
		shift, mask uint32
		n           int
		ok          bool
	}{
		{6, 3, 384 + 4*64, true},
		{6, 3, 384 + 4*64 - 1, false},
		{6, 1, 4096, true},
		{6, 0, 4096, false},
		{6, 2, 4096, false},
		{6, 4, 4096, false},
		{6, 1<<32 - 1, 4096, false},
		{6, 1<<31 - 1, 4096, false},
		{5, 3, 4096, false}, // smaller than an element
		{0, 3, 4096, false},
		{16, 1, 384 + 2<<16, true},
		{17, 1, 384 + 2<<17, false},
		{31, 1, 4096, false},
		{63, 1, 4096, false},
		{64, 1, 4096, false},
		{1<<32 - 1, 1, 4096, false},
		{6, 1, 384 + 127, false},
		{6, 1, 384, false},
		{6, 1, 383, false},
		{6, 1, 8, false},
		{6, 1, 0, false},
	} {
		_, err := newQueue(mem(c.shift, c.mask, c.n), 48, fromKernel)
		if (err == nil) != c.ok {
			t.Errorf("2^%d bytes, mask %#x, mapping of %d: %v", c.shift, c.mask, c.n, err)
		}
	}
	if _, err := newQueue(mem(8, 3, 4096), sendSize(3, 0), toKernel); err != nil {
		t.Error(err)
	}
	if _, err := newQueue(mem(8, 3, 4096), sendSize(4, 0), toKernel); err == nil {
		t.Error("elements of 256 bytes are to hold 208 and 4 SGEs")
	}

	b := newBench(t, ib.RC)
	for what, deform := range map[string]func(*kring){
		"mask":        func(r *kring) { r.setGeometry(6, 5) },
		"large":       func(r *kring) { r.setGeometry(12, int(r.mask)*64) },
		"no elements": func(r *kring) { r.setGeometry(3, int(r.mask)) },
	} {
		before := b.k.Mapped
		b.k.deform = deform
		if _, err := b.c.CreateCQ(driver.CQConfig{Entries: 10}); err == nil {
			t.Errorf("%s: a CQ", what)
		}
		if _, err := b.pd.CreateQP(driver.QPConfig{Type: ib.RC, SendCQ: b.cq, RecvCQ: b.cq, Cap: b.qp.Cap()}); err == nil {
			t.Errorf("%s: a QP", what)
		}
		if _, err := b.pd.CreateSRQ(driver.SRQConfig{MaxWR: 10, MaxSGE: 1}); err == nil {
			t.Errorf("%s: an SRQ", what)
		}
		b.k.deform = nil
		if b.k.Mapped != before {
			t.Errorf("%s: %d mappings are left", what, b.k.Mapped-before)
		}
	}
	// Only the receive queue is wrong.
	n := 0
	b.k.deform = func(r *kring) {
		if n++; n == 2 {
			r.setGeometry(6, 5)
		}
	}
	before := b.k.Mapped
	if _, err := b.pd.CreateQP(driver.QPConfig{Type: ib.RC, SendCQ: b.cq, RecvCQ: b.cq, Cap: b.qp.Cap()}); err == nil || b.k.Mapped != before {
		t.Error(err, b.k.Mapped, before)
	}
	b.k.deform = nil
}

// The kernel says that a CQ has overrun, and nothing else does.
func TestOverrun(t *testing.T) {
	b := newBench(t, ib.RC)
	other := b.newCQ(3)
	defer b.close(other)
	b.kcq().complete(1, 0, 0, 0, b.kq.num)
	b.k.Event(b.cq.handle, ib.EventCQErr)
	e, err := b.c.AsyncEvent(t.Context())
	if err != nil || e.Type != ib.EventCQErr || e.CQ != driver.CQ(b.cq) {
		t.Error(e, err)
	}
	if n := b.cq.Poll(make([]ib.WC, 1)); n >= 0 || !errors.Is(b.cq.Err(), errOverrun) {
		t.Error(n, b.cq.Err())
	}
	if n := other.Poll(make([]ib.WC, 1)); n != 0 || other.Err() != nil {
		t.Error(n, other.Err())
	}
	// Of an object that is closed there is no event.
	cookies := b.k.Cookies[other.handle]
	b.k.Cookies[99] = cookies + 1000
	b.k.Event(99, ib.EventQPFatal)
	b.k.Event(b.qp.Handle, ib.EventQPFatal)
	if e, err := b.c.AsyncEvent(t.Context()); err != nil || e.QP != driver.QP(b.qp) {
		t.Error(e, err)
	}
}

func TestResize(t *testing.T) {
	b := newBench(t, ib.RC)
	old := b.kcq()
	for i := range uint64(100) { // so that the two are out of step
		old.complete(i, 0, 0, 0, b.kq.num)
		if b.cq.Poll(make([]ib.WC, 1)) != 1 {
			t.Fatal(i)
		}
	}
	for i := range uint64(40) {
		old.complete(i, 0, 0, 0, b.kq.num)
	}
	if err := b.cq.Resize(30); err == nil {
		t.Error("40 completions fit into 30 entries")
	}
	if err := b.cq.Resize(500); err != nil {
		t.Fatal(err)
	}
	if n := b.cq.Entries(); n != 511 || b.k.Mapped != 3 {
		t.Error(n, b.k.Mapped)
	}
	b.kcq().complete(40, 0, 0, 0, b.kq.num)
	wcs := make([]ib.WC, 100)
	if n := b.cq.Poll(wcs); n != 41 {
		t.Fatal(n)
	}
	for i := range wcs[:41] {
		if wcs[i].ID != uint64(i) {
			t.Errorf("completion %d where %d is next", wcs[i].ID, i)
		}
	}
	b.k.Errs[19] = unix.EINVAL
	if err := b.cq.Resize(10); !errors.Is(err, unix.EINVAL) || b.cq.Err() != nil || b.cq.Entries() != 511 {
		t.Error(err, b.cq.Err(), b.cq.Entries())
	}
	delete(b.k.Errs, 19)
	b.k.deform = func(r *kring) { r.setGeometry(6, 5) }
	if err := b.cq.Resize(10); err == nil || b.cq.Poll(wcs) >= 0 || b.cq.Err() == nil {
		t.Error("a queue whose completions cannot be reached works on:", err, b.cq.Err())
	}
	b.k.deform = nil
}

// A queue that is resized while others poll it loses nothing, and gives nothing twice. Nor does one that cannot be closed.
func TestResizeWhilePolled(t *testing.T) {
	b := newBench(t, ib.RC)
	var next uint64
	for round := range 50 {
		for range 100 {
			b.kcq().complete(next, 0, 0, 0, b.kq.num)
			next++
		}
		first := next - 100
		var seen [100]atomic.Int32
		var left atomic.Int32
		left.Store(100)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				wcs := make([]ib.WC, 7)
				for left.Load() > 0 {
					n := b.cq.Poll(wcs)
					if n < 0 {
						t.Error(b.cq.Err())
						return
					}
					for i := range wcs[:n] {
						seen[wcs[i].ID-first].Add(1)
					}
					left.Add(-int32(n))
					runtime.Gosched()
				}
			})
		}
		for i := range 20 {
			if i == 10 {
				b.k.Errs[20] = unix.EBUSY
				if err := b.cq.Close(); !errors.Is(err, driver.ErrBusy) {
					t.Error(err)
				}
				delete(b.k.Errs, 20)
			}
			if err := b.cq.Resize(100 + 100*((round+i)%3)); err != nil {
				t.Error(err)
			}
		}
		wg.Wait()
		for i := range seen {
			if n := seen[i].Load(); n != 1 {
				t.Fatalf("round %d: completion %d came %d times", round, i, n)
			}
		}
	}
}

// RESET forgets what was posted, on both sides.
func TestReset(t *testing.T) {
	b := newBench(t, ib.RC)
	sq, rq := b.kq.sq, b.kq.rq
	b.post(make([]ib.SendWR, 20)...)
	b.qp.PostRecv(make([]ib.RecvWR, 10))
	for range 5 {
		sq.take()
		rq.take()
	}
	b.to(b.qp, ib.Reset)
	if sq.posted() != 0 || rq.posted() != 0 || sq.producer() != 5 {
		t.Error(sq.posted(), rq.posted(), sq.producer())
	}
	if n, err := b.qp.PostSend(make([]ib.SendWR, 1)); n != 0 || !errors.Is(err, driver.ErrState) {
		t.Error(n, err)
	}
	if n, err := b.qp.PostRecv(make([]ib.RecvWR, 1)); n != 0 || !errors.Is(err, driver.ErrState) {
		t.Error(n, err)
	}
	b.to(b.qp, ib.Init)
	if n, err := b.qp.PostRecv(make([]ib.RecvWR, 40)); n != 31 || !errors.Is(err, driver.ErrQueueFull) {
		t.Error(n, err)
	}
	b.to(b.qp, ib.RTS)
	bells := b.k.bells
	b.post(ib.SendWR{ID: 7, Opcode: ib.OpSend})
	if le.Uint64(sq.newest()) != 7 || sq.posted() != 1 || b.k.bells != bells+1 {
		t.Error(sq.posted(), b.k.bells)
	}
}

// The kernel flushes receives when a queue pair gets into the error state, and those that are posted later only when it is
// told so again.
func TestFlushInError(t *testing.T) {
	b := newBench(t, ib.RC)
	b.to(b.qp, ib.Err)
	b.kq.modified = nil
	for i := range 3 {
		if n, err := b.qp.PostRecv(make([]ib.RecvWR, 2)); n != 2 || err != nil || len(b.kq.modified) != i+1 || b.kq.modified[i] != 6 {
			t.Error(n, err, b.kq.modified)
		}
	}
	if n, err := b.qp.PostSend([]ib.SendWR{{Opcode: ib.OpSend}}); n != 1 || err != nil || b.k.bells == 0 {
		t.Error(n, err)
	}

	// A queue pair that fails says so by a completion.
	q := b.newQP(ib.RC)
	kq := b.k.qps[q.Handle]
	kq.modified = nil
	b.kcq().complete(1, 12, 0, 0, kq.num)
	b.kcq().complete(2, 5, 0, 0, kq.num)
	if n := b.cq.Poll(make([]ib.WC, 4)); n != 2 || q.State() != ib.Err || string(kq.modified) != "\x06" {
		t.Error(n, q.State(), kq.modified)
	}
	// Of other types not every failure is the end: the kernel is asked.
	u := b.newQP(ib.UD)
	ku := b.k.qps[u.Handle]
	ku.modified = nil
	b.kcq().complete(1, 4, 0, 0, ku.num)
	if n := b.cq.Poll(make([]ib.WC, 4)); n != 1 || u.State() != ib.RTS || len(ku.modified) != 0 || b.k.Count(25) != 1 {
		t.Error(n, u.State(), ku.modified, b.k.Count(25))
	}
	ku.state = 6
	b.kcq().complete(1, 5, 0, 0, ku.num)
	if n := b.cq.Poll(make([]ib.WC, 4)); n != 1 || u.State() != ib.Err || string(ku.modified) != "\x06" {
		t.Error(n, u.State(), ku.modified)
	}
	b.close(q, u)
	// A completion of a queue pair that is closed concerns nobody.
	b.kcq().complete(1, 12, 0, 0, kq.num)
	if n := b.cq.Poll(make([]ib.WC, 4)); n != 1 {
		t.Error(n)
	}
}

// What requests can have wrong, and what the doorbell can.
func TestRefused(t *testing.T) {
	b, u := newBench(t, ib.RC), newBench(t, ib.UD)
	for what, c := range map[string]struct {
		b    *bench
		wr   ib.SendWR
		want error
	}{
		"opcode":                 {b, ib.SendWR{Opcode: 10}, driver.ErrOpcode},
		"opcode above":           {b, ib.SendWR{Opcode: 16}, driver.ErrOpcode},
		"opcode, 32 more":        {b, ib.SendWR{Opcode: 34}, driver.ErrOpcode},
		"datagram READ":          {u, ib.SendWR{Opcode: ib.OpRDMARead, AH: 1}, driver.ErrOpcode},
		"datagram FLUSH":         {u, ib.SendWR{Opcode: ib.OpFlush, Flush: ib.Flush{Placement: 1}}, driver.ErrOpcode},
		"datagram without AH":    {u, ib.SendWR{Opcode: ib.OpSend}, driver.ErrNoAH},
		"SGEs":                   {b, ib.SendWR{Opcode: ib.OpSend, SGEs: make([]ib.SGE, 5)}, driver.ErrTooManySGEs},
		"inline and SGE":         {b, ib.SendWR{Opcode: ib.OpSend, Inline: []byte{1}, SGEs: make([]ib.SGE, 1)}, driver.ErrNoInline},
		"inline, long":           {b, ib.SendWR{Opcode: ib.OpSend, Inline: make([]byte, 65)}, driver.ErrNoInline},
		"inline READ":            {b, ib.SendWR{Opcode: ib.OpRDMARead, Inline: []byte{1}}, driver.ErrNoInline},
		"atomic of 4":            {b, ib.SendWR{Opcode: ib.OpAtomicFetchAdd, SGEs: []ib.SGE{{Length: 4}}}, driver.ErrAtomicLen},
		"bind of nothing":        {b, ib.SendWR{Opcode: ib.OpBindMW}, driver.ErrNoBind},
		"flush without place":    {b, ib.SendWR{Opcode: ib.OpFlush}, driver.ErrFlush},
		"flush, unknown place":   {b, ib.SendWR{Opcode: ib.OpFlush, Flush: ib.Flush{Placement: 4}}, driver.ErrFlush},
		"flush, unknown level":   {b, ib.SendWR{Opcode: ib.OpFlush, Flush: ib.Flush{Placement: 1, Level: 2}}, driver.ErrFlush},
		"flush with buffer":      {b, ib.SendWR{Opcode: ib.OpFlush, Flush: ib.Flush{Placement: 1}, SGEs: make([]ib.SGE, 1)}, driver.ErrFlush},
		"atomic write of 7":      {b, ib.SendWR{Opcode: ib.OpAtomicWrite, Inline: make([]byte, 7)}, driver.ErrAtomicWrite},
		"atomic write of none":   {b, ib.SendWR{Opcode: ib.OpAtomicWrite}, driver.ErrAtomicWrite},
		"atomic write, long SGE": {b, ib.SendWR{Opcode: ib.OpAtomicWrite, SGEs: []ib.SGE{{Length: 16}}}, driver.ErrAtomicWrite},
		"atomic write, no key":   {b, ib.SendWR{Opcode: ib.OpAtomicWrite, SGEs: []ib.SGE{{Length: 8}}}, errNoRegion},
	} {
		bells := c.b.k.bells
		n, err := c.b.qp.PostSend([]ib.SendWR{c.wr})
		if n != 0 || !errors.Is(err, c.want) || !errors.Is(err, driver.ErrInvalidWR) || c.b.k.bells != bells || c.b.kq.sq.posted() != 0 {
			t.Errorf("%s: %d, %v", what, n, err)
		}
	}
	b.c.placement = false
	if _, err := b.qp.PostSend([]ib.SendWR{{Opcode: ib.OpFlush, Flush: ib.Flush{Placement: 1}}}); !errors.Is(err, errors.ErrUnsupported) || !errors.Is(err, driver.ErrInvalidWR) {
		t.Error(err)
	}
	b.k.Errs[28] = unix.EIO
	if n, err := b.qp.PostSend([]ib.SendWR{{Opcode: ib.OpSend}}); n != 1 || !errors.Is(err, driver.ErrDeviceRemoved) {
		t.Error(n, err)
	}
}

// An ATOMIC_WRITE's value may lie in a region: it is read when the request is posted.
func TestAtomicWriteFromRegion(t *testing.T) {
	b := newBench(t, ib.RC)
	mem := make([]byte, 4096)
	copy(mem[16:], "eightbyt")
	for _, access := range []ib.Access{ib.AccessLocalWrite, ib.AccessZeroBased} {
		pinned := mustMmap(t)
		copy(pinned, mem)
		m, err := b.pd.RegisterMR(driver.MRConfig{Mem: pinned, Access: access, FD: -1})
		if err != nil {
			t.Fatal(err)
		}
		base := uverbs.AddrOf(pinned)
		if access&ib.AccessZeroBased != 0 {
			base = 0
		}
		wr := ib.SendWR{Opcode: ib.OpAtomicWrite, SGEs: []ib.SGE{{Addr: base + 16, Length: 8, LKey: m.LKey()}}}
		b.post(wr)
		if got := string(b.kq.sq.newest()[208:216]); got != "eightbyt" || le.Uint32(b.kq.sq.newest()[196:]) != 0 {
			t.Errorf("%q", got)
		}
		for _, off := range []uint64{^uint64(0), 4089, 4096, 1 << 40} {
			wr.SGEs[0].Addr = base + off
			if _, err := b.qp.PostSend([]ib.SendWR{wr}); !errors.Is(err, errNoRegion) {
				t.Errorf("at %#x: %v", off, err)
			}
		}
		wr.SGEs[0].Addr = base + 4088
		b.post(wr)
		other, err := b.c.AllocPD()
		if err != nil {
			t.Fatal(err)
		}
		m2, err := other.RegisterMR(driver.MRConfig{Mem: pinned, Access: access, FD: -1})
		if err != nil {
			t.Fatal(err)
		}
		wr.SGEs[0].LKey = m2.LKey()
		if _, err := b.qp.PostSend([]ib.SendWR{wr}); !errors.Is(err, errNoRegion) {
			t.Errorf("another domain's: %v", err)
		}
		b.close(m, m2, other)
		wr.SGEs[0].LKey = m.LKey()
		if _, err := b.qp.PostSend([]ib.SendWR{wr}); !errors.Is(err, errNoRegion) {
			t.Errorf("a closed region's: %v", err)
		}
	}
}

func mustMmap(t testing.TB) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

// Windows: what rxe does not check itself.
func TestWindows(t *testing.T) {
	b := newBench(t, ib.RC)
	other, err := b.c.AllocPD()
	if err != nil {
		t.Fatal(err)
	}
	mem := mustMmap(t)
	reg := func(p driver.PD, a ib.Access) driver.MR {
		m, err := p.RegisterMR(driver.MRConfig{Mem: mem, Access: a, FD: -1})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	m, plain, foreign := reg(b.pd, ib.AccessMWBind), reg(b.pd, 0), reg(other, ib.AccessMWBind)
	win := func(p driver.PD) driver.MW {
		w, err := p.(driver.MWAllocator).AllocMW()
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	w, foreignWin := win(b.pd), win(other)
	first := w.RKey()
	next := first&^0xff | 0x77
	bind := func(w driver.MW, m driver.MR, key ib.RKey) error {
		_, err := b.qp.PostSend([]ib.SendWR{{ID: 1, Opcode: ib.OpBindMW, Bind: &ib.BindMW{Window: w.Handle(), RKey: key, MRLKey: m.LKey(), Addr: 0x123, Length: 0x45, Access: ib.AccessRemoteRead}}})
		return err
	}
	for what, c := range map[string]struct{ got, want error }{
		"region without the right": {bind(w, plain, next), uverbs.ErrWindowDomains},
		"region of another domain": {bind(w, foreign, next), uverbs.ErrWindowDomains},
		"window of another domain": {bind(foreignWin, m, foreignWin.RKey()), uverbs.ErrWindowDomains},
		"key of another window":    {bind(w, m, next+0x100), uverbs.ErrWindowKey},
	} {
		if !errors.Is(c.got, c.want) || !errors.Is(c.got, driver.ErrInvalidWR) {
			t.Errorf("%s: %v", what, c.got)
		}
	}
	if err := bind(w, m, next); err != nil || w.RKey() != next {
		t.Fatal(err, w.RKey())
	}
	sameBytes(t, "bind", b.kq.sq.newest()[:208], element(208, []field{{0, 8, 1}, {12, 4, 8}, {24, 8, 0x123}, {32, 8, 0x45}, {40, 4, uint64(m.LKey())}, {44, 4, uint64(first)}, {48, 4, uint64(next)}, {52, 4, 4}}))
	if err := bind(w, m, next+1); !errors.Is(err, uverbs.ErrIsBound) {
		t.Error(err)
	}
	invalidate := func(key ib.RKey) error {
		_, err := b.qp.PostSend([]ib.SendWR{{Opcode: ib.OpLocalInv, InvalidateRKey: key}})
		return err
	}
	if err := invalidate(next); err != nil {
		t.Error(err)
	}
	if err := invalidate(next); !errors.Is(err, uverbs.ErrNotBound) {
		t.Error(err)
	}
	if err := invalidate(0x99999900); err != nil { // no window's: the kernel judges
		t.Error(err)
	}
	if err := bind(w, m, next+1); err != nil {
		t.Error(err)
	}
	// The peer invalidates.
	e := b.kcq().complete(1, 0, 128, 0, b.kq.num)
	le.PutUint32(e[36:], 5)
	le.PutUint32(e[24:], uint32(next+1))
	if n := b.cq.Poll(make([]ib.WC, 1)); n != 1 {
		t.Fatal(n)
	}
	if err := invalidate(next + 1); !errors.Is(err, uverbs.ErrNotBound) {
		t.Error(err)
	}
	if err := bind(w, m, next+2); err != nil {
		t.Error(err)
	}
	// rxe's word for a region with bound windows.
	b.k.Errs[13] = unix.EINVAL
	if err := m.Close(); !errors.Is(err, driver.ErrBusy) {
		t.Error(err)
	}
	delete(b.k.Errs, 13)
	b.close(w, foreignWin, m, plain, foreign, other)
	if err := bind(w, m, next+3); !errors.Is(err, uverbs.ErrNoWindow) {
		t.Error(err)
	}
}

// A window ends with the queue pair that it is bound by: rxe would keep that waiting.
func TestWindowEndsWithQP(t *testing.T) {
	b := newBench(t, ib.RC)
	q := b.newQP(ib.RC)
	m, err := b.pd.RegisterMR(driver.MRConfig{Mem: mustMmap(t), Access: ib.AccessMWBind, FD: -1})
	if err != nil {
		t.Fatal(err)
	}
	var windows [2]driver.MW
	for i, by := range []*qp{q, b.qp} {
		if windows[i], err = b.pd.AllocMW(); err != nil {
			t.Fatal(err)
		}
		wr := ib.SendWR{Opcode: ib.OpBindMW, Bind: &ib.BindMW{Window: windows[i].Handle(), RKey: windows[i].RKey(), MRLKey: m.LKey(), Length: 8}}
		if n, err := by.PostSend([]ib.SendWR{wr}); n != 1 {
			t.Fatal(err)
		}
	}
	b.close(q)
	if n := b.k.Count(16); n != 1 || b.k.Commands[len(b.k.Commands)-1] != 27 {
		t.Errorf("%d windows were freed, and the last command was %d", n, b.k.Commands[len(b.k.Commands)-1])
	}
	wr := ib.SendWR{Opcode: ib.OpBindMW, Bind: &ib.BindMW{Window: windows[0].Handle(), RKey: windows[0].RKey(), MRLKey: m.LKey(), Length: 8}}
	if _, err := b.qp.PostSend([]ib.SendWR{wr}); !errors.Is(err, uverbs.ErrWindowEnded) {
		t.Error(err)
	}
	b.close(windows[0], windows[1], m)
}

// A kernel that has the device no more destroys nothing: everything is closed all the same.
func TestRemoved(t *testing.T) {
	b := newBench(t, ib.RC)
	b.kcq().complete(1, 0, 0, 0, b.kq.num)
	b.kcq().complete(2, 0, 0, 0, b.kq.num)
	b.c.Remove()
	if n := b.cq.Poll(make([]ib.WC, 1)); n != 1 {
		t.Error("what is there can be polled still:", n)
	}
	if n := b.cq.Poll(make([]ib.WC, 4)); n != 1 {
		t.Error(n)
	}
	if n := b.cq.Poll(make([]ib.WC, 1)); n >= 0 || !errors.Is(b.cq.Err(), driver.ErrDeviceRemoved) {
		t.Error(n, b.cq.Err())
	}
	if _, err := b.qp.PostSend(make([]ib.SendWR, 1)); !errors.Is(err, driver.ErrDeviceRemoved) {
		t.Error(err)
	}
	if e, err := b.c.AsyncEvent(t.Context()); err != nil || e.Type != ib.EventDeviceFatal {
		t.Error(e, err)
	}
	if _, err := b.c.AsyncEvent(t.Context()); !errors.Is(err, driver.ErrDeviceRemoved) {
		t.Error(err)
	}
	for _, cmd := range []uint32{27, 20, 4} {
		b.k.Errs[cmd] = unix.EIO
	}
	clear(b.k.Live)
}

func TestClosed(t *testing.T) {
	b := newBench(t, ib.RC)
	q, c := b.newQP(ib.RC), b.newCQ(3)
	b.close(q, c)
	if n, err := q.PostSend(make([]ib.SendWR, 1)); n != 0 || !errors.Is(err, driver.ErrClosed) {
		t.Error(n, err)
	}
	if n, err := q.PostRecv(make([]ib.RecvWR, 1)); n != 0 || !errors.Is(err, driver.ErrClosed) {
		t.Error(n, err)
	}
	if n := c.Poll(make([]ib.WC, 1)); n >= 0 || !errors.Is(c.Err(), driver.ErrClosed) {
		t.Error(n, c.Err())
	}
	if err := c.Arm(false); !errors.Is(err, driver.ErrClosed) {
		t.Error(err)
	}
	if err := c.Resize(9); !errors.Is(err, driver.ErrClosed) {
		t.Error(err)
	}
	if err := q.Modify(t.Context(), &ib.QPAttr{State: ib.Err}, ib.AttrState); !errors.Is(err, driver.ErrClosed) {
		t.Error(err)
	}
	// A kernel that refuses leaves everything as it is.
	b.k.Errs[27], b.k.Errs[20] = unix.EBUSY, unix.EBUSY
	if err := b.cq.Close(); !errors.Is(err, driver.ErrBusy) || b.cq.Poll(make([]ib.WC, 1)) != 0 {
		t.Error(err)
	}
	if err := b.qp.Close(); !errors.Is(err, driver.ErrBusy) {
		t.Error(err)
	}
	if b.c.qp(b.qp.QPN()) != b.qp {
		t.Error("its completions do not count any more")
	}
	b.post(ib.SendWR{Opcode: ib.OpSend})
	clear(b.k.Errs)
}

func TestDataPathAllocatesNothing(t *testing.T) {
	for _, typ := range []ib.QPType{ib.RC, ib.UD} {
		b := newBench(t, typ)
		wr := []ib.SendWR{{Opcode: ib.OpSend, SGEs: make([]ib.SGE, 2), AH: 1, RemoteQKey: 1 << 31}, {Opcode: ib.OpSend, Inline: []byte("hello"), AH: 1}}
		if typ == ib.RC {
			wr = append(wr, ib.SendWR{Opcode: ib.OpRDMAWrite, Inline: []byte("hello")}, ib.SendWR{Opcode: ib.OpAtomicFetchAdd, SGEs: []ib.SGE{{Length: 8}}},
				ib.SendWR{Opcode: ib.OpFlush, Flush: ib.Flush{Placement: 1}}, ib.SendWR{Opcode: ib.OpAtomicWrite, Inline: make([]byte, 8)})
		}
		bad := []ib.SendWR{{Opcode: 77}}
		recv := []ib.RecvWR{{SGEs: make([]ib.SGE, 2)}}
		wcs := make([]ib.WC, 4)
		b.k.bell = func() {}
		for what, f := range map[string]func(){
			"PostSend": func() {
				if n, err := b.qp.PostSend(wr); n != len(wr) || err != nil {
					t.Error(n, err)
				}
				b.kq.sq.setConsumer(b.kq.sq.producer())
			},
			"PostSend, refused": func() {
				if _, err := b.qp.PostSend(bad); err == nil {
					t.Error("accepted")
				}
			},
			"PostRecv": func() {
				if n, err := b.qp.PostRecv(recv); n != 1 || err != nil {
					t.Error(n, err)
				}
				b.kq.rq.setConsumer(b.kq.rq.producer())
			},
			"Poll": func() {
				b.kcq().complete(1, 0, 0, 0, b.kq.num)
				if n := b.cq.Poll(wcs); n != 1 {
					t.Error(n)
				}
			},
			"Arm": func() {
				if err := b.cq.Arm(false); err != nil {
					t.Error(err)
				}
			},
		} {
			if n := testing.AllocsPerRun(200, f); n != 0 {
				t.Errorf("%s, %v: %v allocations", what, typ, n)
			}
		}
		b.k.bell = nil
	}
}

// BenchmarkPostPoll posts signalled SENDs of one SGE, and polls their completions. The kernel's part, which a function of the
// benchmark plays in the doorbell's place, is timed by itself and taken off; ns/op is for one SEND and its completion.
func BenchmarkPostPoll(b *testing.B) {
	for _, batch := range []int{16, 1} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) { benchPostPoll(b, batch) })
	}
}

func benchPostPoll(b *testing.B, batch int) {
	x := newBench(b, ib.RC)
	sq, kcq := x.kq.sq, x.kcq()
	wrs := make([]ib.SendWR, batch)
	sge := []ib.SGE{{Addr: 0x7f0000001000, Length: 64, LKey: 0x1234}}
	for i := range wrs {
		wrs[i] = ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: sge}
	}
	wcs := make([]ib.WC, batch)
	kernel := func() { // what it does is the least that the protocol asks for
		from, to := sq.consumer(), sq.producer()
		at := kcq.producer()
		for i := from; i != to; i = (i + 1) & sq.mask {
			e, c := sq.slot(i), kcq.slot(at)
			le.PutUint64(c[0:], le.Uint64(e[0:]))
			le.PutUint64(c[8:], 0)
			le.PutUint64(c[16:], 64<<32)
			le.PutUint64(c[24:], uint64(x.kq.num)<<32)
			le.PutUint64(c[32:], 0)
			le.PutUint64(c[40:], 0)
			at = (at + 1) & kcq.mask
		}
		sq.setConsumer(to)
		kcq.setProducer(at)
	}
	x.k.bell = kernel
	b.ReportAllocs()
	b.ResetTimer()
	for done := 0; done < b.N; done += batch {
		if n, err := x.qp.PostSend(wrs); n != batch {
			b.Fatal(n, err)
		}
		if n := x.cq.Poll(wcs); n != batch {
			b.Fatal(n)
		}
	}
	all := b.Elapsed()
	b.StopTimer()
	x.k.bell = nil
	start := time.Now()
	for done := 0; done < b.N; done += batch {
		sq.setProducer((sq.producer() + uint32(batch)) & sq.mask)
		kernel()
		kcq.setConsumer(kcq.producer())
	}
	played := time.Since(start)
	b.ReportMetric(float64(played.Nanoseconds())/float64(b.N), "kernel-ns/op")
	b.ReportMetric(float64((all-played).Nanoseconds())/float64(b.N), "own-ns/op")
}

// A completion queue as large as the send queue is not overrun by somebody who posts until there is no room, however fast
// the kernel is.
func TestUnpolledCompletionsTakeRoom(t *testing.T) {
	b := newBench(t, ib.RC)
	depth := b.qp.Cap().MaxSendWR
	b.k.bell = func() { // completes all at once
		for sq := b.kq.sq; sq.consumer() != sq.producer(); sq.setConsumer((sq.consumer() + 1) & sq.mask) {
			if e := sq.slot(sq.consumer()); le.Uint32(e[12:])&uint32(ib.SendSignaled) != 0 {
				b.kcq().complete(le.Uint64(e), 0, 0, 0, b.kq.num)
			}
		}
	}
	defer func() { b.k.bell = nil }()
	signalled, plain := ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled}, ib.SendWR{Opcode: ib.OpSend}
	for i := range depth {
		if n, err := b.qp.PostSend([]ib.SendWR{plain, signalled}); n != 2 || err != nil {
			t.Fatal(i, n, err)
		}
	}
	if n, err := b.qp.PostSend([]ib.SendWR{plain, signalled, plain}); n != 1 || !errors.Is(err, driver.ErrQueueFull) {
		t.Errorf("with %d completions unpolled, %d more requests were taken: %v", depth, n, err)
	}
	if n := b.cq.Poll(make([]ib.WC, 3)); n != 3 {
		t.Fatal(n)
	}
	if n, err := b.qp.PostSend([]ib.SendWR{signalled, signalled, signalled, signalled}); n != 3 || !errors.Is(err, driver.ErrQueueFull) {
		t.Errorf("after three were polled, %d more were taken: %v", n, err)
	}
	// A reset ends what was outstanding, polled or not.
	b.to(b.qp, ib.Reset)
	b.to(b.qp, ib.RTS)
	for i := range depth {
		if n, err := b.qp.PostSend([]ib.SendWR{signalled}); n != 1 {
			t.Fatal(i, err)
		}
	}
}

// windowed makes a region and a window, and what makes requests that bind the window to the region, or invalidate it, with keys that are
// counted from the window's first.
func (b *bench) windowed() (m driver.MR, w driver.MW, bind, invalidate func(add ib.RKey) ib.SendWR) {
	b.t.Helper()
	m, err := b.pd.RegisterMR(driver.MRConfig{Mem: mustMmap(b.t), Access: ib.AccessMWBind, FD: -1})
	if err != nil {
		b.t.Fatal(err)
	}
	if w, err = b.pd.AllocMW(); err != nil {
		b.t.Fatal(err)
	}
	first := w.RKey()
	bind = func(add ib.RKey) ib.SendWR {
		return ib.SendWR{ID: 7, Opcode: ib.OpBindMW, Bind: &ib.BindMW{Window: w.Handle(), RKey: first + add, MRLKey: m.LKey(), Length: 8}}
	}
	invalidate = func(add ib.RKey) ib.SendWR {
		return ib.SendWR{ID: 7, Opcode: ib.OpLocalInv, InvalidateRKey: first + add}
	}
	return m, w, bind, invalidate
}

// Binds and invalidations that fail, or are flushed, change nothing of the window.
func TestFailedBind(t *testing.T) {
	b := newBench(t, ib.RC)
	m, w, bind, invalidate := b.windowed()
	first := w.RKey()
	var done [][]byte
	did := func(n int) { // what the kernel writes to their places
		for range n {
			e := b.kq.sq.take()
			le.PutUint32(e[148:], 3)
			done = append(done, e)
		}
	}
	failed := func(n int, what string, key ib.RKey) {
		t.Helper()
		for range n {
			e := b.kq.sq.take()
			le.PutUint32(e[148:], 4)
			b.kcq().complete(7, 6, 0, 0, b.kq.num)
		}
		for _, e := range done { // as older kernels do when the queue pair fails
			le.PutUint32(e[144:], 5)
		}
		done = nil
		if got := b.cq.Poll(make([]ib.WC, 9)); got != n {
			t.Fatalf("%d completions", got)
		}
		if w.RKey() != key {
			t.Errorf("%s: the window has key %#x, want %#x", what, w.RKey(), key)
		}
	}
	again := func() {
		b.to(b.qp, ib.Reset)
		b.to(b.qp, ib.RTS)
	}
	for range 20 { // the places go round
		b.post(bind(1), invalidate(1), bind(2), invalidate(2), bind(3))
		did(2)
		failed(3, "the second bind has failed", first+1)
		again()
		b.post(bind(4), invalidate(4)) // it is not bound
		did(1)
		failed(1, "the invalidation has failed", first+4)
		if n, err := b.qp.PostSend([]ib.SendWR{bind(5)}); n != 0 || !errors.Is(err, uverbs.ErrIsBound) {
			t.Errorf("it is bound still: %d, %v", n, err)
		}
		failed(0, "nothing", first+4)
		again()
		b.post(invalidate(4))
		did(1)
	}
	b.close(w, m)
}

// What the kernel does of what was posted until it is told of a failure is done.
func TestBindBehindFailure(t *testing.T) {
	b := newBench(t, ib.RC)
	m, w, bind, invalidate := b.windowed()
	first := w.RKey()
	b.post(bind(1), ib.SendWR{Opcode: ib.OpSend}, invalidate(1), bind(2), invalidate(2))
	le.PutUint32(b.kq.sq.take()[148:], 3)
	le.PutUint32(b.kq.sq.take()[148:], 4)
	b.kcq().complete(7, 6, 0, 0, b.kq.num)
	b.k.During[26] = func() {
		delete(b.k.During, 26)
		le.PutUint32(b.kq.sq.take()[148:], 3)
		le.PutUint32(b.kq.sq.take()[148:], 3)
	}
	if n := b.cq.Poll(make([]ib.WC, 9)); n != 1 || w.RKey() != first+2 {
		t.Errorf("%d completions, key %#x", n, w.RKey())
	}
	b.to(b.qp, ib.Reset)
	b.to(b.qp, ib.RTS)
	if n, err := b.qp.PostSend([]ib.SendWR{invalidate(2)}); n != 1 || err != nil {
		t.Errorf("the last invalidation was not done: %v", err)
	}
	b.close(w, m)
}

// A failure that was polled, but not noted yet, is not of the queue pair that was reset meanwhile, nor of a new one with its number.
func TestFailureThenReset(t *testing.T) {
	for _, fresh := range []bool{false, true} {
		b := newBench(t, ib.RC)
		p, q := b.newQP(ib.RC), b.newQP(ib.RC)
		b.k.number = uint32(q.QPN())
		b.kcq().complete(1, 12, 0, 0, b.k.qps[p.Handle].num)
		b.kcq().complete(2, 12, 0, 0, b.k.number)
		b.k.During[26] = func() { // p is noted, and q is to be next
			delete(b.k.During, 26)
			if fresh {
				b.close(q)
				q = b.newQP(ib.RC)
				return
			}
			b.to(q, ib.Reset)
			b.to(q, ib.RTS)
		}
		n := b.cq.Poll(make([]ib.WC, 4))
		if kq := b.k.qps[q.Handle]; n != 2 || p.State() != ib.Err || q.State() != ib.RTS || kq.state != 3 || q.broken.Load() {
			t.Errorf("fresh: %v; %d completions; %v, %v, for the kernel %d", fresh, n, p.State(), q.State(), kq.state)
		}
		b.close(p, q)
	}
}

// An answer of before a reset is not one of the queue pair after it.
func TestQueryBesideReset(t *testing.T) {
	b := newBench(t, ib.RC)
	b.k.During[25] = func() {
		b.to(b.qp, ib.Reset)
		b.kq.state, b.kq.modified = 6, nil
	}
	if a, err := b.qp.Query(); err != nil || a.State != ib.Err || b.qp.State() != ib.Reset || len(b.kq.modified) != 0 {
		t.Errorf("%v, %v; it is in %v, and was moved to %v", a.State, err, b.qp.State(), b.kq.modified)
	}
}

// What has failed before a RESET has failed, polled or not: the kernel's memory says how far it had come, until it is cleared.
func TestFailedBindThenReset(t *testing.T) {
	b := newBench(t, ib.RC)
	m, w, bind, invalidate := b.windowed()
	first := w.RKey()
	again := func() {
		b.to(b.qp, ib.Reset)
		b.to(b.qp, ib.RTS)
	}
	b.post(bind(1), invalidate(1), bind(2))
	le.PutUint32(b.kq.sq.take()[148:], 3)
	le.PutUint32(b.kq.sq.take()[148:], 4)
	b.kcq().complete(7, 6, 0, 0, b.kq.num)
	b.kcq().complete(7, 5, 0, 0, b.kq.num)
	b.k.Errs[26] = unix.EINVAL
	if err := b.qp.Modify(t.Context(), &ib.QPAttr{State: ib.Reset}, ib.AttrState); err == nil || w.RKey() != first+2 {
		t.Errorf("a reset that the kernel refuses changes nothing: %v, key %#x", err, w.RKey())
	}
	delete(b.k.Errs, 26)
	again()
	if w.RKey() != first+1 {
		t.Errorf("the window has key %#x, want %#x", w.RKey(), first+1)
	}
	// rxe dies when a window is invalidated that is not bound.
	b.post(invalidate(1), bind(3))
	le.PutUint32(b.kq.sq.take()[148:], 3)
	again()
	if n, err := b.qp.PostSend([]ib.SendWR{invalidate(3)}); n != 1 || err != nil || w.RKey() != first+1 { // it is no window's
		t.Errorf("%d, %v, key %#x", n, err, w.RKey())
	}
	if n, err := b.qp.PostSend([]ib.SendWR{invalidate(1)}); n != 0 || !errors.Is(err, uverbs.ErrNotBound) {
		t.Errorf("it is bound, by a request that was not done: %d, %v", n, err)
	}
	b.close(w, m)
}

// RESET takes the queue pair's completions along, and nobody else's.
func TestResetTakesCompletions(t *testing.T) {
	b := newBench(t, ib.RC)
	recvs := b.newCQ(15)
	q := b.newQP(ib.RC, func(cfg *driver.QPConfig) { cfg.RecvCQ = recvs })
	kq, krecvs := b.k.qps[q.Handle], b.k.cqs[recvs.handle]
	for round := range 50 { // around the queues
		var want []uint64
		for i := range uint64(7) {
			if (round>>(i%5))&1 == 0 {
				b.kcq().complete(i, 0, 0, 0, b.kq.num)
				want = append(want, i)
			} else {
				b.kcq().complete(i, 5, 0, 0, kq.num)
			}
		}
		krecvs.complete(1, 5, 0, 0, kq.num)
		b.to(q, ib.Reset)
		b.to(q, ib.RTS)
		b.kcq().complete(99, 0, 0, 0, kq.num)
		want = append(want, 99)
		var got []uint64
		wcs := make([]ib.WC, 9)
		for _, wc := range wcs[:b.cq.Poll(wcs)] {
			got = append(got, wc.ID)
		}
		if n := recvs.Poll(wcs); n != 0 || !slices.Equal(got, want) || q.State() != ib.RTS {
			t.Fatalf("%d completions of receives; of sends %v, want %v; it is in %v", n, got, want, q.State())
		}
	}
	b.close(q, recvs)
}

// A queue pair that the kernel does not let go is as if nobody had tried: what was polled meanwhile counts.
func TestPolledDuringRefusedClose(t *testing.T) {
	b := newBench(t, ib.RC)
	depth := b.qp.Cap().MaxSendWR
	signalled := ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled}
	fill := func() {
		t.Helper()
		for i := range depth {
			if n, err := b.qp.PostSend([]ib.SendWR{signalled}); n != 1 {
				t.Fatalf("%d of %d: %v", i, depth, err)
			}
		}
	}
	complete := func(status uint32) {
		for b.kq.sq.posted() > 0 {
			b.kq.sq.take()
			b.kcq().complete(1, status, 0, 0, b.kq.num)
		}
	}
	wcs := make([]ib.WC, depth+1)
	b.k.Errs[27] = unix.EBUSY
	b.k.During[27] = func() {
		if n := b.cq.Poll(wcs); n != depth {
			t.Errorf("%d completions", n)
		}
		if n, err := b.qp.PostSend([]ib.SendWR{signalled}); n != 0 || !errors.Is(err, driver.ErrClosed) {
			t.Error(n, err)
		}
		if n, err := b.qp.PostRecv(make([]ib.RecvWR, 1)); n != 0 || !errors.Is(err, driver.ErrClosed) {
			t.Error(n, err)
		}
		if _, err := b.qp.Query(); !errors.Is(err, driver.ErrClosed) {
			t.Error(err)
		}
	}
	refused := func() {
		t.Helper()
		if err := b.qp.Close(); !errors.Is(err, driver.ErrBusy) {
			t.Error(err)
		}
	}
	for range 3 {
		fill()
		complete(0)
		refused()
	}
	fill()
	complete(12) // failed, and flushed
	b.kq.modified = nil
	refused()
	if b.qp.State() != ib.Err || string(b.kq.modified) != "\x06" {
		t.Errorf("it has failed, and is in %v, and was moved to %v", b.qp.State(), b.kq.modified)
	}
	clear(b.k.Errs)
	clear(b.k.During)
}

// A number may be another queue pair's as soon as the kernel has ended the one that had it.
func TestNumberIsReused(t *testing.T) {
	b := newBench(t, ib.RC)
	old := b.newQP(ib.RC)
	b.k.number = uint32(old.QPN())
	b.kcq().complete(1, 0, 0, 0, b.k.number)
	if n := b.cq.Poll(make([]ib.WC, 1)); n != 1 || old.polled != 1 {
		t.Error(n, old.polled)
	}
	var fresh *qp
	b.k.During[27] = func() {
		delete(b.k.During, 27)
		fresh = b.newQP(ib.RC)
		b.kcq().complete(2, 0, 0, 0, b.k.number)
		if n := b.cq.Poll(make([]ib.WC, 1)); n != 1 || fresh.polled != 1 {
			t.Errorf("%d completions, and %d count", n, fresh.polled)
		}
	}
	b.close(old)
	if b.c.qp(fresh.QPN()) != fresh {
		t.Error("it is not known any more")
	}
	b.close(fresh)
}

// Changes and the end of a queue pair may come at the same time.
func TestModifyBesideClose(t *testing.T) {
	for _, s := range []ib.QPState{ib.RTS, ib.Reset} {
		b := newBench(t, ib.RC)
		q := b.newQP(ib.RC)
		closed := make(chan error, 1)
		b.k.During[26] = func() {
			go func() { closed <- q.Close() }()
			for q.sendMu.TryLock() { // until Close has come as far as it can
				done := q.closing
				q.sendMu.Unlock()
				if done {
					break
				}
				runtime.Gosched()
			}
			delete(b.k.During, 26)
		}
		if err := q.Modify(t.Context(), &ib.QPAttr{State: s}, ib.AttrState); err != nil {
			t.Error(err)
		}
		if err := <-closed; err != nil {
			t.Error(err)
		}
	}
}
