package main

import (
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
)

// target is a number to reach: num / den (or num alone) at most or at least the limit.
type target struct {
	what    string
	num     ref
	den     ref
	atLeast bool
	limit   float64
	aim     float64 // what would be better still; 0: nothing said
}

var targets = []target{
	{what: "64 B SEND, half round trip / UCX tag_lat",
		num: ref{name: perfName("send", "lat", 64), metric: "p50"}, den: ref{name: ucxName("tag_lat", 64), metric: "p50"}, limit: 1.2, aim: 1.0},
	{what: "8 B WRITE, half round trip / UCX ucp_put_lat",
		num: ref{name: perfName("write", "lat", 8), metric: "p50"}, den: ref{name: ucxName("ucp_put_lat", 8), metric: "p50"}, limit: 1.5},
	{what: "8 B READ / UCX ucp_get",
		num: ref{name: perfName("read", "lat", 8), metric: "p50"}, den: ref{name: ucxName("ucp_get", 8), metric: "p50"}, limit: 1.5},
	{what: "64 B SEND rate, one QP / UCX tag_bw",
		num: ref{name: perfName("send", "rate", 64), metric: "rate"}, den: ref{name: ucxName("tag_bw", 64), metric: "rate"}, atLeast: true, limit: 0.8, aim: 1.0},
	{what: "1 MiB WRITE bandwidth / memcpy between such mappings (the better of two ways)",
		num: ref{name: perfName("write", "bw", mib), metric: "bw"}, den: ref{name: "memcpy 1 MiB", metric: "bw"}, atLeast: true, limit: 0.9},
	{what: "64 B RPC p50: grpc-go over TCP / ringside Adaptive",
		num: ref{name: "grpc tcp x1", metric: "p50"}, den: ref{name: "rpc adaptive x1", metric: "p50"}, atLeast: true, limit: 150},
	{what: "64 B RPC p50, Busy / two UCX ucp_am_lat",
		num: ref{name: "rpc busy x1", metric: "p50"}, den: ref{name: ucxName("ucp_am_lat", 64), metric: "p50", times: 2}, limit: 1.2},
	{what: "64 in flight, calls/s: ringside (Queue) / grpc-go over TCP",
		num: ref{name: "rpc async x64", metric: "rate"}, den: ref{name: "grpc tcp x64", metric: "rate"}, atLeast: true, limit: 60},
	{what: "allocations a raw call, client", num: ref{name: "rpc adaptive x1", metric: "client_allocs"}, limit: 0.005},
	{what: "allocations a raw call, server", num: ref{name: "rpc adaptive x1", metric: "server_allocs"}, limit: 0.005},
	{what: "1,000 calls/s, Adaptive: CPU of client and server, % of a core",
		num: ref{name: "rpc light", metric: "cpu_percent"}, limit: 10},
	{what: "64 B RPC p50, Adaptive / Busy",
		num: ref{name: "rpc adaptive x1", metric: "p50"}, den: ref{name: "rpc busy x1", metric: "p50"}, limit: 1.3},
	{what: "64 B RPC p99.9, Adaptive, us",
		num: ref{name: "rpc adaptive x1", metric: "p999"}, limit: 200},
	{what: "RC connections open at once", num: ref{name: "connections", metric: "count"}, atLeast: true, limit: 10_000},
	{what: "memory of an idle connection with SRQ, in the client's process, KiB",
		num: ref{name: "connections", metric: "client_kib"}, limit: 64},
	{what: "memory of an idle connection with SRQ, in the server's process, KiB",
		num: ref{name: "connections", metric: "server_kib"}, limit: 64},
	{what: "kill -9 of the peer until its queue pair's work is flushed, ms, the longest of 50", num: ref{name: "kill", metric: "flush_max"}, limit: 100},
	{what: "kill -9 of the peer until Conn.Done, ms, the longest of 50", num: ref{name: "kill", metric: "done_max"}, limit: 100},
}

// measured returns the target's value and its spread over the rounds.
func (t *target) measured(r *results) (value float64, spread string) {
	if t.den.name == "" {
		s := r.series(t.num.name, t.num.metric, t.num.factor())
		return s.median(), s.between()
	}
	c := r.ratio(t.num, t.den)
	return c.ratio, c.spread()
}

func targetTable(r *results) string { return targetTableOf(targets, r) }

func targetTableOf(targets []target, r *results) string {
	var b strings.Builder
	b.WriteString("| what | target | measured | spread | |\n|---|---|---|---|---|\n")
	for _, t := range targets {
		value, spread := t.measured(r)
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", t.what, t.bound(), number(value), spread, t.verdict(value))
	}
	return b.String()
}

func (t *target) bound() string {
	if t.atLeast {
		return "at least " + number(t.limit)
	}
	return "at most " + number(t.limit)
}

func (t *target) verdict(value float64) string {
	reached := func(limit float64) bool { return t.atLeast && value >= limit || !t.atLeast && value <= limit }
	switch {
	case math.IsNaN(value):
		return "not measured"
	case !reached(t.limit):
		return "**short**"
	case t.aim != 0 && reached(t.aim):
		return "pass, and the aim of " + number(t.aim)
	}
	return "pass"
}

// caution says why the numbers should not be trusted, if that can be seen.
func caution(rounds int, quick bool, host *conditions) string {
	var why []string
	if busy, err := strconv.ParseFloat(host.get(busyBefore), 64); err == nil && busy > 0.2 {
		why = append(why, fmt.Sprintf("The machine was busy with other things (%.2f cores of it before the first measurement).", busy))
	}
	if rounds < 5 && !quick {
		why = append(why, fmt.Sprintf("Only %d round(s) were measured.", rounds))
	}
	if len(why) == 0 {
		return ""
	}
	return strings.Join(why, " ") + " Not representative: measure again."
}

// notMeasured lists what failed or was skipped.
func notMeasured(r *results) string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(r.errs)) {
		word := "failed"
		if errors.Is(r.errs[name], errSkipped) {
			word = "skipped"
		}
		fmt.Fprintf(&b, "- %s: %s: %v\n", name, word, r.errs[name])
	}
	return b.String()
}

// circumstances is what to know before the numbers: a warning if they are not to be relied on, and the conditions.
func circumstances(rounds int, quick bool, host *conditions, loadName string, loads []string) string {
	var b strings.Builder
	if quick {
		fmt.Fprintf(&b, "**This is a quick run: it shows that everything runs. Its numbers mean nothing.**\n\n")
	}
	if w := caution(rounds, quick, host); w != "" {
		fmt.Fprintf(&b, "**%s**\n\n", w)
	}
	fmt.Fprintf(&b, "| condition | |\n|---|---|\n")
	for i, name := range host.names {
		fmt.Fprintf(&b, "| %s | %s |\n", name, host.texts[i])
	}
	fmt.Fprintf(&b, "| %s | %s |\n\n", loadName, strings.Join(loads, ", "))
	return b.String()
}

// notes is written by hand: what falls short, and why.
//
//go:embed notes.md
var notes string

func report(c *config, host *conditions, r *results) string {
	var b strings.Builder
	p := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	p("# Side by side\n")
	p("Written by `make bench`. Every number is the median over the rounds, with the smallest and largest value in")
	p("parentheses. In a round, each measurement runs once, in processes of its own, one after the other; what is compared")
	p("stands next to each other in time. Before and after each, the speed of the processors is looked at, and how long a cache line takes from")
	p("one to the other: neighbours of a virtual machine, and where its processors are, change either within seconds, to half and to five times.")
	p("Ratios are those of the medians of the rounds (\"of 5\") in which these were the same, to a quarter and to a half, before and after what is compared; where")
	p("there are fewer than %d of these, of all rounds (\"of all 7\").\n", enough)
	b.WriteString(circumstances(c.rounds, c.quick, host, "load average after each round", r.loads))

	p("## Numbers to reach\n\n%s", targetTable(r))

	p("## 64 B echo calls\n")
	p("Client and server are separate processes on the same cores, not pinned. Latency in us, as the caller sees it; CPU is")
	p("user and system time of both processes; allocations are counted by the runtime of each process. grpc-go sends a")
	p("`wrapperspb.BytesValue` with default options; ringside raw bytes, answered by an inline handler, where nothing else is said.\n")
	p("| | in flight | p50 | p99 | p99.9 | calls/s | allocs, client | allocs, server | CPU us a call |\n|---|---|---|---|---|---|---|---|---|")
	for _, e := range echoes {
		if e.args.Rate > 0 {
			continue
		}
		s := func(metric string) series { return r.series(e.name, metric, 1) }
		p("| %s | %d | %s | %s | %s | %s | %s | %s | %s |", e.what, max(1, e.args.InFlight), s("p50"), s("p99"), s("p999"), s("rate"),
			number(s("client_allocs").median()), number(s("server_allocs").median()), s("cpu"))
	}

	p("\n## Light load\n")
	p("One call at a time, 1,000 a second, paced by nanosleep(2), Adaptive. CPU in percent of one core.\n")
	p("| p50 us | p99 | p99.9 | CPU %% |\n|---|---|---|---|")
	light := func(metric string) series { return r.series("rpc light", metric, 1) }
	p("| %s | %s | %s | %s |", light("p50"), light("p99"), light("p999"), light("cpu_percent"))

	p("\n## Messages and one-sided operations\n")
	p("`ringside perf` on `soft0`, and `ucx_perftest` with `UCX_TLS=posix,self`, each between two processes, busy polling. The")
	p("latencies of SEND, WRITE, tag_lat, ucp_put_lat and ucp_am_lat are half round trips.\n")
	p("| | ringside | UCX | |\n|---|---|---|---|")
	pair := func(what string, ours, theirs, metric, unit string) {
		c := r.ratio(ref{name: ours, metric: metric}, ref{name: theirs, metric: metric})
		p("| %s, %s | %s | %s | %s x |", what, unit, r.series(ours, metric, 1), r.series(theirs, metric, 1), number(c.ratio))
	}
	pair("64 B SEND / tag_lat, p50", perfName("send", "lat", 64), ucxName("tag_lat", 64), "p50", "us")
	pair("8 B WRITE / ucp_put_lat, p50", perfName("write", "lat", 8), ucxName("ucp_put_lat", 8), "p50", "us")
	pair("8 B READ / ucp_get, p50", perfName("read", "lat", 8), ucxName("ucp_get", 8), "p50", "us")
	pair("8 B FETCH_ADD / ucp_fadd, p50", perfName("atomic", "lat", 8), ucxName("ucp_fadd", 8), "p50", "us")
	pair("64 B SEND / tag_bw, rate", perfName("send", "rate", 64), ucxName("tag_bw", 64), "rate", "messages/s")
	pair("1 MiB WRITE / ucp_put_bw", perfName("write", "bw", mib), ucxName("ucp_put_bw", mib), "bw", "GB/s")
	p("| 1 MiB READ, GB/s | %s | | |", r.series(perfName("read", "bw", mib), "bw", 1))
	p("| memcpy of 1 MiB between two regions in one call, GB/s | %s | | |", r.series("memcpy 1 MiB", "bw_whole", 1))
	p("| memcpy of 1 MiB in pieces of 64 KiB, GB/s | %s | | |", r.series("memcpy 1 MiB", "bw_pieces", 1))
	p("| ucp_am_lat, 64 B, p50, us | | %s | |", r.series(ucxName("ucp_am_lat", 64), "p50", 1))

	p("\n## Many connections\n")
	p("RC connections between two processes, with shared receive queues: all are opened, each carries a 64 B message and its")
	p("echo, all stay open, all are closed. Memory is the growth of the proportional set size of both processes; the kernel's")
	p("memory for the bootstrap sockets is not in it.\n")
	p("| connections | open, us each | echo, us each | close, us each | KiB each, client | server | both |\n|---|---|---|---|---|---|---|")
	conns := func(metric string) series { return r.series("connections", metric, 1) }
	p("| %s | %s | %s | %s | %s | %s | %s |", number(conns("count").median()), conns("open_us"), conns("echo_us"), conns("close_us"),
		conns("client_kib"), conns("server_kib"), conns("idle_conn_kib"))

	p("\n## A peer that is killed\n")
	p("50 processes, killed by SIGKILL one after the other while the survivor sleeps: ms from the kill until a receive of its queue pair is")
	p("flushed, and until its connection of package transport is over (Conn.Done).\n")
	p("| flushed, median | the longest | Conn.Done, median | the longest |\n|---|---|---|---|")
	kill := func(metric string) series { return r.series("kill", metric, 1) }
	p("| %s | %s | %s | %s |", kill("flush_p50"), kill("flush_max"), kill("done_p50"), kill("done_max"))

	if len(r.errs) > 0 {
		p("\n## Not measured\n\n%s", strings.TrimSpace(notMeasured(r)))
	}
	p("\n%s", strings.TrimSpace(notes))
	return b.String()
}
