package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// The comparison with perftest on the kernel's software RDMA. Neither the devices nor perftest need be on this host: one
// virtual machine is started (test/soft-roce), this program runs in it, and there it starts `ringside perf` and perftest's
// programs in turn, each time a server on rxe1 and a client on rxe0; then `ringside perf` on the software NIC in the place of
// these, over UDP, in turn with rxe. What they say comes back in a file.

// vmPlan is what is measured in the machine. It goes there as JSON.
type vmPlan struct {
	Rounds   int
	Quick    bool
	Only     string // a regular expression for the names of measurements
	Pin      bool   // in latency tests, the client to the first processor, the server to the second
	Ringside string // path of the ringside command
	Out      string // path of the file to write
}

// vmFile is what comes back.
type vmFile struct {
	Conditions [][2]string // name and text
	Loads      []string    // the machine's load average after each round
	Runs       []vmRun
}

// vmRun is one run of one of the two systems.
type vmRun struct {
	Name   string // of the measurement, the same in each round
	Round  int    // from 0
	Values values // nil if it failed
	Paces  paces
	Err    string // why it failed
}

// perftestMain is `ringside-bench perftest`.
func perftestMain(args []string) error {
	var c config
	plan := vmPlan{Out: "/out/perftest.json"}
	f := flag.NewFlagSet("ringside-bench perftest", flag.ExitOnError)
	f.BoolVar(&plan.Pin, "pin", true, "in latency tests, pin both systems' clients to processor 0, and their servers to 1")
	f.StringVar(&plan.Ringside, "ringside", "bin/ringside", "the ringside command")
	softRoCE := f.String("soft-roce", "bin/soft-roce", "the command of test/soft-roce")
	err := c.parse(f, 17, args)
	if err != nil {
		return err
	}
	plan.Rounds, plan.Quick, plan.Only = c.rounds, c.quick, c.only.String()
	if plan.Ringside, err = filepath.Abs(plan.Ringside); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	begin := time.Now()
	host := vmHostConditions()
	got, runErr := runInVM(ctx, *softRoCE, &plan)
	if got == nil {
		return runErr
	}
	host.set("rounds", fmt.Sprint(len(got.Loads)))
	for _, k := range got.Conditions {
		host.set(k[0], k[1])
	}
	host.set("duration", time.Since(begin).Round(time.Second).String())
	return c.publishVM(&plan, host, got, runErr)
}

// publishVM publishes what the machine has found. What there was until an error is only printed: the results file has a whole
// measurement.
func (c *config) publishVM(plan *vmPlan, host *conditions, got *vmFile, runErr error) error {
	r := got.results()
	section := rxeReport(plan, host, r)
	if runErr != nil {
		fmt.Print("\n", section)
		return runErr
	}
	if err := c.publish(rxePart, section); err != nil {
		return err
	}
	return r.err()
}

// runInVM starts the machine, has this program measure in it, and returns what it has found: after an error what there was
// until then, or nil.
func runInVM(ctx context.Context, softRoCE string, plan *vmPlan) (*vmFile, error) {
	dir, err := os.MkdirTemp("", "ringside-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(plan)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, softRoCE, "-out", dir, "--", self, vmCommand, string(b))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	runErr := cmd.Run()
	if runErr != nil {
		runErr = fmt.Errorf("%s: %w", softRoCE, runErr)
	}
	b, err = os.ReadFile(filepath.Join(dir, filepath.Base(plan.Out)))
	if err != nil {
		if runErr == nil {
			runErr = err
		}
		return nil, runErr
	}
	got := new(vmFile)
	if err := json.Unmarshal(b, got); err != nil {
		return nil, fmt.Errorf("what the machine has written: %w", err)
	}
	return got, runErr
}

// results sorts the runs by measurement.
func (f *vmFile) results() *results {
	r := newResults()
	r.loads = f.Loads
	for _, run := range f.Runs {
		if run.Err != "" {
			r.fail(fmt.Sprintf("%s, round %d", run.Name, run.Round+1), fmt.Errorf("%s", run.Err))
			continue
		}
		r.add(run.Name, run.Round, run.Values)
		r.around(run.Name, run.Round, run.Paces)
	}
	return r
}

// vmHostConditions are the conditions on this side of the machine.
func vmHostConditions() *conditions {
	c := new(conditions)
	c.set("date", time.Now().UTC().Format("2006-01-02 15:04 MST"))
	c.set("host's CPU", fmt.Sprintf("%s, %d cores", cpuModel(), runtime.NumCPU()))
	c.set("Go", runtime.Version()+", "+profileUse())
	c.set("ringside", revision())
	c.set(busyBefore, fmt.Sprintf("%.2f", busyCores(2*time.Second)))
	return c
}

// vmConditions are those within.
func vmConditions(plan *vmPlan) [][2]string {
	emulated := "emulated without KVM: processor-bound code takes several times as long as on the host"
	if !strings.Contains(cpuModel(), "TCG") {
		emulated = "run by KVM"
	}
	threads := "in latency tests, both systems' client on processor 0 and server on 1, as taskset does it; not pinned in bandwidth tests; GOMAXPROCS=1"
	if !plan.Pin {
		threads = "not pinned; GOMAXPROCS=1"
	}
	return [][2]string{
		{"machine", fmt.Sprintf("Linux %s, %d processors, %s", fileLine("/proc/sys/kernel/osrelease"), runtime.NumCPU(), emulated)},
		{"perftest", perftestVersion()},
		{"threads", threads},
	}
}

func perftestVersion() string {
	out, _ := exec.Command("ib_send_lat", "--version").CombinedOutput() // its exit status says nothing
	if _, version, ok := strings.Cut(string(out), "Version:"); ok {
		return strings.TrimSpace(version)
	}
	return "unknown"
}
