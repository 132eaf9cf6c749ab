package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// cmSide is what rping and ucmatose have in common: a side of connections that the system's connection manager makes.
type cmSide struct {
	remote string // server to dial; empty: be the server
	local  string // server: address to listen on, empty for all; client: the one to dial from, empty for what routing says
	port   int    // to listen on, 0 for any, or to dial
	device string
	events bool

	out       io.Writer               // what is verbose is printed here; nil: nowhere
	listening func(at netip.AddrPort) // called when a server takes connections; nil: nobody is
}

// usable returns why the options cannot be used, or nil.
func (o *cmSide) usable() error {
	if o.remote != "" && o.port == 0 {
		return errors.New("port 0 cannot be dialled")
	}
	return usable(o.port, cmPort)
}

// cmPort is the port of the device. The connection manager would find another, but all devices here have one.
const cmPort = 1

// lookUp returns the first IP address of a host, which may be one.
func lookUp(ctx context.Context, host string) (netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return a, nil
	}
	l, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return netip.Addr{}, err
	}
	return l[0].Unmap(), nil // there is one if there is no error
}

// listen listens where the options say. The listener is added to objects.
func (o *cmSide) listen(ctx context.Context, dev *verbs.Context, backlog int, objects *closers) (*qp.Listener, error) {
	a := netip.IPv4Unspecified()
	if o.local != "" {
		var err error
		if a, err = lookUp(ctx, o.local); err != nil {
			return nil, err
		}
	}
	l, err := qp.Listen(dev, netip.AddrPortFrom(a, uint16(o.port)), backlog)
	if err != nil {
		return nil, err
	}
	objects.add(l)
	if o.listening != nil {
		o.listening(l.Addr())
	}
	return l, nil
}

// A link is a queue pair with a completion queue of its own, and its connection, nil before it is there.
type link struct {
	done *completions
	qp   *qp.QP
	conn *qp.CMConn
}

// newLink makes a link whose receives can be posted. cfg is without queues; access is what the peer may do. What is made is
// added to objects.
func (o *cmSide) newLink(ctx context.Context, pd *verbs.PD, cfg qp.Config, access ib.Access, objects *closers) (
	*link, error) {
	done, err := newCompletions(pd.Context(), cfg.SendDepth+cfg.RecvDepth, o.events, objects)
	if err != nil {
		return nil, err
	}
	cfg.SendCQ = done.cq
	q, err := qp.New(pd, &cfg)
	if err != nil {
		return nil, err
	}
	objects.add(q)
	if err := q.Init(ctx, cmPort, access); err != nil {
		return nil, err
	}
	return &link{done: done, qp: q}, nil
}

// A linkMaker makes a link with its receives posted, and adds to objects what it makes. It may be called again after that was
// closed.
type linkMaker func(objects *closers) (*link, error)

// accept waits for a client and connects a link with it. Everything is added to objects.
func (o *cmSide) accept(ctx context.Context, l *qp.Listener, open linkMaker, p qp.CMParams, objects *closers) (
	*link, error) {
	r, err := l.Accept(ctx)
	if err != nil {
		return nil, fmt.Errorf("waiting for a client: %w", err)
	}
	defer r.Close()
	if err := noPrivateData(r.PrivateData()); err != nil {
		return nil, err
	}
	n, err := open(objects)
	if err != nil {
		return nil, err
	}
	if n.conn, err = r.Accept(ctx, n.qp, p); err != nil {
		return nil, err
	}
	objects.add(n.conn)
	return n, nil
}

// dialPause is between two tries to dial.
const dialPause = 20 * time.Millisecond

// dial connects a link with the server, and waits for one that does not listen yet as long as the other dial does. Everything
// is added to objects.
func (o *cmSide) dial(ctx context.Context, open linkMaker, p qp.CMParams, objects *closers) (*link, error) {
	a, err := lookUp(ctx, o.remote)
	if err != nil {
		return nil, err
	}
	to := netip.AddrPortFrom(a, uint16(o.port))
	var from netip.AddrPort
	if o.local != "" {
		if a, err = lookUp(ctx, o.local); err != nil {
			return nil, err
		}
		from = netip.AddrPortFrom(a, 0)
	}
	deadline := time.Now().Add(dialPatience)
	for {
		// A queue pair that was refused may be in any state, and its receives in its completion queue: each try has its own.
		var own closers
		n, err := open(&own)
		if err == nil {
			n.conn, err = n.qp.Dial(ctx, from, to, p)
		}
		if err == nil {
			own.add(n.conn)
			*objects = append(*objects, own...)
			return n, noPrivateData(n.conn.PrivateData())
		}
		_, byProgram := qp.RejectData(err)
		own.closeAll(&err)
		if !errors.Is(err, syscall.ECONNREFUSED) || byProgram || time.Now().After(deadline) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(dialPause):
		}
	}
}

// noPrivateData fails if there is something in what the peer has sent along with its request or answer: the programs send
// nothing. Zeros are the message's, which has a fixed length on InfiniBand and RoCE.
func noPrivateData(b []byte) error {
	if len(bytes.Trim(b, "\x00")) > 0 {
		return fmt.Errorf("private data that the peer cannot have sent: %x", b)
	}
	return nil
}

// over waits for the end of the connection, which one of the sides has disconnected.
func (n *link) over(ctx context.Context) error {
	select {
	case <-n.conn.Done():
	case <-ctx.Done():
		return fmt.Errorf("waiting for the end of the connection: %w", ctx.Err())
	}
	if err := n.conn.Err(); errors.Is(err, verbs.ErrDeviceRemoved) {
		return err
	}
	return nil
}

// disconnect ends the connection, and waits until the peer has agreed.
func (n *link) disconnect(ctx context.Context) error {
	if err := n.conn.Disconnect(); err != nil {
		return err
	}
	return n.over(ctx)
}
