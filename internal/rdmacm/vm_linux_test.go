package rdmacm

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/cmemu"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mlx5emu"
	"github.com/ringside-rdma/ringside/internal/netlink"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The addresses of test/soft-roce: each has an rxe and a siw device.
var (
	vmHere  = netip.MustParseAddr("10.77.0.1")
	vmThere = netip.MustParseAddr("10.77.0.2")
)

// emulated, in the environment, has the tests of the kernel take that of package cmemu, at two addresses of this machine.
const emulated = "RINGSIDE_TEST_EMULATED"

// emulation is what plays the kernel in this test; nil: the kernel does.
var emulation *cmemu.Manager

// What the kernel's connection manager does, the emulated one does, too.
func TestEmulated(t *testing.T) {
	n := testutil.NewNetwork(t)
	n.RunAgain(t, "^TestKernel", fmt.Sprintf("%s=%v,%v", emulated, n.Addrs[0], n.Second))
}

// startEmulation makes the emulated kernel, if the environment says so.
func startEmulation(t *testing.T) {
	t.Helper()
	v := os.Getenv(emulated)
	if v == "" {
		return
	}
	here, there, _ := strings.Cut(v, ",")
	vmHere, vmThere = netip.MustParseAddr(here), netip.MustParseAddr(there)
	d, err := mlx5emu.NewDevice(mlx5emu.Config{})
	if err != nil {
		t.Fatal(err)
	}
	emulation = cmemu.New([]*mlx5emu.Device{d})
	t.Cleanup(func() {
		err := errors.Join(emulation.Close(), d.Close())
		if emulation = nil; err != nil {
			t.Error(err)
		}
	})
}

// open opens the connection manager.
func open() (*Channel, error) {
	if emulation == nil {
		return Open()
	}
	k, err := emulation.OpenKernel()
	if err != nil {
		return nil, err
	}
	return OpenOn(k), nil
}

// vmChannel opens the kernel's connection manager, in a machine that has RDMA devices at the addresses above.
func vmChannel(t *testing.T) *Channel {
	t.Helper()
	startEmulation(t)
	const how = "; go run ./test/soft-roce -- go test ./internal/rdmacm has one"
	c, err := open()
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, os.ErrPermission) {
		testutil.Skip(t, err.Error()+how)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	id, err := c.NewID(TCP)
	if err != nil {
		t.Fatal(err)
	}
	defer id.Close()
	if err := id.Bind(netip.AddrPortFrom(vmHere, 0)); err != nil {
		testutil.Skip(t, fmt.Sprintf("no RDMA device at %v: %v%s", vmHere, err, how))
	}
	return c
}

// deviceName is the name of the device with an index.
func deviceName(t *testing.T, index uint32) (name, protocol string) {
	t.Helper()
	c, err := netlink.Dial(unix.NETLINK_RDMA)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	m := netlink.NewMessage(abi.RDMA_NL_NLDEV<<10|abi.RDMA_NLDEV_CMD_GET, 0, nil).U32(abi.RDMA_NLDEV_ATTR_DEV_INDEX, index)
	err = c.Get(m, func(body []byte) {
		netlink.Attributes(body, func(typ uint16, v []byte) {
			switch typ {
			case abi.RDMA_NLDEV_ATTR_DEV_NAME:
				name = strings.TrimRight(string(v), "\x00")
			case abi.RDMA_NLDEV_ATTR_DEV_PROTOCOL:
				protocol = strings.TrimRight(string(v), "\x00")
			}
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return name, protocol
}

// resolved is an ID on the way to dst, with address and route.
func resolved(t testing.TB, c *Channel, src, dst netip.AddrPort) *ID {
	t.Helper()
	id, err := c.NewID(TCP)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { id.Close() })
	ctx := patient(t)
	if err := errors.Join(id.ResolveAddr(ctx, src, dst), id.ResolveRoute(ctx)); err != nil {
		t.Fatal(err)
	}
	return id
}

func listenAt(t testing.TB, c *Channel, a netip.AddrPort, backlog int) *Listener {
	t.Helper()
	id, err := c.NewID(TCP)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { id.Close() })
	if err := id.Bind(a); err != nil {
		t.Fatal(err)
	}
	l, err := id.Listen(backlog)
	if err != nil {
		t.Fatal(err)
	}
	if a.Port() == 0 && l.Addr().Port() == 0 {
		t.Fatal("the listener does not know its port")
	}
	return l
}

func TestKernelResolve(t *testing.T) {
	c := vmChannel(t)
	for _, src := range []netip.AddrPort{{}, netip.AddrPortFrom(vmHere, 0), netip.AddrPortFrom(vmThere, 0)} {
		for _, dst := range []netip.Addr{vmHere, vmThere} {
			if src.IsValid() && src.Addr() == vmThere && dst == vmHere {
				continue
			}
			id := resolved(t, c, src, netip.AddrPortFrom(dst, 7471))
			a, err := id.QueryAddr()
			if err != nil {
				t.Fatal(err)
			}
			if !a.Bound || a.HasDeviceIndex == (emulation != nil) || a.Remote != netip.AddrPortFrom(dst, 7471) || a.Local.Port() == 0 ||
				src.IsValid() && a.Local.Addr() != src.Addr() {
				t.Errorf("%+v", a)
			}
			if emulation == nil {
				name, protocol := deviceName(t, a.DeviceIndex)
				t.Logf("%v -> %v: %s (%s): %+v", src, dst, name, protocol, a)
				guid, err := os.ReadFile(filepath.Join("/sys/class/infiniband", name, "node_guid"))
				if err != nil || strings.TrimSpace(string(guid)) != a.NodeGUID.String() {
					t.Errorf("node GUID %v, in sysfs %s (%v)", a.NodeGUID, guid, err)
				}
			}
			attr, mask, err := id.InitQPAttr(ib.Init)
			t.Logf("INIT: %+v, %v, %v", attr, mask, err)
			if err != nil || mask&(ib.AttrState|ib.AttrPort|ib.AttrPKeyIndex|ib.AttrAccess) == 0 || attr.Port != a.Port {
				t.Errorf("%+v, %v, %v", attr, mask, err)
			}
		}
	}
	for _, bindTo := range []netip.Addr{vmHere, vmThere} {
		id, err := c.NewID(TCP)
		if err != nil {
			t.Fatal(err)
		}
		defer id.Close()
		if err := id.Bind(netip.AddrPortFrom(bindTo, 0)); err != nil {
			t.Fatal(err)
		}
		a, err := id.QueryAddr()
		if err != nil {
			t.Fatal(err)
		}
		if emulation == nil {
			name, _ := deviceName(t, a.DeviceIndex)
			t.Logf("bound to %v: %s: %+v", bindTo, name, a)
		}
	}
}

// skipIWARP skips a test of RoCE's CM where the kernel takes the siw device for the address.
func skipIWARP(t *testing.T, id *ID) {
	t.Helper()
	if emulation != nil {
		return
	}
	a, err := id.QueryAddr()
	if err != nil {
		t.Fatal(err)
	}
	if name, protocol := deviceName(t, a.DeviceIndex); protocol != "roce" {
		t.Fatalf("the kernel takes %s (%s), which needs a real QP", name, protocol)
	}
}

var qpns atomic.Uint32 // numbers of queue pairs that nobody has: the CM of RoCE does not look

func nextQPN() ib.QPN { return ib.QPN(0x1000 + qpns.Add(1)) }

// The whole life of a connection over RoCE, both sides.
func TestKernelConnection(t *testing.T) {
	c := vmChannel(t)
	ctx := patient(t)
	l := listenAt(t, c, netip.AddrPortFrom(vmThere, 0), 0)
	id := resolved(t, c, netip.AddrPortFrom(vmHere, 0), l.Addr())
	skipIWARP(t, id)

	type answer struct {
		req *Request
		err error
	}
	passive := make(chan answer, 1)
	rq, aq := nextQPN(), nextQPN()
	go func() {
		req, err := l.Accept(ctx)
		if err != nil {
			passive <- answer{nil, err}
			return
		}
		if req.Conn.QPN != aq || !bytes.HasPrefix(req.Conn.PrivateData, []byte("question")) ||
			len(req.Conn.PrivateData) != MaxConnectData || req.Conn.RetryCount != 7 || req.Conn.RNRRetryCount != 6 {
			err = fmt.Errorf("request %+v", req.Conn)
		}
		for _, s := range []ib.QPState{ib.Init, ib.RTR, ib.RTS} {
			attr, mask, aerr := req.InitQPAttr(s)
			t.Logf("passive %v: %+v, %v", s, attr, mask)
			if aerr != nil || s == ib.RTR && attr.DestQPN != aq {
				err = errors.Join(err, aerr, fmt.Errorf("passive attributes %+v", attr))
			}
		}
		err = errors.Join(err, req.Accept(ctx,
			ConnParam{QPN: rq, PrivateData: []byte("answer"), ResponderResources: 3, InitiatorDepth: 2}))
		passive <- answer{req, err}
	}()
	reply, err := id.Connect(ctx, ConnParam{QPN: aq, PrivateData: []byte("question"), ResponderResources: 2, InitiatorDepth: 3,
		RetryCount: 7, RNRRetryCount: 6})
	if err != nil {
		t.Fatal(err)
	}
	if reply.Established || reply.Conn.QPN != rq || len(reply.Conn.PrivateData) != MaxAcceptData ||
		!bytes.HasPrefix(reply.Conn.PrivateData, []byte("answer")) {
		t.Errorf("%+v", reply)
	}
	for _, s := range []ib.QPState{ib.Init, ib.RTR, ib.RTS} {
		attr, mask, err := id.InitQPAttr(s)
		t.Logf("active %v: %+v, %v", s, attr, mask)
		if err != nil || s == ib.Init && attr.Access&ib.AccessRemoteWrite == 0 || s == ib.RTR && attr.DestQPN != rq {
			t.Error(s, attr, mask, err)
		}
	}
	if err := id.Establish(); err != nil {
		t.Fatal(err)
	}
	p := <-passive
	if p.err != nil {
		t.Fatal(p.err)
	}
	if id.Err() != nil || p.req.Err() != nil {
		t.Error(id.Err(), p.req.Err())
	}
	if a, err := p.req.QueryAddr(); err != nil || a.Remote.Addr() != vmHere || a.Local != l.Addr() || !a.Bound {
		t.Errorf("%+v, %v", a, err)
	}

	if err := id.Disconnect(); err != nil {
		t.Fatal(err)
	}
	wait(t, "the passive side hears of the disconnect", p.req.Done())
	if err := p.req.Err(); !errors.Is(err, ErrDisconnected) {
		t.Error(err)
	}
	if err := p.req.Disconnect(); err != nil {
		t.Error(err)
	}
	wait(t, "the active side's disconnect", id.Done())
	if err := id.Err(); !errors.Is(err, ErrDisconnected) {
		t.Error(err)
	}
	if err := errors.Join(id.Close(), p.req.Close(), l.Close()); err != nil {
		t.Error(err)
	}
}

func wait(t testing.TB, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(testutil.Patience):
		t.Fatalf("after %v still not: %s", testutil.Patience, what)
	}
}

func TestKernelReject(t *testing.T) {
	c := vmChannel(t)
	ctx := patient(t)
	l := listenAt(t, c, netip.AddrPortFrom(vmThere, 0), 0)
	id := resolved(t, c, netip.AddrPort{}, l.Addr())
	skipIWARP(t, id)
	go func() {
		if req, err := l.Accept(ctx); err == nil {
			req.Reject([]byte("no room"))
		}
	}()
	_, err := id.Connect(ctx, ConnParam{QPN: nextQPN()})
	var re *RejectedError
	if !errors.As(err, &re) || !re.ByPeer() || re.Reason != ReasonConsumer || len(re.PrivateData) != MaxRejectData ||
		!bytes.HasPrefix(re.PrivateData, []byte("no room")) {
		t.Errorf("%v, %+v", err, re)
	}
	t.Log(err)
	if err := id.Err(); !errors.As(err, &re) {
		t.Error(err)
	}

	// The active side says no to an answer.
	id = resolved(t, c, netip.AddrPort{}, l.Addr())
	accepted := make(chan error, 1)
	go func() {
		req, err := l.Accept(ctx)
		if err == nil {
			err = req.Accept(ctx, ConnParam{QPN: nextQPN()})
			req.Close()
		}
		accepted <- err
	}()
	if _, err := id.Connect(ctx, ConnParam{QPN: nextQPN()}); err != nil {
		t.Fatal(err)
	}
	if err := id.Reject([]byte("changed my mind")); err != nil {
		t.Error(err)
	}
	if err := <-accepted; !errors.As(err, &re) || !bytes.HasPrefix(re.PrivateData, []byte("changed my mind")) {
		t.Error(err)
	}
}

func TestKernelNobodyListens(t *testing.T) {
	c := vmChannel(t)
	id := resolved(t, c, netip.AddrPort{}, netip.AddrPortFrom(vmThere, 1))
	skipIWARP(t, id)
	_, err := id.Connect(patient(t), ConnParam{QPN: nextQPN()})
	var re *RejectedError
	if !errors.As(err, &re) || re.Reason != ReasonInvalidServiceID || re.ByPeer() || !errors.Is(err, syscall.ECONNREFUSED) {
		t.Error(err)
	}
	t.Log(err)
}

// A listener that closes refuses what nobody has accepted; and what does not fit into its backlog is refused at once.
func TestKernelListenerCloses(t *testing.T) {
	c := vmChannel(t)
	ctx := patient(t)
	l := listenAt(t, c, netip.AddrPortFrom(vmThere, 0), 1)
	errs := make(chan error, 3)
	for range 3 {
		id := resolved(t, c, netip.AddrPort{}, l.Addr())
		skipIWARP(t, id)
		go func() {
			_, err := id.Connect(ctx, ConnParam{QPN: nextQPN()})
			errs <- err
		}()
	}
	var re *RejectedError
	for range 2 { // one waits
		if err := <-errs; !errors.As(err, &re) || re.Reason != ReasonConsumer {
			t.Error(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := <-errs; !errors.As(err, &re) {
		t.Error(err)
	}
	if _, err := l.Accept(ctx); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// needsNeighbours skips a test of what becomes of hosts that are not there: the emulated kernel does not look for them.
func needsNeighbours(t *testing.T) {
	if emulation != nil {
		t.Skip("an address is resolved whether its host is there or not")
	}
}

func TestKernelUnreachable(t *testing.T) {
	c := vmChannel(t)
	needsNeighbours(t)
	newID := func() *ID {
		id, err := c.NewID(TCP)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { id.Close() })
		return id
	}
	nobody := netip.MustParseAddrPort("10.77.0.99:7471")

	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	id := newID()
	err := id.ResolveAddr(ctx, netip.AddrPort{}, nobody)
	t.Log(err)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), nobody.String()) {
		t.Error(err)
	}
	if err := id.ResolveRoute(patient(t)); !errors.Is(err, ErrAbandoned) {
		t.Error(err)
	}

	id = newID()
	ctx, cancel = context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	if err := id.ResolveAddr(ctx, netip.AddrPort{}, nobody); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}

	id = newID()
	time.AfterFunc(50*time.Millisecond, func() { id.Close() })
	if err := id.ResolveAddr(patient(t), netip.AddrPort{}, nobody); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}

	// Addresses that no RDMA device has anything to do with.
	id = newID()
	err = id.ResolveAddr(patient(t), netip.AddrPort{}, netip.MustParseAddrPort("192.0.2.1:7471"))
	t.Log(err)
	if err == nil {
		t.Error("an address without a route was resolved")
	}
	if err := newID().Bind(netip.MustParseAddrPort("192.0.2.1:0")); err == nil {
		t.Error("an address of nobody was bound")
	} else {
		t.Log(err)
	}
	// The loopback address is resolved, to some device; but there is no route.
	id = newID()
	err = errors.Join(id.ResolveAddr(patient(t), netip.AddrPort{}, netip.MustParseAddrPort("127.0.0.1:7471")),
		id.ResolveRoute(patient(t)))
	if err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, err = id.Connect(ctx, ConnParam{QPN: nextQPN()})
	}
	t.Log("loopback: ", err)
	if err == nil || !strings.Contains(err.Error(), "interface's own address") {
		t.Error(err)
	}

	// Out of order.
	_, err = newID().Connect(patient(t), ConnParam{QPN: nextQPN()})
	if !errors.Is(err, syscall.EINVAL) {
		t.Error(err)
	}
	t.Log(err)
}

// The kernel's own verdict comes as an event, and another address can be tried with the same ID.
func TestKernelAddressError(t *testing.T) {
	c := vmChannel(t)
	needsNeighbours(t)
	id, err := c.NewID(TCP)
	if err != nil {
		t.Fatal(err)
	}
	defer id.Close()
	cmd, err := resolveAddr(id.num, netip.AddrPort{}, netip.MustParseAddrPort("10.77.0.98:7471"), 100)
	if err != nil {
		t.Fatal(err)
	}
	_, err = id.perform(patient(t), cmd, EventAddrResolved, EventAddrResolved)
	if !errors.Is(err, driver.ErrUnreachable) {
		t.Error(err)
	}
	t.Log(err)
	if err := id.ResolveAddr(patient(t), netip.AddrPort{}, netip.AddrPortFrom(vmThere, 7471)); err != nil {
		t.Error(err)
	}
}

// The context and Close end a Connect that nobody answers; the peer does not wait in vain either.
func TestKernelConnectGivenUp(t *testing.T) {
	c := vmChannel(t)
	l := listenAt(t, c, netip.AddrPortFrom(vmThere, 0), 0)
	id := resolved(t, c, netip.AddrPort{}, l.Addr())
	skipIWARP(t, id)
	ctx, cancel := context.WithCancel(context.Background())
	got := make(chan *Request, 1)
	take := func(then func()) {
		req, err := l.Accept(patient(t))
		if err != nil {
			t.Error(err)
		}
		then()
		got <- req
	}
	go take(cancel)
	if _, err := id.Connect(ctx, ConnParam{QPN: nextQPN()}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if req := <-got; req != nil {
		req.Close()
	}
	if err := id.Close(); err != nil {
		t.Error(err)
	}

	id = resolved(t, c, netip.AddrPort{}, l.Addr())
	go take(func() { id.Close() })
	if _, err := id.Connect(patient(t), ConnParam{QPN: nextQPN()}); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if req := <-got; req != nil {
		err := req.Accept(patient(t), ConnParam{QPN: nextQPN()})
		t.Log("accepting a request of a peer that has gone: ", err)
		if err == nil {
			t.Error("a connection without a peer was established")
		}
		req.Close()
	}
}

func TestKernelOptions(t *testing.T) {
	c := vmChannel(t)
	id, err := c.NewID(TCP)
	if err != nil {
		t.Fatal(err)
	}
	defer id.Close()
	if err := errors.Join(id.SetTOS(0x20), id.SetReuseAddr(true), id.SetAFOnly(true), id.SetAckTimeout(14)); err != nil {
		t.Error(err)
	}
	l := listenAt(t, c, netip.AddrPortFrom(vmThere, 0), 0)
	if err := errors.Join(id.ResolveAddr(patient(t), netip.AddrPort{}, l.Addr()), id.ResolveRoute(patient(t))); err != nil {
		t.Fatal(err)
	}
	id2, err := c.NewID(TCP)
	if err != nil {
		t.Fatal(err)
	}
	defer id2.Close()
	err = id2.Bind(l.Addr())
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Error(err)
	}
	t.Log(err)
}

// Datagrams: a connection only tells one side the other's QP.
func TestKernelDatagrams(t *testing.T) {
	c := vmChannel(t)
	ctx := patient(t)
	newID := func() *ID {
		id, err := c.NewID(UDP)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { id.Close() })
		return id
	}
	lid := newID()
	if err := lid.Bind(netip.AddrPortFrom(vmThere, 0)); err != nil {
		t.Fatal(err)
	}
	l, err := lid.Listen(0)
	if err != nil {
		t.Fatal(err)
	}
	id := newID()
	if err := errors.Join(id.ResolveAddr(ctx, netip.AddrPort{}, l.Addr()), id.ResolveRoute(ctx)); err != nil {
		t.Fatal(err)
	}
	skipIWARP(t, id)
	rq := nextQPN()
	accepted := make(chan error, 1)
	go func() {
		req, err := l.Accept(ctx)
		if err == nil {
			t.Logf("request %+v", req.UD)
			if !bytes.HasPrefix(req.UD.PrivateData, []byte("hello")) || len(req.UD.PrivateData) != MaxUDPConnectData {
				t.Errorf("%+v", req.UD)
			}
			err = errors.Join(req.Accept(ctx, ConnParam{QPN: rq, PrivateData: []byte("here")}), req.Close())
		}
		accepted <- err
	}()
	reply, err := id.Connect(ctx, ConnParam{PrivateData: []byte("hello")})
	if err := errors.Join(err, <-accepted); err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", reply)
	if !reply.Established || reply.UD.QPN != rq || reply.UD.QKey != UDPQKey || reply.UD.AH.DGID != ib.GIDFromAddr(vmThere) ||
		!bytes.HasPrefix(reply.UD.PrivateData, []byte("here")) {
		t.Errorf("%+v", reply)
	}
	id = newID()
	err = errors.Join(id.ResolveAddr(ctx, netip.AddrPort{}, netip.AddrPortFrom(vmThere, 1)), id.ResolveRoute(ctx))
	if err != nil {
		t.Fatal(err)
	}
	_, err = id.Connect(ctx, ConnParam{})
	var re *RejectedError
	if !errors.As(err, &re) || re.SIDR != SIDRUnsupported {
		t.Error(err)
	}
	t.Log(err)
	go func() {
		if req, err := l.Accept(ctx); err == nil {
			req.Reject([]byte("not you"))
		}
	}()
	id = newID()
	if err := errors.Join(id.ResolveAddr(ctx, netip.AddrPort{}, l.Addr()), id.ResolveRoute(ctx)); err != nil {
		t.Fatal(err)
	}
	_, err = id.Connect(ctx, ConnParam{})
	if !errors.As(err, &re) || re.SIDR != SIDRRejected || !bytes.HasPrefix(re.PrivateData, []byte("not you")) {
		t.Error(err, re)
	}
	t.Log(err)
}

// connectOnce makes a connection to whoever listens at dst, with l as the listener, and ends it. It returns both sides' addresses.
func connectOnce(t *testing.T, c *Channel, l *Listener, dst netip.AddrPort) (active, passive Addr) {
	t.Helper()
	ctx := patient(t)
	type answer struct {
		a   Addr
		err error
	}
	got := make(chan answer, 1)
	go func() {
		req, err := l.Accept(ctx)
		if err != nil {
			got <- answer{err: err}
			return
		}
		defer req.Close()
		a, err := req.QueryAddr()
		got <- answer{a, errors.Join(err, req.Accept(ctx, ConnParam{QPN: nextQPN()}))}
		<-req.Done()
	}()
	id := resolved(t, c, netip.AddrPort{}, dst)
	defer id.Close()
	_, err := id.Connect(ctx, ConnParam{QPN: nextQPN()})
	if err == nil {
		err = id.Establish()
	}
	if err != nil {
		t.Fatal(err)
	}
	active, err = id.QueryAddr()
	p := <-got
	if err := errors.Join(err, p.err, id.Disconnect()); err != nil {
		t.Error(err)
	}
	return active, p.a
}

// A listener on all addresses has no device; its requests have.
func TestKernelWildcard(t *testing.T) {
	c := vmChannel(t)
	l := listenAt(t, c, netip.AddrPortFrom(netip.IPv4Unspecified(), 0), 0)
	if a, err := l.ID().QueryAddr(); err != nil || a.Bound || a.Local.Port() != l.Addr().Port() {
		t.Errorf("%+v, %v", a, err)
	}
	for _, ip := range []netip.Addr{vmHere, vmThere} {
		dst := netip.AddrPortFrom(ip, l.Addr().Port())
		active, passive := connectOnce(t, c, l, dst)
		if passive.Local != dst || !passive.Bound || passive.Remote.Addr() != active.Local.Addr() {
			t.Errorf("%+v, %+v", active, passive)
		}
	}
}

// Many connections at the same time, on one channel.
func TestKernelParallel(t *testing.T) {
	const n = 100
	c := vmChannel(t)
	ctx := patient(t)
	l := listenAt(t, c, netip.AddrPortFrom(vmThere, 0), n)
	skipIWARP(t, resolved(t, c, netip.AddrPort{}, l.Addr()))
	var wg sync.WaitGroup
	var ended atomic.Int32
	wg.Go(func() {
		for range n {
			req, err := l.Accept(ctx)
			if err != nil {
				t.Error(err)
				return
			}
			wg.Go(func() {
				defer req.Close()
				err := req.Accept(ctx, ConnParam{QPN: nextQPN(), PrivateData: req.Conn.PrivateData[:4]})
				if err != nil && !errors.Is(err, ErrDisconnected) { // the end may overtake the confirmation
					t.Error(err)
					return
				}
				<-req.Done()
				if errors.Is(req.Err(), ErrDisconnected) {
					ended.Add(1)
				}
			})
		}
	})
	for i := range n {
		wg.Go(func() {
			id, err := c.NewID(TCP)
			if err != nil {
				t.Error(err)
				return
			}
			defer id.Close()
			err = errors.Join(id.ResolveAddr(ctx, netip.AddrPort{}, l.Addr()), id.ResolveRoute(ctx))
			if err != nil {
				t.Error(err)
				return
			}
			name := fmt.Sprintf("%04d", i)
			reply, err := id.Connect(ctx, ConnParam{QPN: nextQPN(), PrivateData: []byte(name), RetryCount: 7})
			if err != nil {
				t.Error(err)
				return
			}
			if got := string(reply.Conn.PrivateData[:4]); got != name {
				t.Errorf("%s was answered %s", name, got)
			}
			if err := errors.Join(id.Establish(), id.Disconnect()); err != nil {
				t.Error(err)
			}
			<-id.Done()
		})
	}
	wg.Wait()
	if ended.Load() != n {
		t.Errorf("%d of %d passive sides heard of the end", ended.Load(), n)
	}
}

// Closing the channel ends everything that waits in it.
func TestKernelChannelCloses(t *testing.T) {
	vmChannel(t)
	c, err := open()
	if err != nil {
		t.Fatal(err)
	}
	l := listenAt(t, c, netip.AddrPortFrom(vmThere, 0), 0)
	id, err := c.NewID(TCP)
	if err != nil {
		t.Fatal(err)
	}
	errs := make(chan error, 2)
	go func() {
		_, err := l.Accept(patient(t))
		errs <- err
	}()
	go func() {
		err := id.ResolveAddr(patient(t), netip.AddrPort{}, netip.MustParseAddrPort("10.77.0.97:1"))
		if emulation != nil { // which has said something already
			err = net.ErrClosed
		}
		errs <- err
	}()
	time.Sleep(50 * time.Millisecond)
	if err := errors.Join(c.Close(), c.Close()); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := <-errs; !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	}
	if _, err := c.NewID(TCP); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if err := errors.Join(id.Close(), l.Close()); err != nil {
		t.Error(err)
	}
}

// A test that makes devices and takes them away, which who lists devices at that moment would notice:
//
//	go run ./test/soft-roce -- go test -v ./internal/rdmacm -run TestKernelDevices -devices
var ownDevices = flag.Bool("devices", false, "make RDMA devices, and remove them: for a machine that is there for tests")

func shell(t *testing.T, line string) {
	t.Helper()
	f := strings.Fields(line)
	if b, err := exec.Command(f[0], f[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", line, err, b)
	}
}

// A device goes while IDs stand on it, and with siw alone on an address the kernel takes that.
func TestKernelDevices(t *testing.T) {
	if !*ownDevices {
		t.Skip("only with -devices, in a machine that is there for tests")
	}
	c := vmChannel(t)
	here := netip.MustParseAddr("10.79.3.1")
	shell(t, "ip link add ringcm0 type veth peer name ringcm1")
	t.Cleanup(func() { shell(t, "ip link del ringcm0") })
	shell(t, "ip addr add 10.79.3.1/24 dev ringcm0")
	shell(t, "ip link set ringcm0 up")
	shell(t, "ip link set ringcm1 up")
	shell(t, "rdma link add siwcm type siw netdev ringcm0")
	time.Sleep(200 * time.Millisecond)

	id := resolved(t, c, netip.AddrPort{}, netip.AddrPortFrom(here, 7471))
	a, err := id.QueryAddr()
	if err != nil {
		t.Fatal(err)
	}
	name, protocol := deviceName(t, a.DeviceIndex)
	t.Logf("%s (%s): %+v", name, protocol, a)
	attr, mask, err := id.InitQPAttr(ib.Init)
	t.Logf("INIT: %+v, %v, %v", attr, mask, err)
	_, err = id.Connect(patient(t), ConnParam{QPN: 1 << 20, PrivateData: make([]byte, 200)})
	t.Log("connect without a QP: ", err)
	if err == nil {
		t.Error("connected without a QP")
	}
	id.Close()

	shell(t, "rdma link add rxecm type rxe netdev ringcm0")
	time.Sleep(200 * time.Millisecond)
	id = resolved(t, c, netip.AddrPort{}, netip.AddrPortFrom(here, 7471))
	a, err = id.QueryAddr()
	if err != nil {
		t.Fatal(err)
	}
	name, protocol = deviceName(t, a.DeviceIndex)
	t.Logf("siw older than rxe: %s (%s)", name, protocol)
	id.Close()

	shell(t, "rdma link delete siwcm")
	linkLocal(t, c)
	l := listenAt(t, c, netip.AddrPortFrom(here, 0), 0)
	id = resolved(t, c, netip.AddrPort{}, l.Addr())
	accepted := make(chan error, 1)
	go func() {
		_, err := l.Accept(patient(t))
		accepted <- err
	}()
	time.Sleep(20 * time.Millisecond)
	shell(t, "rdma link delete rxecm")
	wait(t, "the ID hears of the removal", id.Done())
	for _, err := range []error{id.Err(), <-accepted} {
		t.Log(err)
		if !errors.Is(err, driver.ErrDeviceRemoved) {
			t.Error(err)
		}
	}
	time.Sleep(100 * time.Millisecond)
	_, err = id.QueryAddr()
	t.Log(err)
	if !errors.Is(err, driver.ErrDeviceRemoved) {
		t.Error(err)
	}
	if err := errors.Join(id.Close(), l.Close()); err != nil {
		t.Error(err)
	}
}

// linkLocal tries addresses that mean something only with an interface.
func linkLocal(t *testing.T, c *Channel) {
	shell(t, "rdma link add rxecm1 type rxe netdev ringcm1")
	defer shell(t, "rdma link delete rxecm1")
	here, there := netip.MustParseAddr("fe80::79:1"), netip.MustParseAddr("fe80::79:2")
	shell(t, "ip addr add fe80::79:1/64 dev ringcm0 nodad")
	shell(t, "ip addr add fe80::79:2/64 dev ringcm1 nodad")
	time.Sleep(200 * time.Millisecond)
	l := listenAt(t, c, netip.AddrPortFrom(there.WithZone("ringcm1"), 0), 0)
	defer l.Close()
	if l.Addr().Addr() != there.WithZone("ringcm1") {
		t.Errorf("the listener is at %v", l.Addr())
	}
	active, passive := connectOnce(t, c, l, netip.AddrPortFrom(there.WithZone("ringcm0"), l.Addr().Port()))
	t.Logf("%+v, %+v", active, passive)
	if active.Local.Addr().WithZone("") != here || active.Remote.Addr() != there.WithZone("ringcm0") ||
		passive.Local.Addr() != there || passive.Remote.Addr() != here { // as they were in the message, without an interface
		t.Errorf("%+v, %+v", active, passive)
	}
}
