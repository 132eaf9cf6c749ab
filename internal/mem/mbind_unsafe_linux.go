package mem

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

const mpolPreferred = 1 // MPOL_PREFERRED of linux/mempolicy.h

// bindNode prefers NUMA node for the pages of m that are not there yet. It does nothing where that is not possible.
func bindNode(m []byte, node int) {
	var mask [16]uint64 // 1024 nodes, the most that Linux can be built for
	if node < 0 || node >= len(mask)*64 || len(m) == 0 {
		return
	}
	mask[node/64] = 1 << (node % 64)
	// Safe: mbind only reads the mask, during the call, and changes no content of m. maxnode counts one bit more than the
	// mask has, as the kernel wants it.
	unix.Syscall6(unix.SYS_MBIND, uintptr(unsafe.Pointer(unsafe.SliceData(m))), uintptr(len(m)), mpolPreferred,
		uintptr(unsafe.Pointer(&mask)), uintptr(len(mask)*64+1), 0)
}
