// Package simnet is a network in virtual time for whole software NICs.
//
// Packets are encoded, may be lost, repeated, changed, put behind others or cut off, and are decoded again, so that their invariant
// CRC is what keeps the changed ones out. What becomes of which follows from the seed. Time advances in steps, from one event to the
// next, and only when somebody has nothing else to do: who polls a queue and finds nothing, or would sleep. If all of that is one
// goroutine, two runs from one seed are the same, packet by packet, which Trace shows.
package simnet
