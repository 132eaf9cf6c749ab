package perf

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/rpc"
	"github.com/ringside-rdma/ringside/transport"
)

// echoMethod answers with its argument.
const echoMethod rpc.Method = 1

// pollerConfig is how both sides of an rpc test wait.
func pollerConfig(spec *Spec) *transport.PollerConfig {
	return &transport.PollerConfig{
		Mode:       map[PollMode]transport.PollMode{PollBusy: transport.Busy, PollAdaptive: transport.Adaptive, PollEvent: transport.Event}[spec.Poll],
		SpinBudget: spec.Spin,
	}
}

// transportConfig is what both sides of an rpc test connect with, each with a poller by pollerConfig.
func transportConfig(spec *Spec, p *transport.Poller) *transport.Config {
	return &transport.Config{
		Poller:     p,
		Path:       map[Path]transport.Path{PathMemory: transport.PathMemory, PathUDP: transport.PathUDP, PathTCP: transport.PathTCP}[spec.Path],
		MaxMessage: max(16<<20, min(spec.Size+4096, MaxSize)), // the frame's header needs room too
		SendDepth:  max(128, spec.InFlight+16),                // what is in flight must not wait for slots
		RecvDepth:  max(128, spec.InFlight+16),
		Name:       "ringside perf",
	}
}

// testRPC serves an rpc test: an echo server on a port of its own, for one connection.
func (s *Server) testRPC(ctx context.Context, c *control, t *setup) error {
	p, err := transport.NewPoller(s.vctx, pollerConfig(&t.spec))
	if err != nil {
		return err
	}
	defer p.Close()
	// The address at which the client has found this server is one at which it can find another.
	host, _, err := net.SplitHostPort(c.conn.LocalAddr().String())
	if err != nil {
		return err
	}
	l, err := transport.Listen(ctx, net.JoinHostPort(host, "0"), transportConfig(&t.spec, p))
	if err != nil {
		return err
	}
	defer l.Close() // or the poller is not closed, if it does not come to serving
	v := &rpcService{listener: l, server: rpc.NewServer(nil)}
	defer v.halt()
	v.server.HandleRaw(rpc.Spec{Number: echoMethod, Inline: true}, func(call *rpc.Call, req []byte) error {
		v.calls.Add(1)
		return call.ReplyBytes(req)
	})
	s.log("  %v %v, %d bytes", t.spec.Op, t.spec.Kind, t.spec.Size)
	if s.cfg.CPU >= 0 {
		// The goroutine that polls is package rpc's own.
		restore, err := pinProcess(s.cfg.CPU)
		if err != nil {
			return err
		}
		defer restore()
	}
	return s.attend(ctx, c, endpoint{service: l.Addr().String()}, v)
}

// rpcService is the server's half of an rpc test.
type rpcService struct {
	listener *transport.Listener
	server   *rpc.Server
	calls    atomic.Uint64
}

func (v *rpcService) run() error {
	err := v.server.Serve(context.Background(), v.listener)
	if errors.Is(err, rpc.ErrServerClosed) {
		return nil
	}
	return err
}

// ready: a client that calls is connected.
func (v *rpcService) ready() <-chan struct{} { return closed }

var closed = func() <-chan struct{} {
	ch := make(chan struct{})
	close(ch)
	return ch
}()

func (v *rpcService) finish(uint64) { v.halt() }
func (v *rpcService) halt()         { _ = v.server.Close() }

func (v *rpcService) report() (messages, sum uint64, path string) { return v.calls.Load(), 0, "" }

// measureRPC does one rpc test.
func (r *runner) measureRPC(ctx context.Context, spec *Spec, step, steps int) (*Result, string, error) {
	if err := r.control.send(&setup{spec: *spec}); err != nil {
		return nil, "", r.cause(err)
	}
	up, err := expect[*ready](ctx, r.control, stepTimeout)
	if err != nil {
		return nil, "", err
	}
	// The server's own idea of its address may not be how it is reached from here; its port is.
	addr, err := joinHost(r.control.conn, up.endpoint.service)
	if err != nil {
		return nil, "", err
	}
	p, err := transport.NewPoller(r.vctx, pollerConfig(spec))
	if err != nil {
		return nil, "", err
	}
	defer p.Close()
	cl, err := rpc.Dial(ctx, addr, transportConfig(spec, p), &rpc.ClientConfig{MaxInFlight: max(1024, spec.InFlight)})
	if err != nil {
		return nil, "", r.cause(err)
	}
	defer cl.Close()
	l, err := newRPCLoad(spec, cl, r.clk)
	if err != nil {
		return nil, "", err
	}
	defer l.close()
	res, _, err := r.drive(ctx, spec, l, step, steps)
	return res, cl.Conn().Path().Rung, err
}

// rpcLoad is the client's half of an rpc test.
type rpcLoad struct {
	spec *Spec
	cl   *rpc.Client
	clk  clock
	req  []byte
	n    uint64

	rec    *recorder // latency test: stamps; otherwise only the histogram
	queue  *rpc.Queue
	begun  []uint64 // when the call of each tag was started
	free   []uint64 // tags
	now    uint64   // the reading for what is collected and started in one turn
	stale  bool     // now is of the last turn
	failed error

	record  bool
	expired atomic.Bool     // the duration is over: start no more calls
	stopped atomic.Bool     // the same, and those in flight have stopGrace
	ctx     context.Context // of the calls: ends when there is no hope for those in flight
	cancel  context.CancelFunc

	check   func(resp []byte) error
	collect func(tag uint64, resp []byte, err error)
}

func newRPCLoad(spec *Spec, cl *rpc.Client, clk clock) (*rpcLoad, error) {
	l := &rpcLoad{spec: spec, cl: cl, clk: clk, req: make([]byte, spec.Size)}
	for i := range l.req {
		l.req[i] = byte(i*7 + 1)
	}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	// Made once: a closure in the loop would be garbage.
	l.check = func(resp []byte) error {
		if len(resp) != len(l.req) {
			return fmt.Errorf("%d bytes were sent, %d came back", len(l.req), len(resp))
		}
		return nil
	}
	chunk := int64(stampsMax)
	if spec.Iters > 0 {
		chunk = min(chunk, max(spec.Iters, int64(spec.Warmup)))
	}
	if spec.Kind == Lat {
		l.rec = newRecorder(int(chunk), clk.nsPerTick, 1)
		return l, nil
	}
	l.rec = newRecorder(0, clk.nsPerTick, 1)
	l.begun = make([]uint64, spec.InFlight)
	l.free = make([]uint64, 0, spec.InFlight)
	for i := range spec.InFlight {
		l.free = append(l.free, uint64(i))
	}
	l.collect = func(tag uint64, resp []byte, err error) {
		if l.stale {
			l.now, l.stale = l.clk.now(), false
		}
		if err == nil {
			err = l.check(resp)
		}
		if err != nil && l.failed == nil {
			l.failed = err
		}
		if l.record {
			l.rec.add(l.now - l.begun[tag])
		}
		l.free = append(l.free, tag)
	}
	var err error
	l.queue, err = cl.NewQueue(spec.InFlight)
	return l, err
}

func (l *rpcLoad) close() {
	l.cancel()
	if l.queue != nil {
		_ = l.queue.Close()
	}
}

func (l *rpcLoad) total() uint64 { return l.n }

func (l *rpcLoad) stop() {
	l.stopped.Store(true)
	time.AfterFunc(stopGrace, l.cancel)
}

func (l *rpcLoad) halt() {
	l.stopped.Store(true)
	l.cancel()
}

func (l *rpcLoad) latency() *Latency { return l.rec.latency() }

func (l *rpcLoad) run(n int64, d time.Duration, record bool) (t tally, err error) {
	l.record = record
	if l.spec.Kind == Lat {
		return l.runLatency(n, d, record)
	}
	if d > 0 {
		defer time.AfterFunc(d, func() { l.expired.Store(true) }).Stop()
	}
	cpu, ok := processCPU()
	t0 := l.clk.now()
	t.n, err = l.stream(n)
	t.elapsed = l.clk.since(t0)
	after, ok2 := processCPU()
	t.cpu, t.haveCPU = after.sub(cpu), ok && ok2
	l.n += uint64(t.n)
	return t, l.halted(err)
}

// halted makes the end of l.ctx the error that stands for it.
func (l *rpcLoad) halted(err error) error {
	if err != nil && l.ctx.Err() != nil {
		return fmt.Errorf("%w: %w", errHalted, err)
	}
	return err
}

// runLatency is verbsLoad.runLatency for calls.
func (l *rpcLoad) runLatency(n int64, d time.Duration, record bool) (tally, error) {
	deadline := uint64(0)
	if d > 0 {
		deadline = l.clk.after(d)
	}
	t, err := inChunks(n, l.rec, &l.clk, record, func(n int) (int, error) { return l.call(n, deadline) })
	l.n += uint64(t.n)
	return t, l.halted(err)
}

// call is the client of rpc lat: one call after the other.
func (l *rpcLoad) call(n int, deadline uint64) (done int, err error) {
	stamps := l.rec.stamps
	t := l.clk.now()
	stamps[0] = t
	for done < n && !l.stopped.Load() && (deadline == 0 || t < deadline) {
		if err := l.cl.CallRaw(l.ctx, echoMethod, l.req, l.check); err != nil {
			return done, err
		}
		t = l.clk.now()
		done++
		stamps[done] = t
	}
	return done, nil
}

// stream is the client of rpc bw and rate: it keeps inflight calls under way from one goroutine. The clock is read once
// a turn of collecting and starting, so that a latency includes the turn's work before the call was sent.
func (l *rpcLoad) stream(n int64) (done int64, err error) {
	started := int64(0)
	l.now = l.clk.now()
	for {
		for len(l.free) > 0 && started < n && !l.expired.Load() && !l.stopped.Load() {
			tag := l.free[len(l.free)-1]
			l.begun[tag] = l.now
			if err := l.queue.Start(l.ctx, echoMethod, l.req, tag); err != nil {
				return done, err
			}
			l.free = l.free[:len(l.free)-1]
			started++
		}
		if l.queue.Len() == 0 {
			return done, nil
		}
		l.stale = true
		k, err := l.queue.Wait(l.ctx, l.collect)
		done += int64(k)
		if err == nil {
			err = l.failed
		}
		if err != nil {
			return done, err
		}
	}
}
