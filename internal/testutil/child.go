package testutil

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

const childEnv = "RINGSIDE_TEST_CHILD"

var children = map[string]func(args []string){"testutil.hog": func([]string) { spin() }}

// RegisterChild names a function that StartChild can run in a process of its own. Call it from a package variable or
// init, so that it has run before Main. The process ends with status 0 when fn returns; fn reports to the test by
// printing lines to standard output, and takes commands from ChildInput.
func RegisterChild(name string, fn func(args []string)) {
	if _, dup := children[name]; dup {
		panic("testutil: child registered twice: " + name)
	}
	children[name] = fn
}

var childInput = make(chan string, 64)

// ChildInput delivers, in a child process, the lines that the test sent with Child.Send.
func ChildInput() <-chan string { return childInput }

func runChild(name string) {
	fn := children[name]
	if fn == nil {
		fmt.Fprintf(os.Stderr, "testutil: no child %q is registered in this test binary\n", name)
		os.Exit(2)
	}
	go readInput()
	fn(os.Args[1:])
	os.Exit(0)
}

// readInput ends the process when the test that started it is gone, however that ended: no child outlives its test.
func readInput() {
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		childInput <- in.Text()
	}
	os.Exit(3)
}

// A Child is a process that runs a registered function of the test binary. Its methods are for the test's goroutine;
// Kill may be called from others.
type Child struct {
	t     testing.TB
	name  string
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines chan string

	mu     sync.Mutex
	output strings.Builder // stdout and stderr

	done chan struct{}
	err  error // of Wait, once done is closed
}

// StartChild starts the registered child name with args; env entries of the form KEY=value may be put before the
// arguments. The test binary's TestMain must call Main. The child is killed at the end of the test if it is still there,
// and its output is logged if the test failed.
func StartChild(t testing.TB, name string, args ...string) *Child {
	t.Helper()
	return StartChildEnv(t, nil, name, args...)
}

// StartChildEnv is StartChild with additional environment entries (KEY=value).
func StartChildEnv(t testing.TB, env []string, name string, args ...string) *Child {
	t.Helper()
	return StartChildIn(t, "", env, name, args...)
}

// StartChildIn is StartChildEnv in a network namespace (see NewNetwork) if it has a name.
func StartChildIn(t testing.TB, namespace string, env []string, name string, args ...string) *Child {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := &Child{t: t, name: name, cmd: exec.Command(exe, args...), lines: make(chan string, 4096), done: make(chan struct{})}
	if namespace != "" {
		c.cmd = exec.Command("ip", append([]string{"netns", "exec", namespace, exe}, args...)...)
	}
	c.cmd.Env = append(append(os.Environ(), childEnv+"="+name), env...)
	if c.stdin, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	pr, pw := io.Pipe()
	c.cmd.Stdout = io.MultiWriter(pw, (*childLog)(c))
	c.cmd.Stderr = (*childLog)(c)
	c.cmd.WaitDelay = 5 * time.Second
	if err := c.cmd.Start(); err != nil {
		t.Fatalf("child %s: %v", name, err)
	}
	go func() {
		defer close(c.lines)
		in := bufio.NewScanner(pr)
		in.Buffer(nil, 1<<20)
		for in.Scan() {
			select {
			case c.lines <- in.Text():
			default: // nobody reads that many lines: they are in the log
			}
		}
		io.Copy(io.Discard, pr)
	}()
	go func() {
		c.err = c.cmd.Wait()
		pw.Close()
		close(c.done)
	}()
	t.Cleanup(func() {
		c.Kill()
		if t.Failed() {
			t.Logf("output of child %s (pid %d, %v):\n%s", name, c.PID(), c.err, c.Output())
		}
	})
	return c
}

type childLog Child

func (l *childLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.output.Write(p)
}

// PID is the child's process id.
func (c *Child) PID() int { return c.cmd.Process.Pid }

// Output is everything that the child has printed so far, to standard output and standard error.
func (c *Child) Output() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.output.String()
}

// Send delivers a line to the child's ChildInput.
func (c *Child) Send(line string) {
	c.t.Helper()
	if _, err := io.WriteString(c.stdin, line+"\n"); err != nil {
		c.t.Fatalf("child %s: %v", c.name, err)
	}
}

// Line returns the next line of the child's standard output. It fails the test if the child ends first, or after
// Patience.
func (c *Child) Line() string {
	c.t.Helper()
	timer := time.NewTimer(Patience)
	defer timer.Stop()
	select {
	case s, ok := <-c.lines:
		if !ok {
			<-c.done
			c.t.Fatalf("child %s ended (%v) where a line was expected", c.name, c.err)
		}
		return s
	case <-timer.C:
		c.t.Fatalf("child %s: no line within %v", c.name, Patience)
	}
	panic("unreachable")
}

// Expect skips lines of the child's standard output up to one that starts with prefix, and returns the rest of that
// line, trimmed. It fails the test if the child ends first, or if Patience passes without a line.
func (c *Child) Expect(prefix string) string {
	c.t.Helper()
	for {
		if rest, ok := strings.CutPrefix(c.Line(), prefix); ok {
			return strings.TrimSpace(rest)
		}
	}
}

// Kill kills the child as kill -9 does, and waits until it is gone. Killing twice, or a child that ended, is no error.
func (c *Child) Kill() {
	c.cmd.Process.Kill() // fails only if the process has ended already
	<-c.done
}

// Wait waits until the child ends by itself. The error is *exec.ExitError unless the status was 0. It fails the test
// after Patience.
func (c *Child) Wait() error {
	c.t.Helper()
	timer := time.NewTimer(Patience)
	defer timer.Stop()
	select {
	case <-c.done:
	case <-timer.C:
		c.t.Fatalf("child %s still runs after %v", c.name, Patience)
	}
	return c.err
}
