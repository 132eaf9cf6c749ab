package emulate

import "unsafe"

// addr is the address of a byte of the side's memory.
func (s *side) addr(off int) uint64 {
	// Safe: only a number.
	return uint64(uintptr(unsafe.Pointer(&s.reg.Bytes()[0]))) + uint64(off)
}
