//go:build amd64 || arm64

package cmemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/provider/mlx5"
	"github.com/ringside-rdma/ringside/internal/rdmacm"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// An end is a queue pair, of a client of an emulated device or of a software NIC, with memory that the peer may use.
type end struct {
	t   testing.TB
	q   driver.QP
	cq  driver.CQ
	mr  driver.MR
	buf []byte
}

// size is half of an end's memory: the first half is sent from, the second received to.
const size = 8192

func newEnd(t testing.TB, c driver.Context) *end {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	reg, err := mem.Alloc(2*size, mem.Options{})
	must(err)
	e := &end{t: t, buf: reg.Bytes()}
	pd, err := c.AllocPD()
	must(err)
	e.cq, err = c.CreateCQ(driver.CQConfig{Entries: 64})
	must(err)
	e.mr, err = pd.RegisterMR(driver.MRConfig{Mem: e.buf, FD: -1, Access: ib.AccessLocalWrite | ib.AccessRemote})
	must(err)
	e.q, err = pd.CreateQP(driver.QPConfig{Type: ib.RC, SendCQ: e.cq, RecvCQ: e.cq, Cap: ib.QPCap{MaxSendWR: 16, MaxRecvWR: 16, MaxSendSGE: 1, MaxRecvSGE: 1}})
	must(err)
	t.Cleanup(func() {
		if err := errors.Join(e.q.Close(), e.mr.Close(), e.cq.Close(), pd.Close(), reg.Close()); err != nil {
			t.Error(err)
		}
	})
	return e
}

// newClient is an end of a client of the manager's device.
func newClient(t testing.TB, m *Manager) *end {
	t.Helper()
	k, err := m.devices[0].OpenKernel()
	if err != nil {
		t.Fatal(err)
	}
	c, err := mlx5.OpenKernel(k, "mlx5_0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return newEnd(t, c)
}

// modify takes the queue pair to states as the ID says.
func (e *end) modify(id *rdmacm.ID, states ...ib.QPState) error {
	for _, s := range states {
		a, mask, err := id.InitQPAttr(s)
		if err == nil {
			err = e.q.Modify(context.Background(), &a, mask)
		}
		if err != nil {
			return fmt.Errorf("%v: %w", s, err)
		}
	}
	return nil
}

// poll takes the next completion.
func (e *end) poll() ib.WC {
	e.t.Helper()
	wc := make([]ib.WC, 1)
	testutil.Eventually(e.t, "a completion", func() bool { return e.cq.Poll(wc) == 1 })
	return wc[0]
}

func (e *end) sge(at, n int) []ib.SGE {
	return []ib.SGE{{Addr: addrOf(e.buf) + uint64(at), Length: uint32(n), LKey: e.mr.LKey()}}
}

// to sends to the other end, and writes to and reads from its memory.
func (e *end) to(o *end) {
	e.t.Helper()
	for i := range e.buf {
		e.buf[i], o.buf[i] = byte(i*7), 0
	}
	if _, err := o.q.PostRecv([]ib.RecvWR{{ID: 1, SGEs: o.sge(size, size)}}); err != nil {
		e.t.Fatal(err)
	}
	for _, wr := range []ib.SendWR{
		{ID: 2, Opcode: ib.OpRDMAWrite, SGEs: e.sge(0, 100), RemoteAddr: addrOf(o.buf), RKey: o.mr.RKey()},
		{ID: 3, Opcode: ib.OpRDMARead, SGEs: e.sge(size, 100), RemoteAddr: addrOf(o.buf), RKey: o.mr.RKey()},
		{ID: 4, Opcode: ib.OpSend, SGEs: e.sge(0, 5000)},
	} {
		wr.Flags = ib.SendSignaled
		if _, err := e.q.PostSend([]ib.SendWR{wr}); err != nil {
			e.t.Fatal(err)
		}
		if wc := e.poll(); wc.ID != wr.ID || wc.Status != ib.WCSuccess {
			e.t.Fatalf("%v: %+v", wr.Opcode, wc)
		}
	}
	if wc := o.poll(); wc.ID != 1 || wc.Status != ib.WCSuccess || wc.ByteLen != 5000 {
		e.t.Errorf("%+v", wc)
	}
	if !bytes.Equal(o.buf[size:size+5000], e.buf[:5000]) || !bytes.Equal(e.buf[size:size+100], e.buf[:100]) || !bytes.Equal(o.buf[:100], e.buf[:100]) {
		e.t.Error("what has come is not what was sent")
	}
}

// flushed says that the queue pair is in Err.
func (e *end) flushed() {
	e.t.Helper()
	e.q.Modify(context.Background(), &ib.QPAttr{State: ib.Err}, ib.AttrState)
	if _, err := e.q.PostRecv([]ib.RecvWR{{ID: 9, SGEs: e.sge(0, 1)}}); err != nil {
		e.t.Fatal(err)
	}
	if wc := e.poll(); wc.ID != 9 || wc.Status != ib.WCFlushErr {
		e.t.Errorf("%+v", wc)
	}
}

// A listener, as this project's client has it.
func newListener(t testing.TB, c *rdmacm.Channel, a netip.AddrPort) *rdmacm.Listener {
	t.Helper()
	id := newClientID(t, c)
	if err := id.Bind(a); err != nil {
		t.Fatal(err)
	}
	l, err := id.Listen(8)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func newClientID(t testing.TB, c *rdmacm.Channel) *rdmacm.ID {
	t.Helper()
	id, err := c.NewID(rdmacm.TCP)
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

// resolved is an ID on the way to dst.
func resolved(t testing.TB, c *rdmacm.Channel, dst netip.AddrPort) *rdmacm.ID {
	t.Helper()
	id := newClientID(t, c)
	if err := errors.Join(id.ResolveAddr(patient(t), netip.AddrPort{}, dst), id.ResolveRoute(patient(t))); err != nil {
		t.Fatal(err)
	}
	return id
}

const rights = 4 // READs and atomics

// dial connects e to whoever listens at dst.
func (e *end) dial(c *rdmacm.Channel, dst netip.AddrPort) *rdmacm.ID {
	e.t.Helper()
	id := resolved(e.t, c, dst)
	err := e.modify(id, ib.Init)
	if err == nil {
		_, err = id.Connect(patient(e.t), rdmacm.ConnParam{QPN: e.q.QPN(), PrivateData: []byte("question"), ResponderResources: rights, InitiatorDepth: rights,
			RetryCount: 7, RNRRetryCount: 7})
	}
	if err == nil {
		err = errors.Join(e.modify(id, ib.Init, ib.RTR, ib.RTS), id.Establish())
	}
	if err != nil {
		e.t.Fatal(err)
	}
	return id
}

// accept connects e to who asks for it.
func (e *end) accept(l *rdmacm.Listener) (*rdmacm.Request, error) {
	r, err := l.Accept(patient(e.t))
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(string(r.Conn.PrivateData), "question") {
		err = fmt.Errorf("asked %q", r.Conn.PrivateData)
	}
	err = errors.Join(err, e.modify(r.ID, ib.Init, ib.RTR, ib.RTS))
	return r, errors.Join(err, r.Accept(patient(e.t), rdmacm.ConnParam{QPN: e.q.QPN(), ResponderResources: rights, InitiatorDepth: rights, RNRRetryCount: 7}))
}

// Two clients of a device meet at one address.
func TestConnection(t *testing.T) {
	m := newManager(t)
	a, b := newClient(t, m), newClient(t, m)
	cl, cr := m.open(t), m.open(t)
	l := newListener(t, cl, netip.AddrPortFrom(loopback, 0))
	type accepted struct {
		r   *rdmacm.Request
		err error
	}
	done := make(chan accepted, 1)
	go func() {
		r, err := b.accept(l)
		done <- accepted{r, err}
	}()
	id := a.dial(cr, l.Addr())
	y := <-done
	if y.err != nil {
		t.Fatal(y.err)
	}
	a.to(b)
	b.to(a)
	if err := y.r.Disconnect(); err != nil {
		t.Error(err)
	}
	<-id.Done()
	<-y.r.Done()
	if !errors.Is(id.Err(), rdmacm.ErrDisconnected) || !errors.Is(y.r.Err(), rdmacm.ErrDisconnected) {
		t.Errorf("%v, %v", id.Err(), y.r.Err())
	}
	if err := id.Disconnect(); err != nil { // as programs answer
		t.Error(err)
	}
	a.flushed()
	b.flushed()
	<-id.TimewaitExit()
	<-y.r.TimewaitExit()
	if err := y.r.Close(); err != nil {
		t.Error(err)
	}
}

// newNIC makes a software NIC.
func newNIC(t testing.TB) *softnic.NIC {
	t.Helper()
	n, err := softnic.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

var nicParam = driver.CMParam{Access: ib.AccessRemote, MaxRdAtomic: rights, MaxDestRdAtomic: rights, RetryCount: 7, RNRRetry: 7, MinRNRTimer: 12}

// A client dials a program that has a software NIC.
func TestPeerListens(t *testing.T) {
	_, there := twoAddresses(t)
	m, nic := newManager(t), newNIC(t)
	a, b := newClient(t, m), newEnd(t, nic)
	l, err := nic.CMListen(netip.AddrPortFrom(there, 0), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	type accepted struct {
		c   driver.CMConn
		err error
	}
	done := make(chan accepted, 1)
	go func() {
		r, err := l.Accept(patient(t))
		if err != nil {
			done <- accepted{nil, err}
			return
		}
		p := nicParam
		c, err := r.Accept(patient(t), b.q, &p)
		done <- accepted{c, err}
	}()
	id := newClientID(t, m.open(t))
	here, _ := twoAddresses(t)
	if err := id.Bind(netip.AddrPortFrom(here, 0)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(id.ResolveAddr(patient(t), netip.AddrPort{}, l.Addr()), id.ResolveRoute(patient(t)), a.modify(id, ib.Init)); err != nil {
		t.Fatal(err)
	}
	if _, err := id.Connect(patient(t), rdmacm.ConnParam{QPN: a.q.QPN(), ResponderResources: rights, InitiatorDepth: rights, RetryCount: 7, RNRRetryCount: 7}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(a.modify(id, ib.Init, ib.RTR, ib.RTS), id.Establish()); err != nil {
		t.Fatal(err)
	}
	y := <-done
	if y.err != nil {
		t.Fatal(y.err)
	}
	plain(t, b.q)
	a.to(b)
	b.to(a)
	if err := y.c.Close(); err != nil {
		t.Error(err)
	}
	<-id.Done()
	if !errors.Is(id.Err(), rdmacm.ErrDisconnected) {
		t.Error(id.Err())
	}
}

// plain says that the queue pair speaks as any RoCE device does.
func plain(t testing.TB, q driver.QP) {
	t.Helper()
	a, err := q.Query()
	if err != nil || a.AH.UDPPort != 0 {
		t.Errorf("%+v, %v: the software NIC takes the peer for one of its own", a.AH, err)
	}
}

// A program that has a software NIC dials a client, which listens at all addresses.
func TestPeerDials(t *testing.T) {
	there, here := twoAddresses(t) // the NIC's net device has the smaller MTU, which the other has to take
	m, nic := newManager(t), newNIC(t)
	a, b := newClient(t, m), newEnd(t, nic)
	taken, err := nic.CMListen(netip.AddrPortFrom(there, 0), 1) // that address is the other's
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	l := newListener(t, m.open(t), netip.AddrPortFrom(netip.IPv6Unspecified(), 0))
	done := make(chan error, 1)
	var r *rdmacm.Request
	go func() {
		var err error
		r, err = a.accept(l)
		done <- err
	}()
	p := nicParam
	p.PrivateData = []byte("question")
	c, err := nic.CMDial(patient(t), b.q, netip.AddrPortFrom(there, 0), netip.AddrPortFrom(here, l.Addr().Port()), &p)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if q, err := r.QueryAddr(); err != nil || q.Local != netip.AddrPortFrom(here, l.Addr().Port()) || q.Remote.Addr() != there || q.NodeGUID != m.devices[0].GUID() {
		t.Errorf("%+v, %v", q, err)
	}
	plain(t, b.q)
	a.to(b)
	b.to(a)
	if err := r.Close(); err != nil { // as if the client were gone
		t.Error(err)
	}
	<-c.Done()
	if err := c.Close(); err != nil {
		t.Error(err)
	}

	// A client says no.
	go func() {
		r, err := l.Accept(patient(t))
		if err == nil {
			err = r.Reject([]byte("no"))
		}
		done <- err
	}()
	var no driver.CMRejection
	_, err = nic.CMDial(patient(t), newEnd(t, nic).q, netip.AddrPortFrom(there, 0), netip.AddrPortFrom(here, l.Addr().Port()), &p)
	if !errors.As(err, &no) || !no.ByPeer() || !bytes.HasPrefix(no.Data(), []byte("no")) {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Another has the UDP port at an address.
func TestPeerHasThePort(t *testing.T) {
	here, there := twoAddresses(t)
	nic := newNIC(t)
	taken, err := nic.CMListen(netip.AddrPortFrom(there, 0), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	m := newManager(t)
	c := m.open(t)
	id := newClientID(t, c)
	if err := id.Bind(netip.AddrPortFrom(there, 0)); err != nil {
		t.Error(err)
	}
	if _, err := id.Listen(1); !errors.Is(err, syscall.EADDRINUSE) {
		t.Error(err)
	}
	var e *rdmacm.EventError
	if err := id.ResolveAddr(patient(t), netip.AddrPort{}, netip.AddrPortFrom(here, roce.Port)); !errors.As(err, &e) || !errors.Is(err, syscall.EADDRINUSE) {
		t.Error(err)
	}
	// But who has it can be dialled there.
	a, b := newClient(t, m), newEnd(t, nic)
	done := make(chan error, 1)
	go func() {
		r, err := taken.Accept(patient(t))
		if err == nil {
			p := nicParam
			_, err = r.Accept(patient(t), b.q, &p)
		}
		done <- err
	}()
	a.dial(c, taken.Addr())
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	a.to(b)
	b.to(a)
}

// Two managers, as two processes have them, at one address: the second's clients dial the first's.
func TestManagersAtOneAddress(t *testing.T) {
	first, second := newManager(t), newManager(t)
	b, a := newClient(t, first), newClient(t, second)
	l := newListener(t, first.open(t), netip.AddrPortFrom(loopback, 0))
	done := make(chan error, 1)
	var r *rdmacm.Request
	go func() {
		var err error
		r, err = b.accept(l)
		done <- err
	}()
	id := a.dial(second.open(t), l.Addr())
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	a.to(b)
	b.to(a)
	if err := r.Disconnect(); err != nil {
		t.Error(err)
	}
	<-id.Done()
	<-r.Done()
	if !errors.Is(id.Err(), rdmacm.ErrDisconnected) || !errors.Is(r.Err(), rdmacm.ErrDisconnected) {
		t.Errorf("%v, %v", id.Err(), r.Err())
	}
	nobody := resolved(t, second.open(t), netip.AddrPortFrom(loopback, 1))
	var no *rdmacm.RejectedError
	if _, err := nobody.Connect(patient(t), rdmacm.ConnParam{QPN: 77}); !errors.As(err, &no) || no.Reason != rdmacm.ReasonInvalidServiceID {
		t.Error(err)
	}
}
