package observe

import "unsafe"

// bytesOf is memory that is aligned as words are.
func bytesOf(w []uint64) []byte {
	if len(w) == 0 {
		return nil
	}
	// Safe: the bytes of a slice of words.
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(w))), 8*len(w))
}
