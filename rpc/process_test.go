package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Two processes. The child serves; it is killed in the middle of calls.

func init() {
	testutil.RegisterChild("rpc-server", func(args []string) {
		l, err := transport.Listen(context.Background(), "127.0.0.1:0", &transport.Config{Device: transporttest.Device})
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		ts := newTestServer(nil)
		addBulkMethods(nil, ts)
		go func() { _ = ts.Serve(context.Background(), l) }()
		fmt.Println("addr", l.Addr())
		go func() {
			for range ts.entered {
				fmt.Println("entered")
			}
		}()
		for range testutil.ChildInput() {
		}
	})
}

// fillX fills a region with what the method mHold expects to read for as long as it runs.
func fillX(m *mr.MR) {
	for i := range m.Bytes() {
		m.Bytes()[i] = 'x'
	}
}

// A client that is killed, in the middle of calls and of a transfer from its memory.
func init() {
	testutil.RegisterChild("rpc-client", func(args []string) {
		ctx := context.Background()
		cl, err := Dial(ctx, args[0], &transport.Config{Device: transporttest.Device}, nil)
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		m, err := mr.Alloc(cl.Conn().PD(), 64<<10, bulkAll)
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fillX(m)
		copy(m.Bytes(), bytes.Repeat([]byte("x"), m.Len()))
		for range 5 {
			go func() { _ = cl.CallRaw(ctx, mBlock, pattern(700), nil) }()
		}
		go func() {
			_ = cl.CallBulk(ctx, mHold, nil, []Bulk{{MR: m, Len: m.Len(), Access: ib.AccessRemoteRead}}, nil)
		}()
		go func() {
			for echo(ctx, cl, mEcho, pattern(64)) == nil {
			}
		}()
		for range testutil.ChildInput() {
		}
	})
}

func TestClientKilled(t *testing.T) {
	testutil.CheckLeaks(t)
	ctx := ctxFor(t)
	l, err := transport.Listen(ctx, "127.0.0.1:0", &transport.Config{Device: transporttest.Device})
	if err != nil {
		t.Fatal(err)
	}
	reasons := make(chan error, 1)
	ts := newTestServer(&ServerConfig{OnConnClosed: func(_ *transport.Conn, err error) { reasons <- err }})
	addBulkMethods(t, ts)
	var wg sync.WaitGroup
	wg.Go(func() { _ = ts.Serve(context.Background(), l) })
	child := testutil.StartChild(t, "rpc-client", l.Addr().String())
	for range 6 {
		<-ts.entered
	}
	start := time.Now()
	child.Kill()
	for range 5 {
		if err := <-ts.ended; err != context.Canceled {
			t.Error("handler's context:", err)
		}
	}
	testutil.Eventually(t, "no call is active", func() bool { return ts.active.Load() == 0 && len(ts.snapshotConns()) == 0 })
	t.Logf("all handlers had ended %v after the kill", time.Since(start))
	if err := <-reasons; !errors.Is(err, transport.ErrPeerDied) {
		t.Error("the connection ended because of", err)
	}
	_ = ts.Close()
	wg.Wait()
}

func TestServerKilled(t *testing.T) {
	testutil.CheckLeaks(t)
	child := testutil.StartChild(t, "rpc-server")
	ctx := ctxFor(t)
	cl, err := Dial(ctx, child.Expect("addr"), &transport.Config{Device: transporttest.Device}, nil)
	if err != nil {
		testutil.SkipIfUnsupported(t, err)
		t.Fatal(err)
	}
	defer cl.Close()
	for i := range 100 {
		if err := echo(ctx, cl, []Method{mEcho, mEchoSlow}[i%2], pattern(i*100)); err != nil {
			t.Fatal(err)
		}
	}
	m, err := mr.Alloc(cl.Conn().PD(), 64<<10, bulkAll)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	fillX(m)
	results := make(chan error, 20)
	for i := range 20 {
		go func() {
			if i == 0 {
				results <- cl.CallBulk(ctx, mHold, nil, []Bulk{{MR: m, Len: m.Len(), Access: ib.AccessRemoteRead}}, nil)
				return
			}
			if i%2 == 0 {
				results <- cl.CallRaw(ctx, mBlock, pattern(700), nil)
				return
			}
			for { // busy when it happens
				if err := echo(ctx, cl, mEcho, pattern(64)); err != nil {
					results <- err
					return
				}
			}
		}()
	}
	for range 10 {
		child.Expect("entered")
	}
	start := time.Now()
	child.Kill()
	for range 20 {
		wantCode(t, <-results, Unavailable)
	}
	t.Logf("all calls had ended %v after the kill", time.Since(start))
	wantCode(t, echo(ctx, cl, mEcho, nil), Unavailable)
}

func TestTwoProcesses(t *testing.T) {
	testutil.CheckLeaks(t)
	child := testutil.StartChild(t, "rpc-server")
	ctx := ctxFor(t)
	cl, err := Dial(ctx, child.Expect("addr"), &transport.Config{Device: transporttest.Device}, nil)
	if err != nil {
		testutil.SkipIfUnsupported(t, err)
		t.Fatal(err)
	}
	defer cl.Close()
	t.Log("path:", cl.Conn().Path())
	q, err := cl.NewQueue(64)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	n := 0
	collect := func(tag uint64, resp []byte, err error) {
		n++
		if err != nil || !bytes.Equal(resp, pattern(int(tag)%500)) {
			t.Error(tag, len(resp), err)
		}
	}
	for tag := range uint64(5000) {
		if q.Len() == q.Depth() {
			if _, err := q.Wait(ctx, collect); err != nil {
				t.Fatal(err)
			}
		}
		if err := q.Start(ctx, mEcho, pattern(int(tag)%500), tag); err != nil {
			t.Fatal(err)
		}
	}
	for q.Len() > 0 {
		if _, err := q.Wait(ctx, collect); err != nil {
			t.Fatal(err)
		}
	}
	if n != 5000 {
		t.Errorf("%d results", n)
	}
}
