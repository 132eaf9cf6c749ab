package mlx5emu

import "unsafe"

// bytesOf views a struct of package abi as the client sees it.
func bytesOf[T any](v *T) []byte {
	// Safe: abi's structs are plain data with explicit padding; the view keeps v alive.
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}

// word64 is the aligned word at a constant offset of a page.
func word64(page []byte, at int) *uint64 {
	// Safe: pages begin on a page, callers' offsets are multiples of 8, and the index is checked.
	return (*uint64)(unsafe.Pointer(&page[at : at+8][0]))
}

// structOf copies the beginning of b into a struct of package abi; what b lacks is zero.
func structOf[T any](b []byte) T {
	var v T
	copy(bytesOf(&v), b)
	return v
}
