package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

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
		_ = req[len(req)]
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

// countFree returns the number of free slots; no call may be in flight.
func countFree(c *Client) int {
	n := 0
	if c.hot.Load() != 0 {
		n++
	}
	for i := uint32(c.free.Load()); i != 0; i = c.slotAt(i - 1).next.Load() {
		n++
	}
	return n
}
