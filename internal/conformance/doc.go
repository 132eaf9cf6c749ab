// Package conformance holds one table of operations and errors that every provider must answer in the same way.
//
// The table is written against the public packages verbs, mr and qp alone, and runs over every path on which two queue
// pairs can meet: two contexts in one process, and two processes, of which the second is the program started again.
// A case is a script that drives both sides; whether a side is in this process or in the other one is not visible to
// it, so the same source covers each path and both roles.
//
// Run it on another device, and write the matrix of providers and features that the README shows:
//
//	go test ./internal/conformance -device rxe0 -matrix matrix.md
//
// `ringside doctor --selftest` runs it on devices that this project does not have; see Run.
//
// A feature that a device does not report in ib.DeviceAttr is skipped with that reason. Where the InfiniBand
// specification (IBA, volume 1) leaves a choice, or where devices that are widely used differ from it, the case says so
// and accepts exactly those answers; the answer that was seen is logged.
package conformance
