package cmemu

import (
	"syscall"

	"github.com/ringside-rdma/ringside/internal/mlx5emu"
)

// A Kernel is the front door in process: what rdmacm.OpenOn takes for the kernel behind the device file. The client's memory is this
// process's.
type Kernel struct{ c *Channel }

// OpenKernel opens a channel for a client in this process. Close of the Kernel closes it.
func (m *Manager) OpenKernel() (Kernel, error) {
	c, err := m.Open(mlx5emu.OwnMemory())
	return Kernel{c}, err
}

// Write implements rdmacm.Kernel.
func (k Kernel) Write(cmd []byte) syscall.Errno { return k.c.Write(cmd, nil) }

// Wait implements rdmacm.Kernel.
func (k Kernel) Wait() { <-k.c.Ready() }

// Close implements rdmacm.Kernel.
func (k Kernel) Close() error { return k.c.Close() }
