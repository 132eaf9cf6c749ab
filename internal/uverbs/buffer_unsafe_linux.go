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
	return buffer{mem: mem, addr: AddrOf(mem)}
}

// part is n bytes of b at off.
func (b buffer) part(off, n int) buffer {
	return buffer{mem: b.mem[off : off+n : off+n], addr: b.addr + uint64(off)}
}

func (b buffer) free() {
	unix.Munmap(b.mem)
}

// ioctl runs the command at addr.
func ioctl(fd int, addr uint64) syscall.Errno {
	// Safe: the address is that of mapped memory, which outlives the call; the kernel checks the lengths in it.
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), abi.RDMA_VERBS_IOCTL, uintptr(addr))
	return errno
}

// rawWrite writes cmd, which is not empty, without telling the runtime that this thread is in a system call. The runtime would
// have its monitor look after a thread that is in one again and again, and take its processor away: see docs/performance.md.
func rawWrite(fd int, cmd []byte) (int, syscall.Errno) {
	// Safe: cmd is used by the call only, and its memory is mapped, not the Go heap's.
	n, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(cmd))), uintptr(len(cmd)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// Bytes views a struct of package abi as the kernel reads it, for attributes and commands. It must hold no pointers.
func Bytes[T any](v *T) []byte {
	// Safe: abi's structs are plain data with explicit padding; the view keeps v alive.
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}

// AddrOf is the address of mem, by which the kernel and a device know it. mem must be pinned or outside of the Go heap
// for as long as either uses it.
func AddrOf(mem []byte) uint64 {
	// Safe: only a number; nobody makes a pointer of it again.
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem))))
}
