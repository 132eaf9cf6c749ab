package perf

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/rpc"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs"
)

// A running server of this process. Both sides of a measurement poll: the tests run few iterations, and assert nothing
// about time.
type testServer struct {
	addr string
	end  context.CancelFunc

	mu  sync.Mutex
	log []string
}

func startServer(t *testing.T, cfg ServerConfig) *testServer {
	t.Helper()
	ts := &testServer{}
	cfg.GIDIndex, cfg.CPU = -1, -1
	cfg.Log = func(format string, args ...any) {
		ts.mu.Lock()
		defer ts.mu.Unlock()
		ts.log = append(ts.log, fmt.Sprintf(format, args...))
	}
	s, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ts.addr = l.Addr().String()
	var ctx context.Context
	ctx, ts.end = context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		ts.end()
		if err := <-done; err != nil && !cfg.Once {
			t.Errorf("Serve: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if t.Failed() {
			t.Logf("the server's log:\n%s", strings.Join(ts.log, "\n"))
		}
	})
	return ts
}

func testConfig(addr string, spec Spec, sizes ...int) *Config {
	if spec.Iters == 0 && spec.Duration == 0 {
		spec.Iters = 100
	}
	if spec.Warmup == 0 {
		spec.Warmup = 10
	}
	return &Config{Spec: spec, Sizes: sizes, Addr: addr, GIDIndex: -1, CPU: -1}
}

func TestRun(t *testing.T) {
	srv := startServer(t, ServerConfig{})
	for _, tt := range []struct {
		name  string
		spec  Spec
		sizes []int
	}{
		{"send lat", Spec{Op: OpSend, Kind: Lat, Inline: InlineAuto}, []int{1, 64, 5000}},
		{"send lat by events", Spec{Op: OpSend, Kind: Lat, Poll: PollEvent}, []int{8}},
		{"send lat adaptive", Spec{Op: OpSend, Kind: Lat, Poll: PollAdaptive, Spin: time.Microsecond}, []int{8}},
		{"send lat, shallow", Spec{Op: OpSend, Kind: Lat, Depth: 1}, []int{8}},
		{"send lat, always signaled", Spec{Op: OpSend, Kind: Lat, Depth: 2, SignalEvery: 1}, []int{8}},
		{"send lat, no warm-up", Spec{Op: OpSend, Kind: Lat, Warmup: NoWarmup}, []int{8}},
		{"send bw", Spec{Op: OpSend, Kind: BW}, []int{64, 65536}},
		{"send bw by events", Spec{Op: OpSend, Kind: BW, Poll: PollEvent, Iters: 2000}, []int{64}},
		{"send rate", Spec{Op: OpSend, Kind: Rate, Inline: InlineAuto, Iters: 5000}, []int{64}},
		{"send rate, 3 QPs", Spec{Op: OpSend, Kind: Rate, QPs: 3, Iters: 5000}, []int{200}},
		{"send rate by RNR", Spec{Op: OpSend, Kind: Rate, Flow: FlowRNR, Iters: 500}, []int{64}},
		{"send rate, shallow", Spec{Op: OpSend, Kind: Rate, Depth: 1}, []int{64}},
		{"send rate, odd numbers", Spec{Op: OpSend, Kind: Rate, Depth: 17, Batch: 17, SignalEvery: 5, Iters: 1001}, []int{100}},
		{"write lat", Spec{Op: OpWrite, Kind: Lat, Inline: InlineAuto, Iters: 600}, []int{1, 8, 300}},
		{"write bw", Spec{Op: OpWrite, Kind: BW}, []int{65536}},
		{"write rate", Spec{Op: OpWrite, Kind: Rate, Inline: 64, QPs: 2, Iters: 3001}, []int{64}},
		{"write rate, odd numbers", Spec{Op: OpWrite, Kind: Rate, Depth: 100, Batch: 64, SignalEvery: 7, QPs: 3, Iters: 1000}, []int{64}},
		{"write rate, fewer messages than QPs", Spec{Op: OpWrite, Kind: Rate, QPs: 4, Iters: 2, Warmup: 1}, []int{64}},
		{"read lat", Spec{Op: OpRead, Kind: Lat}, []int{8, 8192}},
		{"read lat by events", Spec{Op: OpRead, Kind: Lat, Poll: PollEvent}, []int{8}},
		{"read bw", Spec{Op: OpRead, Kind: BW}, []int{65536}},
		{"read rate", Spec{Op: OpRead, Kind: Rate, Poll: PollAdaptive}, []int{8}},
		{"atomic lat", Spec{Op: OpAtomic, Kind: Lat}, nil},
		{"atomic rate", Spec{Op: OpAtomic, Kind: Rate, QPs: 2}, nil},
		{"compare and swap", Spec{Op: OpAtomic, Kind: BW, Atomic: CompareSwap}, nil},
		{"system clock", Spec{Op: OpRead, Kind: Lat}, []int{8}},
		{"send lat by TCP", Spec{Op: OpSend, Kind: Lat, Path: PathTCP, Inline: InlineAuto}, []int{1, 5000}},
		{"read rate by TCP, 3 QPs", Spec{Op: OpRead, Kind: Rate, Path: PathTCP, QPs: 3}, []int{64}},
		{"send bw by TCP", Spec{Op: OpSend, Kind: BW, Path: PathTCP, QPs: 2}, []int{65536}},
		{"rpc lat by TCP", Spec{Op: OpRPC, Kind: Lat, Path: PathTCP}, []int{8}},
		{"send lat by UDP", Spec{Op: OpSend, Kind: Lat, Path: PathUDP, Inline: InlineAuto}, []int{1, 5000}},
		{"write bw by UDP", Spec{Op: OpWrite, Kind: BW, Path: PathUDP, QPs: 2}, []int{65536}},
		{"rpc lat by UDP", Spec{Op: OpRPC, Kind: Lat, Path: PathUDP}, []int{8}},
		{"send lat through memory", Spec{Op: OpSend, Kind: Lat, Path: PathMemory}, []int{8}},
		{"rpc lat through memory", Spec{Op: OpRPC, Kind: Lat, Path: PathMemory}, []int{8}},
		{"rpc lat", Spec{Op: OpRPC, Kind: Lat}, []int{8, 20000}},
		{"rpc lat adaptive", Spec{Op: OpRPC, Kind: Lat, Poll: PollAdaptive}, []int{8}},
		{"rpc lat by events", Spec{Op: OpRPC, Kind: Lat, Poll: PollEvent}, []int{8}},
		{"rpc rate", Spec{Op: OpRPC, Kind: Rate, Iters: 2000}, []int{64}},
		{"rpc rate, much in flight", Spec{Op: OpRPC, Kind: Rate, InFlight: 300, Iters: 2000}, []int{64}},
		{"rpc bw", Spec{Op: OpRPC, Kind: BW, InFlight: 4}, []int{65536}},
		{"rpc for a time", Spec{Op: OpRPC, Kind: Rate, Duration: 5 * time.Millisecond}, []int{64}},
		{"for a time", Spec{Op: OpRead, Kind: Lat, Duration: 5 * time.Millisecond}, []int{8}},
		{"rate for a time", Spec{Op: OpSend, Kind: Rate, Duration: 5 * time.Millisecond}, []int{8}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := testConfig(srv.addr, tt.spec, tt.sizes...)
			if tt.name == "system clock" {
				cfg.Clock = ClockMono
			}
			rep, err := Run(t.Context(), cfg)
			for err == nil && rep.Results[0].Messages == 0 && cfg.Spec.Duration > 0 && cfg.Spec.Duration < testutil.Patience {
				// A loaded machine may not have let the loop run at all in that time.
				cfg.Spec.Duration *= 4
				rep, err = Run(t.Context(), cfg)
			}
			if err != nil {
				t.Fatal(err)
			}
			checkReport(t, rep, cfg)
			// Client and server are of one process. By default, that is the path through memory.
			if want := map[Path]string{PathUDP: "udp", PathTCP: "tcp"}[cfg.Spec.Path]; want == "" && rep.Path != "inproc" || want != "" && rep.Path != want {
				t.Errorf("%v: path %q", cfg.Spec.Path, rep.Path)
			}
		})
	}
}

// The kernel's devices, those of test/soft-roce: each operation for a moment, between two devices. iWARP is connected by rdma_cm.
func TestKernelDevices(t *testing.T) {
	for _, devices := range [][2]string{{"rxe0", "rxe1"}, {"siw0", "siw1"}} {
		t.Run(devices[0], func(t *testing.T) {
			if v, err := verbs.Open(devices[0]); err != nil {
				testutil.Skip(t, fmt.Sprintf("%v; go run ./test/soft-roce -- go test ./internal/perf has such devices", err))
			} else {
				v.Close()
			}
			iwarp := devices[0] == "siw0"
			srv := startServer(t, ServerConfig{Device: devices[1]})
			for name, spec := range map[string]Spec{
				"send lat":          {Op: OpSend, Kind: Lat, Poll: PollEvent, Inline: InlineAuto},
				"send bw, 3 QPs":    {Op: OpSend, Kind: BW, Poll: PollEvent, QPs: 3},
				"send rate by RNR":  {Op: OpSend, Kind: Rate, Poll: PollEvent, Flow: FlowRNR},
				"write lat":         {Op: OpWrite, Kind: Lat, Inline: InlineAuto},
				"write rate, 2 QPs": {Op: OpWrite, Kind: Rate, Poll: PollEvent, QPs: 2},
				"read lat":          {Op: OpRead, Kind: Lat, Poll: PollEvent},
				"read bw":           {Op: OpRead, Kind: BW, Poll: PollEvent},
				"atomic lat":        {Op: OpAtomic, Kind: Lat, Poll: PollEvent},
			} {
				t.Run(name, func(t *testing.T) {
					spec.Iters, spec.Warmup = 20, NoWarmup // both sides poll, on two emulated processors that the kernel needs, too
					cfg := testConfig(srv.addr, spec)
					cfg.Device = devices[0]
					rep, err := Run(t.Context(), cfg)
					refused := ""
					switch {
					case iwarp && spec.Op == OpAtomic:
						refused = "cannot do atomics"
					case iwarp && spec.Flow == FlowRNR:
						refused = "use --flow credit"
					}
					if refused != "" {
						if err == nil || !strings.Contains(err.Error(), refused) || !strings.Contains(err.Error(), devices[0]) {
							t.Errorf("error %v", err)
						}
						return
					}
					if err != nil {
						t.Fatal(err)
					}
					if r := rep.Results[0]; r.Partial || r.Messages != uint64(cfg.Spec.Iters) || (r.Latency != nil) != (spec.Kind == Lat) {
						t.Errorf("%+v", r)
					}
				})
			}
		})
	}
}

// checkReport checks what is true of every complete run.
func checkReport(t *testing.T, rep *Report, cfg *Config) {
	t.Helper()
	if rep.Interrupted || rep.Schema != Schema || rep.Path == "" || rep.Client.Device == "" || rep.Server.Device == "" || rep.Choice == nil {
		t.Errorf("incomplete report: %+v", rep)
	}
	if want := max(1, len(cfg.Sizes)); len(rep.Results) != want {
		t.Fatalf("%d results, want %d", len(rep.Results), want)
	}
	for i, r := range rep.Results {
		if len(cfg.Sizes) > 0 && r.Size != cfg.Sizes[i] {
			t.Errorf("result %d is of %d bytes, not %d", i, r.Size, cfg.Sizes[i])
		}
		if r.Messages == 0 || cfg.Spec.Iters > 0 && r.Messages != uint64(cfg.Spec.Iters) || r.Partial {
			t.Errorf("%d bytes: %d messages (partial: %v), want %d", r.Size, r.Messages, r.Partial, cfg.Spec.Iters)
		}
		if want := max(0, cfg.Spec.Warmup); r.Warmup != uint64(want) {
			t.Errorf("%d bytes: warm-up of %d, want %d", r.Size, r.Warmup, want)
		}
		if r.Seconds <= 0 || r.MessagesPerSecond <= 0 || r.MegabytesPerSecond <= 0 {
			t.Errorf("%d bytes: no rates: %+v", r.Size, r)
		}
		if want := rep.Test.LatencyOf != ""; want != (r.Latency != nil) {
			t.Errorf("%d bytes: latency is %+v", r.Size, r.Latency)
		}
		if l := r.Latency; l != nil && !(0 < l.Min && l.Min <= l.P50 && l.P50 <= l.P90 && l.P90 <= l.P99 && l.P99 <= l.P999 && l.P999 <= l.Max) {
			t.Errorf("%d bytes: %+v is not ordered", r.Size, l)
		}
		if r.ClientCPU == nil || r.ServerCPU == nil || *r.ClientCPU < 0 || *r.ServerCPU < 0 {
			t.Errorf("%d bytes: no CPU time: %+v", r.Size, r)
		}
	}
}

func TestRunRefused(t *testing.T) {
	ctx := t.Context()
	if _, err := Run(ctx, testConfig("127.0.0.1:1", Spec{Op: OpSend, Kind: Lat})); err == nil || !strings.Contains(err.Error(), "ringside perf server") {
		t.Errorf("no server: error %v does not say how to start one", err)
	}
	if _, err := Run(ctx, testConfig("x:1", Spec{Op: OpSend, Kind: Lat, QPs: 2})); err == nil || !strings.Contains(err.Error(), "uses 1 QP") {
		t.Errorf("bad spec: %v", err)
	}
	cfg := testConfig("x:1", Spec{Op: OpSend, Kind: Lat})
	cfg.Device = "nosuch0"
	if _, err := Run(ctx, cfg); err == nil || !strings.Contains(err.Error(), "nosuch0") || !strings.Contains(err.Error(), "ringside devices") {
		t.Errorf("bad device: %v", err)
	}
	if _, err := NewServer(ServerConfig{Device: "nosuch0", GIDIndex: -1}); err == nil || !strings.Contains(err.Error(), "ringside devices") {
		t.Errorf("bad device: %v", err)
	}
	if _, err := NewServer(ServerConfig{GIDIndex: 77}); err == nil || !strings.Contains(err.Error(), "no GID at index 77") {
		t.Errorf("bad GID index: %v", err)
	}
	cfg = testConfig(startServer(t, ServerConfig{}).addr, Spec{Op: OpRead, Kind: Lat})
	cfg.GIDIndex = 77
	if _, err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "no GID at index 77") {
		t.Errorf("a client's wrong GID index: %v", err)
	}
	if _, err := NewServer(ServerConfig{GIDIndex: -1, Port: 99}); err == nil || !strings.Contains(err.Error(), "--ib-port 99") {
		t.Errorf("bad port: %v", err)
	}
}

// TestServerBusy: one measurement at a time, and the second client is told so.
func TestServerBusy(t *testing.T) {
	srv := startServer(t, ServerConfig{})
	conn, err := net.Dial("tcp", srv.addr)
	if err != nil {
		t.Fatal(err)
	}
	c, _, err := newControl(conn, Host{Name: "first"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = Run(t.Context(), testConfig(srv.addr, Spec{Op: OpSend, Kind: Lat}))
	if err == nil || !strings.Contains(err.Error(), "busy with another client") {
		t.Errorf("second client: %v", err)
	}
	c.close()
	testutil.Eventually(t, "the next client is served", func() bool {
		_, err = Run(t.Context(), testConfig(srv.addr, Spec{Op: OpSend, Kind: Lat}))
		return err == nil
	})
}

// TestServerRefuses: whatever a client sends, it gets a reason, and the next client is served.
func TestServerRefuses(t *testing.T) {
	srv := startServer(t, ServerConfig{})
	spec := Spec{Op: OpSend, Kind: BW, Inline: InlineAuto}.WithDefaults()
	for _, tt := range []struct {
		name string
		m    message
		want string
	}{
		{"out of turn", &mark{}, "a mark frame came instead of a setup frame"},
		{"bad key", &setup{spec: spec, endpoint: sampleEndpoint(1)}, "malformed remote key"},
		{"no memory for that", &setup{spec: Spec{Op: OpWrite, Kind: BW, Size: MaxSize, QPs: 1000}.WithDefaults(), endpoint: sampleEndpoint(1)}, "registered memory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var c *control
			testutil.Eventually(t, "the server is free", func() bool {
				conn, err := net.Dial("tcp", srv.addr)
				if err != nil {
					t.Fatal(err)
				}
				c, _, err = newControl(conn, Host{Name: tt.name})
				return err == nil
			})
			defer c.close()
			if err := c.send(tt.m); err != nil {
				t.Fatal(err)
			}
			_, err := c.next(t.Context())
			var pe *PeerError
			if !errors.As(err, &pe) || !strings.Contains(pe.Text, tt.want) {
				t.Errorf("got %v, want a reason with %q", err, tt.want)
			}
		})
	}
}

// TestServerStops: a client in the middle of a test is told, and ends.
func TestServerStops(t *testing.T) {
	for _, spec := range []Spec{
		{Op: OpSend, Kind: Lat, Duration: time.Hour},
		{Op: OpWrite, Kind: Lat, Duration: time.Hour},
		{Op: OpRead, Kind: Rate, Duration: time.Hour},
		{Op: OpSend, Kind: Rate, Duration: time.Hour},
		{Op: OpRPC, Kind: Lat, Duration: time.Hour},
		{Op: OpRPC, Kind: Rate, Duration: time.Hour},
	} {
		t.Run(spec.Op.String()+" "+spec.Kind.String(), func(t *testing.T) {
			srv := startServer(t, ServerConfig{})
			cfg := testConfig(srv.addr, spec, 8)
			cfg.Progress = func(p Progress) {
				if p.Phase == "measuring" {
					time.AfterFunc(20*time.Millisecond, srv.end)
				}
			}
			_, err := Run(t.Context(), cfg)
			var pe *PeerError
			if !errors.As(err, &pe) || !strings.Contains(err.Error(), "the server was stopped") {
				t.Errorf("got %v", err)
			}
		})
	}
}

// TestInterrupt: a run that is interrupted has its results, from both sides.
func TestInterrupt(t *testing.T) {
	srv := startServer(t, ServerConfig{})
	for _, spec := range []Spec{
		{Op: OpSend, Kind: Lat, Duration: time.Hour},
		{Op: OpSend, Kind: Lat, Duration: time.Hour, Poll: PollEvent},
		{Op: OpWrite, Kind: Lat, Iters: maxIters},
		{Op: OpRead, Kind: Lat, Iters: maxIters, Poll: PollAdaptive},
		{Op: OpWrite, Kind: BW, Duration: time.Hour},
		{Op: OpSend, Kind: Rate, Iters: maxIters},
		{Op: OpSend, Kind: Rate, Iters: maxIters, Poll: PollEvent, QPs: 2},
		{Op: OpRPC, Kind: Lat, Iters: maxIters, Poll: PollAdaptive},
		{Op: OpRPC, Kind: Rate, Duration: time.Hour},
	} {
		t.Run(fmt.Sprint(spec.Op, " ", spec.Kind, " ", spec.Poll), func(t *testing.T) {
			// On a loaded machine, nothing may have been measured by the time of the interrupt: then later.
			var rep *Report
			for delay := 20 * time.Millisecond; rep == nil || len(rep.Results) == 0; delay *= 2 {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				cfg := testConfig(srv.addr, spec, 8, 16)
				cfg.Progress = func(p Progress) {
					if p.Phase == "measuring" {
						time.AfterFunc(delay, cancel)
					}
				}
				var err error
				if rep, err = Run(ctx, cfg); err != nil {
					t.Fatal(err)
				}
				if !rep.Interrupted || delay > testutil.Patience {
					t.Fatalf("interrupted after %v: %v, %d results", delay, rep.Interrupted, len(rep.Results))
				}
			}
			if len(rep.Results) != 1 {
				t.Fatalf("%d results", len(rep.Results))
			}
			r := rep.Results[0]
			if !r.Partial || r.Messages == 0 || r.ServerCPU == nil || r.MessagesPerSecond <= 0 {
				t.Errorf("%+v", r)
			}
		})
	}
}

// What is in flight when the duration is over has all the time that it takes, and not the grace period of an interrupt.
func TestEndOfDuration(t *testing.T) {
	const many = 1 << 40
	t.Run("verbs", func(t *testing.T) {
		client, _ := sidePair(t, Spec{Op: OpWrite, Kind: Rate, Duration: time.Millisecond}.WithDefaults())
		client.grace = 0
		l := &verbsLoad{side: client}
		if got, err := l.run(many, time.Millisecond, false); err != nil || got.n == many {
			t.Fatalf("%d operations, %v", got.n, err)
		}
		if err := client.swait.idle(); err != nil {
			t.Errorf("waiting for what is in flight: %v", err)
		}
		client.stop()
		if err := client.swait.idle(); !errors.Is(err, errHalted) {
			t.Errorf("waiting for what is in flight after an interrupt: %v", err)
		}
	})
	t.Run("rpc", func(t *testing.T) {
		spec := Spec{Op: OpRPC, Kind: Rate, Duration: time.Millisecond}.WithDefaults()
		l, err := transport.Listen(t.Context(), "127.0.0.1:0", transportConfig(&spec, nil))
		if err != nil {
			t.Fatal(err)
		}
		server := rpc.NewServer(nil)
		server.HandleRaw(rpc.Spec{Number: echoMethod, Inline: true}, func(call *rpc.Call, req []byte) error { return call.ReplyBytes(req) })
		served := make(chan error, 1)
		go func() { served <- server.Serve(context.Background(), l) }()
		defer func() {
			server.Close()
			if err := <-served; !errors.Is(err, rpc.ErrServerClosed) {
				t.Error(err)
			}
		}()
		cl, err := rpc.Dial(t.Context(), l.Addr().String(), transportConfig(&spec, nil), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer cl.Close()
		load, err := newRPCLoad(&spec, cl, clock{base: time.Now(), nsPerTick: 1})
		if err != nil {
			t.Fatal(err)
		}
		defer load.close()
		if got, err := load.run(many, time.Millisecond, false); err != nil || got.n == many {
			t.Fatalf("%d calls, %v", got.n, err)
		}
		if load.stopped.Load() {
			t.Error("the grace period has begun")
		}
	})
}

func TestInterruptBeforeMeasuring(t *testing.T) {
	srv := startServer(t, ServerConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cfg := testConfig(srv.addr, Spec{Op: OpSend, Kind: Lat, Warmup: 1 << 30}, 8)
	cfg.Progress = func(p Progress) {
		if p.Phase == "warm-up" {
			time.AfterFunc(10*time.Millisecond, cancel)
		}
	}
	rep, err := Run(ctx, cfg)
	if err != nil || rep == nil || !rep.Interrupted || len(rep.Results) != 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
}

// Spec.Spin reaches what polls for calls, on both sides.
func TestRPCSpin(t *testing.T) {
	for _, spec := range []Spec{{Op: OpRPC, Kind: Lat, Poll: PollAdaptive, Spin: 7 * time.Microsecond}, {Op: OpRPC, Kind: Rate, Poll: PollAdaptive}} {
		want := spec.Spin
		if want == 0 {
			want = 50 * time.Microsecond
		}
		spec = spec.WithDefaults()
		if c := pollerConfig(&spec); c.Mode != transport.Adaptive || c.SpinBudget != want {
			t.Errorf("%v: mode %v, %v; want %v", spec.Kind, c.Mode, c.SpinBudget, want)
		}
	}
}

func TestServeOnce(t *testing.T) {
	srv := startServer(t, ServerConfig{Once: true})
	if _, err := Run(t.Context(), testConfig(srv.addr, Spec{Op: OpRead, Kind: Lat})); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "the server stops listening", func() bool {
		conn, err := net.Dial("tcp", srv.addr)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
}

// TestLoopsAllocateNothing runs the timed loops of both sides under testing.AllocsPerRun.
func TestLoopsAllocateNothing(t *testing.T) {
	for _, spec := range []Spec{
		{Op: OpSend, Kind: Lat, Inline: InlineAuto},
		{Op: OpWrite, Kind: Lat},
		{Op: OpRead, Kind: Lat},
		{Op: OpAtomic, Kind: Lat},
		{Op: OpSend, Kind: Rate},
		{Op: OpWrite, Kind: Rate, QPs: 2},
		{Op: OpRead, Kind: BW, Size: 4096},
	} {
		t.Run(spec.Op.String()+" "+spec.Kind.String(), func(t *testing.T) {
			spec.Iters = 1000
			client, server := sidePair(t, spec.WithDefaults())
			server.grace = 0
			ended := make(chan error, 1)
			v := newVerbsService(server)
			go func() { ended <- v.run() }()
			l := &verbsLoad{side: client}
			if err := l.prepare(clock{base: time.Now(), nsPerTick: 1}); err != nil {
				t.Fatal(err)
			}
			run := func() (err error) {
				switch {
				case spec.Kind != Lat:
					_, err = client.stream(300)
				case spec.Op == OpSend:
					_, err = client.pingSend(100)
				case spec.Op == OpWrite:
					_, err = client.pingWrite(100)
				default:
					_, err = client.operate(100)
				}
				return err
			}
			var err error
			if n := testing.AllocsPerRun(10, func() {
				if e := run(); e != nil {
					err = e
				}
			}); n != 0 {
				t.Errorf("300 or 100 operations allocate %v times", n)
			}
			if err != nil {
				t.Error(err)
			}
			v.halt()
			if err := <-ended; err != nil && !errors.Is(err, errHalted) {
				t.Errorf("server: %v", err)
			}
		})
	}
}

// sidePair returns the two connected sides of a test.
func sidePair(t testing.TB, spec Spec) (client, server *side) {
	t.Helper()
	s, err := NewServer(ServerConfig{GIDIndex: -1, CPU: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	var sides [2]*side
	var ends [2]endpoint
	for i := range sides {
		if sides[i], err = newSide(s.vctx, spec, i == 1, portOptions{gidIndex: -1}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(sides[i].close)
		if ends[i], err = sides[i].endpoint(); err != nil {
			t.Fatal(err)
		}
	}
	for i := range sides {
		if err := sides[i].connect(t.Context(), &ends[1-i], nil); err != nil {
			t.Fatal(err)
		}
	}
	return sides[0], sides[1]
}

func TestServerAddr(t *testing.T) {
	for in, want := range map[string]string{"host": "host:18515", "host:1": "host:1", ":1": ":1", "::1": "[::1]:18515", "[::1]": "[::1]:18515", "[::1]:7": "[::1]:7", "": ""} {
		got, err := ServerAddr(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("ServerAddr(%q) = %q, %v", in, got, err)
		}
	}
}

func BenchmarkLoop(b *testing.B) {
	for _, spec := range []Spec{{Op: OpRead, Kind: Lat}, {Op: OpWrite, Kind: Rate}} {
		b.Run(spec.Op.String()+" "+spec.Kind.String(), func(b *testing.B) {
			spec.Iters = 1
			client, _ := sidePair(b, spec.WithDefaults())
			l := &verbsLoad{side: client}
			client.spec.Iters = 1 << 16
			if err := l.prepare(clock{base: time.Now(), nsPerTick: 1}); err != nil {
				b.Fatal(err)
			}
			b.ResetTimer()
			if _, err := l.run(int64(b.N), 0, false); err != nil {
				b.Fatal(err)
			}
		})
	}
}
