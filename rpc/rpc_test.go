package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// Methods of the test server.
const (
	mEcho      Method = 1 // inline
	mEchoSlow  Method = 2 // the same on a worker
	mBlock     Method = 3 // waits for its context, or for release
	mPanic     Method = 4
	mPanicHere Method = 5 // inline
	mFail      Method = 6
	mNothing   Method = 7 // no Reply
	mDeadline  Method = 8 // answers with the time left
	mGoexit    Method = 9
	mBig       Method = 10 // answers with as many bytes as it is asked for
	mShrink    Method = 11
	mTwice     Method = 12 // Reply twice
	mFailLate  Method = 13 // an error after a Reply
	mEvil      Method = 14 // an error with code OK
)

// testServer is a server with the test methods.
type testServer struct {
	*Server
	release chan struct{} // ends mBlock calls
	entered chan struct{} // one for each mBlock call that runs
	ended   chan error    // why the context of a mBlock call ended
	panics  atomic.Int32
}

func newTestServer(cfg *ServerConfig) *testServer {
	ts := &testServer{release: make(chan struct{}), entered: make(chan struct{}, 10000), ended: make(chan error, 10000)}
	var c ServerConfig
	if cfg != nil {
		c = *cfg
	}
	if c.OnPanic == nil {
		c.OnPanic = func(p PanicInfo) {
			if len(p.Stack) != 0 {
				ts.panics.Add(1)
			}
		}
	}
	s := NewServer(&c)
	ts.Server = s
	echo := func(c *Call, req []byte) error {
		b, err := c.Reply(len(req))
		if err != nil {
			return err
		}
		copy(b, req)
		return nil
	}
	s.HandleRaw(Spec{Number: mEcho, Inline: true}, echo)
	s.HandleRaw(Spec{Number: mEchoSlow, Name: "test/Echo"}, echo)
	s.HandleRaw(Spec{Number: mBlock, Name: "test/Block"}, func(c *Call, req []byte) error {
		copied := append([]byte(nil), req...)
		ctx := c.Context()
		ts.entered <- struct{}{}
		select {
		case <-ctx.Done():
			ts.ended <- ctx.Err()
			if !bytes.Equal(copied, req) {
				return Errorf(DataLoss, "the request changed while the handler had it: % x, was % x", req, copied)
			}
			return ctx.Err()
		case <-ts.release:
			return c.ReplyBytes(req)
		}
	})
	s.HandleRaw(Spec{Number: mPanic}, func(c *Call, req []byte) error {
		_, _ = c.Reply(10)
		panic("secret")
	})
	s.HandleRaw(Spec{Number: mPanicHere, Inline: true}, func(c *Call, req []byte) error {
		_, _ = c.Reply(10)
		var m map[string]int
		m["x"] = 1
		return nil
	})
	s.HandleRaw(Spec{Number: mFail}, func(c *Call, req []byte) error {
		e, err := Errorf(NotFound, "no %q", req).WithDetails(durationpb.New(time.Minute))
		if err != nil {
			return err
		}
		return fmt.Errorf("wrapped: %w", e)
	})
	s.HandleRaw(Spec{Number: mNothing}, func(*Call, []byte) error { return nil })
	s.HandleRaw(Spec{Number: mDeadline}, func(c *Call, req []byte) error {
		d, ok := c.Deadline()
		if d2, ok2 := c.Context().Deadline(); ok != ok2 || !d.Equal(d2) {
			return Errorf(Internal, "the context has deadline %v", d2)
		}
		if !ok {
			return c.ReplyBytes([]byte("none"))
		}
		return c.ReplyBytes([]byte(time.Until(d).String()))
	})
	s.HandleRaw(Spec{Number: mGoexit}, func(c *Call, req []byte) error {
		(&testing.T{}).SkipNow() // calls runtime.Goexit
		return nil
	})
	s.HandleRaw(Spec{Number: mBig}, func(c *Call, req []byte) error {
		b, err := c.Reply(int(getUint32(req)))
		if err != nil {
			return err
		}
		for i := range b {
			b[i] = byte(i)
		}
		return nil
	})
	s.HandleRaw(Spec{Number: mShrink, Inline: true}, func(c *Call, req []byte) error {
		b, err := c.Reply(2 * len(req))
		if err != nil {
			return err
		}
		c.Shrink(copy(b, req))
		return nil
	})
	s.HandleRaw(Spec{Number: mTwice, Inline: true}, func(c *Call, req []byte) error {
		if err := c.ReplyBytes([]byte("first, and longer")); err != nil {
			return err
		}
		return c.ReplyBytes([]byte("second"))
	})
	s.HandleRaw(Spec{Number: mFailLate, Inline: true}, func(c *Call, req []byte) error {
		if err := c.ReplyBytes(req); err != nil {
			return err
		}
		return Errorf(Aborted, "changed my mind")
	})
	s.HandleRaw(Spec{Number: mEvil}, func(c *Call, req []byte) error { return &Error{Code: OK, Message: "not really"} })
	Handle(s, "test.Strings/Upper", func(ctx context.Context, req *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
		if req.Value == "" {
			return nil, Errorf(InvalidArgument, "empty")
		}
		return wrapperspb.String(strings.ToUpper(req.Value)), nil
	})
	Handle(s, "test.Strings/Nil", func(ctx context.Context, req *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
		return nil, nil
	})
	HandleSpec(s, Spec{Number: 100, Name: "test.Struct/Echo", Inline: true}, func(ctx context.Context, req *structpb.Struct) (*structpb.Struct, error) {
		return req, nil
	})
	HandleReuse(s, Spec{Number: 101, Inline: true}, func(ctx context.Context, req, resp *wrapperspb.Int64Value) error {
		if resp.Value != 0 {
			return Errorf(Internal, "the response is not empty")
		}
		resp.Value = req.Value + 1
		return nil
	})
	return ts
}

// A rig is a client and a server that are connected.
type rig struct {
	ts     *testServer
	cl     *Client
	cutOff func() // ends the connection as if the server had died
}

// onEach runs a test over every kind of link.
func onEach(t *testing.T, scfg *ServerConfig, ccfg *ClientConfig, f func(t *testing.T, r *rig)) {
	t.Helper()
	for _, kind := range rigKinds {
		t.Run(kind.name, func(t *testing.T) {
			testutil.CheckLeaks(t)
			f(t, kind.make(t, scfg, ccfg))
		})
	}
}

type rigKind struct {
	name string
	make func(t testing.TB, scfg *ServerConfig, ccfg *ClientConfig) *rig
}

var rigKinds = []rigKind{{"fake", fakeRig}}

const fakeMax = 64 << 10

func fakeRig(t testing.TB, scfg *ServerConfig, ccfg *ClientConfig) *rig {
	a, b := newFakePair(t, 32, fakeMax)
	ts := newTestServer(scfg)
	if _, err := ts.attach(b, nil); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(b.drive)
	wg.Go(a.drive)
	cl := newClient(a, nil, ccfg)
	t.Cleanup(func() {
		_ = cl.Close()
		_ = ts.Close()
		wg.Wait()
	})
	return &rig{ts: ts, cl: cl, cutOff: func() { b.abort(nil) }}
}

func ctxFor(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), testutil.Patience)
	t.Cleanup(cancel)
	return ctx
}

// echo calls m and checks that the response is the request.
func echo(ctx context.Context, cl *Client, m Method, req []byte) error {
	return cl.CallRaw(ctx, m, req, func(resp []byte) error {
		if !bytes.Equal(resp, req) {
			return fmt.Errorf("echo of %d bytes returned %d others", len(req), len(resp))
		}
		return nil
	})
}

func wantCode(t testing.TB, err error, code Code) {
	t.Helper()
	if CodeOf(err) != code || !errors.Is(err, code) {
		t.Helper()
		t.Errorf("error %v, want code %v", err, code)
	}
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + n)
	}
	return b
}

func TestRawCalls(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		for _, m := range []Method{mEcho, mEchoSlow, mShrink} {
			for _, n := range []int{0, 1, 64, smallBody, smallBody + 1, 5000, 9000} {
				if err := echo(ctx, r.cl, m, pattern(n)); err != nil {
					t.Fatalf("method %v, %d bytes: %v", m, n, err)
				}
			}
		}
		for m, want := range map[Method]string{mNothing: "", mTwice: "second"} {
			if err := r.cl.CallRaw(ctx, m, nil, func(resp []byte) error {
				if string(resp) != want {
					t.Errorf("method %v: %q", m, resp)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
		}
		if err := r.cl.CallRaw(ctx, mEcho, pattern(10), nil); err != nil {
			t.Error("without a function for the response:", err)
		}
		mine := errors.New("mine")
		if err := r.cl.CallRaw(ctx, mEcho, nil, func([]byte) error { return mine }); err != mine {
			t.Error("error of the function:", err)
		}
	})
}

func TestCallFunc(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		for _, n := range []int{0, 100, 20000} {
			want := pattern(n)
			err := r.cl.CallFunc(ctx, mEchoSlow, n, func(b []byte) error {
				if len(b) != n || cap(b) != n {
					t.Errorf("%d bytes, capacity %d, want %d", len(b), cap(b), n)
				}
				copy(b, want)
				return nil
			}, func(resp []byte) error {
				if !bytes.Equal(resp, want) {
					t.Error("wrong response")
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		mine := errors.New("mine")
		if err := r.cl.CallFunc(ctx, mEcho, 10, func([]byte) error { return mine }, nil); err != mine {
			t.Error(err)
		}
		func() {
			defer func() { _ = recover() }()
			_ = r.cl.CallFunc(ctx, mEcho, 10, func([]byte) error { panic("x") }, nil)
		}()
		if err := echo(ctx, r.cl, mEcho, pattern(3)); err != nil {
			t.Error(err)
		}
		if free := countFree(r.cl); free != len(r.cl.slots) {
			t.Errorf("%d slots of %d are free", free, len(r.cl.slots))
		}
	})
}

// countFree returns the number of free slots; no call may be in flight.
func countFree(c *Client) int {
	n := 0
	if c.hot.Load() != 0 {
		n++
	}
	for i := uint32(c.free.Load()); i != 0; i = c.slots[i-1].next.Load() {
		n++
	}
	return n
}

func TestStatuses(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		err := r.cl.CallRaw(ctx, mFail, []byte("key"), func([]byte) error { t.Error("called for an error"); return nil })
		wantCode(t, err, NotFound)
		var e *Error
		if !errors.As(err, &e) || e.Message != `no "key"` || len(e.Details) != 1 || e.NotExecuted {
			t.Fatalf("%+v", e)
		}
		if d, err := e.Details[0].UnmarshalNew(); err != nil || !proto.Equal(d, durationpb.New(time.Minute)) {
			t.Fatal(d, err)
		}
		wantCode(t, echo(ctx, r.cl, mFailLate, []byte("x")), Aborted)
		wantCode(t, r.cl.CallRaw(ctx, mEvil, nil, nil), Unknown)
		for _, m := range []Method{0, 99, MaxMethod, MaxMethod + 1, firstNamed - 1, firstNamed + 1000, 1<<32 - 1} {
			err := r.cl.CallRaw(ctx, m, nil, nil)
			wantCode(t, err, Unimplemented)
			if !errors.As(err, &e) || !e.NotExecuted {
				t.Errorf("method %v: %v", m, err)
			}
		}
	})
}

func TestNamesAndTypedCalls(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		m, err := r.cl.Method(ctx, "test/Echo")
		if err != nil || m != mEchoSlow {
			t.Fatal(m, err)
		}
		m, err = r.cl.Method(ctx, "test.Strings/Upper")
		if err != nil || m < firstNamed {
			t.Fatal(m, err)
		}
		again, err := r.cl.Method(ctx, "test.Strings/Upper")
		if err != nil || again != m {
			t.Fatal(again, err)
		}
		_, err = r.cl.Method(ctx, "no/such")
		wantCode(t, err, Unimplemented)
		_, err = r.cl.Method(ctx, "")
		wantCode(t, err, InvalidArgument)
		_, err = r.cl.Method(ctx, strings.Repeat("n", 300))
		wantCode(t, err, InvalidArgument)

		resp, err := Invoke[*wrapperspb.StringValue](ctx, r.cl, "test.Strings/Upper", wrapperspb.String("hello"))
		if err != nil || resp.Value != "HELLO" {
			t.Fatal(resp, err)
		}
		_, err = Invoke[*wrapperspb.StringValue](ctx, r.cl, "test.Strings/Upper", wrapperspb.String(""))
		wantCode(t, err, InvalidArgument)
		resp, err = Invoke[*wrapperspb.StringValue](ctx, r.cl, "test.Strings/Nil", wrapperspb.String("x"))
		if err != nil || resp.Value != "" {
			t.Fatal(resp, err)
		}
		in, _ := structpb.NewStruct(map[string]any{"a": 1, "b": []any{"c", true, nil}})
		out := new(structpb.Struct)
		if err := r.cl.Call(ctx, "test.Struct/Echo", in, out); err != nil || !proto.Equal(in, out) {
			t.Fatal(out, err)
		}
		if err := r.cl.CallMethod(ctx, 100, in, nil); err != nil {
			t.Fatal(err)
		}
		for i := range int64(10) {
			out := new(wrapperspb.Int64Value)
			if err := r.cl.CallMethod(ctx, 101, wrapperspb.Int64(i), out); err != nil || out.Value != i+1 {
				t.Fatal(out, err)
			}
		}
		// Bytes that are no message.
		wantCode(t, r.cl.CallRaw(ctx, m, []byte{0xff, 0xff}, nil), InvalidArgument)
		wantCode(t, r.cl.CallRaw(ctx, 101, []byte{0xff, 0xff}, nil), InvalidArgument)
		wantCode(t, r.cl.CallMethod(ctx, mTwice, wrapperspb.String("x"), new(wrapperspb.StringValue)), Internal)
		// A message that cannot be marshalled.
		wantCode(t, r.cl.CallMethod(ctx, m, &wrapperspb.StringValue{Value: "\xff"}, nil), Internal)
		if free := countFree(r.cl); free != len(r.cl.slots) {
			t.Errorf("%d slots of %d are free", free, len(r.cl.slots))
		}
	})
}

func TestPanicsAreContained(t *testing.T) {
	onEach(t, &ServerConfig{MaxConcurrent: 2}, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		for i := range 5 {
			for _, m := range []Method{mPanic, mPanicHere, mGoexit} {
				err := r.cl.CallRaw(ctx, m, nil, nil)
				wantCode(t, err, Internal)
				if strings.Contains(err.Error(), "secret") {
					t.Error("the panic's value was sent to the client")
				}
			}
			if err := echo(ctx, r.cl, mEchoSlow, pattern(i)); err != nil {
				t.Fatal(err)
			}
		}
		if n := r.ts.panics.Load(); n != 15 {
			t.Errorf("%d panics were reported, want 15", n)
		}
	})
	t.Run("hook that panics", func(t *testing.T) {
		r := fakeRig(t, &ServerConfig{OnPanic: func(PanicInfo) { panic("again") }}, nil)
		wantCode(t, r.cl.CallRaw(ctxFor(t), mPanic, nil, nil), Internal)
	})
}

func TestDeadlines(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		if err := r.cl.CallRaw(context.Background(), mDeadline, nil, func(b []byte) error {
			if string(b) != "none" {
				t.Errorf("deadline %s without one", b)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		hour, cancel := context.WithTimeout(ctx, time.Hour) // ctx has an earlier one
		defer cancel()
		if err := r.cl.CallRaw(hour, mDeadline, nil, func(b []byte) error {
			d, err := time.ParseDuration(string(b))
			if err != nil || d <= 0 || d > testutil.Patience {
				t.Errorf("deadline in %s", b)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		// It passes while the handler runs: the client sees it, and the handler's context ends with it.
		short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
		defer cancel()
		err := r.cl.CallRaw(short, mBlock, []byte("x"), nil)
		wantCode(t, err, DeadlineExceeded)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error("is not context.DeadlineExceeded:", err)
		}
		if err := <-r.ts.ended; !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) {
			t.Error("handler's context:", err)
		}
		// It has passed before the call.
		past, cancel := context.WithDeadline(ctx, time.Now().Add(-time.Second))
		defer cancel()
		wantCode(t, r.cl.CallRaw(past, mEcho, nil, nil), DeadlineExceeded)
		if err := echo(ctx, r.cl, mEcho, pattern(9)); err != nil {
			t.Fatal(err)
		}
	})
}

// The server keeps the deadline also when the client does not: a Queue's Timeout only travels.
func TestDeadlineOnTheServer(t *testing.T) {
	onEach(t, &ServerConfig{MaxConcurrent: 1}, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		q, err := r.cl.NewQueue(4)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		q.Timeout = 30 * time.Millisecond
		bare := context.Background()
		// The first blocks the only worker until its deadline; the second waits for the worker past its own.
		for tag := range uint64(2) {
			if err := q.Start(bare, mBlock, []byte("x"), tag); err != nil {
				t.Fatal(err)
			}
		}
		for q.Len() > 0 {
			if _, err := q.Wait(ctx, func(tag uint64, resp []byte, err error) {
				wantCode(t, err, DeadlineExceeded)
				var e *Error
				if errors.As(err, &e) && tag == 1 && !e.NotExecuted && len(r.ts.entered) < 2 {
					t.Error("the second call did not run, and is not flagged so")
				}
			}); err != nil {
				t.Fatal(err)
			}
		}
		if err := <-r.ts.ended; err != context.DeadlineExceeded {
			t.Error("handler's context:", err)
		}
	})
}

func TestCancel(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx, cancel := context.WithCancel(ctxFor(t))
		done := make(chan error, 1)
		go func() { done <- r.cl.CallRaw(ctx, mBlock, pattern(3000), nil) }()
		<-r.ts.entered
		cancel()
		err := <-done
		wantCode(t, err, Canceled)
		if !errors.Is(err, context.Canceled) {
			t.Error("is not context.Canceled:", err)
		}
		if err := <-r.ts.ended; err != context.Canceled {
			t.Error("handler's context:", err)
		}
		wantCode(t, r.cl.CallRaw(ctx, mEcho, nil, nil), Canceled)
		if err := echo(ctxFor(t), r.cl, mEcho, pattern(9)); err != nil {
			t.Fatal(err)
		}
	})
}

// Calls that are given up at every possible moment: no response reaches another call, no buffer is used after its loan,
// no slot is lost.
func TestCancelStorm(t *testing.T) {
	onEach(t, &ServerConfig{MaxConcurrent: 8}, &ClientConfig{MaxInFlight: 24}, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		rounds := 150
		if testing.Short() {
			rounds = 30
		}
		var wg sync.WaitGroup
		var completed, canceled atomic.Int64
		for g := range 32 {
			wg.Go(func() {
				for i := range rounds {
					c, cancel := context.WithCancel(ctx)
					m := []Method{mEcho, mEchoSlow, mBlock}[(g+i)%3]
					req := append(pattern((g*37+i*11)%1500), byte(g), byte(i), byte(i>>8))
					delay := time.Duration((g*13+i*7)%400) * time.Microsecond
					timer := time.AfterFunc(delay, cancel)
					err := echo(c, r.cl, m, req)
					timer.Stop()
					cancel()
					switch CodeOf(err) {
					case OK:
						completed.Add(1)
					case Canceled:
						canceled.Add(1)
					default:
						t.Errorf("goroutine %d, call %d: %v", g, i, err)
						return
					}
				}
			})
		}
		wg.Wait()
		t.Logf("%d completed, %d canceled", completed.Load(), canceled.Load())
		for i := range 50 {
			if err := echo(ctx, r.cl, mEchoSlow, pattern(i*20)); err != nil {
				t.Fatal(err)
			}
		}
		if free := countFree(r.cl); free != len(r.cl.slots) {
			t.Errorf("%d slots of %d are free", free, len(r.cl.slots))
		}
		testutil.Eventually(t, "no call is active on the server", func() bool { return r.ts.active.Load() == 0 })
	})
}

func TestConcurrentCalls(t *testing.T) {
	onEach(t, nil, &ClientConfig{MaxInFlight: 50}, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		var wg sync.WaitGroup
		for g := range 64 { // more than can be in flight
			wg.Go(func() {
				for i := range 50 {
					m := []Method{mEcho, mEchoSlow}[i%2]
					if err := echo(ctx, r.cl, m, append(pattern((g*31+i)%3000), byte(g), byte(i))); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
	})
}

func TestQueue(t *testing.T) {
	onEach(t, nil, &ClientConfig{MaxInFlight: 100}, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		q, err := r.cl.NewQueue(64)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.cl.NewQueue(64); CodeOf(err) != ResourceExhausted {
			t.Error("a second queue beyond MaxInFlight:", err)
		}
		if _, err := r.cl.NewQueue(0); CodeOf(err) != InvalidArgument {
			t.Error("an empty queue:", err)
		}
		if n, err := q.Wait(ctx, nil); n != 0 || err != nil {
			t.Error("waiting for nothing:", n, err)
		}
		seen := make(map[uint64]bool)
		collect := func(tag uint64, resp []byte, err error) {
			if err != nil || seen[tag] || !bytes.Equal(resp, pattern(int(tag)%700)) {
				t.Errorf("result of call %d: %d bytes, %v, seen before: %v", tag, len(resp), err, seen[tag])
			}
			seen[tag] = true
		}
		const calls = 2000
		for tag := range uint64(calls) {
			for q.Len() == q.Depth() {
				if tag%2 == 0 {
					q.TryWait(collect)
				} else if _, err := q.Wait(ctx, collect); err != nil {
					t.Fatal(err)
				}
			}
			m := []Method{mEcho, mEchoSlow}[tag%3%2]
			if err := q.Start(ctx, m, pattern(int(tag)%700), tag); err != nil {
				t.Fatal(err)
			}
		}
		for q.Len() > 0 {
			if n, err := q.Wait(ctx, collect); err != nil || n == 0 {
				t.Fatal(n, err)
			}
		}
		if len(seen) != calls {
			t.Errorf("%d results, want %d", len(seen), calls)
		}
		for range q.Depth() {
			if err := q.Start(ctx, mBlock, nil, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := q.Start(ctx, mEcho, nil, 0); err != ErrQueueFull {
			t.Error("beyond the depth:", err)
		}
		short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
		defer cancel()
		if n, err := q.Wait(short, collect); n != 0 || CodeOf(err) != DeadlineExceeded {
			t.Error("waiting past the context:", n, err)
		}
		// A blocking call beside a full queue.
		if err := echo(ctx, r.cl, mEcho, pattern(5000)); err != nil {
			t.Error(err)
		}
		_ = q.Close()
		_ = q.Close()
		if err := q.Start(ctx, mEcho, nil, 0); CodeOf(err) != FailedPrecondition {
			t.Error("after Close:", err)
		}
		if free := countFree(r.cl); free != len(r.cl.slots) {
			t.Errorf("%d slots of %d are free", free, len(r.cl.slots))
		}
	})
}

func TestQueueMessagesAndErrors(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		q, err := r.cl.NewQueue(8)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		if err := q.StartMessage(ctx, 101, wrapperspb.Int64(41), 1); err != nil {
			t.Fatal(err)
		}
		if err := q.Start(ctx, mFail, []byte("k"), 2); err != nil {
			t.Fatal(err)
		}
		if err := q.Start(ctx, mPanic, nil, 3); err != nil {
			t.Fatal(err)
		}
		mine := errors.New("mine")
		if err := q.StartFunc(ctx, mEcho, 5, func([]byte) error { return mine }, 4); err != mine {
			t.Fatal(err)
		}
		for q.Len() > 0 {
			if _, err := q.Wait(ctx, func(tag uint64, resp []byte, err error) {
				switch tag {
				case 1:
					out := new(wrapperspb.Int64Value)
					if err != nil || proto.Unmarshal(resp, out) != nil || out.Value != 42 {
						t.Error(out, err)
					}
				case 2:
					wantCode(t, err, NotFound)
				case 3:
					wantCode(t, err, Internal)
				default:
					t.Error("tag", tag)
				}
			}); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// A Queue whose results nobody collects does not keep others from theirs.
func TestIdleQueueDoesNotBlockCalls(t *testing.T) {
	onEach(t, nil, &ClientConfig{MaxInFlight: 200}, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		q, err := r.cl.NewQueue(150)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		for tag := range uint64(150) {
			if err := q.Start(ctx, mEchoSlow, pattern(300), tag); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 100 {
			if err := echo(ctx, r.cl, mEchoSlow, pattern(300+i)); err != nil {
				t.Fatal(err)
			}
		}
		n := 0
		for q.Len() > 0 {
			if _, err := q.Wait(ctx, func(_ uint64, resp []byte, err error) {
				n++
				if err != nil || !bytes.Equal(resp, pattern(300)) {
					t.Error(len(resp), err)
				}
			}); err != nil {
				t.Fatal(err)
			}
		}
		if n != 150 {
			t.Errorf("%d results", n)
		}
	})
}

func TestLimits(t *testing.T) {
	onEach(t, &ServerConfig{MaxConcurrent: 2, MaxQueue: 3}, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		// Over the maximum, in either direction.
		most := r.cl.maxMessage - headerLen
		err := r.cl.CallRaw(ctx, mEcho, make([]byte, most+1), nil)
		wantCode(t, err, ResourceExhausted)
		if err == nil || !strings.Contains(err.Error(), fmt.Sprint(most)) {
			t.Errorf("the error does not name the limit: %v", err)
		}
		var req [4]byte
		putUint32(req[:], uint32(most+1))
		wantCode(t, r.cl.CallRaw(ctx, mBig, req[:], nil), ResourceExhausted)
		if most < 1<<20 {
			putUint32(req[:], uint32(most))
			if err := r.cl.CallRaw(ctx, mBig, req[:], func(b []byte) error {
				if len(b) != most || b[most-1] != byte(most-1) {
					t.Error("largest response:", len(b))
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
			if err := echo(ctx, r.cl, mEcho, pattern(most)); err != nil {
				t.Error(err)
			}
		}

		// Two run, three wait, the others are refused at once.
		q, err := r.cl.NewQueue(20)
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		for tag := range uint64(20) {
			if err := q.Start(ctx, mBlock, pattern(400), tag); err != nil {
				t.Fatal(err)
			}
		}
		refused, answered := 0, 0
		collect := func(tag uint64, resp []byte, err error) {
			if err == nil {
				answered++
				if !bytes.Equal(resp, pattern(400)) {
					t.Error("wrong response")
				}
				return
			}
			refused++
			wantCode(t, err, ResourceExhausted)
			var e *Error
			if !errors.As(err, &e) || !e.NotExecuted {
				t.Error(err)
			}
		}
		for q.Len() > 5 {
			if _, err := q.Wait(ctx, collect); err != nil {
				t.Fatal(err)
			}
		}
		// Inline methods are not held up.
		if err := echo(ctx, r.cl, mEcho, pattern(99)); err != nil {
			t.Error(err)
		}
		close(r.ts.release)
		for q.Len() > 0 {
			if _, err := q.Wait(ctx, collect); err != nil {
				t.Fatal(err)
			}
		}
		if refused != 15 || answered != 5 {
			t.Errorf("%d calls were refused and %d answered, want 15 and 5", refused, answered)
		}
	})
}

func TestShutdown(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		results := make(chan error, 10)
		for range 10 {
			go func() { results <- echo(ctx, r.cl, mBlock, pattern(500)) }()
		}
		for range 10 {
			<-r.ts.entered
		}
		done := make(chan error, 1)
		go func() { done <- r.ts.Shutdown(ctx) }()
		testutil.Eventually(t, "new calls are refused", func() bool {
			err := echo(ctx, r.cl, mEcho, nil)
			var e *Error
			return errors.Is(err, Unavailable) && errors.As(err, &e) && e.NotExecuted
		})
		select {
		case err := <-done:
			t.Fatal("Shutdown did not wait:", err)
		case <-time.After(20 * time.Millisecond):
		}
		close(r.ts.release)
		for range 10 {
			if err := <-results; err != nil {
				t.Error("call in flight:", err)
			}
		}
		if err := <-done; err != nil {
			t.Error("Shutdown:", err)
		}
		wantCode(t, echo(ctx, r.cl, mEcho, nil), Unavailable)
		if err := r.ts.Shutdown(ctx); err != nil {
			t.Error("second Shutdown:", err)
		}
	})
}

func TestShutdownCutShort(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		result := make(chan error, 1)
		go func() { result <- echo(ctx, r.cl, mBlock, pattern(500)) }()
		<-r.ts.entered
		short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
		defer cancel()
		if err := r.ts.Shutdown(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Error("Shutdown:", err)
		}
		if err := <-result; CodeOf(err) != Unavailable && CodeOf(err) != Canceled {
			t.Error("call in flight:", err)
		}
		if err := <-r.ts.ended; err != context.Canceled {
			t.Error("handler's context:", err)
		}
	})
}

func TestConnectionLost(t *testing.T) {
	onEach(t, nil, &ClientConfig{MaxInFlight: 20}, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		results := make(chan error, 40)
		for range 30 { // some of them wait for a slot
			go func() { results <- echo(ctx, r.cl, mBlock, pattern(500)) }()
		}
		for range 10 {
			<-r.ts.entered
		}
		r.cutOff()
		for range 30 {
			wantCode(t, <-results, Unavailable)
		}
		wantCode(t, echo(ctx, r.cl, mEcho, nil), Unavailable)
		if _, err := r.cl.NewQueue(1); CodeOf(err) != Unavailable {
			t.Error("new queue:", err)
		}
		testutil.Eventually(t, "no call is active on the server", func() bool { return r.ts.active.Load() == 0 })
		if free := countFree(r.cl); free != len(r.cl.slots) {
			t.Errorf("%d slots of %d are free", free, len(r.cl.slots))
		}
	})
}

func TestQueueAtConnectionLoss(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		q, err := r.cl.NewQueue(16)
		if err != nil {
			t.Fatal(err)
		}
		for tag := range uint64(16) {
			if err := q.Start(ctx, mBlock, nil, tag); err != nil {
				t.Fatal(err)
			}
		}
		<-r.ts.entered
		r.cutOff()
		n := 0
		for q.Len() > 0 {
			if _, err := q.Wait(ctx, func(_ uint64, _ []byte, err error) {
				n++
				wantCode(t, err, Unavailable)
			}); err != nil {
				t.Fatal(err)
			}
		}
		if n != 16 {
			t.Errorf("%d results", n)
		}
		wantCode(t, q.Start(ctx, mEcho, nil, 0), Unavailable)
		_ = q.Close()
	})
}

func TestClientClose(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		result := make(chan error, 1)
		go func() { result <- echo(ctx, r.cl, mBlock, pattern(500)) }()
		<-r.ts.entered
		if err := r.cl.Close(); err != nil {
			t.Error(err)
		}
		_ = r.cl.Close()
		err := <-result
		wantCode(t, err, Unavailable)
		if !errors.Is(err, net.ErrClosed) {
			t.Error("is not net.ErrClosed:", err)
		}
		if err := <-r.ts.ended; err != context.Canceled {
			t.Error("handler's context:", err)
		}
		testutil.Eventually(t, "the server has forgotten the connection", func() bool { return len(r.ts.snapshotConns()) == 0 })
	})
}

func TestStats(t *testing.T) {
	onEach(t, &ServerConfig{Metrics: true}, &ClientConfig{Metrics: true}, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		for i := range 10 {
			if err := echo(ctx, r.cl, mEcho, pattern(i)); err != nil {
				t.Fatal(err)
			}
			_ = r.cl.CallRaw(ctx, mFail, nil, nil)
		}
		if _, err := Invoke[*wrapperspb.StringValue](ctx, r.cl, "test.Strings/Upper", wrapperspb.String("x")); err != nil {
			t.Fatal(err)
		}
		testutil.Eventually(t, "the server has counted", func() bool {
			var n uint64
			for _, st := range r.ts.Stats() {
				n += st.Total()
			}
			return n == 21
		})
		for side, stats := range map[string][]MethodStats{"server": r.ts.Stats(), "client": r.cl.Stats()} {
			named := false
			for _, st := range stats {
				named = named || st.Name == "test.Strings/Upper" && st.Calls[OK] == 1
				if st.Method == mEcho && st.Calls[OK] != 10 || st.Method == mFail && st.Calls[NotFound] != 10 {
					t.Errorf("%s: method %v: %v", side, st.Method, st.Calls)
				}
				if st.Total() > 0 && st.Quantile(0.5) <= 0 {
					t.Errorf("%s: method %v: no latency", side, st.Method)
				}
			}
			if !named {
				t.Errorf("%s: the named method was not counted under its name", side)
			}
		}
	})
	if r := fakeRig(t, nil, nil); r.ts.Stats() != nil || r.cl.Stats() != nil {
		t.Error("statistics without Metrics")
	}
}
