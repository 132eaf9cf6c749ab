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
		if free := countFree(r.cl); free != r.cl.nslots {
			t.Errorf("%d slots of %d are free", free, r.cl.nslots)
		}
	})
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
		if free := countFree(r.cl); free != r.cl.nslots {
			t.Errorf("%d slots of %d are free", free, r.cl.nslots)
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
		// It passes while the handler runs: the client sees it, and the handler's context ends with it. On a busy machine it can pass
		// before the handler does.
		for d := 20 * time.Millisecond; len(r.ts.entered) == 0; d *= 2 {
			if d > testutil.Patience {
				t.Fatalf("no handler began within %v", d/2)
			}
			short, cancel := context.WithTimeout(ctx, d)
			defer cancel()
			err := r.cl.CallRaw(short, mBlock, []byte("x"), nil)
			wantCode(t, err, DeadlineExceeded)
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Error("is not context.DeadlineExceeded:", err)
			}
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
		bare, ran := context.Background(), 0
		// The first blocks the only worker until its deadline, unless that has passed before, on a busy machine; the second waits for
		// the worker past its own.
		for q.Timeout = 30 * time.Millisecond; len(r.ts.entered) == 0; q.Timeout *= 2 {
			if q.Timeout > testutil.Patience {
				t.Fatalf("no handler began within %v", q.Timeout/2)
			}
			for tag := range uint64(2) {
				if err := q.Start(bare, mBlock, []byte("x"), tag); err != nil {
					t.Fatal(err)
				}
			}
			for q.Len() > 0 {
				if _, err := q.Wait(ctx, func(tag uint64, resp []byte, err error) {
					wantCode(t, err, DeadlineExceeded)
					var e *Error
					if errors.As(err, &e) && !e.NotExecuted {
						ran++
					}
				}); err != nil {
					t.Fatal(err)
				}
			}
			if n := len(r.ts.entered); ran > n {
				t.Errorf("%d calls ran, and %d are not flagged as not executed", n, ran)
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
	onEach(t, &ServerConfig{MaxConcurrent: 8, MaxQueue: 8192}, &ClientConfig{MaxInFlight: 24}, func(t *testing.T, r *rig) {
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
		if free := countFree(r.cl); free != r.cl.nslots {
			t.Errorf("%d slots of %d are free", free, r.cl.nslots)
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

// Without a queue, what finds no free worker is refused.
func TestNoQueue(t *testing.T) {
	onEach(t, &ServerConfig{MaxConcurrent: 2, MaxQueue: -1}, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		results := make(chan error, 2)
		for range 2 {
			go func() { results <- echo(ctx, r.cl, mBlock, pattern(500)) }()
			<-r.ts.entered
		}
		for range 5 {
			wantCode(t, echo(ctx, r.cl, mEchoSlow, nil), ResourceExhausted)
		}
		close(r.ts.release)
		for range 2 {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
		if err := echo(ctx, r.cl, mEchoSlow, nil); err != nil {
			t.Error("both have their answers:", err)
		}
	})
}

// Whoever has an answer finds a place for the next request, whatever the answer was.
func TestAnsweredCallLeavesItsPlace(t *testing.T) {
	onEach(t, &ServerConfig{MaxConcurrent: 1, MaxQueue: -1}, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		n := 3000
		if testing.Short() {
			n = 500
		}
		for i := range n {
			if err := echo(ctx, r.cl, mEchoSlow, pattern(i%300)); err != nil {
				t.Fatalf("call %d: %v", i, err)
			}
			switch i % 8 {
			case 3:
				wantCode(t, r.cl.CallRaw(ctx, mFail, nil, nil), NotFound)
			case 7:
				wantCode(t, r.cl.CallRaw(ctx, mGoexit, nil, nil), Internal)
			}
		}
	})
}

// Requests that must be copied share a budget of memory.
func TestQueueBytes(t *testing.T) {
	onEach(t, &ServerConfig{MaxConcurrent: 1, MaxQueueBytes: 10_000}, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		q, err := r.cl.NewQueue(60) // more than the receive slots that may be held
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		for tag := range uint64(60) {
			if err := q.Start(ctx, mBlock, pattern(1000), tag); err != nil {
				t.Fatal(err)
			}
		}
		refused, answered := 0, 0
		collect := func(_ uint64, resp []byte, err error) {
			if err != nil {
				refused++
				wantCode(t, err, ResourceExhausted)
				return
			}
			answered++
			if !bytes.Equal(resp, pattern(1000)) {
				t.Error("wrong response")
			}
		}
		held := max(r.cl.link.recvDepth()/4, 1)
		for refused < 60-held-10 {
			if _, err := q.Wait(ctx, collect); err != nil {
				t.Fatal(err)
			}
		}
		close(r.ts.release)
		for q.Len() > 0 {
			if _, err := q.Wait(ctx, collect); err != nil {
				t.Fatal(err)
			}
		}
		if answered != held+10 {
			t.Errorf("%d calls were answered, want %d with held slots and 10 copied", answered, held)
		}
		testutil.Eventually(t, "the memory is given back", func() bool { return r.ts.copied.Load() == 0 })
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

// A handler that does not care for its context delays Close, and not Shutdown.
func TestShutdownWithStuckHandler(t *testing.T) {
	onEach(t, nil, nil, func(t *testing.T, r *rig) {
		ctx := ctxFor(t)
		stuck := make(chan struct{})
		r.ts.HandleRaw(Spec{Number: 300}, func(c *Call, req []byte) error {
			r.ts.entered <- struct{}{}
			<-stuck
			return nil
		})
		result := make(chan error, 1)
		go func() { result <- r.cl.CallRaw(ctx, 300, pattern(500), nil) }()
		<-r.ts.entered
		short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
		defer cancel()
		if err := r.ts.Shutdown(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Error("Shutdown:", err)
		}
		wantCode(t, <-result, Unavailable)
		closed := make(chan struct{})
		go func() {
			_ = r.ts.Close()
			close(closed)
		}()
		select {
		case <-closed:
			t.Error("Close did not wait for the handler")
		case <-time.After(10 * time.Millisecond):
		}
		close(stuck)
		<-closed
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
		if free := countFree(r.cl); free != r.cl.nslots {
			t.Errorf("%d slots of %d are free", free, r.cl.nslots)
		}
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
