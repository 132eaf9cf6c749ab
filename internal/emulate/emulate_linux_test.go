package emulate

import (
	"bufio"
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// start starts one of the programs.
func start(t *testing.T, cfg Config, name string, args ...string) *Session {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s, err := Start(cfg, self, append([]string{"program:" + name}, args...))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func end(t *testing.T, s *Session, status int) {
	t.Helper()
	st, err := s.Wait()
	if again, e := s.Wait(); again != st || e != err {
		t.Errorf("waited for again, it has ended with %#x, %v, before with %#x, %v", again, e, st, err)
	}
	if err != nil || !st.Exited() || st.ExitStatus() != status {
		t.Errorf("the program has ended with %#x, %v; its output is above", st, err)
	}
	if len(s.contexts) > 0 {
		t.Errorf("%d contexts are left", len(s.contexts))
	}
	if n := channels(s); n > 0 {
		t.Errorf("%d channels are left", n)
	}
	if _, err := os.Stat(s.tree.root); !os.IsNotExist(err) {
		t.Errorf("the tree is left: %v", err)
	}
}

func TestFiles(t *testing.T) { end(t, start(t, Config{Devices: 2, Log: t.Output()}, "files"), 0) }

// TMPDIR may be a symbolic link, and need not be absolute.
func TestTemporaryFolder(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(dir+"/real", 0o755), os.Symlink("real", dir+"/link")); err != nil {
		t.Fatal(err)
	}
	for _, tmp := range []string{dir + "/link", "link"} {
		t.Chdir(dir)
		t.Setenv("TMPDIR", tmp)
		end(t, start(t, Config{Devices: 2, Log: t.Output()}, "files"), 0)
	}
}

func TestVerbs(t *testing.T) {
	var trace bytes.Buffer
	end(t, start(t, Config{Devices: 2, Trace: &trace, Log: t.Output()}, "verbs"), 0)
	for _, want := range []string{"mlx5_0 EMU DB ", "mlx5_0 EMU WQE ", "mlx5_0 EMU CQE ", "mlx5_1 EMU CQE "} {
		if !strings.Contains(trace.String(), "\n"+want) && !strings.HasPrefix(trace.String(), want) {
			t.Errorf("the trace has no line %q", want)
		}
	}
}

func TestStatus(t *testing.T) { end(t, start(t, Config{}, "exit"), 5) }

func TestOrphans(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args[0] = "program:orphans"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func TestKilled(t *testing.T) {
	s := start(t, Config{}, "steps", newSteps(t).dir)
	s.Signal(unix.SIGTERM)
	st, err := s.Wait()
	if err != nil || !st.Signaled() || st.Signal() != unix.SIGTERM {
		t.Errorf("ended with %#x, %v", st, err)
	}
}

// A program does not wait for ever for answers that nobody gives any more.
func TestNobodyAnswers(t *testing.T) {
	x := newSteps(t)
	s := start(t, Config{Log: t.Output()}, "refused", x.dir)
	if !bufio.NewScanner(x.out).Scan() {
		t.Fatal("the program does not run")
	}
	s.process.Listener.Stop()
	x.in.Write([]byte{1})
	end(t, s, 0)
}

// A context is the process', also when the thread that has opened it has ended.
func TestOpenerEnds(t *testing.T) {
	end(t, start(t, Config{Log: t.Output()}, "openerends"), 0)
}

func TestOtherProcess(t *testing.T) {
	var log lockedBuffer
	end(t, start(t, Config{Log: &log}, "fork"), 0)
	if !strings.Contains(log.String(), "only that one can") {
		t.Errorf("nothing was said of it: %q", log.String())
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestRefused(t *testing.T) {
	for name, cfg := range map[string]Config{
		"less than none": {Devices: -1},
		"too many":       {Devices: 33},
		"all is lost":    {Loss: 1},
		"less than lost": {Loss: -0.1},
	} {
		if s, err := Start(cfg, "/proc/self/exe", []string{"program:exit"}); err == nil {
			t.Errorf("%s: started", name)
			s.Wait()
		}
	}
	before, _ := filepath.Glob(filepath.Join(os.TempDir(), "ringside-emulate-*"))
	if s, err := Start(Config{}, "/nowhere", []string{"nowhere"}); err == nil {
		t.Error("a program that is not there was started")
		s.Wait()
	}
	if after, _ := filepath.Glob(filepath.Join(os.TempDir(), "ringside-emulate-*")); len(after) > len(before) {
		t.Errorf("%d folders are left", len(after)-len(before))
	}
}
