//go:build amd64 || arm64

package mlx5

import (
	"errors"
	"fmt"
	"sync"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// ErrDevice is a device, or its kernel driver, that has said what cannot be.
var ErrDevice = errors.New("the device cannot be trusted any more: close it, and look for errors of its driver in the kernel's log")

type mlx5Context struct {
	*uverbs.Context
	info    *deviceInfo
	uars    uars
	records records

	qps table[qp] // by user index, or by number: see deviceInfo.byIndex
	// numbers is held, if completions go by number, while a queue pair is made, and from before one is destroyed until its completions
	// are gone: the kernel may give its number to the next.
	numbers sync.Mutex
	ahs     table[addressVector] // by ib.AHNum

	windows *uverbs.Windows

	dmaBufs func() bool // whether the kernel's driver takes them; asked once

	mu   sync.Mutex
	left [][]byte // guarded by mu: memory of queues that the kernel did not take back; the device may use it
}

// newContext takes over a context that the kernel has made. It closes it if it fails.
func newContext(u *uverbs.Context, resp *abi.Mlx5AllocUcontextResp) (*mlx5Context, error) {
	c := &mlx5Context{Context: u, windows: uverbs.NewWindows()}
	c.dmaBufs = sync.OnceValue(c.askDMABufs)
	err := c.open(resp)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", u.Device(), err), c.Close())
	}
	return c, nil
}

func (c *mlx5Context) open(resp *abi.Mlx5AllocUcontextResp) (err error) {
	if c.info, err = learn(resp); err != nil {
		return err
	}
	c.uars.c, c.uars.info = c.Context, c.info
	return c.uars.open()
}

// Close implements driver.Context.
func (c *mlx5Context) Close() error {
	err := errors.Join(c.uars.close(), c.Context.Close(), c.records.close())
	for _, mem := range c.left {
		err = errors.Join(err, unmapPages(mem))
	}
	return err
}

// leave keeps the memory of a queue that could not be destroyed mapped, for as long as the kernel's context exists.
func (c *mlx5Context) leave(mem []byte) {
	c.mu.Lock()
	c.left = append(c.left, mem)
	c.mu.Unlock()
}

// QueryDevice implements driver.Context.
func (c *mlx5Context) QueryDevice() (ib.DeviceAttr, error) {
	a, err := c.Context.QueryDevice()
	if err != nil {
		return a, err
	}
	a.Caps |= ib.CapUC | ib.CapUD | ib.CapResizeCQ
	if c.info.maxSRQSlots == 0 {
		a.Caps &^= ib.CapSRQ
	}
	if c.hasFrames() {
		a.Caps |= ib.CapRawPacket
		a.MinFrameInline = c.info.minInline
	} else {
		a.Caps &^= ib.CapFlowSteering | ib.CapFrameChecksum
	}
	if c.OptionalAccess() {
		a.Caps |= ib.CapRelaxedOrdering
	}
	if c.dmaBufs() {
		a.Caps |= ib.CapDMABuf
	}
	a.MaxInline = c.maxInline()
	a.MaxSGE = min(a.MaxSGE, c.maxSGE())
	a.MaxSGERead = min(a.MaxSGERead, a.MaxSGE)
	return a, nil
}

// askDMABufs finds out by trying: the kernel tells it in no other way. Without a protection domain to try it in, there are none.
func (c *mlx5Context) askDMABufs() bool {
	p, err := c.AllocPD()
	if err != nil {
		return false
	}
	takes := p.(*pd).TakesDMABufs()
	p.Close() // if it fails, the context's end does it
	return takes
}

// hasFrames reports whether there can be raw packet queue pairs: they need Ethernet, and completions that name queue pairs by index, as
// those of frames do not have their number.
func (c *mlx5Context) hasFrames() bool {
	if !c.info.byIndex {
		return false
	}
	for port := range c.info.ports {
		if p, err := c.QueryPort(port + 1); err == nil && p.LinkLayer == ib.LinkEthernet {
			return true
		}
	}
	return false
}

type pd struct {
	uverbs.WindowPD
	c *mlx5Context
}

// AllocPD implements driver.Context.
func (c *mlx5Context) AllocPD() (driver.PD, error) {
	var resp abi.Mlx5AllocPDResp // the device's number of it, which only what is left out would need
	p, err := c.Context.AllocPD(uverbs.Bytes(&resp))
	if err != nil {
		return nil, err
	}
	return &pd{uverbs.WindowPD{PD: p, W: c.windows}, c}, nil
}
