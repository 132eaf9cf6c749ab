package mlx5emu

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// own is the memory of this process. Commands, queues and records are read and written by system calls, for which memory that is not
// there is an error. What the client registers is used as it is: as with a kernel's region, the mapping must stay until the region has
// gone.
type own struct{ pid int }

func newOwn() own { return own{os.Getpid()} }

// OwnMemory is the memory of this process, for a client within it.
func OwnMemory() Memory { return newOwn() }

// ReadAt implements Memory.
func (o own) ReadAt(b []byte, va uint64) error { return o.move(b, va, unix.ProcessVMReadv) }

// WriteAt implements Memory.
func (o own) WriteAt(b []byte, va uint64) error { return o.move(b, va, unix.ProcessVMWritev) }

func (o own) move(b []byte, va uint64, call func(int, []unix.Iovec, []unix.RemoteIovec, uint) (int, error)) error {
	for len(b) > 0 {
		local := []unix.Iovec{{Base: &b[0]}}
		local[0].SetLen(len(b))
		n, err := call(o.pid, local, []unix.RemoteIovec{{Base: uintptr(va), Len: len(b)}}, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("mlx5emu: %d bytes at %#x: %w", len(b), va, err)
		case n <= 0:
			return fmt.Errorf("mlx5emu: %d bytes at %#x: %w", len(b), va, unix.EFAULT)
		}
		b, va = b[n:], va+uint64(n)
	}
	return nil
}

// Check implements Memory.
func (own) Check(va, n uint64, write bool) error { return checkOwn(va, n, write) }

// Register implements Memory.
func (own) Register(pd *softnic.PD, start, length, iova uint64, access ib.Access) (driver.MR, error) {
	mem, err := ownMemory(start, length, access&ib.AccessLocalWrite != 0)
	if err != nil {
		return nil, err
	}
	return pd.RegisterMRAt(driver.MRConfig{Mem: mem, Access: access, FD: -1}, iova)
}
