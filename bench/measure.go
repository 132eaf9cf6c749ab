package main

import "strconv"

// measurement is one thing that is measured once a round.
type measurement struct {
	name string
	run  func(*config) (values, error)
}

// measurements are all of them, in the order of a round: what is compared stands side by side.
func measurements(c *config) []measurement {
	var all []measurement
	add := func(name string, run func(*config) (values, error)) { all = append(all, measurement{name, run}) }
	ucx := func(test string, size, full int) {
		add(ucxName(test, size), ucxTest{test, size, c.scale(full, full/100)}.run)
	}
	perf := func(op, kind string, size, full int, args ...string) {
		add(perfName(op, kind, size), perfTest{op, kind, size, c.scale(full, full/100), args}.run)
	}

	ucx("tag_lat", 64, 1_000_000)
	perf("send", "lat", 64, 1_000_000)
	ucx("ucp_put_lat", 8, 1_000_000)
	perf("write", "lat", 8, 1_000_000)
	ucx("ucp_get", 8, 2_000_000)
	perf("read", "lat", 8, 2_000_000)
	ucx("ucp_fadd", 8, 2_000_000)
	perf("atomic", "lat", 8, 2_000_000)
	ucx("tag_bw", 64, 5_000_000)
	perf("send", "rate", 64, 5_000_000)
	add("memcpy 1 MiB", memcpyTest{mib, c.scale(20_000, 200)}.run)
	perf("write", "bw", mib, 20_000)
	ucx("ucp_put_bw", mib, 20_000)
	perf("read", "bw", mib, 20_000)

	ucx("ucp_am_lat", 64, 1_000_000)
	for _, e := range echoes {
		all = append(all, e.measurement(100))
	}
	add("connections", connsTest{10_000, 200}.run)
	add("kill", killTest{c.scale(50, 3)}.run)
	return all
}

const mib = 1 << 20

// An echoCase is 64-byte echo calls.
type echoCase struct {
	name  string
	what  string
	args  echoArgs
	calls int
}

// measurement measures them; a quick run has one in less of the calls.
func (e echoCase) measurement(less int) measurement {
	return measurement{e.name, func(c *config) (values, error) {
		a := e.args
		a.Size = 64
		a.InFlight = max(a.InFlight, 1)
		a.Calls = c.scale(e.calls, e.calls/less)
		a.Warmup = a.Calls / 10
		if a.API == "" {
			return echoRun("grpc-server", grpcServerArgs{a.Network}, "grpc-client", a)
		}
		return echoRun("ringside-server", ringsideServerArgs{a.Poll}, "ringside-client", a)
	}}
}

var echoes = []echoCase{
	{"grpc tcp x1", "grpc-go, loopback TCP", echoArgs{Network: "tcp"}, 20_000},
	{"grpc unix x1", "grpc-go, Unix socket", echoArgs{Network: "unix"}, 20_000},
	{"rpc busy x1", "ringside, Busy", echoArgs{API: "blocking", Poll: "busy"}, 500_000},
	{"rpc adaptive x1", "ringside, Adaptive (default)", echoArgs{API: "blocking", Poll: "adaptive"}, 500_000},
	{"rpc event x1", "ringside, Event", echoArgs{API: "blocking", Poll: "event"}, 50_000},
	{"rpc proto x1", "ringside, Adaptive, protobuf on a worker", echoArgs{API: "proto", Poll: "adaptive"}, 100_000},
	{"grpc tcp x64", "grpc-go, loopback TCP", echoArgs{Network: "tcp", InFlight: 64}, 100_000},
	{"grpc unix x64", "grpc-go, Unix socket", echoArgs{Network: "unix", InFlight: 64}, 100_000},
	{"rpc async x64", "ringside, Adaptive, one goroutine with a Queue, Batch 16", echoArgs{API: "async", Poll: "adaptive", InFlight: 64}, 3_000_000},
	{"rpc blocking x64", "ringside, Adaptive, 64 goroutines", echoArgs{API: "blocking", Poll: "adaptive", InFlight: 64}, 1_000_000},
	{"rpc proto x64", "ringside, Adaptive, protobuf, 64 goroutines and workers", echoArgs{API: "proto", Poll: "adaptive", InFlight: 64}, 300_000},
	{"rpc light", "ringside, Adaptive, 1,000 calls/s", echoArgs{API: "blocking", Poll: "adaptive", Rate: 1000}, 5_000},
}

func ucxName(test string, size int) string { return "ucx " + test + " " + sizeName(size) }
func perfName(op, kind string, size int) string {
	return "ringside " + op + " " + kind + " " + sizeName(size)
}

func sizeName(n int) string {
	if n == mib {
		return "1 MiB"
	}
	if n >= 1024 && n%1024 == 0 {
		return strconv.Itoa(n/1024) + " KiB"
	}
	return strconv.Itoa(n) + " B"
}
