package mlx5emu

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ownMemory views memory of this process, if it is there, and can be written if that is wanted.
func ownMemory(start, length uint64, write bool) ([]byte, error) {
	if start == 0 || length == 0 || length > 1<<46 || start > 1<<47 {
		return nil, unix.EFAULT
	}
	advice := unix.MADV_POPULATE_READ
	if write {
		advice = unix.MADV_POPULATE_WRITE
	}
	first := start &^ (pageSize - 1)
	last := (start + length + pageSize - 1) &^ (pageSize - 1)
	for {
		// Safe: a system call that says whether there is memory, and faults it in; nothing is changed.
		_, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(first), uintptr(last-first), uintptr(advice))
		if errno == unix.EINTR || errno == unix.EAGAIN {
			continue
		}
		if errno != 0 && !errors.Is(errno, unix.EINVAL) { // kernels before 5.14 do not know it
			return nil, unix.EFAULT
		}
		break
	}
	// Safe: the pages are mapped, as was just seen; the caller of REG_MR keeps them so until DEREG_MR.
	p := *(*unsafe.Pointer)(unsafe.Pointer(&start))
	return unsafe.Slice((*byte)(p), length), nil
}
