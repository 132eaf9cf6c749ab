package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ringside-rdma/ringside/internal/perf"
	"github.com/spf13/cobra"
)

func newPerf() *cobra.Command {
	srv := serverFlags{}
	cmd := &cobra.Command{
		Use:   "perf",
		Short: "Measure latency, bandwidth and message rate between two processes",
		Long: `perf measures verbs and RPCs between two processes, as perftest's ib_send_lat,
ib_write_bw and their relatives do: a server waits, a client asks for a test and
prints the results. With --spawn one command does both, on one host.

Latency is half of a round trip for send and write, and the whole of the
operation for read, atomic and rpc.`,
		Example: `  ringside perf server                          # on one host (or: ringside perf --listen :18515)
  ringside perf write lat otherhost             # on the other
  ringside perf send lat --spawn --all --plot send.svg
  ringside perf rpc rate --spawn --inflight 64 -o json`,
		Args: cobra.ArbitraryArgs,
	}
	srv.add(cmd, "")
	cmd.RunE = func(cmd *cobra.Command, a []string) error {
		if len(a) == 0 && cmd.Flags().Changed("listen") {
			return srv.run(cmd)
		}
		return subcommand(cmd, a)
	}
	cmd.AddCommand(newPerfServer())
	for _, op := range perf.Ops() {
		cmd.AddCommand(newPerfOp(op))
	}
	return cmd
}

// localFlags say where on this host a side runs.
type localFlags struct {
	device   string
	port     int
	gidIndex int
	cpu      int
}

func (f *localFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.device, "device", "d", "", "RDMA device (default: the best one that works)")
	cmd.Flags().IntVar(&f.port, "ib-port", 0, "port of the device (default: the first active one)")
	cmd.Flags().IntVar(&f.gidIndex, "gid-index", -1, "place in the port's GID table (default: RoCE v2 over IPv4, if there is one)")
	cmd.Flags().IntVar(&f.cpu, "cpu", -1, "processor to run the measuring thread on (default: as the system likes)")
	hideDefault(cmd, "gid-index", "cpu")
	_ = cmd.RegisterFlagCompletionFunc("device", completeDevices)
}

// hideDefault keeps the help from showing the -1 that stands for a default which the usage text explains.
func hideDefault(cmd *cobra.Command, names ...string) {
	for _, n := range names {
		if f := cmd.Flags().Lookup(n); f != nil {
			f.DefValue = "0" // what pflag takes for not worth showing
		}
	}
}

func completeDevices(cmd *cobra.Command, a []string, s string) ([]string, cobra.ShellCompDirective) {
	return newDevices().ValidArgsFunction(cmd, a, s)
}

// serverFlags are those of a server.
type serverFlags struct {
	localFlags
	listen string
	once   bool
	child  bool
}

func (f *serverFlags) add(cmd *cobra.Command, listen string) {
	cmd.Flags().StringVar(&f.listen, "listen", listen, "be the server: wait for clients on this TCP address")
	cmd.Flags().BoolVar(&f.once, "once", false, "end after the first client")
	cmd.Flags().BoolVar(&f.child, "child", false, "end with standard input, and leave interrupts to the parent")
	_ = cmd.Flags().MarkHidden("child")
	f.localFlags.add(cmd)
}

func newPerfServer() *cobra.Command {
	f := serverFlags{}
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Wait for clients, and take part in their tests",
		Long: `server waits for clients and takes part in their tests, one client at a time,
until it is interrupted.

Whoever reaches the port can make this process work and use memory (4 GiB at
most). Nothing is encrypted or authenticated: listen where only trusted hosts
can connect.`,
		Args: args(cobra.NoArgs, "none"),
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	f.add(cmd, ":"+strconv.Itoa(perf.DefaultPort))
	return cmd
}

func (f *serverFlags) run(cmd *cobra.Command) error {
	addr, err := perf.ServerAddr(f.listen)
	if err != nil {
		return usage(cmd, fmt.Errorf("--listen: %w", err))
	}
	ctx := cmd.Context()
	if f.child {
		// An interrupt from the terminal reaches the whole process group. The parent needs this side's half of the
		// results then, and closes our standard input when it is done.
		signal.Ignore(os.Interrupt)
		var end context.CancelFunc
		ctx, end = context.WithCancel(context.WithoutCancel(ctx))
		defer end()
		go func() {
			_, _ = io.Copy(io.Discard, cmd.InOrStdin())
			end()
		}()
	}
	cfg := perf.ServerConfig{Device: f.device, Port: f.port, GIDIndex: f.gidIndex, CPU: f.cpu, Once: f.once}
	if !f.child {
		cfg.Log = func(format string, a ...any) { fmt.Fprintf(cmd.ErrOrStderr(), format+"\n", a...) }
	}
	s, err := perf.NewServer(cfg)
	if err != nil {
		return err
	}
	defer s.Close()
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("%w: choose another address with --listen", err)
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s%s on %s\n", perf.ListeningPrefix, l.Addr(), s.Choice())
	err = s.Serve(ctx, l)
	if f.child {
		return nil // the client has been told
	}
	return err
}

func newPerfOp(op perf.Op) *cobra.Command {
	about := map[perf.Op]string{
		perf.OpSend:   "Measure SEND",
		perf.OpWrite:  "Measure RDMA WRITE",
		perf.OpRead:   "Measure RDMA READ",
		perf.OpAtomic: "Measure 8-byte atomics",
		perf.OpRPC:    "Measure calls of a server that echoes",
	}
	cmd := &cobra.Command{Use: op.String(), Short: about[op], Args: cobra.ArbitraryArgs, RunE: subcommand}
	for _, k := range perf.Kinds() {
		cmd.AddCommand(newPerfTest(op, k))
	}
	return cmd
}

// testFlags are those of a client.
type testFlags struct {
	localFlags
	spec      perf.Spec
	sizes     sizesValue
	all       bool
	poll      choiceValue
	atomic    choiceValue
	flow      choiceValue
	path      *choiceValue
	clock     choiceValue
	spawn     bool
	serverCPU int
	serverDev string
	serverGID int
	plot      string
	output    *string
}

// allMax is the largest size of --all: perftest's.
const allMax = 8 << 20

func newPerfTest(op perf.Op, kind perf.Kind) *cobra.Command {
	f := &testFlags{spec: perf.Spec{Op: op, Kind: kind, Inline: 0}}
	what := map[perf.Kind]string{perf.Lat: "latency", perf.BW: "bandwidth", perf.Rate: "message rate"}[kind]
	def := f.spec.WithDefaults()
	cmd := &cobra.Command{
		Use:   kind.String() + " [HOST[:PORT]]",
		Short: fmt.Sprintf("Measure the %s of %v", what, op),
		Args:  args(cobra.MaximumNArgs(1), "the server's address, or --spawn"),
		Example: fmt.Sprintf("  ringside perf %v %v otherhost\n  ringside perf %v %v --spawn --duration 2s --plot %v_%v.svg",
			op, kind, op, kind, op, kind),
	}
	fl := cmd.Flags()
	fl.SortFlags = false
	fl.BoolVar(&f.spawn, "spawn", false, "start the server too: a process of its own on this host")
	if op != perf.OpAtomic {
		fl.VarP(&f.sizes, "size", "s", fmt.Sprintf("message sizes in bytes, such as 64 or 64,4k,1M (default %d)", def.Size))
		fl.BoolVarP(&f.all, "all", "a", false, "sizes 2, 4, 8, ... to 8M")
	}
	fl.Int64VarP(&f.spec.Iters, "iters", "n", 0, fmt.Sprintf("operations to measure (default %d, fewer of large messages)", def.Iters))
	fl.DurationVarP(&f.spec.Duration, "duration", "D", 0, "how long to measure each size, such as 5s, instead of --iters")
	fl.IntVar(&f.spec.Warmup, "warmup", 0, fmt.Sprintf("operations before that (default %d, at most --iters; fewer of large messages)", def.Warmup))
	f.poll = choiceValue{v: def.Poll.String(), all: []string{"busy", "adaptive", "event"}}
	fl.Var(&f.poll, "poll", "how both sides wait: busy, adaptive or event")
	f.path = pathFlag(cmd)
	fl.DurationVar(&f.spec.Spin, "spin", def.Spin, "how long --poll adaptive polls before it sleeps")
	if op == perf.OpRPC {
		if kind != perf.Lat {
			fl.IntVar(&f.spec.InFlight, "inflight", def.InFlight, "calls in flight")
		}
	} else {
		fl.IntVar(&f.spec.Depth, "depth", def.Depth, "work requests in flight on a queue pair")
		fl.IntVar(&f.spec.SignalEvery, "signal-every", 0, "every n-th work request asks for a completion (default: a quarter of the depth)")
		fl.IntVar(&f.spec.Batch, "batch", def.Batch, "work requests a PostSend")
		fl.IntVar(&f.spec.QPs, "qps", def.QPs, "queue pairs")
	}
	if op == perf.OpSend || op == perf.OpWrite {
		fl.IntVar(&f.spec.Inline, "inline", perf.InlineAuto, "longest message to send inline, bytes; 0 for none (default: 220 where the device can, none for bw)")
	}
	if op == perf.OpSend && kind != perf.Lat {
		f.flow = choiceValue{v: def.Flow.String(), all: []string{"credit", "rnr"}}
		fl.Var(&f.flow, "flow", "what holds the sender back: credit, or the device's receiver-not-ready retries")
	}
	if op == perf.OpAtomic {
		f.atomic = choiceValue{v: def.Atomic.String(), all: []string{"fadd", "cas"}}
		fl.Var(&f.atomic, "op", "atomic operation: fadd or cas")
	}
	f.clock = choiceValue{v: "auto", all: []string{"auto", "tsc", "mono"}}
	if def.LatencyKind() != "" && (kind == perf.Lat || op == perf.OpRPC) {
		fl.Var(&f.clock, "clock", "clock to read between iterations: tsc (cheap), mono (the system's), or auto")
	}
	f.localFlags.add(cmd)
	fl.IntVar(&f.serverCPU, "server-cpu", -1, "with --spawn: the server's --cpu")
	fl.StringVar(&f.serverDev, "server-device", "", "with --spawn: the server's --device (default: the same as the client's)")
	fl.IntVar(&f.serverGID, "server-gid-index", -1, "with --spawn: the server's --gid-index (default: the client's, on the same device)")
	f.output = outputFlag(cmd)
	fl.StringVar(&f.plot, "plot", "", "write a picture of the results to this SVG file")
	hideDefault(cmd, "inline", "server-cpu", "server-gid-index")
	for name, c := range map[string]*choiceValue{"poll": &f.poll, "flow": &f.flow, "op": &f.atomic, "clock": &f.clock} {
		if fl.Lookup(name) != nil {
			_ = cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(c.all, cobra.ShellCompDirectiveNoFileComp))
		}
	}
	cmd.RunE = func(cmd *cobra.Command, a []string) error {
		cfg, err := f.config(cmd, a)
		if err != nil {
			return usage(cmd, err)
		}
		return f.run(cmd, cfg)
	}
	return cmd
}

// config checks the flags and makes the test of them.
func (f *testFlags) config(cmd *cobra.Command, a []string) (*perf.Config, error) {
	cfg := &perf.Config{Spec: f.spec, Sizes: f.sizes.v, Spawned: f.spawn, Device: f.device, Port: f.port, GIDIndex: f.gidIndex, CPU: f.cpu}
	switch {
	case f.spawn && len(a) > 0:
		return nil, fmt.Errorf("both an address (%s) and --spawn are given: choose one", a[0])
	case !f.spawn && len(a) == 0:
		return nil, errors.New("where is the server? Give HOST or HOST:PORT, or --spawn to start one here")
	case !f.spawn && cmd.Flags().Changed("server-cpu"):
		return nil, errors.New("--server-cpu works with --spawn only: give --cpu to the server instead")
	case !f.spawn && cmd.Flags().Changed("server-device"):
		return nil, errors.New("--server-device works with --spawn only: give --device to the server instead")
	case !f.spawn && cmd.Flags().Changed("server-gid-index"):
		return nil, errors.New("--server-gid-index works with --spawn only: give --gid-index to the server instead")
	case f.all && len(f.sizes.v) > 0:
		return nil, errors.New("both --size and --all are given: choose one")
	case f.spec.Iters != 0 && f.spec.Duration != 0:
		return nil, errors.New("both --iters and --duration are given: choose one")
	case f.spec.Iters < 0:
		return nil, fmt.Errorf("--iters %d: want a positive number", f.spec.Iters)
	case f.spec.Duration < 0:
		return nil, fmt.Errorf("--duration %v: want a positive time", f.spec.Duration)
	case cmd.Flags().Changed("spin") && f.spec.Spin == 0: // to Spec, the default
		return nil, errors.New("--spin 0: want a positive time, or --poll event, which does not poll before it sleeps")
	case f.cpu < -1 || f.serverCPU < -1:
		return nil, errors.New("--cpu and --server-cpu take the number of a processor, from 0")
	}
	for name, v := range map[string]int{"depth": f.spec.Depth, "batch": f.spec.Batch, "qps": f.spec.QPs, "inflight": f.spec.InFlight} {
		if cmd.Flags().Changed(name) && v == 0 { // to Spec, zero means the default
			return nil, fmt.Errorf("--%s 0: want a positive number", name)
		}
	}
	if !cmd.Flags().Changed("batch") {
		cfg.Spec.Batch = 0 // let the engine choose: it goes by the depth
	}
	if !f.spawn {
		addr, err := perf.ServerAddr(a[0])
		if err != nil {
			return nil, err
		}
		cfg.Addr = addr
	}
	if f.all {
		cfg.Sizes = perf.PowersOfTwo(allMax)
	}
	var err error
	if cfg.Spec.Path, err = perf.ParsePath(f.path.v); err != nil {
		return nil, err
	}
	if cfg.Spec.Poll, err = perf.ParsePollMode(f.poll.v); err != nil {
		return nil, err
	}
	if cfg.Clock, err = perf.ParseClockMode(f.clock.v); err != nil {
		return nil, err
	}
	if f.flow.v != "" {
		if cfg.Spec.Flow, err = perf.ParseFlow(f.flow.v); err != nil {
			return nil, err
		}
	}
	if f.atomic.v != "" {
		if cfg.Spec.Atomic, err = perf.ParseAtomicOp(f.atomic.v); err != nil {
			return nil, err
		}
	}
	if !cmd.Flags().Changed("warmup") {
		cfg.Spec.Warmup = 0 // let the engine choose
	} else if cfg.Spec.Warmup == 0 {
		cfg.Spec.Warmup = perf.NoWarmup
	}
	return cfg, cfg.Validate()
}

// run measures and prints.
func (f *testFlags) run(cmd *cobra.Command, cfg *perf.Config) (err error) {
	ctx := cmd.Context()
	var plot *plotFile
	if f.plot != "" {
		// Opened before the work, so that a mistake in the name does not cost the results.
		if plot, err = openPlot(f.plot); err != nil {
			return fmt.Errorf("--plot: %w", err)
		}
		defer func() { err = errors.Join(err, plot.close()) }()
	}
	if f.spawn {
		child, err := f.spawnServer(ctx, cmd)
		if err != nil {
			return err
		}
		defer func() {
			if cerr := child.Close(); err == nil {
				err = cerr
			}
		}()
		cfg.Addr = child.Addr
	}
	if w := cmd.ErrOrStderr(); isTerminal(w) {
		p := newProgress(w, f.spec)
		defer p.close()
		cfg.Progress = p.set
	}
	rep, runErr := perf.Run(ctx, cfg)
	if rep == nil {
		return runErr
	}
	if p := cfg.Progress; p != nil {
		p(perf.Progress{})
	}
	if *f.output == "json" {
		err = rep.WriteJSON(cmd.OutOrStdout())
	} else {
		err = rep.WriteText(cmd.OutOrStdout())
	}
	if plot != nil && len(rep.Results) > 0 && err == nil {
		err = plot.draw(rep)
	}
	if rep.Interrupted && runErr == nil && err == nil {
		return context.Canceled
	}
	return errors.Join(runErr, err)
}

// A plotFile is where a picture goes. Until it is drawn, a file that was there before stays as it was.
type plotFile struct {
	f     *os.File
	fresh bool // made here, and not drawn in yet
}

func openPlot(name string) (*plotFile, error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err == nil {
		return &plotFile{f: f, fresh: true}, nil
	}
	if errors.Is(err, fs.ErrExist) {
		f, err = os.OpenFile(name, os.O_WRONLY|os.O_CREATE, 0o666)
	}
	if err != nil {
		return nil, err
	}
	return &plotFile{f: f}, nil
}

// draw writes the picture of r in place of what was there.
func (p *plotFile) draw(r *perf.Report) error {
	var b bytes.Buffer
	if err := r.WritePlot(&b); err != nil {
		return err
	}
	st, err := p.f.Stat()
	if err == nil && st.Mode().IsRegular() { // and not a pipe or a terminal
		err = p.f.Truncate(0)
	}
	if err != nil {
		return err
	}
	if _, err = p.f.Write(b.Bytes()); err == nil {
		p.fresh = false
	}
	return err
}

// close also removes a file that was made for nothing.
func (p *plotFile) close() error {
	err := p.f.Close()
	if p.fresh {
		err = errors.Join(err, os.Remove(p.f.Name()))
	}
	return err
}

func (f *testFlags) spawnServer(ctx context.Context, cmd *cobra.Command) (*perf.Child, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("--spawn: %w", err)
	}
	dev := f.serverDev
	gid := f.serverGID
	if dev == "" {
		dev = f.device
	}
	port := 0
	if dev == f.device {
		port = f.port
		if gid < 0 {
			gid = f.gidIndex
		}
	}
	a := []string{"perf", "server", "--child", "--once", "--listen", "127.0.0.1:0", "--cpu", strconv.Itoa(f.serverCPU)}
	if dev != "" {
		a = append(a, "--device", dev)
	}
	if port != 0 {
		a = append(a, "--ib-port", strconv.Itoa(port))
	}
	if gid >= 0 {
		a = append(a, "--gid-index", strconv.Itoa(gid))
	}
	c, err := perf.Spawn(ctx, exe, a, cmd.ErrOrStderr())
	if err != nil {
		return nil, fmt.Errorf("--spawn: %w", err)
	}
	return c, nil
}

// sizesValue is a list of sizes with units.
type sizesValue struct{ v []int }

func (s *sizesValue) Type() string { return "sizes" }

func (s *sizesValue) String() string {
	var b []string
	for _, n := range s.v {
		b = append(b, strconv.Itoa(n))
	}
	return strings.Join(b, ",")
}

func (s *sizesValue) Set(text string) error {
	var all []int
	for _, t := range strings.Split(text, ",") {
		n, err := parseSize(strings.TrimSpace(t))
		if err != nil {
			return err
		}
		all = append(all, n)
	}
	s.v = all
	return nil
}

// parseSize parses 64, 4k, 1M, 1MiB: units are powers of 1024, as message sizes are.
func parseSize(s string) (int, error) {
	digits := strings.TrimRight(s, "kKmMgGiIbB")
	n, err := strconv.Atoi(digits)
	shift, ok := map[string]int{"": 0, "b": 0, "k": 10, "kb": 10, "kib": 10, "m": 20, "mb": 20, "mib": 20, "g": 30, "gb": 30, "gib": 30}[strings.ToLower(s[len(digits):])]
	if err != nil || !ok || n < 1 || n > perf.MaxSize>>shift {
		return 0, fmt.Errorf("%q is not a size: want 1 to 1G, such as 64, 4k or 1M", s)
	}
	return n << shift, nil
}

// isTerminal reports whether somebody looks at w as it is written.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
}

// progressAfter is how long a run has to take before it shows progress.
const progressAfter = time.Second

// progress shows on a terminal what a long run is doing.
type progress struct {
	w     io.Writer
	what  string
	start time.Time
	done  chan struct{}
	wg    sync.WaitGroup

	mu    sync.Mutex
	now   perf.Progress
	since time.Time
	shown bool
}

func newProgress(w io.Writer, spec perf.Spec) *progress {
	p := &progress{w: w, what: fmt.Sprintf("%v %v", spec.Op, spec.Kind), start: time.Now(), done: make(chan struct{})}
	p.wg.Go(func() {
		// Rarely: on a machine with few processors, drawing takes time from what is measured.
		t := time.NewTicker(time.Second)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				p.draw(time.Now())
			case <-p.done:
				return
			}
		}
	})
	return p
}

// set tells what is going on; the zero Progress that nothing is.
func (p *progress) set(now perf.Progress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now, p.since = now, time.Now()
	if now == (perf.Progress{}) {
		p.clearLocked()
	}
}

func (p *progress) draw(t time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.now == (perf.Progress{}) || t.Sub(p.start) < progressAfter {
		return
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s %d/%d, %d bytes: %s, %.0f s (%.0f s in all)", p.what, p.now.Step, p.now.Steps, p.now.Size, p.now.Phase,
		t.Sub(p.since).Seconds(), t.Sub(p.start).Seconds())
	p.shown = true
}

func (p *progress) clearLocked() {
	if p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.shown = false
	}
}

func (p *progress) close() {
	close(p.done)
	p.wg.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clearLocked()
}
