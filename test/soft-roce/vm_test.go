//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// vm builds this command and returns a function that makes runs of it. Each run has a TMPDIR of its own, which must be
// empty when it has ended.
func vm(t *testing.T) func(args ...string) *exec.Cmd {
	t.Helper()
	if os.Getenv("RINGSIDE_VM") == "" {
		testutil.Skip(t, "RINGSIDE_VM=1 boots virtual machines, and builds their image first (once; takes minutes)")
	}
	self := filepath.Join(t.TempDir(), "soft-roce")
	build := exec.Command("go", "build", "-o", self, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if _, errs, code := finish(t, exec.Command(self, "-v", "true")); code != 0 { // the image, before anything is timed
		t.Fatalf("status %d\n%s", code, errs)
	}
	return func(args ...string) *exec.Cmd {
		tmp, err := os.MkdirTemp("", "sr-") // t.TempDir is too long for sockets
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Remove(tmp); err != nil {
				t.Error("a run has left something behind:", err)
			}
		})
		ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
		t.Cleanup(cancel)
		cmd := exec.CommandContext(ctx, self, args...)
		cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
		return cmd
	}
}

// finish runs a command to its end.
func finish(t *testing.T, cmd *exec.Cmd) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func contains(t *testing.T, where, text string, wanted ...string) {
	t.Helper()
	for _, w := range wanted {
		if !strings.Contains(text, w) {
			t.Errorf("%s: no %q in\n%s", where, w, text)
		}
	}
}

// Both ways between devices: one to itself, and one to the other over the network.
const pingpong = `
for server in rxe0 rxe1; do
	ibv_rc_pingpong -d $server -g 1 -n 100 > /dev/null &
	for i in 1 2 3 4 5 6 7 8 9 10; do # until the server listens
		sleep 0.5
		ibv_rc_pingpong -d rxe0 -g 1 -n 100 127.0.0.1 && break
	done
	wait $! || exit 9
done
`

// Subtests run at once where they may: machines do not know of one another.
func TestMachine(t *testing.T) {
	run := vm(t)

	t.Run("shell", func(t *testing.T) {
		t.Parallel()
		out := t.TempDir()
		cmd := run("-out", out, "--", "/bin/sh", "-c", `
			echo "$RINGSIDE_SOFT_ROCE$RINGSIDE_VM" in $PWD; cat; echo complaint >&2
			ibv_devices
			ulimit -l
			ip -br addr show veth0; ip -br addr show veth3
			echo written > /out/file; echo gone > ./written-in-the-machine
			rping -s -a 10.78.0.2 -C 3 > /dev/null 2>&1 & sleep 1
			rping -c -a 10.78.0.2 -C 3 > /dev/null 2>&1 && echo iWARP works
			which rping ib_send_lat tcpdump strace busybox > /dev/null || exit 8
			`+pingpong+`
			exit 7`)
		cmd.Stdin = strings.NewReader("some input\n")
		stdout, stderr, code := finish(t, cmd)
		here, err := os.Getwd()
		if err != nil {
			t.Fatal(err)
		}
		contains(t, "stdout", stdout, "vm in "+here+"\nsome input\n", "rxe0", "rxe1", "siw0", "siw1", "unlimited", "10.77.0.1/24", "10.78.0.2/24", "iWARP works")
		if n := strings.Count(stdout, "100 iters in"); n != 2 {
			t.Errorf("%d pairs of ping-pong have finished:\n%s", n, stdout)
		}
		if code != 7 || stderr != "complaint\n" {
			t.Errorf("status %d, stderr %q", code, stderr)
		}
		if text, err := os.ReadFile(out + "/file"); err != nil || string(text) != "written\n" {
			t.Errorf("/out/file: %q, %v", text, err)
		}
		if fileExists("written-in-the-machine") {
			t.Error("the machine writes into the host's files")
		}
	})

	t.Run("go test", func(t *testing.T) {
		t.Parallel()
		cmd := run("--", "go", "test", "-v", "-p", "2", "-coverprofile=cover.out", "./a", "./b", "./fail", "./nothing")
		cmd.Dir = sampleModule(t)
		stdout, stderr, code := finish(t, cmd)
		contains(t, "stdout", stdout+stderr, "ok  \tsample/a", "ok  \tsample/b", "FAIL\tsample/fail", "as it should")
		if code != 1 {
			t.Errorf("status %d", code)
		}
		if text, err := os.ReadFile(filepath.Join(cmd.Dir, "cover.out")); err != nil {
			t.Error(err)
		} else {
			contains(t, "coverage", string(text), "sample/a/a.go:3.17,3.29 1 1")
		}
	})

	t.Run("go test in a script", func(t *testing.T) {
		t.Parallel()
		cmd := run("-host", "--", "sh", "-c", `echo "$PPID $RINGSIDE_SOFT_ROCE"; go test ./a & go test ./b && wait $! && go test ./fail; echo status $?`)
		cmd.Dir = sampleModule(t)
		stdout, stderr, code := finish(t, cmd)
		contains(t, "stdout", stdout+stderr, fmt.Sprintf("%d \n", cmd.Process.Pid), "ok  \tsample/a", "ok  \tsample/b", "FAIL\tsample/fail", "status 1")
		if code != 0 {
			t.Errorf("status %d", code)
		}
	})

	t.Run("another architecture", func(t *testing.T) {
		t.Parallel()
		other := arches[slices.IndexFunc(arches, (*arch).foreign)]
		stdout, stderr, code := finish(t, run("-arch", other.name, "--", "sh", "-c", "uname -m; command -v go gcc; "+pingpong))
		contains(t, "stdout", stdout, strings.TrimSuffix(other.triplet, "-linux-gnu")+"\n", "100 iters in")
		if strings.Contains(stdout, "bin/") || code != 0 {
			t.Errorf("status %d, and there are programs of the host:\n%s\n%s", code, stdout, stderr)
		}
		// From here: the program for the machine is built from a module that has it, and the sample's does not.
		stdout, stderr, code = finish(t, run("-arch", other.name, "--", "go", "test", "-p", "2", "../../internal/abi", "../../internal/roce"))
		contains(t, "stdout", stdout+stderr, "/internal/abi\t", "/internal/roce\t", "ok  \t")
		if code != 0 {
			t.Errorf("status %d", code)
		}
	})

	t.Run("native in a machine", func(t *testing.T) {
		t.Parallel()
		self := run().Path
		stdout, stderr, code := finish(t, run("-bare", "--", "sh", "-c", `
			ls /sys/class/infiniband; ip rule > /tmp/before
			`+self+` -native -- sh -c 'ibv_devices; echo $RINGSIDE_SOFT_ROCE; ip -br link; `+pingpong+` exit 5'
			echo status $?
			ls /sys/class/infiniband /sys/class/net; ip rule | diff /tmp/before - && echo rules are back`))
		before, after, _ := strings.Cut(stdout, "status 5")
		contains(t, "with the links", before, "rxe0", "rxe1", "siw0", "siw1", "native\n", "ringside1", "ringside3", "100 iters in")
		contains(t, "later", after, "rules are back", "lo\n")
		if strings.Contains(after, "rxe") || strings.Contains(after, "ringside") || code != 0 {
			t.Errorf("status %d, left:\n%s\n%s", code, after, stderr)
		}
	})

	t.Run("death of the machine", func(t *testing.T) {
		t.Parallel()
		_, stderr, code := finish(t, run("--", "sh", "-c", "echo c > /proc/sysrq-trigger; sleep 100"))
		contains(t, "stderr", stderr, "the machine ended before the command did", "Kernel panic")
		if code != failure {
			t.Errorf("status %d", code)
		}
	})

	t.Run("timeout", func(t *testing.T) {
		t.Parallel()
		_, stderr, code := finish(t, run("-timeout", "20s", "--", "sleep", "1000"))
		contains(t, "stderr", stderr, "20s (-timeout)")
		if code != failure {
			t.Errorf("status %d", code)
		}
	})

	t.Run("signals", func(t *testing.T) {
		t.Parallel()
		cmd := run("--", "sh", "-c", "trap 'echo got it; exit 3' TERM; echo up; while :; do sleep 0.1; done")
		cmd.Stdout = &signalWhenUp{cmd: cmd}
		cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code != 3 {
			t.Errorf("the command's own status after SIGTERM: %d", code)
		}
		cmd = run("--", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done")
		cmd.Stdout = &signalWhenUp{cmd: cmd, times: 2}
		cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code != failure {
			t.Errorf("status %d of a command that does not end", code)
		}
	})
}

// What kills this program kills the machine.
func TestMachineDiesWithUs(t *testing.T) {
	run := vm(t)
	cmd := run("--", "sh", "-c", "echo up; sleep 1000")
	up := make(chan struct{})
	cmd.Stdout = writerFunc(func(p []byte) (int, error) { close(up); return len(p), nil })
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-up
	machines, err := children(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	if len(machines) != 1 {
		t.Errorf("%d child processes: %v", len(machines), machines)
	}
	for _, pid := range machines {
		testutil.Eventually(t, "the machine is gone", func() bool { return unix.Kill(pid, 0) != nil })
	}
	for _, e := range cmd.Env { // this once it could not clean up
		if tmp, ok := strings.CutPrefix(e, "TMPDIR="); ok {
			entries, err := filepath.Glob(tmp + "/*")
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range entries {
				os.RemoveAll(name)
			}
		}
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A signalWhenUp sends its command SIGTERM, once or as often as times says, when that has printed something.
type signalWhenUp struct {
	cmd   *exec.Cmd
	times int
	done  bool
}

func (s *signalWhenUp) Write(p []byte) (int, error) {
	if !s.done {
		s.done = true
		for range max(s.times, 1) {
			s.cmd.Process.Signal(syscall.SIGTERM)
			time.Sleep(200 * time.Millisecond) // two at once are one
		}
	}
	return len(p), nil
}

// sampleModule returns the folder of a module whose packages a and b need devices, and each other.
func sampleModule(t *testing.T) string {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":           "module sample\n\ngo 1.26\n",
		"a/a_test.go":      sampleTest("a", "b"),
		"b/b_test.go":      sampleTest("b", "a"),
		"a/testdata/data":  "data of a",
		"b/testdata/data":  "data of b",
		"a/a.go":           "package a\n\nfunc Used() int { return 1 }\n",
		"b/b.go":           "package b\n\nfunc Used() int { return 1 }\n",
		"fail/f_test.go":   "package fail\n\nimport \"testing\"\n\nfunc TestFails(t *testing.T) { t.Fatal(\"as it should\") }\n",
		"nothing/empty.go": "package nothing\n",
	} {
		name = filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// sampleTest is the test of a package that meets another's in the machine, which shows that they run at the same time.
func sampleTest(name, other string) string {
	return strings.NewReplacer("NAME", name, "OTHER", other).Replace(`package NAME

import (
	"os"
	"testing"
	"time"
)

func TestMeet(t *testing.T) {
	if Used() != 1 {
		t.Fatal()
	}
	if text, err := os.ReadFile("testdata/data"); err != nil || string(text) != "data of NAME" {
		t.Fatal(string(text), err)
	}
	if _, err := os.Stat("/sys/class/infiniband/rxe0"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/run/NAME", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for range 600 {
		if _, err := os.Stat("/run/OTHER"); err == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatal("OTHER is not there")
}
`)
}
