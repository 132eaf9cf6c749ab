package mlx5emu

import (
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Memory is the address space of a client. Its methods may be called by several goroutines at a time. An access to memory that
// is not there, or may not be read or written, is an error, never a fault.
type Memory interface {
	// ReadAt fills p from address va on. A read of 8 aligned bytes is not torn.
	ReadAt(p []byte, va uint64) error
	// WriteAt writes p to address va on, in ascending order as far as one call is concerned; what a later call writes is seen
	// later.
	WriteAt(p []byte, va uint64) error
	// Check reports with EFAULT that not all of n bytes at va may be read, or, if write is set, written: by the client itself. As far as
	// the kernel that this runs on lets it be told.
	Check(va, n uint64, write bool) error
	// Register makes length bytes at start a region of the software NIC, which its peers and WQEs know by addresses from iova
	// on. Regions are used as sources and targets of one-sided operations of peers, and by the SGEs of the client's own
	// requests. The region's LKey and RKey are the software NIC's. It fails with syscall.EFAULT if the memory is not there, or,
	// with access that writes, cannot be written.
	Register(pd *softnic.PD, start, length, iova uint64, access ib.Access) (driver.MR, error)
}

// A FilePasser gives file descriptors to the client whose command is being executed.
type FilePasser interface {
	// Pass makes the file that fd is open on a descriptor of the client's, close-on-exec, and returns its number there. fd
	// stays the caller's.
	Pass(fd int) (int, error)
}
