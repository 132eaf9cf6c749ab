package testutil

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// KernelBefore reports whether this Linux is older than a version.
func KernelBefore(t testing.TB, major, minor int) bool {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	var have [2]int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &have[0], &have[1]); err != nil {
		t.Fatalf("release %q: %v", unix.ByteSliceToString(u.Release[:]), err)
	}
	return have[0] < major || have[0] == major && have[1] < minor
}
