package perf

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/ringside-rdma/ringside/verbs"
)

// DefaultPort is the TCP port of a server that names none: perftest's.
const DefaultPort = 18515

// Config says what Run measures, and from where.
type Config struct {
	// Spec is the test. Sizes, if not empty, replaces its Size: one measurement each, in this order.
	Spec  Spec
	Sizes []int

	Addr     string // of the server: host or host:port; default port 18515
	Spawned  bool   // for the report: the caller started the server
	Device   string // local device; "" chooses
	Port     int    // the device's port, from 1; 0 takes the first active one
	GIDIndex int    // -1 chooses
	CPU      int    // processor to pin the measuring thread to; -1: none
	Clock    ClockMode

	// Progress, if not nil, is called from Run's goroutine when something new begins. It must return quickly.
	Progress func(Progress)
}

// Progress says what Run is about to do.
type Progress struct {
	Step, Steps int    // size number Step (from 1) of Steps
	Size        int    // bytes
	Phase       string // "connecting", "warm-up", "measuring"
}

// Validate returns nil for a Config that Run can work with, as far as that can be known beforehand; otherwise what to
// change.
func (c *Config) Validate() error {
	_, err := c.specs()
	return err
}

// specs returns one validated Spec a size.
func (c *Config) specs() ([]Spec, error) {
	sizes := c.Sizes
	if len(sizes) == 0 {
		sizes = []int{c.Spec.Size}
	}
	var all []Spec
	for _, n := range sizes {
		s := c.Spec
		s.Size = n
		s = s.WithDefaults()
		if err := s.Validate(); err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	if c.Port < 0 || c.Port > 255 {
		return nil, fmt.Errorf("port %d of a device: want 1 to 255, or 0 for the first active one", c.Port)
	}
	return all, nil
}

// ServerAddr completes the address of a server: a missing port becomes DefaultPort, and a missing host all addresses.
func ServerAddr(s string) (string, error) {
	if s == "" {
		return "", errors.New("the server's address is missing: give HOST or HOST:PORT")
	}
	if _, _, err := net.SplitHostPort(s); err == nil {
		return s, nil
	}
	host := strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")
	a := net.JoinHostPort(host, strconv.Itoa(DefaultPort))
	if _, _, err := net.SplitHostPort(a); err != nil || host == "" {
		return "", fmt.Errorf("%q is not an address: give HOST or HOST:PORT", s)
	}
	return a, nil
}

// Run measures. When ctx ends in between, the Report has what was found until then, Interrupted is set, and the error is
// nil; the Report is nil if there is nothing to tell.
func Run(ctx context.Context, cfg *Config) (*Report, error) {
	specs, err := cfg.specs()
	if err != nil {
		return nil, err
	}
	addr, err := ServerAddr(cfg.Addr)
	if err != nil {
		return nil, err
	}
	vctx, err := verbs.Open(cfg.Device)
	if err != nil {
		return nil, fmt.Errorf("%w (`ringside devices` lists what there is)", err)
	}
	defer closeDevice(vctx)
	clk, err := newClock(cfg.Clock)
	if err != nil {
		return nil, err
	}
	host := hostOn(vctx, cfg.CPU)

	r := &runner{cfg: cfg, vctx: vctx, clk: clk, addr: addr}
	r.progress(Progress{Step: 1, Steps: len(specs), Size: specs[0].Size, Phase: "connecting"})
	conn, err := (&net.Dialer{Timeout: connectTimeout}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("no server at %s (start one there with `ringside perf server`, or use --spawn): %w", addr, err)
	}
	var peer Host
	if r.control, peer, err = newControl(conn, host); err != nil {
		return nil, fmt.Errorf("%s: %w", addr, err)
	}
	defer r.control.close()

	for i := range specs {
		specs[i].Path = specs[i].Path.between(&host, &peer)
	}

	choice := vctx.Choice()
	rep := &Report{Schema: Schema, Started: time.Now().UTC().Truncate(time.Second), Test: testOf(&cfg.Spec, &specs[0], clk.name()),
		Spawned: cfg.Spawned, Client: host, Server: peer, Choice: &choice, Results: []Result{}}
	for i := range specs {
		res, path, err := r.measure(ctx, &specs[i], i+1, len(specs))
		if res != nil {
			rep.Path = path
			rep.Results = append(rep.Results, *res)
		}
		if ctx.Err() != nil {
			rep.Interrupted = true
			break
		}
		if err != nil {
			return rep.orNil(), fmt.Errorf("%s %s, %d bytes: %w", specs[i].Op, specs[i].Kind, specs[i].Size, err)
		}
	}
	return rep.orNil(), nil
}

// between is the path, decided.
func (p Path) between(client, server *Host) Path {
	if p == PathAuto && client.Name != server.Name && client.Provider == "soft" && server.Provider == "soft" {
		return PathUDP
	}
	return p
}

// orNil is r, or nil if it has no results.
func (r *Report) orNil() *Report {
	if len(r.Results) == 0 && !r.Interrupted {
		return nil
	}
	return r
}

// closeDevice closes vctx. It gives what was made from it a moment to go: a transport connection says that it is closed
// shortly before the poller is that it had for itself.
func closeDevice(vctx *verbs.Context) error {
	for pause := time.Millisecond; ; pause *= 2 {
		err := vctx.Close()
		if !errors.Is(err, verbs.ErrBusy) || pause > time.Second {
			return err
		}
		time.Sleep(pause)
	}
}

// hostOn is ThisHost with the device filled in.
func hostOn(vctx *verbs.Context, cpu int) Host {
	h := ThisHost()
	h.Device, h.Provider, h.Tier = vctx.Name(), vctx.Provider(), vctx.Tier().String()
	if cpu >= 0 {
		h.PollCPU = cpu
	}
	return h
}

// A runner is the client's state between tests.
type runner struct {
	cfg     *Config
	vctx    *verbs.Context
	clk     clock
	control *control
	addr    string
}

func (r *runner) progress(p Progress) {
	if r.cfg.Progress != nil {
		r.cfg.Progress(p)
	}
}

// A load is the client's half of a test, verbs or rpc: how to run it, once both sides are connected.
type load interface {
	// run does n operations, or as many as fit until the load is stopped or d has passed (0: no limit). It returns how
	// many, how long they took, and the CPU time. With record, latencies are kept. An error may come with a count.
	run(n int64, d time.Duration, record bool) (tally, error)
	latency() *Latency
	total() uint64 // operations ever
	stop()
	halt()
}

// tally is what a run of a load counted.
type tally struct {
	n       int64
	elapsed time.Duration
	cpu     cpuTime
	haveCPU bool
}

// measure does one test. The result is nil if there is none; with an error it is partial.
func (r *runner) measure(ctx context.Context, spec *Spec, step, steps int) (*Result, string, error) {
	if spec.Op == OpRPC {
		return r.measureRPC(ctx, spec, step, steps)
	}
	s, err := newSide(r.vctx, *spec, false, portOptions{uint8(r.cfg.Port), r.cfg.GIDIndex, spec.Path, r.control.near()})
	if err != nil {
		return nil, "", err
	}
	defer s.close()
	local, err := s.endpoint()
	if err != nil {
		return nil, "", err
	}
	if err := r.control.send(&setup{spec: *spec, endpoint: local}); err != nil {
		return nil, "", r.cause(err)
	}
	up, err := expect[*ready](ctx, r.control, stepTimeout)
	if err != nil {
		return nil, "", err
	}
	var streams []*net.TCPConn
	if spec.Path == PathTCP {
		var addr string
		if addr, err = joinHost(r.control.conn, up.endpoint.service); err == nil {
			streams, err = dialStreams(ctx, addr, &local)
		}
	}
	switch {
	case err != nil:
	case s.byCM:
		if err = s.dialCM(ctx, r.vctx, &up.endpoint, &local, r.control.near()); err == nil {
			err = r.mark(ctx)
		}
	default:
		err = s.connect(ctx, &up.endpoint, streams)
	}
	if err != nil {
		// Perhaps because the server failed meanwhile, and has said why.
		err = r.cause(err)
		r.control.sendError(fmt.Errorf("the client cannot connect: %w", err))
		return nil, "", err
	}
	l := &verbsLoad{side: s}
	if err := l.prepare(r.clk); err != nil {
		return nil, "", err
	}
	res, rep, err := r.drive(ctx, spec, l, step, steps)
	if res == nil {
		return nil, "", err
	}
	res.Inline = s.inline
	if rep != nil && err == nil && spec.Op == OpAtomic && spec.Atomic == FetchAdd && rep.atomicSum != l.total() {
		err = fmt.Errorf("the server's counters add up to %d after %d additions: atomics were lost or repeated", rep.atomicSum, l.total())
	}
	return res, s.path(), err
}

// warmupTime is how long a warm-up lasts at least that was not asked for in operations: the system's scheduler needs some
// time to find that two spinning threads do not belong on one processor.
const warmupTime = 50 * time.Millisecond

// drive runs warm-up and measurement of a connected load, and gets the server's report.
func (r *runner) drive(ctx context.Context, spec *Spec, l load, step, steps int) (*Result, *report, error) {
	defer context.AfterFunc(ctx, l.stop)()
	defer context.AfterFunc(r.control.alive, l.halt)()

	// The control connection has to work after ctx has ended: the server's half of a partial result comes over it.
	talk, cancel := context.WithCancel(context.Background())
	defer cancel()
	var got tally
	var warmed uint64
	err := pinned(r.cfg.CPU, func() (err error) {
		if spec.Warmup > 0 {
			r.progress(Progress{Step: step, Steps: steps, Size: spec.Size, Phase: "warm-up"})
			for until := time.Now().Add(warmupTime); ; {
				if _, err := l.run(int64(spec.Warmup), 0, false); err != nil {
					return err
				}
				if r.cfg.Spec.Warmup != 0 || ctx.Err() != nil || !time.Now().Before(until) {
					break
				}
			}
			warmed = l.total()
		}
		if ctx.Err() != nil {
			return nil
		}
		if err := r.mark(talk); err != nil {
			return err
		}
		r.progress(Progress{Step: step, Steps: steps, Size: spec.Size, Phase: "measuring"})
		runtime.GC() // now rather than in the loop, which makes no garbage
		n := spec.Iters
		if n == 0 {
			n = math.MaxInt64 / 2
		}
		got, err = l.run(n, spec.Duration, true)
		return err
	})
	if err != nil && got.n == 0 {
		return nil, nil, r.explain(ctx, err)
	}
	if ctx.Err() != nil && got.n == 0 {
		return nil, nil, nil
	}
	var rep *report
	if err == nil {
		if err = r.control.send(&stop{messages: l.total()}); err == nil {
			rep, err = expect[*report](talk, r.control, stepTimeout)
		}
	}
	client, server := &got.cpu, (*cpuTime)(nil)
	if !got.haveCPU {
		client = nil
	}
	if rep != nil && rep.cpu.total() >= 0 {
		server = &rep.cpu
	}
	res := newResult(spec, uint64(got.n), got.elapsed, client, server)
	res.Warmup = warmed
	res.Latency = l.latency()
	res.Partial = err != nil || ctx.Err() != nil && (spec.Duration > 0 || got.n < spec.Iters)
	return &res, rep, r.explain(ctx, err)
}

// mark has the server note its CPU time, once it is connected.
func (r *runner) mark(ctx context.Context) error {
	if err := r.control.send(&mark{}); err != nil {
		return err
	}
	_, err := expect[*marked](ctx, r.control, stepTimeout)
	return err
}

// explain finds out why a test failed: what the server said or did explains more than a completion that was flushed.
func (r *runner) explain(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errHalted) && ctx.Err() != nil:
		return nil // an interrupted run is no failure
	}
	return r.cause(err)
}

// cause waits a moment for the connection's end to tell its reason, and puts it before err.
func (r *runner) cause(err error) error {
	select {
	case <-r.control.alive.Done():
	case <-time.After(500 * time.Millisecond):
		return err
	}
	why := context.Cause(r.control.alive)
	if errors.Is(err, errHalted) || errors.Is(err, os.ErrClosed) || errors.Is(err, ErrPeerGone) || errors.Is(why, net.ErrClosed) {
		return why
	}
	return fmt.Errorf("%w (%w)", why, err)
}

// verbsLoad runs the loops of a side.
type verbsLoad struct {
	side *side
	n    uint64
}

// prepare allocates what the loops record into.
func (l *verbsLoad) prepare(clk clock) error {
	s := l.side
	s.clk = clk
	if s.spec.Kind != Lat {
		return nil
	}
	parts := 1
	if s.spec.LatencyKind() == HalfRoundTrip {
		parts = 2
	}
	chunk := int64(stampsMax)
	if s.spec.Iters > 0 {
		chunk = min(chunk, max(s.spec.Iters, int64(s.spec.Warmup)))
	}
	s.rec = newRecorder(int(chunk), clk.nsPerTick, parts)
	return nil
}

func (l *verbsLoad) total() uint64 { return l.n }
func (l *verbsLoad) stop()         { l.side.stop() }
func (l *verbsLoad) halt()         { l.side.halt() }

func (l *verbsLoad) latency() *Latency {
	if l.side.rec == nil {
		return nil
	}
	return l.side.rec.latency()
}

func (l *verbsLoad) run(n int64, d time.Duration, record bool) (t tally, err error) {
	if l.side.spec.Kind == Lat {
		return l.runLatency(n, d, record)
	}
	if d > 0 {
		defer time.AfterFunc(d, l.side.expire).Stop() // which needs to wake nobody: who sleeps has something in flight
	}
	s := l.side
	cpu, ok := processCPU()
	t0 := s.clk.now()
	t.n, err = s.stream(n)
	t.elapsed = s.clk.since(t0)
	if after, ok2 := processCPU(); ok && ok2 {
		t.cpu, t.haveCPU = after.sub(cpu), true
	}
	l.n += uint64(t.n)
	return t, err
}

// runLatency measures how long operations take, one after the other.
func (l *verbsLoad) runLatency(n int64, d time.Duration, record bool) (tally, error) {
	s := l.side
	loop := s.operate
	switch s.spec.Op {
	case OpSend:
		loop = s.pingSend
	case OpWrite:
		loop = s.pingWrite
	}
	s.deadline = 0
	if d > 0 {
		s.deadline = s.clk.after(d)
	}
	t, err := inChunks(n, s.rec, &s.clk, record, loop)
	l.n += uint64(t.n)
	return t, err
}

// inChunks runs a loop of n operations, as many at a time as rec has room for, and folds the readings in between, which counts neither
// as time nor as CPU time. A loop that did fewer than it was asked for is at its end.
func inChunks(n int64, rec *recorder, clk *clock, record bool, loop func(n int) (int, error)) (t tally, err error) {
	t.haveCPU = true
	chunk := int64(len(rec.stamps) - 1)
	for t.n < n && err == nil {
		want := min(chunk, n-t.n)
		var done int
		cpu, ok := processCPU()
		done, err = loop(int(want))
		after, ok2 := processCPU()
		t.haveCPU = t.haveCPU && ok && ok2
		c := after.sub(cpu)
		t.cpu.user += c.user
		t.cpu.system += c.system
		t.n += int64(done)
		t.elapsed += time.Duration(float64(rec.stamps[done]-rec.stamps[0]) * clk.nsPerTick)
		if record {
			rec.fold(done)
		}
		if int64(done) < want {
			break
		}
	}
	return t, err
}
