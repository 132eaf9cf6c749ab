//go:build linux && (amd64 || arm64)

package mlx5

// What the device reads and writes is ordered here, and nowhere else.
//
//	memory              written by                     read by                          order
//	send element        poster, under the QP's lock    device, after the doorbell       before its record (doorbell)
//	receive element     poster, under the queue's lock device, after the record         before its record (publish)
//	doorbell record     poster, or poller              device, whenever it likes        after the elements; before the doorbell
//	doorbell register   poster                         device                           after the record; flushed at once
//	completion          device                         poller, once its owner bit says  owner bit before all else (fromDevice)
//	consumer record     poller                         device, before it writes again   after all reads of the completions (consumed)
//
// Records and elements are ordinary memory, registers are mapped write-combining or uncached. A store of package sync/atomic would
// be an XCHG on amd64, which on a register is a locked read of device memory: so registers and records are written by the
// functions below only, which are plain stores in assembly with the fences that stand beside them. Their types have no fields that Go
// code could store to, or hand to package sync/atomic. On amd64 ordinary stores, and
// ordinary loads, keep their order by themselves; SFENCE is what orders stores to write-combining memory, and pushes them out. On
// arm64 the barriers are of the outer shareable domain, where devices are.
//
// The tests disassemble the package for both, and look for what must not be there, and for places in the source that go around the
// types.

// A register is a doorbell register, or half of one: 8 bytes at its beginning are stored to, and with BlueFlame more.
type register struct{ _ uint64 }

// A recordWord is one of the two numbers of a doorbell record.
type recordWord struct{ _ uint32 }

// doorbell stores v, which is big-endian, in a doorbell record, then word in a doorbell register, and does not return before the latter has
// left the core.
//
//go:noescape
func doorbell(record *recordWord, v uint32, reg *register, word uint64)

// blueFlame is doorbell that writes the whole send element to the register: blocks times 64 bytes from wqe on, and from start
// after those before end.
//
//go:noescape
func blueFlame(record *recordWord, v uint32, reg *register, wqe, start, end *byte, blocks int)

// publish stores v in a doorbell record, after everything that was written to memory before.
//
//go:noescape
func publish(record *recordWord, v uint32)

// consumed stores v in a completion queue's doorbell record, after everything that was read from memory before.
//
//go:noescape
func consumed(record *recordWord, v uint32)

// fromDevice keeps reads of a completion behind that of its owner bit.
func fromDevice()
