//go:build amd64 || arm64

package mlx5

import "unsafe"

// memoryAt is n bytes at an address that a command has told the device.
func memoryAt(addr uint64, n int) []byte {
	p := *(*unsafe.Pointer)(unsafe.Pointer(&addr)) // Safe: mapped memory of the provider's, as it says; the device would believe it, too
	return unsafe.Slice((*byte)(p), n)             // Safe: likewise
}

// words is the number of 32 bits at off, as one of a record.
func words(mem []byte, off int) *recordWord {
	return (*recordWord)(unsafe.Pointer(&mem[off])) // Safe: aligned, and within mem
}
