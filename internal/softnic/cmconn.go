package softnic

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/cm"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The connection manager of the software NIC: driver.ConnManager, by the InfiniBand connection manager's own protocol (package cm)
// between queue pairs 1. What has to be done to queue pairs is done here.

// A cmConn is a connection, or an attempt at one. It implements driver.CMConn, and hears from package cm what becomes of it.
type cmConn struct {
	nic           *NIC
	port          *netPort
	c             *cm.Conn       // used with port.mu held
	local, remote netip.AddrPort // the programs' addresses
	listener      *cmListener    // that it waits at, if it does
	data          []byte

	replied   chan *roce.REP // has room for the one that there can be
	confirmed chan struct{}  // closed when the peer has confirmed
	ended     chan struct{}  // closed when it is over
	endErr    error          // why; written before ended is closed
	done      chan struct{}  // closed behind ended, when the queue pair is in Err
	endOnce   sync.Once

	mu    sync.Mutex // a leaf
	q     *QP        // guarded by mu, and set before the connection is handed out: what is, or is being, connected
	epoch uint32     // likewise: the QP's. One that is reset is not of this connection any more
}

func newCMConn(n *NIC, p *netPort) *cmConn {
	return &cmConn{nic: n, port: p, replied: make(chan *roce.REP, 1), confirmed: make(chan struct{}), ended: make(chan struct{}), done: make(chan struct{})}
}

// Replied, Established and Ended implement cm.Handler. They are called with port.mu held.
func (n *cmConn) Replied(m *roce.REP) { n.replied <- m }
func (n *cmConn) Established()        { close(n.confirmed) }

// Resolved implements cm.Handler, which asks for no datagrams.
func (n *cmConn) Resolved(*roce.SIDRREP) {}

func (n *cmConn) Ended(err error) {
	n.endOnce.Do(func() {
		n.endErr = err
		close(n.ended)
		if n.listener != nil {
			n.listener.drop(n)
		}
		if n.nic.work.put(n.finish) < 0 { // the NIC is closed
			close(n.done)
		}
	})
}

// finish is called after the end of the connection.
func (n *cmConn) finish() {
	n.failQP()
	close(n.done)
}

// failQP moves the queue pair to Err, if there is one by now, and it was not reset since.
func (n *cmConn) failQP() {
	n.mu.Lock()
	q, epoch := n.q, n.epoch
	n.mu.Unlock()
	if q != nil {
		q.toErrorIn(epoch, 0, false)
	}
}

// CMDial implements driver.ConnManager.
func (n *NIC) CMDial(ctx context.Context, dq driver.QP, src, dst netip.AddrPort, p *driver.CMParam) (driver.CMConn, error) {
	q, err := n.connectable(dq)
	if err != nil {
		return nil, err
	}
	from, to := src.Addr().Unmap(), netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	switch {
	case !to.IsValid() || to.Port() == 0 || to.Addr().IsUnspecified() || to.Addr().IsMulticast():
		return nil, fmt.Errorf("%v cannot be dialled", dst)
	case !from.IsValid() || from.IsUnspecified():
		if from, err = routeTo(to); err != nil {
			return nil, fmt.Errorf("%w: %w", driver.ErrUnreachable, err)
		}
	case from.Is4() != to.Addr().Is4():
		return nil, fmt.Errorf("%w: there is no way from %v to %v", driver.ErrUnreachable, from, to.Addr())
	}
	port, index, err := n.cmPort(from)
	if err != nil {
		return nil, err
	}
	conn := newCMConn(n, port)
	if err := conn.dial(ctx, q, index, src.Port(), to, p); err != nil {
		return nil, err
	}
	return conn, nil
}

// routeTo returns the address that the system would send from.
func routeTo(to netip.AddrPort) (netip.Addr, error) {
	c, err := net.Dial("udp", to.String()) // which sends nothing
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}

func (n *cmConn) dial(ctx context.Context, q *QP, gid int, port uint16, to netip.AddrPort, p *driver.CMParam) error {
	if err := q.cmInit(ctx, p); err != nil {
		return err
	}
	psn, mtu := randomPSN(), wireMTU(n.port.mtu)
	err := n.port.manage(func(e *cm.Engine, now time.Duration) (err error) {
		m := cmParams(q, p, psn)
		m.RetryCount, m.MTU = p.RetryCount, mtu
		if n.c, err = e.Connect(now, port, to, m, n); err == nil {
			n.local, n.remote = n.c.LocalAddr(), n.c.RemoteAddr()
		}
		return err
	})
	if err != nil {
		return err
	}
	var reply *roce.REP
	select {
	case reply = <-n.replied:
	case <-n.ended:
		return n.endErr
	case <-ctx.Done():
		n.abandon()
		return ctx.Err()
	}
	n.data = reply.Private[:]
	a := cmAttr{gid: gid, mtu: mtu, rqPSN: psn, peer: to.Addr(), peerQPN: reply.QPN, sqPSN: reply.StartingPSN, retryCount: p.RetryCount, rnrRetry: reply.RNRRetryCount,
		responder: reply.InitiatorDepth, initiator: reply.ResponderResources}
	ready := false
	if err = n.connect(ctx, q, p, &a); err != nil {
		n.abandon()
	} else {
		n.port.manage(func(*cm.Engine, time.Duration) error {
			ready = n.c.Ready()
			return nil
		})
	}
	if over := n.overBefore(ready); over != nil {
		err = over
	}
	if err != nil {
		n.failQP()
	}
	return err
}

// overBefore returns why there was no connection, although the peer has replied: finish may have found no queue pair yet, or one that
// was not connected. One that was ready, and that the peer has ended since, there was.
func (n *cmConn) overBefore(ready bool) error {
	select {
	case <-n.ended:
		if !ready || !errors.Is(n.endErr, cm.ErrDisconnected) {
			return n.endErr
		}
	default:
	}
	return nil
}

// cmParams is what this side says.
func cmParams(q *QP, p *driver.CMParam, psn ib.PSN) *cm.Params {
	return &cm.Params{QPN: q.qpn, PSN: psn, ResponderResources: p.MaxDestRdAtomic, InitiatorDepth: p.MaxRdAtomic, RNRRetry: p.RNRRetry, SRQ: p.SRQ,
		VendorID: cm.Vendor, VendorOptions: cm.OptionSelective, Private: p.PrivateData}
}

func randomPSN() ib.PSN {
	var b [4]byte
	rand.Read(b[:]) // never fails
	return ib.PSN(binary.LittleEndian.Uint32(b[:])) & ib.MaxPSN
}

// connectable returns the queue pair, if it is one that can be connected in the state that it is in.
func (n *NIC) connectable(dq driver.QP) (*QP, error) {
	q, ok := dq.(*QP)
	if !ok || q.nic != n {
		return nil, errors.New("the queue pair belongs to another context")
	}
	if q.typ != ib.RC {
		return nil, fmt.Errorf("only RC queue pairs are connected so: %w", errors.ErrUnsupported)
	}
	now, err := q.Query()
	if err == nil && now.State != ib.Reset && now.State != ib.Init {
		err = fmt.Errorf("%w, and has to be in RESET or INIT to be connected", driver.StateErr(now.State))
	}
	return q, err
}

// cmInit takes q to Init.
func (q *QP) cmInit(ctx context.Context, p *driver.CMParam) error {
	now, err := q.Query()
	if err != nil {
		return err
	}
	mask := ib.AttrState | ib.AttrPKeyIndex | ib.AttrPort | ib.AttrAccess | ib.AttrCurState
	if now.State == ib.Init && p.Access == 0 {
		mask &^= ib.AttrAccess
	}
	return q.Modify(ctx, &ib.QPAttr{State: ib.Init, CurState: now.State, Port: 1, Access: p.Access}, mask)
}

// cmAttr is what both sides have agreed on.
type cmAttr struct {
	gid                  int
	mtu                  ib.MTU
	rqPSN, sqPSN         ib.PSN
	peer                 netip.Addr
	peerQPN              uint32
	retryCount, rnrRetry uint8
	responder, initiator uint8 // the peer's: READs and atomics that this side may be asked for, and may ask for
}

// connect takes q from Init to RTS.
func (n *cmConn) connect(ctx context.Context, q *QP, p *driver.CMParam, a *cmAttr) error {
	n.mu.Lock()
	n.q, n.epoch = q, q.epoch.Load()
	n.mu.Unlock()
	rtr := &ib.QPAttr{State: ib.RTR, CurState: ib.Init, PathMTU: a.mtu, DestQPN: ib.QPN(a.peerQPN), RQPSN: a.rqPSN, MinRNRTimer: p.MinRNRTimer,
		MaxDestRdAtomic: min(p.MaxDestRdAtomic, a.responder), AH: ib.AHAttr{DGID: ib.GIDFromAddr(a.peer), SGIDIndex: a.gid, HopLimit: 64, Port: 1}}
	rts := &ib.QPAttr{State: ib.RTS, CurState: ib.RTR, SQPSN: a.sqPSN, RetryCount: a.retryCount, RNRRetry: a.rnrRetry, MaxRdAtomic: min(p.MaxRdAtomic, a.initiator)}
	n.port.mu.Lock()
	rtr.AH.UDPPort = n.c.UDPPort(n.c.Selective())
	rts.AckTimeout = n.c.AckTimeout()
	n.port.unlock()
	err := q.Modify(ctx, rtr, ib.AttrState|ib.AttrCurState|ib.AttrAV|ib.AttrPathMTU|ib.AttrDestQPN|ib.AttrRQPSN|ib.AttrMaxDestRdAtomic|ib.AttrMinRNRTimer)
	if err == nil {
		err = q.Modify(ctx, rts, ib.AttrState|ib.AttrCurState|ib.AttrSQPSN|ib.AttrAckTimeout|ib.AttrRetryCount|ib.AttrRNRRetry|ib.AttrMaxRdAtomic)
	}
	return err
}

// abandon gives it up, whatever has become of it.
func (n *cmConn) abandon() {
	n.port.manage(func(_ *cm.Engine, now time.Duration) error {
		n.c.Abandon(now)
		return nil
	})
}

func (n *cmConn) PrivateData() []byte        { return n.data }
func (n *cmConn) LocalAddr() netip.AddrPort  { return n.local }
func (n *cmConn) RemoteAddr() netip.AddrPort { return n.remote }
func (n *cmConn) Done() <-chan struct{}      { return n.done }

// Err implements driver.CMConn.
func (n *cmConn) Err() error {
	select {
	case <-n.done:
		return n.endErr
	default:
		return nil
	}
}

// Disconnect implements driver.CMConn.
func (n *cmConn) Disconnect() error {
	select {
	case <-n.ended:
		return nil
	default:
	}
	n.failQP()
	return n.port.manage(func(_ *cm.Engine, now time.Duration) error {
		n.c.Disconnect(now)
		return nil
	})
}

// Close implements driver.CMConn. The peer goes on being told in the background.
func (n *cmConn) Close() error {
	err := n.Disconnect()
	n.abandon()
	n.Ended(cm.ErrDisconnected)
	<-n.done
	return err
}

// A cmRequest is a cmConn that the peer has asked for. It implements driver.CMRequest.
type cmRequest cmConn

// PrivateData implements driver.CMRequest.
func (r *cmRequest) PrivateData() []byte        { return r.c.REQ().Private[roce.IPHelloLen:] }
func (r *cmRequest) LocalAddr() netip.AddrPort  { return r.local }
func (r *cmRequest) RemoteAddr() netip.AddrPort { return r.remote }

// Accept implements driver.CMRequest.
func (r *cmRequest) Accept(ctx context.Context, dq driver.QP, p *driver.CMParam) (driver.CMConn, error) {
	n := (*cmConn)(r)
	err := n.accept(ctx, dq, p)
	if err != nil {
		n.abandon()
		return nil, err
	}
	return n, nil
}

func (n *cmConn) accept(ctx context.Context, dq driver.QP, p *driver.CMParam) error {
	q, err := n.nic.connectable(dq)
	if err != nil {
		return err
	}
	if err := q.cmInit(ctx, p); err != nil {
		return err
	}
	m := n.c.REQ()
	a := cmAttr{gid: n.nic.gids.indexOf(n.local.Addr()), mtu: m.MTU, rqPSN: randomPSN(), sqPSN: m.StartingPSN, peer: n.remote.Addr(), peerQPN: m.QPN,
		retryCount: m.RetryCount, rnrRetry: m.RNRRetryCount, responder: m.InitiatorDepth, initiator: m.ResponderResources}
	if a.gid == 0 {
		return fmt.Errorf("%w: the address %v that was dialled has gone", driver.ErrUnreachable, n.local.Addr())
	}
	if err := n.connect(ctx, q, p, &a); err != nil {
		n.failQP()
		return err
	}
	err = n.port.manage(func(_ *cm.Engine, now time.Duration) error {
		c := cmParams(q, p, a.rqPSN)
		c.ResponderResources, c.InitiatorDepth = min(c.ResponderResources, m.InitiatorDepth), min(c.InitiatorDepth, m.ResponderResources)
		if !n.c.Selective() {
			c.VendorID, c.VendorOptions = 0, 0
		}
		return n.c.Accept(now, c)
	})
	if err == nil {
		select {
		case <-n.confirmed:
			return nil
		case <-n.ended:
			if errors.Is(n.endErr, cm.ErrDisconnected) { // there was a connection: the peer has ended it. Its confirmation may be lost
				return nil
			}
			err = n.endErr
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	n.failQP()
	return err
}

// Reject implements driver.CMRequest.
func (r *cmRequest) Reject(privateData []byte) error {
	return r.port.manage(func(_ *cm.Engine, now time.Duration) error { return r.c.Reject(now, roce.RejectConsumer, privateData) })
}

// Close implements driver.CMRequest.
func (r *cmRequest) Close() error {
	(*cmConn)(r).abandon()
	return nil
}
