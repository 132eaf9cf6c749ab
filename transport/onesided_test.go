package transport_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func alloc(t *testing.T, c *transport.Conn, n int, access ib.Access) *mr.MR {
	t.Helper()
	m, err := mr.Alloc(c.PD(), n, access)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Errorf("close region: %v", err)
		}
	})
	return m
}

const allAccess = ib.AccessLocalWrite | ib.AccessRemote | ib.AccessMWBind

func grant(t *testing.T, c *transport.Conn, m *mr.MR, off, n int, access ib.Access) *transport.Grant {
	t.Helper()
	g, err := c.Grant(t.Context(), m, off, n, access)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Revoke(context.Background()); err != nil {
			t.Errorf("revoke: %v", err)
		}
	})
	return g
}

func TestOneSided(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	far, near := alloc(t, b, 8192, allAccess), alloc(t, a, 8192, ib.AccessLocalWrite)
	g := grant(t, b, far, 4096, 4096, ib.AccessRemote)
	raw, err := g.Remote().MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	b.Send(t.Context(), raw)
	var r transport.Remote
	if err := a.Recv(t.Context(), func(m *transport.Message) error { return r.UnmarshalBinary(m.Bytes()) }); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	fill(near.Bytes()[:4096], 1)
	if err := a.Write(ctx, near.SGE(0, 1000), r, 24); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(far.Bytes()[4096+24:4096+1024], near.Bytes()[:1000]) || far.Bytes()[4096+23] != 0 || far.Bytes()[4096+1024] != 0 {
		t.Error("Write wrote something else")
	}
	if err := a.Read(ctx, near.SGE(5000, 1000), r, 24); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(near.Bytes()[5000:6000], near.Bytes()[:1000]) {
		t.Error("Read read something else")
	}
	if err := a.WriteV(ctx, []ib.SGE{near.SGE(0, 10), near.SGE(100, 20), near.SGE(50, 5)}, r, 2000); err != nil {
		t.Fatal(err)
	}
	want := append(append(bytes.Clone(near.Bytes()[:10]), near.Bytes()[100:120]...), near.Bytes()[50:55]...)
	if !bytes.Equal(far.Bytes()[4096+2000:4096+2035], want) {
		t.Error("WriteV wrote something else")
	}
	if err := a.ReadV(ctx, []ib.SGE{near.SGE(7000, 30), near.SGE(8000, 5)}, r, 2000); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(near.Bytes()[7000:7030], want[:30]) || !bytes.Equal(near.Bytes()[8000:8005], want[30:]) {
		t.Error("ReadV read something else")
	}
	if err := a.WriteImm(ctx, near.SGE(0, 8), r, 0, 0xabcd1234); err != nil {
		t.Fatal(err)
	}
	err = b.Recv(ctx, func(m *transport.Message) error {
		if imm, ok := m.Imm(); !ok || imm != 0xabcd1234 || len(m.Bytes()) != 0 {
			t.Errorf("imm %#x, %v, %d bytes", imm, ok, len(m.Bytes()))
		}
		if !bytes.Equal(far.Bytes()[4096:4104], near.Bytes()[:8]) {
			t.Error("WriteImm's bytes are not there")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	// A message after WriteImm has no immediate.
	a.Send(ctx, []byte("x"))
	b.Recv(ctx, func(m *transport.Message) error {
		if _, ok := m.Imm(); ok {
			t.Error("a message has an immediate")
		}
		return nil
	})
	if err := g.Revoke(ctx); err != nil {
		t.Fatal(err)
	}
}

// hasAtomics reports whether the connection's device has them.
func hasAtomics(t *testing.T, c *transport.Conn) bool {
	t.Helper()
	a, err := c.Poller().Context().QueryDevice()
	if err != nil {
		t.Fatal(err)
	}
	return a.Caps.Has(ib.CapAtomic)
}

// onIWARP reports whether requests that the peer refuses end without a reason.
func onIWARP(t *testing.T, c *transport.Conn) bool {
	t.Helper()
	a, err := c.Poller().Context().QueryDevice()
	if err != nil {
		t.Fatal(err)
	}
	return a.Caps.Has(ib.CapCMOnly)
}

func TestBatch(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	if !hasAtomics(t, a) {
		_, err := a.FetchAdd(t.Context(), transport.Remote{Len: 8, Access: ib.AccessRemoteAtomic}, 0, 1)
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("an atomic of a device without: %v", err)
		}
		t.Skip("the device has no atomics")
	}
	far, near := alloc(t, b, 1<<16, allAccess), alloc(t, a, 1<<16, ib.AccessLocalWrite)
	r := grant(t, b, far, 0, 1<<16, ib.AccessRemote).Remote()
	ctx := t.Context()
	batch := a.NewBatch(4)
	for round := range uint64(3) {
		batch.Reset()
		batch.WriteBytes(binary.NativeEndian.AppendUint64(nil, 10+round), r, 64)
		batch.FetchAdd(r, 64, 5)
		batch.CompareAndSwap(r, 64, 15+round, 99)
		batch.CompareAndSwap(r, 64, 0, 1)
		batch.Read(near.SGE(0, 8), r, 64)
		if err := batch.Do(ctx); err != nil {
			t.Fatal(err)
		}
		if batch.Result(1) != 10+round || batch.Result(2) != 15+round || batch.Result(3) != 99 || binary.NativeEndian.Uint64(near.Bytes()) != 99 {
			t.Fatalf("round %d: %d %d %d %d", round, batch.Result(1), batch.Result(2), batch.Result(3), binary.NativeEndian.Uint64(near.Bytes()))
		}
	}
	// More than fit at once.
	batch.Reset()
	fill(near.Bytes(), 3)
	for i := range 1000 {
		batch.Write(near.SGE(i*64, 64), r, uint64(i*64))
	}
	if err := batch.Do(ctx); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(far.Bytes()[:64000], near.Bytes()[:64000]) {
		t.Error("1000 writes wrote something else")
	}
	var w transport.Waiter
	if err := batch.Start(&w); !errors.Is(err, transport.ErrTooLarge) {
		t.Errorf("Start of 1000: %v", err)
	}
	batch.Reset()
	for i := range 10 {
		batch.Read(near.SGE(i*64, 64), r, uint64((9-i)*64))
	}
	if err := batch.Start(&w); err != nil {
		t.Fatal(err)
	}
	if err := a.Poller().Wait(ctx, &w); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(near.Bytes()[:64], far.Bytes()[9*64:10*64]) {
		t.Error("Start read something else")
	}
	for name, f := range map[string]func(){
		"range":     func() { batch.Read(near.SGE(0, 8), r, 1<<16-7) },
		"overflow":  func() { batch.Read(near.SGE(0, 8), r, 1<<64-4) },
		"alignment": func() { batch.FetchAdd(r, 4, 1) },
	} {
		batch.Reset()
		f()
		if err := batch.Do(ctx); !errors.Is(err, transport.ErrRange) {
			t.Errorf("%s: %v", name, err)
		}
	}
	batch.Reset()
	batch.WriteBytes(make([]byte, 100000), r, 0)
	if err := batch.Do(ctx); !errors.Is(err, transport.ErrTooLarge) {
		t.Errorf("WriteBytes of 100000: %v", err)
	}
	ro := r
	ro.Access = ib.AccessRemoteRead
	if err := a.Write(ctx, near.SGE(0, 8), ro, 0); err == nil {
		t.Error("Write to a read-only grant was posted")
	}
	if err := batch.Close(); err != nil {
		t.Error(err)
	}
	if a.Err() != nil {
		t.Errorf("refusals ended the connection: %v", a.Err())
	}
}

// TestRemoteAccessErrors: what the peer did not grant, or has revoked, stays untouched, and the attempt ends the connection.
func TestRemoteAccessErrors(t *testing.T) {
	type side struct {
		a, b      *transport.Conn
		far, near *mr.MR
		g         *transport.Grant
	}
	for name, f := range map[string]func(s side) error{
		"revoked read": func(s side) error {
			if err := s.g.Revoke(t.Context()); err != nil {
				t.Fatal(err)
			}
			return s.a.Read(t.Context(), s.near.SGE(0, 64), s.g.Remote(), 0)
		},
		"revoked write": func(s side) error {
			if err := s.g.Revoke(t.Context()); err != nil {
				t.Fatal(err)
			}
			return s.a.Write(t.Context(), s.near.SGE(0, 64), s.g.Remote(), 0)
		},
		"range": func(s side) error {
			r := s.g.Remote()
			r.Len = 8192
			return s.a.Write(t.Context(), s.near.SGE(0, 64), r, 4096-8)
		},
		"rkey": func(s side) error {
			r := s.g.Remote()
			r.RKey ^= 0x5500
			return s.a.Write(t.Context(), s.near.SGE(0, 64), r, 0)
		},
		"rights": func(s side) error {
			r := s.g.Remote()
			r.Access |= ib.AccessRemoteAtomic
			_, err := s.a.FetchAdd(t.Context(), r, 0, 1)
			return err
		},
		"batch": func(s side) error {
			r := s.g.Remote()
			bad := r
			bad.RKey ^= 0x5500
			batch := s.a.NewBatch(3)
			defer batch.Close()
			batch.Read(s.near.SGE(0, 8), r, 0)
			batch.Write(s.near.SGE(0, 64), bad, 0)
			batch.Write(s.near.SGE(0, 64), r, 0)
			return batch.Do(t.Context())
		},
	} {
		t.Run(name, func(t *testing.T) {
			var s side
			s.a, s.b = transporttest.Pair(t, nil)
			s.far, s.near = alloc(t, s.b, 8192, allAccess), alloc(t, s.a, 8192, ib.AccessLocalWrite)
			fill(s.near.Bytes(), 7)
			s.g = grant(t, s.b, s.far, 0, 4096, ib.AccessRemoteRead|ib.AccessRemoteWrite)
			err := f(s)
			if errors.Is(err, errors.ErrUnsupported) {
				t.Skip(err)
			}
			// An iWARP device is told that the connection ends, not why: its requests are flushed.
			iwarp := onIWARP(t, s.a)
			if !errors.Is(err, ib.WCRemoteAccessErr) && !(iwarp && err != nil) {
				t.Errorf("the operation ended with %v", err)
			}
			if !bytes.Equal(s.far.Bytes(), make([]byte, 8192)) {
				t.Error("memory was touched")
			}
			<-s.a.Done()
			if err := s.a.Err(); !errors.Is(err, ib.WCRemoteAccessErr) && !iwarp {
				t.Errorf("a ended with %v", err)
			}
			<-s.b.Done()
			if err := s.b.Err(); err == nil {
				t.Error("b goes on")
			}
			s.g.Revoke(t.Context())
		})
	}
}

// Who is refused access hears why, but from a peer that dies: a process loses its memory before its queue pairs.
func TestRefusedByWho(t *testing.T) {
	transport.WaitLongForPeers(t)
	for name, c := range map[string]struct {
		then func(b *transport.Conn)
		want error
	}{
		"living": {func(b *transport.Conn) { b.Abort(errors.New("enough")) }, ib.WCRemoteAccessErr},
		"dying":  {(*transport.Conn).DropBootstrap, transport.ErrPeerDied},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := transporttest.Pair(t, nil)
			if onIWARP(t, a) {
				t.Skip("requests end without a reason")
			}
			near := alloc(t, a, 4096, ib.AccessLocalWrite)
			r := grant(t, b, alloc(t, b, 4096, allAccess), 0, 4096, ib.AccessRemoteRead).Remote()
			r.RKey ^= 0x5500
			read := make(chan error, 1)
			go func() { read <- a.Read(context.Background(), near.SGE(0, 8), r, 0) }()
			testutil.Eventually(t, "the request is refused", a.Refused)
			if err := a.Err(); err != nil {
				t.Error("it has ended before it is known whether the peer lives:", err)
			}
			c.then(b)
			if err := <-read; !errors.Is(err, ib.WCRemoteAccessErr) {
				t.Error(err)
			}
			<-a.Done()
			if err := a.Err(); !errors.Is(err, c.want) {
				t.Error(err)
			}
			<-b.Done()
		})
	}
}

// TestGrantWhileEnding: a grant of a connection that is being taken down is refused, and does not outlive it.
func TestGrantWhileEnding(t *testing.T) {
	_, b := transporttest.Pair(t, nil)
	m := alloc(t, b, 4096, ib.AccessLocalWrite|ib.AccessRemote) // no windows, which need the queue pair
	p := b.Poller()
	first, second := make(chan struct{}), make(chan struct{})
	began := make(chan struct{})
	go p.Do(func() { close(began); <-first })
	<-began
	b.Abort(nil)
	testutil.Eventually(t, "the connection's end has begun", func() bool { return transport.Tasks(p) == 1 })
	p.Do(func() { <-second })
	close(first)
	testutil.Eventually(t, "all that is left is to give things back", func() bool { return transport.Tasks(p) == 1 })
	_, err := b.Grant(t.Context(), m, 0, 4096, ib.AccessRemoteWrite)
	close(second)
	if !errors.Is(err, net.ErrClosed) {
		t.Errorf("Grant: %v", err)
	}
	<-b.Done()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

func TestWriteImmWaitsForCredit(t *testing.T) {
	a, b := transporttest.Pair(t, &transport.Config{RecvDepth: 4})
	far, near := alloc(t, b, 4096, allAccess), alloc(t, a, 4096, ib.AccessLocalWrite)
	r := grant(t, b, far, 0, 4096, ib.AccessRemoteWrite).Remote()
	done := make(chan error, 1)
	go func() {
		for i := range uint32(50) {
			if err := a.WriteImm(context.Background(), near.SGE(0, 8), r, 0, i); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	var held *transport.Message
	for i := range uint32(50) {
		if i%5 == 0 {
			time.Sleep(time.Millisecond)
		}
		err := b.Recv(t.Context(), func(m *transport.Message) error {
			if imm, ok := m.Imm(); !ok || imm != i {
				t.Errorf("imm %d, want %d", imm, i)
			}
			if held == nil {
				held = m.Take() // one credit less for the rest
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	held.Release()
}

func TestSendRegion(t *testing.T) {
	a, b := transporttest.Pair(t, &transport.Config{RendezvousDepth: 2})
	m := alloc(t, a, 1<<20, ib.AccessLocalWrite|ib.AccessRemoteRead)
	fill(m.Bytes(), 5)
	for _, n := range []int{10, 9000, 1<<20 - 3} {
		done := make(chan error, 1)
		go func() { done <- a.SendRegion(context.Background(), m, 3, n) }()
		recvEqual(t, b, m.Bytes()[3:3+n])
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	// Nobody receives: the context ends, and the memory is ours again. b is not polled, and cannot answer the cancel until
	// it is; then the message has gone.
	for round := range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		done := make(chan error, 1)
		go func() { done <- a.SendRegion(ctx, m, 0, 1<<20) }()
		if round == 2 {
			<-ctx.Done()
		}
		time.Sleep(10 * time.Millisecond)
		got := 0
		recv := func() error {
			rctx, rcancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer rcancel()
			return b.Recv(rctx, func(msg *transport.Message) error {
				got = len(msg.Bytes())
				if !bytes.Equal(msg.Bytes(), m.Bytes()) {
					t.Error("message differs")
				}
				return nil
			})
		}
		rerr := recv()
		var err error
		for waits := true; waits; {
			select {
			case err = <-done:
				waits = false
			case <-time.After(50 * time.Millisecond):
				if rerr != nil { // on a slow device what there is to answer may only come now
					rerr = recv()
				}
			}
		}
		if err == nil && errors.Is(rerr, context.DeadlineExceeded) { // a busy machine: it has gone, and not come in that time
			rerr = b.Recv(t.Context(), func(msg *transport.Message) error {
				got = len(msg.Bytes())
				return nil
			})
		}
		switch {
		case err == nil && rerr == nil && got == 1<<20: // it was read before the cancel came
		case errors.Is(err, context.DeadlineExceeded) && errors.Is(rerr, context.DeadlineExceeded):
		default:
			t.Errorf("SendRegion: %v; Recv: %d bytes, %v", err, got, rerr)
		}
		cancel()
	}
	if err := a.SendRegion(t.Context(), alloc(t, a, 1<<20, ib.AccessLocalWrite), 0, 1<<20); err == nil {
		t.Error("SendRegion of a region without remote read")
	}
	buf, err := a.Poller().Pool().Get(200000)
	if err != nil {
		t.Fatal(err)
	}
	fill(buf.Bytes(), 8)
	if err := a.SendBuffer(t.Context(), buf); err != nil {
		t.Fatal(err)
	}
	recvEqual(t, b, pattern(200000, 8))
}

// TestSendRegionCancelledBeforeEOS: what waits behind a message that is taken back goes out, be it the end.
func TestSendRegionCancelledBeforeEOS(t *testing.T) {
	ctx := patience(t)
	a, b := transporttest.Pair(t, &transport.Config{RecvDepth: 2})
	m := alloc(t, a, 20000, ib.AccessLocalWrite|ib.AccessRemoteRead)
	for i := range uint64(2) { // as many as b has room for
		if err := a.Send(ctx, pattern(40, i)); err != nil {
			t.Fatal(err)
		}
	}
	sending, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- a.SendRegion(sending, m, 0, 20000) }()
	testutil.Eventually(t, "the message is queued", a.Queued)
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("SendRegion: %v", err)
	}
	for i := range uint64(2) {
		recvEqual(t, b, pattern(40, i))
	}
	if err := b.Recv(ctx, func(*transport.Message) error { return nil }); err != io.EOF {
		t.Errorf("after the last message: %v", err)
	}
}

// TestManyConnections: on two pollers with shared receive queues.
func TestManyConnections(t *testing.T) {
	n := 130
	if testing.Short() || raceEnabled {
		n = 40
	}
	vctx := transporttest.Context(t)
	depth := 64
	if a, err := vctx.QueryDevice(); err != nil {
		t.Fatal(err)
	} else if a.Caps.Has(ib.CapCMOnly) {
		depth = 1 << 16 // siw cannot resize it
	}
	poller := func() *transport.Poller {
		p, err := transport.NewPoller(vctx, &transport.PollerConfig{SharedDepth: 8192, CQDepth: depth})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		})
		return p
	}
	pa, pb := poller(), poller()
	l, err := transport.Listen(t.Context(), "127.0.0.1:0", &transport.Config{Poller: pb, SharedReceive: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var as, bs []*transport.Conn
	for range n {
		a, b := transporttest.Connect(t, l, &transport.Config{Poller: pa, SharedReceive: true})
		b.SetHandler(newEcho(t))
		as, bs = append(as, a), append(bs, b)
	}
	for round := range 3 {
		for i, a := range as {
			for k := range 5 {
				if err := a.Send(t.Context(), pattern(k*700, uint64(i+round))); err != nil {
					t.Fatal(err)
				}
			}
		}
		for i, a := range as {
			for k := range 5 {
				recvEqual(t, a, pattern(k*700, uint64(i+round)))
			}
		}
	}
	for i := range as {
		if i%2 == 0 {
			as[i].Close()
		} else {
			bs[i].Close()
		}
	}
}

// What an atomic has found can be asked for when the connection is gone, and with it the memory that it came to.
func TestResultAfterClose(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	if !hasAtomics(t, a) {
		t.Skip("the device has no atomics")
	}
	far := alloc(t, b, 64, allAccess)
	binary.NativeEndian.PutUint64(far.Bytes(), 42)
	r := grant(t, b, far, 0, 64, ib.AccessRemote).Remote()
	batch := a.NewBatch(1)
	batch.FetchAdd(r, 0, 5)
	if err := batch.Do(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if got := batch.Result(0); got != 42 {
		t.Errorf("%d", got)
	}
}

// More atomics than are posted at once: each has its own result, also when the batch is done again.
func TestManyResults(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	if !hasAtomics(t, a) {
		t.Skip("the device has no atomics")
	}
	far := alloc(t, b, 64, allAccess)
	r := grant(t, b, far, 0, 64, ib.AccessRemote).Remote()
	batch := a.NewBatch(1)
	const n = 300
	for i := range n {
		if i%7 == 0 { // results are not numbered as operations are
			batch.WriteBytes([]byte{1}, r, 32)
		}
		batch.FetchAdd(r, 0, 1)
	}
	for round := range uint64(2) {
		if err := batch.Do(t.Context()); err != nil {
			t.Fatal(err)
		}
		op := 0
		for i := range n {
			if i%7 == 0 {
				op++
			}
			if got, want := batch.Result(op), round*n+uint64(i); got != want {
				t.Fatalf("round %d: atomic %d has found %d, want %d", round, i, got, want)
			}
			op++
		}
	}
}

// A second Revoke does nothing, at whatever moment it comes: an invalidation of what is invalid would end the connection.
func TestRevokeTwiceAtOnce(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	windows, regions := alloc(t, b, 4096, allAccess), alloc(t, b, 4096, ib.AccessLocalWrite|ib.AccessRemote)
	const many = 8
	rounds := 200
	if testing.Short() {
		rounds = 20
	}
	for round := range rounds {
		far := windows
		if round%2 == 0 {
			far = regions
		}
		g, err := b.Grant(t.Context(), far, 0, 4096, ib.AccessRemoteRead)
		if err != nil {
			t.Fatal(err)
		}
		errs := make(chan error, many)
		begin := make(chan struct{})
		for range many {
			go func() {
				<-begin
				errs <- g.Revoke(context.Background())
			}()
		}
		close(begin)
		for range many {
			if err := <-errs; err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := b.Send(t.Context(), []byte("still here")); err != nil {
		t.Fatal(err)
	}
	if err := a.Recv(t.Context(), func(*transport.Message) error { return nil }); err != nil {
		t.Fatal(err)
	}
}

// One that comes while another is under way waits for it no longer than its context.
func TestRevokeBehindAnother(t *testing.T) {
	_, b := transporttest.Pair(t, nil)
	g := grant(t, b, alloc(t, b, 4096, allAccess), 0, 4096, ib.AccessRemoteRead)
	release, ok := transport.HoldRevoke(g)
	if !ok {
		return // the device has no windows: nothing to wait for
	}
	defer release()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.Revoke(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// Who recovers from the panic of a wrong call has a connection that goes on.
func TestMisuseLeavesTheConnection(t *testing.T) {
	a, b := transporttest.Pair(t, nil)
	far, near := alloc(t, b, 1<<20, allAccess), alloc(t, a, 1<<20, allAccess)
	r := grant(t, b, far, 0, 1<<20, ib.AccessRemote).Remote()
	panics := func(what string, f func()) {
		defer func() {
			if recover() == nil {
				t.Errorf("%s did not panic", what)
			}
		}()
		f()
	}
	panics("SendRegion beyond its region", func() { a.SendRegion(t.Context(), near, 4096, 1<<20) })
	var w, second transport.Waiter
	a.Poller().Do(func() { // where nothing is completed meanwhile
		batch := a.NewBatch(1)
		batch.Write(near.SGE(0, 1<<20), r, 0)
		if err := batch.Start(&w); err != nil {
			t.Error(err)
			return
		}
		panics("Start of a batch that is under way", func() { batch.Start(&second) })
	})
	if err := a.Poller().Wait(t.Context(), &w); err != nil {
		t.Fatal(err)
	}
	if err := a.Send(t.Context(), []byte("still here")); err != nil {
		t.Fatal(err)
	}
	// What a callback has taken before it panics is the taker's.
	var taken *transport.Message
	panics("a callback", func() {
		b.Recv(t.Context(), func(m *transport.Message) error {
			taken = m.Take()
			panic("on purpose")
		})
	})
	if err := a.Send(t.Context(), []byte("the next one")); err != nil {
		t.Fatal(err)
	}
	if err := b.Recv(t.Context(), func(*transport.Message) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if string(taken.Bytes()) != "still here" {
		t.Errorf("what was taken is %q", taken.Bytes())
	}
	taken.Release()
}
