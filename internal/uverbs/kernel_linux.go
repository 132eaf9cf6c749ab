package uverbs

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// A Kernel takes the commands of one open device. The kernel's own is behind Open; tests, and emulated devices, bring
// theirs to NewFile. Its methods may be called by several goroutines at a time.
type Kernel interface {
	// Ioctl runs the command that begins at cmd[0], as RDMA_VERBS_IOCTL does. Addresses within it point into cmd, whose own is
	// addr. Results are written in place.
	Ioctl(cmd []byte, addr uint64) syscall.Errno
	// Write runs a command of the write() interface, and returns how many bytes of it were taken.
	Write(cmd []byte) (int, syscall.Errno)
	// Ring is Write for a Prepared command: a doorbell. It must not sleep: the runtime does not know that the thread is away.
	Ring(cmd []byte) (int, syscall.Errno)
	// Mmap maps n bytes that device and process share; offset is one that a command has told.
	Mmap(offset int64, n int) ([]byte, error)
	// Munmap takes what Mmap has returned.
	Munmap(mem []byte) error
	// Close ends the context, and takes everything along that was made in it. It is called once, after all else.
	Close() error
}

// character is the kernel behind a character device.
type character struct{ fd int }

func (c character) Ioctl(_ []byte, addr uint64) syscall.Errno { return ioctl(c.fd, addr) }

func (c character) Write(cmd []byte) (int, syscall.Errno) {
	n, err := unix.Write(c.fd, cmd)
	if err != nil {
		return 0, err.(syscall.Errno)
	}
	return n, 0
}

func (c character) Ring(cmd []byte) (int, syscall.Errno) { return rawWrite(c.fd, cmd) }

func (c character) Mmap(offset int64, n int) ([]byte, error) {
	return unix.Mmap(c.fd, offset, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

func (c character) Munmap(mem []byte) error { return unix.Munmap(mem) }

func (c character) Close() error { return unix.Close(c.fd) }
