//go:build !linux

package softnic

import (
	"context"
	"errors"
	"fmt"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// errNoSharedMemory is why two NICs of different processes cannot be joined on this system.
var errNoSharedMemory = errors.New("shared memory between processes needs Linux")

// door exists on Linux only.
type door struct{}

func (n *NIC) openShared() error { return errNoSharedMemory }

func (n *NIC) closeShared() {}

func (n *NIC) dialShared(context.Context, ib.GID) (*link, error) {
	return nil, fmt.Errorf("%w: %w", driver.ErrUnreachable, errNoSharedMemory)
}

func remoteWaker(int) (int, error) { return -1, errNoSharedMemory }

func wakeFD(int) {}

func shareFD(int, bool) (int, func(), error) { return -1, nil, errNoSharedMemory }

func (n *NIC) joinCapture() {}

func (n *NIC) unwatch() {}
