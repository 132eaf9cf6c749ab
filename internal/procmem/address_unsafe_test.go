package procmem

import "unsafe"

// address is where memory lies.
func address(b []byte) uint64 {
	// Safe: only a number.
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))
}
