package mlx5emu

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapAt maps memory at an address, which is the same in each run, or anywhere if that is 0.
func mapAt(t testing.TB, addr uintptr, n int) []byte {
	t.Helper()
	flags := unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	if addr != 0 {
		flags |= unix.MAP_FIXED_NOREPLACE
	}
	// Safe: the result is memory of n bytes that nothing else has; it is unmapped when the test ends.
	p, err := unix.MmapPtr(-1, 0, *(*unsafe.Pointer)(unsafe.Pointer(&addr)), uintptr(n), unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		t.Fatalf("map %d bytes at %#x: %v", n, addr, err)
	}
	afterDevice(t, func() { unix.MunmapPtr(p, uintptr(n)) })
	// Safe: these n bytes were just mapped.
	return unsafe.Slice((*byte)(p), n)
}

// addrOf is where memory lies.
func addrOf(b []byte) uint64 {
	// Safe: only a number.
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))
}
