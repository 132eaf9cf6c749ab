package siw

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func send(id uint64, flags ib.SendFlags, sges ...ib.SGE) ib.SendWR {
	return ib.SendWR{ID: id, Opcode: ib.OpSend, Flags: flags, SGEs: sges}
}

func read(id uint64, flags ib.SendFlags) ib.SendWR {
	return ib.SendWR{ID: id, Opcode: ib.OpRDMARead, Flags: flags, SGEs: []ib.SGE{{Addr: 0x1000, Length: 8, LKey: 5}}, RemoteAddr: 0x2000, RKey: 6}
}

func ids(wcs []ib.WC) (ids []uint64) {
	for _, wc := range wcs {
		ids = append(ids, wc.ID)
	}
	return ids
}

func TestDevice(t *testing.T) {
	_, c := newFake(t)
	a, err := c.QueryDevice()
	if err != nil || a.MaxInline != 80 || !a.Caps.Has(ib.CapCMOnly|ib.CapSRQ) || a.Caps.Has(ib.CapImm) || a.Caps.Has(ib.CapAtomic) {
		t.Errorf("%+v, %v", a, err)
	}
	if p, err := c.QueryPort(1); err != nil || p.MaxMessage != 1<<31-1 {
		t.Errorf("%+v, %v", p, err)
	}
	pd, err := c.AllocPD()
	if err != nil {
		t.Fatal(err)
	}
	defer pd.Close()
	if _, err := pd.CreateAH(ib.AHAttr{}); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "iWARP") {
		t.Error(err)
	}
	q, err := c.CreateCQ(driver.CQConfig{Entries: 4})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	for _, typ := range []ib.QPType{ib.UC, ib.UD} {
		if _, err := pd.CreateQP(driver.QPConfig{Type: typ, SendCQ: q, RecvCQ: q}); !errors.Is(err, errors.ErrUnsupported) {
			t.Error(typ, err)
		}
	}
	mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	if _, err := pd.RegisterMR(driver.MRConfig{Mem: mem, Access: ib.AccessLocalWrite | ib.AccessZeroBased}); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
	m, err := pd.RegisterMR(driver.MRConfig{Mem: mem, Access: ib.AccessLocalWrite})
	if err != nil || uint32(m.LKey()) != uint32(m.RKey()) {
		t.Fatal(m, err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// What the elements look like.
func TestElements(t *testing.T) {
	b := connected(t, benchOpts{})
	sges := []ib.SGE{{Addr: 0x1111, Length: 3, LKey: 7}, {Addr: 9, LKey: 9}, {Addr: 0x2222, Length: 4, LKey: 8}}
	inline := []byte("inline data")
	b.post(
		send(10, ib.SendSignaled|ib.SendSolicited, sges...),
		ib.SendWR{ID: 11, Opcode: ib.OpRDMAWrite, Flags: ib.SendFence, Inline: inline, RemoteAddr: 0xaaaa, RKey: 0xbb},
		read(12, ib.SendFence|ib.SendSignaled),
		ib.SendWR{ID: 13, Opcode: ib.OpRDMARead, Flags: ib.SendSignaled, RemoteAddr: 1, RKey: 2},
	)
	if b.k.bells != 1 {
		t.Errorf("%d doorbells", b.k.bells)
	}
	e := b.kq.sq.take() // an SGE of no bytes is left out
	if le.Uint64(e) != 0 || le.Uint16(e[8:]) != 1|4|8 || e[10] != 2 || e[11] != 3 || le.Uint64(e[24:]) != 0x1111 || le.Uint32(e[32:]) != 3 ||
		le.Uint32(e[36:]) != 7 || le.Uint64(e[40:]) != 0x2222 || le.Uint32(e[48:]) != 4 || le.Uint32(e[52:]) != 8 {
		t.Errorf("SEND: % x", e)
	}
	e = b.kq.sq.take()
	if le.Uint64(e) != 1 || le.Uint16(e[8:]) != 1|2 || e[10] != 1 || e[11] != 0 || le.Uint32(e[12:]) != 0xbb || le.Uint64(e[16:]) != 0xaaaa ||
		le.Uint32(e[32:]) != uint32(len(inline)) || string(e[40:][:len(inline)]) != string(inline) {
		t.Errorf("inline WRITE: % x", e)
	}
	e = b.kq.sq.take() // a READ has no fence
	if le.Uint64(e) != 2 || le.Uint16(e[8:]) != 1|4 || e[10] != 1 || e[11] != 1 || le.Uint32(e[12:]) != 6 || le.Uint64(e[16:]) != 0x2000 {
		t.Errorf("READ: % x", e)
	}
	e = b.kq.sq.take()
	if le.Uint64(e) != 3 || le.Uint16(e[8:]) != 1|4 || e[10] != 0 || e[11] != 0 {
		t.Errorf("READ of nothing, which is a WRITE: % x", e)
	}
	b.complete(e, 0)
	if wcs := b.poll(b.scq); len(wcs) != 0 { // those before it are not done
		t.Error(wcs)
	}
	// A little payload is cut in two.
	b.post(send(14, ib.SendSignaled, ib.SGE{Addr: 0x100, Length: 8, LKey: 3}), send(15, ib.SendSignaled, ib.SGE{Addr: 0x100, Length: 65, LKey: 3}),
		send(16, ib.SendSignaled, ib.SGE{Addr: 0x100, Length: 1, LKey: 3}))
	e = b.kq.sq.take()
	if e[10] != 2 || le.Uint64(e[24:]) != 0x100 || le.Uint32(e[32:]) != 7 || le.Uint32(e[36:]) != 3 || le.Uint64(e[40:]) != 0x107 || le.Uint32(e[48:]) != 1 ||
		le.Uint32(e[52:]) != 3 {
		t.Errorf("SEND of 8 bytes: % x", e)
	}
	if a, b := b.kq.sq.take(), b.kq.sq.take(); a[10] != 1 || b[10] != 1 || le.Uint32(a[32:]) != 65 || le.Uint32(b[32:]) != 1 {
		t.Errorf("SENDs of 65 bytes and of one: % x, % x", a, b)
	}
	if n, err := b.q.PostRecv([]ib.RecvWR{{ID: 77, SGEs: []ib.SGE{{Addr: 5, Length: 6, LKey: 7}}}}); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	e = b.kq.rq.slot(0)
	if le.Uint64(e) != 0 || le.Uint16(e[8:]) != 1 || e[10] != 1 || le.Uint64(e[16:]) != 5 || le.Uint32(e[24:]) != 6 || le.Uint32(e[28:]) != 7 {
		t.Errorf("receive: % x", e)
	}
}

func TestRefused(t *testing.T) {
	b := connected(t, benchOpts{})
	two := []ib.SGE{{Length: 1}, {Length: 1}}
	for name, wr := range map[string]ib.SendWR{
		"immediate":       {Opcode: ib.OpSendWithImm},
		"WRITE immediate": {Opcode: ib.OpRDMAWriteWithImm},
		"atomic":          {Opcode: ib.OpAtomicFetchAdd, SGEs: []ib.SGE{{Length: 8}}},
		"bind":            {Opcode: ib.OpBindMW, Bind: &ib.BindMW{}},
		"invalidate":      {Opcode: ib.OpLocalInv},
		"send invalidate": {Opcode: ib.OpSendWithInv},
		"no opcode":       {Opcode: 77},
		"READ of two":     {Opcode: ib.OpRDMARead, SGEs: two},
		"inline READ":     {Opcode: ib.OpRDMARead, Inline: []byte{1}},
		"long inline":     {Opcode: ib.OpSend, Inline: make([]byte, 81)},
		"SGEs":            {Opcode: ib.OpSend, SGEs: make([]ib.SGE, 5)},
		"too long":        {Opcode: ib.OpSend, SGEs: []ib.SGE{{Length: 1 << 31}}},
	} {
		if n, err := b.q.PostSend([]ib.SendWR{wr}); n != 0 || !errors.Is(err, driver.ErrInvalidWR) {
			t.Errorf("%s: %d, %v", name, n, err)
		}
	}
	b.kq.ord = 0
	b.q.Moved(ib.RTS)
	if n, err := b.q.PostSend([]ib.SendWR{read(1, 0)}); n != 0 || !errors.Is(err, driver.ErrInvalidWR) {
		t.Errorf("READ without depth: %d, %v", n, err)
	}
	if b.k.bells != 0 || b.kq.sq.take() != nil {
		t.Error("something was posted")
	}
	if n, err := b.q.PostRecv([]ib.RecvWR{{SGEs: make([]ib.SGE, 3)}}); n != 0 || !errors.Is(err, driver.ErrInvalidWR) {
		t.Error(n, err)
	}
}

func TestStates(t *testing.T) {
	b := newBench(t, benchOpts{})
	ctx := context.Background()
	if n, err := b.q.PostSend([]ib.SendWR{send(1, 0)}); n != 0 || !errors.Is(err, driver.ErrState) {
		t.Errorf("PostSend in INIT: %d, %v", n, err)
	}
	for _, s := range []ib.QPState{ib.RTR, ib.RTS, ib.SQD} {
		if err := b.q.Modify(ctx, &ib.QPAttr{State: s}, ib.AttrState); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("to %v: %v", s, err)
		}
	}
	if n, err := b.q.PostRecv([]ib.RecvWR{{ID: 1}, {ID: 2}}); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	if err := b.q.Modify(ctx, &ib.QPAttr{State: ib.Reset}, ib.AttrState); err != nil {
		t.Fatal(err)
	}
	if le.Uint32(b.kq.rq.slot(0)[8:]) != 0 || le.Uint32(b.kq.rq.slot(1)[8:]) != 0 {
		t.Error("RESET leaves receives")
	}
	if n, err := b.q.PostRecv([]ib.RecvWR{{}}); n != 0 || !errors.Is(err, driver.ErrState) {
		t.Errorf("PostRecv in RESET: %d, %v", n, err)
	}
	if err := b.q.Modify(ctx, &ib.QPAttr{State: ib.Init, Port: 1, Access: 3}, ib.AttrState|ib.AttrPort|ib.AttrAccess|ib.AttrPKeyIndex); err != nil {
		t.Fatal(err)
	}
	b.q.Moved(ib.RTS)
	a, err := b.q.Query()
	if err != nil || a.State != ib.RTS || a.MaxRdAtomic != 16 || a.MaxDestRdAtomic != 1 || a.Access != 3 || a.Port != 1 || b.q.Path() != "iwarp" {
		t.Errorf("%+v, %v, %q", a, err, b.q.Path())
	}
	if err := b.q.Modify(ctx, &ib.QPAttr{State: ib.Reset}, ib.AttrState); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
}

// A reset and the end of a queue pair may come at the same time.
func TestResetBesideClose(t *testing.T) {
	b := newBench(t, benchOpts{})
	closed := make(chan error, 1)
	b.k.During[26] = func() {
		delete(b.k.During, 26)
		go func() { closed <- b.q.Close() }()
		for b.q.recvMu.TryLock() { // until Close has come as far as it can
			b.q.recvMu.Unlock()
			runtime.Gosched()
		}
	}
	if err := b.q.Modify(t.Context(), &ib.QPAttr{State: ib.Reset}, ib.AttrState); err != nil {
		t.Error(err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

// Before Linux 6.8, the state that the kernel answers with is whatever was in its memory.
func TestStateThatNobodyTold(t *testing.T) {
	b := connected(t, benchOpts{})
	b.k.state = 6
	for _, c := range []struct {
		told bool
		want ib.QPState
	}{{false, ib.RTS}, {true, ib.Err}} {
		b.c.tellsState = c.told
		if a, err := b.q.Query(); err != nil || a.State != c.want || a.CurState != c.want || b.q.State() != c.want {
			t.Errorf("told %v: %v, and it is in %v: %v", c.told, a.State, b.q.State(), err)
		}
	}
}

// Slots are free long before completions are polled. What is outstanding stays within the depth all the same, and so completions
// within a completion queue that is as large.
func TestFullMeansUnpolled(t *testing.T) {
	b := connected(t, benchOpts{depth: 4, entries: 4})
	if b.q.Cap().MaxSendWR != 4 || b.q.Cap().MaxRecvWR != 4 || b.q.Cap().MaxInline != 80 {
		t.Fatalf("%+v", b.q.Cap())
	}
	var want, got []uint64
	next := uint64(100)
	for range 50 {
		for {
			n, err := b.q.PostSend([]ib.SendWR{send(next, ib.SendSignaled)})
			if n == 0 {
				if !errors.Is(err, driver.ErrQueueFull) {
					t.Fatal(err)
				}
				break
			}
			want = append(want, next)
			next++
			b.sent(0) // the slot is free
		}
		var wcs [3]ib.WC
		got = append(got, ids(wcs[:b.scq.Poll(wcs[:])])...)
	}
	got = append(got, ids(b.poll(b.scq))...)
	if !slices.Equal(got, want) || len(want) < 100 {
		t.Errorf("got %v\nwant %v", got, want)
	}
	// Receives likewise.
	for round := range 20 {
		n, err := b.q.PostRecv(make([]ib.RecvWR, 6))
		if n != 4 || !errors.Is(err, driver.ErrQueueFull) {
			t.Fatalf("round %d: %d receives, %v", round, n, err)
		}
		for range 4 {
			e := b.kq.rq.take()
			b.kr.complete(le.Uint64(e), 8, 0, 5, b.kq.num)
		}
		if n, err := b.q.PostRecv(make([]ib.RecvWR, 1)); n != 0 || !errors.Is(err, driver.ErrQueueFull) {
			t.Fatalf("a receive more than was polled: %d, %v", n, err)
		}
		if wcs := b.poll(b.rcq); len(wcs) != 4 || wcs[0].ByteLen != 5 || wcs[0].Opcode != ib.WCRecv {
			t.Fatal(wcs)
		}
	}
}

// A READ completes after what follows it; completions come in the order of posting all the same.
func TestOrder(t *testing.T) {
	b := connected(t, benchOpts{})
	b.post(send(1, 0), read(2, ib.SendSignaled), send(3, ib.SendSignaled), read(4, 0), send(5, ib.SendSignaled), send(6, 0))
	b.sent(0)
	r1 := b.kq.sq.take()
	b.sent(0)
	if wcs := b.poll(b.scq); len(wcs) != 0 {
		t.Fatal(wcs)
	}
	r2 := b.kq.sq.take()
	if r2[flagsAt]&4 == 0 {
		t.Error("the kernel will not tell of the unsignaled READ")
	}
	b.sent(0)
	b.complete(r1, 0)
	if got := ids(b.poll(b.scq)); !slices.Equal(got, []uint64{2, 3}) {
		t.Fatal(got)
	}
	b.complete(r2, 0)
	wcs := b.poll(b.scq)
	if got := ids(wcs); !slices.Equal(got, []uint64{5}) || wcs[0].Opcode != ib.WCSend || wcs[0].QPN != b.q.QPN() {
		t.Fatal(wcs)
	}
	if b.scq.hidden.Load() != 0 || b.q.send.room() != 7 { // but for the last one, of which nobody knows
		t.Errorf("%d hidden completions, room for %d", b.scq.hidden.Load(), b.q.send.room())
	}
}

// Unsignaled READs and long messages need completions that the caller does not count with: there are so many to spare.
func TestSpare(t *testing.T) {
	b := connected(t, benchOpts{depth: 1024, entries: 4})
	b.kq.ord = 128
	b.q.Moved(ib.RTS)
	long := send(1, 0, ib.SGE{Length: 5000})
	n := 0
	for ; ; n++ {
		wr := read(uint64(n), 0)
		if n%2 == 1 {
			wr = long
		}
		if k, err := b.q.PostSend([]ib.SendWR{wr}); k == 0 {
			if !errors.Is(err, driver.ErrQueueFull) {
				t.Fatal(err)
			}
			break
		}
	}
	if n != minSpare {
		t.Fatalf("%d accepted", n)
	}
	for range n {
		b.sent(0)
	}
	for i := range b.scq.Entries() {
		b.post(send(uint64(i), ib.SendSignaled))
		b.sent(0) // there is room for all
	}
	if got := b.poll(b.scq); len(got) != b.scq.Entries() || b.scq.hidden.Load() != 0 {
		t.Errorf("%d completions, %d hidden", len(got), b.scq.hidden.Load())
	}
	b.post(read(1, 0))
	if err := b.q.Modify(context.Background(), &ib.QPAttr{State: ib.Err}, ib.AttrState); err != nil {
		t.Fatal(err)
	}
	if wcs := b.poll(b.scq); len(wcs) != 1 || wcs[0].Status != ib.WCFlushErr || b.scq.hidden.Load() != 0 {
		t.Errorf("%v, %d hidden", wcs, b.scq.hidden.Load())
	}
}

// READs beyond the depth of the connection, and requests with a fence, are held back, and what is behind them.
func TestHeldBack(t *testing.T) {
	for _, polled := range []bool{true, false} {
		b := connected(t, benchOpts{depth: 32, entries: 64})
		var taken [][]byte
		take := func(want int, what string) {
			t.Helper()
			testutil.Eventually(t, what, func() bool {
				if polled {
					b.poll(b.scq)
				}
				for e := b.kq.sq.take(); e != nil; e = b.kq.sq.take() {
					taken = append(taken, e)
				}
				return len(taken) >= want
			})
			if len(taken) > want {
				t.Fatalf("%s: %d elements are valid, want %d", what, len(taken), want)
			}
		}
		for i := range uint64(18) {
			b.post(read(i, 0))
		}
		b.post(send(18, 0), send(19, ib.SendFence), send(20, ib.SendSignaled))
		take(16, "as many READs as may be in flight")
		time.Sleep(5 * time.Millisecond)
		take(16, "no more before one is done")
		b.complete(taken[0], 0)
		take(17, "one more")
		b.complete(taken[1], 0)
		take(19, "one more, and a SEND behind it")
		for _, e := range taken[2:17] {
			b.complete(e, 0)
		}
		time.Sleep(5 * time.Millisecond)
		take(19, "the fence waits for the last READ")
		b.complete(taken[17], 0)
		take(21, "all")
		b.complete(taken[20], 0)
		if got := ids(b.poll(b.scq)); !slices.Equal(got, []uint64{20}) || b.q.send.room() != 32 {
			t.Errorf("%v, room for %d", got, b.q.send.room())
		}
		// What is held back is flushed.
		b.post(read(1, 0), send(2, ib.SendFence), send(3, 0))
		if err := b.q.Modify(context.Background(), &ib.QPAttr{State: ib.Err}, ib.AttrState); err != nil {
			t.Fatal(err)
		}
		if got := b.poll(b.scq); !slices.Equal(ids(got), []uint64{1, 2, 3}) || got[2].Status != ib.WCFlushErr || b.scq.hidden.Load() != 0 {
			t.Errorf("%+v", got)
		}
	}
}

func TestSignalAll(t *testing.T) {
	b := connected(t, benchOpts{sigAll: true})
	b.post(send(1, 0), read(2, 0))
	b.sent(0)
	b.sent(0)
	if got := ids(b.poll(b.scq)); !slices.Equal(got, []uint64{1, 2}) {
		t.Error(got)
	}
}

// What the kernel does not flush is flushed here, once, in order, and what it was not asked to tell of is not taken for failed.
func TestFlush(t *testing.T) {
	b := connected(t, benchOpts{depth: 16})
	b.q.PostRecv([]ib.RecvWR{{ID: 50}, {ID: 51}})
	b.post(send(1, 0), send(2, ib.SendSignaled), send(3, 0), send(4, ib.SendSignaled), read(5, 0), send(6, 0))
	b.sent(0)
	b.sent(0)
	b.sent(0) // of 3 nobody hears
	b.k.onErr = func(*fakeQP) {
		e := b.kq.rq.take()
		b.kr.complete(le.Uint64(e), 8, 4, 0, b.kq.num) // one receive; the other stays in its queue
	}
	bad := b.kq.sq.take()
	b.complete(bad, 3) // 4 fails
	wcs := b.poll(b.scq)
	if len(wcs) < 2 || wcs[0].ID != 2 || wcs[0].Status != ib.WCSuccess || wcs[1].ID != 4 || wcs[1].Status != ib.WCLocalQPOpErr || wcs[1].VendorErr != 3 {
		t.Fatalf("%+v", wcs)
	}
	wcs = append(wcs[2:], b.poll(b.scq)...)
	if got := ids(wcs); !slices.Equal(got, []uint64{5, 6}) || wcs[0].Status != ib.WCFlushErr || wcs[1].Status != ib.WCFlushErr {
		t.Fatalf("%+v", wcs)
	}
	if !slices.Equal(b.kq.states, []byte{1, 6}) {
		t.Errorf("states %v", b.kq.states)
	}
	if got := b.poll(b.rcq); !slices.Equal(ids(got), []uint64{50, 51}) || got[1].Status != ib.WCFlushErr {
		t.Errorf("%+v", got)
	}
	// The kernel comes late.
	for range 2 {
		b.sent(4)
	}
	e := b.kq.rq.take()
	b.kr.complete(le.Uint64(e), 8, 4, 0, b.kq.num)
	if wcs := append(b.poll(b.scq), b.poll(b.rcq)...); len(wcs) != 0 {
		t.Errorf("twice: %+v", wcs)
	}
	// What is posted now.
	bells := b.k.bells
	for i := range uint64(40) {
		b.post(send(200+i, 0), read(300+i, ib.SendSignaled))
		if n, err := b.q.PostRecv([]ib.RecvWR{{ID: 400 + i}}); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if got := ids(b.poll(b.scq)); !slices.Equal(got, []uint64{200 + i, 300 + i}) {
			t.Fatal(got)
		}
		if got := ids(b.poll(b.rcq)); !slices.Equal(got, []uint64{400 + i}) {
			t.Fatal(got)
		}
	}
	if b.k.bells != bells {
		t.Error("a doorbell for a queue pair in error")
	}
}

// A doorbell that fails is the queue pair's failure, unless the device has gone.
func TestDoorbellFails(t *testing.T) {
	b := connected(t, benchOpts{})
	b.k.Errs[28] = unix.ENOTCONN
	b.post(send(1, 0))
	if b.q.State() != ib.Err || b.k.bells != bellTries {
		t.Errorf("%v after %d doorbells", b.q.State(), b.k.bells)
	}
	if wcs := b.poll(b.scq); len(wcs) != 1 || wcs[0].ID != 1 || wcs[0].Status != ib.WCFlushErr {
		t.Errorf("%+v", wcs)
	}
	g := connected(t, benchOpts{})
	g.k.Errs[28] = unix.EIO
	if n, err := g.q.PostSend([]ib.SendWR{send(1, 0)}); n != 1 || !errors.Is(err, driver.ErrDeviceRemoved) {
		t.Error(n, err)
	}
}

func TestEvents(t *testing.T) {
	b := connected(t, benchOpts{})
	b.q.PostRecv([]ib.RecvWR{{ID: 9}})
	b.k.Event(b.q.Handle, ib.EventQPAccessErr)
	testutil.Eventually(t, "the event", func() bool { return b.q.State() == ib.Err })
	if wcs := b.poll(b.rcq); len(wcs) != 1 || wcs[0].ID != 9 {
		t.Error(wcs)
	}
	b.k.Event(b.scq.handle, ib.EventCQErr)
	testutil.Eventually(t, "the event", func() bool { return b.scq.Err() != nil })
	if n := b.scq.Poll(make([]ib.WC, 1)); n >= 0 {
		t.Error(n)
	}
}

// Completions of a queue pair that is closed must not be taken for those of the next with its number.
func TestNumberIsReused(t *testing.T) {
	b := connected(t, benchOpts{oneCQ: true})
	cfg := driver.QPConfig{Type: ib.RC, SendCQ: b.scq, RecvCQ: b.scq, Cap: ib.QPCap{MaxSendWR: 4, MaxRecvWR: 4, MaxRecvSGE: 1, MaxSendSGE: 1}}
	for range 10 {
		d, err := b.pd.CreateQP(cfg)
		if err != nil {
			t.Fatal(err)
		}
		q := d.(*qp)
		kq := b.k.qps[q.Handle]
		q.Moved(ib.RTS)
		q.PostSend([]ib.SendWR{send(1000, ib.SendSignaled), read(1001, 0)})
		e := kq.sq.take()
		b.ks.complete(le.Uint64(e), e[11], 0, 0, kq.num)
		b.post(send(1, ib.SendSignaled))
		b.sent(0)
		if kq.num != 2 {
			t.Fatalf("number %d", kq.num)
		}
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
		if n, err := q.PostSend([]ib.SendWR{send(1, 0)}); n != 0 || !errors.Is(err, net.ErrClosed) {
			t.Error(n, err)
		}
		if b.scq.hidden.Load() != 0 {
			t.Error("hidden completions of a closed queue pair")
		}
		next, err := b.pd.CreateQP(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if got := ids(b.poll(b.scq)); !slices.Equal(got, []uint64{1}) {
			t.Errorf("completions %v", got)
		}
		next.Close()
	}
}

func TestSRQ(t *testing.T) {
	b := connected(t, benchOpts{depth: 4, srq: true})
	k := b.k.srqs[b.srq.Handle]
	if n, err := b.q.PostRecv([]ib.RecvWR{{}}); n != 0 || !errors.Is(err, driver.ErrInvalidWR) {
		t.Error(n, err)
	}
	next, want := uint64(10), uint64(10)
	for range 30 {
		for {
			n, err := b.srq.PostRecv([]ib.RecvWR{{ID: next, SGEs: []ib.SGE{{Length: 1}}}})
			if n == 0 {
				if !errors.Is(err, driver.ErrQueueFull) {
					t.Fatal(err)
				}
				break
			}
			next++
			e := k.take()
			b.kr.complete(le.Uint64(e), 8, 0, 3, b.kq.num)
		}
		for _, wc := range b.poll(b.rcq) {
			if wc.ID != want || wc.ByteLen != 3 || wc.QPN != b.q.QPN() {
				t.Fatalf("%+v, want %d", wc, want)
			}
			want++
		}
	}
	if want != next || want < 100 {
		t.Errorf("%d of %d", want, next)
	}
	if err := b.srq.SetLimit(3); err != nil || b.srq.Limit() != 3 || b.k.limit != 3 {
		t.Error(err, b.srq.Limit(), b.k.limit)
	}
	b.k.Event(b.srq.Handle, ib.EventSRQLimit)
	testutil.Eventually(t, "the event", func() bool { return b.srq.Limit() == 0 })
	// Receives of a queue pair in error stay.
	b.srq.PostRecv([]ib.RecvWR{{ID: 1}})
	b.q.Moved(ib.Err)
	if wcs := b.poll(b.rcq); len(wcs) != 0 {
		t.Error(wcs)
	}
}

func TestArm(t *testing.T) {
	b := connected(t, benchOpts{channel: true})
	for _, solicited := range []bool{false, true} { // the kernel does not know solicited receives
		if err := b.scq.Arm(solicited); err != nil || le.Uint32(b.ks.control()) != 3 {
			t.Error(err, b.ks.control())
		}
	}
	var e [8]byte
	le.PutUint64(e[:], b.scq.cookie)
	if _, err := unix.Write(b.k.Channel, e[:]); err != nil {
		t.Fatal(err)
	}
	if q, err := b.channel.Wait(t.Context()); q != driver.CQ(b.scq) || err != nil {
		t.Error(q, err)
	}
}

// Completions that are fired together go to as many who wait.
func TestFiredTogether(t *testing.T) {
	b := connected(t, benchOpts{channel: true})
	ch := b.channel.(*uverbs.CompChannel)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for range 100 {
		got := make(chan error, 2)
		for range 2 {
			go func() {
				q, err := ch.Wait(ctx)
				if err == nil && q != driver.CQ(b.rcq) {
					err = fmt.Errorf("%v has fired", q)
				}
				got <- err
			}()
		}
		time.Sleep(100 * time.Microsecond) // most times both sleep now
		ch.Fire(b.rcq)
		ch.Fire(b.rcq)
		if err := errors.Join(<-got, <-got); err != nil {
			t.Fatal(err)
		}
	}
}

// A sleeper is woken for completions that the kernel knows nothing of, whichever way it sleeps.
func TestWakeForFlush(t *testing.T) {
	b := connected(t, benchOpts{channel: true})
	b.q.Moved(ib.Err)
	thread := b.channel.(driver.ThreadWaiter)
	for i := range 40 {
		if err := b.rcq.Arm(false); err != nil {
			t.Fatal(err)
		}
		fired := make(chan driver.CQ)
		go func() {
			var q driver.CQ
			var err error
			if i%2 == 0 {
				q, err = b.channel.Wait(context.Background())
			} else {
				for q == nil && err == nil { // it may be interrupted for nothing
					q, err = thread.WaitThread()
				}
			}
			if err != nil {
				t.Error(err)
			}
			fired <- q
		}()
		if i%4 < 2 {
			time.Sleep(time.Millisecond) // now it sleeps
		}
		if n, err := b.q.PostRecv([]ib.RecvWR{{ID: uint64(i)}}); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if q := <-fired; q != driver.CQ(b.rcq) {
			t.Fatal(q)
		}
		if got := ids(b.poll(b.rcq)); !slices.Equal(got, []uint64{uint64(i)}) {
			t.Fatal(got)
		}
		// Not armed, no event.
		b.q.PostRecv([]ib.RecvWR{{ID: 1}})
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		if q, err := b.channel.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(q, err)
		}
		cancel()
		b.poll(b.rcq)
	}
}

// What the kernel says of its queues is believed only if it can be.
func TestHostileGeometry(t *testing.T) {
	put32 := func(off int, v uint32) func([]byte) { return func(b []byte) { le.PutUint32(b[off:], v) } }
	put64 := func(off int, v uint64) func([]byte) { return func(b []byte) { le.PutUint64(b[off:], v) } }
	for name, c := range map[string]struct {
		cmd uint32
		f   func([]byte)
	}{
		"CQ of none":         {18, put32(4, 0)},
		"CQ of 3":            {18, put32(4, 3)},
		"CQ too small":       {18, put32(4, 2)},
		"CQ too large":       {18, put32(4, 1<<31)},
		"CQ beyond mapping":  {18, put32(4, 1<<20)},
		"CQ nowhere":         {18, put64(8, 0x123)},
		"CQ far away":        {18, put64(8, 1<<63)},
		"QP of another":      {24, put32(0, 99)},
		"SQ of none":         {24, put32(4, 0)},
		"SQ too small":       {24, put32(4, 1)},
		"SQ of 7":            {24, put32(4, 7)},
		"SQ beyond mapping":  {24, put32(4, 1<<22)},
		"RQ of none":         {24, put32(8, 0)},
		"RQ of 9":            {24, put32(8, 9)},
		"RQ beyond mapping":  {24, put32(8, 1<<22)},
		"RQ nowhere":         {24, put64(24, 8)},
		"SRQ of none":        {32, put32(0, 0)},
		"SRQ too small":      {32, put32(0, 4)},
		"SRQ beyond mapping": {32, put32(0, 1<<23)},
		"another key":        {9, put32(0, 1)},
	} {
		t.Run(name, func(t *testing.T) {
			k, ctx := newFake(t)
			pd, err := ctx.AllocPD()
			if err != nil {
				t.Fatal(err)
			}
			defer pd.Close()
			k.Tweak = func(cmd uint32, _, uhw []byte) {
				if cmd == c.cmd {
					c.f(uhw)
				}
			}
			mem, _ := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			defer unix.Munmap(mem)
			m, errMR := pd.RegisterMR(driver.MRConfig{Mem: mem, Access: ib.AccessLocalWrite})
			if errMR == nil {
				defer m.Close()
			}
			q, errCQ := ctx.CreateCQ(driver.CQConfig{Entries: 8})
			if errCQ == nil {
				defer q.Close()
			}
			s, errSRQ := pd.(driver.SRQCreator).CreateSRQ(driver.SRQConfig{MaxWR: 8, MaxSGE: 1})
			if errSRQ == nil {
				defer s.Close()
			}
			var errQP error
			if errCQ == nil {
				p, err := pd.CreateQP(driver.QPConfig{Type: ib.RC, SendCQ: q, RecvCQ: q, Cap: ib.QPCap{MaxSendWR: 8, MaxRecvWR: 8, MaxSendSGE: 1, MaxRecvSGE: 1}})
				if errQP = err; err == nil {
					defer p.Close()
				}
			}
			for cmd, err := range map[uint32]error{9: errMR, 18: errCQ, 24: errQP, 32: errSRQ} {
				if (cmd == c.cmd) != (err != nil) {
					t.Errorf("command %d: %v", cmd, err)
				}
			}
		})
	}
}

// Completions that make no sense change nothing, and never read or write outside of the queues.
func TestHostileCompletions(t *testing.T) {
	b := connected(t, benchOpts{oneCQ: true})
	r := rand.New(rand.NewPCG(1, 2))
	b.post(send(1, ib.SendSignaled))
	for range 3000 {
		s := b.ks.slot(b.ks.get)
		for i := range s {
			s[i] = byte(r.Uint32())
		}
		if r.IntN(2) == 0 {
			le.PutUint64(s[24:], uint64(b.kq.num))
		}
		if r.IntN(3) == 0 {
			le.PutUint64(s, uint64(r.IntN(40))-20)
		}
		s[flagsAt] = 1
		if le.Uint64(s) == 0 {
			continue // that would be the request's own
		}
		b.ks.get++
		if wcs := b.poll(b.scq); len(wcs) > 1 {
			t.Fatalf("%+v", wcs)
		}
	}
}

// Who has nowhere to put a receive from a shared receive queue leaves it to Poll, also if the kernel has made one of what was another
// completion a moment ago.
func TestTakeNothingShared(t *testing.T) {
	defer testutil.EndOnPanic()
	b := connected(t, benchOpts{oneCQ: true, srq: true})
	if n, err := b.srq.PostRecv([]ib.RecvWR{{ID: 7}}); n != 1 {
		t.Fatal(err)
	}
	b.ks.complete(7, abi.SIW_OP_RECEIVE, 0, 3, b.kq.num)
	b.scq.mu.Lock()
	n := b.scq.take(nil, b.scq.q.head(b.scq.at))
	b.scq.mu.Unlock()
	if n != -1 || !b.scq.harvest() {
		t.Errorf("%d", n)
	}
	if wcs := b.poll(b.scq); len(wcs) != 1 || wcs[0].ID != 7 || wcs[0].ByteLen != 3 {
		t.Errorf("%+v", wcs)
	}
}

func TestNoAllocation(t *testing.T) {
	b := connected(t, benchOpts{depth: 8})
	wrs := []ib.SendWR{send(1, 0, ib.SGE{Addr: 1, Length: 8, LKey: 1}), read(2, 0), {ID: 3, Opcode: ib.OpRDMAWrite, Inline: []byte{1, 2}, Flags: ib.SendSignaled}}
	recvs := []ib.RecvWR{{ID: 1, SGEs: []ib.SGE{{Length: 3}}}}
	wcs := make([]ib.WC, 8)
	round := func() {
		if n, err := b.q.PostSend(wrs); n != 3 || err != nil {
			t.Fatal(n, err)
		}
		if n, err := b.q.PostRecv(recvs); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		for range 3 {
			s := b.kq.sq.slot(b.kq.sq.get)
			if s[flagsAt]&4 != 0 {
				b.complete(s, 0)
			}
			le.PutUint16(s[flagsAt:], 0)
			b.kq.sq.get++
		}
		s := b.kq.rq.slot(b.kq.rq.get)
		b.kr.complete(le.Uint64(s), 8, 0, 3, b.kq.num)
		le.PutUint16(s[flagsAt:], 0)
		b.kq.rq.get++
		if err := b.scq.Arm(false); err != nil {
			t.Fatal(err)
		}
		if n, m := b.scq.Poll(wcs), b.rcq.Poll(wcs); n != 1 || m != 1 {
			t.Fatal(n, m)
		}
	}
	if n := testing.AllocsPerRun(200, round); n != 0 {
		t.Errorf("%v allocations a round", n)
	}
}
