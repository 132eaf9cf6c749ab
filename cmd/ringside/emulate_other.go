//go:build !linux

package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
)

func launcherMain() {}

func emulateProgram(*cobra.Command, *emulateConfig) error {
	return fmt.Errorf("emulate: on Linux only, whose seccomp filters it needs: %w", errors.ErrUnsupported)
}
