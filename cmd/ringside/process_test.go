package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/perf"
	"github.com/ringside-rdma/ringside/internal/testutil"
)

// command is this program as a process of its own.
func command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exec.Command(exe, args...)
}

// startServer starts `perf server` as a process and returns where it listens.
func startServer(t *testing.T, args ...string) (*exec.Cmd, string) {
	t.Helper()
	cmd := command(t, append([]string{"perf", "server", "--listen", "127.0.0.1:0"}, args...)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	addr, ok := strings.CutPrefix(line, perf.ListeningPrefix)
	if err != nil || !ok || !strings.Contains(line, "soft0") {
		t.Fatalf("the server says %q, %v", line, err)
	}
	addr, _, _ = strings.Cut(addr, " ")
	return cmd, addr
}

// TestInterrupt sends a real interrupt to a run with --spawn: what was measured is printed.
func TestInterrupt(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a process cannot be sent an interrupt there")
	}
	for delay := 200 * time.Millisecond; ; delay *= 2 {
		cmd := command(t, "perf", "send", "lat", "--spawn", "--duration", "1h", "-o", "json")
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(delay)
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		var r struct {
			Interrupted bool
			Results     []struct {
				Messages uint64
				Partial  bool
			}
		}
		err := json.Unmarshal(stdout.Bytes(), &r)
		if (err != nil || len(r.Results) == 0) && delay < testutil.Patience {
			continue // it had not begun to measure
		}
		if err != nil || cmd.ProcessState.ExitCode() != 130 || !r.Interrupted || len(r.Results) != 1 || r.Results[0].Messages == 0 || !r.Results[0].Partial {
			t.Errorf("after %v: %v, %v, stdout %s, stderr %s", delay, err, cmd.ProcessState, stdout.Bytes(), stderr.Bytes())
		}
		return
	}
}

// TestServerKilled kills the server in the middle of a test: the client ends, and says why.
func TestServerKilled(t *testing.T) {
	for _, test := range []string{"send lat", "write lat", "read lat", "send rate", "atomic rate", "rpc lat"} {
		t.Run(test, func(t *testing.T) {
			server, addr := startServer(t)
			time.AfterFunc(300*time.Millisecond, func() { _ = server.Process.Kill() })
			status, _, stderr := ringside(append(append([]string{"perf"}, strings.Fields(test)...), addr, "--duration", "1h")...)
			if status != 1 || !strings.Contains(stderr, perf.ErrPeerGone.Error()) {
				t.Errorf("status %d, stderr %s", status, stderr)
			}
		})
	}
}

// TestServerServesOn runs two clients against one server that is not a child.
func TestServerServesOn(t *testing.T) {
	_, addr := startServer(t)
	for _, a := range []string{"perf read lat --iters 100", "perf write rate --iters 100 --qps 3"} {
		if status, stdout, stderr := ringside(append(strings.Fields(a), addr)...); status != 0 || !strings.Contains(stdout, "path    shm") {
			t.Errorf("%s: status %d, stdout %s, stderr %s", a, status, stdout, stderr)
		}
	}
}

// TestListenFlag: `perf --listen` is `perf server`.
func TestListenFlag(t *testing.T) {
	cmd := command(t, "perf", "--listen", "127.0.0.1:0", "--child")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stdin.Close()
	if err := cmd.Wait(); err != nil || !strings.HasPrefix(out.String(), perf.ListeningPrefix) {
		t.Errorf("%v: %s", err, out.String())
	}
}

func TestPinned(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("pinning is for Linux")
	}
	cpu := strconv.Itoa(perf.AnyCPU())
	for _, test := range []string{"read lat", "rpc lat"} {
		// Both on one processor is slow, but there may be only one.
		a := append(append([]string{"perf"}, strings.Fields(test)...), "--spawn", "--iters", "5", "--warmup", "1", "--cpu", cpu, "--server-cpu", cpu, "-o", "json")
		status, stdout, stderr := ringside(a...)
		if status != 0 || strings.Count(stdout, `"poll_cpu": `+cpu) != 2 {
			t.Errorf("%s: status %d, stdout %s, stderr %s", test, status, stdout, stderr)
		}
		a[len(a)-5], a[len(a)-3] = "4000", "4000"
		if status, _, stderr := ringside(a...); status != 1 || !strings.Contains(stderr, "processor 4000") {
			t.Errorf("%s: no such processor: status %d, stderr %s", test, status, stderr)
		}
	}
}

// TestProgress draws to a buffer in place of a terminal.
func TestProgress(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b, perf.Spec{Op: perf.OpWrite, Kind: perf.Lat})
	start := p.start
	p.set(perf.Progress{Step: 2, Steps: 3, Size: 64, Phase: "measuring"})
	p.draw(start.Add(progressAfter / 2))
	p.mu.Lock()
	early := b.String()
	p.mu.Unlock()
	if early != "" {
		t.Errorf("a short run shows %q", early)
	}
	p.draw(start.Add(5 * time.Second))
	p.set(perf.Progress{})
	p.close()
	s := b.String()
	if !strings.Contains(s, "write lat 2/3, 64 bytes: measuring, 5 s") || !strings.HasSuffix(s, "\r\x1b[K") {
		t.Errorf("shows %q", s)
	}
	if isTerminal(&b) {
		t.Error("a buffer is no terminal")
	}
}
