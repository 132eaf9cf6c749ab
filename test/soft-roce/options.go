//go:build linux

package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"
)

// Options are what the command line says.
type options struct {
	track   string
	arch    *arch
	memory  int
	cpus    int
	timeout time.Duration
	out     string
	build   bool
	native  bool
	host    bool
	bare    bool
	verbose bool
	command []string
}

const usage = `usage: soft-roce [flags] -- command [args...]

Runs the command in a virtual machine with the RDMA devices rxe0, rxe1 (Soft-RoCE) and siw0, siw1 (soft iWARP), and exits
with its status; 125 is a failure of soft-roce itself. Of "go test ...", only the test binaries run in the machine; with
-host that goes for every go test of the command. -arch has machines of another architecture than the host's.

`

func parseOptions(args []string, complain io.Writer) (*options, error) {
	o := new(options)
	f := flag.NewFlagSet("soft-roce", flag.ContinueOnError)
	f.SetOutput(complain)
	f.StringVar(&o.track, "kernel", tracks[0], "the machine's Linux: 6.1 or 6.12")
	archName := f.String("arch", runtime.GOARCH, "the machine's `architecture`: amd64 or arm64")
	f.IntVar(&o.memory, "mem", 2048, "the machine's memory, in `MiB`")
	f.IntVar(&o.cpus, "smp", min(max(runtime.NumCPU(), 2), 4), "the machine's processors")
	f.DurationVar(&o.timeout, "timeout", 30*time.Minute, "for all of the run but building the image; 0: none")
	f.StringVar(&o.out, "out", "", "a `folder` that the machine has at /out, for reading and writing")
	f.BoolVar(&o.build, "build", false, "build the image, or renew it if apt has newer packages; run no command")
	f.BoolVar(&o.host, "host", false, "the command runs on the host, and what its go test and go run start, in the machine: many of them in one machine")
	f.BoolVar(&o.native, "native", false, "no machine: add the devices to this host, which must have the modules; needs root")
	f.BoolVar(&o.bare, "bare", false, "a machine without devices and network, to try setting them up")
	f.BoolVar(&o.verbose, "v", false, "print the machine's console and what takes how long to standard error")
	f.Usage = func() {
		fmt.Fprint(complain, usage)
		f.PrintDefaults()
	}
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	o.command = f.Args()
	switch {
	case len(o.command) == 0 && !o.build:
		f.Usage()
		return nil, errors.New("no command to run")
	case len(o.command) > 0 && o.build:
		return nil, errors.New("-build runs no command")
	case o.native && (o.build || o.bare || o.host || o.out != "" || *archName != runtime.GOARCH):
		return nil, errors.New("-native has no machine: -build, -bare, -host, -out and -arch mean nothing with it")
	case o.memory < 512 || o.cpus < 1:
		return nil, errors.New("the machine needs a processor and 512 MiB")
	}
	if err := checkTrack(o.track); err != nil {
		return nil, err
	}
	var err error
	if o.arch, err = findArch(*archName); err != nil {
		return nil, err
	}
	if o.out != "" {
		out, err := filepath.Abs(o.out)
		if err != nil {
			return nil, err
		}
		if info, err := os.Stat(out); err != nil {
			return nil, fmt.Errorf("-out: %w", err)
		} else if !info.IsDir() {
			return nil, fmt.Errorf("-out: %s is no folder", out)
		}
		o.out = out
	}
	return o, nil
}
