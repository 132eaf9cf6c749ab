package uverbs

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// newBuffer maps memory for commands.
func newBuffer(n int) (buffer, error) {
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return buffer{}, err
	}
	return bufferOf(mem), nil
}

// bufferOf makes mem, which the garbage collector neither moves nor frees, a buffer.
func bufferOf(mem []byte) buffer {
	// Safe: only the number is kept beside the slice; memory is reached through the slice, or by the kernel.
	return buffer{mem: mem, addr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem))))}
}

func (b *buffer) free() {
	unix.Munmap(b.mem)
	*b = buffer{}
}

// ioctl runs the command in b.
func ioctl(fd int, b buffer) syscall.Errno {
	// Safe: the address is that of mapped memory, which outlives the call; the kernel checks the lengths in it.
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), abi.RDMA_VERBS_IOCTL, uintptr(b.addr))
	return errno
}

// Bytes views a struct of package abi as the kernel reads it, for attributes and commands. It must hold no pointers.
func Bytes[T any](v *T) []byte {
	// Safe: abi's structs are plain data with explicit padding; the view keeps v alive.
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}

func putPostSend(b []byte, qp, wqeSize uint32) {
	copy(b, Bytes(&abi.PostSend{QPHandle: qp, WQESize: wqeSize}))
}
