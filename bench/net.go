package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The comparison over a network: servers in a network namespace of their own, clients in this one, joined by a pair of virtual
// Ethernet devices.
type netNames struct {
	space, devA, devB        string // the servers' namespace, and the devices of the clients' and of the servers'
	client, server, stranger string // addresses; the stranger's is another one of the clients' namespace
}

// Names begin with these, and go on with the process's id: others may do the same, and what one that was killed has left can be told from
// what another needs. The kernel allows 15 bytes for the name of a device.
const (
	netSpacePrefix = "ringside-bench-"
	netDevPrefix   = "rsbench"
)

// netService is the port where ringside perf and ucx_perftest listen.
const netService = 18599

// network is the one that netSetUp has made.
var network netNames

// namesFor are those of a process, with addresses of a subnet that none of the host's are of.
func namesFor(pid int, taken []netip.Prefix) (netNames, error) {
	for i := range 256 {
		subnet := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 98, byte(pid + i), 0}), 24)
		if slices.ContainsFunc(taken, subnet.Overlaps) {
			continue
		}
		addr := func(n byte) string { a := subnet.Addr().As4(); a[3] = n; return netip.AddrFrom4(a).String() }
		dev := netDevPrefix + strconv.Itoa(pid)
		return netNames{netSpacePrefix + strconv.Itoa(pid), dev + "a", dev + "b", addr(1), addr(2), addr(3)}, nil
	}
	return netNames{}, errors.New("all of 10.98.0.0/16 is in use on this host")
}

// ownerOf returns the process that a namespace or a device was named for.
func ownerOf(name string) (pid int, ok bool) {
	s, isSpace := strings.CutPrefix(name, netSpacePrefix)
	if !isSpace {
		if s, ok = strings.CutPrefix(name, netDevPrefix); !ok {
			return 0, false
		}
		if s, ok = strings.CutSuffix(s, "a"); !ok {
			return 0, false
		}
	}
	pid, err := strconv.Atoi(s)
	return pid, err == nil && pid > 0
}

// netRemove takes a process's network away. Deleting one device deletes its peer, also if a server still runs in the namespace.
func netRemove(pid int) {
	exec.Command("ip", "link", "delete", netDevPrefix+strconv.Itoa(pid)+"a").Run()
	exec.Command("ip", "netns", "delete", netSpacePrefix+strconv.Itoa(pid)).Run()
}

// netCleanUp takes away what processes that have ended have left.
func netCleanUp() {
	var names []string
	if devs, err := net.Interfaces(); err == nil {
		for _, d := range devs {
			names = append(names, d.Name)
		}
	}
	spaces, _ := os.ReadDir("/var/run/netns") // of iproute2; missing: there are none
	for _, s := range spaces {
		names = append(names, s.Name())
	}
	for _, name := range names {
		if pid, ok := ownerOf(name); ok && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			netRemove(pid)
		}
	}
}

// hostSubnets are those of this namespace's addresses.
func hostSubnets() ([]netip.Prefix, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var all []netip.Prefix
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			all = append(all, p)
		}
	}
	return all, nil
}

func netMain(args []string) error {
	var c config
	fs := flag.NewFlagSet("net", flag.ExitOnError)
	fs.StringVar(&c.ringside, "ringside", "bin/ringside", "the ringside command")
	mtu := fs.Int("mtu", 1500, "of the network devices")
	if err := c.parse(fs, 7, args); err != nil {
		return err
	}
	remove, err := netSetUp(*mtu)
	if err != nil {
		return err
	}
	defer remove()
	defer stopAll()
	serverSpace = network.space
	os.Setenv(listenEnv, network.server)
	os.Setenv("RINGSIDE_PATH", "udp")

	begin := time.Now()
	host := hostConditions(&c)
	host.set("network", fmt.Sprintf("two namespaces, joined by veth devices with an MTU of %d", *mtu))
	r := measure(&c, netMeasurements(&c))
	host.set("duration", time.Since(begin).Round(time.Second).String())
	if err := c.publish(netPart, netReport(&c, host, r)); err != nil {
		return err
	}
	return r.err()
}

// netSetUp makes the network, and returns what takes it away.
func netSetUp(mtu int) (remove func(), err error) {
	netCleanUp()
	taken, err := hostSubnets()
	if err != nil {
		return nil, err
	}
	if network, err = namesFor(os.Getpid(), taken); err != nil {
		return nil, err
	}
	n := network
	remove = func() { netRemove(os.Getpid()) }
	remove() // of another process that had the same id
	for _, line := range []string{
		"netns add " + n.space,
		"link add " + n.devA + " type veth peer name " + n.devB + " netns " + n.space,
		"address add " + n.client + "/24 dev " + n.devA,
		"address add " + n.stranger + "/24 dev " + n.devA,
		"link set " + n.devA + " mtu " + strconv.Itoa(mtu) + " up",
		"-n " + n.space + " address add " + n.server + "/24 dev " + n.devB,
		"-n " + n.space + " link set " + n.devB + " mtu " + strconv.Itoa(mtu) + " up",
		"-n " + n.space + " link set lo up",
	} {
		if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			remove()
			return nil, fmt.Errorf("ip %s: %w: %s (this takes root)", line, err, bytes.TrimSpace(out))
		}
	}
	return remove, nil
}

// netMeasurements are all of them, in the order of a round.
func netMeasurements(c *config) []measurement {
	var all []measurement
	ucx := func(test string, size, full int) {
		all = append(all, measurement{ucxName(test, size), netUCX{test, size, c.scale(full, full/20)}.run})
	}
	perf := func(name, op, kind string, size, full int, path, faults string) {
		all = append(all, measurement{name, netPerf{op, kind, size, c.scale(full, full/20), path, faults}.run})
	}
	ours := func(op, kind string, size, full int) {
		perf(perfName(op, kind, size), op, kind, size, full, "udp", "")
		perf(overTCP(op, kind, size), op, kind, size, full, "tcp", "")
	}
	ucx("tag_lat", 64, 100_000)
	ours("send", "lat", 64, 100_000)
	all = append(all, measurement{bareName, bare{client: network.client, server: network.server, iter: c.scale(100_000, 5_000)}.run})
	ucx("tag_bw", 64, 1_000_000)
	ours("send", "rate", 64, 2_000_000)
	ucx("ucp_put_bw", mib, 2_000)
	ours("write", "bw", mib, 4_000)
	perf(lossyWrite, "write", "bw", mib, 4_000, "udp", "loss=1%")
	ours("read", "bw", mib, 4_000)
	perf(lossyRead, "read", "bw", mib, 4_000, "udp", "loss=1%")
	perf(lossySend, "send", "rate", 64, 2_000_000, "udp", "loss=1%")
	for _, f := range floods {
		all = append(all, measurement{f.name(), netFlood{f.kind, c.scale(6_000_000, 300_000)}.run})
	}
	for _, e := range netEchoes {
		all = append(all, e.measurement(20))
	}
	return all
}

// overTCP is what perfName is, of queue pairs that are connected by TCP.
func overTCP(op, kind string, size int) string { return perfName(op, kind, size) + ", tcp" }

const (
	lossyWrite = "ringside write bw 1 MiB, 1% lost"
	lossyRead  = "ringside read bw 1 MiB, 1% lost"
	lossySend  = "ringside send rate 64 B, 1% lost"
)

var netEchoes = []echoCase{
	{"grpc tcp x1", "grpc-go, TCP", echoArgs{Network: "tcp"}, 20_000},
	{"rpc adaptive x1", "ringside, Adaptive", echoArgs{API: "blocking", Poll: "adaptive"}, 100_000},
	{"rpc event x1", "ringside, Event", echoArgs{API: "blocking", Poll: "event"}, 30_000},
	{"grpc tcp x64", "grpc-go, TCP", echoArgs{Network: "tcp", InFlight: 64}, 100_000},
	{"rpc async x64", "ringside, Adaptive, one goroutine with a Queue, Batch 16", echoArgs{API: "async", Poll: "adaptive", InFlight: 64}, 1_000_000},
	{"rpc blocking x64", "ringside, Adaptive, 64 goroutines", echoArgs{API: "blocking", Poll: "adaptive", InFlight: 64}, 300_000},
}

// netPerf is one run of `ringside perf` between the namespaces.
type netPerf struct {
	op, kind   string
	size, iter int
	path       string // udp or tcp
	faults     string // RINGSIDE_SOFT_FAULTS of both
}

func (p netPerf) run(c *config) (values, error) {
	out, cpu, err := p.beside(c, nil)
	if err != nil {
		return nil, err
	}
	return p.values(out, cpu)
}

// values reads what a client has written. cpu is the time of both processes from their start to their end: the warm-up's, too.
func (p netPerf) values(out []byte, cpu time.Duration) (values, error) {
	r, err := readPerf(out, p.path)
	if err != nil {
		return nil, err
	}
	v := r.values()
	if p.kind == "bw" {
		v["cpu"] = float64(cpu.Nanoseconds()) / float64(r.Warmup+r.Messages) / float64(p.size) // ns a byte
	}
	return v, nil
}

// netUCX is one run of ucx_perftest over TCP between the namespaces.
type netUCX struct {
	test       string
	size, iter int
}

func (u netUCX) run(*config) (values, error) {
	if _, err := exec.LookPath("ucx_perftest"); err != nil {
		return nil, fmt.Errorf("%w: ucx_perftest is not installed (Debian package ucx-utils)", errSkipped)
	}
	port, warmup := strconv.Itoa(netService), max(100, u.iter/20)
	server := elsewhere(true, "ucx_perftest", "-p", port)
	client := exec.Command("ucx_perftest", network.server, "-p", port, "-v", "-t", u.test, "-s", strconv.Itoa(u.size), "-n", strconv.Itoa(u.iter),
		"-w", strconv.Itoa(warmup))
	client.Env = append(os.Environ(), "UCX_TLS=tcp,self", "UCX_NET_DEVICES="+network.devA, "UCX_WARN_UNUSED_ENV_VARS=n")
	server.Env = append(os.Environ(), "UCX_TLS=tcp,self", "UCX_NET_DEVICES="+network.devB, "UCX_WARN_UNUSED_ENV_VARS=n")
	out, cpu, err := clientAndServer(client, server, nil)
	if err != nil {
		return nil, err
	}
	v, err := parseUCX(out)
	if err == nil && u.size == mib {
		v["cpu"] = float64(cpu.Nanoseconds()) / float64(warmup+u.iter) / float64(u.size)
	}
	return v, err
}

// clientAndServer runs both, and returns what the client has written and the CPU time of both. other, if it is not nil, is called when the
// client runs, and what it returns when the client has ended.
func clientAndServer(client, server *exec.Cmd, other func() (end func() error, err error)) (out []byte, cpu time.Duration, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var serverOut, stdout, stderr bytes.Buffer
	server.Stdout, server.Stderr = &serverOut, &serverOut
	if err := server.Start(); err != nil {
		return nil, 0, err
	}
	defer context.AfterFunc(ctx, func() { server.Process.Kill(); client.Process.Kill() })()
	stopped := false
	stop := func() {
		if !stopped {
			stopped = true
			server.Process.Signal(syscall.SIGTERM)
			server.Wait()
		}
	}
	defer stop()
	if err := netListening(5 * time.Second); err != nil {
		return nil, 0, fmt.Errorf("%v: %w: %s", server.Args, err, serverOut.Bytes())
	}
	client.Stdout, client.Stderr = &stdout, &stderr
	if err := client.Start(); err != nil {
		return nil, 0, err
	}
	end := func() error { return nil }
	if other != nil {
		if end, err = other(); err != nil {
			client.Process.Kill()
			client.Wait()
			return nil, 0, err
		}
	}
	err = client.Wait()
	if ended := end(); err == nil {
		err = ended
	}
	if err != nil {
		return nil, 0, fmt.Errorf("%v: %w: %s%s", client.Args, err, stdout.Bytes(), stderr.Bytes())
	}
	stop()
	used := func(c *exec.Cmd) time.Duration { return c.ProcessState.UserTime() + c.ProcessState.SystemTime() }
	return stdout.Bytes(), used(client) + used(server), nil
}

// netListening waits until somebody in the servers' namespace listens at netService.
func netListening(patience time.Duration) error {
	want := fmt.Sprintf(":%04X", netService)
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		table, err := exec.Command("ip", "netns", "exec", network.space, "cat", "/proc/net/tcp", "/proc/net/tcp6").Output()
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(table)) {
			if f := strings.Fields(line); len(f) > 3 && f[3] == "0A" && strings.HasSuffix(f[1], want) {
				return nil
			}
		}
	}
	return errors.New("nobody listens")
}

var netTargets = []target{
	{what: "64 B SEND, half round trip / UCX tag_lat", num: ref{name: perfName("send", "lat", 64), metric: "p50"},
		den: ref{name: ucxName("tag_lat", 64), metric: "p50"}, limit: 0.7},
	{what: "64 B SEND rate, one QP / UCX tag_bw", num: ref{name: perfName("send", "rate", 64), metric: "rate"},
		den: ref{name: ucxName("tag_bw", 64), metric: "rate"}, atLeast: true, limit: 3},
	{what: "1 MiB WRITE bandwidth / UCX ucp_put_bw", num: ref{name: perfName("write", "bw", mib), metric: "bw"},
		den: ref{name: ucxName("ucp_put_bw", mib), metric: "bw"}, atLeast: true, limit: 1},
	{what: "64 B RPC p50: grpc-go / ringside Adaptive", num: ref{name: "grpc tcp x1", metric: "p50"}, den: ref{name: "rpc adaptive x1", metric: "p50"},
		atLeast: true, limit: 5},
	{what: "64 in flight, calls/s: ringside (Queue) / grpc-go", num: ref{name: "rpc async x64", metric: "rate"}, den: ref{name: "grpc tcp x64", metric: "rate"},
		atLeast: true, limit: 10},
	{what: "1 MiB WRITE bandwidth with 1 % of the packets lost / without", num: ref{name: lossyWrite, metric: "bw"},
		den: ref{name: perfName("write", "bw", mib), metric: "bw"}, atLeast: true, limit: 0.6},
	{what: "1 MiB READ bandwidth with 1 % of the packets lost / without", num: ref{name: lossyRead, metric: "bw"},
		den: ref{name: perfName("read", "bw", mib), metric: "bw"}, atLeast: true, limit: 0.6},
	{what: "64 B SEND rate with 1 % of the packets lost / without", num: ref{name: lossySend, metric: "rate"},
		den: ref{name: perfName("send", "rate", 64), metric: "rate"}, atLeast: true, limit: 0.6},
}

func init() {
	for _, f := range floods[2:] {
		netTargets = append(netTargets, target{what: "64 B SEND rate in a flood, " + f.kind + " / the same packets elsewhere", num: ref{name: f.name(), metric: "rate"},
			den: ref{name: flood{kind: floodSink}.name(), metric: "rate"}, atLeast: true, limit: 0.5})
	}
}

// netNotes is written by hand.
//
//go:embed notes-net.md
var netNotes string

// netReport returns the part on the network.
func netReport(c *config, host *conditions, r *results) string {
	return netPart.section(r, netNotes, func(b *page) {
		b.line("## The software NIC over UDP, against TCP\n")
		b.line("`ringside perf` on soft0 over RoCEv2 and UDP, `ucx_perftest` with `UCX_TLS=tcp`, and grpc-go over TCP, between two network")
		b.line("namespaces of one host: in turn, in processes of their own for each run, not pinned. As above otherwise. The last column of the")
		b.line("first table is the software NIC where UDP is blocked: queue pairs over TCP (`--path tcp`). Losses are made by the receiving")
		b.line("software NIC (`RINGSIDE_SOFT_FAULTS=loss=1%%`). CPU is of client and server together, in nanoseconds a byte,")
		b.line("from their start to their end, warm-up included.\n")
		b.WriteString(circumstances(c.rounds, c.quick, host, "load average after each round", r.loads))
		b.line("%s", targetTableOf(netTargets, r))
		b.line("| | ringside | UCX over TCP | | ringside over TCP |\n|---|---|---|---|---|")
		row := func(what, op, kind string, size int, metric, theirs string) {
			ours := perfName(op, kind, size)
			ratio := r.ratio(ref{name: ours, metric: metric}, ref{name: theirs, metric: metric}).ratio
			b.line("| %s | %s | %s | %s x | %s |", what, r.series(ours, metric, 1), r.series(theirs, metric, 1), number(ratio),
				r.series(overTCP(op, kind, size), metric, 1))
		}
		row("64 B SEND / tag_lat, p50, us", "send", "lat", 64, "p50", ucxName("tag_lat", 64))
		bare := r.ratio(ref{name: bareName, metric: "p50"}, ref{name: ucxName("tag_lat", 64), metric: "p50"})
		b.line("| as many bytes over bare UDP sockets / tag_lat, p50, us | %s | | %s x | |", r.series(bareName, "p50", 1), number(bare.ratio))
		row("64 B SEND / tag_bw, messages/s", "send", "rate", 64, "rate", ucxName("tag_bw", 64))
		row("1 MiB WRITE / ucp_put_bw, GB/s", "write", "bw", mib, "bw", ucxName("ucp_put_bw", mib))
		row("the same, CPU, ns a byte", "write", "bw", mib, "cpu", ucxName("ucp_put_bw", mib))
		b.line("| 1 MiB WRITE, 1 %% lost, GB/s | %s | | | |", r.series(lossyWrite, "bw", 1))
		b.line("| 1 MiB READ, GB/s | %s | | | %s |", r.series(perfName("read", "bw", mib), "bw", 1), r.series(overTCP("read", "bw", mib), "bw", 1))
		b.line("| 1 MiB READ, 1 %% lost, GB/s | %s | | | |", r.series(lossyRead, "bw", 1))
		b.line("| 64 B SEND, 1 %% lost, messages/s | %s | | | |", r.series(lossySend, "rate", 1))
		floodReport(b, r)
		b.line("\n| 64 B echo calls | in flight | p50, us | p99 | p99.9 | calls/s | CPU us a call |\n|---|---|---|---|---|---|---|")
		for _, e := range netEchoes {
			s := func(metric string) series { return r.series(e.name, metric, 1) }
			b.line("| %s | %d | %s | %s | %s | %s | %s |", e.what, max(1, e.args.InFlight), s("p50"), s("p99"), s("p999"), s("rate"), s("cpu"))
		}
	})
}
