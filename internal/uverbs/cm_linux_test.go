package uverbs

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/rdmacm"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Another port is tried where the kernel's choice was one that TCP cannot use, and nowhere else.
func TestPortRetry(t *testing.T) {
	taken := &rdmacm.OpError{Op: "connect", Err: unix.EADDRNOTAVAIL}
	for what, c := range map[string]struct {
		port  uint16
		errs  []error // of the calls
		calls int
	}{
		"at once":            {errs: []error{nil}, calls: 1},
		"the third":          {errs: []error{taken, &rdmacm.OpError{Op: "connect", Err: unix.EADDRINUSE}, nil}, calls: 3},
		"none":               {errs: []error{taken}, calls: maxPortTries},
		"a listener's":       {errs: []error{&rdmacm.OpError{Op: "listen", Err: unix.EADDRINUSE}, nil}, calls: 2},
		"one asked for":      {port: 1, errs: []error{taken}, calls: 1},
		"not our address":    {errs: []error{&rdmacm.OpError{Op: "resolve_addr", Err: unix.EADDRNOTAVAIL}}, calls: 1},
		"refused":            {errs: []error{taken, &rdmacm.OpError{Op: "connect", Err: unix.ECONNREFUSED}}, calls: 2},
		"of a connection":    {errs: []error{&rdmacm.OpError{Op: "connect", Err: &rdmacm.RejectedError{Errno: unix.EADDRNOTAVAIL}}}, calls: 1},
		"not of the manager": {errs: []error{unix.EADDRINUSE}, calls: 1},
	} {
		calls := 0
		var last error
		err := portRetry(c.port, func() error {
			last = c.errs[min(calls, len(c.errs)-1)]
			calls++
			return last
		})
		if calls != c.calls || !errors.Is(err, last) {
			t.Errorf("%s: %d calls, %v", what, calls, err)
		}
	}
}

// A context takes only what is for its device, by whatever the connection manager says of that.
func TestTakes(t *testing.T) {
	index := uint32(5)
	c := &Context{File: &File{device: "mlx5_0"}, index: &index, guid: 7}
	for _, x := range []struct {
		a    rdmacm.Addr
		want bool
	}{
		{rdmacm.Addr{}, true},
		{rdmacm.Addr{Bound: true, HasDeviceIndex: true, DeviceIndex: 5, NodeGUID: 9}, true},
		{rdmacm.Addr{Bound: true, HasDeviceIndex: true, DeviceIndex: 6, NodeGUID: 7}, false},
		{rdmacm.Addr{Bound: true, NodeGUID: 7}, true},
		{rdmacm.Addr{Bound: true, NodeGUID: 9}, false},
	} {
		if err := c.takes(&x.a); (err == nil) != x.want {
			t.Errorf("%+v: %v", x.a, err)
		}
	}
	// Where nothing has told the kernel's index, it goes by the GUID.
	for _, d := range newHost(t, map[string]string{
		"sys/class/infiniband_verbs/uverbs0/ibdev": "mlx5_0", "sys/class/infiniband/mlx5_0/node_guid": "0000:0000:0000:0007",
	}).devices() {
		c := &Context{File: &File{device: "mlx5_0"}}
		c.know(&d)
		if err := c.takes(&rdmacm.Addr{Bound: true, HasDeviceIndex: true, DeviceIndex: 5, NodeGUID: 7}); err != nil {
			t.Error(err)
		}
		if err := c.takes(&rdmacm.Addr{Bound: true, HasDeviceIndex: true, NodeGUID: 9}); err == nil {
			t.Error("it takes what is for another device")
		}
	}
	if err := (&Context{}).takes(&rdmacm.Addr{Bound: true, HasDeviceIndex: true, DeviceIndex: 5}); err != nil {
		t.Error(err)
	}
}

// A fakeID is one that the kernel has ended, of which the event has not come yet.
type fakeID struct {
	done   chan struct{}
	closed int
}

func (f *fakeID) Disconnect() error     { return unix.ENXIO }
func (f *fakeID) Done() <-chan struct{} { return f.done }
func (f *fakeID) Err() error            { return rdmacm.ErrDisconnected }
func (f *fakeID) Close() error          { f.closed++; close(f.done); return nil }

// fakeMoved is a queue pair that the kernel moves.
type fakeMoved struct {
	driver.QP
	state ib.QPState
}

func (f *fakeMoved) Moved(to ib.QPState) { f.state = to }

func (f *fakeMoved) Query() (ib.QPAttr, error) { return ib.QPAttr{State: f.state}, nil }

// A slowID is one of which Disconnect sees, at the second look, that it is not over, and is held up then.
type slowID struct {
	fakeID
	looks           atomic.Int32
	looked, release chan struct{}
}

func (f *slowID) Disconnect() error { return nil }
func (f *slowID) Done() <-chan struct{} {
	if f.looks.Add(1) != 2 { // the first look is watch's
		return f.done
	}
	close(f.looked)
	<-f.release
	return nil
}

// countMoves is a queue pair that counts how often it is moved.
type countMoves struct {
	driver.QP
	n atomic.Int32
}

func (c *countMoves) Moved(ib.QPState) { c.n.Add(1) }

// Behind Close the queue pair may be another connection's: a Disconnect that has begun before ends before.
func TestCloseWaitsForDisconnect(t *testing.T) {
	id, q := &slowID{fakeID: fakeID{done: make(chan struct{})}, looked: make(chan struct{}), release: make(chan struct{})}, &countMoves{}
	n := (&Context{}).newConn(id, q, rdmacm.Addr{}, nil)
	testutil.Eventually(t, "watched", func() bool { return id.looks.Load() == 1 })
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := n.Disconnect(); err != nil {
			t.Error(err)
		}
	})
	<-id.looked
	closed := make(chan int32, 1)
	wg.Go(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		closed <- q.n.Load()
	})
	testutil.Eventually(t, "Close is over, or has to wait", func() bool {
		if n.ending.TryLock() {
			n.ending.Unlock()
			return len(closed) > 0
		}
		return true
	})
	close(id.release)
	wg.Wait()
	if before, now := <-closed, q.n.Load(); now != before {
		t.Errorf("moved %d times by the end of Close, and %d times now", before, now)
	}
}

func TestCloseAfterTheKernel(t *testing.T) {
	id, q := &fakeID{done: make(chan struct{})}, &fakeMoved{state: ib.RTS}
	n := (&Context{}).newConn(id, q, rdmacm.Addr{}, nil)
	if err := n.Disconnect(); !errors.Is(err, unix.ENXIO) {
		t.Errorf("Disconnect: %v", err)
	}
	if err := n.Close(); err != nil || id.closed != 1 || q.state != ib.Err {
		t.Errorf("Close: %v, %d times, the queue pair is in %v", err, id.closed, q.state)
	}
}

// A quietManager is a connection manager that does what it is told, knows no device of its IDs, and reports nothing of them.
type quietManager struct {
	closed chan struct{}

	mu       sync.Mutex
	commands map[uint32]int // guarded by mu: how many there were
}

func (k *quietManager) Write(cmd []byte) syscall.Errno {
	code := binary.NativeEndian.Uint32(cmd)
	if code == abi.RDMA_USER_CM_CMD_GET_EVENT {
		return unix.EAGAIN
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.commands[code]++
	return 0
}

func (k *quietManager) count(code uint32) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.commands[code]
}

func (k *quietManager) Wait()        { <-k.closed }
func (k *quietManager) Close() error { close(k.closed); return nil }

// The removal of the device ends what waits for the connection manager, whether or not that says anything of it.
func TestRemovalEndsConnections(t *testing.T) {
	testutil.CheckLeaks(t)
	var events [2]int
	if err := unix.Pipe2(events[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(events[1])
	c, err := newAsync(t, events[0])
	if err != nil {
		t.Fatal(err)
	}
	k := &quietManager{closed: make(chan struct{}), commands: map[uint32]int{}}
	c.cm.ch = rdmacm.OpenOn(k)
	anywhere := netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	l, err := c.CMListen(anywhere, 0)
	if err != nil {
		t.Fatal(err)
	}
	id, err := c.newID()
	if err != nil {
		t.Fatal(err)
	}
	q := &fakeMoved{state: ib.RTS}
	conn := c.newConn(id, q, rdmacm.Addr{}, nil)
	ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
	defer cancel()
	accepted, dialed := make(chan error), make(chan error)
	go func() {
		_, err := l.Accept(ctx)
		accepted <- err
	}()
	go func() {
		_, err := c.CMDial(ctx, &fakeMoved{}, netip.AddrPort{}, netip.MustParseAddrPort("10.77.0.1:7471"), &driver.CMParam{})
		dialed <- err
	}()
	testutil.Eventually(t, "the kernel resolves an address", func() bool { return k.count(abi.RDMA_USER_CM_CMD_RESOLVE_ADDR) > 0 })
	c.Remove()
	for what, ended := range map[string]chan error{"Accept": accepted, "Dial": dialed} {
		if err := <-ended; !errors.Is(err, driver.ErrDeviceRemoved) {
			t.Errorf("%s: %v", what, err)
		}
	}
	select {
	case <-conn.Done():
	case <-ctx.Done():
		t.Fatal("the connection goes on")
	}
	if err := conn.Err(); !errors.Is(err, driver.ErrDeviceRemoved) || q.state != ib.Err {
		t.Errorf("the connection: %v, the queue pair is in %v", err, q.state)
	}
	if _, err := c.CMListen(anywhere, 0); !errors.Is(err, driver.ErrDeviceRemoved) {
		t.Errorf("another listener: %v", err)
	}
	// The kernel has to hear of it when they are closed: it waits for that.
	if err := errors.Join(l.Close(), conn.Close()); err != nil {
		t.Error(err)
	}
	if n := k.count(abi.RDMA_USER_CM_CMD_DESTROY_ID); n != 3 {
		t.Errorf("%d IDs were destroyed", n)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
