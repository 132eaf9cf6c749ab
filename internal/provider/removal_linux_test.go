package provider_test

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/rpc"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A device is deleted while it is used in every way: whatever waits ends with ErrDeviceRemoved, and so does whatever is
// begun; everything can be closed; and then, as neither driver can take a device away, the deletion is done.
func TestDeviceRemovedInUse(t *testing.T) { forKinds(t, testDeviceRemovedInUse) }

func testDeviceRemovedInUse(t *testing.T, kind string) {
	name := kind + "r"
	c := newDevice(t, kind, name)
	attr := must(c.QueryDevice())
	channel := func() *verbs.CompChannel {
		ch, err := c.NewCompChannel()
		if err != nil {
			t.Fatal(err)
		}
		return ch
	}
	chA, chB, chC := channel(), channel(), channel()
	busy, idle, thread := newRig(t, c, c, nil), newRig(t, c, c, chA), newRig(t, c, c, chB)
	pd, cq := idle.a.pd, idle.a.cq
	srq, err := qp.NewSRQ(busy.a.pd, qp.SRQConfig{})
	if err != nil {
		t.Fatal(err)
	}
	initQP := busy.a.newQP() // requests are refused for its state, but the device's end counts more
	open := []interface{ Close() error }{initQP, srq}
	if attr.Caps.Has(ib.CapMW2) {
		open = append(open, must(mr.NewWindow(pd)))
	}
	if attr.Caps.Has(ib.CapUD) {
		open = append(open, must(pd.NewAH(ib.AHAttr{DGID: must(c.GID(1, c.gid())), SGIDIndex: c.gid(), HopLimit: 1, Port: 1})))
	}

	var wg sync.WaitGroup
	var rounds atomic.Int64
	wg.Go(func() { // traffic, and a busy poller
		wr := busy.write(4096)
		wcs := make([]ib.WC, 16)
		var postErr error
		for {
			if postErr == nil || errors.Is(postErr, verbs.ErrQueueFull) {
				_, postErr = busy.a.q.PostSend([]ib.SendWR{wr})
			}
			n, err := busy.a.cq.Poll(wcs)
			if err != nil {
				isRemoved(t, "Poll in the loop", err)
				if postErr == nil || errors.Is(postErr, verbs.ErrQueueFull) { // Poll was first
					_, postErr = busy.a.q.PostSend([]ib.SendWR{wr})
				}
				isRemoved(t, "PostSend in the loop", postErr)
				return
			}
			for i := range wcs[:n] {
				// siw ends the connection first: the request that it is at fails, and others are flushed.
				if err := verbs.CheckWC("", &wcs[i]); err != nil && kind != "siw" {
					t.Error(err)
				}
			}
			rounds.Add(int64(n))
		}
	})
	for _, r := range []*rig{idle, thread} {
		if err := r.a.cq.Arm(false); err != nil {
			t.Fatal(err)
		}
	}
	var waiting atomic.Int32
	waiter := func(what string, f func() error) {
		wg.Go(func() {
			waiting.Add(1)
			isRemoved(t, what, f())
		})
	}
	for range 2 {
		waiter("Wait", func() error { _, err := chA.Wait(background); return err })
	}
	waiter("WaitThread", func() error { _, err := chB.WaitThread(); return err })
	waiter("Wait on a channel without queues", func() error {
		ctx, cancel := context.WithTimeout(background, time.Hour)
		defer cancel()
		_, err := chC.Wait(ctx)
		return err
	})
	fatal := make(chan struct{})
	accept := func(at netip.Addr) func() error {
		return func() error {
			l, err := qp.Listen(c.Context, netip.AddrPortFrom(at, 0), 0)
			if err != nil {
				return err
			}
			defer l.Close()
			waiting.Add(1)
			_, err = l.Accept(background)
			return err
		}
	}
	if kind == "siw" {
		waiter("Accept", accept(c.addr))
	}
	waiter("Accept from anywhere", accept(netip.IPv4Unspecified()))
	waiter("AsyncEvent", func() error {
		for {
			e, err := c.AsyncEvent(background)
			if err != nil {
				return err
			}
			t.Logf("event: %v", e)
			if e.Type == ib.EventDeviceFatal {
				close(fatal)
			}
		}
	})
	testutil.Eventually(t, "traffic and waiters", func() bool { return rounds.Load() > 100 && waiting.Load() >= 5 })

	removed := make(chan error, 1)
	start := time.Now()
	go func() { removed <- remove(name) }()
	within(t, "a wait", wg.Wait)
	t.Logf("all waits ended after %v, after %d writes", time.Since(start), rounds.Load())
	select {
	case <-fatal:
	default:
		t.Error("no event says that the device has gone")
	}

	wr := idle.write(8)
	recv := []ib.RecvWR{{SGEs: []ib.SGE{idle.a.m.SGE(0, 8)}}}
	calls := map[string]func() error{
		"PostSend":          func() error { _, err := idle.a.q.PostSend([]ib.SendWR{wr}); return err },
		"PostSend in Init":  func() error { _, err := initQP.PostSend([]ib.SendWR{wr}); return err },
		"PostSend of none":  func() error { _, err := idle.a.q.PostSend(nil); return err },
		"PostRecv":          func() error { _, err := idle.a.q.PostRecv(recv); return err },
		"PostRecv to SRQ":   func() error { _, err := srq.PostRecv(recv); return err },
		"SetLimit":          func() error { return srq.SetLimit(1) },
		"Poll":              func() error { _, err := cq.Poll(make([]ib.WC, 1)); return err },
		"Arm":               func() error { return cq.Arm(false) },
		"Arm for solicited": func() error { return cq.Arm(true) },
		"Wait":              func() error { _, err := chA.Wait(background); return err },
		"WaitThread":        func() error { _, err := chA.WaitThread(); return err },
		"AsyncEvent":        func() error { _, err := c.AsyncEvent(background); return err },
		"AllocPD":           func() error { _, err := c.AllocPD(); return err },
		"NewCQ":             func() error { _, err := c.NewCQ(verbs.CQConfig{}); return err },
		"NewCompChannel":    func() error { _, err := c.NewCompChannel(); return err },
		"qp.New":            func() error { _, err := qp.New(pd, &qp.Config{SendCQ: cq}); return err },
		"qp.NewSRQ":         func() error { _, err := qp.NewSRQ(pd, qp.SRQConfig{}); return err },
		"qp.Listen":         func() error { _, err := qp.Listen(c.Context, netip.AddrPortFrom(c.addr, 0), 0); return err },
		"Dial": func() error {
			_, err := initQP.Dial(background, netip.AddrPortFrom(c.addr, 0), netip.AddrPortFrom(c.addr, 7471), qp.CMParams{})
			return err
		},
		"mr.Alloc":    func() error { _, err := mr.Alloc(pd, 4096, 0); return err },
		"mr.Register": func() error { _, err := mr.Register(pd, make([]byte, 64), 0); return err },
		"Fail":        func() error { return idle.a.q.Fail(background) },
		"Query":       func() error { _, err := idle.a.q.Query(); return err },
		"QueryPort":   func() error { _, err := c.QueryPort(1); return err },
		"GIDs":        func() error { _, err := c.GIDs(1); return err },
	}
	if kind == "rxe" {
		calls["Reset"] = func() error { return idle.a.q.Reset(background) }
		calls["mr.NewWindow"] = func() error { _, err := mr.NewWindow(pd); return err }
		calls["NewAH"] = func() error { _, err := pd.NewAH(ib.AHAttr{Port: 1}); return err }
	}
	if attr.Caps.Has(ib.CapResizeCQ) {
		calls["Resize"] = func() error { return cq.Resize(1000) }
	}
	for what, f := range calls {
		within(t, what, func() { isRemoved(t, what, f()) })
	}
	if _, err := verbs.Open(name); err == nil {
		t.Error("the device can still be opened")
	}
	select {
	case err := <-removed:
		t.Errorf("the deletion did not wait for the open device: %v", err)
	default:
	}
	within(t, "Close", func() {
		testutil.Close(t, open...)
		for _, r := range []*rig{busy, idle, thread} {
			r.close()
		}
		testutil.Close(t, chA, chB, chC, c)
	})
	within(t, "the deletion", func() {
		if err := <-removed; err != nil {
			t.Error(err)
		}
	})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// The same below rpc and transport: a call in flight ends, everything closes, and the deletion is done.
func TestDeviceRemovedUnderRPC(t *testing.T) { forKinds(t, testDeviceRemovedUnderRPC) }

func testDeviceRemovedUnderRPC(t *testing.T, kind string) {
	for _, mode := range []transport.PollMode{transport.Adaptive, transport.Event, transport.Busy} {
		t.Run(mode.String(), func(t *testing.T) {
			testutil.CheckLeaks(t)
			name := kind + "t"
			c := newDevice(t, kind, name)
			tcfg := &transport.Config{Context: c.Context, PollMode: mode}
			l, err := transport.Listen(background, "127.0.0.1:0", tcfg)
			if err != nil {
				t.Fatal(err)
			}
			s := rpc.NewServer(nil)
			release, entered := make(chan struct{}), make(chan struct{}, 8)
			s.HandleRaw(rpc.Spec{Number: 1}, func(call *rpc.Call, req []byte) error { return call.ReplyBytes(req) })
			s.HandleRaw(rpc.Spec{Number: 2}, func(call *rpc.Call, req []byte) error {
				entered <- struct{}{}
				select {
				case <-release:
				case <-call.Context().Done():
				}
				return call.ReplyBytes(req)
			})
			served := make(chan error, 1)
			go func() { served <- s.Serve(background, l) }()
			cl, err := rpc.Dial(background, l.Addr().String(), tcfg, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := cl.CallRaw(background, 1, []byte("hello"), nil); err != nil {
				t.Fatal(err)
			}
			call := make(chan error, 1)
			go func() { call <- cl.CallRaw(background, 2, []byte("hello"), nil) }()
			<-entered

			// Beside it, connections that only wait, and a listener whose only caller waits.
			l2, err := transport.Listen(background, "127.0.0.1:0", tcfg)
			if err != nil {
				t.Fatal(err)
			}
			waits := make(chan error, 3)
			recv := func(c *transport.Conn) {
				waits <- c.Recv(background, func(*transport.Message) error { return nil })
			}
			dialled := must(transport.Dial(background, l2.Addr().String(), tcfg))
			accepted := must(l2.Accept(background))
			go recv(dialled)
			go recv(accepted)
			go func() {
				_, err := l2.Accept(background)
				waits <- err
			}()

			removed := make(chan error, 1)
			start := time.Now()
			go func() { removed <- remove(name) }()
			within(t, "Recv and Accept", func() {
				for range cap(waits) {
					isRemoved(t, "Recv or Accept", <-waits)
				}
			})
			within(t, "Close of what has waited", func() { dialled.Close(); accepted.Close(); l2.Close() })
			within(t, "the call", func() {
				err := <-call
				isRemoved(t, "the call", err)
				t.Logf("after %v: %v", time.Since(start), err)
			})
			within(t, "a call afterwards", func() { isRemoved(t, "a call afterwards", cl.CallRaw(background, 1, []byte("hello"), nil)) })
			within(t, "Serve", func() { isRemoved(t, "Serve", <-served) })
			start = time.Now()
			within(t, "Close of the client", func() { cl.Close() })
			t.Logf("client closed after %v", time.Since(start))
			close(release)
			start = time.Now()
			within(t, "Close of the server", func() { s.Close() })
			t.Logf("server closed after %v", time.Since(start))
			within(t, "Close of the listener", func() { l.Close() })
			testutil.Close(t, c)
			within(t, "the deletion", func() {
				if err := <-removed; err != nil {
					t.Error(err)
				}
			})
		})
	}
}
