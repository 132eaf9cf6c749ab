package main

import (
	"sync/atomic"
	"unsafe"
)

// Views of registered memory as the types that the program computes with, in the host's byte order: both ends of a
// connection must have the same, and every platform that this library runs on is little-endian.

// words views b as 64-bit words, for the stores and loads that a peer races with by one-sided operations. len(b) must
// be a multiple of 8, and b aligned to 8 bytes, or words panics.
func words(b []byte) []atomic.Uint64 {
	if len(b)%8 != 0 || uintptr(unsafe.Pointer(unsafe.SliceData(b)))%8 != 0 {
		panic("paramserver: memory is not made of 64-bit words")
	}
	// Safe: aligned and whole words, checked above; an atomic.Uint64 is a uint64 and some zero-size markers.
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/8)
}

// floats views b as float32 values: a tensor is pulled into the memory that it is then computed from. len(b) must be
// a multiple of 4, and b aligned to 4 bytes, or floats panics.
func floats(b []byte) []float32 {
	if len(b)%4 != 0 || uintptr(unsafe.Pointer(unsafe.SliceData(b)))%4 != 0 {
		panic("paramserver: memory is not made of float32 values")
	}
	// Safe: aligned and whole values, checked above; every bit pattern is a float32.
	return unsafe.Slice((*float32)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/4)
}

// bytesOf views f as bytes.
func bytesOf(f []float32) []byte {
	// Safe: bytes have no alignment, and a float32 has four.
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(f))), len(f)*4)
}
