// Package testutil holds what the tests of several packages share: leak checks, child processes made from the test
// binary itself, skip rules and CPU load. Only tests import it, and the conformance suite.
//
// A package whose tests use any of it has one line of set-up:
//
//	func TestMain(m *testing.M) { testutil.Main(m) }
package testutil

import (
	"errors"
	"os"
	"testing"
	"time"
)

// RequireEnv names the environment variable that turns a skip for want of something into a failure. CI sets it in the machine of
// test/soft-roce, which has all that tests want of it.
const RequireEnv = "RINGSIDE_TEST_REQUIRE"

// SkipIfUnsupported skips the test, with err as the reason, if err matches errors.ErrUnsupported; with RequireEnv set
// it fails the test instead. It does nothing for other errors, nil included: the test judges those itself.
func SkipIfUnsupported(t testing.TB, err error) {
	t.Helper()
	if !errors.Is(err, errors.ErrUnsupported) {
		return
	}
	if os.Getenv(RequireEnv) != "" {
		t.Fatalf("required here (%s is set): %v", RequireEnv, err)
	}
	t.Skip(err)
}

// Skip skips the test for want of what other machines have: a device, a program, a privilege; with RequireEnv set it fails the test
// instead. What says nothing of the machine, such as that a test is not for this kind of device, is testing.T's own Skip.
func Skip(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv(RequireEnv) != "" {
		t.Fatalf("required here (%s is set): %s", RequireEnv, reason)
	}
	t.Skip(reason)
}

// Close closes what is given, in that order.
func Close(t testing.TB, list ...interface{ Close() error }) {
	t.Helper()
	for _, c := range list {
		if err := c.Close(); err != nil {
			t.Errorf("close %T: %v", c, err)
		}
	}
}

// Patience is how long a test waits for something that happens soon on an idle machine. It only bounds the time to a
// failure, so it is generous: CI machines are slow, loaded, and run the race detector.
const Patience = 30 * time.Second

// Eventually polls cond until it reports true, and fails the test once Patience is over. what completes the sentence
// "still not true: ...".
func Eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	if !within(Patience, cond) {
		t.Fatalf("after %v still not true: %s", Patience, what)
	}
}

func within(d time.Duration, cond func() bool) bool {
	deadline := time.Now().Add(d)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		if cond() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(pause)
	}
}

// Main is the body of TestMain: it serves as a child process if the test binary was started as one (see StartChild),
// and otherwise runs the tests and fails the run if goroutines, file descriptors, shared mappings or files in /dev/shm
// are left when they are over. It does not return.
func Main(m *testing.M) {
	if name := os.Getenv(childEnv); name != "" {
		runChild(name)
	}
	before := TakeSnapshot()
	code := m.Run()
	if code == 0 {
		if left := before.waitDiff(5 * time.Second); left != "" {
			os.Stderr.WriteString("testutil: left over after all tests:\n" + left)
			code = 1
		}
	}
	os.Exit(code)
}
