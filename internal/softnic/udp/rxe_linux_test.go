package udp_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/udp"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// rxeNet is the network that joins the kernel's rxe to this package, or that by its other addresses.
var rxeNet *testutil.RXENet

// inNamespace opens a socket on the other end.
func inNamespace(t *testing.T, addr netip.AddrPort) *udp.Socket {
	t.Helper()
	type result struct {
		s   *udp.Socket
		err error
	}
	c := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		fd, err := unix.Open("/var/run/netns/"+rxeNet.Namespace, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		if err != nil {
			c <- result{nil, err}
			return
		}
		s, err := udp.Listen(addr)
		c <- result{s, err}
	}()
	r := <-c
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Cleanup(func() { r.s.Close() })
	return r.s
}

// rxeSide is a queue pair of the kernel's.
type rxeSide struct {
	t  *testing.T
	q  *qp.QP
	cq *verbs.CQ
	m  *mr.MR
}

// pairWithRXE joins an endpoint and a queue pair of rxe.
func pairWithRXE(t *testing.T, typ ib.QPType, mtu ib.MTU, change func(*qp.ConnectParams)) (*endpoint, *rxeSide) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	closes := func(c interface{ Close() error }) {
		t.Cleanup(func() {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	ctx, err := verbs.Open(rxeNet.Device)
	must(err)
	closes(ctx)
	pd, err := ctx.AllocPD()
	must(err)
	closes(pd)
	cq, err := ctx.NewCQ(verbs.CQConfig{Entries: 1000})
	must(err)
	closes(cq)
	m, err := mr.Alloc(pd, memLen, ib.AccessLocalWrite|ib.AccessRemote)
	must(err)
	closes(m)
	q, err := qp.New(pd, &qp.Config{Type: typ, SendCQ: cq, RecvCQ: cq, SendDepth: 200, RecvDepth: 200})
	must(err)
	closes(q)
	access := ib.AccessRemote
	if typ == ib.UC {
		access = ib.AccessRemoteWrite
	}
	must(q.Init(t.Context(), 1, access))
	src, err := ctx.SourceGID(1, rxeNet.Soft)
	must(err)
	const ours, ourPSN, theirPSN = 0x123456, ib.MaxPSN - 3, 77
	p := qp.ConnectParams{Remote: qp.Endpoint{GID: ib.GIDFromAddr(rxeNet.Soft), QPN: ours, PSN: ourPSN}, LocalPSN: theirPSN, MTU: mtu,
		SGIDIndex: src.Index, MaxRdAtomic: 4, MaxDestRdAtomic: 4}
	if change != nil {
		change(&p)
	}
	must(q.Connect(t.Context(), p))
	sock := inNamespace(t, netip.AddrPortFrom(rxeNet.Soft, roce.Port))
	e := newEndpoint(t, sock, netip.AddrPortFrom(rxeNet.RXE, roce.Port), ours, wire.Config{DestQP: uint32(q.QPN()), MTU: mtu.Bytes(), SQPSN: ourPSN, RQPSN: theirPSN,
		AckTimeout: 67 * time.Millisecond, RetryCount: 250, RNRRetry: ib.RNRRetryForever, MinRNRTimer: 12, MaxRdAtomic: 4, MaxDestRdAtomic: 4, SendDepth: 256})
	e.uc = typ == ib.UC
	return e, &rxeSide{t, q, cq, m}
}

func (r *rxeSide) recv(n int) {
	r.t.Helper()
	for i := range n {
		if _, err := r.q.PostRecv([]ib.RecvWR{{ID: uint64(1000 + i), SGEs: []ib.SGE{r.m.SGE(i%4*8192, 8192)}}}); err != nil {
			r.t.Fatal(err)
		}
	}
}

// wait polls n completions.
func (r *rxeSide) wait(n int) []ib.WC {
	r.t.Helper()
	wcs := make([]ib.WC, n)
	got := 0
	for deadline := time.Now().Add(20 * time.Second); got < n; {
		k, err := r.cq.Poll(wcs[got:])
		if err != nil || time.Now().After(deadline) {
			r.t.Fatalf("%d of %d completions: %v", got, n, err)
		}
		got += k
		runtime.Gosched()
	}
	return wcs
}

// oneIn loses one packet in n, by chance: every n-th might be the same one each time that it is sent again.
func oneIn(n int) func() bool {
	r := rand.New(rand.NewPCG(1, 2))
	return func() bool { return r.IntN(n) == 0 }
}

// Requests of either side, of every kind, and of lengths around the path MTU.
func TestRXE(t *testing.T) {
	net := testutil.NewRXENet(t)
	rxeNet = net
	defer net.Sniff(t).Check()
	for _, mtu := range []ib.MTU{ib.MTU256, ib.MTU1024, ib.MTU4096} {
		t.Run(fmt.Sprint(mtu.Bytes()), func(t *testing.T) {
			sizes := []int{0, 1, 3, 64, mtu.Bytes() - 1, mtu.Bytes(), mtu.Bytes() + 1, 8191}
			t.Run("to rxe", func(t *testing.T) { toRXE(t, mtu, sizes) })
			t.Run("from rxe", func(t *testing.T) { fromRXE(t, mtu, sizes) })
		})
	}
	t.Run("UC", unreliableRXE)
	t.Run("refused by rxe", refusedByRXE)
	t.Run("refused by us", refusedByUs)
	rxeNet = net.OverIPv6()
	t.Run("IPv6", func(t *testing.T) {
		const mtu = ib.MTU1024
		sizes := []int{0, 1, 3, mtu.Bytes(), mtu.Bytes() + 1, 8191}
		t.Run("to rxe", func(t *testing.T) { toRXE(t, mtu, sizes) })
		t.Run("from rxe", func(t *testing.T) { fromRXE(t, mtu, sizes) })
		t.Run("UC", unreliableRXE)
	})
}

func toRXE(t *testing.T, mtu ib.MTU, sizes []int) {
	e, r := pairWithRXE(t, ib.RC, mtu, nil)
	for i, n := range sizes {
		r.recv(1)
		data := bytesOf(n, byte(i))
		e.post(wire.Request{Op: ib.OpSendWithImm, Imm: uint32(i), Solicited: i%2 == 0}, data, nil)
		e.finish()
		wc := r.wait(1)[0]
		if wc.Status != ib.WCSuccess || int(wc.ByteLen) != n || wc.Flags&ib.WCWithImm == 0 || wc.Imm != uint32(i) || !bytes.Equal(r.m.Bytes()[:n], data) {
			t.Errorf("SEND of %d bytes: %+v", n, wc)
		}
		k := r.m.RemoteRange(40000, 9000)
		e.post(wire.Request{Op: ib.OpRDMAWrite, Addr: k.Addr, RKey: uint32(k.RKey)}, data, nil)
		back := make([]byte, n)
		e.post(wire.Request{Op: ib.OpRDMARead, Addr: k.Addr, RKey: uint32(k.RKey)}, nil, back)
		e.finish()
		if !bytes.Equal(back, data) || !bytes.Equal(r.m.Bytes()[40000:][:n], data) {
			t.Errorf("WRITE and READ of %d bytes brought others", n)
		}
	}
	k := r.m.RemoteRange(60000, 8)
	word := r.m.Bytes()[60000:60008]
	binary.NativeEndian.PutUint64(word, 5)
	old := make([][]byte, 3)
	for i := range old {
		old[i] = make([]byte, 8)
	}
	e.post(wire.Request{Op: ib.OpAtomicFetchAdd, Addr: k.Addr, RKey: uint32(k.RKey), CompareAdd: 7}, nil, old[0])
	e.post(wire.Request{Op: ib.OpAtomicCmpSwap, Addr: k.Addr, RKey: uint32(k.RKey), CompareAdd: 12, Swap: 100}, nil, old[1])
	e.post(wire.Request{Op: ib.OpAtomicCmpSwap, Addr: k.Addr, RKey: uint32(k.RKey), CompareAdd: 12, Swap: 200}, nil, old[2])
	e.finish()
	for i, want := range []uint64{5, 12, 100} {
		if got := binary.NativeEndian.Uint64(old[i]); got != want {
			t.Errorf("atomic %d has found %d, want %d", i, got, want)
		}
	}
	if got := binary.NativeEndian.Uint64(word); got != 100 {
		t.Errorf("the word is %d", got)
	}
	// A receiver that is late.
	e.post(wire.Request{Op: ib.OpSend}, bytesOf(3000, 1), nil)
	e.run(func() bool { return e.req.Counters.RNRNAKs > 2 || e.req.Queued() == 0 })
	if e.req.Queued() != 1 {
		t.Errorf("without a receive: %d requests left, %+v", e.req.Queued(), e.req.Counters)
	}
	r.recv(1)
	e.finish()
	// Many at once, with some of the answers lost.
	r.wait(1)
	e.lose = oneIn(7)
	for i := range 100 {
		r.recv(1)
		e.post(wire.Request{Op: ib.OpSend}, bytesOf(64, byte(i)), nil)
	}
	e.finish()
	for _, wc := range r.wait(100) {
		if wc.Status != ib.WCSuccess || wc.ByteLen != 64 {
			t.Errorf("%+v", wc)
		}
	}
	for i, st := range e.done {
		if st != ib.WCSuccess {
			t.Errorf("request %d ends with %v", i, st)
		}
	}
}

func fromRXE(t *testing.T, mtu ib.MTU, sizes []int) {
	e, r := pairWithRXE(t, ib.RC, mtu, nil)
	var stop atomic.Bool
	served := make(chan struct{})
	e.recvs = len(sizes) + 100
	e.lose = oneIn(11)
	go func() {
		defer close(served)
		e.serve(&stop)
	}()
	post := func(wr ib.SendWR) {
		t.Helper()
		wr.Flags = ib.SendSignaled
		if n, err := r.q.PostSend([]ib.SendWR{wr}); n != 1 {
			t.Fatal(err)
		}
	}
	buf := r.m.Bytes()
	for i, n := range sizes {
		copy(buf, bytesOf(n, byte(i)))
		post(ib.SendWR{Opcode: ib.OpSendWithImm, Imm: uint32(i), SGEs: []ib.SGE{r.m.SGE(0, n)}})
		post(ib.SendWR{Opcode: ib.OpRDMAWrite, RemoteAddr: memAddr + uint64(i)*100, RKey: memRKey, SGEs: []ib.SGE{r.m.SGE(0, n)}})
		post(ib.SendWR{Opcode: ib.OpRDMARead, RemoteAddr: memAddr + uint64(i)*100, RKey: memRKey, SGEs: []ib.SGE{r.m.SGE(20000, n)}})
		for _, wc := range r.wait(3) {
			if wc.Status != ib.WCSuccess {
				t.Fatalf("%d bytes: %+v", n, wc)
			}
		}
		if !bytes.Equal(buf[20000:][:n], buf[:n]) {
			t.Errorf("WRITE and READ of %d bytes brought others", n)
		}
	}
	for range 20 {
		post(ib.SendWR{Opcode: ib.OpAtomicFetchAdd, RemoteAddr: memAddr + 60000, RKey: memRKey, CompareAdd: 3, SGEs: []ib.SGE{r.m.SGE(30000, 8)}})
	}
	post(ib.SendWR{Opcode: ib.OpAtomicCmpSwap, RemoteAddr: memAddr + 60000, RKey: memRKey, CompareAdd: 60, Swap: 1, SGEs: []ib.SGE{r.m.SGE(30008, 8)}})
	for _, wc := range r.wait(21) {
		if wc.Status != ib.WCSuccess {
			t.Fatalf("%+v", wc)
		}
	}
	if a, b := binary.NativeEndian.Uint64(buf[30000:]), binary.NativeEndian.Uint64(buf[30008:]); a != 57 || b != 60 {
		t.Errorf("atomics have found %d and %d", a, b)
	}
	stop.Store(true)
	<-served
	if v := binary.NativeEndian.Uint64(e.mem[60000:]); v != 1 {
		t.Errorf("the word is %d", v)
	}
	if len(e.got) != len(sizes) {
		t.Fatalf("%d messages, want %d", len(e.got), len(sizes))
	}
	for i, m := range e.got {
		if !m.HasImm || m.Imm != uint32(i) || !bytes.Equal(m.data, bytesOf(sizes[i], byte(i))) {
			t.Errorf("SEND of %d bytes: %+v, %d bytes", sizes[i], m.Message, len(m.data))
		}
	}
	for d, n := range e.sock.Counters.Dropped {
		if n != 0 {
			t.Errorf("%d packets dropped for reason %d", n, d)
		}
	}
}

// Over an unreliable connection, both ways; a message that is lost has never been.
func unreliableRXE(t *testing.T) {
	const mtu = ib.MTU1024
	e, r := pairWithRXE(t, ib.UC, mtu, nil)
	sizes := []int{0, 1, 1023, 1024, 1025, 5000}
	for i, n := range sizes {
		r.recv(2)
		k := r.m.RemoteRange(40000, 9000)
		e.post(wire.Request{Op: ib.OpSendWithImm, Imm: uint32(i)}, bytesOf(n, byte(i)), nil)
		e.finish()
		if wc := r.wait(1)[0]; wc.Status != ib.WCSuccess || int(wc.ByteLen) != n || wc.Imm != uint32(i) || !bytes.Equal(r.m.Bytes()[:n], bytesOf(n, byte(i))) {
			t.Errorf("SEND of %d bytes: %+v", n, wc)
		}
		e.post(wire.Request{Op: ib.OpRDMAWriteWithImm, Imm: uint32(i), Addr: k.Addr, RKey: uint32(k.RKey)}, bytesOf(n, byte(i+1)), nil)
		e.finish()
		if wc := r.wait(1)[0]; wc.Opcode != ib.WCRecvRDMAWithImm || int(wc.ByteLen) != n || !bytes.Equal(r.m.Bytes()[40000:][:n], bytesOf(n, byte(i+1))) {
			t.Errorf("WRITE of %d bytes: %+v", n, wc)
		}
	}
	e.recvs = 2*len(sizes) + 1
	buf := r.m.Bytes()
	send := func(n int, wr ib.SendWR) {
		t.Helper()
		wr.Flags, wr.SGEs = ib.SendSignaled, []ib.SGE{r.m.SGE(0, n)}
		if k, err := r.q.PostSend([]ib.SendWR{wr}); k != 1 {
			t.Fatal(err)
		}
		if wc := r.wait(1)[0]; wc.Status != ib.WCSuccess {
			t.Errorf("%+v", wc)
		}
	}
	for i, n := range sizes {
		copy(buf, bytesOf(n, byte(i)))
		send(n, ib.SendWR{Opcode: ib.OpSendWithImm, Imm: uint32(i)})
		e.run(func() bool { return len(e.got) == 2*i+1 })
		if m := e.got[2*i]; m.st != ib.WCSuccess || m.Imm != uint32(i) || !bytes.Equal(m.data, buf[:n]) {
			t.Errorf("SEND of %d bytes: %+v", n, m.Message)
		}
		send(n, ib.SendWR{Opcode: ib.OpRDMAWriteWithImm, Imm: uint32(i), RemoteAddr: memAddr + 100, RKey: memRKey})
		e.run(func() bool { return len(e.got) == 2*i+2 })
		if m := e.got[2*i+1]; !m.Write || m.Imm != uint32(i) || !bytes.Equal(e.mem[100:][:n], buf[:n]) {
			t.Errorf("WRITE of %d bytes: %+v", n, m.Message)
		}
	}
	packet := 0
	e.lose = func() bool { packet++; return packet == 2 }
	send(5000, ib.SendWR{Opcode: ib.OpSend})
	send(8, ib.SendWR{Opcode: ib.OpSend})
	e.run(func() bool { return len(e.got) == 2*len(sizes)+1 })
	if m := e.got[2*len(sizes)]; m.Len != 8 {
		t.Errorf("after a message that lost a packet came one of %d bytes", m.Len)
	}
}

func refusedByRXE(t *testing.T) {
	for name, c := range map[string]struct {
		req  wire.Request
		want ib.WCStatus
	}{
		"WRITE": {wire.Request{Op: ib.OpRDMAWrite, RKey: 1}, ib.WCRemoteAccessErr},
		"READ":  {wire.Request{Op: ib.OpRDMARead, RKey: 1}, ib.WCRemoteAccessErr},
	} {
		t.Run(name, func(t *testing.T) {
			e, _ := pairWithRXE(t, ib.RC, ib.MTU1024, nil)
			e.post(c.req, make([]byte, 100), make([]byte, 100))
			e.post(wire.Request{Op: ib.OpSend}, nil, nil)
			e.finish()
			if e.done[0] != c.want || e.done[1] != ib.WCFlushErr {
				t.Errorf("%v, want %v", e.done, c.want)
			}
		})
	}
}

func refusedByUs(t *testing.T) {
	for name, c := range map[string]struct {
		wr   ib.SendWR
		want ib.WCStatus
	}{
		"WRITE":       {ib.SendWR{Opcode: ib.OpRDMAWrite, RKey: 1}, ib.WCRemoteAccessErr},
		"READ":        {ib.SendWR{Opcode: ib.OpRDMARead, RKey: 1}, ib.WCRemoteAccessErr},
		"atomic":      {ib.SendWR{Opcode: ib.OpAtomicFetchAdd, RKey: memRKey, RemoteAddr: memAddr + 4}, ib.WCRemoteInvalidReqErr},
		"no receive":  {ib.SendWR{Opcode: ib.OpSend}, ib.WCRNRRetryExceeded},
		"nobody home": {ib.SendWR{Opcode: ib.OpSend}, ib.WCRetryExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			silent := c.want == ib.WCRetryExceeded
			e, r := pairWithRXE(t, ib.RC, ib.MTU1024, func(p *qp.ConnectParams) {
				if p.RNRRetry = 2; silent {
					p.RetryCount, p.AckTimeout = 2, 10*time.Millisecond
				}
			})
			e.lose = func() bool { return silent }
			var stop atomic.Bool
			served := make(chan struct{})
			go func() {
				defer close(served)
				e.serve(&stop)
			}()
			c.wr.Flags, c.wr.SGEs = ib.SendSignaled, []ib.SGE{r.m.SGE(0, 8)}
			if n, err := r.q.PostSend([]ib.SendWR{c.wr}); n != 1 {
				t.Fatal(err)
			}
			if wc := r.wait(1)[0]; wc.Status != c.want {
				t.Errorf("%v, want %v", wc.Status, c.want)
			}
			stop.Store(true)
			<-served
		})
	}
}
