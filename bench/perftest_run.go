package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// vmCommand is the argument that makes this program measure in the machine.
const vmCommand = "perftest-in-machine"

// vmCase is one thing that both systems measure, under the same conditions: RC on the port's MTU, GID index 1, busy polling,
// nothing inline, and no warm-up, of which perftest has none for SEND and WRITE.
type vmCase struct {
	op   string // send, write, read or atomic
	kind string // lat or bw
	size int    // bytes
}

var vmCases = []vmCase{
	{"send", "lat", 8}, {"send", "lat", 64}, {"send", "lat", 4096},
	{"write", "lat", 8}, {"write", "lat", 64}, {"write", "lat", 4096},
	{"read", "lat", 8}, {"read", "lat", 64}, {"read", "lat", 4096},
	{"atomic", "lat", 8},
	{"send", "bw", 65536}, {"write", "bw", 65536}, {"read", "bw", 65536},
}

func (c vmCase) ours() string   { return perfName(c.op, c.kind, c.size) }
func (c vmCase) theirs() string { return c.program() + " " + sizeName(c.size) }

// program is perftest's for this case.
func (c vmCase) program() string { return "ib_" + c.op + "_" + c.kind }

func (c vmCase) iters(quick bool) int {
	switch {
	case quick && c.kind == "bw":
		return 50
	case quick:
		return 200
	case c.kind == "bw":
		return 1000
	}
	return 2500
}

// Queues of bandwidth tests. In perftest's latency tests each work request is signaled, and its completion awaited before
// anything else is done: a queue of one. ringside perf then posts 4 receives.
const (
	bwDepth     = 128
	bwRecvDepth = 2 * bwDepth // as many receives as ringside perf posts
	latReceives = 4
	maxReads    = 16 // READs and atomics on their way: package qp's default
)

// ringsideArgs are the arguments of `ringside perf`'s client, without address and device.
func (c vmCase) ringsideArgs(quick bool) []string {
	a := []string{"perf", c.op, c.kind, "-o", "json", "--iters", strconv.Itoa(c.iters(quick)), "--warmup", "0", "--signal-every", "1"}
	if c.op != "atomic" {
		a = append(a, "--size", strconv.Itoa(c.size))
	}
	if c.op == "send" || c.op == "write" {
		a = append(a, "--inline", "0")
	}
	if c.kind == "lat" {
		return append(a, "--depth", "1")
	}
	if c.op == "send" {
		a = append(a, "--flow", "rnr") // perftest has no credits
	}
	return append(a, "--depth", strconv.Itoa(bwDepth), "--batch", "1")
}

// perftestArgs are the arguments of both sides of perftest's program, without address and device.
func (c vmCase) perftestArgs(quick bool) []string {
	a := []string{"-F", "-n", strconv.Itoa(c.iters(quick))} // -F: do not look at the processor's frequency
	if c.op != "atomic" {
		a = append(a, "-s", strconv.Itoa(c.size))
	}
	if c.op == "read" || c.op == "atomic" {
		a = append(a, "-o", strconv.Itoa(maxReads))
	}
	receives := latReceives
	if c.kind == "bw" {
		a = append(a, "-t", strconv.Itoa(bwDepth), "-Q", "1")
		receives = bwRecvDepth
	}
	if c.op == "send" {
		a = append(a, "-r", strconv.Itoa(receives))
	}
	return a
}

// vmTimeout is for one run. The longest takes a few seconds on an idle machine.
const vmTimeout = time.Minute

// measureInVM makes all the runs and writes what they give to plan.Out, after each round.
func measureInVM(arg string) error {
	var plan vmPlan
	if err := json.Unmarshal([]byte(arg), &plan); err != nil {
		return err
	}
	only, err := regexp.Compile(plan.Only)
	if err != nil {
		return err
	}
	file := vmFile{Conditions: vmConditions(&plan)}
	r := vmRunner{plan: &plan, port: 18600}
	var pairs [][]measurement
	for _, c := range vmCases {
		pairs = append(pairs, c.pair(&r))
	}
	for _, c := range softCases {
		pairs = append(pairs, c.pair(&r))
	}
	pairs = append(pairs, []measurement{{bareName, bare{clientAddr, serverAddr, plan.Pin, softCases[0].iters(plan.Quick)}.run}})
	for round := range plan.Rounds {
		fmt.Printf("round %d of %d, load average %s\n", round+1, plan.Rounds, loadAverage())
		for _, pair := range pairs {
			if !slices.ContainsFunc(pair, func(m measurement) bool { return only.MatchString(m.name) }) {
				continue
			}
			pair := slices.Clone(pair)
			if round%2 != 0 { // what goes first may have it easier, or not
				slices.Reverse(pair)
			}
			for _, m := range pair {
				t := time.Now()
				run := vmRun{Name: m.name, Round: round}
				if run.Values, run.Paces, err = m.paced(nil); err != nil {
					run.Err = err.Error()
					fmt.Printf("  %-24s FAILED: %v\n", m.name, err)
				} else {
					fmt.Printf("  %-24s %s  (%.1f s)\n", m.name, run.Values, time.Since(t).Seconds())
				}
				file.Runs = append(file.Runs, run)
			}
		}
		file.Loads = append(file.Loads, loadAverage())
		b, err := json.Marshal(file)
		if err != nil {
			return err
		}
		if err := os.WriteFile(plan.Out, b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// The devices of both sides, the addresses of these, and processors.
const (
	clientDevice, serverDevice = "rxe0", "rxe1"
	clientAddr, serverAddr     = "10.77.0.1", "10.77.0.2"
	clientCPU, serverCPU       = 0, 1
)

type vmRunner struct {
	plan     *vmPlan
	port     int            // TCP port of the next server: a new one each time
	softGIDs map[string]int // where soft0 has which address; nil: not asked yet
}

// pair are the two measurements.
func (c vmCase) pair(r *vmRunner) []measurement {
	return []measurement{
		{c.ours(), func(*config) (values, error) { return r.counted(c, r.ringside) }},
		{c.theirs(), func(*config) (values, error) { return r.counted(c, r.perftest) }},
	}
}

func (r *vmRunner) ringside(c vmCase) (values, error) {
	return r.perf(append(c.ringsideArgs(r.plan.Quick), rxeEnd(clientDevice)...), rxeEnd(serverDevice), "roce", r.pinned(c))
}

// perf is one run of `ringside perf`; path is how the devices should have reached each other.
func (r *vmRunner) perf(clientArgs, serverEnd []string, path string, pin bool) (values, error) {
	server := exec.Command(r.plan.Ringside, append([]string{"perf", "server", "--once", "--listen", r.address()}, serverEnd...)...)
	client := exec.Command(r.plan.Ringside, append(clientArgs, r.address())...)
	for _, cmd := range []*exec.Cmd{server, client} {
		// perftest has one thread. With more, the Go runtime's look for work in vain, on processors that the kernel and the other
		// side need; in latency tests there is one processor anyway.
		cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	}
	out, err := r.pair(server, client, pin)
	if err != nil {
		return nil, err
	}
	return parsePerf(out, path)
}

func (r *vmRunner) perftest(c vmCase) (values, error) {
	args := append(c.perftestArgs(r.plan.Quick), "-x", "1", "-p", strconv.Itoa(r.port))
	server := exec.Command(c.program(), append(args[:len(args):len(args)], "-d", serverDevice)...)
	client := exec.Command(c.program(), append(args[:len(args):len(args)], "-d", clientDevice, "127.0.0.1")...)
	out, err := r.pair(server, client, r.pinned(c))
	if err != nil {
		return nil, err
	}
	p, err := parsePerftest(out)
	if err != nil {
		return nil, err
	}
	if inline := p.settings["Max inline data"]; inline != "" && inline != "0[B]" {
		return nil, fmt.Errorf("%s sends %s inline: ringside perf was told to send nothing so", c.program(), inline)
	}
	return p.values, nil
}

// pinned is whether each side has a processor of its own: in latency tests, since two that poll must not share one.
func (r *vmRunner) pinned(c vmCase) bool { return r.plan.Pin && c.kind == "lat" }

func (r *vmRunner) address() string { return "127.0.0.1:" + strconv.Itoa(r.port) }

// pair runs a server and a client to their ends and returns what the client has printed. With pin, each runs on its
// processor as a whole.
func (r *vmRunner) pair(server, client *exec.Cmd, pin bool) ([]byte, error) {
	return r.pairWithin(server, client, pin, vmTimeout)
}

func (r *vmRunner) pairWithin(server, client *exec.Cmd, pin bool, limit time.Duration) ([]byte, error) {
	port := r.port
	r.port++
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var serverOut, out, errs bytes.Buffer
	server.Stdout, server.Stderr = &serverOut, &serverOut
	client.Stdout, client.Stderr = &out, &errs
	server.WaitDelay, client.WaitDelay = limit, limit // should a child of theirs keep the output open
	if err := startOn(server, pin, serverCPU); err != nil {
		return nil, err
	}
	serverEnded := make(chan error, 1)
	go func() { serverEnded <- server.Wait() }()
	defer func() {
		server.Process.Kill()
		<-serverEnded
	}()
	if err := waitListening(port, limit/2); err != nil {
		return nil, fmt.Errorf("%v: %w", server.Args, err)
	}
	if err := startOn(client, pin, clientCPU); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { client.Process.Kill() })
	err := client.Wait()
	if !stop() {
		err = fmt.Errorf("did not end within %v", limit)
	}
	if err != nil {
		return nil, fmt.Errorf("%v: %w: %s", client.Args, err, tail(&errs, &out))
	}
	select {
	case err := <-serverEnded:
		serverEnded <- nil // for the deferred function
		if err != nil {
			return nil, fmt.Errorf("%v: %w: %s", server.Args, err, tail(&serverOut))
		}
	case <-ctx.Done():
		return nil, fmt.Errorf("%v: did not end after its client had", server.Args)
	}
	return out.Bytes(), nil
}

// tail is the end of what a command has said, on one line.
func tail(said ...*bytes.Buffer) string {
	var all []string
	for _, b := range said {
		all = append(all, strings.Fields(b.String())...)
	}
	s := strings.Join(all, " ")
	return s[max(0, len(s)-400):]
}

// startOn starts a command, with pin on one processor only.
func startOn(cmd *exec.Cmd, pin bool, cpu int) error {
	if !pin {
		return cmd.Start()
	}
	// A process inherits the processors of the thread that starts it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var was, only unix.CPUSet
	if err := unix.SchedGetaffinity(0, &was); err != nil {
		return err
	}
	only.Set(cpu)
	if err := unix.SchedSetaffinity(0, &only); err != nil {
		return fmt.Errorf("processor %d: %w", cpu, err)
	}
	return errors.Join(cmd.Start(), unix.SchedSetaffinity(0, &was))
}

// counted runs a measurement, and adds to its values what the devices have counted meanwhile: packets a message in the
// direction of the data, and how often something had to be sent again.
func (r *vmRunner) counted(c vmCase, run func(vmCase) (values, error)) (values, error) {
	before, err := readCounters()
	if err != nil {
		return nil, err
	}
	v, err := run(c)
	if err != nil {
		return nil, err
	}
	after, err := readCounters()
	if err != nil {
		return nil, err
	}
	sum := func(name string) (n float64) {
		for _, device := range []string{clientDevice, serverDevice} {
			n += after[device+" "+name] - before[device+" "+name]
		}
		return n
	}
	from := clientDevice
	if c.op == "read" {
		from = serverDevice
	}
	v["packets"] = (after[from+" sent_pkts"] - before[from+" sent_pkts"]) / float64(c.iters(r.plan.Quick))
	v["retries"] = sum("completer_retry_err")
	v["rnr"] = sum("send_rnr_err")
	return v, nil
}

// readCounters reads the devices' counters, by "device name".
func readCounters() (values, error) {
	v := values{}
	for _, device := range []string{clientDevice, serverDevice} {
		for _, name := range []string{"sent_pkts", "completer_retry_err", "send_rnr_err"} {
			text := fileLine(filepath.Join("/sys/class/infiniband", device, "ports/1/hw_counters", name))
			n, err := strconv.ParseUint(text, 10, 64)
			if err != nil {
				return nil, fmt.Errorf("%s's counter %s: %w", device, name, err)
			}
			v[device+" "+name] = float64(n)
		}
	}
	return v, nil
}
