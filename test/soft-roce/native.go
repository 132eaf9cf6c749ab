//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// nativeModules are what -native needs of the host's kernel.
var nativeModules = []string{"rdma_rxe", "siw", "rdma_ucm", "ib_umad", "veth"}

// runNative adds the devices to this host, runs the command on it, and removes them, also if the command fails or a signal
// ends it. What a run that was killed has left is removed by the next.
func runNative(ctx context.Context, in *interrupt, o *options) (code int, err error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("-native adds network and RDMA devices to the host, which takes root: run it with sudo")
	}
	if err := loadNativeModules(ctx); err != nil {
		return 0, err
	}
	w := newWiring("ringside")
	if w.left() {
		if err := w.down(); err != nil {
			return 0, fmt.Errorf("an earlier run was killed: %w", err)
		}
	}
	defer func() { err = errors.Join(err, w.down()) }()
	if err := w.up(); err != nil {
		return 0, err
	}
	return runToTheLast(ctx, in, o.command, commandEnv(os.Environ(), "native"))
}

// runToTheLast is runOnHost, and ends what the command has left running: the devices cannot be removed while anybody has them open, and
// go test leaves its tests when a signal ends it. No other child of this process may be there.
func runToTheLast(ctx context.Context, in *interrupt, argv, env []string) (code int, err error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil { // who has lost its parent becomes our child
		return 0, fmt.Errorf("adopt what the command leaves: %w", err)
	}
	defer func() { err = errors.Join(err, endChildren()) }()
	return runOnHost(ctx, in, argv, env)
}

// endChildren kills the children of this process, then those that it inherits from them, until there are none.
func endChildren() error {
	for {
		pids, err := children(os.Getpid())
		if err != nil {
			return fmt.Errorf("find what the command has left: %w", err)
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL) // the number is not another's before we have waited for it
			for err = unix.EINTR; err == unix.EINTR; {
				_, err = unix.Wait4(pid, nil, 0, nil)
			}
		}
		if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err == unix.ECHILD {
			return nil
		}
	}
}

// children returns the processes whose parent is pid.
func children(pid int) (pids []int, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, _ := os.ReadFile("/proc/" + e.Name() + "/stat")      // it may have ended
		f := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:]) // behind the name: state, parent
		if len(f) > 1 && string(f[1]) == strconv.Itoa(pid) {
			pids = append(pids, n)
		}
	}
	return pids, nil
}

// loadNativeModules has modprobe load the modules that are not there yet.
func loadNativeModules(ctx context.Context) error {
	var missing []string
	for _, m := range nativeModules {
		if !fileExists("/sys/module/" + m) {
			missing = append(missing, m)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	text, err := exec.CommandContext(ctx, "modprobe", append([]string{"-a"}, missing...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("-native: this host's kernel does not have all of %s: %w: %s; without -native a machine has them",
			strings.Join(missing, " "), err, strings.TrimSpace(string(text)))
	}
	return nil
}
