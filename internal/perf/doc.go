// Package perf measures verbs and RPCs between two processes, in the way perftest's ib_send_lat, ib_write_bw and their
// relatives do. It is the engine of `ringside perf`: the command adds flags and printing.
//
// A Server waits on a TCP port; Run connects to it, and for every message size both sides make queue pairs, exchange
// their addresses over that connection (proto.go), and run one tight loop each (loops.go). The connection stays open
// during the run: it carries the marks between warm-up and measurement, and its end is how one side learns that the
// other has gone.
//
// What is timed: in a latency test, one clock reading an iteration, written to a preallocated array; the histogram is
// made afterwards from the differences, so that recording costs one store. In a bandwidth or rate test, the clock is
// read at both ends of the run only.
package perf
