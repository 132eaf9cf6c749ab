package main

import (
	_ "embed"
	"fmt"
)

// rxeLimits are the numbers to reach against perftest.
var rxeLimits = map[string]target{"lat": {limit: 1.1}, "bw": {atLeast: true, limit: 0.95}}

// perftestNotes is written by hand: what falls short, and why.
//
//go:embed notes-perftest.md
var perftestNotes string

// rxeReport returns the section on rxe.
func rxeReport(plan *vmPlan, host *conditions, r *results) string {
	return rxePart.section(r, perftestNotes, func(b *page) {
		b.line("## Kernel software RDMA (rxe), against perftest\n")
		b.line("`ringside perf` and perftest's programs in one virtual machine, in turn, each between a client on rxe0 and a server on")
		b.line("rxe1: processes of their own for each run. RC, GID index 1, busy polling, nothing inline, no warm-up. Latency: one work")
		b.line("request at a time, its completion awaited before anything else is; p50 is perftest's t_typical, of half a round trip for")
		b.line("SEND and WRITE, of the whole operation for READ and FETCH_ADD. Bandwidth: %d work requests in flight, each signaled and", bwDepth)
		b.line("posted by itself; %d receives; the average, in 10^6 bytes a second. Every number is the median over the rounds, with the", bwRecvDepth)
		b.line("smallest and largest value in parentheses; ratios are ringside / perftest, of rounds in which the processors were alike, as above.\n")
		b.WriteString(circumstances(len(r.loads), plan.Quick, host, "load average in the machine after each round", r.loads))

		row := func(c vmCase, metric string, scale float64, also func(name string) string) {
			limit := rxeLimits[c.kind]
			b.line("| %s %s | %s | %s | %s |", sizeName(c.size), rxeOps[c.op], r.beside(c.ours(), c.theirs(), metric, scale, &limit), also(c.ours()),
				also(c.theirs()))
		}
		b.line("| p50, us | ringside | perftest | ratio | target | p99, ringside | perftest |\n|---|---|---|---|---|---|---|")
		for _, c := range vmCases {
			if c.kind == "lat" {
				row(c, "p50", 1, func(name string) string { return r.series(name, "p99", 1).String() })
			}
		}
		b.line("\n| MB/s | ringside | perftest | ratio | target | packets a message; sent again, RNR, ringside | perftest |\n|---|---|---|---|---|---|---|")
		for _, c := range vmCases {
			if c.kind == "bw" {
				row(c, "bw", 1000, func(name string) string {
					s := func(metric string) string { return number(r.series(name, metric, 1).median()) }
					return fmt.Sprintf("%s; %s, %s", s("packets"), s("retries"), s("rnr"))
				})
			}
		}
		b.line("\n### The software NIC over UDP, against rxe\n")
		b.line("`ringside perf` with its defaults for both: between two software NICs by RoCEv2 through sockets, at the addresses of rxe0 and")
		b.line("rxe1, and between these; so both cross the same veth pair. Ratios are soft / rxe.\n")
		b.line("| | soft | rxe | ratio | target |\n|---|---|---|---|---|")
		for _, c := range softCases {
			metric, unit, scale := c.metric()
			limit := softTargets[c.kind]
			b.line("| %s %s, %s | %s |", sizeName(c.size), rxeOps[c.op], unit, r.beside(c.soft(), c.rxe(), metric, scale, &limit))
		}
		b.line("| as many bytes as a 64 B SEND, over bare UDP sockets, p50, us | %s |", r.beside(bareName, softCase{"send", "lat", 64}.rxe(), "p50", 1, nil))
	})
}

var rxeOps = map[string]string{"send": "SEND", "write": "WRITE", "read": "READ", "atomic": "FETCH_ADD"}
