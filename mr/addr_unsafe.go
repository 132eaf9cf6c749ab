package mr

import "unsafe"

// addrOf is the virtual address of b's first byte.
func addrOf(b []byte) uint64 {
	// Safe: only a number is made of it. The array does not move: it is mapped, or pinned.
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))
}

// stackHint is a number that differs between goroutines, and is mostly the same from call to call on one of them: it
// comes from where the stack lies.
func stackHint() uint {
	var b byte
	// Safe: only a number is made of it. Stacks are at least 2 KiB; the multiplication spreads neighbours.
	return uint(uint32(uintptr(unsafe.Pointer(&b))>>11)*0x9e3779b1) >> 16
}
