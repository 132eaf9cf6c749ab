package cmemu

import "unsafe"

// bytesOf views a struct of package abi as the client sees it.
func bytesOf[T any](v *T) []byte {
	// Safe: abi's structs are plain data with explicit padding; the view keeps v alive.
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}

// structOf copies the beginning of b into a struct of package abi; what b lacks is zero.
func structOf[T any](b []byte) T {
	var v T
	copy(bytesOf(&v), b)
	return v
}
