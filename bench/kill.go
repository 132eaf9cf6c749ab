package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A peer that is killed: how long it takes until the survivor's queue pair flushes what was posted, and until a connection of package
// transport is over. The survivor sleeps meanwhile.

// killTest kills so many peers, one after the other.
type killTest struct{ kills int }

// killPeer is where a process's queue pair is, and where it listens for a connection.
type killPeer struct {
	GID  ib.GID
	QPN  ib.QPN
	PSN  ib.PSN
	Addr string
}

// killEnd is a queue pair with memory, on the software NIC.
type killEnd struct {
	device *verbs.Context
	pd     *verbs.PD
	mem    *mr.MR
	ch     *verbs.CompChannel
	cq     *verbs.CQ
	q      *qp.QP
	self   killPeer
}

func newKillEnd(ctx context.Context, device *verbs.Context) (e *killEnd, err error) {
	e = &killEnd{device: device}
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	if e.pd, err = device.AllocPD(); err != nil {
		return e, err
	}
	if e.mem, err = mr.Alloc(e.pd, 4096, ib.AccessLocalWrite); err != nil {
		return e, err
	}
	if e.ch, err = device.NewCompChannel(); err != nil {
		return e, err
	}
	if e.cq, err = device.NewCQ(verbs.CQConfig{Channel: e.ch}); err != nil {
		return e, err
	}
	if e.q, err = qp.New(e.pd, &qp.Config{Type: ib.RC, SendCQ: e.cq}); err != nil {
		return e, err
	}
	if err = e.q.Init(ctx, 1, 0); err != nil {
		return e, err
	}
	gids, err := device.GIDs(1)
	if err != nil {
		return e, err
	}
	e.self = killPeer{GID: gids[0].GID, QPN: e.q.QPN(), PSN: qp.RandomPSN()}
	return e, e.receive()
}

func (e *killEnd) connect(ctx context.Context, to killPeer) error {
	return e.q.Connect(ctx, qp.ConnectParams{Remote: qp.Endpoint{GID: to.GID, QPN: to.QPN, PSN: to.PSN}, LocalPSN: e.self.PSN})
}

func (e *killEnd) receive() error {
	_, err := e.q.PostRecv([]ib.RecvWR{{SGEs: []ib.SGE{e.mem.SGE(0, 64)}}})
	return err
}

// wait sleeps until there is a completion.
func (e *killEnd) wait(ctx context.Context) (ib.WC, error) {
	var wc [1]ib.WC
	for {
		if err := e.cq.Arm(false); err != nil {
			return wc[0], err
		}
		if n, err := e.cq.Poll(wc[:]); n > 0 || err != nil {
			return wc[0], err
		}
		if _, err := e.ch.Wait(ctx); err != nil {
			return wc[0], err
		}
	}
}

func (e *killEnd) close() error {
	var errs []error
	if e.q != nil {
		errs = append(errs, e.q.Close())
	}
	if e.cq != nil {
		errs = append(errs, e.cq.Close())
	}
	if e.ch != nil {
		errs = append(errs, e.ch.Close())
	}
	if e.mem != nil {
		errs = append(errs, e.mem.Close())
	}
	if e.pd != nil {
		errs = append(errs, e.pd.Close())
	}
	return errors.Join(errs...)
}

// killed is the process that is killed: it connects a queue pair and takes a connection.
func killed(raw json.RawMessage) error {
	var peer killPeer
	if err := json.Unmarshal(raw, &peer); err != nil {
		return err
	}
	ctx := context.Background()
	device, err := verbs.Open("soft0")
	if err != nil {
		return err
	}
	e, err := newKillEnd(ctx, device)
	if err != nil {
		return err
	}
	if err := e.connect(ctx, peer); err != nil {
		return err
	}
	l, err := transport.Listen(ctx, "127.0.0.1:0", &transport.Config{Device: "soft0"})
	if err != nil {
		return err
	}
	e.self.Addr = l.Addr().String()
	say("peer", e.self)
	c, err := l.Accept(ctx)
	if err != nil {
		return err
	}
	c.SetHandler(echoBack{})
	if _, err := e.q.PostSend([]ib.SendWR{{Opcode: ib.OpSend, SGEs: []ib.SGE{e.mem.SGE(0, 8)}}}); err != nil {
		return err
	}
	for range childStdin {
	}
	return nil
}

func (t killTest) run(*config) (values, error) {
	device, err := verbs.Open("soft0")
	if err != nil {
		return nil, err
	}
	defer device.Close()
	var flush, done series
	for range t.kills {
		f, d, err := killOne(device)
		if err != nil {
			return nil, err
		}
		flush, done = append(flush, f.Seconds()*1e3), append(done, d.Seconds()*1e3)
	}
	return values{"flush_p50": flush.median(), "flush_max": slices.Max(flush), "done_p50": done.median(), "done_max": slices.Max(done)}, nil
}

// killOne returns how long after the kill the queue pair flushes, and the connection is over.
func killOne(device *verbs.Context) (flush, done time.Duration, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	e, err := newKillEnd(ctx, device)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, e.close()) }()
	p, err := start("killed", e.self)
	if err != nil {
		return 0, 0, err
	}
	defer p.stop()
	var peer killPeer
	if err := p.expect("peer", &peer, 20*time.Second); err != nil {
		return 0, 0, err
	}
	if err := e.connect(ctx, peer); err != nil {
		return 0, 0, err
	}
	c, err := transport.Dial(ctx, peer.Addr, &transport.Config{Device: "soft0"})
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	// Both work, and have something to end.
	if err := c.Send(ctx, []byte("alive")); err != nil {
		return 0, 0, err
	}
	if err := c.Recv(ctx, func(*transport.Message) error { return nil }); err != nil {
		return 0, 0, err
	}
	if wc, err := e.wait(ctx); err != nil || wc.Status != ib.WCSuccess {
		return 0, 0, fmt.Errorf("the peer's message: %v: %w", wc.Status, err)
	}
	if err := e.receive(); err != nil {
		return 0, 0, err
	}
	type ended struct {
		after time.Duration
		err   error
	}
	flushed := make(chan ended, 1)
	begin := time.Now()
	if err := p.cmd.Process.Kill(); err != nil {
		return 0, 0, err
	}
	go func() {
		wc, err := e.wait(ctx)
		if err == nil && wc.Status != ib.WCFlushErr {
			err = fmt.Errorf("a receive ends with %v after the peer's death", wc.Status)
		}
		flushed <- ended{time.Since(begin), err}
	}()
	select {
	case <-c.Done():
		done = time.Since(begin)
	case <-ctx.Done():
		return 0, 0, fmt.Errorf("the connection does not end: %w", ctx.Err())
	}
	f := <-flushed
	return f.after, done, f.err
}
