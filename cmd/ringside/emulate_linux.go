package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/emulate"
	"github.com/ringside-rdma/ringside/internal/seccomp"
)

// launcherMain makes this process the launcher of a program, if it was started as one.
func launcherMain() { seccomp.Main() }

// emulateProgram runs the program and ends this process as it has ended. It returns if the program could not be run.
func emulateProgram(cmd *cobra.Command, o *emulateConfig) error {
	cfg := emulate.Config{Devices: o.devices, Numbered: o.numbered, Reap: true}
	var err error
	if cfg.Loss, err = share(o.loss); err != nil {
		return usage(cmd, fmt.Errorf("--loss: %w", err))
	}
	switch o.link {
	case "ethernet":
	case "infiniband":
		cfg.InfiniBand = true
	default:
		return usage(cmd, fmt.Errorf("--link: %q is neither ethernet nor infiniband", o.link))
	}
	if !o.quiet {
		cfg.Log = cmd.ErrOrStderr()
	}
	if o.devices < 1 {
		return usage(cmd, fmt.Errorf("--devices: %d: there must be one, at least", o.devices))
	}
	path, err := seccomp.LookPath(o.program[0])
	if err != nil {
		return &exitError{status: 127, err: fmt.Errorf("emulate: %w", err)}
	}
	if path, err = filepath.Abs(path); err != nil {
		return err
	}
	var trace *traceFile
	if o.trace != "" {
		if trace, err = createTrace(o.trace); err != nil {
			return fmt.Errorf("emulate: the trace: %w", err)
		}
		cfg.Trace = trace
	}
	// Before there is a program to send them to: none must be missed.
	signals := make(chan os.Signal, 16)
	if interruptIgnored {
		signal.Ignore(unix.SIGINT) // again: main has asked for it
	}
	for _, sig := range forwarded {
		// What this process was to ignore, as below nohup, the program ignores, too: it would not if this process had a handler.
		if !signal.Ignored(sig) {
			signal.Notify(signals, sig)
		}
	}
	s, err := emulate.Start(cfg, path, o.program)
	if err != nil {
		var bad *seccomp.ExecError
		if errors.As(err, &bad) {
			return &exitError{status: 126, err: fmt.Errorf("emulate: %w", err)}
		}
		return fmt.Errorf("emulate: %w", err)
	}
	go func() {
		for sig := range signals {
			if !fromTerminal(sig) {
				s.Signal(sig)
			}
		}
	}()
	st, err := s.Wait()
	if err == nil && trace != nil {
		err = trace.close()
	}
	if err != nil {
		return fmt.Errorf("emulate: %w", err)
	}
	seccomp.EndAs(st)
	return nil
}

// interruptIgnored: this process was started so that it ignores SIGINT, as a shell without job control starts what is in the background.
// Of other signals than this and SIGHUP, Go's runtime does not keep it.
var interruptIgnored = signal.Ignored(unix.SIGINT)

// forwarded are the signals that the program gets, as if it had no one between.
var forwarded = []os.Signal{unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGCONT, unix.SIGWINCH}

// fromTerminal reports whether the program has got the signal already: those of keys go to all processes in the foreground of the
// terminal.
func fromTerminal(sig os.Signal) bool {
	if sig != unix.SIGINT && sig != unix.SIGQUIT && sig != unix.SIGWINCH {
		return false
	}
	tty, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(tty)
	group, err := unix.IoctlGetInt(tty, unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// share reads a probability: 0.01, or 1%.
func share(s string) (float64, error) {
	number, percent := strings.CutSuffix(s, "%")
	p, err := strconv.ParseFloat(number, 64)
	if percent {
		p /= 100
	}
	if err != nil || !(p >= 0 && p < 1) {
		return 0, fmt.Errorf("%q is no share: give one from 0%% to less than 100%%", s)
	}
	return p, nil
}

// A traceFile is written while the devices work, and by several of them.
type traceFile struct {
	mu sync.Mutex
	f  *os.File
	w  *bufio.Writer
}

func createTrace(name string) (*traceFile, error) {
	f, err := os.Create(name)
	if err != nil {
		return nil, err
	}
	return &traceFile{f: f, w: bufio.NewWriterSize(f, 1<<16)}, nil
}

func (t *traceFile) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.w.Write(p)
}

func (t *traceFile) close() error { return errors.Join(t.w.Flush(), t.f.Close()) }
