package testutil

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
)

func TestMain(m *testing.M) { Main(m) }

func init() {
	RegisterChild("echo", func(args []string) {
		fmt.Println("args", strings.Join(args, ","), os.Getenv("EXTRA"))
		for line := range ChildInput() {
			if line == "quit" {
				os.Exit(7)
			}
			fmt.Println("echo", line)
		}
	})
}

func TestChildTalksAndEnds(t *testing.T) {
	CheckLeaks(t)
	c := StartChildEnv(t, []string{"EXTRA=x"}, "echo", "a", "b")
	if got := c.Expect("args"); got != "a,b x" {
		t.Errorf("args = %q", got)
	}
	c.Send("hello")
	if got := c.Line(); got != "echo hello" {
		t.Errorf("line = %q", got)
	}
	c.Send("quit")
	var exit *exec.ExitError
	if err := c.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("Wait = %v, want exit status 7", err)
	}
	if !strings.Contains(c.Output(), "echo hello") {
		t.Errorf("Output = %q", c.Output())
	}
}

func TestChildKill(t *testing.T) {
	CheckLeaks(t)
	c := StartChild(t, "echo")
	c.Expect("args")
	c.Kill()
	c.Kill()
	if err := c.Wait(); err == nil {
		t.Error("a killed child ended with status 0")
	}
}

func TestUnknownChild(t *testing.T) {
	if err := StartChild(t, "no such").Wait(); err == nil {
		t.Error("an unregistered child ended with status 0")
	}
}

func TestHogEndsWithTest(t *testing.T) {
	CheckLeaks(t)
	Hog(t, 1)
}

func TestSnapshotSeesLeaks(t *testing.T) {
	s := TakeSnapshot()
	stop := make(chan struct{})
	go leakyGoroutine(stop)
	diff := s.Diff()
	close(stop)
	if !strings.Contains(diff, "leakyGoroutine") {
		t.Errorf("goroutine not seen: %q", diff)
	}
	if runtime.GOOS != "linux" {
		return
	}
	f, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	diff = s.waitDiff(0)
	f.Close()
	if !strings.Contains(diff, "fd /proc/") {
		t.Errorf("descriptor not seen: %q", diff)
	}
	if left := s.waitDiff(Patience); left != "" {
		t.Errorf("left: %s", left)
	}
}

func leakyGoroutine(stop chan struct{}) { <-stop }

// recorder is a testing.TB that remembers how the test ended.
type recorder struct {
	testing.TB
	log bytes.Buffer
}

func (r *recorder) Helper()       {}
func (r *recorder) Skip(a ...any) { fmt.Fprint(&r.log, "skip ", fmt.Sprint(a...)) }
func (r *recorder) Fatalf(f string, a ...any) {
	fmt.Fprintf(&r.log, "fatal "+f, a...)
	runtime.Goexit()
}

func TestSkipIfUnsupported(t *testing.T) {
	run := func(err error) string {
		r := &recorder{}
		done := make(chan struct{})
		go func() { defer close(done); SkipIfUnsupported(r, err) }()
		<-done
		return r.log.String()
	}
	err := fmt.Errorf("memory windows: %w", errors.ErrUnsupported)
	t.Setenv(RequireEnv, "")
	if got := run(err); got != "skip memory windows: unsupported operation" {
		t.Error(got)
	}
	if got := run(nil) + run(os.ErrNotExist); got != "" {
		t.Error(got)
	}
	t.Setenv(RequireEnv, "1")
	if got := run(err); !strings.HasPrefix(got, "fatal required here") {
		t.Error(got)
	}
}
