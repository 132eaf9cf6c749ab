package main

import (
	"bufio"
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The program sees the devices, and ends as it would by itself.
func TestEmulate(t *testing.T) {
	for _, c := range []struct {
		script string
		stdout string
		want   syscall.WaitStatus
	}{
		{"ls /dev/infiniband /sys/class/infiniband; exit 7", "/dev/infiniband:\nrdma_cm\nuverbs0\nuverbs1\n\n/sys/class/infiniband:\nmlx5_0\nmlx5_1\n", 7 << 8},
		{"cat /sys/class/infiniband/mlx5_1/node_type", "1: CA\n", 0},
		{"test -c /dev/infiniband/uverbs0 && test -r /dev/infiniband/uverbs0 && test -w /dev/infiniband/uverbs0", "", 0},
		{"kill -TERM $$", "", syscall.WaitStatus(unix.SIGTERM)},
		{"kill -SEGV $$", "", syscall.WaitStatus(unix.SIGSEGV)},
		{"cat", "what it is given", 0},
	} {
		cmd := command(t, "emulate", "--devices", "2", "--", "sh", "-c", c.script)
		cmd.Stdin = strings.NewReader("what it is given")
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		cmd.Run()
		if st := cmd.ProcessState.Sys().(syscall.WaitStatus); st != c.want || stdout.String() != c.stdout || stderr.Len() > 0 {
			t.Errorf("%s: ended with %#x, want %#x, and printed %q, %q", c.script, st, c.want, stdout.String(), stderr.String())
		}
	}
}

// The program has the descriptors that it would have by itself, under their numbers, and no others.
func TestEmulateFiles(t *testing.T) {
	const list = `exec 3<"$0" 7>&1 9</dev/null; exec "$@" sh -c 'cat <&3; for fd in /proc/$$/fd/*; do echo ${fd##*/}; done'`
	file := filepath.Join(t.TempDir(), "three")
	if err := os.WriteFile(file, []byte("the third\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	run := func(with ...string) string {
		t.Helper()
		cmd := exec.Command("sh", append([]string{"-c", list, file}, with...)...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v: %s", err, stderr.String())
		}
		return string(out)
	}
	want := run()
	if !strings.HasPrefix(want, "the third\n0\n") || !strings.Contains(want, "\n7\n9\n") {
		t.Fatalf("by itself it prints %q", want)
	}
	if got := run(command(t, "emulate").Path, "emulate", "--"); got != want {
		t.Errorf("it prints %q, by itself %q", got, want)
	}
}

func TestEmulateMistakes(t *testing.T) {
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("neither a script nor a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args   string
		status int
		says   string
	}{
		{"", 2, "no program given"},
		{"--devices 0 -- true", 2, "--devices"},
		{"--devices 33 -- true", 1, "1 to 32"},
		{"--loss 100% -- true", 2, "less than 100%"},
		{"--loss much -- true", 2, "--loss"},
		{"--trace " + dir + " -- true", 1, "trace"},
		{"-- " + dir + "/none", 127, "no such file"},
		{"-- no-such-program", 127, "no-such-program"},
		{"-- " + text, 126, "exec format error"},
	} {
		cmd := command(t, append([]string{"emulate"}, strings.Fields(c.args)...)...)
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != c.status || !strings.Contains(string(out), c.says) {
			t.Errorf("emulate %s: %v, %q; want %d, and %q", c.args, err, out, c.status, c.says)
		}
	}
}

// There can be one.
func TestEmulateInEmulate(t *testing.T) {
	exe := command(t).Path
	out, err := command(t, "emulate", "--", exe, "emulate", "--", "true").CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), "supervises this process already") {
		t.Errorf("%v, %q", err, out)
	}
}

// What the flags ask for is done.
func TestEmulateFlags(t *testing.T) {
	run := func(flags ...string) (stdout string, err error) {
		t.Helper()
		cmd := command(t, append(append([]string{"emulate"}, flags...), "--", command(t).Path, "perf", "send", "lat", "--spawn", "--iters", "20",
			"--poll", "event", "--device", "mlx5_0", "--gid-index", "1")...) // over UDP
		defer time.AfterFunc(time.Minute, func() { cmd.Process.Kill() }).Stop()
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	trace := filepath.Join(t.TempDir(), "trace")
	if out, err := run("--numbered", "--trace", trace); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"EMU DB uar=", "EMU WQE qpn=0x100 idx=0 ", "EMU CQE pi=0 ", "EMU RECV qpn=0x100 idx=0 00000"} {
		if !strings.Contains("\n"+string(b), "\n"+want) {
			t.Errorf("the trace of %d bytes has no line %q", len(b), want)
		}
	}
	if out, err := run("--loss", "99%"); err == nil || !strings.Contains(out, "send lat, 8 bytes") {
		t.Errorf("with nearly everything lost: %v, %s", err, out)
	}
	if out, err := run("--loss", "1%"); err != nil {
		t.Errorf("with little loss: %v, %s", err, out)
	}
}

// Signals to emulate are the program's.
func TestEmulateSignals(t *testing.T) {
	cmd := command(t, "emulate", "--", "sh", "-c", "trap 'exit 9' USR1; echo ready; while :; do sleep 0.01; done")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer time.AfterFunc(time.Minute, func() { cmd.Process.Kill() }).Stop()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatal(line, err)
	}
	cmd.Process.Signal(unix.SIGUSR1)
	cmd.Wait()
	if n := cmd.ProcessState.ExitCode(); n != 9 {
		t.Errorf("the program has ended with %d", n)
	}
}

// What is to be ignored, as below nohup, is ignored by the program and by emulate itself.
func TestEmulateIgnores(t *testing.T) {
	const script = `trap "" HUP INT; exec "$0" emulate -- sh -c 'kill -HUP $PPID; kill -INT $PPID; sleep 0.1; grep SigIgn /proc/$$/status'`
	out, err := exec.Command("sh", "-c", script, command(t).Path).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	_, mask, _ := strings.Cut(strings.TrimSpace(string(out)), "\t")
	if n, err := strconv.ParseUint(mask, 16, 64); err != nil || n&3 != 1<<(unix.SIGHUP-1)|1<<(unix.SIGINT-1) {
		t.Errorf("it ignores %q", out)
	}
}

// Killed, it takes the program along.
func TestEmulateKilled(t *testing.T) {
	cmd := command(t, "emulate", "--", "sh", "-c", "echo ready; exec sleep 1000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out)
	if line, err := r.ReadString('\n'); line != "ready\n" {
		t.Fatal(line, err)
	}
	cmd.Process.Kill()
	if line, err := r.ReadString('\n'); err == nil { // its end of the pipe closes with it
		t.Errorf("it says %q", line)
	}
	cmd.Wait()
}
