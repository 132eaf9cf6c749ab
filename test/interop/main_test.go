package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func init() {
	testutil.RegisterChild("interop", func(args []string) { os.Exit(run(context.Background(), args, os.Stdout, os.Stderr)) })
	testutil.RegisterChild("interop-main", func([]string) { main() })
}

func TestMain(m *testing.M) { testutil.Main(m) }

// patient bounds a run: an exchange takes milliseconds where the machine is emulated and others run on it, too.
func patient(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*testutil.Patience)
	t.Cleanup(cancel)
	return ctx
}

// A server that is told to end while it waits for a client ends by itself, and says so.
func TestSignalsOnSoftwareNIC(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a process cannot be sent a signal there")
	}
	for _, s := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		t.Run(s.String(), func(t *testing.T) {
			server := testutil.StartChild(t, "interop-main", "rc", "-d", "soft0", "-g", "0", "-p", strconv.Itoa(freePort(t)))
			server.Expect("  local address:")
			p, err := os.FindProcess(server.PID())
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Signal(s); err != nil {
				t.Fatal(err)
			}
			err = server.Wait()
			if e := (*exec.ExitError)(nil); !errors.As(err, &e) || e.ExitCode() != 1 || !strings.Contains(server.Output(), "interop: ") {
				t.Errorf("%v: %s", err, server.Output())
			}
		})
	}
}

func TestArgumentsThatMakeNoSense(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"", ""},
		{"rc -d soft0 -g 0 -s 0", "messages of 0 bytes"},
		{"rc -d soft0 -g 0 -m 1000", "an MTU of 1000 bytes"},
		{"rc -d soft0", "-g"},
		{"rc -d soft0 -g 0 -p 70000", "TCP port 70000"},
		{"rc -d soft0 -g 0 -i 0", "count from 1"},
		{"rc -d soft0 -g 0 -q 3", "shorthand"},
		{"ud -d soft0 -g 0 -s 1000000", "a datagram has at most"},
		{"ud -d soft0 -g 0 -m 1024", "shorthand"},
		{"uc -d nothing -g 0", "no such device"},
		{"srq -d soft0 -g 0 -q 256", "256 queue pairs"},
		{"srq -d soft0 -g 0 -q 10 -r 9", "9 receives are too few"},
		{"rc one two", "at most 1 arg"},
		{"integrity -d soft0", "-g"},
		{"integrity -d soft0 -g 0 -m 1000 127.0.0.1", "an MTU of 1000 bytes"},
		{"integrity -d soft0 -g 0 --rounds -1 127.0.0.1", "-1 rounds"},
		{"integrity -d soft0 -g 0 --rounds 2000000 127.0.0.1", "2000000 rounds"},
		{"perftest send_lat -d soft0", "-g"},
		{"perftest send_lat -d soft0 -g 0 -s 0", "messages of 0 bytes"},
		{"perftest send_lat -d soft0 -g 0 -c", "it takes 8"},
		{"perftest send_lat -d soft0 -g 0 --connection XRC", "RC, UC and UD"},
		{"perftest read_bw -d soft0 -g 0 --connection UC", "another transport service"},
		{"perftest write_bw -d soft0 -g 0 -m 1000", "an MTU of 1000 bytes"},
		{"perftest atomic_bw -d soft0 -g 0 -s 16", "such of 8"},
		{"perftest write_lat -d soft0 -g 0 -e", "there are no events"},
		{"perftest read_lat -d soft0 -g 0 -o 0", "0 READs"},
		{"perftest send_bw -d soft0 -g 0 -n 0", "0 messages"},
		{"perftest send_bw -d soft0 -g 0 -r 0", "0 receives"},
	} {
		t.Run(c.args, func(t *testing.T) {
			var out, errs strings.Builder
			code := run(t.Context(), strings.Fields(c.args), &out, &errs)
			if want := min(len(c.want), 1); code != want || !strings.Contains(errs.String(), c.want) {
				t.Errorf("exit status %d, %q; want %d with %q", code, errs.String(), want, c.want)
			}
		})
	}
}
