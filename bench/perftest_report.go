package main

import (
	_ "embed"
	"fmt"
	"strings"
)

// rxeLimits are the numbers to reach against perftest.
var rxeLimits = map[string]target{"lat": {limit: 1.1}, "bw": {atLeast: true, limit: 0.95}}

// perftestNotes is written by hand: what falls short, and why.
//
//go:embed notes-perftest.md
var perftestNotes string

// rxeReport returns the section on rxe, with its markers.
func rxeReport(plan *vmPlan, host *conditions, r *results) string {
	var b strings.Builder
	p := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	p("%s\n", rxePart.begin)
	p("## Kernel software RDMA (rxe), against perftest\n")
	p("`ringside perf` and perftest's programs in one virtual machine, in turn, each between a client on rxe0 and a server on")
	p("rxe1: processes of their own for each run. RC, GID index 1, busy polling, nothing inline, no warm-up. Latency: one work")
	p("request at a time, its completion awaited before anything else is; p50 is perftest's t_typical, of half a round trip for")
	p("SEND and WRITE, of the whole operation for READ and FETCH_ADD. Bandwidth: %d work requests in flight, each signaled and", bwDepth)
	p("posted by itself; %d receives; the average, in 10^6 bytes a second. Every number is the median over the rounds, with the", bwRecvDepth)
	p("smallest and largest value in parentheses; ratios are ringside / perftest.\n")
	b.WriteString(circumstances(plan.Rounds, plan.Quick, host, "load average in the machine after each round", r.loads))

	row := func(c vmCase, metric string, scale float64, also func(name string) string) {
		limit := rxeLimits[c.kind]
		ratio, spread := r.ratio(ref{name: c.ours(), metric: metric}, ref{name: c.theirs(), metric: metric})
		p("| %s %s | %s | %s | %s (%s) | %s, %s | %s | %s |", sizeName(c.size), rxeOps[c.op],
			r.series(c.ours(), metric, scale), r.series(c.theirs(), metric, scale), number(ratio), spread.between(),
			limit.bound(), limit.verdict(ratio), also(c.ours()), also(c.theirs()))
	}
	p("| p50, us | ringside | perftest | ratio | target | p99, ringside | perftest |\n|---|---|---|---|---|---|---|")
	for _, c := range vmCases {
		if c.kind == "lat" {
			row(c, "p50", 1, func(name string) string { return r.series(name, "p99", 1).String() })
		}
	}
	p("\n| MB/s | ringside | perftest | ratio | target | packets a message; sent again, RNR, ringside | perftest |\n|---|---|---|---|---|---|---|")
	for _, c := range vmCases {
		if c.kind == "bw" {
			row(c, "bw", 1000, func(name string) string {
				s := func(metric string) string { return number(r.series(name, metric, 1).median()) }
				return fmt.Sprintf("%s; %s, %s", s("packets"), s("retries"), s("rnr"))
			})
		}
	}
	p("\n### The software NIC over UDP, against rxe\n")
	p("`ringside perf` with its defaults for both: between two software NICs by RoCEv2 through sockets, at the addresses of rxe0 and")
	p("rxe1, and between these; so both cross the same veth pair. Ratios are soft / rxe.\n")
	p("| | soft | rxe | ratio | target |\n|---|---|---|---|---|")
	for _, c := range softCases {
		metric, unit, scale := c.metric()
		limit := softTargets[c.kind]
		ratio, spread := r.ratio(ref{name: c.soft(), metric: metric}, ref{name: c.rxe(), metric: metric})
		p("| %s %s, %s | %s | %s | %s (%s) | %s, %s |", sizeName(c.size), rxeOps[c.op], unit,
			r.series(c.soft(), metric, scale), r.series(c.rxe(), metric, scale), number(ratio), spread.between(), limit.bound(), limit.verdict(ratio))
	}
	if len(r.errs) > 0 {
		p("\nRuns that are missing above:\n\n%s", strings.TrimSpace(notMeasured(r)))
	}
	p("\n%s\n\n%s", strings.TrimSpace(perftestNotes), rxePart.end)
	return b.String()
}

var rxeOps = map[string]string{"send": "SEND", "write": "WRITE", "read": "READ", "atomic": "FETCH_ADD"}
