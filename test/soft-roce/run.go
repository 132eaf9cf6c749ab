//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// makeRunFolder makes the folder of this run's sockets, initramfs, and of go test's binaries.
func makeRunFolder() (string, error) {
	dir, err := os.MkdirTemp(os.Getenv("GOTMPDIR"), "soft-roce-")
	if err != nil {
		return "", err
	}
	return dir, os.Mkdir(workFolder(dir), 0o700)
}

// isGoTest is whether a command is go test, whose tool must run on the host: its caches are there, and building in an
// emulated machine takes an age.
func isGoTest(argv []string) bool {
	return len(argv) >= 2 && filepath.Base(argv[0]) == "go" && argv[1] == "test"
}

// runInMachine runs the command in the machine and returns its exit status.
func runInMachine(ctx context.Context, in *interrupt, m *machine, o *options, dir string) (int, error) {
	socket := filepath.Join(dir, "relay")
	l, err := listenUnix(socket)
	if err != nil {
		return 0, err
	}
	defer l.Close()
	r := newRelay(m)
	go r.serve(l)
	var code int
	if o.host || isGoTest(o.command) {
		self, err := os.Executable()
		if err != nil {
			return 0, err
		}
		argv, env := o.command, goTestEnv(os.Environ(), o.arch, socket, workFolder(dir))
		if o.host {
			env, err = withExec(env, self)
		} else {
			argv = goTestArgs(argv, self)
		}
		if err == nil {
			code, err = runOnHost(ctx, in, argv, env)
		}
		if err != nil {
			return 0, m.died(err)
		}
	} else {
		in.commandRuns(nil)
		ended := make(chan int, 1)
		go func() { ended <- runClient(socket, o.command) }()
		select {
		case code = <-ended:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
	if err := m.died(nil); err != nil {
		return 0, err
	}
	if o.out != "" {
		return code, r.powerOff()
	}
	return code, nil
}

// goTestArgs are the arguments of the go command: go test, with this program to run the test binaries.
func goTestArgs(argv []string, self string) []string {
	if strings.ContainsAny(self, " \t") {
		self = "'" + self + "'"
	}
	return append([]string{argv[0], "test", "-exec", self}, argv[2:]...)
}

// withExec is the environment in which go commands start with this program what they start.
func withExec(env []string, self string) ([]string, error) {
	if strings.ContainsAny(self, " \t") {
		return nil, fmt.Errorf("%s: -host does not work from a path with spaces, which GOFLAGS cannot hold: build test/soft-roce elsewhere (go build -o)", self)
	}
	flags := ""
	for _, e := range env {
		if was, ok := strings.CutPrefix(e, "GOFLAGS="); ok { // the last counts
			flags = was
		}
	}
	return append(env, "GOFLAGS="+strings.TrimSpace(flags+" -exec="+self)), nil
}

// goTestEnv is the environment of the go command. Test binaries, and what they write for the go command, are in a folder
// that host and machine share. Static binaries need nothing of the host; who says otherwise has a reason.
func goTestEnv(env []string, a *arch, socket, work string) []string {
	env = append(env, socketEnv+"="+socket, "GOTMPDIR="+work, "GOARCH="+a.name)
	for _, e := range env {
		if strings.HasPrefix(e, "CGO_ENABLED=") {
			return env
		}
	}
	return append(env, "CGO_ENABLED=0")
}

// runOnHost runs a command of the host with our input and output, and returns its exit status.
func runOnHost(ctx context.Context, in *interrupt, argv, env []string) (int, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = env
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start the command: %w", err)
	}
	in.commandRuns(func(s os.Signal) {
		if s != syscall.SIGINT && s != syscall.SIGQUIT { // the terminal has sent these to the command, too
			_ = cmd.Process.Signal(s) // it may have ended
		}
	})
	err := cmd.Wait()
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	return int(statusOf(cmd.ProcessState, err).code), nil
}

// setDeathSignal has the kernel send us a signal when the process that started us ends.
func setDeathSignal(s syscall.Signal) {
	_ = unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(s), 0, 0, 0) // then we only live on longer
}
