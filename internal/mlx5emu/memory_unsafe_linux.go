package mlx5emu

import (
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// populate has memory faulted in, without a change to it, and so says whether it is there, and may be read or written.
func populate(start, length uint64, advice int) syscall.Errno {
	for {
		// Safe: only numbers; the kernel checks them.
		_, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(start), uintptr(length), uintptr(advice))
		if errno != unix.EINTR && errno != unix.EAGAIN {
			return errno
		}
	}
}

// canPopulate reports whether this kernel knows how: Linux 5.14 does. On others memory that is not there is the client's own fault.
var canPopulate = sync.OnceValue(func() bool {
	page, err := unix.Mmap(-1, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return false
	}
	defer unix.Munmap(page)
	// Safe: only a number.
	return populate(uint64(uintptr(unsafe.Pointer(unsafe.SliceData(page)))), pageSize, unix.MADV_POPULATE_READ) == 0
})

// maxAddress is beyond the addresses of programs, of which some processors have 2^56, and leaves room to reckon with.
const maxAddress = 1 << 56

// checkOwn is Check for memory of this process.
func checkOwn(start, length uint64, write bool) error {
	if start == 0 || length == 0 || length > 1<<46 || start > maxAddress {
		return unix.EFAULT
	}
	advice := unix.MADV_POPULATE_READ
	if write {
		advice = unix.MADV_POPULATE_WRITE
	}
	first := start &^ (pageSize - 1)
	last := (start + length + pageSize - 1) &^ (pageSize - 1)
	if canPopulate() && populate(first, last-first, advice) != 0 {
		return unix.EFAULT
	}
	return nil
}

// ownMemory views memory of this process, if it is there, and can be written if that is wanted.
func ownMemory(start, length uint64, write bool) ([]byte, error) {
	if err := checkOwn(start, length, write); err != nil {
		return nil, err
	}
	// Safe: the pages are mapped, as was just seen; the caller of REG_MR keeps them so until DEREG_MR.
	p := *(*unsafe.Pointer)(unsafe.Pointer(&start))
	return unsafe.Slice((*byte)(p), length), nil
}
