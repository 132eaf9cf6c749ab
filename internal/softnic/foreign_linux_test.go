package softnic

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/procmem"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

const (
	foreignSize = 3 << 20        // what a foreigner has
	foreignIOVA = 0x77_0000_0000 // its region's addresses
)

func init() { testutil.RegisterChild("softnic.foreigner", foreigner) }

// foreigner is a process whose memory NICs of another use. It writes to it, and shows it, on command.
func foreigner([]string) {
	fd, err := unix.MemfdCreate("foreign", 0)
	if err == nil {
		err = unix.Ftruncate(fd, foreignSize)
	}
	var b []byte
	if err == nil {
		b, err = unix.Mmap(fd, 0, foreignSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Printf("at %#x\n", addrOf(b))
	for line := range testutil.ChildInput() {
		w := strings.Fields(line)
		off := 0
		if len(w) > 1 {
			off, _ = strconv.Atoi(w[1])
		}
		switch w[0] {
		case "put":
			data, _ := hex.DecodeString(w[2])
			copy(b[off:], data)
			fmt.Println("done")
		case "fill": // with a pattern that begins with the number
			n, _ := strconv.Atoi(w[2])
			seed, _ := strconv.Atoi(w[3])
			copy(b[off:off+n], pattern(n, seed))
			fmt.Println("done")
		case "get":
			n, _ := strconv.Atoi(w[2])
			fmt.Println("got " + hex.EncodeToString(b[off:off+n]))
		case "like":
			n, _ := strconv.Atoi(w[2])
			seed, _ := strconv.Atoi(w[3])
			fmt.Println("like", bytes.Equal(b[off:off+n], pattern(n, seed)))
		case "drop": // the pages: the addresses stay taken, or the runtime would use them
			fmt.Println("done", unix.Ftruncate(fd, 0))
		}
	}
}

func pattern(n, seed int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(seed + i + i>>8*7)
	}
	return b
}

// A foreignEnd is an end whose memory is another process'.
type foreignEnd struct {
	*end
	p  *testutil.Child
	mr driver.MR
	m  *procmem.Memory
	at uint64
}

func newForeignEnd(t *testing.T, n *NIC, cfg endConfig) *foreignEnd {
	t.Helper()
	e := &foreignEnd{p: testutil.StartChild(t, "softnic.foreigner")}
	at, err := strconv.ParseUint(e.p.Expect("at "), 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	if e.m, err = procmem.Open(e.p.PID()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.m.Close() })
	cfg.size = 4096
	e.end, e.at = newEnd(t, n, cfg), at
	e.mr, err = e.pd.(*PD).RegisterForeign(e.m, at, foreignSize, foreignIOVA, ib.AccessLocalWrite|ib.AccessRemote|ib.AccessMWBind)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.mr.Close(); err != nil && err != driver.ErrClosed {
			t.Error(err)
		}
	})
	return e
}

func (e *foreignEnd) sge(off, n int) ib.SGE {
	return ib.SGE{Addr: foreignIOVA + uint64(off), Length: uint32(n), LKey: e.mr.LKey()}
}

// own is memory of this process.
func (e *foreignEnd) own(n int) []ib.SGE {
	return []ib.SGE{{Addr: addrOf(e.buf), Length: uint32(n), LKey: e.end.mr.LKey()}}
}

// tell has the process do something.
func (e *foreignEnd) tell(format string, a ...any) string {
	e.t.Helper()
	e.p.Send(fmt.Sprintf(format, a...))
	return e.p.Line()
}

func (e *foreignEnd) wantLike(off, n, seed int) {
	e.t.Helper()
	if s := e.tell("like %d %d %d", off, n, seed); s != "like true" {
		e.t.Errorf("%d bytes at %d are not as they were sent", n, off)
	}
}

func (e *end) want(id uint64, st ib.WCStatus, n int) {
	e.t.Helper()
	if wc := e.poll(); wc.ID != id || wc.Status != st || st == ib.WCSuccess && n >= 0 && wc.ByteLen != uint32(n) {
		e.t.Fatalf("completion %+v, want %d with %v, %d bytes", wc, id, st, n)
	}
}

// foreignPaths runs f over every path, with two processes that are connected.
func foreignPaths(t *testing.T, f func(t *testing.T, a, b *foreignEnd)) {
	run := func(t *testing.T, na, nb *NIC) {
		a, b := newForeignEnd(t, na, endConfig{typ: ib.RC}), newForeignEnd(t, nb, endConfig{typ: ib.RC})
		a.connect(b.end)
		b.connect(a.end)
		f(t, a, b)
	}
	paths(t, run)
	t.Run("udp", func(t *testing.T) {
		a, b := newForeignEnd(t, openNIC(t, false), endConfig{typ: ib.RC}), newForeignEnd(t, openNIC(t, false), endConfig{typ: ib.RC})
		joinUDP(t, a.end, b.end, 18)
		f(t, a, b)
	})
}

// Both sides' memory is of other processes; sizes are of one piece and of many, in one element and in several.
func TestForeignOperations(t *testing.T) {
	foreignPaths(t, func(t *testing.T, a, b *foreignEnd) {
		for i, n := range []int{1, 4096, 100_000, foreignPiece + 5000} {
			a.tell("fill 7 %d %d", n, i)
			list := []ib.SGE{a.sge(7, n)}
			if n > 3 {
				list = []ib.SGE{a.sge(7, 3), a.sge(10, n-3)}
			}
			b.recv(1, []ib.SGE{b.sge(11, n/2), b.sge(11+n/2, n)})
			a.send(ib.SendWR{ID: 2, Opcode: ib.OpSend, SGEs: list, Flags: ib.SendSignaled})
			b.want(1, ib.WCSuccess, n)
			a.want(2, ib.WCSuccess, -1)
			b.wantLike(11, n, i)

			a.tell("fill 7 %d %d", n, i+50)
			b.recv(3, nil)
			a.send(ib.SendWR{ID: 4, Opcode: ib.OpRDMAWriteWithImm, SGEs: list, RemoteAddr: foreignIOVA + 100, RKey: b.mr.RKey(), Flags: ib.SendSignaled})
			b.want(3, ib.WCSuccess, n)
			a.want(4, ib.WCSuccess, -1)
			b.wantLike(100, n, i+50)

			b.tell("fill 5 %d %d", n, i+100)
			a.send(ib.SendWR{ID: 5, Opcode: ib.OpRDMARead, SGEs: list, RemoteAddr: foreignIOVA + 5, RKey: b.mr.RKey(), Flags: ib.SendSignaled})
			a.want(5, ib.WCSuccess, -1)
			a.wantLike(7, n, i+100)
		}
	})
}

// One side's memory is this process'.
func TestForeignWithOwn(t *testing.T) {
	paths(t, func(t *testing.T, na, nb *NIC) {
		for _, private := range []bool{false, true} {
			t.Run(fmt.Sprintf("private=%v", private), func(t *testing.T) {
				a, b := newEnd(t, na, endConfig{typ: ib.RC, private: private}), newForeignEnd(t, nb, endConfig{typ: ib.RC})
				a.connect(b.end)
				b.connect(a)
				copy(a.buf, pattern(50_000, 3))
				b.recv(1, []ib.SGE{b.sge(0, 50_000)})
				a.send(ib.SendWR{ID: 2, Opcode: ib.OpSend, SGEs: a.sge(0, 50_000), Flags: ib.SendSignaled})
				b.want(1, ib.WCSuccess, 50_000)
				a.want(2, ib.WCSuccess, -1)
				b.wantLike(0, 50_000, 3)

				b.tell("fill 0 70000 9")
				a.recv(3, a.sge(0, 70_000))
				b.send(ib.SendWR{ID: 4, Opcode: ib.OpSend, SGEs: []ib.SGE{b.sge(0, 70_000)}, Flags: ib.SendSignaled})
				a.want(3, ib.WCSuccess, 70_000)
				b.want(4, ib.WCSuccess, -1)
				if !bytes.Equal(a.buf[:70_000], pattern(70_000, 9)) {
					t.Error("what the process has sent did not arrive")
				}

				a.send(ib.SendWR{ID: 5, Opcode: ib.OpRDMAWrite, SGEs: a.sge(1, 60_000), RemoteAddr: foreignIOVA, RKey: b.mr.RKey(), Flags: ib.SendSignaled})
				a.want(5, ib.WCSuccess, -1)
				if s := b.tell("get 0 2"); s != "got "+hex.EncodeToString(a.buf[1:3]) {
					t.Error("after the WRITE:", s)
				}
				b.tell("fill 0 70000 11")
				a.send(ib.SendWR{ID: 6, Opcode: ib.OpRDMARead, SGEs: a.sge(0, 70_000), RemoteAddr: foreignIOVA, RKey: b.mr.RKey(), Flags: ib.SendSignaled})
				a.want(6, ib.WCSuccess, -1)
				if !bytes.Equal(a.buf[:70_000], pattern(70_000, 11)) {
					t.Error("what was read is not what is there")
				}
				b.send(ib.SendWR{ID: 7, Opcode: ib.OpRDMAWrite, SGEs: []ib.SGE{b.sge(1, 70_000)}, RemoteAddr: addrOf(a.buf), RKey: a.mr.RKey(), Flags: ib.SendSignaled})
				b.want(7, ib.WCSuccess, -1)
				if !bytes.Equal(a.buf[:69_999], pattern(70_000, 11)[1:]) {
					t.Error("what the process has written did not arrive")
				}
			})
		}
	})
}

func TestForeignAtomics(t *testing.T) {
	foreignPaths(t, func(t *testing.T, a, b *foreignEnd) {
		word := func(v uint64) string { return hex.EncodeToString(binary.NativeEndian.AppendUint64(nil, v)) }
		b.tell("put 16 %s", word(40))
		for _, c := range []struct {
			op          ib.Opcode
			add, swap   uint64
			before, now uint64
		}{
			{ib.OpAtomicFetchAdd, 2, 0, 40, 42},
			{ib.OpAtomicCmpSwap, 41, 7, 42, 42},
			{ib.OpAtomicCmpSwap, 42, 7, 42, 7},
		} {
			a.send(ib.SendWR{ID: 1, Opcode: c.op, CompareAdd: c.add, Swap: c.swap, SGEs: []ib.SGE{a.sge(8, 8)},
				RemoteAddr: foreignIOVA + 16, RKey: b.mr.RKey(), Flags: ib.SendSignaled})
			a.want(1, ib.WCSuccess, -1)
			if s := a.tell("get 8 8"); s != "got "+word(c.before) {
				t.Errorf("%v returned %s, want %s", c.op, s, word(c.before))
			}
			if s := b.tell("get 16 8"); s != "got "+word(c.now) {
				t.Errorf("%v left %s, want %s", c.op, s, word(c.now))
			}
		}
		a.tell("put 32 %s", word(9))
		a.send(ib.SendWR{ID: 3, Opcode: ib.OpAtomicWrite, SGEs: []ib.SGE{a.sge(32, 8)}, RemoteAddr: foreignIOVA + 24, RKey: b.mr.RKey(), Flags: ib.SendSignaled})
		a.want(3, ib.WCSuccess, -1)
		if s := b.tell("get 24 8"); s != "got "+word(9) {
			t.Errorf("an ATOMIC_WRITE left %s", s)
		}
		a.send(ib.SendWR{ID: 2, Opcode: ib.OpAtomicFetchAdd, SGEs: []ib.SGE{a.sge(8, 8)}, RemoteAddr: foreignIOVA + 20, RKey: b.mr.RKey(), Flags: ib.SendSignaled})
		a.want(2, ib.WCRemoteInvalidReqErr, 0)
	})
}

// Atomics of several NICs at a time on one word are not lost.
func TestForeignAtomicsTogether(t *testing.T) {
	target := openNIC(t, true)
	b := newForeignEnd(t, target, endConfig{typ: ib.RC})
	const nics, each = 3, 60
	var wg sync.WaitGroup
	for i := range nics {
		a, peer := newEnd(t, openNIC(t, i == 0), endConfig{typ: ib.RC}), newEnd(t, target, endConfig{typ: ib.RC})
		mr, err := peer.pd.(*PD).RegisterForeign(b.m, b.at, foreignSize, foreignIOVA, ib.AccessLocalWrite|ib.AccessRemote)
		if err != nil {
			t.Fatal(err)
		}
		defer mr.Close()
		a.connect(peer)
		peer.connect(a)
		wg.Go(func() {
			for range each {
				a.q.PostSend([]ib.SendWR{{Opcode: ib.OpAtomicFetchAdd, CompareAdd: 1, SGEs: a.sge(0, 8), RemoteAddr: foreignIOVA, RKey: mr.RKey(), Flags: ib.SendSignaled}})
				var wc [1]ib.WC
				for a.cq.Poll(wc[:]) == 0 {
					runtime.Gosched()
				}
				if wc[0].Status != ib.WCSuccess {
					t.Error(wc[0])
					return
				}
			}
		})
	}
	wg.Wait()
	if s := b.tell("get 0 8"); s != "got "+hex.EncodeToString(binary.NativeEndian.AppendUint64(nil, nics*each)) {
		t.Errorf("the word is %s after %d additions", s, nics*each)
	}
}

// What is sent is there before what follows it is executed.
func TestForeignOrder(t *testing.T) {
	foreignPaths(t, func(t *testing.T, a, b *foreignEnd) {
		if a.n != b.n && a.n.viaDoor {
			t.Skip("through shared memory, receives into private memory are there when they are polled")
		}
		a.tell("fill 0 100 1")
		b.recv(1, []ib.SGE{b.sge(0, 100)})
		n, err := a.q.PostSend([]ib.SendWR{
			{ID: 2, Opcode: ib.OpSend, SGEs: []ib.SGE{a.sge(0, 100)}, Flags: ib.SendSignaled},
			{ID: 3, Opcode: ib.OpRDMARead, SGEs: []ib.SGE{a.sge(200, 100)}, RemoteAddr: foreignIOVA, RKey: b.mr.RKey(), Flags: ib.SendSignaled},
		})
		if n != 2 || err != nil {
			t.Fatal(n, err)
		}
		a.want(2, ib.WCSuccess, -1)
		a.want(3, ib.WCSuccess, -1)
		a.wantLike(200, 100, 1)
		b.want(1, ib.WCSuccess, 100)
	})
}

// A receive queue that several share gives out buffers for foreign memory, too; and datagrams come with their GRH.
func TestForeignShared(t *testing.T) {
	paths(t, func(t *testing.T, na, nb *NIC) {
		pd, err := nb.AllocPD()
		if err != nil {
			t.Fatal(err)
		}
		srq, err := pd.(*PD).CreateSRQ(driver.SRQConfig{MaxWR: 8, MaxSGE: 2})
		if err != nil {
			t.Fatal(err)
		}
		b := newForeignEnd(t, nb, endConfig{typ: ib.RC})
		y := makeEndIn(t, nb, pd, endConfig{typ: ib.RC, srq: srq, size: 4096})
		mr, err := pd.(*PD).RegisterForeign(b.m, b.at, foreignSize, foreignIOVA, ib.AccessLocalWrite)
		if err != nil {
			t.Fatal(err)
		}
		defer y.close() // last
		defer mr.Close()
		defer srq.Close()
		defer y.q.Close()
		a := newForeignEnd(t, na, endConfig{typ: ib.RC})
		a.connect(y)
		y.connect(a.end)
		a.tell("fill 0 3000 5")
		if _, err := srq.PostRecv([]ib.RecvWR{{ID: 1, SGEs: []ib.SGE{{Addr: foreignIOVA + 64, Length: 4000, LKey: mr.LKey()}}}}); err != nil {
			t.Fatal(err)
		}
		a.send(ib.SendWR{ID: 2, Opcode: ib.OpSend, SGEs: []ib.SGE{a.sge(0, 3000)}, Flags: ib.SendSignaled})
		y.want(1, ib.WCSuccess, 3000)
		a.want(2, ib.WCSuccess, -1)
		b.wantLike(64, 3000, 5)
	})
}

func TestForeignDatagrams(t *testing.T) {
	paths(t, func(t *testing.T, na, nb *NIC) {
		a, b := newForeignEnd(t, na, endConfig{typ: ib.UD}), newForeignEnd(t, nb, endConfig{typ: ib.UD})
		a.ready()
		b.ready()
		ah, err := a.pd.CreateAH(ib.AHAttr{DGID: b.n.gid, Port: 1})
		if err != nil {
			t.Fatal(err)
		}
		defer ah.Close()
		a.tell("fill 0 1000 5")
		b.recv(1, []ib.SGE{b.sge(0, ib.GRHLen), b.sge(5000, 1000)})
		a.send(ib.SendWR{ID: 2, Opcode: ib.OpSend, AH: ah.Num(), RemoteQPN: b.q.QPN(), RemoteQKey: testQKey,
			SGEs: []ib.SGE{a.sge(0, 10), a.sge(10, 990)}, Flags: ib.SendSignaled})
		b.want(1, ib.WCSuccess, 1000+ib.GRHLen)
		a.want(2, ib.WCSuccess, -1)
		b.wantLike(5000, 1000, 5)
	})
}

// Memory that the process has given back ends requests with an error: never the NIC, and never with success.
func TestForeignFails(t *testing.T) {
	const gone = foreignSize - 64<<10
	drop := func(a, b *foreignEnd) {
		a.tell("drop")
		b.tell("drop")
	}
	for _, op := range []ib.Opcode{ib.OpSend, ib.OpRDMAWrite} {
		t.Run(op.String(), func(t *testing.T) {
			foreignPaths(t, func(t *testing.T, a, b *foreignEnd) {
				drop(a, b)
				b.recv(1, b.own(4096))
				a.send(ib.SendWR{ID: 2, Opcode: op, SGEs: []ib.SGE{a.sge(gone, 100)}, RemoteAddr: addrOf(b.buf), RKey: b.end.mr.RKey(), Flags: ib.SendSignaled})
				a.want(2, ib.WCLocalProtErr, 0)
			})
		})
	}
	for _, op := range []ib.Opcode{ib.OpRDMAWrite, ib.OpRDMARead, ib.OpAtomicFetchAdd, ib.OpAtomicWrite} {
		t.Run("remote "+op.String(), func(t *testing.T) {
			foreignPaths(t, func(t *testing.T, a, b *foreignEnd) {
				drop(a, b)
				a.send(ib.SendWR{ID: 2, Opcode: op, SGEs: a.own(8), RemoteAddr: foreignIOVA + gone, RKey: b.mr.RKey(), Flags: ib.SendSignaled})
				a.want(2, ib.WCRemoteOpErr, 0)
			})
		})
	}
	for _, op := range []ib.Opcode{ib.OpRDMARead, ib.OpAtomicFetchAdd} {
		t.Run("result of "+op.String(), func(t *testing.T) {
			foreignPaths(t, func(t *testing.T, a, b *foreignEnd) {
				drop(a, b)
				a.send(ib.SendWR{ID: 2, Opcode: op, SGEs: []ib.SGE{a.sge(gone, 8)}, RemoteAddr: addrOf(b.buf), RKey: b.end.mr.RKey(), Flags: ib.SendSignaled})
				a.want(2, ib.WCLocalProtErr, 0)
			})
		})
	}
	t.Run("receive", func(t *testing.T) {
		foreignPaths(t, func(t *testing.T, a, b *foreignEnd) {
			drop(a, b)
			b.recv(1, []ib.SGE{b.sge(gone, 100)})
			a.send(ib.SendWR{ID: 2, Opcode: ib.OpSend, SGEs: a.own(100), Flags: ib.SendSignaled})
			b.want(1, ib.WCLocalProtErr, 0)
		})
	})
}

// A peer of a process that has been killed hears nothing of what became of the memory: messages and WRITEs succeed, as they do with
// pages that hardware holds; what asks for the memory's bytes waits for an answer that does not come, until the QP's end is noticed.
func TestForeignProcessEnds(t *testing.T) {
	for _, op := range []ib.Opcode{ib.OpSend, ib.OpRDMAWrite, ib.OpRDMAWriteWithImm} {
		t.Run(op.String(), func(t *testing.T) {
			foreignPaths(t, func(t *testing.T, a, b *foreignEnd) {
				b.recv(1, []ib.SGE{b.sge(0, 100)})
				b.p.Kill()
				a.send(ib.SendWR{ID: 2, Opcode: op, SGEs: a.own(100), RemoteAddr: foreignIOVA, RKey: b.mr.RKey(), Flags: ib.SendSignaled})
				a.want(2, ib.WCSuccess, -1)
				if op != ib.OpRDMAWrite {
					b.want(1, ib.WCSuccess, 100)
				}
			})
		})
	}
	for _, op := range []ib.Opcode{ib.OpRDMARead, ib.OpAtomicFetchAdd, ib.OpAtomicWrite} {
		t.Run(op.String(), func(t *testing.T) {
			foreignPaths(t, func(t *testing.T, a, b *foreignEnd) {
				b.p.Kill()
				a.send(ib.SendWR{ID: 2, Opcode: op, SGEs: a.own(8), RemoteAddr: foreignIOVA, RKey: b.mr.RKey(), Flags: ib.SendSignaled})
				a.send(ib.SendWR{ID: 3, Opcode: ib.OpSend, SGEs: a.own(8), Flags: ib.SendSignaled})
				aq, bq := a.q.(*QP), b.q.(*QP)
				l := aq.link
				testutil.Eventually(t, "the request has been tried", func() bool {
					aq.sq.Lock()
					defer aq.sq.Unlock()
					return aq.stall.kind == stallPeer || ib.QPState(bq.state.Load()) == ib.Err
				})
				if err := a.q.Modify(t.Context(), &ib.QPAttr{State: ib.Err}, ib.AttrState); err != nil {
					t.Fatal(err)
				}
				a.want(2, ib.WCFlushErr, 0) // and not what the peer had said by then
				a.want(3, ib.WCFlushErr, 0)
				if l != nil {
					testutil.Eventually(t, "nothing waits on the link", func() bool {
						l.mu.Lock()
						defer l.mu.Unlock()
						return len(l.assists) == 0
					})
				}
			})
		})
	}
	t.Run("own", func(t *testing.T) {
		foreignPaths(t, func(t *testing.T, a, b *foreignEnd) {
			b.recv(1, b.own(4096))
			a.p.Kill()
			a.send(ib.SendWR{ID: 2, Opcode: ib.OpSend, SGEs: []ib.SGE{a.sge(0, 100)}, Flags: ib.SendSignaled})
			a.want(2, ib.WCLocalProtErr, 0) // there is nothing to send
		})
	})
}

func TestForeignRefused(t *testing.T) {
	n := openNIC(t, false)
	e := newEnd(t, n, endConfig{typ: ib.RC})
	pd := e.pd.(*PD)
	for name, c := range map[string]struct {
		start, length, iova uint64
		access              ib.Access
	}{
		"nothing":              {4096, 0, 4096, 0},
		"beyond the end":       {1 << 63, 1<<63 + 1, 4096, 0},
		"addresses beyond it":  {4096, 1 << 20, ^uint64(0), 0},
		"peers' rights alone":  {4096, 4096, 4096, ib.AccessRemoteWrite},
		"flush":                {4096, 4096, 4096, ib.AccessFlushGlobal},
		"zero-based addresses": {4096, 4096, 4096, ib.AccessZeroBased},
	} {
		if mr, err := pd.RegisterForeign(nil, c.start, c.length, c.iova, c.access); err == nil {
			t.Errorf("%s: registered", name)
			mr.Close()
		}
	}
}
