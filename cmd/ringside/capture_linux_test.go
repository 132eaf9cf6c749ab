package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/perf"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/testutil"
)

// A program that is run is captured from its first packet to its last, its children included, into files of a ring; the filter holds.
func TestCaptureProgram(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "trace")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := command(t, "capture", "-w", file, "-C", "100k", "-W", "2", "--opcode", "send,ack", "--",
		exe, "perf", "send", "lat", "--spawn", "--size", "256", "--iters", "500", "-o", "json")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	if !json.Valid(stdout.Bytes()) {
		t.Errorf("the program's output is %q", stdout.String())
	}
	if s := stderr.String(); strings.Count(s, "capturing soft0/") != 2 || !strings.Contains(s, " 0 lost") {
		t.Errorf("it says %q", s)
	}
	if _, err := os.Stat(file + "2"); err == nil {
		t.Error("a third file")
	}
	for _, n := range []string{"0", "1"} {
		b, err := os.ReadFile(file + n)
		if err != nil {
			t.Fatal(err)
		}
		packets := testutil.Tshark(t, b, "infiniband.bth.opcode", "frame.interface_name")
		if len(packets) < 10 {
			t.Errorf("%d packets", len(packets))
		}
		for _, p := range packets {
			if p[0] != "4" && p[0] != "17" || !strings.HasPrefix(p[1], "soft0/") || !strings.HasSuffix(p[1], "/shm") {
				t.Errorf("opcode %s at %s", p[0], p[1])
			}
		}
	}
}

// Of two running processes with two connections between them over UDP, --qp, --peer and --gid leave what they say.
func TestCaptureFilters(t *testing.T) {
	server, addr := startServer(t)
	client := command(t, "perf", "send", "rate", addr, "--path", "udp", "--qps", "2", "--poll", "event", "--depth", "8", "--size", "64", "--duration", "1h")
	if err := client.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = client.Process.Kill()
		_ = client.Wait()
	})
	pids := fmt.Sprintf("%d,%d", client.Process.Pid, server.Process.Pid)
	var near, far *observe.NIC // the client's, the server's
	testutil.Eventually(t, "both NICs' connections", func() bool {
		var stdout, stderr bytes.Buffer
		var r statsReport
		if code := run([]string{"stats", "--json", "--pid", pids}, nil, &stdout, &stderr); code != 0 {
			t.Fatalf("%d: %s", code, stderr.String())
		}
		if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
			t.Fatal(err)
		}
		near, far = nil, nil
		for _, n := range r.NICs {
			if len(n.QPs) != 2 || len(n.Ports) == 0 || n.QPs[0].PeerQPN == 0 || n.QPs[1].PeerQPN == 0 {
				continue
			}
			if n.PID == client.Process.Pid {
				near = n
			} else {
				far = n
			}
		}
		return near != nil && far != nil && near.QPs[0].Requests.Messages > 0 && near.QPs[1].Requests.Messages > 0
	})
	atNear, atFar := fmt.Sprintf("soft0/%d/udp", near.PID), fmt.Sprintf("soft0/%d/udp", far.PID)
	capture := func(flags ...string) string {
		t.Helper()
		var stdout, stderr bytes.Buffer
		if code := run(append([]string{"capture", "-c", "50", "--pid", pids}, flags...), nil, &stdout, &stderr); code != 0 {
			t.Fatalf("%q: %d, %s", flags, code, stderr.String())
		}
		return stdout.String()
	}
	// A NIC's numbers may be the other one's, too.
	both := append(slices.Clone(near.QPs), far.QPs...)
	ends := func(qpn uint32) (have []string) {
		for _, q := range both {
			if q.QPN == qpn || q.PeerQPN == qpn {
				have = append(have, fmt.Sprint(q.QPN), fmt.Sprint(q.PeerQPN))
			}
		}
		return have
	}
	var all []string
	for _, q := range both {
		all = append(all, fmt.Sprint(q.QPN))
	}
	one, other := near.QPs[0].QPN, near.QPs[1].QPN
	packet := regexp.MustCompile(`(?m)^\S+ (?:In |Out) (\S+) .* QP (\d+) `)
	for _, c := range []struct { // each filter with two values, since what is left out must be there
		flag, value  string
		places, qpns []string
	}{
		{"--qp", fmt.Sprint(one), []string{atNear, atFar}, ends(one)},
		{"--qp", fmt.Sprint(other), []string{atNear, atFar}, ends(other)},
		{"--peer", far.Ports[0].Address, []string{atNear}, all},
		{"--peer", near.Ports[0].Address, []string{atFar}, all},
		{"--gid", far.GID, []string{atFar}, all},
		{"--gid", near.GID, []string{atNear}, all},
	} {
		text := capture(c.flag, c.value)
		packets := packet.FindAllStringSubmatch(text, -1)
		if len(packets) != 50 {
			t.Errorf("%s %s: %d packets instead of 50:\n%s", c.flag, c.value, len(packets), text)
		}
		for _, p := range packets {
			if !slices.Contains(c.places, p[1]) || !slices.Contains(c.qpns, p[2]) {
				t.Errorf("%s %s: %s, want some at %v to %v only", c.flag, c.value, p[0], c.places, c.qpns)
				break
			}
		}
	}
	file := filepath.Join(t.TempDir(), "trace")
	capture("-w", file, "--qp", fmt.Sprint(one), "--gid", far.GID)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	packets := testutil.Tshark(t, b, "frame.interface_name", "infiniband.bth.destqp")
	for _, p := range packets {
		qpn, err := strconv.ParseUint(p[1], 0, 32)
		if err != nil || p[0] != atFar || !slices.Contains(ends(one), fmt.Sprint(qpn)) {
			t.Fatalf("the file has a packet at %s to %s", p[0], p[1])
		}
	}
	if len(packets) != 50 {
		t.Errorf("the file has %d packets", len(packets))
	}
}

// SIGTERM goes on to the program, and its last packets are captured.
func TestCaptureProgramTerminated(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := command(t, "capture", "-w", filepath.Join(t.TempDir(), "trace"), "--", exe, "perf", "server", "--listen", "127.0.0.1:0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // so that a failure leaves nothing
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	defer time.AfterFunc(testutil.Patience, kill).Stop()
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, perf.ListeningPrefix) {
		kill()
		t.Errorf("the server says %q, %v", line, err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	err = cmd.Wait()
	if s := stderr.String(); cmd.ProcessState.ExitCode() != 1 || !strings.Contains(s, " packets captured") || !strings.Contains(s, "signal: terminated") {
		t.Errorf("%v: it says %q", err, s)
	}
}

// What a running process does can be seen from outside.
func TestStatsOfServer(t *testing.T) {
	server, _ := startServer(t)
	pid := server.Process.Pid
	var r statsReport
	var stdout, stderr bytes.Buffer
	testutil.Eventually(t, "the server's NIC", func() bool {
		stdout.Reset()
		if code := run([]string{"stats", "--json"}, nil, &stdout, &stderr); code != 0 {
			t.Fatalf("%d: %s", code, stderr.String())
		}
		if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
			t.Fatal(err)
		}
		for _, n := range r.NICs {
			if n.PID == pid {
				return n.Device == "soft0" && n.Program != ""
			}
		}
		return false
	})
	stdout.Reset()
	if code := run([]string{"stats", "--pid", "1"}, nil, &stdout, &stderr); code != 0 || !strings.Contains(stdout.String(), "no software NICs") {
		t.Errorf("of another process: %d, %q", code, stdout.String())
	}
}

func TestCaptureMistakes(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"-W 5", "needs -C"},
		{"-C 5k", "needs -w"},
		{"-w - -C 5k", "needs -w"},
		{"-w x -C 5x", "number of bytes"},
		{"--snaplen 3", "BTH"},
		{"--buffer-size 2G", "1G"},
		{"--qp 0x1000000", "24 bits"},
		{"--peer nobody", "nobody"},
		{"--opcode sned", "sned"},
		{"--gid 10.0.0.1", "want a GID"},
		{"program", "comes after --"},
	} {
		var stderr bytes.Buffer
		if code := run(append([]string{"capture"}, strings.Fields(c.args)...), nil, &bytes.Buffer{}, &stderr); code != 2 || !strings.Contains(stderr.String(), c.want) {
			t.Errorf("%s: %d, %q, want %q", c.args, code, stderr.String(), c.want)
		}
	}
	var stderr bytes.Buffer
	if code := run([]string{"capture", "--", "/no/such/program"}, nil, &bytes.Buffer{}, &stderr); code != 1 || !strings.Contains(stderr.String(), "/no/such/program") {
		t.Errorf("%d, %q", code, stderr.String())
	}
}
