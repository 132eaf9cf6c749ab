package emulate

import "unsafe"

func (s *side) addr(off int) uint64 {
	return uint64(uintptr(unsafe.Pointer(&s.reg.Bytes()[0]))) + uint64(off)
}
