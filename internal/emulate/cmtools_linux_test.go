package emulate

import (
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Programs that connect by rdma_cm: those of librdmacm (rdmacm-utils), and perftest with -R.

// cmAddress is where they listen. Unlike the kernel's, the emulated connection manager takes it.
const cmAddress = "127.0.0.1"

// connect runs a server and, until it succeeds, a client, which ends at once while nobody listens; then what follows.
func connect(t *testing.T, server, client, then string) string {
	t.Helper()
	need(t, strings.Fields(server)[0])
	return runAtAddress(t, Config{Devices: 2}, server+` & server=$!
		for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
			kill -0 $server || exit 3
			sleep 0.2
			if `+client+`; then
				`+then+`
				exit
			fi
		done
		kill $server; exit 4`)
}

// runAtAddress is run for what needs cmAddress. Of all devices on a host one has it at a time, and tests of other packages have it now and
// then: it tries until it has it.
func runAtAddress(t *testing.T, cfg Config, script string) string {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		var has bool
		out, err := try(t, cfg, script, func(s *Session) {
			if has = hasAddress(t, s); !has {
				killTree(s.process.PID)
			}
		})
		switch {
		case has && err == nil:
			return out
		case has:
			t.Fatal(err)
		case time.Now().After(deadline):
			t.Fatalf("another process has %v", cmAddress)
		}
		t.Logf("another process has the address: again")
		time.Sleep(100 * time.Millisecond)
	}
}

// hasAddress takes cmAddress for the first device of the session, for as long as that lasts. Programs do not say it alike that they lack it:
// who listens at all addresses leaves it out, and who connects there meets the other process.
func hasAddress(t *testing.T, s *Session) bool {
	p, err := s.devices[0].CMPort(netip.MustParseAddr(cmAddress))
	if err != nil {
		t.Error(err)
	}
	return err == nil && p.Standard()
}

const waitServer = "wait $server"

// contains says which of a program's lines are missing.
func contains(t *testing.T, out string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("there is no %q in\n%.4000s", w, out)
		}
	}
}

func TestRping(t *testing.T) {
	for _, options := range []string{"-C 10", "-C 20 -S 9000", "-C 3 -S 65000"} {
		t.Run(options, func(t *testing.T) {
			common := " -v -V -a " + cmAddress + " -p " + freePort(t) + " " + options
			out := connect(t, "rping -s"+common, "rping -c"+common, waitServer)
			contains(t, out, "ping data: rdma-ping-0: ABCDEFGHIJKLMNOPQRSTUVWXYZ", "server ping data: rdma-ping-2: CDEFGHIJKL")
		})
	}
}

// A server that has several clients at a time. They come one after the other: of requests at the same moment, rping before rdma-core 57
// accepts one twice.
func TestRpingPersistent(t *testing.T) {
	common := " -a " + cmAddress + " -p " + freePort(t)
	client := "rping -c -V" + common
	log := filepath.Join(t.TempDir(), "client")
	out := connect(t, "rping -s -P"+common, client+" -C 10", `
		pids=
		for i in 1 2 3 4; do
			`+client+` -v >`+log+`$i & pids="$pids $!"
			while ! grep -q rdma-ping-3 `+log+`$i; do
				kill -0 $! || { kill $server $pids; exit 5; }
				sleep 0.1
			done
		done
		`+client+` -C 10 || { kill $server $pids; exit 6; }
		kill $pids; wait $pids
		`+client+` -C 10 || { kill $server; exit 7; }
		kill $server; echo all`)
	contains(t, out, "all")
}

func TestUcmatose(t *testing.T) {
	for _, options := range []string{"-c 1", "-c 5 -C 20 -S 4096", "-c 2 -C 3 -S 100000", "-c 3 -C 0"} {
		t.Run(options, func(t *testing.T) {
			common := " -b " + cmAddress + " -p " + freePort(t) + " " + options
			out := connect(t, "ucmatose"+common, "ucmatose -s "+cmAddress+common, waitServer)
			contains(t, out, "return status 0")
		})
	}
}

// librdmacm's synchronous calls, with a channel for each ID.
func TestRDMAClient(t *testing.T) {
	port := freePort(t)
	out := connect(t, "rdma_server -s "+cmAddress+" -p "+port, "rdma_client -s "+cmAddress+" -p "+port, waitServer)
	contains(t, out, "rdma_server: end 0", "rdma_client: end 0")
}

// Datagrams.
func TestUdaddy(t *testing.T) {
	common := " -c 3 -C 7 -b " + cmAddress
	out := connect(t, "udaddy"+common, "udaddy -s "+cmAddress+common, waitServer)
	contains(t, out, "data transfers complete", "return status 0")
}

// librdmacm's sockets, which wait for events and completions by poll.
func TestRstream(t *testing.T) {
	common := "rstream -S 4096 -C 100 -T v -p " + freePort(t)
	out := connect(t, common+" -b "+cmAddress, common+" -s "+cmAddress, waitServer)
	contains(t, out, "custom    4k      100     1       800k")
}

func TestPerftestByCM(t *testing.T) {
	for _, test := range []string{"ib_send_lat -n 20", "ib_write_bw -n 50 -q 2"} {
		t.Run(test, func(t *testing.T) {
			common := test + " -R -F -d mlx5_0 -p " + freePort(t)
			out := connect(t, common, common+" "+cmAddress, waitServer)
			if !strings.Contains(out, "BW average") && !strings.Contains(out, "t_avg") {
				t.Errorf("it prints\n%s", out)
			}
		})
	}
}

// Who is left hears that the other side was killed.
func TestRpingKilled(t *testing.T) {
	need(t, "rping")
	for victim, left := range map[string]string{"server": "client", "client": "server"} {
		t.Run(victim, func(t *testing.T) {
			common := " -a " + cmAddress + " -p " + freePort(t)
			log := filepath.Join(t.TempDir(), "client")
			out := runAtAddress(t, Config{}, "rping -s"+common+` & server=$!
				for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
					rping -c -v`+common+` >`+log+` & client=$!
					while ! grep -q rdma-ping-3 `+log+` && kill -0 $client; do sleep 0.1; done
					grep -q rdma-ping-3 `+log+` && break
					kill -0 $server || exit 3
				done
				kill -9 $`+victim+`
				wait $`+left+`
				echo over`)
			contains(t, out, "over", left+" DISCONNECT EVENT")
		})
	}
}
