package emulate

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// statBytes views a struct stat as the kernel writes it.
func statBytes(st *unix.Stat_t) []byte {
	// Safe: the struct's own size, without pointers; the view lives as long as it.
	return unsafe.Slice((*byte)(unsafe.Pointer(st)), unsafe.Sizeof(*st))
}

// statxBytes views a struct statx as the kernel writes it.
func statxBytes(x *unix.Statx_t) []byte {
	// Safe: the struct's own size, without pointers; the view lives as long as it.
	return unsafe.Slice((*byte)(unsafe.Pointer(x)), unsafe.Sizeof(*x))
}
