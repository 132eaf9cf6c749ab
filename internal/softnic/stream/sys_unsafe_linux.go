package stream

import (
	"io"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system calls do not wait, so that the runtime need not know of them: it would look for other work to do meanwhile, which
// costs more than they do.

// read implements system. b is not empty.
func (y *sysSocket) read(b []byte) (int, error) {
	// Safe: b is memory of the socket's, of that length, and the call is over when it returns.
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(y.fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), unix.MSG_DONTWAIT, 0, 0)
	if n == 0 && errno == 0 {
		return 0, io.EOF
	}
	return outcome(int(n), errno)
}

// write implements system. b is not empty.
func (y *sysSocket) write(b []byte) (int, error) {
	// Safe: b is memory of the socket's, of that length, and the call is over when it returns.
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(y.fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
	return outcome(int(n), errno)
}
