package emulate

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/procmem"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A space is the memory of the program, as mlx5emu.Memory.
type space struct{ *procmem.Memory }

// Register implements mlx5emu.Memory.
func (s space) Register(pd *softnic.PD, start, length, iova uint64, access ib.Access) (driver.MR, error) {
	if err := s.Check(start, length, access&ib.AccessLocalWrite != 0); err != nil {
		if errors.Is(err, procmem.ErrGone) {
			err = unix.ESRCH
		}
		return nil, err
	}
	return pd.RegisterForeign(s.Memory, start, length, iova, access)
}
