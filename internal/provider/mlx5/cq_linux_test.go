//go:build amd64 || arm64

package mlx5

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// version0 makes completions name queue pairs by number.
func version0(k *fakeKernel) { k.resp.CQEVersion = 0 }

// versions runs a test with both ways in which completions name queue pairs.
func versions(t *testing.T, f func(t *testing.T, b *bench)) {
	t.Run("by index", func(t *testing.T) { f(t, bare(t)) })
	t.Run("by number", func(t *testing.T) { f(t, bare(t, version0)) })
}

// What each kind of completion says.
func TestCompletions(t *testing.T) {
	versions(t, func(t *testing.T, b *bench) {
		b.with(ib.RC)
		if want := b.kq.number; !b.c.info.byIndex && b.kq.index != noUserIndex || b.c.info.byIndex && b.kq.index == noUserIndex {
			t.Errorf("queue pair %#x was made with the index %#x", want, b.kq.index)
		}
		for i, op := range []ib.Opcode{ib.OpSend, ib.OpRDMAWrite, ib.OpRDMARead, ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd, ib.OpLocalInv, ib.OpSendWithInv} {
			wr := ib.SendWR{ID: uint64(i + 10), Opcode: op, Flags: ib.SendSignaled, SGEs: []ib.SGE{sge(1, 8)}}
			b.post(wr)
			_, c := b.kq.takeSend()
			be.PutUint32(c[44:], 8)
			be.PutUint32(c[36:], 77)
			b.kc.add(c)
			want := ib.WC{ID: wr.ID, Opcode: ib.WCOpcodeOf(op), QPN: ib.QPN(b.kq.number)}
			if op == ib.OpRDMARead || op == ib.OpAtomicCmpSwap || op == ib.OpAtomicFetchAdd {
				want.ByteLen = 8
			}
			if got := b.poll(1)[0]; got != want {
				t.Errorf("%v: %+v, want %+v", op, got, want)
			}
		}
		for i, c := range []struct {
			code byte
			want ib.WC
		}{
			{cqeRecv, ib.WC{Opcode: ib.WCRecv}},
			{cqeRecvImm, ib.WC{Opcode: ib.WCRecv, Flags: ib.WCWithImm, Imm: 0x01020304}},
			{cqeRecvInv, ib.WC{Opcode: ib.WCRecv, Flags: ib.WCWithInv, InvalidatedRKey: 0x01020304}},
			{cqeRecvWrite, ib.WC{Opcode: ib.WCRecvRDMAWithImm, Flags: ib.WCWithImm, Imm: 0x01020304}},
		} {
			c.want.ID, c.want.ByteLen, c.want.QPN = uint64(i+50), 99, ib.QPN(b.kq.number)
			b.recv(ib.RecvWR{ID: c.want.ID})
			e := b.kq.cqeOf(c.code, uint16(i))
			be.PutUint32(e[36:], 0x01020304)
			be.PutUint32(e[44:], 99)
			be.PutUint32(e[24:], 0x3a123456) // of no meaning on RC
			b.kc.add(e)
			if got := b.poll(1)[0]; got != c.want {
				t.Errorf("code %d: %+v, want %+v", c.code, got, c.want)
			}
		}
	})
}

func TestDatagramCompletion(t *testing.T) {
	b := newBench(t, ib.UD)
	for i, f := range []uint32{0x3a123456, 0x0a123456} {
		b.recv(ib.RecvWR{ID: 5})
		e := b.kq.cqeOf(cqeRecv, uint16(i))
		be.PutUint16(e[22:], 0x77)
		be.PutUint32(e[24:], f)
		be.PutUint32(e[44:], 48)
		b.kc.add(e)
		want := ib.WC{ID: 5, Opcode: ib.WCRecv, ByteLen: 48, QPN: ib.QPN(b.kq.number), SrcQPN: 0x123456, SL: 10, SLID: 0x77}
		if i == 0 {
			want.Flags = ib.WCGRH
		}
		if got := b.poll(1)[0]; got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
}

func TestErrorCompletions(t *testing.T) {
	versions(t, func(t *testing.T, b *bench) {
		b.with(ib.RC)
		i := 0
		for syndrome, want := range map[byte]ib.WCStatus{
			1: ib.WCLocalLengthErr, 2: ib.WCLocalQPOpErr, 4: ib.WCLocalProtErr, 5: ib.WCFlushErr, 6: ib.WCMWBindErr, 0x10: ib.WCBadRespErr,
			0x11: ib.WCLocalAccessErr, 0x12: ib.WCRemoteInvalidReqErr, 0x13: ib.WCRemoteAccessErr, 0x14: ib.WCRemoteOpErr,
			0x15: ib.WCRetryExceeded, 0x16: ib.WCRNRRetryExceeded, 0x22: ib.WCRemoteAbortedErr,
			0: ib.WCGeneralErr, 3: ib.WCGeneralErr, 0x23: ib.WCGeneralErr, 0xff: ib.WCGeneralErr,
		} {
			vendor := uint32(0x88)
			if want == ib.WCGeneralErr {
				vendor |= uint32(syndrome) << 8
			}
			b.post(ib.SendWR{ID: 1, Opcode: ib.OpSend}, ib.SendWR{ID: 2, Opcode: ib.OpRDMAWrite}) // the second fails, signalled or not
			b.kq.takeSend()
			_, c := b.kq.takeSend()
			c[54], c[55], c[63] = 0x88, syndrome, cqeRequestErr<<4
			b.kc.add(c)
			got := b.poll(1)[0]
			if w := (ib.WC{ID: 2, Status: want, Opcode: ib.WCRDMAWrite, QPN: ib.QPN(b.kq.number), VendorErr: vendor}); got != w {
				t.Errorf("syndrome %#x: %+v, want %+v", syndrome, got, w)
			}
			b.recv(ib.RecvWR{ID: 3})
			c = b.kq.cqeOf(cqeRecvErr, uint16(i))
			c[54], c[55] = 0x88, syndrome
			b.kc.add(c)
			got = b.poll(1)[0]
			if w := (ib.WC{ID: 3, Status: want, Opcode: ib.WCRecv, QPN: ib.QPN(b.kq.number), VendorErr: vendor}); got != w {
				t.Errorf("syndrome %#x: %+v, want %+v", syndrome, got, w)
			}
			i++
		}
		if err := b.cq.Err(); err != nil {
			t.Error(err)
		}
	})
}

// A completion that cannot be ends its queue, with what is wrong.
func TestImpossibleCompletions(t *testing.T) {
	type change = func(b *bench, c *[64]byte)
	for name, c := range map[string]struct {
		change change
		say    string
	}{
		"unknown queue pair":        {func(b *bench, c *[64]byte) { be.PutUint32(c[32:], 0x777777); be.PutUint32(c[56:], 0x0a777777) }, "none of this queue"},
		"no queue pair":             {func(b *bench, c *[64]byte) { be.PutUint32(c[32:], noUserIndex); be.PutUint32(c[56:], 0x0affffff) }, "none of this queue"},
		"another operation":         {func(b *bench, c *[64]byte) { c[56] = codeRead }, "an operation 0x10"},
		"unknown opcode":            {func(b *bench, c *[64]byte) { c[63] = 9 << 4 }, "opcode is 9"},
		"resize, without a reason":  {func(b *bench, c *[64]byte) { c[63] = cqeResize << 4 }, "opcode is 5"},
		"data in the completion":    {func(b *bench, c *[64]byte) { c[63] |= 4 }, "format 0x4"},
		"compressed":                {func(b *bench, c *[64]byte) { c[63] |= 12 }, "format 0xc"},
		"request never posted":      {func(b *bench, c *[64]byte) { be.PutUint16(c[60:], 1) }, "at block 1"},
		"request of last time":      {func(b *bench, c *[64]byte) { be.PutUint16(c[60:], uint16(len(b.kq.sq)/64)) }, "none is outstanding"},
		"middle of a request":       {func(b *bench, c *[64]byte) { be.PutUint16(c[60:], 0xffff) }, "none is outstanding"},
		"failed, never posted":      {func(b *bench, c *[64]byte) { be.PutUint16(c[60:], 1); c[63] = cqeRequestErr << 4 }, "at block 1"},
		"receive never posted":      {func(b *bench, c *[64]byte) { c[63] = cqeRecv << 4; be.PutUint16(c[60:], 1) }, "not the oldest"},
		"receive out of turn":       {func(b *bench, c *[64]byte) { c[63] = cqeRecv << 4; be.PutUint16(c[60:], 3) }, "not the oldest"},
		"failed receive, likewise":  {func(b *bench, c *[64]byte) { c[63] = cqeRecvErr << 4; be.PutUint16(c[60:], 5) }, "not the oldest"},
		"request of another's":      {func(b *bench, c *[64]byte) { b.cross(c, 0) }, "complete elsewhere"},
		"receive of another's":      {func(b *bench, c *[64]byte) { b.cross(c, cqeRecv) }, "complete elsewhere"},
		"failed request of another": {func(b *bench, c *[64]byte) { b.cross(c, cqeRequestErr) }, "complete elsewhere"},
	} {
		t.Run(name, func(t *testing.T) {
			versions(t, func(t *testing.T, b *bench) {
				b.with(ib.RC)
				b.post(ib.SendWR{ID: 1, Opcode: ib.OpSend, Flags: ib.SendSignaled})
				b.recv(ib.RecvWR{ID: 2})
				_, bad := b.kq.takeSend()
				c.change(b, &bad)
				b.kc.add(bad)
				wcs := make([]ib.WC, 4)
				if n := b.cq.Poll(wcs); n != -1 {
					t.Fatalf("%d completions: %+v", n, wcs[0])
				}
				err := b.cq.Err()
				if !errors.Is(err, ErrDevice) || !strings.Contains(err.Error(), c.say) {
					t.Errorf("%v", err)
				}
				if n := b.cq.Poll(wcs); n != -1 {
					t.Errorf("%d completions afterwards", n)
				}
				mustBe(t, "arm", b.cq.Arm(false), ErrDevice)
			})
		})
	}
	t.Run("wrong number", func(t *testing.T) { // that of another queue pair than the index's
		b := newBench(t, ib.RC)
		b.post(ib.SendWR{Opcode: ib.OpSend})
		_, c := b.kq.takeSend()
		c[59]++
		b.kc.add(c)
		if n := b.cq.Poll(make([]ib.WC, 1)); n != -1 || !strings.Contains(b.cq.Err().Error(), "and its index") {
			t.Error(n, b.cq.Err())
		}
	})
	t.Run("good ones before", func(t *testing.T) {
		b := newBench(t, ib.RC)
		b.post(ib.SendWR{ID: 3, Opcode: ib.OpSend, Flags: ib.SendSignaled})
		b.kq.complete()
		b.kc.add([64]byte{63: 7 << 4})
		wcs := make([]ib.WC, 4)
		if n := b.cq.Poll(wcs); n != 1 || wcs[0].ID != 3 {
			t.Error(n, wcs[0])
		}
		if n := b.cq.Poll(wcs); n != -1 {
			t.Error(n)
		}
	})
}

// cross makes c of a queue pair that has one side in b.cq, and this one elsewhere.
func (b *bench) cross(c *[64]byte, code byte) {
	elsewhere := b.newCQ(7, nil)
	q := b.newQP(ib.RC, func(cfg *driver.QPConfig) {
		if code == cqeRecv {
			cfg.RecvCQ = elsewhere
		} else {
			cfg.SendCQ = elsewhere
		}
	})
	b.t.Cleanup(func() { b.close(q, elsewhere) })
	q.PostSend([]ib.SendWR{{Opcode: ib.OpSend}})
	q.PostRecv([]ib.RecvWR{{}})
	*c = b.k.qps[q.Handle].cqeOf(code, 0)
	c[56] = codeSend
}

// The ring is written over and over, and the consumer index follows.
func TestRing(t *testing.T) {
	versions(t, func(t *testing.T, b *bench) {
		b.with(ib.RC)
		if b.cq.Entries() != 63 || b.kc.n != 64 {
			t.Fatalf("%d entries in a ring of %d", b.cq.Entries(), b.kc.n)
		}
		total := uint32(0)
		for round := range 60 {
			n := round%13 + 1
			for i := range n {
				b.post(ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled})
			}
			b.kq.complete()
			for i, wc := range b.poll(n) {
				if wc.ID != uint64(i) {
					t.Fatalf("round %d: %+v", round, wc)
				}
			}
			total += uint32(n)
			if got := be.Uint32(b.kc.record[0:]); got != total {
				t.Fatalf("consumer index %d, want %d", got, total)
			}
		}
	})
}

// A queue pair that is reset, or closed, leaves no completions behind; those of others stay, in order.
func TestCompletionsOfTheClosed(t *testing.T) {
	versions(t, func(t *testing.T, b *bench) {
		b.with(ib.RC)
		for _, start := range []int{0, 50} { // the second time round the end of the ring
			other := b.newQP(ib.RC)
			ko := b.k.qps[other.Handle]
			for range start {
				b.post(ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled})
				b.kq.complete()
				b.poll(1)
			}
			for _, act := range []func(){func() { b.to(other, ib.Reset); b.to(other, ib.RTS) }, func() { b.close(other) }} {
				for i := range 8 {
					b.post(ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled})
					if n, err := other.PostSend([]ib.SendWR{{ID: 99, Opcode: ib.OpSend, Flags: ib.SendSignaled}}); n != 1 {
						t.Fatal(err)
					}
					if i != 3 {
						ko.complete()
					}
					b.kq.complete()
				}
				act()
				for i, wc := range b.poll(8) {
					if wc.ID != uint64(i) || wc.QPN != b.qp.QPN() {
						t.Fatalf("completion %d is %+v", i, wc)
					}
				}
				if got, want := be.Uint32(b.kc.record[0:]), b.kc.next; got != want {
					t.Errorf("consumer index %d, and the device is at %d", got, want)
				}
			}
			if n, err := other.PostSend([]ib.SendWR{{Opcode: ib.OpSend}}); n != 0 || err != driver.ErrClosed {
				t.Errorf("%d, %v", n, err)
			}
			if n, err := other.PostRecv([]ib.RecvWR{{}}); n != 0 || err != driver.ErrClosed {
				t.Errorf("%d, %v", n, err)
			}
		}
	})
}

// After a reset the queues begin from the start, for the device too.
func TestReset(t *testing.T) {
	b := newBench(t, ib.RC)
	for range 3 {
		b.post(ib.SendWR{ID: 1, Opcode: ib.OpLocalInv}, ib.SendWR{ID: 1, Opcode: ib.OpLocalInv, Flags: ib.SendSignaled})
		b.recv(ib.RecvWR{ID: 2}, ib.RecvWR{ID: 3})
		b.kc.add(b.kq.cqeOf(cqeRecv, 0))
		b.to(b.qp, ib.Reset)
		if le.Uint64(b.kq.record) != 0 {
			t.Errorf("doorbell record %x", b.kq.record)
		}
		b.to(b.qp, ib.RTS)
		b.poll(0)
		b.post(ib.SendWR{ID: 4, Opcode: ib.OpSend, Flags: ib.SendSignaled})
		b.recv(ib.RecvWR{ID: 5})
		sameBytes(t, "the first element", b.kq.sq, unhex(t, "0000000a 00010001 00000008 00000000")) // no fence of old
		b.kq.complete()
		b.kc.add(b.kq.cqeOf(cqeRecv, 0))
		if wcs := b.poll(2); wcs[0].ID != 4 || wcs[1].ID != 5 {
			t.Errorf("%+v", wcs)
		}
		b.to(b.qp, ib.Reset)
		b.to(b.qp, ib.RTS)
	}
}

// Moderation is the kernel's to set, in microseconds, of which the last one is whole.
func TestModerate(t *testing.T) {
	b := newBench(t, ib.RC)
	if a, err := b.c.QueryDevice(); err != nil || a.MaxModerateCount != 65535 || a.MaxModeratePeriod != 4095*time.Microsecond {
		t.Errorf("%d, %v, %v", a.MaxModerateCount, a.MaxModeratePeriod, err)
	}
	if err := b.cq.Moderate(0x1234, 0x567*time.Microsecond-1); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 16)
	le.PutUint32(want, b.cq.handle)
	want[4] = 1
	le.PutUint16(want[8:], 0x1234)
	le.PutUint16(want[10:], 0x567)
	if !bytes.Equal(b.k.moderation, want) {
		t.Errorf("% x", b.k.moderation)
	}
	b.k.Errs[0x80000039] = unix.EOPNOTSUPP
	mustBe(t, "of a device that has none", b.cq.Moderate(1, 0), errors.ErrUnsupported)
}

// What is queued moves to the new ring, in order, from wherever it was.
func TestResize(t *testing.T) {
	b := newBench(t, ib.RC)
	id := uint64(0)
	post := func(n int) {
		for range n {
			id++
			b.post(ib.SendWR{ID: id, Opcode: ib.OpSend, Flags: ib.SendSignaled})
		}
		b.kq.complete()
	}
	for i, n := range []int{100, 20, 500, 20, 63, 16, 4000} {
		queued := i * 2
		post(queued)
		first := id - uint64(queued) + 1
		if err := b.cq.Resize(n); err != nil {
			t.Fatalf("to %d: %v", n, err)
		}
		if b.cq.Entries() < n || uint32(b.cq.Entries()) != b.kc.n-1 {
			t.Errorf("%d entries, and %d asked for", b.cq.Entries(), n)
		}
		post(3)
		for j, wc := range b.poll(queued + 3) {
			if wc.ID != first+uint64(j) {
				t.Fatalf("to %d: completion %d is %+v", n, j, wc)
			}
		}
		if got := be.Uint32(b.kc.record[0:]); got != b.kc.next {
			t.Errorf("consumer index %d, and the device is at %d", got, b.kc.next)
		}
	}
	post(12)
	if err := b.cq.Resize(7); err == nil || !strings.Contains(err.Error(), "poll them first") {
		t.Errorf("to less than is queued: %v", err)
	}
	b.poll(12)
	for _, n := range []int{0, -1, 1 << 22} {
		if err := b.cq.Resize(n); err == nil {
			t.Errorf("to %d entries", n)
		}
	}
	b.k.Errs[19] = 12
	if err := b.cq.Resize(30); err == nil {
		t.Error("the kernel's refusal is ignored")
	}
	delete(b.k.Errs, 19)
	post(1)
	b.poll(1)
	b.k.Tweak = func(cmd uint32, out, _ []byte) {
		if cmd == 19 {
			le.PutUint32(out, 62)
		}
	}
	if err := b.cq.Resize(30); !errors.Is(err, ErrDevice) || b.cq.Poll(make([]ib.WC, 1)) != -1 {
		t.Errorf("the kernel speaks of another size: %v", err)
	}
	b.k.Tweak = nil
	last := b.cq
	b.cq = b.newCQ(63, nil)
	defer b.close(b.cq)
	defer func() { b.cq = last }()
	b.k.resized = func(*fakeCQ, *fakeCQ) {} // without a word
	if err := b.cq.Resize(30); !errors.Is(err, ErrDevice) {
		t.Errorf("the device does not say where it goes on: %v", err)
	}
	if n := b.cq.Poll(make([]ib.WC, 1)); n != -1 {
		t.Errorf("%d completions", n)
	}
}

// Arming names the queue, where it was polled to, and how many of its events were taken.
func TestArm(t *testing.T) {
	b := bare(t)
	ch, err := b.c.CreateCompChannel()
	if err != nil {
		t.Fatal(err)
	}
	old := b.cq
	b.cq = b.newCQ(15, ch)
	b.kc = b.k.cqs[b.cq.handle]
	t.Cleanup(func() { b.close(old, ch) })
	b.with(ib.RC)
	reg := b.k.pages[b.k.nc][0x20:]
	if b.kc.flags != abi.MLX5_IB_CREATE_CQ_FLAGS_UAR_PAGE_INDEX || uint32(b.kc.uarPage) != b.k.nc {
		t.Errorf("the queue was made with flags %d and page %d", b.kc.flags, b.kc.uarPage)
	}
	check := func(v uint32) {
		t.Helper()
		want := be.AppendUint32(be.AppendUint32(nil, v), b.kc.number)
		if !slices.Equal(reg[:8], want) || be.Uint32(b.kc.record[4:]) != v {
			t.Errorf("armed by %x and %x, want %x", reg[:8], b.kc.record[4:], want)
		}
	}
	for events := range uint32(6) {
		if err := b.cq.Arm(true); err != nil {
			t.Fatal(err)
		}
		check(events&3<<28 | 1<<24 | events)
		for _, solicitedOnly := range []bool{false, true} { // the latter takes nothing back (IBA 11.4.2.2)
			if err := b.cq.Arm(solicitedOnly); err != nil {
				t.Fatal(err)
			}
			check(events&3<<28 | events)
		}
		b.post(ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled})
		b.kq.complete()
		b.poll(1)
		var e [8]byte
		le.PutUint64(e[:], b.k.Cookies[b.cq.handle])
		write(t, b.k.Channel, e[:])
		got, err := ch.Wait(t.Context())
		if err != nil || got != driver.CQ(b.cq) {
			t.Fatal(got, err)
		}
	}
}

// The kernel says that a queue has overrun.
func TestOverrun(t *testing.T) {
	b := newBench(t, ib.RC)
	b.k.Event(b.cq.handle, ib.EventCQErr)
	testutil.Eventually(t, "an overrun queue", func() bool { return errors.Is(b.cq.Err(), errOverrun) })
	if n := b.cq.Poll(make([]ib.WC, 1)); n != -1 {
		t.Error(n)
	}
	e, err := b.c.AsyncEvent(t.Context())
	if err != nil || e.Type != ib.EventCQErr || e.CQ != driver.CQ(b.cq) {
		t.Errorf("%+v, %v", e, err)
	}
}

// The device fails: everything says so, and can be closed.
func TestFatal(t *testing.T) {
	b := newBench(t, ib.RC)
	b.k.Event(0, ib.EventDeviceFatal)
	testutil.Eventually(t, "a device that has failed", func() bool { return b.cq.Poll(make([]ib.WC, 1)) == -1 })
	mustBe(t, "the queue", b.cq.Err(), driver.ErrDeviceRemoved)
	if e, err := b.c.AsyncEvent(t.Context()); err != nil || e.Type != ib.EventDeviceFatal {
		t.Errorf("%+v, %v", e, err)
	}
	_, err := b.c.AsyncEvent(t.Context())
	mustBe(t, "another event", err, driver.ErrDeviceRemoved)
	b.k.Dead = true // from now on the kernel says that, too
}

// Completions of all contents are decoded without a panic, and what is accepted is of a request that was posted.
func FuzzCompletion(f *testing.F) {
	var good [64]byte
	be.PutUint32(good[32:], 1)
	be.PutUint32(good[56:], 0x0a000100)
	for shape := range uint8(16) {
		for code := range uint8(16) {
			good[63] = code << 4
			f.Add(bytes.Clone(good[:]), shape)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, shape uint8) {
		var c [64]byte
		copy(c[:], data)
		var change []func(*fakeKernel)
		if shape&1 != 0 {
			change = append(change, version0)
		}
		b := bare(t, change...)
		typ := [...]ib.QPType{ib.RC, ib.UC, ib.UD, ib.RC}[shape>>1&3]
		var s driver.SRQ
		if shape&8 != 0 {
			var err error
			if s, err = b.pd.CreateSRQ(driver.SRQConfig{MaxWR: 7, MaxSGE: 1}); err != nil {
				t.Fatal(err)
			}
		}
		q := b.newQP(typ, func(cfg *driver.QPConfig) {
			if s != nil {
				cfg.SRQ = s
			}
		})
		defer func() {
			b.close(q)
			if s != nil {
				b.close(s)
			}
		}()
		if typ != ib.UD {
			if n, err := q.PostSend([]ib.SendWR{{ID: 1000, Opcode: ib.OpSend}, {ID: 1001, Opcode: ib.OpRDMAWrite}, {ID: 1002, Opcode: ib.OpLocalInv}}); n != 3 {
				t.Fatal(err)
			}
		}
		recvs := []ib.RecvWR{{ID: 2000}, {ID: 2001}}
		if s != nil {
			s.PostRecv(recvs)
		} else {
			q.PostRecv(recvs)
		}
		for range 3 { // the same again must not complete the same again
			b.kc.add(c)
		}
		wcs := make([]ib.WC, 8)
		n := b.cq.Poll(wcs)
		seen := map[uint64]bool{}
		for _, wc := range wcs[:max(n, 0)] {
			if wc.ID < 1000 || wc.ID > 2001 || wc.ID > 1002 && wc.ID < 2000 || seen[wc.ID] || wc.QPN != q.QPN() || wc.Status > ib.WCGeneralErr {
				t.Errorf("%+v of %x", wc, c)
			}
			seen[wc.ID] = true
		}
		if c[63]>>4 != cqeNever && n < 3 && b.cq.Err() == nil {
			t.Errorf("%d completions and no error of %x", n, c)
		}
	})
}

// A queue pair is reset, or closed, while its completion queue moves to another ring: its completions do not move along.
func TestResizeBesideTheClosed(t *testing.T) {
	for name, end := range map[string]func(b *bench, q *qp) error{
		"reset": func(b *bench, q *qp) error {
			return q.Modify(b.t.Context(), &ib.QPAttr{State: ib.Reset}, ib.AttrState)
		},
		"closed": func(_ *bench, q *qp) error { return q.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			versions(t, func(t *testing.T, b *bench) {
				b.with(ib.RC)
				elsewhere := b.newCQ(7, nil)
				for _, swap := range []bool{false, true} {
					other := b.newQP(ib.RC, func(cfg *driver.QPConfig) {
						if cfg.RecvCQ = elsewhere; swap {
							cfg.SendCQ, cfg.RecvCQ = cfg.RecvCQ, cfg.SendCQ
						}
					})
					ko := b.k.qps[other.Handle]
					for i := range 4 {
						b.post(ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled})
						b.kq.complete()
						if swap {
							other.PostRecv([]ib.RecvWR{{ID: 99}})
							b.kc.add(ko.cqeOf(cqeRecv, uint16(i)))
						} else {
							other.PostSend([]ib.SendWR{{ID: 99, Opcode: ib.OpSend, Flags: ib.SendSignaled}})
							ko.complete()
						}
					}
					ended := make(chan error, 1)
					b.k.resized = func(old, _ *fakeCQ) {
						b.k.Mu.Unlock() // the kernel takes other commands meanwhile
						go func() { ended <- end(b, other) }()
						select {
						case err := <-ended:
							ended <- err
						case <-time.After(20 * time.Millisecond):
						}
						b.k.Mu.Lock()
						old.add([64]byte{63: 5 << 4})
					}
					if err := b.cq.Resize(2 * b.cq.Entries()); err != nil {
						t.Fatal(err)
					}
					if err := <-ended; err != nil {
						t.Fatal(err)
					}
					for i, wc := range b.poll(4) {
						if wc.ID != uint64(i) || wc.QPN != b.qp.QPN() {
							t.Errorf("completion %d is %+v", i, wc)
						}
					}
					if name == "reset" {
						b.close(other)
					}
				}
				b.close(elsewhere)
			})
		})
	}
}
