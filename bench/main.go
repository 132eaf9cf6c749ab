// Command ringside-bench runs ringside side by side with grpc-go and UCX, and writes bench/RESULTS.md.
//
// Every measurement is made in processes of its own (the command starts itself again in a role), once a round, round
// after round, so that what disturbs the machine for a while disturbs all that is compared. What is printed are medians
// over the rounds, with the smallest and largest value.
//
//	ringside-bench -ringside bin/ringside -results bench/RESULTS.md
//
// With perftest as its first argument, it runs ringside side by side with perftest in a virtual machine whose kernel has
// software RDMA devices, and writes that section of the results:
//
//	ringside-bench perftest -ringside bin/ringside -soft-roce bin/soft-roce -results bench/RESULTS.md
//
// With net, it runs ringside over UDP side by side with UCX and grpc-go over TCP between two network namespaces, which takes root:
//
//	ringside-bench net -ringside bin/ringside -results bench/RESULTS.md
//
// With mlx5, it compares the driver for ConnectX with stock libmlx5, on an emulated device:
//
//	ringside-bench mlx5 -driver bin/mlx5.test -results bench/RESULTS.md
package main

import (
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/internal/seccomp"
)

// config is what the flags say.
type config struct {
	rounds   int
	quick    bool // small counts: that it works, not how fast
	only     *regexp.Regexp
	some     bool   // only is not all
	ringside string // the ringside command
	results  string
}

// scale returns full, or a small part of it in quick mode.
func (c *config) scale(full, quick int) int {
	if c.quick {
		return quick
	}
	return full
}

// parse takes the flags that all commands have, and those of fs. rounds is how many there are if nothing is said.
func (c *config) parse(fs *flag.FlagSet, rounds int, args []string) (err error) {
	fs.IntVar(&c.rounds, "rounds", rounds, "how often each measurement is made")
	fs.BoolVar(&c.quick, "quick", false, "one round with small counts: shows that everything runs, and nothing else")
	fs.StringVar(&c.results, "results", "bench/RESULTS.md", "where the results go")
	only := fs.String("only", "", "measure only what matches this regular expression; prints, and leaves the results file alone")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if c.quick {
		c.rounds = 1
	}
	c.some = *only != ""
	if c.only, err = regexp.Compile(*only); err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	return nil
}

func main() {
	seccomp.Main()
	if len(os.Args) > 2 && os.Args[1] == "-role" {
		runRole(os.Args[2], os.Args[3:])
		return
	}
	if len(os.Args) > 1 && os.Args[1] == "perftest" {
		exit(perftestMain(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == "net" {
		exit(netMain(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == "mlx5" {
		exit(mlx5Main(os.Args[2:]))
	}
	if len(os.Args) == 3 && os.Args[1] == vmCommand {
		exit(measureInVM(os.Args[2]))
	}
	var c config
	flag.StringVar(&c.ringside, "ringside", "bin/ringside", "the ringside command, for ringside perf")
	profile := flag.String("profile", "", "have the processes of ringside and grpc-go write CPU profiles into this folder; for make pgo")
	if err := c.parse(flag.CommandLine, 7, os.Args[1:]); err != nil {
		exit(err)
	}
	if *profile != "" {
		os.Setenv(profileEnv, *profile)
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-interrupted
		stopAll()
		os.Exit(130)
	}()
	err := bench(&c)
	stopAll()
	exit(err)
}

// exit ends the program, with what went wrong.
func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "ringside-bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func bench(c *config) error {
	begin := time.Now()
	conditions := hostConditions(c)
	results := measure(c, measurements(c))
	conditions.set("duration", time.Since(begin).Round(time.Second).String())
	was, _ := os.ReadFile(c.results) // if it cannot be read, writing it will say so
	text := report(c, conditions, results)
	for _, p := range []part{rxePart, netPart, mlx5Part} {
		text = p.in(text, p.of(string(was)))
	}
	if c.some {
		fmt.Print("\n", text)
	} else if err := os.WriteFile(c.results, []byte(text), 0o644); err != nil {
		return err
	} else {
		fmt.Printf("\n%s\nwritten to %s\n", targetTable(results), c.results)
	}
	return results.err()
}

// measure makes the measurements, round after round.
func measure(c *config, all []measurement) *results {
	results := newResults()
	for round := range c.rounds {
		fmt.Printf("round %d of %d, load average %s\n", round+1, c.rounds, loadAverage())
		for _, m := range all {
			if !c.only.MatchString(m.name) {
				continue
			}
			t := time.Now()
			values, paces, err := m.paced(c)
			if err != nil {
				results.fail(m.name, err)
				fmt.Printf("  %-34s FAILED: %v\n", m.name, err)
				continue
			}
			results.add(m.name, round, values)
			results.around(m.name, round, paces)
			fmt.Printf("  %-34s %s  (%.1f s)\n", m.name, values, time.Since(t).Seconds())
		}
		results.endRound(loadAverage())
	}
	return results
}
