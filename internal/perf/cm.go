package perf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/ringside-rdma/ringside/internal/cmaddr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
)

// Queue pairs of devices that only a connection manager connects (iWARP): as over TCP, the server listens for one test, and the client
// makes a connection for each of its queue pairs, one after the other, which carries the queue pair's number and PSN. A message that comes
// before the server's side of a connection is ready may lie there until another one comes (siw), so the client asks for a mark before its
// first.

// cmListen listens where a client that talks to near can reach the device.
func cmListen(v *verbs.Context, near netip.Addr) (*qp.Listener, error) {
	a, err := cmaddr.Of(v, near)
	if err != nil {
		return nil, err
	}
	return qp.Listen(v, netip.AddrPortFrom(a, 0), 0)
}

// acceptCM connects every queue pair to the one of peer's that dials.
func (s *side) acceptCM(ctx context.Context, l *qp.Listener, peer *endpoint) error {
	return s.connectEach(peer, func(i int) error {
		head := peer.qps[i].streamHead()
		for {
			r, err := l.Accept(ctx)
			if err == nil && !bytes.HasPrefix(r.PrivateData(), head[:]) {
				_ = r.Reject(nil) // a stranger
				continue
			}
			if err == nil {
				s.lanes[i].cm, err = r.Accept(ctx, s.lanes[i].q, qp.CMParams{})
			}
			if errors.Is(err, context.Canceled) {
				return errHalted
			}
			return err
		}
	})
}

// dialCM connects every queue pair to where peer listens. near is the address at which the peer's host has found this one.
func (s *side) dialCM(ctx context.Context, v *verbs.Context, peer, local *endpoint, near netip.Addr) error {
	to, err := netip.ParseAddrPort(peer.service)
	if err != nil {
		return fmt.Errorf("the server's device is not connected by a connection manager, as %s has to be: choose devices of one kind", v.Name())
	}
	if near.Is4() != to.Addr().Is4() {
		near = to.Addr()
	}
	from, err := cmaddr.Of(v, near)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	return s.connectEach(peer, func(i int) (err error) {
		head := local.qps[i].streamHead()
		s.lanes[i].cm, err = s.lanes[i].q.Dial(ctx, netip.AddrPortFrom(from, 0), to, qp.CMParams{PrivateData: head[:]})
		return err
	})
}
