package softnic

import "unsafe"

// words32 views memory as 32-bit words; trailing bytes are left out.
func words32(b []byte) []uint32 {
	if len(b) < 4 {
		return nil
	}
	// Safe: callers pass page-aligned mappings or word slices' memory; the length is rounded down.
	return unsafe.Slice((*uint32)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/4)
}

// words64 views memory as 64-bit words; trailing bytes are left out.
func words64(b []byte) []uint64 {
	if len(b) < 8 {
		return nil
	}
	// Safe: callers pass page-aligned mappings or word slices' memory; the length is rounded down.
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/8)
}

// heapBytes allocates zeroed, 8-byte aligned memory on the Go heap.
func heapBytes(n int) []byte {
	w := make([]uint64, (n+7)/8)
	// Safe: the words are one allocation of at least n bytes, without pointers.
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(w))), n)
}

// addrOf returns the address that a region's memory is known by on the wire.
func addrOf(b []byte) uint64 {
	// Safe: only the number is used, to compare; memory is always reached through the slice.
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))
}

// word64At returns the aligned 64-bit word at off, for atomics on registered memory; nil if it does not lie in b or is
// not aligned.
func word64At(b []byte, off uint64) *uint64 {
	if uint64(len(b)) < 8 || off > uint64(len(b))-8 {
		return nil
	}
	p := unsafe.Pointer(&b[off])
	if uintptr(p)&7 != 0 {
		return nil
	}
	// Safe: in bounds and aligned, checked above.
	return (*uint64)(p)
}
