package main

import (
	"sync/atomic"
	"unsafe"
)

// words views b as 64-bit words, for the stores that peers' one-sided reads race with. len(b) must be a multiple of 8,
// and b aligned to 8 bytes, or words panics.
func words(b []byte) []atomic.Uint64 {
	if len(b)%8 != 0 || uintptr(unsafe.Pointer(unsafe.SliceData(b)))%8 != 0 {
		panic("kv: memory is not made of 64-bit words")
	}
	// Safe: aligned and whole words, checked above; an atomic.Uint64 is a uint64 and some zero-size markers.
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/8)
}
