package emulate

import "unsafe"

// addr is the address of a byte of the side's memory.
func (s *side) addr(off int) uint64 { return addressOf(s.reg.Bytes()) + uint64(off) }

// addressOf is where memory lies.
func addressOf(b []byte) uint64 {
	// Safe: only a number.
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))
}
