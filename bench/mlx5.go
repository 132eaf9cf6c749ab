package main

import (
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/ringside-rdma/ringside/internal/emulate"
)

// The comparison with stock libmlx5: what posting and polling cost, on an emulated device that nobody serves. Either program writes the
// completions itself, right before it polls, as if they had come at once. All checks and locks are on. What of it is posting, and what
// polling, is measured by themselves, too.

// libmlx5Program is the other side's.
//
//go:embed testdata/libmlx5.c
var libmlx5Program string

type mlx5Case struct {
	op     string // write, inline, read, fetch-add, send or recv
	part   string // loop (post and poll), post, poll or empty
	size   int
	sges   int // so many pieces of it
	batch  int // requests of a call
	what   string
	target bool
}

var mlx5Cases = []mlx5Case{
	{"write", "loop", 64, 1, 1, "64 B WRITE, signalled: post and poll", true},
	{"write", "post", 64, 1, 1, "64 B WRITE, signalled: post alone", false},
	{"write", "poll", 64, 1, 1, "64 B WRITE, signalled: poll alone", false},
	{"write", "loop", 64, 1, 16, "64 B WRITE in batches of 16, the last signalled, a request: post and poll", true},
	{"write", "post", 64, 1, 16, "64 B WRITE in batches of 16, the last signalled, a request: post alone", false},
	{"write", "poll", 64, 1, 16, "64 B WRITE in batches of 16, all signalled, a request: poll alone", false},
	{"write", "empty", 64, 1, 1, "poll of an empty CQ", true},
	{"write", "loop", 8, 1, 1, "8 B WRITE, signalled: post and poll", false},
	{"write", "loop", 4096, 1, 1, "4 KiB WRITE, signalled: post and poll", false},
	{"write", "loop", 65536, 1, 1, "64 KiB WRITE, signalled: post and poll", false},
	{"write", "loop", 64, 2, 1, "64 B WRITE of 2 elements, signalled: post and poll", false},
	{"write", "loop", 64, 4, 1, "64 B WRITE of 4 elements, signalled: post and poll", false},
	{"write", "post", 64, 4, 16, "64 B WRITE of 4 elements in batches of 16, the last signalled, a request: post alone", false},
	{"inline", "loop", 8, 1, 1, "8 B WRITE, inline, signalled: post and poll", false},
	{"inline", "loop", 28, 1, 1, "28 B WRITE, inline, signalled: post and poll", false},
	{"inline", "loop", 64, 1, 1, "64 B WRITE, inline, signalled: post and poll", false},
	{"inline", "loop", 256, 1, 1, "256 B WRITE, inline, signalled: post and poll", false},
	{"inline", "loop", 28, 1, 16, "28 B WRITE, inline, in batches of 16, the last signalled, a request: post and poll", false},
	{"inline", "post", 28, 1, 16, "28 B WRITE, inline, in batches of 16, the last signalled, a request: post alone", false},
	{"inline", "post", 64, 1, 16, "64 B WRITE, inline, in batches of 16, the last signalled, a request: post alone", false},
	{"inline", "post", 256, 1, 16, "256 B WRITE, inline, in batches of 16, the last signalled, a request: post alone", false},
	{"read", "loop", 64, 1, 1, "64 B READ, signalled: post and poll", false},
	{"fetch-add", "loop", 8, 1, 1, "FETCH_ADD, signalled: post and poll", false},
	{"send", "loop", 64, 1, 1, "64 B SEND, signalled: post and poll", false},
	{"recv", "loop", 64, 1, 1, "receive: post and poll", false},
	{"recv", "loop", 64, 1, 16, "receives in batches of 16, each: post and poll", false},
}

func (c mlx5Case) name() string {
	return fmt.Sprintf("%s %s %d/%d x%d", c.op, c.part, c.size, c.sges, c.batch)
}
func (c mlx5Case) ours() string   { return "ringside " + c.name() }
func (c mlx5Case) theirs() string { return "libmlx5 " + c.name() }

// mlx5Limit is the number to reach, ringside / libmlx5.
var mlx5Limit = target{limit: 1}

// mlx5Main is `ringside-bench mlx5`.
func mlx5Main(args []string) error {
	var c config
	fs := flag.NewFlagSet("mlx5", flag.ExitOnError)
	driver := fs.String("driver", "bin/mlx5.test", "the tests of internal/provider/mlx5, as a program: go test -c")
	if err := c.parse(fs, 11, args); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "ringside-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	m := mlx5Runner{driver: *driver, libmlx5: filepath.Join(dir, "libmlx5"), dir: dir}
	source := m.libmlx5 + ".c"
	if err := os.WriteFile(source, []byte(libmlx5Program), 0o600); err != nil {
		return err
	}
	if out, err := exec.Command("gcc", "-O2", "-o", m.libmlx5, source, "-libverbs", "-lmlx5").CombinedOutput(); err != nil {
		return fmt.Errorf("gcc: %w: %s (Debian packages gcc, libc6-dev and libibverbs-dev are needed)", err, out)
	}
	begin := time.Now()
	host := hostConditions(&c)
	host.set("libmlx5", packageVersion("ibverbs-providers"))
	r := measure(&c, m.measurements(&c))
	host.set("duration", time.Since(begin).Round(time.Second).String())
	if err := c.publish(mlx5Part, mlx5Report(&c, host, r)); err != nil {
		return err
	}
	return r.err()
}

func packageVersion(name string) string {
	out, err := exec.Command("dpkg-query", "-W", "-f", "${Version}", name).Output()
	if err != nil {
		return "unknown"
	}
	return name + " " + string(out)
}

type mlx5Runner struct{ driver, libmlx5, dir string }

// measurements are all of them, in the order of a round: what is compared stands side by side.
func (m *mlx5Runner) measurements(c *config) (all []measurement) {
	for _, k := range mlx5Cases {
		count := c.scale(4_000_000, 16_000)
		args := []string{k.op, k.part, strconv.Itoa(k.size), strconv.Itoa(k.sges), strconv.Itoa(k.batch), strconv.Itoa(count)}
		all = append(all,
			measurement{k.ours(), func(*config) (values, error) {
				return m.run("measured ", m.driver, "-test.run", "^$", "-test.bench", "^BenchmarkMeasure$", "-test.benchtime", "1x", "-measure", strings.Join(args, " "))
			}},
			measurement{k.theirs(), func(*config) (values, error) { return m.run("", m.libmlx5, args...) }})
	}
	return all
}

// run runs a program with an emulated device, and returns the number that it prints behind mark.
func (m *mlx5Runner) run(mark, program string, args ...string) (values, error) {
	out := filepath.Join(m.dir, "out")
	program, err := filepath.Abs(program)
	if err != nil {
		return nil, err
	}
	// A shell, since the program gets this one's standard files.
	argv := append([]string{"sh", "-c", `out=$1; shift; exec "$@" > "$out" 2>&1 < /dev/null`, "sh", out, program}, args...)
	s, err := emulate.Start(emulate.Config{Manual: true}, "/bin/sh", argv)
	if err != nil {
		return nil, err
	}
	st, err := s.Wait()
	b, readErr := os.ReadFile(out)
	if err := errors.Join(err, readErr); err != nil {
		return nil, err
	}
	if st != 0 {
		return nil, fmt.Errorf("%s has ended with %#x: %s", program, st, b)
	}
	for line := range strings.Lines(string(b)) {
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), mark); ok {
			if ns, err := strconv.ParseFloat(text, 64); err == nil {
				return values{"cpu": ns}, nil
			}
		}
	}
	return nil, fmt.Errorf("%s has printed %q", program, b)
}

// mlx5Notes is written by hand: what falls short, and why.
//
//go:embed notes-mlx5.md
var mlx5Notes string

// mlx5Report returns the section on libmlx5.
func mlx5Report(c *config, host *conditions, r *results) string {
	return mlx5Part.section(r, mlx5Notes, func(b *page) {
		b.line("## The data path for ConnectX, against libmlx5\n")
		b.line("What a request costs the processor (the thread's time, in ns) from posting to its completion, with this repository's driver and with")
		b.line("stock libmlx5, in processes of their own, in turn. The device is emulated and asleep: each program writes the completions itself,")
		b.line("right before it polls, as if the device were infinitely fast, and the device's registers are ordinary memory. So this is the cost of")
		b.line("the driver's own code, with all checks and locks on; a card's registers cost more, with either. Ratios are ringside / libmlx5.")
		b.line("Of post alone and poll alone it is the time that passes (the thread's own takes a system call to ask for) while a queue of 64 requests")
		b.line("is filled or emptied: the median of some ten thousands of turns, less what the clock takes. A poll takes as many as a batch has.\n")
		b.WriteString(circumstances(c.rounds, c.quick, host, "load average after each round", r.loads))
		b.line("| ns | ringside | libmlx5 | ratio | target |\n|---|---|---|---|---|")
		for _, k := range mlx5Cases {
			var limit *target
			if k.target {
				limit = &mlx5Limit
			}
			b.line("| %s | %s |", k.what, r.beside(k.ours(), k.theirs(), "cpu", 1, limit))
		}
	})
}
