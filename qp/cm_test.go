package qp_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A cmPair is two devices, with their addresses.
type cmPair struct {
	here, there string
	from, to    netip.Addr
}

// cmPairs are those of test/soft-roce, or, where softCM is set, two software NICs at its addresses.
var cmPairs = []cmPair{
	{"rxe0", "rxe1", netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("10.77.0.2")},
	{"siw0", "siw1", netip.MustParseAddr("10.78.0.1"), netip.MustParseAddr("10.78.0.2")},
}

// softCM names the environment variable with the addresses.
const softCM = "RINGSIDE_TEST_SOFT_CM"

func init() {
	if a, b, ok := strings.Cut(os.Getenv(softCM), ","); ok {
		cmPairs = []cmPair{{"soft0", "soft0", netip.MustParseAddr(a), netip.MustParseAddr(b)}}
	}
}

// The same tests between software NICs, where nobody else has their UDP port; then on a network that loses datagrams.
func TestCMSoft(t *testing.T) {
	n := testutil.NewNetwork(t)
	at := softCM + "=" + n.Addrs[0].String() + "," + n.Second.String()
	for name, env := range map[string]string{"clean": "", "bad": "RINGSIDE_SOFT_FAULTS=loss=15%,duplicate=10%,reorder=15%"} {
		t.Run(name, func(t *testing.T) { n.RunAgain(t, "^TestCM(Connection|Refused|Soft[A-Z].*)$", at, env) })
	}
}

// A cmNode is a device with what queue pairs are made on.
type cmNode struct {
	ctx *verbs.Context
	pd  *verbs.PD
	cq  *verbs.CQ
	mem *mr.MR
}

func openCM(device string) (*cmNode, error) {
	ctx, err := verbs.Open(device)
	if err != nil {
		return nil, err
	}
	n := &cmNode{ctx: ctx, pd: must(ctx.AllocPD()), cq: must(ctx.NewCQ(verbs.CQConfig{}))}
	n.mem = must(mr.Alloc(n.pd, 1<<16, ib.AccessLocalWrite|ib.AccessRemoteRead|ib.AccessRemoteWrite))
	return n, nil
}

func (n *cmNode) close() error {
	return errors.Join(n.mem.Close(), n.cq.Close(), n.pd.Close(), n.ctx.Close())
}

// ready is a queue pair in INIT with receives.
func (n *cmNode) ready() (*qp.QP, error) {
	q, err := qp.New(n.pd, &qp.Config{SendCQ: n.cq})
	if err != nil {
		return nil, err
	}
	err = q.Init(context.Background(), 1, ib.AccessRemoteRead|ib.AccessRemoteWrite)
	for i := range 4 {
		if err == nil {
			_, err = q.PostRecv([]ib.RecvWR{{ID: uint64(100 + i), SGEs: []ib.SGE{n.mem.SGE(4096*i, 4096)}}})
		}
	}
	return q, err
}

// wait returns n completions.
func (n *cmNode) wait(count int) ([]ib.WC, error) {
	wcs := make([]ib.WC, count)
	got := 0
	for deadline := time.Now().Add(testutil.Patience); got < count; {
		k, err := n.cq.Poll(wcs[got:])
		if err != nil {
			return nil, err
		}
		if got += k; k == 0 {
			if time.Now().After(deadline) {
				return wcs[:got], fmt.Errorf("%d of %d completions", got, count)
			}
			time.Sleep(time.Millisecond)
		}
	}
	return wcs, nil
}

// forCM runs a test on each pair of devices that is here.
func forCM(t *testing.T, f func(t *testing.T, here, there *cmNode, from, to netip.Addr)) {
	for _, p := range cmPairs {
		t.Run(p.here, func(t *testing.T) {
			here, err := openCM(p.here)
			if err != nil {
				testutil.Skip(t, fmt.Sprintf("%v; go run ./test/soft-roce -- go test ./qp has such devices", err))
			}
			there, err := openCM(p.there)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := errors.Join(here.close(), there.close()); err != nil {
					t.Error(err)
				}
			}()
			f(t, here, there, p.from, p.to)
		})
	}
}

func cmListen(t *testing.T, n *cmNode, a netip.Addr) *qp.Listener {
	t.Helper()
	l, err := qp.Listen(n.ctx, netip.AddrPortFrom(a, 0), 0)
	if err != nil {
		t.Fatal(err)
	}
	if l.Addr().Addr() != a || l.Addr().Port() == 0 {
		t.Errorf("listening on %v", l.Addr())
	}
	return l
}

func timeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), testutil.Patience)
	t.Cleanup(cancel)
	return ctx
}

func TestCMConnection(t *testing.T) {
	forCM(t, func(t *testing.T, here, there *cmNode, from, to netip.Addr) {
		l := cmListen(t, there, to)
		defer l.Close()
		type accepted struct {
			q    *qp.QP
			conn *qp.CMConn
			req  *qp.Request
			err  error
		}
		done := make(chan accepted, 1)
		go func() {
			var a accepted
			if a.req, a.err = l.Accept(timeout(t)); a.err == nil {
				if a.q, a.err = there.ready(); a.err == nil {
					a.conn, a.err = a.req.Accept(timeout(t), a.q, qp.CMParams{PrivateData: []byte("welcome"), MaxRdAtomic: 3, MaxDestRdAtomic: 2})
				}
			}
			done <- a
		}()
		q, err := here.ready()
		if err != nil {
			t.Fatal(err)
		}
		conn, err := q.Dial(timeout(t), netip.AddrPortFrom(from, 0), l.Addr(), qp.CMParams{PrivateData: []byte("hello"), MaxRdAtomic: 4, MaxDestRdAtomic: 5})
		if err != nil {
			t.Fatal(err)
		}
		b := <-done
		if b.err != nil {
			t.Fatal(b.err)
		}
		if !bytes.HasPrefix(conn.PrivateData(), []byte("welcome")) || !bytes.HasPrefix(b.req.PrivateData(), []byte("hello")) {
			t.Errorf("private data %q and %q", conn.PrivateData(), b.req.PrivateData())
		}
		if conn.RemoteAddr() != l.Addr() || conn.LocalAddr().Addr() != from || b.conn.RemoteAddr().Addr() != from || b.conn.LocalAddr().Addr() != to {
			t.Errorf("addresses %v %v, %v %v", conn.LocalAddr(), conn.RemoteAddr(), b.conn.LocalAddr(), b.conn.RemoteAddr())
		}
		for _, x := range []*qp.QP{q, b.q} {
			if s := x.State(); s != ib.RTS {
				t.Errorf("state %v", s)
			}
		}
		if a := must(q.Query()); a.MaxRdAtomic < 2 {
			t.Errorf("READs in flight: %d", a.MaxRdAtomic)
		}
		if err := b.req.Reject(nil); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Reject after Accept: %v", err)
		}
		// Traffic: a message, a WRITE, a READ.
		copy(here.mem.Bytes()[32768:], "over the connection")
		peer := there.mem.Addr()
		n, err := q.PostSend([]ib.SendWR{
			{ID: 1, Opcode: ib.OpRDMAWrite, SGEs: []ib.SGE{here.mem.SGE(32768, 19)}, RemoteAddr: peer + 50000, RKey: there.mem.RKey()},
			{ID: 2, Opcode: ib.OpSend, SGEs: []ib.SGE{here.mem.SGE(32768, 19)}},
			{ID: 3, Opcode: ib.OpRDMARead, Flags: ib.SendSignaled, SGEs: []ib.SGE{here.mem.SGE(40000, 19)}, RemoteAddr: peer + 50000, RKey: there.mem.RKey()},
		})
		if n != 3 || err != nil {
			t.Fatal(n, err)
		}
		wcs, err := here.wait(1)
		if err != nil || wcs[0].ID != 3 || wcs[0].Status != ib.WCSuccess {
			t.Fatal(wcs, err)
		}
		if wcs, err = there.wait(1); err != nil || wcs[0].ID != 100 || wcs[0].ByteLen != 19 {
			t.Fatal(wcs, err)
		}
		if got := string(here.mem.Bytes()[40000:][:19]) + string(there.mem.Bytes()[:19]); got != "over the connectionover the connection" {
			t.Errorf("%q", got)
		}
		// A queue pair cannot be closed before its connection, nor be connected twice.
		if err := q.Close(); !errors.Is(err, verbs.ErrBusy) {
			t.Errorf("Close of a connected queue pair: %v", err)
		}
		if _, err := q.Dial(timeout(t), netip.AddrPort{}, l.Addr(), qp.CMParams{}); !errors.Is(err, verbs.ErrState) {
			t.Errorf("Dial of a connected queue pair: %v", err)
		}
		// The end.
		if err := conn.Disconnect(); err != nil {
			t.Error(err)
		}
		for _, c := range []*qp.CMConn{conn, b.conn} {
			select {
			case <-c.Done():
			case <-timeout(t).Done():
				t.Fatal("the connection does not end")
			}
			if c.Err() == nil || c.QP().State() != ib.Err {
				t.Errorf("%v, state %v", c.Err(), c.QP().State())
			}
		}
		wcs, err = there.wait(3)
		if err != nil || wcs[0].ID != 101 || wcs[2].Status != ib.WCFlushErr {
			t.Errorf("receives are not flushed: %v, %v", wcs, err)
		}
		for _, err := range []error{conn.Disconnect(), conn.Close(), conn.Close(), b.conn.Close(), q.Close(), b.q.Close()} {
			if err != nil {
				t.Error(err)
			}
		}
	})
}

func TestCMRefused(t *testing.T) {
	forCM(t, func(t *testing.T, here, there *cmNode, from, to netip.Addr) {
		l := cmListen(t, there, to)
		dial := func(p qp.CMParams, a netip.AddrPort, ctx context.Context) error {
			t.Helper()
			q, err := here.ready()
			if err != nil {
				t.Fatal(err)
			}
			conn, err := q.Dial(ctx, netip.AddrPortFrom(from, 0), a, p)
			if err == nil {
				t.Error("connected")
				conn.Close()
			}
			if err := q.Close(); err != nil {
				t.Error(err)
			}
			return err
		}
		// By the program.
		rejected := make(chan error, 1)
		go func() {
			r, err := l.Accept(timeout(t))
			if err == nil {
				err = r.Reject([]byte("not today"))
			}
			rejected <- err
		}()
		err := dial(qp.CMParams{}, l.Addr(), timeout(t))
		if data, ok := qp.RejectData(err); !ok || !bytes.HasPrefix(data, []byte("not today")) || !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v, %q, %v", err, data, ok)
		}
		if err := <-rejected; err != nil {
			t.Error(err)
		}
		// Too much to say.
		if err := dial(qp.CMParams{PrivateData: make([]byte, 256)}, l.Addr(), timeout(t)); err == nil {
			t.Error("256 bytes of private data")
		}
		// Nobody answers: the request waits in the listener.
		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		defer cancel()
		if err := dial(qp.CMParams{}, l.Addr(), ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("no answer: %v", err)
		}
		// Accept ends with its context, and with Close.
		ended, cancel2 := context.WithCancel(context.Background())
		cancel2()
		if _, err := l.Accept(ended); !errors.Is(err, context.Canceled) {
			t.Errorf("Accept: %v", err)
		}
		waiting := make(chan error, 1)
		second := cmListen(t, there, to)
		go func() {
			_, err := second.Accept(context.Background())
			waiting <- err
		}()
		time.Sleep(10 * time.Millisecond)
		if err := second.Close(); err != nil {
			t.Error(err)
		}
		if err := <-waiting; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept of a closed listener: %v", err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		// Nobody listens.
		if err := dial(qp.CMParams{}, l.Addr(), timeout(t)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("no listener: %v", err)
		}
		// Nobody is there.
		ctx, cancel3 := context.WithTimeout(context.Background(), time.Second)
		defer cancel3()
		if err := dial(qp.CMParams{}, netip.AddrPortFrom(netip.MustParseAddr("10.99.0.1"), 1), ctx); err == nil {
			t.Error("an address without a route")
		}
		// Both addresses are this host's: without another word the way to one starts there.
		q, err := here.ready()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := q.Dial(timeout(t), netip.AddrPort{}, netip.AddrPortFrom(to, 1), qp.CMParams{}); !errors.Is(err, verbs.ErrUnreachable) ||
			!strings.Contains(err.Error(), there.ctx.Name()) {
			t.Errorf("dialling through another device: %v", err)
		}
		if err := q.Close(); err != nil {
			t.Error(err)
		}
		// Another device's address.
		if _, err := qp.Listen(there.ctx, netip.AddrPortFrom(from, 0), 0); !errors.Is(err, verbs.ErrUnreachable) {
			t.Errorf("listening on another device's address: %v", err)
		}
	})
}

var _ = func() bool {
	testutil.RegisterChild("cm-peer", func(args []string) {
		n := must(openCM(args[0]))
		q := must(n.ready())
		local := netip.AddrPortFrom(netip.MustParseAddr(args[2]), 0)
		must(q.Dial(context.Background(), local, netip.MustParseAddrPort(args[1]), qp.CMParams{}))
		fmt.Println("connected")
		<-testutil.ChildInput()
	})
	return true
}()

// The end of the peer's process is the end of the connection.
func TestCMPeerDies(t *testing.T) {
	forCM(t, func(t *testing.T, here, there *cmNode, from, to netip.Addr) {
		l := cmListen(t, there, to)
		defer l.Close()
		child := testutil.StartChild(t, "cm-peer", here.ctx.Name(), l.Addr().String(), from.String())
		r, err := l.Accept(timeout(t))
		if err != nil {
			t.Fatal(err)
		}
		q := must(there.ready())
		conn, err := r.Accept(timeout(t), q, qp.CMParams{})
		if err != nil {
			t.Fatal(err)
		}
		child.Expect("connected")
		child.Kill()
		select {
		case <-conn.Done():
		case <-timeout(t).Done():
			t.Fatal("the peer's death is not noticed")
		}
		t.Log(conn.Err())
		if wcs, err := there.wait(4); err != nil || wcs[0].Status != ib.WCFlushErr {
			t.Error(wcs, err)
		}
		if err := errors.Join(conn.Close(), q.Close()); err != nil {
			t.Error(err)
		}
	})
}
