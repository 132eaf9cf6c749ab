package seccomp

import (
	"runtime"
	"structs"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// notif is struct seccomp_notif (linux/seccomp.h) with the struct seccomp_data in it.
type notif struct {
	_     structs.HostLayout
	id    uint64
	tid   uint32
	flags uint32
	call  int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

// response is struct seccomp_notif_resp.
type response struct {
	_     structs.HostLayout
	id    uint64
	val   int64
	err   int32
	flags uint32
}

// addfd is struct seccomp_notif_addfd.
type addfd struct {
	_          structs.HostLayout
	id         uint64
	flags      uint32
	src        uint32
	target     uint32
	targetFlag uint32
}

// The sizes that the request numbers of the ioctls stand for: what the kernel appends to the structs later has other numbers.
const (
	_ = uint(unsafe.Sizeof(notif{}) - 80)
	_ = uint(80 - unsafe.Sizeof(notif{}))
	_ = uint(unsafe.Sizeof(response{}) - 24)
	_ = uint(24 - unsafe.Sizeof(response{}))
	_ = uint(unsafe.Sizeof(addfd{}) - 24)
	_ = uint(24 - unsafe.Sizeof(addfd{}))
)

func ioctl(fd int, request uintptr, arg unsafe.Pointer) (int, syscall.Errno) {
	r, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	return int(r), e
}

// again is ioctl that begins anew after a signal: for requests that have done nothing before they say EINTR.
func again(fd int, request uintptr, arg unsafe.Pointer) (int, syscall.Errno) {
	for {
		if r, e := ioctl(fd, request, arg); e != unix.EINTR {
			return r, e
		}
	}
}

func recvNotif(fd int, n *notif) syscall.Errno {
	// Safe: a struct of the size that the request number says, alive during the call.
	_, e := ioctl(fd, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(n))
	return e
}

func sendResponse(fd int, r *response) syscall.Errno {
	// Safe: a struct of the size that the request number says, alive during the call.
	_, e := again(fd, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(r))
	return e
}

// addFD waits until the caller has taken the descriptor, and no signal may interrupt that: with SECCOMP_ADDFD_FLAG_SEND the kernel
// then takes the descriptor back, but lets the caller go, whose call returns 0, which is somebody's descriptor.
func addFD(fd int, a *addfd) (int, syscall.Errno) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, old unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old); err != nil {
		return -1, errnoOf(err)
	}
	defer unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
	// Safe: a struct of the size that the request number says, alive during the call.
	return again(fd, unix.SECCOMP_IOCTL_NOTIF_ADDFD, unsafe.Pointer(a))
}

func idValid(fd int, id uint64) bool {
	// Safe: eight bytes, as the request number says, alive during the call.
	_, e := again(fd, unix.SECCOMP_IOCTL_NOTIF_ID_VALID, unsafe.Pointer(&id))
	return e == 0
}

// install makes filter the calling thread's, and returns its listener. The thread must be locked to its goroutine, and have
// no_new_privs.
func install(filter []unix.SockFilter, flags uintptr) (int, syscall.Errno) {
	// Safe: a slice that is alive and does not move during the call.
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: unsafe.SliceData(filter)}
	fd, _, e := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(filter)
	return int(fd), e
}

// setDefaultAction has the kernel do what it does by default with a signal: Go's runtime would print stacks for some.
func setDefaultAction(sig syscall.Signal) {
	var act [4]uint64 // struct sigaction of the kernel: handler 0 (SIG_DFL), no flags, no mask
	// Safe: as large as the kernel's struct, whose last word arm64 has not, alive during the call.
	unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&act)), 0, 8, 0, 0)
}

// filterBytes and bytesFilter are the form in which a filter travels to the launcher, which is this executable.
func filterBytes(f []unix.SockFilter) []byte {
	// Safe: the structs have no padding and no pointers; the bytes live as long as the slice.
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(f))), len(f)*int(unsafe.Sizeof(unix.SockFilter{})))
}

func bytesFilter(b []byte) []unix.SockFilter {
	f := make([]unix.SockFilter, len(b)/int(unsafe.Sizeof(unix.SockFilter{})))
	if len(f) > 0 {
		copy(filterBytes(f), b)
	}
	return f
}
