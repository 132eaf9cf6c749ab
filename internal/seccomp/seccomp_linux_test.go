package seccomp

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

var openRules = []Rule{
	{Call: unix.SYS_SOCKET, Where: []Arg{{Value: unix.AF_NETLINK}, {Index: 2, Value: 20}}, Errno: unix.ESOCKTNOSUPPORT},
	{Call: unix.SYS_OPENAT},
}

// start starts one of the programs.
func start(t *testing.T, rules []Rule, name string, args ...string) *Process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p, err := Start(self, append([]string{"program:" + name}, args...), rules)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Signal(unix.SIGKILL)
		p.Wait()
	})
	return p
}

// A server answers opens as the programs expect it, until nobody is left who could call.
type server struct {
	t     *testing.T
	file  int
	at    int          // the number that the first message gets, or the next ones that are free; 0: any
	calls atomic.Int32 // to open the message
}

func newServer(t *testing.T) *server {
	fd, err := unix.MemfdCreate("message", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if _, err := unix.Write(fd, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	return &server{t: t, file: fd}
}

func (s *server) serve(l *Listener) {
	defer l.Close()
	for {
		c, err := l.Receive()
		if err != nil {
			s.t.Error(err)
			return
		}
		if c == nil {
			l.Stop()
			return
		}
		if err := s.answer(c); err != nil && !errors.Is(err, ErrWithdrawn) {
			s.t.Error(err)
		}
	}
}

func (s *server) answer(c *Call) error {
	m, err := c.Memory()
	if err != nil {
		return err
	}
	defer m.Close()
	path := make([]byte, 16)
	if err := m.ReadAt(path, c.Args[1]); err != nil {
		return c.Continue() // near the end of a mapping: none of ours
	}
	switch {
	case strings.HasPrefix(string(path), "/nowhere/message"):
		s.calls.Add(1)
		fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(s.file), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		cloexec := c.Args[2]&unix.O_CLOEXEC != 0
		if s.at == 0 {
			return c.ReturnFD(fd, cloexec)
		}
		for at := s.at; ; at++ {
			switch err := c.ReturnFDAt(fd, at, cloexec); {
			case errors.Is(err, ErrLimit):
				return c.Fail(unix.EMFILE)
			case !errors.Is(err, ErrTaken):
				return err
			}
		}
	case strings.HasPrefix(string(path), "/nowhere/refused"):
		return c.Fail(unix.EXDEV)
	}
	return c.Continue()
}

// What a program calls is answered, refused or done by the kernel, in all of its threads and in processes that it starts.
func TestCalls(t *testing.T) {
	for _, name := range []string{"open", "family", "socket"} {
		t.Run(name, func(t *testing.T) {
			p := start(t, openRules, name)
			s := newServer(t)
			s.serve(p.Listener)
			st, err := p.Wait()
			if err != nil || st.ExitStatus() != 0 {
				t.Errorf("ended with %v, %v (its output is above)", st, err)
			}
			if name != "socket" && s.calls.Load() == 0 {
				t.Error("no call was seen")
			}
		})
	}
}

// Where the system call is not to be had, that is said.
func TestUnavailable(t *testing.T) {
	for errno, says := range map[syscall.Errno]string{
		unix.EPERM:  "forbidden here",
		unix.EACCES: "forbidden here",
		unix.ENOSYS: "this kernel has no seccomp filters",
		unix.EBUSY:  "supervises this process already",
		unix.ENOMEM: "installing a seccomp filter",
	} {
		cmd := exec.Command("/proc/self/exe", strconv.Itoa(int(errno)))
		cmd.Args[0] = "program:confined"
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.HasPrefix(string(out), "confined: ") || !strings.Contains(string(out), says) || !strings.Contains(string(out), errno.Error()) {
			t.Errorf("%v: %v, %q; want %q", errno, err, out, says)
		}
	}
}

// A file has the number that was chosen, without one of the program's own that has it.
func TestChosenNumber(t *testing.T) {
	p := start(t, openRules, "numbers", "300")
	s := newServer(t)
	s.at = 300
	s.serve(p.Listener)
	if st, err := p.Wait(); err != nil || st.ExitStatus() != 0 {
		t.Errorf("ended with %v, %v (its output is above)", st, err)
	}
}

// A call that was taken is not begun anew by a signal: what it has made would be made twice.
func TestOnceUnderSignals(t *testing.T) {
	if testutil.KernelBefore(t, 5, 19) { // without SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
		testutil.Skip(t, "before Linux 5.19, signals restart calls")
	}
	p := start(t, openRules, "storm")
	s := newServer(t)
	s.serve(p.Listener)
	if st, err := p.Wait(); err != nil || st.ExitStatus() != 0 {
		t.Errorf("ended with %v, %v", st, err)
	}
	if n := s.calls.Load(); n != stormCalls {
		t.Errorf("%d calls arrived of %d", n, stormCalls)
	}
}

// Signals to this process do not disturb the calls that it answers.
func TestAnswersUnderSignals(t *testing.T) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			tasks, _ := os.ReadDir("/proc/self/task")
			for _, task := range tasks {
				if tid, err := strconv.Atoi(task.Name()); err == nil {
					unix.Tgkill(os.Getpid(), tid, unix.SIGURG) // which Go's runtime makes nothing of
				}
			}
		}
	})
	defer wg.Wait()
	defer close(stop)
	p := start(t, openRules, "opens", "200")
	s := newServer(t)
	s.serve(p.Listener)
	if st, err := p.Wait(); err != nil || st.ExitStatus() != 0 {
		t.Errorf("ended with %v, %v (its output is above)", st, err)
	}
	if n := s.calls.Load(); n != 200 {
		t.Errorf("%d calls arrived of 200", n)
	}
}

func TestEnds(t *testing.T) {
	for _, c := range []struct {
		name, arg string
		want      syscall.WaitStatus
	}{
		{"exit", "0", 0},
		{"exit", "3", 3 << 8},
		{"signal", "15", 15},
		{"signal", "9", 9},
		{"signal", "11", 11},
	} {
		t.Run(c.name+c.arg, func(t *testing.T) {
			p := start(t, []Rule{{Call: unix.SYS_SOCKET}}, c.name, c.arg)
			defer p.Listener.Close()
			defer p.Listener.Stop()
			if call, err := p.Listener.Receive(); call != nil || err != nil {
				t.Errorf("a call %v, %v of a program that makes none", call, err)
			}
			if st, err := p.Wait(); err != nil || st&^0x80 != c.want { // 0x80: with a core file
				t.Errorf("ended with %#x, %v, want %#x", st, err, c.want)
			}
			cmd := exec.Command("/proc/self/exe", strconv.Itoa(int(c.want)))
			cmd.Args[0] = "program:endas"
			cmd.Run()
			if st := cmd.ProcessState.Sys().(syscall.WaitStatus); st != c.want {
				t.Errorf("EndAs(%#x) ended with %#x", c.want, st)
			}
		})
	}
}

// The caller is killed while it waits.
func TestWithdrawn(t *testing.T) {
	p := start(t, openRules, "hang")
	defer p.Listener.Close()
	defer p.Listener.Stop()
	c, err := p.Listener.Receive()
	if err != nil || c == nil {
		t.Fatal(c, err)
	}
	if !c.Valid() {
		t.Error("a call that waits is not valid")
	}
	m, err := c.Memory()
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	p.Signal(unix.SIGKILL)
	p.Wait()
	testutil.Eventually(t, "the call of a dead process is withdrawn", func() bool { return !c.Valid() })
	if _, err := c.Memory(); !errors.Is(err, ErrWithdrawn) {
		t.Errorf("memory: %v", err)
	}
	if err := m.ReadAt(make([]byte, 1), c.Args[1]); err == nil {
		t.Error("memory of a dead process was read")
	}
	for name, err := range map[string]error{"continue": c.Continue(), "return": c.Return(0), "fail": c.Fail(unix.EPERM), "fd": c.ReturnFD(0, true), "fd at": c.ReturnFDAt(0, 300, true)} {
		if !errors.Is(err, ErrWithdrawn) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if c, err := p.Listener.Receive(); c != nil || err != nil {
		t.Errorf("after the end: %v, %v", c, err)
	}
}

func TestStop(t *testing.T) {
	p := start(t, openRules, "hang")
	defer p.Listener.Close()
	if c, err := p.Listener.Receive(); c == nil || err != nil {
		t.Fatal(c, err)
	}
	p.Listener.Stop()
	if c, err := p.Listener.Receive(); c != nil || err != nil {
		t.Errorf("after Stop: %v, %v", c, err)
	}
}

func TestNoProgram(t *testing.T) {
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("neither a script nor a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]syscall.Errno{
		text:                       unix.ENOEXEC,
		filepath.Join(dir, "none"): unix.ENOENT,
		dir:                        unix.EACCES,
	} {
		p, err := Start(path, []string{path}, openRules)
		var e *ExecError
		if p != nil || !errors.As(err, &e) || e.Errno != want || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v, want %v", path, err, want)
		}
	}
}
