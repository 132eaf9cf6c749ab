package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/examples/internal/device"
	"github.com/ringside-rdma/ringside/examples/internal/spawn"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/rpc"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
)

// With mainEnv set the test binary is the program: it starts itself as a child, as the program does.
const mainEnv = "PARAMSERVER_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(mainEnv) != "" {
		main()
		return
	}
	testutil.Main(m)
}

// patience bounds a test that trains: seconds, and minutes where the machine is emulated and its host has other things to do.
func patience(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 6*testutil.Patience)
	t.Cleanup(cancel)
	return ctx
}

var resultLine = regexp.MustCompile(`^accuracy=(0\.\d{3}) epochs=(\d+) workers=(\d+) pull_p50_us=(\d+\.\d) push_p50_us=(\d+\.\d) device=(\S+) path=(\S+)$`)

// checkResult takes the last line of a report apart.
func checkResult(t *testing.T, output string, epochs, workers int) (accuracy float64) {
	t.Helper()
	t.Log("\n" + output)
	lines := strings.Split(strings.TrimSpace(output), "\n")
	f := resultLine.FindStringSubmatch(lines[len(lines)-1])
	if f == nil {
		t.Fatalf("the last line is no result: %q", lines[len(lines)-1])
	}
	accuracy, err := strconv.ParseFloat(f[1], 64)
	if err != nil || accuracy < 0.93 {
		t.Errorf("accuracy %s, want at least 0.93", f[1])
	}
	if f[2] != strconv.Itoa(epochs) || f[3] != strconv.Itoa(workers) {
		t.Errorf("%s epochs and %s workers, want %d and %d", f[2], f[3], epochs, workers)
	}
	for _, latency := range f[4:6] {
		if v, err := strconv.ParseFloat(latency, 64); err != nil || v <= 0 {
			t.Errorf("latency %s", latency)
		}
	}
	return accuracy
}

const testEpochs = 12

func runDemo(t *testing.T, args string) string {
	t.Helper()
	t.Setenv(mainEnv, "1")
	var out, errs strings.Builder
	err := run(patience(t), strings.Fields(fmt.Sprintf("-demo -workers 3 -epochs %d %s", testEpochs, args)), &out, &errs)
	if err != nil || errs.Len() > 0 {
		t.Fatalf("%v\n%s%s", err, out.String(), errs.String())
	}
	return out.String()
}

// The demo trains in four processes what one would have: synchronous training depends on nothing but the seed.
func TestDemoSync(t *testing.T) {
	got := checkResult(t, runDemo(t, "-seed 5"), testEpochs, 3)

	j := newTestJob(t, trainConfig{workers: 3, sync: true, epochs: testEpochs, batch: defaultBatch, seed: 5})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { j.work(t, nil, nil) })
	}
	wg.Wait()
	if want := fmt.Sprintf("%.3f", j.final(t).accuracy); want != fmt.Sprintf("%.3f", got) {
		t.Errorf("accuracy is %.3f over the network, and %s without", got, want)
	}
}

// One worker is slow; the others run into the bound, and no further.
func TestDemoStale(t *testing.T) {
	out := runDemo(t, "-mode stale -staleness 2 -pause 200us")
	checkResult(t, out, testEpochs, 3)
	f := regexp.MustCompile(`furthest ahead of the slowest: (\d+) gradients`).FindStringSubmatch(out)
	if f == nil || f[1] != "2" {
		t.Errorf("how far ahead: %q, want 2", f)
	}
}

// A worker is killed with kill -9 in the middle, and replaced.
func TestDemoKill(t *testing.T) {
	for _, mode := range []string{"sync", "stale"} {
		t.Run(mode, func(t *testing.T) {
			// As slow as it takes for the other one to take part.
			var out string
			for pause := 3 * time.Millisecond; pause < 200*time.Millisecond; pause *= 4 {
				out = runDemo(t, fmt.Sprintf("-kill 2 -pause %v -mode %s", pause, mode))
				if strings.Contains(out, "worker 4 has joined") {
					break
				}
			}
			checkResult(t, out, testEpochs, 3)
			for _, want := range []string{"with signal 9", "starting another", "is gone", "worker 4 has joined", "workers lost: 1"} {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in the output", want)
				}
			}
		})
	}
}

// The demo counts epochs by the server's lines, of which others begin with a number, too.
func TestEpochLine(t *testing.T) {
	var out strings.Builder
	want := epochStat{epoch: 12, accuracy: 0.961, loss: 0.125, version: 360, workers: 3}
	s := &server{out: &out}
	s.epochDone(want)
	if got, err := parseEpoch(strings.TrimSuffix(out.String(), "\n")); err != nil || got != want {
		t.Errorf("%q is read as %+v, %v", out.String(), got, err)
	}
	s.epochDone(epochStat{epoch: 1})
	heading := strings.Split(out.String(), "\n")[1]
	for _, line := range []string{heading, "2410 parameters; 1438 digits to train on, 359 held out", "3 workers have not reported in time", ""} {
		if e, err := parseEpoch(line); err == nil {
			t.Errorf("%q is read as epoch %d", line, e.epoch)
		}
	}
}

func TestDemoInterrupted(t *testing.T) {
	t.Setenv(mainEnv, "1")
	ctx, cancel := context.WithCancel(patience(t))
	defer cancel()
	out := &cancelOn{what: " 2 ", cancel: cancel}
	var errs strings.Builder
	if err := run(ctx, strings.Fields("-demo -epochs 100000"), out, &errs); !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
	if errs.Len() > 0 {
		t.Errorf("complaints: %s", errs.String())
	}
}

// cancelOn cancels when a line with what in it is printed.
type cancelOn struct {
	what   string
	cancel func()
}

func (c *cancelOn) Write(p []byte) (int, error) {
	if strings.Contains(string(p), c.what) {
		c.cancel()
	}
	return len(p), nil
}

// testServer is a server in this process.
type testServer struct {
	addr string
	out  *syncBuilder
	done chan error
}

type syncBuilder struct {
	mu sync.Mutex
	b  strings.Builder
}

func (s *syncBuilder) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuilder) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func startServer(t *testing.T, ctx context.Context, cfg trainConfig) *testServer {
	t.Helper()
	cfg.rate, cfg.momentum, cfg.batch = defaultRate, defaultMomentum, defaultBatch
	s := &testServer{out: &syncBuilder{}, done: make(chan error, 1)}
	ready := make(chan net.Addr, 1)
	go func() {
		s.done <- serve(ctx, "127.0.0.1:0", &device.Options{}, cfg, s.out, func(a net.Addr) { ready <- a })
	}()
	select {
	case a := <-ready:
		s.addr = a.String()
	case err := <-s.done:
		t.Fatal(err)
	}
	return s
}

// Server and workers in one process leave nothing behind.
func TestInOneProcess(t *testing.T) {
	for name, cfg := range map[string]trainConfig{
		"sync":  {workers: 2, sync: true, epochs: 10},
		"stale": {workers: 2, staleness: 3, epochs: 10},
	} {
		t.Run(name, func(t *testing.T) {
			testutil.CheckLeaks(t)
			ctx := patience(t)
			s := startServer(t, ctx, cfg)
			errs := make(chan error, 2)
			for range 2 {
				go func() { errs <- work(ctx, s.addr, &device.Options{}, 0) }()
			}
			for range 2 {
				if err := <-errs; err != nil {
					t.Error(err)
				}
			}
			if err := <-s.done; err != nil {
				t.Fatal(err)
			}
			checkResult(t, s.out.String(), 10, 2)
		})
	}
}

// Every worker is killed, some before they have done anything, and others take over.
func TestAllWorkersKilled(t *testing.T) {
	t.Setenv(mainEnv, "1")
	for name, cfg := range map[string]trainConfig{
		"sync":  {workers: 2, sync: true, epochs: 12},
		"stale": {workers: 2, staleness: 3, epochs: 12},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := patience(t)
			s := startServer(t, ctx, cfg)
			startWorker := func(args ...string) *spawn.Process {
				p, err := spawn.Start(ctx, os.Stderr, append([]string{"-child", "-connect", s.addr}, args...)...)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(p.Kill)
				return p
			}
			for round := range 3 {
				// Slow enough not to be done before they die.
				a, b := startWorker("-pause", "2ms"), startWorker("-pause", "2ms")
				if round > 0 {
					testutil.Eventually(t, "both have joined", func() bool {
						return strings.Contains(s.out.String(), fmt.Sprintf("worker %d has joined", 2*round))
					})
					time.Sleep(time.Duration(round) * 7 * time.Millisecond) // anywhere in a step
				}
				a.Kill()
				b.Kill()
			}
			if strings.Contains(s.out.String(), fmt.Sprintf("\n%5d  ", cfg.epochs)) {
				t.Fatal("training was over before the workers died: the test does not test")
			}
			a, b := startWorker(), startWorker()
			<-a.Done() // when training is over; the context bounds that
			<-b.Done()
			if err := errors.Join(a.Err(), b.Err(), <-s.done); err != nil {
				t.Error(err)
			}
			checkResult(t, s.out.String(), cfg.epochs, 2)
		})
	}
}

func TestServerKilled(t *testing.T) {
	t.Setenv(mainEnv, "1")
	ctx := patience(t)
	server, err := spawn.Start(ctx, os.Stderr, "-child", "-listen", "127.0.0.1:0", "-workers", "1", "-epochs", "1000000")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Kill)
	addr := ""
	for addr == "" {
		line, err := server.Line()
		if err != nil {
			t.Fatal(err)
		}
		addr, _ = strings.CutPrefix(line, listeningPrefix)
		if addr == line {
			addr = ""
		}
	}
	done := make(chan error, 1)
	go func() { done <- work(ctx, addr, &device.Options{}, 0) }()
	for {
		line, err := server.Line()
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(line, "    2  ") {
			break
		}
	}
	server.Kill()
	if err := <-done; err == nil || ctx.Err() != nil {
		t.Errorf("the worker ended with %v", err)
	} else {
		t.Log(err)
	}
}

// Strangers and rule-breakers are refused, and training goes on without them.
func TestRefusesStrangers(t *testing.T) {
	testutil.CheckLeaks(t)
	ctx, cancel := context.WithCancel(patience(t))
	defer cancel()
	s := startServer(t, ctx, trainConfig{workers: 1, sync: true, epochs: 10})
	client, err := rpc.Dial(ctx, s.addr, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	token := make([]byte, tokenBytes)
	if _, err := rpc.Invoke[*NextReply](ctx, client, methodNext, &NextRequest{Token: token}); rpc.CodeOf(err) != rpc.FailedPrecondition {
		t.Errorf("next without join: %v", err)
	}
	if _, err := rpc.Invoke[*ReportReply](ctx, client, methodReport, &ReportRequest{Token: token}); rpc.CodeOf(err) != rpc.FailedPrecondition {
		t.Errorf("report without join: %v", err)
	}
	short, stop := context.WithTimeout(ctx, 50*time.Millisecond)
	if _, err := rpc.Invoke[*JoinReply](short, client, methodJoin, &JoinRequest{Token: token}); err == nil {
		t.Error("join without a data connection went well")
	}
	stop()

	cutOff := func(what string, token []byte, misbehave func(c *transport.Conn)) {
		t.Helper()
		c, err := transport.Dial(ctx, s.addr, &transport.Config{PrivateData: token})
		if err != nil {
			t.Fatal(err)
		}
		misbehave(c)
		select {
		case <-c.Done():
		case <-ctx.Done():
			t.Errorf("%s: not cut off", what)
		}
		c.Close()
	}
	cutOff("a short token", []byte("x"), func(*transport.Conn) {})
	cutOff("a message on a data connection", token, func(c *transport.Conn) { c.Send(ctx, []byte("hello")) })

	// A worker that announces a gradient which it has not written. Its token is not that of before: the server may not have
	// noticed yet that that connection has ended.
	token[0]++
	var m *JoinReply
	cutOff("an empty gradient", token, func(c *transport.Conn) {
		if m, err = rpc.Invoke[*JoinReply](ctx, client, methodJoin, &JoinRequest{Token: token}); err != nil {
			t.Fatal(err)
		}
		if _, err := rpc.Invoke[*JoinReply](ctx, client, methodJoin, &JoinRequest{Token: token}); rpc.CodeOf(err) != rpc.FailedPrecondition {
			t.Errorf("a second join: %v", err)
		}
		if _, err := rpc.Invoke[*NextReply](ctx, client, methodNext, &NextRequest{Token: token}); err != nil {
			t.Fatal(err)
		}
		var slot transport.Remote
		if err := slot.UnmarshalBinary(m.GradientRegion); err != nil {
			t.Fatal(err)
		}
		b, err := c.Poller().Pool().Get(8)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Release()
		// The server may have hung up before we hear that the write is acknowledged.
		if err := c.WriteImm(ctx, b.SGE(0, 8), slot, 0, 1); err != nil && !strings.Contains(err.Error(), "announced") {
			t.Error(err)
		}
	})
	if err := client.Close(); err != nil {
		t.Error(err)
	}
	if err := work(ctx, s.addr, &device.Options{}, 0); err != nil {
		t.Error(err)
	}
	if err := <-s.done; err != nil {
		t.Fatal(err)
	}
	checkResult(t, s.out.String(), 10, 1)
}

// A data connection that no join follows does not keep its place; a worker's does, however long it has been there.
func TestSilentDataConnection(t *testing.T) {
	testutil.CheckLeaks(t)
	defer func(d time.Duration) { linkPatience = d }(linkPatience)
	linkPatience = time.Millisecond
	ctx, cancel := context.WithCancel(patience(t))
	s := startServer(t, ctx, trainConfig{workers: 1, sync: true, epochs: 1})
	c, err := transport.Dial(ctx, s.addr, &transport.Config{PrivateData: make([]byte, tokenBytes)})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Done():
		if err := c.Err(); !strings.Contains(err.Error(), "nobody has joined") {
			t.Errorf("ended with %v", err)
		}
	case <-ctx.Done():
		t.Error("not cut off")
	}
	c.Close()
	cancel()
	if err := <-s.done; !errors.Is(err, context.Canceled) {
		t.Errorf("the server ended with %v", err)
	}

	a, _ := transporttest.Pair(t, nil)
	new(server).expectJoined(&dataLink{conn: a, m: &member{}})
	if err := a.Err(); err != nil {
		t.Errorf("a worker was cut off: %v", err)
	}
}

// A slow worker that is interrupted does not sleep on.
func TestPauseInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- (&worker{pause: time.Hour}).push(ctx, nil, 1, assignment{}) }()
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("ended with %v", err)
		}
	case <-time.After(testutil.Patience):
		t.Error("it sleeps on")
	}
}

// A gradient that its worker's death has overtaken is dropped without a word; one that comes before the join is not.
func TestPushOvertaken(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	conn, _ := transporttest.Pair(t, nil)
	out := &syncBuilder{}
	s := &server{ctx: ctx, out: out, pushes: make(chan push), links: map[string]*dataLink{}}
	s.wg.Go(s.train)
	d := &dataLink{s: s, conn: conn, token: "worker"}
	s.pushes <- push{d, 1}
	s.pushes <- push{d, 2} // is taken when train is through with the one before
	if err := conn.Err(); err != nil || out.String() != "" {
		t.Errorf("overtaken: %v, %q", err, out.String())
	}
	early := &dataLink{s: s, conn: conn, token: "early"}
	s.mu.Lock()
	s.links["early"] = early
	s.mu.Unlock()
	s.pushes <- push{early, 1}
	cancel()
	s.wg.Wait()
	if err := conn.Err(); err == nil || !strings.Contains(out.String(), "before its worker had joined") {
		t.Errorf("early: %v, %q", err, out.String())
	}
}

func TestBadUse(t *testing.T) {
	for args, want := range map[string]string{
		"":                                "-demo, -listen and -connect",
		"-demo -listen :0":                "-demo, -listen and -connect",
		"-demo extra":                     "unexpected argument",
		"-demo -mode fast":                "-mode",
		"-demo -workers 0":                "workers",
		"-demo -epochs 0":                 "epochs",
		"-demo -batch 2":                  "batch",
		"-demo -rate -1":                  "rate",
		"-demo -kill 12":                  "-kill",
		"-demo -poll often":               "poll",
		"-demo -mode stale -staleness -1": "staleness",
		"-connect 127.0.0.1:1":            "127.0.0.1:1",
		"-listen 127.0.0.1:0 -device no0": "no0",
		"-listen nowhere:x":               "listen",
	} {
		var out strings.Builder
		if err := run(patience(t), strings.Fields(args), &out, &out); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", args, err)
		}
	}
}
