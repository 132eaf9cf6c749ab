package rxe_test

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// udmabufCreate makes a dma-buf of a sealed memory file: UDMABUF_CREATE of linux/udmabuf.h.
func udmabufCreate(u *os.File, memfd, n int) (int, error) {
	arg := struct {
		memfd, flags uint32
		offset, size uint64
	}{memfd: uint32(memfd), flags: 1, size: uint64(n)}
	const udmabufCreate = 0x40187542 // _IOW('u', 0x42, 24 bytes)
	// Safe: the kernel reads 24 bytes, which arg has, during the call.
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, u.Fd(), udmabufCreate, uintptr(unsafe.Pointer(&arg)))
	if errno != 0 {
		return 0, errno
	}
	return int(fd), nil
}
