package mlx5emu

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Process is another process, or this one, as far as its memory can be read and written by system calls: what is not mapped is an
// error then. It is the part of Memory that every front door needs; Register is their own.
type Process struct{ Pid int }

// ReadAt implements Memory.
func (p Process) ReadAt(b []byte, va uint64) error { return p.move(b, va, unix.ProcessVMReadv) }

// WriteAt implements Memory.
func (p Process) WriteAt(b []byte, va uint64) error { return p.move(b, va, unix.ProcessVMWritev) }

func (p Process) move(b []byte, va uint64, call func(int, []unix.Iovec, []unix.RemoteIovec, uint) (int, error)) error {
	for len(b) > 0 {
		local := []unix.Iovec{{Base: &b[0]}}
		local[0].SetLen(len(b))
		n, err := call(p.Pid, local, []unix.RemoteIovec{{Base: uintptr(va), Len: len(b)}}, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("mlx5emu: %d bytes at %#x of process %d: %w", len(b), va, p.Pid, err)
		case n <= 0:
			return fmt.Errorf("mlx5emu: %d bytes at %#x of process %d: %w", len(b), va, p.Pid, syscall.EFAULT)
		}
		b, va = b[n:], va+uint64(n)
	}
	return nil
}

// own is the memory of this process. What the client registers is used as it is: as with a kernel's region, the mapping must stay
// until the region has gone.
type own struct{ Process }

func newOwn() own { return own{Process{os.Getpid()}} }

// Register implements Memory.
func (own) Register(pd *softnic.PD, start, length, iova uint64, access ib.Access) (driver.MR, error) {
	mem, err := ownMemory(start, length, access&ib.AccessLocalWrite != 0)
	if err != nil {
		return nil, err
	}
	return pd.RegisterMRAt(driver.MRConfig{Mem: mem, Access: access, FD: -1}, iova)
}
