package mlx5emu

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// A Kernel is the front door in process: what uverbs.NewFile takes for the kernel behind a device file. The client's memory is this
// process's.
type Kernel struct{ c *Context }

// OpenKernel opens the device for a client in this process. Close of the Kernel closes it.
func (d *Device) OpenKernel() (*Kernel, error) {
	c, err := d.Open(newOwn())
	if err != nil {
		return nil, err
	}
	return &Kernel{c}, nil
}

// ownFiles passes files within the process.
type ownFiles struct{}

func (ownFiles) Pass(fd int) (int, error) { return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0) }

// Ioctl implements uverbs.Kernel.
func (k *Kernel) Ioctl(cmd []byte, _ uint64) syscall.Errno {
	if len(cmd) < headerSize {
		return unix.EFAULT
	}
	n := min(int(native.Uint16(cmd)), len(cmd))
	return k.c.Ioctl(cmd[:n], ownFiles{})
}

// Write implements uverbs.Kernel.
func (k *Kernel) Write(cmd []byte) (int, syscall.Errno) { return k.c.Write(cmd, ownFiles{}) }

// Ring implements uverbs.Kernel. A ConnectX is not rung by system calls.
func (k *Kernel) Ring(cmd []byte) (int, syscall.Errno) { return k.c.Write(cmd, ownFiles{}) }

// Mmap implements uverbs.Kernel.
func (k *Kernel) Mmap(offset int64, n int) ([]byte, error) {
	if n != pageSize {
		return nil, unix.EINVAL
	}
	return unix.Mmap(int(k.c.pages.file.Fd()), offset, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

// Munmap implements uverbs.Kernel.
func (k *Kernel) Munmap(mem []byte) error { return unix.Munmap(mem) }

// Close implements uverbs.Kernel.
func (k *Kernel) Close() error { return k.c.Close() }
