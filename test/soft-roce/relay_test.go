//go:build linux

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// fakeMachine is a relay whose machine is this process: the server runs here, without cgroups, over a pair of sockets.
type fakeMachine struct {
	socket string
	conn   *os.File // the machine's end
}

func newFakeMachine(t *testing.T) *fakeMachine {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	host, guest := os.NewFile(uintptr(fds[0]), "host"), os.NewFile(uintptr(fds[1]), "guest")
	dir, err := os.MkdirTemp("", "soft-roce-test-") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	fake := &fakeMachine{filepath.Join(dir, "relay"), guest}
	l, err := listenUnix(fake.socket)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{console: &console{}, conn: host, in: bufio.NewReader(host), exited: make(chan struct{})}
	close(m.exited)
	var wg sync.WaitGroup
	wg.Go(func() { newRelay(m).serve(l) })
	s := &server{out: &frameWriter{w: guest}, jobs: map[uint32]*job{}}
	wg.Go(func() {
		if err := s.run(guest); err != nil && !strings.Contains(err.Error(), "closed") {
			t.Error("server:", err)
		}
	})
	t.Cleanup(func() {
		l.Close()
		guest.Close()
		host.Close()
		wg.Wait()
		os.RemoveAll(dir)
	})
	return fake
}

// shell is a client that runs a shell's command line.
func shell(line string) (c *client, stdout, stderr *bytes.Buffer) {
	stdout, stderr = new(bytes.Buffer), new(bytes.Buffer)
	return &client{
		execRequest: execRequest{argv: []string{"sh", "-c", line}, env: []string{"WHO=world"}, dir: "/"},
		stdin:       strings.NewReader(""), stdout: stdout, stderr: stderr,
	}, stdout, stderr
}

func TestCommand(t *testing.T) {
	m := newFakeMachine(t)
	c, out, errs := shell("echo hello $WHO; pwd; echo oops >&2; exit 7")
	status, err := c.run(m.socket)
	if err != nil || status.code != 7 || out.String() != "hello world\n/\n" || errs.String() != "oops\n" {
		t.Errorf("status %v, %v, output %q, %q", status, err, out, errs)
	}
	c, out, errs = shell("echo 1; echo 2 >&2; echo 3")
	c.merge = true
	if _, err := c.run(m.socket); err != nil || out.String() != "1\n2\n3\n" || errs.Len() > 0 {
		t.Errorf("merged: %v, output %q, %q", err, out, errs)
	}
}

func TestCommandThatCannotStart(t *testing.T) {
	m := newFakeMachine(t)
	for _, c := range []struct {
		argv []string
		dir  string
		code uint32
	}{
		{[]string{"no-such-command"}, "/", 127},
		{[]string{"/no/such/command"}, "/", 127},
		{[]string{"/etc/passwd"}, "/", 126},
	} {
		q, _, _ := shell("")
		q.argv, q.dir = c.argv, c.dir
		if s, err := q.run(m.socket); err != nil || s.code != c.code || s.message == "" {
			t.Errorf("%v: %v, %v", c, s, err)
		}
	}
}

func TestInputIsHandedOn(t *testing.T) {
	m := newFakeMachine(t)
	text := strings.Repeat("0123456789abcdef", 20_000)
	c, out, _ := shell("cat")
	c.stdin = strings.NewReader(text)
	if s, err := c.run(m.socket); err != nil || s.code != 0 || out.String() != text {
		t.Errorf("%v, %v, %d bytes of %d came back", s, err, out.Len(), len(text))
	}
	c, _, _ = shell("exec <&-; sleep 0.1") // who reads no input is not in the way of its end
	c.stdin = strings.NewReader(text)
	if s, err := c.run(m.socket); err != nil || s.code != 0 {
		t.Errorf("without a reader: %v, %v", s, err)
	}
}

func TestManyCommandsAtOnce(t *testing.T) {
	m := newFakeMachine(t)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			c, out, _ := shell(fmt.Sprintf("for i in 1 2 3; do echo %d; sleep 0.01; done; exit %d", i, i))
			s, err := c.run(m.socket)
			if err != nil || int(s.code) != i || out.String() != strings.Repeat(fmt.Sprintln(i), 3) {
				t.Errorf("command %d: %v, %v, %q", i, s, err, out)
			}
		})
	}
	wg.Wait()
}

func TestSignalReachesTheCommand(t *testing.T) {
	m := newFakeMachine(t)
	c, _, _ := shell("trap 'exit 42' TERM; echo ready; while :; do sleep 0.02; done")
	signals := make(chan os.Signal, 1)
	r, w := io.Pipe()
	c.signals, c.stdout = signals, w
	go func() {
		if _, err := bufio.NewReader(r).ReadString('\n'); err == nil {
			signals <- syscall.SIGTERM
		}
		io.Copy(io.Discard, r)
	}()
	if s, err := c.run(m.socket); err != nil || s.code != 42 {
		t.Errorf("%v, %v", s, err)
	}
	w.Close()
	c, _, _ = shell("kill -9 $$")
	if s, err := c.run(m.socket); err != nil || s.code != 128+9 {
		t.Errorf("killed: %v, %v", s, err)
	}
}

func TestClientThatGoesTakesItsCommandAlong(t *testing.T) {
	m := newFakeMachine(t)
	conn, err := dialUnix(m.socket)
	if err != nil {
		t.Fatal(err)
	}
	c, _, _ := shell("echo $$; exec sleep 1000")
	if err := (&frameWriter{w: conn}).send(kindExec, 0, c.encode()); err != nil {
		t.Fatal(err)
	}
	f, err := readFrame(conn)
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(f.payload), &pid); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	testutil.Eventually(t, "the command is killed", func() bool { return unix.Kill(pid, 0) == unix.ESRCH })
}

func TestMachineThatDiesEndsItsCommands(t *testing.T) {
	m := newFakeMachine(t)
	c, _, _ := shell("echo up; sleep 1")
	r, w := io.Pipe()
	c.stdout = w
	go func() {
		bufio.NewReader(r).ReadString('\n')
		m.conn.Close()
		io.Copy(io.Discard, r)
	}()
	s, err := c.run(m.socket)
	w.Close()
	if err != nil || s.code != failure || !strings.Contains(s.message, "is gone") {
		t.Errorf("%v, %v", s, err)
	}
	c, _, _ = shell("true") // and those that come later
	if s, err := c.run(m.socket); err != nil || s.code != failure {
		t.Errorf("later: %v, %v", s, err)
	}
}

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/prog", nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/text", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	env := []string{"PATH=/nowhere:" + dir}
	if got, err := lookPath("prog", "/", env); err != nil || got != dir+"/prog" {
		t.Error(got, err)
	}
	if got, err := lookPath("./prog", "/", nil); err != nil || got != "./prog" {
		t.Error(got, err)
	}
	if got, err := lookPath("text", "/", env); err == nil {
		t.Error(got)
	}
}
