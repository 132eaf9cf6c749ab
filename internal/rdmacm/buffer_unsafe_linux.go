package rdmacm

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapSlots maps a page of memory outside of the Go heap: the kernel gets addresses in it as numbers, which the garbage
// collector does not see.
func mapSlots(n int) ([]byte, []slot, error) {
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, nil, err
	}
	// Safe: only the number is kept beside the slice; memory is reached through the slice, or by the kernel.
	addr := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem))))
	var slots []slot
	for at := 0; at+slotSize <= n; at += slotSize {
		slots = append(slots, slot{mem: mem[at:][:slotSize:slotSize], addr: addr + uint64(at)})
	}
	return mem, slots, nil
}
