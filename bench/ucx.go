package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// ucxTest is one run of ucx_perftest between two processes over POSIX shared memory, the server on the last processor
// and the client on the first.
type ucxTest struct {
	test string // as ucx_perftest -t has it
	size int
	iter int
}

func (u ucxTest) run(*config) (values, error) {
	if _, err := exec.LookPath("ucx_perftest"); err != nil {
		return nil, fmt.Errorf("%w: ucx_perftest is not installed (Debian package ucx-utils)", errSkipped)
	}
	var err error
	for range 3 { // another process may take the port between its choice and its use
		var v values
		if v, err = u.once(); err == nil {
			return v, nil
		}
	}
	return nil, err
}

func (u ucxTest) once() (values, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	env := append(os.Environ(), "UCX_TLS=posix,self", "UCX_WARN_UNUSED_ENV_VARS=n")
	command := func(args ...string) (*exec.Cmd, *bytes.Buffer) {
		cmd := exec.CommandContext(ctx, "ucx_perftest", append(args, "-p", strconv.Itoa(port))...)
		cmd.Env = env
		out := new(bytes.Buffer)
		cmd.Stdout, cmd.Stderr = out, out
		return cmd, out
	}
	server, serverOut := command("-c", strconv.Itoa(runtime.NumCPU()-1))
	if err := server.Start(); err != nil {
		return nil, err
	}
	defer func() {
		server.Process.Kill()
		server.Wait()
	}()
	if err := waitListening(port, 5*time.Second); err != nil {
		return nil, fmt.Errorf("ucx_perftest's server: %w: %s", err, serverOut)
	}
	client, out := command("127.0.0.1", "-c", "0", "-v", "-t", u.test, "-s", strconv.Itoa(u.size),
		"-n", strconv.Itoa(u.iter), "-w", strconv.Itoa(max(100, u.iter/20)))
	if err := client.Run(); err != nil {
		return nil, fmt.Errorf("ucx_perftest -t %s: %w: %s", u.test, err, out)
	}
	return parseUCX(out.Bytes())
}

// parseUCX reads ucx_perftest's CSV, by the names in its heading:
//
//	iterations,50.0_percentile_lat,avg_lat,overall_lat,avg_bw,overall_bw,avg_mr,overall_mr
func parseUCX(out []byte) (values, error) {
	i := bytes.Index(out, []byte("iterations,"))
	if i < 0 {
		return nil, fmt.Errorf("ucx_perftest printed no heading: %q", out)
	}
	rows, err := csv.NewReader(bytes.NewReader(out[i:])).ReadAll()
	if err != nil {
		return nil, fmt.Errorf("ucx_perftest's output: %w: %q", err, out)
	}
	if len(rows) < 2 {
		return nil, fmt.Errorf("ucx_perftest printed no result: %q", out)
	}
	v := values{}
	for col, name := range rows[0] {
		x, err := strconv.ParseFloat(strings.TrimSpace(rows[len(rows)-1][col]), 64)
		if err != nil {
			return nil, fmt.Errorf("ucx_perftest's output: column %s: %w", name, err)
		}
		switch {
		case strings.HasSuffix(name, "_percentile_lat"):
			v["p50"] = x // us; of a ping-pong already halved
		case name == "overall_lat":
			v["mean"] = x
		case name == "overall_bw":
			v["bw"] = x * (1 << 20) / 1e9 // MiB/s -> GB/s
		case name == "overall_mr":
			v["rate"] = x
		}
	}
	if len(v) < 4 {
		return nil, fmt.Errorf("ucx_perftest's columns have changed: %q", rows[0])
	}
	return v, nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// waitListening waits until somebody listens on the port. It looks into /proc: a connection would be taken for the
// client's.
func waitListening(port int, patience time.Duration) error {
	want := fmt.Sprintf(":%04X ", port)
	for end := time.Now().Add(patience); time.Now().Before(end); {
		for _, name := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
			table, _ := os.ReadFile(name)
			for line := range strings.Lines(string(table)) {
				//   0: 00000000:1F90 00000000:0000 0A ...
				if f := strings.Fields(line); len(f) > 3 && f[3] == "0A" && strings.HasSuffix(f[1]+" ", want) {
					return nil
				}
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("does not listen after %v", patience)
}

func ucxVersion() string {
	out, err := exec.Command("ucx_info", "-v").Output()
	if err != nil {
		return "not installed"
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimSpace(strings.TrimPrefix(line, "# Version"))
}
