package observe

import (
	"sync/atomic"
	"unsafe"
)

// ringHeader is the start of the memory file of a ring. Both indices count bytes since the start, and never wrap.
type ringHeader struct {
	head atomic.Uint64 // written by the NIC: what is before it can be read
	lost atomic.Uint64 // written by the NIC: packets that there was no room for
	_    [48]byte
	tail atomic.Uint64 // written by the observer: what is before it was read
}

// headerOf views the start of a ring's memory.
func headerOf(mem []byte) *ringHeader {
	_ = mem[headerLen-1]
	// Safe: the memory is a page-aligned mapping that is long enough, without pointers.
	return (*ringHeader)(unsafe.Pointer(unsafe.SliceData(mem)))
}
