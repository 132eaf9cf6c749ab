package qp_test

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What only the software NIC's connection manager does. TestCMSoft runs these where they find their addresses.

// onlySoft calls f with two software NICs, if this is such a place.
func onlySoft(t *testing.T, f func(t *testing.T, here, there *cmNode, from, to netip.Addr)) {
	t.Helper()
	if os.Getenv(softCM) == "" {
		t.Skip("a part of TestCMSoft")
	}
	forCM(t, f)
}

// meet connects two queue pairs.
func meet(t *testing.T, here, there *cmNode, l *qp.Listener, from netip.Addr, dial, accept qp.CMParams) (a, b *qp.CMConn) {
	t.Helper()
	type result struct {
		c   *qp.CMConn
		err error
	}
	done := make(chan result, 1)
	go func() {
		r, err := l.Accept(timeout(t))
		if err != nil {
			done <- result{nil, err}
			return
		}
		c, err := r.Accept(timeout(t), must(there.ready()), accept)
		done <- result{c, err}
	}()
	a, err := must(here.ready()).Dial(timeout(t), netip.AddrPortFrom(from, 0), l.Addr(), dial)
	if err != nil {
		t.Fatal(err)
	}
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	return a, r.c
}

func endAll(t *testing.T, conns ...*qp.CMConn) {
	t.Helper()
	for _, c := range conns {
		if err := errors.Join(c.Close(), c.QP().Close()); err != nil {
			t.Error(err)
		}
	}
}

// Both queue pairs have what the two sides have agreed on.
func TestCMSoftAttributes(t *testing.T) {
	onlySoft(t, func(t *testing.T, here, there *cmNode, from, to netip.Addr) {
		l := cmListen(t, there, to)
		defer l.Close()
		a, b := meet(t, here, there, l, from,
			qp.CMParams{MaxRdAtomic: 9, MaxDestRdAtomic: 3, RetryCount: 6, RNRRetry: 5},
			qp.CMParams{MaxRdAtomic: 4, MaxDestRdAtomic: 7, RetryCount: 2, RNRRetry: 3})
		defer endAll(t, a, b)
		qa, qb := must(a.QP().Query()), must(b.QP().Query())
		if qa.MaxRdAtomic != 7 || qb.MaxDestRdAtomic != 7 || qb.MaxRdAtomic != 3 || qa.MaxDestRdAtomic != 3 {
			t.Errorf("READs in flight: %d %d, %d %d", qa.MaxRdAtomic, qa.MaxDestRdAtomic, qb.MaxRdAtomic, qb.MaxDestRdAtomic)
		}
		if qa.RetryCount != 6 || qb.RetryCount != 6 || qa.RNRRetry != 3 || qb.RNRRetry != 5 || qa.AckTimeout != qb.AckTimeout || qa.AckTimeout == 0 {
			t.Errorf("retries %d %d, RNR %d %d, timeouts %d %d", qa.RetryCount, qb.RetryCount, qa.RNRRetry, qb.RNRRetry, qa.AckTimeout, qb.AckTimeout)
		}
		if qa.SQPSN != qb.RQPSN || qb.SQPSN != qa.RQPSN || qa.PathMTU != qb.PathMTU || qa.DestQPN != b.QP().QPN() || qb.DestQPN != a.QP().QPN() {
			t.Errorf("%+v\n%+v", qa, qb)
		}
		if qa.AH.UDPPort != 4791 || qb.AH.UDPPort != 4791 || qa.AH.DGID.Addr() != to || qb.AH.DGID.Addr() != from {
			t.Errorf("they do not know each other for software NICs: %+v %+v", qa.AH, qb.AH)
		}
	})
}

// Connections that are closed at once, with their devices: the peers hear of it.
func TestCMSoftEnds(t *testing.T) {
	onlySoft(t, func(t *testing.T, here, there *cmNode, from, to netip.Addr) {
		l, err := qp.Listen(there.ctx, netip.AddrPortFrom(to, 0), 0)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		a, b := meet(t, here, there, l, from, qp.CMParams{}, qp.CMParams{})
		endAll(t, a)
		select {
		case <-b.Done():
		case <-timeout(t).Done():
			t.Fatal("the end was not heard")
		}
		if s := b.QP().State(); s != ib.Err {
			t.Errorf("state %v", s)
		}
		endAll(t, b)
		// Both at once.
		a, b = meet(t, here, there, l, from, qp.CMParams{}, qp.CMParams{})
		other := make(chan error, 1)
		go func() { other <- b.Disconnect() }()
		if err := errors.Join(a.Disconnect(), <-other); err != nil {
			t.Error(err)
		}
		for _, c := range []*qp.CMConn{a, b} {
			select {
			case <-c.Done():
			case <-timeout(t).Done():
				t.Fatal("the connection does not end")
			}
		}
		endAll(t, a, b)
	})
}

// A connection that the other side ends before this one has returned from making it was made all the same, on both sides.
func TestCMSoftEndsAtOnce(t *testing.T) {
	onlySoft(t, func(t *testing.T, here, there *cmNode, from, to netip.Addr) {
		l := cmListen(t, there, to)
		defer l.Close()
		for i := range 12 {
			accepted := make(chan error, 1)
			go func() {
				r, err := l.Accept(timeout(t))
				if err != nil {
					accepted <- err
					return
				}
				q := must(there.ready())
				c, err := r.Accept(timeout(t), q, qp.CMParams{})
				if err == nil {
					if i%2 == 1 {
						<-c.Done()
					}
					err = c.Close()
				}
				accepted <- errors.Join(err, q.Close())
			}()
			q := must(here.ready())
			c, err := q.Dial(timeout(t), netip.AddrPortFrom(from, 0), l.Addr(), qp.CMParams{})
			if err == nil {
				if i%2 == 0 {
					<-c.Done()
				}
				err = c.Close()
			}
			if err := errors.Join(err, q.Close(), <-accepted); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// A queue pair that was reset, for something else, is not of its connection any more, whichever side ends that.
func TestCMSoftReset(t *testing.T) {
	onlySoft(t, func(t *testing.T, here, there *cmNode, from, to netip.Addr) {
		l := cmListen(t, there, to)
		defer l.Close()
		for _, byPeer := range []bool{false, true} {
			a, b := meet(t, here, there, l, from, qp.CMParams{}, qp.CMParams{})
			if err := errors.Join(a.QP().Reset(timeout(t)), a.QP().Init(timeout(t), 1, 0)); err != nil {
				t.Fatal(err)
			}
			end := a.Disconnect
			if byPeer {
				end = b.Disconnect
			}
			if err := end(); err != nil {
				t.Error(err)
			}
			select {
			case <-a.Done():
			case <-timeout(t).Done():
				t.Fatal("the connection does not end")
			}
			if s := a.QP().State(); s != ib.Init {
				t.Errorf("by the peer: %v, state %v", byPeer, s)
			}
			endAll(t, a, b)
		}
	})
}

// What cannot be is refused before the network is bothered, or by the other side, with what to do.
func TestCMSoftRefusals(t *testing.T) {
	onlySoft(t, func(t *testing.T, here, there *cmNode, from, to netip.Addr) {
		l, err := qp.Listen(there.ctx, netip.AddrPortFrom(to, 0), 1)
		if err != nil {
			t.Fatal(err)
		}
		dial := func(ctx context.Context, n *cmNode, local netip.Addr, remote netip.AddrPort, p qp.CMParams) error {
			q := must(n.ready())
			defer func() {
				if err := q.Close(); err != nil {
					t.Error(err)
				}
			}()
			c, err := q.Dial(ctx, netip.AddrPortFrom(local, 0), remote, p)
			if err == nil {
				c.Close()
			}
			return err
		}
		if err := dial(timeout(t), here, from, l.Addr(), qp.CMParams{PrivateData: make([]byte, 57)}); err == nil || !strings.Contains(err.Error(), "at most 56") {
			t.Errorf("57 bytes: %v", err)
		}
		nowhere := netip.MustParseAddr("192.0.2.1")
		if err := dial(timeout(t), here, nowhere, l.Addr(), qp.CMParams{}); !errors.Is(err, verbs.ErrUnreachable) || !strings.Contains(err.Error(), "none of this software NIC's") {
			t.Errorf("from nowhere: %v", err)
		}
		if _, err := qp.Listen(there.ctx, netip.AddrPortFrom(nowhere, 0), 0); !errors.Is(err, verbs.ErrUnreachable) {
			t.Errorf("at nowhere: %v", err)
		}
		if _, err := qp.Listen(there.ctx, l.Addr(), 0); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("the same port: %v", err)
		}
		if _, err := qp.Listen(here.ctx, netip.AddrPortFrom(to, 0), 0); !errors.Is(err, verbs.ErrUnreachable) || !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "4791") {
			t.Errorf("another NIC has the UDP port: %v", err)
		}
		// Of two requests one finds no room; the other ends with the listener, whose program has not answered.
		ends := make(chan error, 2)
		for range 2 {
			go func() { ends <- dial(timeout(t), here, from, l.Addr(), qp.CMParams{}) }()
		}
		err = <-ends
		if _, byProgram := qp.RejectData(err); byProgram || !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(err.Error(), "waiting") {
			t.Errorf("the request without room: %v", err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		err = <-ends
		if _, byProgram := qp.RejectData(err); !byProgram || !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("the request that waited: %v", err)
		}
	})
}

// A listener on no certain address takes requests for all that the NIC can have. Answers that are too long are refused here.
func TestCMSoftWildcard(t *testing.T) {
	onlySoft(t, func(t *testing.T, here, there *cmNode, from, to netip.Addr) {
		// The one who dials is there first: its address is not among them.
		cmListen(t, here, from).Close()
		l, err := qp.Listen(there.ctx, netip.AddrPortFrom(netip.IPv4Unspecified(), 0), 0)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		for _, answer := range []func(r *qp.Request) error{
			func(r *qp.Request) error { return r.Reject(make([]byte, 149)) },
			func(r *qp.Request) error {
				q := must(there.ready())
				_, err := r.Accept(timeout(t), q, qp.CMParams{PrivateData: make([]byte, 197)})
				return errors.Join(err, q.Close())
			},
		} {
			done := make(chan error, 1)
			go func() {
				r, err := l.Accept(timeout(t))
				if err == nil {
					if r.LocalAddr() != netip.AddrPortFrom(to, l.Addr().Port()) || r.RemoteAddr().Addr() != from {
						t.Errorf("from %v to %v", r.RemoteAddr(), r.LocalAddr())
					}
					err = answer(r)
				}
				done <- err
			}()
			q := must(here.ready())
			_, err := q.Dial(timeout(t), netip.AddrPortFrom(from, 0), netip.AddrPortFrom(to, l.Addr().Port()), qp.CMParams{})
			if _, ok := qp.RejectData(err); !ok {
				t.Errorf("dialled: %v", err)
			}
			if err := <-done; err == nil || !strings.Contains(err.Error(), "private data of") {
				t.Errorf("answered: %v", err)
			}
			if err := q.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

// Nobody is at the address: the dialler gives up, and says so.
func TestCMSoftUnreachable(t *testing.T) {
	onlySoft(t, func(t *testing.T, here, there *cmNode, from, to netip.Addr) {
		if testing.Short() || os.Getenv("RINGSIDE_SOFT_FAULTS") != "" {
			t.Skip("it takes 7 s, once")
		}
		q := must(here.ready())
		_, err := q.Dial(timeout(t), netip.AddrPort{}, netip.MustParseAddrPort("10.97.0.2:1"), qp.CMParams{})
		if !errors.Is(err, verbs.ErrUnreachable) || !strings.Contains(err.Error(), "does not answer") {
			t.Errorf("%v", err)
		}
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	})
}
