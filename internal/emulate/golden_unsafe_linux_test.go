package emulate

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Where golden.c has its memory.
const goldenA, goldenB = 0x200000000, 0x200010000

func goldenMemory() (a, b []byte, err error) {
	at := func(va uintptr) []byte {
		p, _, e := unix.Syscall6(unix.SYS_MMAP, va, goldenSize, unix.PROT_READ|unix.PROT_WRITE,
			unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_FIXED_NOREPLACE, ^uintptr(0), 0)
		if e != 0 || p != va {
			err = fmt.Errorf("memory at %#x: %v", va, e)
			return nil
		}
		// Safe: a mapping that was just made, of that size, and is never unmapped.
		return unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&p))), goldenSize)
	}
	return at(goldenA), at(goldenB), err
}
