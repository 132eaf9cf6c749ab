package rdmacm

import "unsafe"

// bytesOf views a struct of package abi as the kernel reads and writes it. It must hold no pointers.
func bytesOf[T any](v *T) []byte {
	// Safe: abi's structs are plain data with explicit padding, every bit pattern of which is a value; the view keeps v alive.
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}
