//go:build linux

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"syscall"
	"time"
)

// failure is the exit status for what is not the command's fault, as that of env, nohup and timeout.
const failure = 125

func main() {
	switch {
	case os.Getpid() == 1 && fileExists(guestConfigFile):
		bootMachine()
	case os.Args[0] == serverRole:
		if err := serveMachine(); err != nil {
			fmt.Println("soft-roce: server:", err)
			os.Exit(1)
		}
	case os.Getenv(socketEnv) != "":
		os.Exit(runClient(os.Getenv(socketEnv), os.Args[1:]))
	default:
		os.Exit(onHost(os.Args[1:]))
	}
}

func fileExists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// onHost is the role of the command line.
func onHost(args []string) int {
	o, err := parseOptions(args, os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	var code int
	if err == nil {
		endWithGoRun()
		code, err = run(o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "soft-roce:", err)
		return failure
	}
	return code
}

// run does what the options say and returns the command's exit status.
func run(o *options) (int, error) {
	in := watchSignals()
	defer in.Close()
	ctx := in.ctx
	start := time.Now()
	log := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "soft-roce: "+format+"\n", args...)
	}
	if o.native {
		ctx, cancel := o.withTimeout(ctx)
		defer cancel()
		return runNative(ctx, in, o)
	}
	if err := needPrograms(ctx, log, []hostProgram{o.arch.qemu}); err != nil {
		return 0, err
	}
	c, err := openCache(log)
	if err != nil {
		return 0, err
	}
	img, err := c.image(ctx, o.track, o.arch, o.build)
	if err != nil {
		return 0, stopped(ctx, err)
	}
	if o.build {
		log("the image of Linux %s is %s", img.manifest.Release, img.dir)
		return 0, nil
	}
	ctx, cancel := o.withTimeout(ctx)
	defer cancel()
	dir, err := makeRunFolder()
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	m, err := bootVM(ctx, img, o, dir)
	if err != nil {
		return 0, stopped(ctx, err)
	}
	defer m.stop()
	if o.verbose {
		log("Linux %s with %v ready after %.1f s (%.1f s of its own)", m.ready.Kernel, m.ready.Devices, time.Since(start).Seconds(), m.ready.Uptime)
	}
	code, err := runInMachine(ctx, in, m, o, dir)
	if o.verbose {
		log("ended after %.1f s", time.Since(start).Seconds())
	}
	return code, err
}

func (o *options) withTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	if o.timeout == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, o.timeout, fmt.Errorf("the command did not end within %v (-timeout)", o.timeout))
}

// stopped is why something failed: if it was stopped, the reason for that.
func stopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// endWithGoRun has this process end, in order, when the go run that started it is killed: go run does not pass signals on.
func endWithGoRun() {
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", os.Getppid()))
	if err == nil && string(comm) == "go\n" {
		setDeathSignal(syscall.SIGTERM)
	}
}
