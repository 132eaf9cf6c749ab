package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs"
)

// softRoCE is set by test/soft-roce, which promises the devices and the programs.
const softRoCE = "RINGSIDE_SOFT_ROCE"

// missing skips the test, or fails it where nothing may be missing.
func missing(t *testing.T, format string, args ...any) {
	t.Helper()
	reason := fmt.Sprintf(format, args...)
	if os.Getenv(softRoCE) != "" {
		t.Fatalf("%s, which must be there when %s is set", reason, softRoCE)
	}
	testutil.Skip(t, reason)
}

// A pairing says on which device which side is.
type pairing struct{ ours, theirs string }

var pairings = []pairing{{"rxe0", "rxe0"}, {"rxe1", "rxe0"}}

// addresses are where the devices of test/soft-roce are; each has its address in slot 1 of the GID table.
var addresses = map[string]string{"rxe0": "10.77.0.1", "rxe1": "10.77.0.2"}

const gidSlot = 1

// needDevices returns the pairings. It does not return unless both devices can be opened.
func needDevices(t *testing.T) []pairing {
	t.Helper()
	for name := range addresses {
		c, err := verbs.Open(name)
		if err != nil {
			missing(t, "the device %s: %v", name, err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return across(pairings)
}

// across leaves out, with -short, pairings on one device.
func across(all []pairing) []pairing {
	if !testing.Short() {
		return all
	}
	return slices.DeleteFunc(slices.Clone(all), func(p pairing) bool { return p.ours == p.theirs })
}

func (p pairing) String() string { return "go-" + p.ours + "-c-" + p.theirs }

// A program is a C program that runs as a peer.
type program struct {
	cmd          *exec.Cmd
	stdout, errs bytes.Buffer // once done is closed
	done         chan struct{}
	err          error // once done is closed
}

// String is what it has printed, once done is closed.
func (p *program) String() string { return p.stdout.String() + p.errs.String() }

// start starts a program; it is killed when ctx ends. ended is called when it does not succeed. The error of one that was killed since
// time was up is context.DeadlineExceeded.
func start(ctx context.Context, ended func(), name string, args ...string) (*program, error) {
	p := &program{cmd: exec.CommandContext(ctx, name, args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.errs
	p.cmd.WaitDelay = 5 * time.Second
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		if p.err = p.cmd.Wait(); p.err == nil {
			p.err = judge(p.String())
		} else if ctx.Err() == context.DeadlineExceeded {
			p.err = errors.Join(ctx.Err(), p.err) // which says only that it was killed
		}
		if p.err != nil {
			ended()
		}
	}()
	return p, nil
}

// judge finds what ibv_*_pingpong reports without failing for it.
func judge(output string) error {
	if i := strings.Index(output, "invalid data"); i >= 0 {
		line, _, _ := strings.Cut(output[i:], "\n")
		return errors.New(line)
	}
	return nil
}

// A meeting is a run of one side here with a C program.
type meeting struct {
	pairing
	goServes bool
	program  string
	args     []string // less port and server
	// run is this side: the server with a listener, or the client of addr. It calls wait before it closes anything.
	run func(ctx context.Context, l net.Listener, addr string, port int, wait func()) (fmt.Stringer, error)
}

// hold runs both sides and returns what went wrong on either.
func (m *meeting) hold(t *testing.T, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	var l net.Listener
	var port int
	args := append([]string{"-g", strconv.Itoa(gidSlot), "-d", m.theirs}, m.args...)
	server := addresses[m.theirs]
	if m.goServes {
		server = addresses[m.ours]
		var err error
		if l, err = net.Listen("tcp", net.JoinHostPort(server, "0")); err != nil {
			return err
		}
		port = l.Addr().(*net.TCPAddr).Port
		args = append(args, "-p", strconv.Itoa(port), server)
		server = ""
	} else {
		port = freePort(t)
		args = append(args, "-p", strconv.Itoa(port))
	}
	p, err := start(ctx, cancel, m.program, args...)
	if err != nil {
		if l != nil {
			l.Close()
		}
		return err
	}
	r, err := m.run(ctx, l, server, port, func() {
		select {
		case <-p.done:
		case <-ctx.Done():
		}
	})
	if err != nil {
		cancel() // the peer waits for what does not come
	}
	<-p.done
	if err == nil && p.err == nil {
		t.Logf("%v", r)
		return nil
	}
	return fmt.Errorf("%w\n%s %s:\n%s",
		errors.Join(err, p.err), filepath.Base(m.program), strings.Join(args, " "), p)
}

// Messages to and from ibv_rc_pingpong and its kin.
func TestPingPongWithC(t *testing.T) {
	devices := needDevices(t)
	eachRun(t, func(t *testing.T, o pingPong) {
		shortly(t, o)
		name, err := exec.LookPath("ibv_" + string(o.service) + "_pingpong")
		if err != nil {
			missing(t, "%v", err)
		}
		for _, d := range devices {
			for _, goServes := range []bool{true, false} {
				t.Run(fmt.Sprintf("%v/%s", d, role(goServes)), func(t *testing.T) { pingPongWithC(t, o, name, d, goServes) })
			}
		}
	})
}

// shortly leaves a run out with -short: what is left is each service polling and with events, with messages of one packet and of many.
func shortly(t *testing.T, o pingPong) {
	if testing.Short() && (o.size == 1 || (o.size > 4096) != o.events && o.service != ud) {
		t.Skip("left out by -short")
	}
}

func role(goServes bool) string {
	if goServes {
		return "go-serves"
	}
	return "c-serves"
}

func pingPongWithC(t *testing.T, o pingPong, name string, d pairing, goServes bool) {
	o.device, o.gidIndex = d.ours, gidSlot
	o.fill = fillOfC(o.service)
	m := meeting{pairing: d, goServes: goServes, program: name, args: pingPongArgs(o),
		run: func(ctx context.Context, l net.Listener, addr string, port int, wait func()) (fmt.Stringer, error) {
			o := o
			o.listener, o.server, o.port, o.beforeClose = l, addr, port, wait
			return o.run(ctx)
		}}
	tolerant(t, o.service == uc || o.service == ud, func(limit time.Duration) error { return m.hold(t, limit) })
}

// fillOfC is what the buffers of the C programs are full of.
func fillOfC(s service) int {
	if s == srq {
		return 0
	}
	return 0x7b
}

// pingPongArgs are the arguments of the C program that the same options give.
func pingPongArgs(o pingPong) []string {
	args := []string{"-c", "-s", strconv.Itoa(o.size), "-n", strconv.Itoa(o.iters), "-r", strconv.Itoa(o.rxDepth)}
	if o.events {
		args = append(args, "-e")
	}
	if o.service != ud {
		args = append(args, "-m", strconv.Itoa(o.mtu))
	}
	if o.service == srq {
		args = append(args, "-q", strconv.Itoa(o.numQP))
	}
	return args
}

// tolerant runs something that datagrams which are lost may end, which UC and UD allow: nobody sends them again, and both sides
// wait for ever. Only that is tried again; data that is wrong is wrong the first time.
func tolerant(t *testing.T, datagrams bool, run func(limit time.Duration) error) {
	t.Helper()
	tries, limit := 1, 2*testutil.Patience
	if datagrams {
		tries, limit = 3, testutil.Patience
	}
	for {
		err := run(limit)
		if err == nil {
			return
		}
		if tries--; tries == 0 || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		t.Logf("trying again, for a datagram may have been lost: %v", err)
	}
}

// compiled returns the C peer of integrity runs.
func compiled(t *testing.T) string {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		missing(t, "%v", err)
	}
	name := filepath.Join(t.TempDir(), "integrity")
	cmd := exec.Command(gcc, "-std=gnu11", "-O1", "-Wall", "-o", name, "testdata/integrity.c", "-libverbs")
	out, err := cmd.CombinedOutput()
	switch {
	case err == nil:
	case bytes.Contains(out, []byte("infiniband/verbs.h: No such file")), bytes.Contains(out, []byte("cannot find -libverbs")):
		missing(t, "libibverbs to compile with (Debian: libibverbs-dev): %s", out)
	default:
		t.Fatalf("compiling the C peer: %v\n%s", err, out)
	}
	return name
}

// Reads, writes, sends and atomics with a C program, in both directions at once, all memory compared after each round.
func TestIntegrityWithC(t *testing.T) {
	devices := needDevices(t)
	name := compiled(t)
	random := uint64(time.Now().UnixNano()) // told in the log, and in every error
	for _, d := range devices {
		t.Run(fmt.Sprintf("c-%s-c-%s", d.ours, d.theirs), func(t *testing.T) { integrityBetweenC(t, name, d) })
		for _, goServes := range []bool{true, false} {
			for i, seed := range []uint64{1, 2, random} {
				events := i == 1
				if testing.Short() && i == 0 {
					continue
				}
				what := strconv.Itoa(i + 1)
				if seed == random {
					what = "random"
				}
				t.Run(fmt.Sprintf("%v/%s/%s", d, role(goServes), what), func(t *testing.T) {
					t.Logf("seed %#x", seed)
					integrityWithC(t, name, d, goServes, seed, events)
				})
			}
		}
	}
}

const integrityRounds = 60

func integrityWithC(t *testing.T, name string, d pairing, goServes bool, seed uint64, events bool) {
	args := []string{"-l"}
	if events {
		args = append(args, "-e")
	}
	if !goServes { // the client's count
		args = append(args, "-m", "512")
	} else {
		args = append(args, "-m", "4096", "-n", strconv.Itoa(integrityRounds), "-s", strconv.FormatUint(seed, 10))
	}
	m := meeting{pairing: d, goServes: goServes, program: name, args: args,
		run: func(ctx context.Context, l net.Listener, addr string, port int, wait func()) (fmt.Stringer, error) {
			o := integrityDefaults()
			o.device, o.gidIndex, o.events, o.lostResults = d.ours, gidSlot, events, true
			o.listener, o.server, o.port, o.seed, o.rounds = l, addr, port, seed, integrityRounds
			r, err := o.run(ctx)
			if err == nil {
				wait()
			}
			return r, err
		}}
	if err := m.hold(t, 2*testutil.Patience); err != nil {
		t.Fatal(err)
	}
}

// integrityBetweenC is the programs with each other, without this library: if it fails, so may all else, and for another
// reason.
func integrityBetweenC(t *testing.T, name string, d pairing) {
	m := meeting{pairing: d, program: name, args: []string{"-l"},
		run: func(ctx context.Context, _ net.Listener, addr string, port int, _ func()) (fmt.Stringer, error) {
			args := []string{"-l", "-g", strconv.Itoa(gidSlot), "-d", d.ours, "-p", strconv.Itoa(port), "-n", "20", "-e", addr}
			c, err := start(ctx, func() {}, name, args...)
			if err != nil {
				return nil, err
			}
			<-c.done
			return c, c.err
		}}
	if err := m.hold(t, 2*testutil.Patience); err != nil {
		t.Fatal(err)
	}
}
