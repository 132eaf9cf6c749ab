package emulate

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// What a program opens ends with the last reference to its file, whatever that is, and not before.

// A step tells the test that something was done, and waits until it has looked.
type stepper struct{ out, in *os.File }

func newStepper(dir string) (s stepper, err error) {
	if s.out, err = os.OpenFile(dir+"/out", os.O_WRONLY, 0); err == nil {
		s.in, err = os.OpenFile(dir+"/in", os.O_RDONLY, 0)
	}
	return s, err
}

func (s stepper) done(what string) error {
	if _, err := fmt.Fprintln(s.out, what); err != nil {
		return err
	}
	_, err := s.in.Read(make([]byte, 1))
	return err
}

// steps opens a device and lets go of it, in all ways that there are.
func steps(args []string) error {
	s, err := newStepper(args[0])
	if err != nil {
		return err
	}
	open := func() int {
		fd, e := openNode()
		if e != nil {
			err = e
		}
		return fd
	}
	step := func(what string) {
		if err == nil {
			err = s.done(what)
		}
	}
	fd := open()
	step("1 open")
	page, _ := unix.Mmap(fd, 0x900*4096, 4096, unix.PROT_WRITE, unix.MAP_SHARED)
	unix.Close(fd)
	step("1 a mapping is left")
	unix.Munmap(page)
	step("0 unmapped")
	return errors.Join(letGo(open, step), err)
}

// letGo opens a node and lets go of it, in the ways that all files have.
func letGo(open func() int, step func(what string)) error {
	fd := open()
	step("1 open")
	unix.Close(fd)
	step("0 closed")
	fd = open()
	dup, _ := unix.Dup(fd)
	unix.Close(fd)
	step("1 a duplicate is left")
	unix.Close(dup)
	step("0 the duplicate has gone")
	fds := []int{open(), open()}
	step("2 open")
	pair, _ := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(fds[0]), nil, 0)
	unix.Close(fds[0])
	unix.Close(fds[1])
	step("1 in a socket that nobody has read")
	unix.Close(pair[1])
	unix.Close(pair[0])
	step("0 the socket has gone")
	fd = open()
	unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0) // not closed by execve
	child := exec.Command("sleep", "1000")
	child.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "device")}
	if err := child.Start(); err != nil {
		return err
	}
	unix.Close(fd)
	step("1 inherited")
	child.Process.Kill()
	child.Wait()
	step("0 the heir was killed")
	return nil
}

// channelSteps opens a file and lets go of it, in the ways that there are.
func channelSteps(args []string) error {
	s, err := newStepper(args[0])
	if err != nil {
		return err
	}
	var errs []error
	step := func(what string) { errs = append(errs, s.done(what)) }
	open := func() int {
		f, e := openCM(0)
		if e != nil {
			errs = append(errs, e)
			return -1
		}
		errs = append(errs, f.makeEvent())
		f.readable(-1)
		errs = append(errs, f.getEvent())
		return f.fd
	}
	if e := letGo(open, step); e != nil {
		return e
	}
	open()
	if e := exec.Command("sh", "-c", "true").Run(); e != nil {
		return e
	}
	step("1 after another program ran")
	return errors.Join(errs...)
}

// A testSteps is the test's side of a stepper.
type testSteps struct {
	dir     string
	out, in *os.File
}

func newSteps(t *testing.T) *testSteps {
	t.Helper()
	s := &testSteps{dir: t.TempDir()}
	open := func(name string) *os.File {
		path := filepath.Join(s.dir, name)
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0) // waits for nobody
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	s.out, s.in = open("out"), open("in")
	return s
}

// follow lets the program go from step to step. Each begins with how many there are of what the test looks at.
func (x *testSteps) follow(t *testing.T, s *Session, steps int, left func(*Session) int) {
	t.Helper()
	lines := bufio.NewScanner(x.out)
	for seen := 0; seen < steps && lines.Scan(); seen++ {
		n, what, _ := strings.Cut(lines.Text(), " ")
		want, err := strconv.Atoi(n)
		if err != nil {
			t.Fatal(lines.Text())
		}
		testutil.Eventually(t, lines.Text(), func() bool { return left(s) == want })
		if want > 0 { // what ends too early does so soon
			time.Sleep(20 * time.Millisecond)
			if n := left(s); n != want {
				t.Errorf("%s: %d are left, want %d", what, n, want)
			}
		}
		x.in.Write([]byte{1})
	}
	end(t, s, 0)
}

func contexts(s *Session) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.contexts)
}

func TestContextsEnd(t *testing.T) {
	x := newSteps(t)
	s := start(t, Config{Log: t.Output()}, "steps", x.dir)
	x.follow(t, s, 12, contexts)
}

func TestChannelsEnd(t *testing.T) {
	x := newSteps(t)
	s := start(t, Config{Log: t.Output()}, "channelsteps", x.dir)
	x.follow(t, s, 10, channels)
}
