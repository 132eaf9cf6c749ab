package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/ringside-rdma/ringside/examples/internal/device"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/rpc"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A worker has two connections to the server. Calls go over the one; the other, whose private data is a token that the
// worker has made up, carries one-sided operations and their immediate values only, and its end is the worker's death.
const (
	tokenBytes = 16

	methodDescribe = "paramserver/Describe"
	methodJoin     = "paramserver/Join"
	methodNext     = "paramserver/Next"
	methodReport   = "paramserver/Report"

	endPatience = 10 * time.Second // for workers to report and leave after the last epoch
)

// linkPatience is how long a join waits for its data connection to be accepted, and a data connection for its join.
var linkPatience = 5 * time.Second // a variable for tests

// server is the parameter server: a coordinator with connections.
type server struct {
	cfg    trainConfig
	coord  *coordinator
	rpc    *rpc.Server
	board  *mr.MR
	slots  *mr.MR
	out    io.Writer
	ctx    context.Context // of run
	wg     sync.WaitGroup
	pushes chan push // from the polling goroutine to the one that trains

	mu     sync.Mutex
	linked chan struct{}        // closed and replaced when a data connection comes
	links  map[string]*dataLink // by token
	closed bool
	lost   int
	last   epochStat
	totals totals
}

// push is the announcement of a gradient.
type push struct {
	from *dataLink
	low  uint32 // bits of its number
}

// dataLink is a worker's data connection.
type dataLink struct {
	s     *server
	conn  *transport.Conn
	token string
	m     *member            // nil before the join; guarded by server.mu
	lent  []*transport.Grant // guarded by server.mu
}

// totals is what the workers have reported.
type totals struct {
	pulls, pushes  *hdrhistogram.Histogram
	pulled, pushed uint64 // bytes
	torn, waits    uint64
	devices, paths []string
}

// newHistogram is of nanoseconds, up to ten seconds.
func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(1, int64(10*time.Second), 3) }

// serve runs a server on addr until training is over, and prints its report; the last line is for machines. ready is
// told the address.
func serve(ctx context.Context, addr string, opts *device.Options, cfg trainConfig, out io.Writer, ready func(net.Addr)) (err error) {
	if err := cfg.check(); err != nil {
		return err
	}
	train, heldOut, err := loadDigits()
	if err != nil {
		return err
	}
	dev, err := opts.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	s := &server{
		cfg: cfg, out: out, rpc: rpc.NewServer(&rpc.ServerConfig{MaxConcurrent: 2 * maxSlots}),
		pushes: make(chan push, 4*maxSlots), linked: make(chan struct{}), links: map[string]*dataLink{},
		totals: totals{pulls: newHistogram(), pushes: newHistogram()},
	}
	if s.board, err = mr.Alloc(dev.PD(), boardBytes, ib.AccessLocalWrite|ib.AccessRemoteRead|ib.AccessMWBind); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.board.Close()) }()
	if s.slots, err = mr.Alloc(dev.PD(), maxSlots*slotBytes, ib.AccessLocalWrite|ib.AccessRemoteWrite|ib.AccessMWBind); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.slots.Close()) }()
	s.coord = newCoordinator(cfg, len(train), heldOut, s.board.Bytes(), s.slots.Bytes(), s.epochDone)
	rpc.Handle(s.rpc, methodDescribe, s.describe)
	rpc.Handle(s.rpc, methodJoin, s.join)
	rpc.Handle(s.rpc, methodNext, s.next)
	rpc.Handle(s.rpc, methodReport, s.report)

	l, err := transport.Listen(ctx, addr, dev.Config("paramserver"))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	s.ctx = ctx
	s.wg.Go(func() { s.accept(l) })
	s.wg.Go(s.train)
	s.printf("%d parameters; %d digits to train on, %d held out; %s, batches of %d, %d workers\n",
		paramCount, len(train), len(heldOut), cfg.modeText(), cfg.batch, cfg.workers)
	ready(l.Addr())

	err = s.wait(ctx)
	cancel()
	err = errors.Join(err, l.Close())
	s.rpc.Close()
	s.mu.Lock()
	s.closed = true
	for _, d := range s.links {
		d.conn.Abort(errors.New("the server is going down"))
	}
	s.mu.Unlock()
	s.wg.Wait() // connections are closed: nobody reaches the regions any more
	if err != nil {
		return err
	}
	s.summary()
	return nil
}

func (c *trainConfig) modeText() string {
	if c.sync {
		return "synchronous"
	}
	return fmt.Sprintf("bounded staleness of %d", c.staleness)
}

func (s *server) printf(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintf(s.out, format, args...)
}

// accept takes connections of both kinds.
func (s *server) accept(l *transport.Listener) {
	for {
		c, err := l.Accept(s.ctx)
		if err != nil {
			return // closed
		}
		token := c.Peer().PrivateData
		if len(token) == 0 {
			s.wg.Go(func() { s.rpc.ServeConn(s.ctx, c) })
			continue
		}
		d := &dataLink{s: s, conn: c, token: string(token)}
		s.mu.Lock()
		fine := len(token) == tokenBytes && !s.closed && s.links[d.token] == nil && len(s.links) < maxSlots
		if fine {
			s.links[d.token] = d
			close(s.linked)
			s.linked = make(chan struct{})
		}
		s.mu.Unlock()
		if fine {
			c.SetHandler(d)
		} else {
			c.Abort(errors.New("not a token of a new worker, or too many workers"))
		}
		s.wg.Go(func() {
			select {
			case <-c.Done(): // told of every end, kill -9 included
			case <-time.After(linkPatience):
				s.expectJoined(d)
				<-c.Done()
			}
			s.unlink(d)
		})
	}
}

// expectJoined ends a data connection that nobody has joined with, which would keep its place from workers for good.
func (s *server) expectJoined(d *dataLink) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d.m == nil {
		d.conn.Abort(errors.New("nobody has joined with this data connection"))
	}
}

// HandleMessage implements transport.Handler: the immediate value of a push.
func (d *dataLink) HandleMessage(c *transport.Conn, m *transport.Message) {
	imm, ok := m.Imm()
	if ok {
		select {
		case d.s.pushes <- push{d, imm}:
			return
		default: // no worker that waits for its turn gets here
		}
	}
	c.Abort(errors.New("a data connection carries one gradient at a time, and nothing else"))
}

// HandleClose implements transport.Handler; accept waits for the end in another way.
func (d *dataLink) HandleClose(*transport.Conn, error) {}

// unlink forgets a data connection that has ended, and with it the worker.
func (s *server) unlink(d *dataLink) {
	s.mu.Lock()
	if s.links[d.token] == d {
		delete(s.links, d.token)
	}
	m, lent := d.m, d.lent
	d.m, d.lent = nil, nil
	s.mu.Unlock()
	if m != nil {
		over, _ := s.coord.done()
		s.coord.leave(m)
		left := s.coord.memberCount()
		s.mu.Lock()
		if !over && !s.closed {
			s.lost++
			fmt.Fprintf(s.out, "worker %d is gone (%v); %d left\n", m.id, d.conn.Err(), left)
		}
		s.mu.Unlock()
	}
	for _, g := range lent {
		g.Revoke(context.Background()) // frees the window; the access has ended with the connection
	}
	d.conn.Close()
}

// train applies gradients as they are announced.
func (s *server) train() {
	for {
		select {
		case p := <-s.pushes:
			s.mu.Lock()
			m, gone := p.from.m, s.links[p.from.token] != p.from
			s.mu.Unlock()
			if gone {
				continue // overtaken by its worker's death
			}
			err := errors.New("a gradient came before its worker had joined")
			if m != nil {
				err = s.coord.pushed(m, p.low)
			}
			if err != nil {
				s.printf("cutting a worker off: %v\n", err)
				p.from.conn.Abort(err)
			}
		case <-s.ctx.Done():
			return
		}
	}
}

func (s *server) describe(context.Context, *DescribeRequest) (*DescribeReply, error) {
	return &DescribeReply{
		Epochs: uint32(s.cfg.epochs), Sync: s.cfg.sync, Staleness: uint32(s.cfg.staleness), Workers: uint32(s.cfg.workers),
		Batch: uint32(s.cfg.batch), Seed: s.cfg.seed, Parameters: paramCount,
	}, nil
}

// link finds a data connection by its token, and waits for it: it is accepted a moment after its worker has made it.
func (s *server) link(ctx context.Context, token []byte) (*dataLink, error) {
	ctx, cancel := context.WithTimeout(ctx, linkPatience)
	defer cancel()
	for {
		s.mu.Lock()
		d, linked := s.links[string(token)], s.linked
		s.mu.Unlock()
		if d != nil {
			return d, nil
		}
		select {
		case <-linked:
		case <-ctx.Done():
			return nil, rpc.Errorf(rpc.FailedPrecondition, "make the data connection with this token as private data before you join")
		}
	}
}

// member finds who calls.
func (s *server) member(token []byte) (*member, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.links[string(token)]; d != nil && d.m != nil {
		return d.m, nil
	}
	return nil, rpc.Errorf(rpc.FailedPrecondition, "no worker has joined with this token, or its data connection has ended")
}

func (s *server) join(ctx context.Context, req *JoinRequest) (*JoinReply, error) {
	d, err := s.link(ctx, req.Token)
	if err != nil {
		return nil, err
	}
	m, clock, err := s.coord.join()
	switch {
	case errors.Is(err, errOver):
		return nil, rpc.Errorf(rpc.OutOfRange, "%v", err)
	case err != nil:
		return nil, rpc.Errorf(rpc.ResourceExhausted, "%v", err)
	}
	s.mu.Lock()
	fine := s.links[d.token] == d && d.m == nil
	if fine {
		d.m = m // from here on unlink frees the slot
	}
	s.mu.Unlock()
	if !fine {
		s.coord.leave(m)
		return nil, rpc.Errorf(rpc.FailedPrecondition, "this data connection has ended, or has been joined with already")
	}
	board, err := d.grant(ctx, s.board, 0, boardBytes, ib.AccessRemoteRead)
	if err != nil {
		return nil, err
	}
	slot, err := d.grant(ctx, s.slots, m.slot*slotBytes, slotBytes, ib.AccessRemoteWrite)
	if err != nil {
		return nil, err
	}
	s.printf("worker %d has joined from %v, slot %d\n", m.id, d.conn.RemoteAddr(), m.slot)
	return &JoinReply{Worker: uint32(m.id), Slot: uint32(m.slot), Clock: clock, BoardRegion: board, GradientRegion: slot}, nil
}

// grant lets the worker reach a part of a region over its data connection, and only as long as that lasts.
func (d *dataLink) grant(ctx context.Context, m *mr.MR, off, n int, access ib.Access) ([]byte, error) {
	g, err := d.conn.Grant(ctx, m, off, n, access)
	if err != nil {
		return nil, fmt.Errorf("grant: %w", err)
	}
	d.s.mu.Lock()
	late := d.s.links[d.token] != d
	if !late {
		d.lent = append(d.lent, g)
	}
	d.s.mu.Unlock()
	if late { // unlink has been here
		g.Revoke(ctx)
		return nil, fmt.Errorf("grant: %w", net.ErrClosed)
	}
	return g.Remote().MarshalBinary()
}

func (s *server) next(ctx context.Context, req *NextRequest) (*NextReply, error) {
	m, err := s.member(req.Token)
	if err != nil {
		return nil, err
	}
	a, err := s.coord.next(ctx, m, req.Clock)
	if err != nil {
		return nil, err
	}
	return &NextReply{
		Done: a.done, Version: a.version, Epoch: uint32(a.epoch), Batch: uint32(a.batch), Rank: uint32(a.rank), Of: uint32(a.of),
	}, nil
}

func (s *server) report(_ context.Context, req *ReportRequest) (*ReportReply, error) {
	if _, err := s.member(req.Token); err != nil {
		return nil, err
	}
	pulls, err := hdrhistogram.Decode(req.Pulls)
	if err != nil {
		return nil, rpc.Errorf(rpc.InvalidArgument, "pulls: %v", err)
	}
	pushes, err := hdrhistogram.Decode(req.Pushes)
	if err != nil {
		return nil, rpc.Errorf(rpc.InvalidArgument, "pushes: %v", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t := &s.totals
	t.pulls.Merge(pulls)
	t.pushes.Merge(pushes)
	t.pulled += req.PulledBytes
	t.pushed += req.PushedBytes
	t.torn += req.Torn
	t.waits += req.Waits
	t.devices = addName(t.devices, req.Device)
	t.paths = addName(t.paths, req.Path)
	return &ReportReply{}, nil
}

// addName adds a name that is new, as one word.
func addName(names []string, name string) []string {
	name = strings.Join(strings.Fields(name), "-")
	for _, n := range names {
		if n == name {
			return names
		}
	}
	return append(names, name)
}

// epochDone prints an epoch's line; the coordinator calls it.
func (s *server) epochDone(e epochStat) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.epoch == 1 {
		fmt.Fprintf(s.out, "epoch  accuracy    loss  version  workers     time\n")
	}
	fmt.Fprintf(s.out, "%5d  %8.3f  %6.3f  %7d  %7d  %4d ms\n", e.epoch, e.accuracy, e.loss, e.version, e.workers, e.elapsed.Milliseconds())
	s.last = e
}

// parseEpoch reads an epoch's line again: no other line has its form.
func parseEpoch(line string) (e epochStat, err error) {
	var ms int
	_, err = fmt.Sscanf(line, "%d %f %f %d %d %d ms", &e.epoch, &e.accuracy, &e.loss, &e.version, &e.workers, &ms)
	return e, err
}

// wait waits until training is over and the workers have reported and left.
func (s *server) wait(ctx context.Context) error {
	for {
		over, changed := s.coord.done()
		if over {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("training was interrupted: %w", context.Cause(ctx))
		}
	}
	deadline := time.NewTimer(endPatience)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for s.coord.memberCount() > 0 {
		select {
		case <-tick.C:
		case <-deadline.C:
			s.printf("%d workers have not reported in time\n", s.coord.memberCount())
			return nil
		case <-ctx.Done():
			return fmt.Errorf("interrupted before all workers had reported: %w", context.Cause(ctx))
		}
	}
	return nil
}

func (s *server) summary() {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := &s.totals
	latency := func(what string, h *hdrhistogram.Histogram) {
		fmt.Fprintf(s.out, "%s: %d, p50 %.1f us, p90 %.1f us, p99 %.1f us, p99.9 %.1f us, max %.1f us\n", what, h.TotalCount(),
			us(h.ValueAtQuantile(50)), us(h.ValueAtQuantile(90)), us(h.ValueAtQuantile(99)), us(h.ValueAtQuantile(99.9)), us(h.Max()))
	}
	latency("pulls", t.pulls)
	latency("pushes", t.pushes)
	fmt.Fprintf(s.out, "moved one-sided: %.2f MB pulled, %.2f MB pushed; %d torn snapshots were seen and thrown away\n",
		float64(t.pulled)/1e6, float64(t.pushed)/1e6, t.torn)
	fmt.Fprintf(s.out, "barrier calls: %d; workers lost: %d\n", t.waits, s.lost)
	if !s.cfg.sync {
		fmt.Fprintf(s.out, "furthest ahead of the slowest: %d gradients; applied %.1f versions late on average, %d at most\n",
			s.last.maxAhead, s.last.meanLag, s.last.maxLag)
	}
	device, path := strings.Join(t.devices, "+"), strings.Join(t.paths, "+")
	fmt.Fprintf(s.out, "device %s, path %s\n", device, path)
	fmt.Fprintf(s.out, "%s%.3f epochs=%d workers=%d pull_p50_us=%.1f push_p50_us=%.1f device=%s path=%s\n", resultPrefix,
		s.last.accuracy, s.last.epoch, s.cfg.workers, us(t.pulls.ValueAtQuantile(50)), us(t.pushes.ValueAtQuantile(50)), device, path)
}

// resultPrefix begins the last line of a server's report.
const resultPrefix = "accuracy="

func us(ns int64) float64 { return float64(ns) / 1000 }
