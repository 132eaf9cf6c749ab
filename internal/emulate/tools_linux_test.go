package emulate

import (
	"fmt"
	"net"
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

// Others' programs, as their packages install them: rdma-core's (ibverbs-utils, with libmlx5 of ibverbs-providers) and perftest.

// patience is how long a program may take. It is longer than testutil's, since some of them spin where the devices need the processor.
const patience = 5 * testutil.Patience

// run runs a script of the shell with devices, and returns what it has printed. It is killed after patience.
func run(t *testing.T, cfg Config, script string) string {
	t.Helper()
	return runWith(t, cfg, script, func(*Session) {})
}

// runWith is run, which shows the session to a function when it has begun.
func runWith(t *testing.T, cfg Config, script string, begun func(*Session)) string {
	t.Helper()
	out, err := try(t, cfg, script, begun)
	if err != nil {
		t.Error(err)
	}
	return out
}

// try is runWith without judging how the script has ended: any status but 0 is an error.
func try(t *testing.T, cfg Config, script string, begun func(*Session)) (string, error) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	cfg.Log = t.Output()
	s, err := Start(cfg, "/bin/sh", []string{"sh", "-c", "exec >'" + out + "' 2>&1 </dev/null; " + script})
	if err != nil {
		t.Fatal(err)
	}
	pid := s.process.PID
	late := time.AfterFunc(patience, func() {
		t.Errorf("not over after %v", patience)
		killTree(pid)
	})
	begun(s)
	st, err := s.Wait()
	late.Stop()
	b, _ := os.ReadFile(out)
	if err != nil || st != 0 {
		err = fmt.Errorf("%s\nended with %#x, %v, and printed\n%s", script, st, err, b)
	}
	return string(b), err
}

// killTree kills a process and those below it.
func killTree(pid int) {
	unix.Kill(pid, unix.SIGSTOP) // it starts no others
	children, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/task/" + strconv.Itoa(pid) + "/children")
	unix.Kill(pid, unix.SIGKILL)
	for _, c := range strings.Fields(string(children)) {
		if n, err := strconv.Atoi(c); err == nil {
			killTree(n)
		}
	}
}

// need skips the test without a program.
func need(t *testing.T, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		testutil.Skip(t, err.Error())
	}
}

// freePort is a TCP port that nobody listens on.
func freePort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// between runs a program as a server on the first device and a client on the second. Its client ends at once while the server does
// not listen yet.
func between(t *testing.T, command string) string {
	t.Helper()
	return betweenOn(t, Config{Devices: 2}, command)
}

// betweenOn is between on devices of a kind, two at least.
func betweenOn(t *testing.T, cfg Config, command string) string {
	t.Helper()
	return run(t, cfg, command+` -d mlx5_0 >/dev/null & server=$!
		for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
			kill -0 $server || exit 3
			sleep 0.2
			if `+command+` -d mlx5_1 127.0.0.1; then wait $server; exit; fi
		done
		kill $server; exit 4`)
}

func TestDevinfo(t *testing.T) {
	need(t, "ibv_devinfo")
	out := run(t, Config{Devices: 2, Numbered: true}, "ibv_devices && ibv_devinfo -v")
	for _, want := range []string{"mlx5_0          \t0002c90300000001", "hca_id:\tmlx5_1", "fw_ver:\t\t\t\t22.31.1014", "PORT_ACTIVE (4)",
		"link_layer:\t\tEthernet", "GID[  1]:", "RoCE v2", "atomic_cap:\t\t\tATOMIC_HCA (1)"} {
		if !strings.Contains(out, want) {
			t.Errorf("there is no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, "ailed") {
		t.Errorf("it complains:\n%s", out)
	}
}

// On InfiniBand nobody needs a GID: ports have LIDs.
func TestInfiniBand(t *testing.T) {
	two := Config{Devices: 2, InfiniBand: true}
	t.Run("devinfo", func(t *testing.T) {
		need(t, "ibv_devinfo")
		out := run(t, two, "ibv_devinfo -v -d mlx5_1")
		for _, want := range []string{"link_layer:\t\tInfiniBand", "port_lid:\t\t2", "sm_lid:\t\t\t1", "GID[  0]:"} {
			if !strings.Contains(out, want) {
				t.Errorf("there is no %q in\n%s", want, out)
			}
		}
	})
	for command, want := range map[string]string{
		"ibv_rc_pingpong -n 20 -s 1000": "20 iters in", "ibv_uc_pingpong -n 20 -e": "20 iters in", "ibv_ud_pingpong -n 20 -s 1000": "20 iters in",
		"ibv_srq_pingpong -n 20": "20 iters in", "ib_send_lat -n 20 -F": "t_avg", "ib_send_lat -n 20 -F -c UD": "t_avg", "ib_write_bw -n 50 -F": "BW average",
	} {
		t.Run(command, func(t *testing.T) {
			need(t, strings.Fields(command)[0])
			if out := betweenOn(t, two, command+" -p "+freePort(t)); !strings.Contains(out, want) || !strings.Contains(out, "LID") {
				t.Errorf("it prints\n%s", out)
			}
		})
	}
}

func TestPingpong(t *testing.T) {
	for _, typ := range []string{"rc", "uc", "ud", "srq"} {
		for _, mode := range []string{"", " -e"} {
			t.Run(typ+mode, func(t *testing.T) {
				program := "ibv_" + typ + "_pingpong"
				need(t, program)
				out := between(t, program+mode+" -g 0 -n 20 -s 1000 -p "+freePort(t))
				if !strings.Contains(out, "20 iters in") {
					t.Errorf("it prints\n%s", out)
				}
			})
		}
	}
}

// Packets are lost as Loss says: few of them are sent again, and if it is nearly all, a connection gives up. Both programs have the same
// device, since of several on a host only one is found at an address.
func TestLoss(t *testing.T) {
	need(t, "ibv_rc_pingpong")
	both := func(loss float64, gone, then string) string {
		t.Helper()
		command := "ibv_rc_pingpong -e -g 1 -n 30 -s 8000 -p " + freePort(t)
		return run(t, Config{Loss: loss}, command+` >/dev/null & server=$!
			for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
				kill -0 $server || exit `+gone+`
				sleep 0.2
				`+command+` 127.0.0.1 && break
			done; `+then)
	}
	// The client goes when it has all; if the server hears nothing of that, it says that nobody answers.
	if out := both(0.03, "3", "kill $server 2>/dev/null; exit 0"); !strings.Contains(out, "30 iters in") {
		t.Errorf("with little loss it prints\n%s", out)
	}
	if out := both(0.99, "0", "kill $server; exit 0"); !strings.Contains(out, "transport retry counter exceeded") {
		t.Errorf("with nearly everything lost it prints\n%s", out)
	}
}

// perftest's latency tests poll; with -e, the bandwidth tests sleep.
func TestPerftest(t *testing.T) {
	for _, test := range []string{
		"ib_send_lat -n 20", "ib_write_lat -n 20 -c UC", "ib_atomic_lat -n 20", "ib_send_bw -n 50 -e", "ib_read_bw -n 50 -q 3",
	} {
		t.Run(test, func(t *testing.T) {
			need(t, strings.Fields(test)[0])
			if out := between(t, test+" -F -x 0 -p "+freePort(t)); !strings.Contains(out, "BW average") && !strings.Contains(out, "t_avg") {
				t.Errorf("it prints\n%s", out)
			}
		})
	}
}
