//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
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
	return runOnHost(ctx, in, o.command, commandEnv(os.Environ(), "native"))
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
