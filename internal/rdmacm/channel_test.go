package rdmacm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var fakeAddr = netip.MustParseAddrPort("10.77.0.1:7471")

func newID(t testing.TB, c *Channel, ps PortSpace) *ID {
	t.Helper()
	id, err := c.NewID(ps)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := id.Close(); err != nil {
			t.Error(err)
		}
	})
	return id
}

// ready is an ID that can connect to fakeAddr.
func ready(t testing.TB, c *Channel, ps PortSpace) *ID {
	t.Helper()
	id := newID(t, c, ps)
	if err := errors.Join(id.ResolveAddr(patient(t), netip.AddrPort{}, fakeAddr), id.ResolveRoute(patient(t))); err != nil {
		t.Fatal(err)
	}
	return id
}

func listening(t testing.TB, c *Channel, ps PortSpace, backlog int) *Listener {
	t.Helper()
	id := newID(t, c, ps)
	if err := id.Bind(fakeAddr); err != nil {
		t.Fatal(err)
	}
	l, err := id.Listen(backlog)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// isDone waits for the end of an ID, and returns why.
func isDone(t testing.TB, id *ID) error {
	t.Helper()
	select {
	case <-id.Done():
	case <-time.After(testutil.Patience):
		t.Fatal("the ID is not done")
	}
	return id.Err()
}

func flavours(t *testing.T, f func(t *testing.T, k *fakeKernel, c *Channel)) {
	for name, iwarp := range map[string]bool{"RoCE": false, "iWARP": true} {
		t.Run(name, func(t *testing.T) {
			k, c := fakeChannel(t)
			k.iwarp = iwarp
			f(t, k, c)
		})
	}
}

// pair is a connection, both sides of it.
func pair(t *testing.T, c *Channel, l *Listener) (*ID, *Request) {
	t.Helper()
	got := make(chan *Request, 1)
	go func() {
		defer close(got)
		r, err := l.Accept(patient(t))
		if err != nil {
			t.Error(err)
			return
		}
		t.Cleanup(func() { r.Close() })
		if err := r.Accept(patient(t), ConnParam{QPN: 2, PrivateData: []byte("answer"), ResponderResources: 1}); err != nil {
			t.Error(err)
		}
		got <- r
	}()
	id := ready(t, c, TCP)
	reply, err := id.Connect(patient(t), ConnParam{QPN: 1, PrivateData: []byte("question")})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(reply.Conn.PrivateData, []byte("answer")) || reply.Conn.ResponderResources != 1 {
		t.Errorf("%+v", reply)
	}
	if !reply.Established {
		if err := id.Establish(); err != nil {
			t.Fatal(err)
		}
	}
	r := <-got
	if r == nil {
		t.FailNow()
	}
	if !bytes.HasPrefix(r.Conn.PrivateData, []byte("question")) || r.Conn.QPN != 1 {
		t.Errorf("%+v", r.Conn)
	}
	return id, r
}

func TestConnect(t *testing.T) {
	flavours(t, func(t *testing.T, k *fakeKernel, c *Channel) {
		l := listening(t, c, TCP, 0)
		id, r := pair(t, c, l)
		if a, err := r.QueryAddr(); err != nil || a.Remote != netip.MustParseAddrPort("10.77.0.9:9") || a.DeviceIndex != 5 {
			t.Errorf("%+v, %v", a, err)
		}
		attr, mask, err := id.InitQPAttr(ib.RTS)
		if err != nil || attr.State != ib.RTS || mask != ib.AttrState {
			t.Error(attr, mask, err)
		}
		if id.Err() != nil || r.Err() != nil {
			t.Error(id.Err(), r.Err())
		}
		if err := id.Disconnect(); err != nil {
			t.Error(err)
		}
		for _, x := range []*ID{id, r.ID} {
			if err := isDone(t, x); !errors.Is(err, ErrDisconnected) || !strings.Contains(err.Error(), "10.77.0.1:") {
				t.Error(err)
			}
			<-x.TimewaitExit()
			if err := x.Err(); !errors.Is(err, ErrDisconnected) || errors.Is(err, ErrTimewaitExit) {
				t.Error(err)
			}
		}
		if err := errors.Join(r.Disconnect(), r.Close(), r.Close(), id.Close(), l.Close()); err != nil {
			t.Error(err)
		}
		if err := id.Err(); !errors.Is(err, ErrDisconnected) {
			t.Errorf("Close has changed why the connection ended: %v", err)
		}
	})
}

func TestDatagrams(t *testing.T) {
	_, c := fakeChannel(t)
	l := listening(t, c, UDP, 0)
	go func() {
		if r, err := l.Accept(patient(t)); err == nil {
			if !bytes.HasPrefix(r.UD.PrivateData, []byte("hello")) {
				t.Errorf("%+v", r.UD)
			}
			if err := r.Accept(patient(t), ConnParam{QPN: 77, PrivateData: []byte("here")}); err != nil {
				t.Error(err)
			}
			r.Close()
		}
	}()
	r, err := ready(t, c, UDP).Connect(patient(t), ConnParam{PrivateData: []byte("hello")})
	if err != nil || !r.Established || r.UD.QPN != 77 || r.UD.QKey != UDPQKey ||
		!bytes.HasPrefix(r.UD.PrivateData, []byte("here")) {
		t.Errorf("%+v, %v", r, err)
	}
	l.Close()
	var re *RejectedError
	if _, err := ready(t, c, UDP).Connect(patient(t), ConnParam{}); !errors.As(err, &re) || re.SIDR != SIDRUnsupported {
		t.Error(err)
	}
	if _, err := ready(t, c, UDP).Connect(patient(t), ConnParam{PrivateData: make([]byte, 181)}); err == nil {
		t.Error("more private data than fits")
	}
}

func TestReject(t *testing.T) {
	flavours(t, func(t *testing.T, k *fakeKernel, c *Channel) {
		l := listening(t, c, TCP, 0)
		go func() {
			r, err := l.Accept(patient(t))
			if err == nil {
				err = r.Reject([]byte("no room"))
			}
			if err != nil {
				t.Error(err)
			}
		}()
		id := ready(t, c, TCP)
		_, err := id.Connect(patient(t), ConnParam{})
		var re *RejectedError
		if !errors.As(err, &re) || !re.ByPeer() || !bytes.HasPrefix(re.PrivateData, []byte("no room")) ||
			!errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
		if err := isDone(t, id); !errors.As(err, &re) {
			t.Error(err)
		}
		if _, err := id.Connect(patient(t), ConnParam{}); !errors.As(err, &re) {
			t.Error(err)
		}
		l.Close()
		_, err = ready(t, c, TCP).Connect(patient(t), ConnParam{})
		if !errors.As(err, &re) || re.ByPeer() || !errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
	})
}

// The kernel's verdict about an address or a route leaves the ID usable; about a peer, it does not.
func TestUnreachable(t *testing.T) {
	k, c := fakeChannel(t)
	id := newID(t, c, TCP)
	for _, x := range []struct {
		code uint32
		kind EventType
		op   func() error
	}{
		{abi.RDMA_USER_CM_CMD_RESOLVE_ADDR, EventAddrError,
			func() error { return id.ResolveAddr(patient(t), fakeAddr, fakeAddr) }},
		{abi.RDMA_USER_CM_CMD_RESOLVE_ROUTE, EventRouteError, func() error { return id.ResolveRoute(patient(t)) }},
	} {
		k.set(k.silent, x.code, true)
		waiting, release := k.stopAt(x.code)
		go func() {
			<-waiting
			k.tell(id.num, x.kind, -int32(syscall.EHOSTUNREACH))
			release()
		}()
		err := x.op()
		var ee *EventError
		if !errors.Is(err, driver.ErrUnreachable) || !errors.Is(err, syscall.EHOSTUNREACH) || !errors.As(err, &ee) ||
			ee.Event != x.kind || !strings.Contains(err.Error(), fakeAddr.String()) {
			t.Error(err)
		}
		k.set(k.silent, x.code, false)
		if err := x.op(); err != nil {
			t.Error(err)
		}
	}
	k.set(k.silent, abi.RDMA_USER_CM_CMD_CONNECT, true)
	waiting, release := k.stopAt(abi.RDMA_USER_CM_CMD_CONNECT)
	go func() {
		<-waiting
		k.tell(id.num, EventUnreachable, -int32(syscall.ETIMEDOUT))
		release()
	}()
	_, err := id.Connect(patient(t), ConnParam{})
	if !errors.Is(err, driver.ErrUnreachable) || !errors.Is(err, syscall.ETIMEDOUT) {
		t.Error(err)
	}
	if err := isDone(t, id); !errors.Is(err, driver.ErrUnreachable) {
		t.Error(err)
	}
}

// waits are the operations that wait, each on an ID of its own that nothing will happen to.
func waits(t *testing.T, k *fakeKernel, c *Channel) map[string]func(context.Context) (*ID, func() error) {
	for _, code := range []uint32{abi.RDMA_USER_CM_CMD_RESOLVE_ADDR, abi.RDMA_USER_CM_CMD_RESOLVE_ROUTE,
		abi.RDMA_USER_CM_CMD_CONNECT, abi.RDMA_USER_CM_CMD_ACCEPT} {
		k.set(k.silent, code, false)
	}
	l := listening(t, c, TCP, 0)
	silence := func(code uint32) { k.set(k.silent, code, true) }
	return map[string]func(context.Context) (*ID, func() error){
		"resolve_addr": func(ctx context.Context) (*ID, func() error) {
			silence(abi.RDMA_USER_CM_CMD_RESOLVE_ADDR)
			id := newID(t, c, TCP)
			return id, func() error { return id.ResolveAddr(ctx, netip.AddrPort{}, fakeAddr) }
		},
		"resolve_route": func(ctx context.Context) (*ID, func() error) {
			id := newID(t, c, TCP)
			if err := id.ResolveAddr(patient(t), netip.AddrPort{}, fakeAddr); err != nil {
				t.Fatal(err)
			}
			silence(abi.RDMA_USER_CM_CMD_RESOLVE_ROUTE)
			return id, func() error { return id.ResolveRoute(ctx) }
		},
		"connect": func(ctx context.Context) (*ID, func() error) {
			id := ready(t, c, TCP)
			silence(abi.RDMA_USER_CM_CMD_CONNECT)
			return id, func() error { _, err := id.Connect(ctx, ConnParam{}); return err }
		},
		"accept": func(ctx context.Context) (*ID, func() error) {
			id := ready(t, c, TCP)
			go func() {
				if _, err := id.Connect(patient(t), ConnParam{}); err == nil {
					t.Error("a reply")
				}
			}()
			r, err := l.Accept(patient(t))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { r.Close() })
			silence(abi.RDMA_USER_CM_CMD_ACCEPT)
			return r.ID, func() error { return r.Accept(ctx, ConnParam{}) }
		},
		"listener": func(ctx context.Context) (*ID, func() error) {
			id := newID(t, c, UDP)
			if err := id.Bind(fakeAddr); err != nil {
				t.Fatal(err)
			}
			l, err := id.Listen(0)
			if err != nil {
				t.Fatal(err)
			}
			return id, func() error { _, err := l.Accept(ctx); return err }
		},
	}
}

var waitNames = []string{"resolve_addr", "resolve_route", "connect", "accept", "listener"}

// eachWait starts each of the waits, lets end end it, and gives its error to check.
func eachWait(t *testing.T, end func(k *fakeKernel, c *Channel, id *ID, cancel func()),
	check func(t *testing.T, id *ID, err error)) {
	for _, name := range waitNames {
		t.Run(name, func(t *testing.T) {
			k, c := fakeChannel(t)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			id, op := waits(t, k, c)[name](ctx)
			started := k.count(strings.TrimSuffix(name, "er"))
			result := make(chan error, 1)
			go func() { result <- op() }()
			if name != "listener" {
				testutil.Eventually(t, "the command is done", func() bool { return k.count(name) > started })
			}
			end(k, c, id, cancel)
			select {
			case err := <-result:
				check(t, id, err)
			case <-time.After(testutil.Patience):
				t.Fatal("the wait does not end")
			}
		})
	}
}

func TestContextEndsWaits(t *testing.T) {
	eachWait(t, func(_ *fakeKernel, _ *Channel, _ *ID, cancel func()) { cancel() },
		func(t *testing.T, id *ID, err error) {
			var oe *OpError
			if !errors.Is(err, context.Canceled) || !errors.As(err, &oe) {
				t.Error(err)
			}
			if strings.HasSuffix(t.Name(), "listener") {
				return
			}
			if err := id.ResolveRoute(patient(t)); !errors.Is(err, ErrAbandoned) {
				t.Errorf("an ID whose wait was abandoned goes on: %v", err)
			}
		})
	_, c := fakeChannel(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	id := newID(t, c, TCP)
	if err := id.ResolveAddr(ctx, netip.AddrPort{}, fakeAddr); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := id.ResolveAddr(patient(t), netip.AddrPort{}, fakeAddr); err != nil {
		t.Errorf("a context that was over before has used the ID up: %v", err)
	}
}

func TestCloseEndsWaits(t *testing.T) {
	check := func(t *testing.T, id *ID, err error) {
		if !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if err := id.Err(); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if err := errors.Join(id.Close(), id.Close()); err != nil {
			t.Error(err)
		}
		_, _, err = id.InitQPAttr(ib.Init)
		for _, err := range []error{err, id.Bind(fakeAddr), id.Disconnect(), id.SetTOS(1)} {
			if !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
		}
	}
	eachWait(t, func(_ *fakeKernel, _ *Channel, id *ID, _ func()) { id.Close() }, check)
	eachWait(t, func(_ *fakeKernel, c *Channel, _ *ID, _ func()) { c.Close() }, check)
}

func TestDeviceRemoval(t *testing.T) {
	check := func(t *testing.T, id *ID, err error) {
		if !errors.Is(err, driver.ErrDeviceRemoved) || !errors.Is(isDone(t, id), driver.ErrDeviceRemoved) {
			t.Error(err)
		}
	}
	eachWait(t, func(k *fakeKernel, _ *Channel, id *ID, _ func()) { k.tell(id.num, EventDeviceRemoval, 0) }, check)
	eachWait(t, func(_ *fakeKernel, c *Channel, _ *ID, _ func()) { c.Fail(driver.ErrDeviceRemoved) }, check)
	k, c := fakeChannel(t)
	id := newID(t, c, TCP)
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENXIO} {
		k.refuseWith(abi.RDMA_USER_CM_CMD_QUERY, errno)
		if _, err := id.QueryAddr(); !errors.Is(err, driver.ErrDeviceRemoved) || !errors.Is(err, errno) {
			t.Error(err)
		}
	}
}

// siw makes a TCP connection inside of CONNECT, which may take minutes. Neither the context nor Close wait for it, and the
// ID goes when the kernel comes back.
func TestConnectStuckInTheKernel(t *testing.T) {
	k, c := fakeChannel(t)
	k.iwarp = true
	waiting, release := k.stopAt(abi.RDMA_USER_CM_CMD_CONNECT)
	ctx, cancel := context.WithCancel(context.Background())
	a, b := ready(t, c, TCP), ready(t, c, TCP)
	errs := make(chan error, 2)
	go func() { _, err := a.Connect(ctx, ConnParam{}); errs <- err }()
	<-waiting
	cancel()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	go func() { _, err := b.Connect(patient(t), ConnParam{}); errs <- err }()
	<-waiting
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if err := <-errs; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if left := k.left(); len(left) != 2 {
		t.Errorf("IDs %v: a number was destroyed under a command", left)
	}
	release()
	testutil.Eventually(t, "the IDs are destroyed", func() bool { return len(k.left()) == 0 })

	// Then the kernel holds DESTROY_ID until it has given up on the peer.
	k.set(k.silent, abi.RDMA_USER_CM_CMD_CONNECT, true)
	asked, answer := k.stopAt(abi.RDMA_USER_CM_CMD_CONNECT)
	waiting, release = k.stopAt(abi.RDMA_USER_CM_CMD_DESTROY_ID)
	id := ready(t, c, TCP)
	ctx, cancel = context.WithCancel(context.Background())
	go func() {
		<-asked
		answer()
		cancel()
	}()
	if _, err := id.Connect(ctx, ConnParam{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := errors.Join(id.Close(), id.Close()); err != nil {
		t.Error(err)
	}
	<-waiting
	release()
}

// Events for IDs that are not there are dropped, and requests for listeners that are not there are refused.
func TestUnknownEvents(t *testing.T) {
	k, c := fakeChannel(t)
	id := newID(t, c, TCP)
	for kind := range EventType(20) {
		k.inject(eventOf(1<<40, 99, kind, 0, nil))
		k.inject(eventOf(0, 99, kind, 0, nil))
	}
	for _, kind := range []EventType{EventMulticastJoin, EventMulticastError, EventAddrResolved, EventEstablished,
		EventAddrError, 16, 1 << 31} {
		k.tell(id.num, kind, 0)
	}
	k.inject(eventOf(id.uid, 98, EventConnectRequest, 0, nil)) // for an ID that is no listener
	// The last of the three is the last event: none of the others may come while the address is resolved.
	testutil.Eventually(t, "three requests are destroyed", func() bool { return k.count("destroy_id") == 3 })
	if err := id.ResolveAddr(patient(t), netip.AddrPort{}, fakeAddr); err != nil {
		t.Error(err)
	}
	if err := id.Err(); err != nil {
		t.Error(err)
	}
}

// An event that comes after its wait was abandoned is nobody else's.
func TestLateEvent(t *testing.T) {
	k, c := fakeChannel(t)
	k.set(k.silent, abi.RDMA_USER_CM_CMD_RESOLVE_ADDR, true)
	id := newID(t, c, TCP)
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(time.Millisecond, cancel)
	if err := id.ResolveAddr(ctx, netip.AddrPort{}, fakeAddr); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	k.tell(id.num, EventAddrResolved, 0)
	k.tell(id.num, EventAddrChange, 0)
	<-id.AddrChanged()
	if err := id.Err(); err != nil {
		t.Error(err)
	}
}

// Values that cannot be end the connection's making, and do not reach the caller.
func TestImpossibleEvents(t *testing.T) {
	k, c := fakeChannel(t)
	l := listening(t, c, TCP, 0)
	bad := make([]byte, 272)
	le.PutUint32(bad, 1<<24)
	k.mu.Lock()
	k.events = append(k.events, fakeEvent{to: k.ids[l.id.num], made: &fakeID{num: 1000},
		b: eventOf(l.id.uid, 1000, EventConnectRequest, 0, bad)})
	k.arrived.Broadcast()
	k.mu.Unlock()
	testutil.Eventually(t, "the request is destroyed", func() bool { return k.count("destroy_id") == 1 })

	id := ready(t, c, TCP)
	k.set(k.silent, abi.RDMA_USER_CM_CMD_CONNECT, true)
	waiting, release := k.stopAt(abi.RDMA_USER_CM_CMD_CONNECT)
	go func() {
		<-waiting
		k.inject(eventOf(id.uid, id.num, EventConnectResponse, 0, bad))
		release()
	}()
	if _, err := id.Connect(patient(t), ConnParam{}); err == nil || !strings.Contains(err.Error(), "0x1000000") {
		t.Error(err)
	}
}

// What happens to a connection by itself.
func TestConnectionEvents(t *testing.T) {
	k, c := fakeChannel(t)
	l := listening(t, c, TCP, 0)
	id, r := pair(t, c, l)
	k.tell(id.num, EventAddrChange, 0)
	k.tell(id.num, EventAddrChange, 0)
	<-id.AddrChanged()
	if err := id.Err(); err != nil {
		t.Errorf("a change of the address has ended the connection: %v", err)
	}
	k.tell(id.num, EventUnreachable, -int32(syscall.ETIMEDOUT)) // Linux 6: the peer's neighbour entry has changed
	if err := isDone(t, id); !errors.Is(err, driver.ErrUnreachable) {
		t.Error(err)
	}
	k.tell(r.num, EventTimewaitExit, 0)
	k.tell(r.num, EventTimewaitExit, 0)
	if err := isDone(t, r.ID); !errors.Is(err, ErrTimewaitExit) {
		t.Error(err)
	}
	<-r.TimewaitExit()
}

// The first message may overtake the confirmation.
func TestNotifyEstablished(t *testing.T) {
	k, c := fakeChannel(t)
	l := listening(t, c, TCP, 0)
	id := ready(t, c, TCP)
	go id.Connect(patient(t), ConnParam{})
	r, err := l.Accept(patient(t))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	accepted := make(chan error, 1)
	go func() { accepted <- r.Accept(patient(t), ConnParam{}) }()
	testutil.Eventually(t, "the request is accepted", func() bool { return k.count("accept") == 1 })
	if err := r.NotifyEstablished(); err != nil {
		t.Error(err)
	}
	if err := <-accepted; err != nil {
		t.Error(err)
	}
}

func TestBacklog(t *testing.T) {
	k, c := fakeChannel(t)
	l := listening(t, c, TCP, 2)
	errs := make(chan error, 5)
	for range 5 {
		id := ready(t, c, TCP)
		go func() { _, err := id.Connect(patient(t), ConnParam{}); errs <- err }()
	}
	var re *RejectedError
	for range 3 {
		if err := <-errs; !errors.As(err, &re) {
			t.Error(err)
		}
	}
	r, err := l.Accept(patient(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := <-errs; !errors.As(err, &re) {
		t.Error(err)
	}
	// The one that was handed out before goes on.
	go r.Accept(patient(t), ConnParam{})
	if err := <-errs; err != nil {
		t.Error(err)
	}
	r.Close()
	if _, err := l.Accept(patient(t)); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if k.count("listen") != 1 {
		t.Error("not one listener")
	}
}

func TestOneWaitAtATime(t *testing.T) {
	eachWait(t, func(_ *fakeKernel, _ *Channel, id *ID, cancel func()) {
		if id.listener == nil {
			if err := id.ResolveRoute(patient(t)); !errors.Is(err, driver.ErrBusy) {
				t.Error(err)
			}
		} else if _, err := id.Listen(0); !errors.Is(err, driver.ErrBusy) {
			t.Error(err)
		}
		cancel()
	}, func(*testing.T, *ID, error) {})
}

// When the kernel gives no more events, everything ends with the reason, and says what to do.
func TestEventsEnd(t *testing.T) {
	k, c := fakeChannel(t)
	k.breakEvents(syscall.ENOMEM) // this one passes
	l := listening(t, c, TCP, 0)
	id := ready(t, c, TCP)
	k.breakEvents(syscall.EACCES)
	for _, err := range []error{isDone(t, id), func() error { _, err := l.Accept(patient(t)); return err }()} {
		if !errors.Is(err, syscall.EACCES) || !strings.Contains(err.Error(), "open it afterwards") {
			t.Error(err)
		}
	}
	if _, err := c.NewID(TCP); !errors.Is(err, syscall.EACCES) {
		t.Error(err)
	}
}

func TestRefusedCommands(t *testing.T) {
	k, c := fakeChannel(t)
	k.refuseWith(abi.RDMA_USER_CM_CMD_CREATE_ID, syscall.EACCES)
	if _, err := c.NewID(TCP); !errors.Is(err, syscall.EACCES) || !strings.Contains(err.Error(), "open it afterwards") {
		t.Error(err)
	}
	k.refuseWith(abi.RDMA_USER_CM_CMD_CREATE_ID, nil)
	for _, x := range []struct {
		code  uint32
		errno syscall.Errno
		hint  string
		op    func(id *ID) error
	}{
		{abi.RDMA_USER_CM_CMD_BIND, syscall.EADDRNOTAVAIL, "rdma link", func(id *ID) error { return id.Bind(fakeAddr) }},
		{abi.RDMA_USER_CM_CMD_BIND, syscall.EADDRINUSE, "another ID", func(id *ID) error { return id.Bind(fakeAddr) }},
		{abi.RDMA_USER_CM_CMD_BIND, syscall.EACCES, "CAP_NET_BIND_SERVICE",
			func(id *ID) error { return id.Bind(netip.AddrPortFrom(fakeAddr.Addr(), 80)) }},
		{abi.RDMA_USER_CM_CMD_LISTEN, syscall.EINVAL, "out of order", func(id *ID) error { _, err := id.Listen(1); return err }},
		{abi.RDMA_USER_CM_CMD_RESOLVE_ADDR, syscall.ENODEV, "rdma link",
			func(id *ID) error { return id.ResolveAddr(patient(t), netip.AddrPort{}, fakeAddr) }},
		{abi.RDMA_USER_CM_CMD_RESOLVE_ROUTE, syscall.EINVAL, "out of order",
			func(id *ID) error { return id.ResolveRoute(patient(t)) }},
		{abi.RDMA_USER_CM_CMD_CONNECT, syscall.EINVAL, "private data",
			func(id *ID) error { _, err := id.Connect(patient(t), ConnParam{}); return err }},
		{abi.RDMA_USER_CM_CMD_SET_OPTION, syscall.ENOSYS, "too old", func(id *ID) error { return id.SetAckTimeout(3) }},
		{abi.RDMA_USER_CM_CMD_NOTIFY, syscall.EINVAL, "", func(id *ID) error { return id.NotifyEstablished() }},
		{abi.RDMA_USER_CM_CMD_REJECT, syscall.EINVAL, "gone", func(id *ID) error { return id.Reject(nil) }},
	} {
		id := newID(t, c, TCP)
		k.refuseWith(x.code, x.errno)
		if err := x.op(id); !errors.Is(err, x.errno) || !strings.Contains(err.Error(), x.hint) {
			t.Error(err)
		}
		k.refuseWith(x.code, nil)
	}
	id := newID(t, c, TCP)
	for _, err := range []error{id.Bind(netip.AddrPort{}), id.ResolveAddr(patient(t), netip.AddrPort{}, netip.AddrPort{}),
		id.Reject(make([]byte, 256))} {
		if err == nil {
			t.Error("nonsense was taken")
		}
	}
	if _, err := id.Connect(patient(t), ConnParam{QPN: 1 << 24}); err == nil {
		t.Error("nonsense was taken")
	}
}

func TestOptions(t *testing.T) {
	k, c := fakeChannel(t)
	id := newID(t, c, TCP)
	if err := errors.Join(id.SetTOS(7), id.SetReuseAddr(true), id.SetAFOnly(false), id.SetAckTimeout(14)); err != nil {
		t.Error(err)
	}
	for _, o := range []string{"option 0 = 07", fmt.Sprintf("option 1 = %x", intValue(true)),
		"option 2 = 00000000", "option 3 = 0e"} {
		if k.count(o) != 1 {
			t.Errorf("not set: %s", o)
		}
	}
}

func TestKernelTimeout(t *testing.T) {
	if ms := kernelTimeout(context.Background()); ms != 30000 {
		t.Errorf("%d ms", ms)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	if ms := kernelTimeout(ctx); ms <= 3000_000 || ms > 3601_000 {
		t.Errorf("%d ms: the context must end first", ms)
	}
	ctx, cancel = context.WithDeadline(context.Background(), time.Now().Add(-time.Hour))
	defer cancel()
	if ms := kernelTimeout(ctx); ms != 1000 {
		t.Errorf("%d ms", ms)
	}
}

// Many connections whose ends come at any moment: the race detector looks on, and nothing is left.
func TestChurn(t *testing.T) {
	flavours(t, func(t *testing.T, k *fakeKernel, c *Channel) {
		l := listening(t, c, TCP, 8)
		var wg sync.WaitGroup
		served := make(chan struct{})
		go func() {
			defer close(served)
			var sides sync.WaitGroup
			defer sides.Wait()
			for i := 0; ; i++ {
				r, err := l.Accept(context.Background())
				if err != nil {
					return
				}
				sides.Go(func() {
					switch i % 4 {
					case 0:
						r.Reject([]byte("no"))
					case 1:
						r.Close()
					default:
						if r.Accept(patient(t), ConnParam{}) == nil {
							<-r.Done()
						}
						r.Close()
					}
				})
			}
		}()
		for i := range 60 {
			wg.Go(func() {
				id, err := c.NewID(TCP)
				if err != nil {
					t.Error(err)
					return
				}
				if i%5 == 0 {
					go id.Close()
				}
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				if i%7 == 0 {
					go cancel()
				}
				if id.ResolveAddr(ctx, netip.AddrPort{}, fakeAddr) == nil && id.ResolveRoute(ctx) == nil {
					if reply, err := id.Connect(ctx, ConnParam{}); err == nil {
						if !reply.Established {
							id.Establish()
						}
						id.Disconnect()
					}
				}
				if err := id.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		l.Close()
		<-served
		testutil.Eventually(t, "no ID is left", func() bool { return len(k.left()) == 0 })
	})
}
