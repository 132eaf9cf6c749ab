package testutil

import (
	"fmt"
	"os"
	"runtime/debug"
)

// EndOnPanic, deferred by a test whose objects are closed by cleanups, ends the process on a panic: one below a lock would have the
// cleanups wait for that for ever, and nobody see it.
func EndOnPanic() {
	if r := recover(); r != nil {
		fmt.Fprintf(os.Stderr, "panic: %v\n\n%s", r, debug.Stack())
		os.Exit(2)
	}
}
