package emulate

import (
	"encoding/binary"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// command asks a device whether it takes commands of the write interface: ENOSPC is yes.
func command(fd int) syscall.Errno {
	const attrs = 1
	var b [24 + 16*attrs]byte
	le := binary.NativeEndian
	le.PutUint16(b[0:], uint16(len(b)))
	le.PutUint16(b[2:], abi.UVERBS_OBJECT_DEVICE)
	le.PutUint16(b[4:], abi.UVERBS_METHOD_INVOKE_WRITE)
	le.PutUint16(b[6:], attrs)
	le.PutUint32(b[16:], abi.RDMA_DRIVER_MLX5)
	le.PutUint16(b[24:], abi.UVERBS_ATTR_WRITE_CMD)
	le.PutUint16(b[26:], 8)
	le.PutUint16(b[28:], abi.UVERBS_ATTR_F_MANDATORY)
	le.PutUint64(b[32:], abi.IB_USER_VERBS_CMD_QUERY_DEVICE)
	// Safe: as long as the header says, alive during the call.
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), abi.RDMA_VERBS_IOCTL, uintptr(unsafe.Pointer(&b)))
	return e
}

// write is the system call with an address as it is.
func write(fd int, va, n uintptr) syscall.Errno {
	_, _, e := unix.Syscall(unix.SYS_WRITE, uintptr(fd), va, n)
	return e
}
