package rpc

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Methods of addBulkMethods.
const (
	mSum     Method = 200 // pulls argument 0 and answers with its SHA-256
	mFill    Method = 201 // pushes a pattern into argument 0
	mExceed  Method = 202 // tries what was not granted
	mHold    Method = 203 // pulls again and again until its context ends
	mReverse Method = 204 // pulls argument 0, pushes it reversed to argument 1
	mStray   Method = 205 // returns with a Pull under way, or about to begin
)

func addBulkMethods(t testing.TB, ts *testServer) {
	local := func(c *Call, n int) (*mr.Buffer, error) { return c.Conn().Poller().Pool().Get(n) }
	ts.HandleRaw(Spec{Number: mSum, Inline: true}, func(c *Call, _ []byte) error { // runs on a worker all the same
		n := int(c.Bulk(0).Len)
		b, err := local(c, max(n, 1))
		if err != nil {
			return err
		}
		defer b.Release()
		// In pieces, so that offsets count.
		for off := 0; off < n; off += 100_000 {
			if err := c.Pull(c.Context(), b.SGE(off, min(100_000, n-off)), 0, uint64(off)); err != nil {
				return err
			}
		}
		sum := sha256.Sum256(b.Bytes()[:n])
		return c.ReplyBytes(sum[:])
	})
	ts.HandleRaw(Spec{Number: mFill}, func(c *Call, _ []byte) error {
		n := int(c.Bulk(0).Len)
		b, err := local(c, n)
		if err != nil {
			return err
		}
		defer b.Release()
		copy(b.Bytes(), pattern(n))
		return c.Push(c.Context(), b.SGE(0, n), 0, 0)
	})
	ts.HandleRaw(Spec{Number: mExceed}, func(c *Call, _ []byte) error {
		b, err := local(c, 64)
		if err != nil {
			return err
		}
		defer b.Release()
		ctx := c.Context()
		wantCode(t, c.Push(ctx, b.SGE(0, 8), 0, 0), PermissionDenied)
		wantCode(t, c.Pull(ctx, b.SGE(0, 8), 0, c.Bulk(0).Len-7), OutOfRange)
		wantCode(t, c.Pull(ctx, b.SGE(0, 8), 0, 1<<63), OutOfRange)
		wantCode(t, c.Pull(ctx, b.SGE(0, 8), 1, 0), OutOfRange)
		wantCode(t, c.Pull(ctx, b.SGE(0, 8), -1, 0), OutOfRange)
		if c.NumBulk() != 1 {
			t.Errorf("%d bulk arguments", c.NumBulk())
		}
		return nil
	})
	ts.HandleRaw(Spec{Number: mHold}, func(c *Call, _ []byte) error {
		n := int(c.Bulk(0).Len)
		b, err := local(c, n)
		if err != nil {
			return err
		}
		defer b.Release()
		ts.entered <- struct{}{}
		for {
			if err := c.Pull(c.Context(), b.SGE(0, n), 0, 0); err != nil {
				return err
			}
			if i := bytes.IndexFunc(b.Bytes()[:n], func(r rune) bool { return r != 'x' }); i >= 0 {
				t.Error("memory was used again while the server could still read it")
				return nil
			}
		}
	})
	ts.HandleRaw(Spec{Number: mReverse}, func(c *Call, _ []byte) error {
		n := int(c.Bulk(0).Len)
		b, err := local(c, n)
		if err != nil {
			return err
		}
		defer b.Release()
		if err := c.Pull(c.Context(), b.SGE(0, n), 0, 0); err != nil {
			return err
		}
		for i, j := 0, n-1; i < j; i, j = i+1, j-1 {
			b.Bytes()[i], b.Bytes()[j] = b.Bytes()[j], b.Bytes()[i]
		}
		return c.Push(c.Context(), b.SGE(0, n), 1, 0)
	})
	ts.HandleRaw(Spec{Number: mStray}, func(c *Call, _ []byte) error {
		n := int(c.Bulk(0).Len)
		b, err := local(c, n)
		if err != nil {
			return err
		}
		begun := make(chan struct{})
		go func() {
			defer b.Release()
			close(begun)
			_ = c.Pull(context.Background(), b.SGE(0, n), 0, 0)
		}()
		<-begun
		return nil
	})
}

func bulkRig(t testing.TB) *rig {
	r := realRig(t, nil, nil)
	addBulkMethods(t, r.ts)
	return r
}

func alloc(t testing.TB, r *rig, n int, access ib.Access) *mr.MR {
	t.Helper()
	m, err := mr.Alloc(r.cl.Conn().PD(), n, access)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

const bulkAll = ib.AccessLocalWrite | ib.AccessRemoteRead | ib.AccessRemoteWrite | ib.AccessMWBind

// A Call that has had bulk arguments stays over: who holds on to it cannot reach those of a later one.
func TestBulkAfterReturn(t *testing.T) {
	testutil.CheckLeaks(t)
	r := realRig(t, nil, nil)
	ctx := ctxFor(t)
	m := alloc(t, r, 4096, bulkAll)
	calls := make(chan *Call, 1)
	goOn := make(chan struct{})
	end := sync.OnceFunc(func() { close(goOn) })
	defer end()
	const mKeep, mWait Method = 206, 207
	r.ts.HandleRaw(Spec{Number: mKeep}, func(c *Call, _ []byte) error {
		calls <- c
		return nil
	})
	r.ts.HandleRaw(Spec{Number: mWait}, func(c *Call, _ []byte) error {
		calls <- c
		<-goOn
		return nil
	})
	arg := []Bulk{{MR: m, Len: 4096, Access: ib.AccessRemoteRead}}
	if err := r.cl.CallBulk(ctx, mKeep, nil, arg, nil); err != nil {
		t.Fatal(err)
	}
	kept := <-calls
	if err := r.cl.CallRaw(ctx, mKeep, nil, nil); err != nil {
		t.Fatal(err)
	}
	plain := <-calls // this one is used again
	done := make(chan error, 1)
	go func() { done <- r.cl.CallBulk(ctx, mWait, nil, arg, nil) }()
	var running *Call
	select {
	case running = <-calls:
	case err := <-done:
		t.Fatal(err)
	}
	b, err := running.Conn().Poller().Pool().Get(4096)
	if err != nil {
		t.Fatal(err)
	}
	wantCode(t, kept.Pull(ctx, b.SGE(0, 4096), 0, 0), Canceled)
	wantCode(t, plain.Pull(ctx, b.SGE(0, 4096), 0, 0), OutOfRange)
	again := new(Call) // as plain is when it serves another call, which was cancelled
	again.end(context.Canceled)
	wantCode(t, again.Pull(ctx, b.SGE(0, 4096), 0, 0), OutOfRange)
	if err := running.Pull(ctx, b.SGE(0, 4096), 0, 0); err != nil {
		t.Errorf("the one that runs: %v", err)
	}
	b.Release()
	end()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestBulk(t *testing.T) {
	testutil.CheckLeaks(t)
	r := bulkRig(t)
	ctx := ctxFor(t)
	m := alloc(t, r, 1<<20, bulkAll)
	copy(m.Bytes(), pattern(m.Len()))
	for _, part := range [][2]int{{0, 1 << 20}, {4096, 100_001}, {7, 1}, {500, 0}} {
		want := sha256.Sum256(m.Bytes()[part[0] : part[0]+part[1]])
		err := r.cl.CallBulk(ctx, mSum, []byte("request"), []Bulk{{MR: m, Off: part[0], Len: part[1], Access: ib.AccessRemoteRead}}, func(resp []byte) error {
			if !bytes.Equal(resp, want[:]) {
				return errors.New("wrong sum")
			}
			return nil
		})
		if err != nil {
			t.Errorf("pull of %v: %v", part, err)
		}
	}
	clear(m.Bytes())
	if err := r.cl.CallBulk(ctx, mFill, nil, []Bulk{{MR: m, Off: 1000, Len: 5000, Access: ib.AccessRemoteWrite}}, nil); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(m.Bytes()[1000:6000], pattern(5000)) || m.Bytes()[999] != 0 || m.Bytes()[6000] != 0 {
		t.Error("push wrote something else")
	}
	if err := r.cl.CallBulk(ctx, mReverse, nil, []Bulk{
		{MR: m, Off: 1000, Len: 256, Access: ib.AccessRemoteRead}, {MR: m, Off: 9000, Len: 256, Access: ib.AccessRemoteWrite},
	}, nil); err != nil {
		t.Fatal(err)
	}
	for i := range 256 {
		if m.Bytes()[9000+i] != m.Bytes()[1255-i] {
			t.Fatal("reversed copy is wrong")
		}
	}
	if err := r.cl.CallBulk(ctx, mExceed, nil, []Bulk{{MR: m, Off: 64, Len: 64, Access: ib.AccessRemoteRead}}, nil); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := r.cl.CallBulk(ctx, mStray, nil, []Bulk{{MR: m, Len: 1 << 20, Access: ib.AccessRemoteRead}}, nil); err != nil {
			t.Fatal(err)
		}
	}
	// A region that was granted before, and stays so.
	g, err := r.cl.Conn().Grant(ctx, m, 0, 4096, ib.AccessRemoteRead)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		want := sha256.Sum256(m.Bytes()[:4096])
		if err := r.cl.CallBulk(ctx, mSum, nil, []Bulk{{Remote: g.Remote()}}, func(resp []byte) error {
			if !bytes.Equal(resp, want[:]) {
				return errors.New("wrong sum")
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	if err := g.Revoke(ctx); err != nil {
		t.Error(err)
	}
	for name, b := range map[string][]Bulk{
		"negative offset": {{MR: m, Off: -1, Len: 1, Access: ib.AccessRemoteRead}},
		"too long":        {{MR: m, Off: 1, Len: 1 << 20, Access: ib.AccessRemoteRead}},
		"no access":       {{MR: m, Len: 1}},
		"atomic access":   {{MR: m, Len: 1, Access: ib.AccessRemoteAtomic}},
		"nothing":         {{}},
		"too many":        make([]Bulk, MaxBulk+1),
	} {
		if err := r.cl.CallBulk(ctx, mSum, nil, b, nil); CodeOf(err) != InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	if free := countFree(r.cl); free != r.cl.nslots {
		t.Errorf("%d slots of %d are free", free, r.cl.nslots)
	}
}

// A bulk call that is given up returns only when the server cannot touch the memory any more.
func TestBulkCancel(t *testing.T) {
	testutil.CheckLeaks(t)
	r := bulkRig(t)
	m := alloc(t, r, 64<<10, bulkAll)
	for i := range 20 {
		for j := range m.Bytes() {
			m.Bytes()[j] = 'x'
		}
		ctx, cancel := context.WithCancel(ctxFor(t))
		result := make(chan error, 1)
		go func() {
			result <- r.cl.CallBulk(ctx, mHold, nil, []Bulk{{MR: m, Len: m.Len(), Access: ib.AccessRemoteRead}}, nil)
		}()
		<-r.ts.entered
		time.Sleep(time.Duration(i) * 50 * time.Microsecond)
		cancel()
		wantCode(t, <-result, Canceled)
		for j := range m.Bytes() {
			m.Bytes()[j] = 'y' // the handler complains if it sees this
		}
	}
	if err := echo(ctxFor(t), r.cl, mEcho, pattern(64)); err != nil {
		t.Errorf("the connection did not survive: %v", err)
	}
}

// If the server does not let go, access is withdrawn by force.
func TestBulkStuckServer(t *testing.T) {
	testutil.CheckLeaks(t)
	r := bulkRig(t)
	stuck := make(chan struct{})
	r.ts.HandleRaw(Spec{Number: 300}, func(c *Call, _ []byte) error {
		r.ts.entered <- struct{}{}
		<-stuck
		return nil
	})
	defer close(stuck)
	m := alloc(t, r, 4096, bulkAll)
	for _, lasting := range []bool{false, true} {
		ctx, cancel := context.WithCancel(ctxFor(t))
		defer cancel()
		b := Bulk{MR: m, Len: m.Len(), Access: ib.AccessRemoteRead}
		if lasting {
			b = Bulk{Remote: m.RemoteRange(0, m.Len())}
		}
		result := make(chan error, 1)
		go func() { result <- r.cl.CallBulk(ctx, 300, nil, []Bulk{b}, nil) }()
		<-r.ts.entered
		cancel()
		wantCode(t, <-result, Canceled)
		err := echo(ctxFor(t), r.cl, mEcho, pattern(64))
		if !lasting && err != nil {
			t.Errorf("the connection ended without need: %v", err)
		}
		if lasting {
			wantCode(t, err, Unavailable)
		}
	}
}

// Memory that a call has lent by the caller's own grant is the caller's again only when the connection is down, if that is what ends the call.
func TestBulkWhileClosing(t *testing.T) {
	testutil.CheckLeaks(t)
	r := bulkRig(t)
	stuck := make(chan struct{})
	r.ts.HandleRaw(Spec{Number: 300}, func(*Call, []byte) error {
		r.ts.entered <- struct{}{}
		<-stuck
		return nil
	})
	m := alloc(t, r, 4096, bulkAll)
	result := make(chan error, 1)
	go func() {
		err := r.cl.CallBulk(ctxFor(t), 300, nil, []Bulk{{Remote: m.RemoteRange(0, m.Len())}}, nil)
		select {
		case <-r.cl.Conn().Done():
		default:
			err = errors.New("the queue pair is up")
		}
		result <- err
	}()
	<-r.ts.entered
	closed := make(chan error, 1)
	go func() { closed <- r.cl.Close() }()
	testutil.Eventually(t, "calls end", r.cl.closed.Load)
	close(stuck) // or Close lingers
	wantCode(t, <-result, Unavailable)
	if err := <-closed; !errors.Is(err, verbs.ErrBusy) {
		t.Errorf("%v, want the word that a region is open", err)
	}
}

func TestServeAndDial(t *testing.T) {
	testutil.CheckLeaks(t)
	ctx := ctxFor(t)
	for _, mode := range []transport.PollMode{transport.Adaptive, transport.Event} {
		t.Run(mode.String(), func(t *testing.T) {
			cfg := &transport.Config{Device: transporttest.Device, PollMode: mode}
			l, err := transport.Listen(ctx, "127.0.0.1:0", cfg)
			if err != nil {
				t.Fatal(err)
			}
			ts := newTestServer(nil)
			served := make(chan error, 1)
			go func() { served <- ts.Serve(context.Background(), l) }()
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					cl, err := Dial(ctx, l.Addr().String(), cfg, nil)
					if err != nil {
						t.Error(err)
						return
					}
					defer cl.Close()
					for i := range 100 {
						if err := echo(ctx, cl, []Method{mEcho, mEchoSlow}[i%2], pattern(i*100)); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			testutil.Eventually(t, "the server has forgotten its clients", func() bool { return len(ts.snapshotConns()) == 0 })
			if err := ts.Shutdown(ctx); err != nil {
				t.Error(err)
			}
			if err := <-served; !errors.Is(err, ErrServerClosed) {
				t.Error("Serve:", err)
			}
			if _, err := Dial(ctx, l.Addr().String(), cfg, nil); err == nil {
				t.Error("the listener is still open")
			}
			if err := ts.Serve(ctx, l); !errors.Is(err, ErrServerClosed) {
				t.Error("Serve after Shutdown:", err)
			}
		})
	}
}

func TestServeEndsWithItsContext(t *testing.T) {
	testutil.CheckLeaks(t)
	ctx := ctxFor(t)
	cfg := &transport.Config{Device: transporttest.Device}
	l, err := transport.Listen(ctx, "127.0.0.1:0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	ts := newTestServer(nil)
	serving, stop := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() { served <- ts.Serve(serving, l) }()
	cl, err := Dial(ctx, l.Addr().String(), cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	result := make(chan error, 1)
	go func() { result <- cl.CallRaw(ctx, mBlock, nil, nil) }()
	<-ts.entered
	stop()
	if err := <-served; !errors.Is(err, context.Canceled) {
		t.Error("Serve:", err)
	}
	wantCode(t, <-result, Unavailable)
	if err := <-ts.ended; err != context.Canceled {
		t.Error("handler's context:", err)
	}
	_ = ts.Close()
}

// Small receive windows, shared receive slots, long messages.
func TestTransportConfigs(t *testing.T) {
	for name, cfg := range map[string]*transport.Config{
		"depth 2":  {SendDepth: 2, RecvDepth: 2, EagerSize: 256},
		"shared":   {SharedReceive: true},
		"1 MiB":    {MaxMessage: 1 << 20},
		"no eager": {EagerSize: 256, MaxMessage: 64 << 10},
	} {
		t.Run(name, func(t *testing.T) {
			testutil.CheckLeaks(t)
			r := realRigConfig(t, cfg, nil, nil)
			ctx := ctxFor(t)
			most := min(r.cl.maxMessage-headerLen, 1<<20)
			for _, n := range []int{0, 64, 300, 9000, 65000, most} {
				for _, m := range []Method{mEcho, mEchoSlow} {
					if n > most {
						continue
					}
					if err := echo(ctx, r.cl, m, pattern(n)); err != nil {
						t.Fatalf("%d bytes: %v", n, err)
					}
				}
			}
			wantCode(t, r.cl.CallRaw(ctx, mEcho, make([]byte, r.cl.maxMessage-headerLen+1), nil), ResourceExhausted)
			var wg sync.WaitGroup
			for g := range 16 {
				wg.Go(func() {
					for i := range 30 {
						if err := echo(ctx, r.cl, []Method{mEcho, mEchoSlow}[i%2], pattern((g*997+i*131)%20000)); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			q, err := r.cl.NewQueue(100)
			if err != nil {
				t.Fatal(err)
			}
			defer q.Close()
			for tag := range uint64(100) {
				if err := q.Start(ctx, []Method{mEcho, mEchoSlow}[tag%2], pattern(int(tag)*37), tag); err != nil {
					t.Fatal(err)
				}
			}
			if err := echo(ctx, r.cl, mEcho, pattern(100)); err != nil {
				t.Error(err)
			}
			for q.Len() > 0 {
				if _, err := q.Wait(ctx, func(tag uint64, resp []byte, err error) {
					if err != nil || !bytes.Equal(resp, pattern(int(tag)*37)) {
						t.Error(tag, len(resp), err)
					}
				}); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// Cancels get through to a server whose workers are all taken, over any receive window.
func TestCancelWhenAllIsBusy(t *testing.T) {
	testutil.CheckLeaks(t)
	r := realRigConfig(t, &transport.Config{RecvDepth: 8, SendDepth: 8}, &ServerConfig{MaxConcurrent: 4}, nil)
	ctx, cancel := context.WithCancel(ctxFor(t))
	var wg sync.WaitGroup
	for range 40 {
		wg.Go(func() { wantCode(t, r.cl.CallRaw(ctx, mBlock, pattern(700), nil), Canceled) })
	}
	for range 4 {
		<-r.ts.entered
	}
	cancel()
	wg.Wait()
	testutil.Eventually(t, "no call is active on the server", func() bool { return r.ts.active.Load() == 0 })
	if err := echo(ctxFor(t), r.cl, mEchoSlow, pattern(700)); err != nil {
		t.Error(err)
	}
}

// A client that closes its sending side gets what it asked for.
func TestHalfClosedClient(t *testing.T) {
	testutil.CheckLeaks(t)
	r := realRig(t, nil, nil)
	ctx := ctxFor(t)
	results := make(chan error, 5)
	for range 5 {
		go func() { results <- echo(ctx, r.cl, mBlock, pattern(700)) }()
	}
	for range 5 {
		<-r.ts.entered
	}
	if err := r.cl.Conn().CloseWrite(); err != nil {
		t.Fatal(err)
	}
	wantCode(t, echo(ctx, r.cl, mEcho, nil), Unavailable)
	close(r.ts.release)
	for range 5 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	testutil.Eventually(t, "the server has closed", func() bool { return len(r.ts.snapshotConns()) == 0 })
}

// A server that closes its sending side answers no more.
func TestHalfClosedServer(t *testing.T) {
	testutil.CheckLeaks(t)
	a, b := transporttest.Pair(t, nil)
	b.SetHandler(nullHandler{})
	cl := NewClient(a, nil)
	defer cl.Close()
	result := make(chan error, 1)
	go func() { result <- cl.CallRaw(ctxFor(t), 1, nil, nil) }()
	time.Sleep(time.Millisecond)
	if err := b.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	wantCode(t, <-result, Unavailable)
}

type nullHandler struct{}

func (nullHandler) HandleMessage(*transport.Conn, *transport.Message) {}
func (nullHandler) HandleClose(*transport.Conn, error)                {}

// Garbage over a real connection ends it, with the reason on the other side.
func TestGarbageOverTransport(t *testing.T) {
	for name, g := range garbageFrames() {
		t.Run(name, func(t *testing.T) {
			testutil.CheckLeaks(t)
			a, b := transporttest.Pair(t, nil)
			ts := newTestServer(nil)
			served := make(chan error, 1)
			go func() { served <- ts.ServeConn(context.Background(), b) }()
			if err := a.Send(ctxFor(t), g); err != nil {
				t.Fatal(err)
			}
			if err := <-served; !errors.Is(err, errFrame) {
				t.Error("ServeConn:", err)
			}
			<-a.Done()
			if err := a.Err(); err == nil || !strings.Contains(err.Error(), "malformed frame") {
				t.Errorf("the peer sees %v", err)
			}
			_ = ts.Close()
		})
	}
	t.Run("immediate value", func(t *testing.T) {
		a, b := transporttest.Pair(t, nil)
		ts := newTestServer(nil)
		served := make(chan error, 1)
		go func() { served <- ts.ServeConn(context.Background(), b) }()
		m, err := mr.Alloc(b.PD(), 4096, bulkAll)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		src, err := mr.Alloc(a.PD(), 4096, bulkAll)
		if err != nil {
			t.Fatal(err)
		}
		defer src.Close()
		_ = a.WriteImm(ctxFor(t), src.SGE(0, 8), m.Remote(), 0, 7)
		if err := <-served; !errors.Is(err, errFrame) {
			t.Error("ServeConn:", err)
		}
		_ = ts.Close()
	})
}
