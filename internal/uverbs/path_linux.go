package uverbs

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/rdmacm"
	"github.com/ringside-rdma/ringside/internal/remedy"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// explainPath completes the kernel's refusal of an address: where the fault is this side's, it says so, and what to do. The kernel
// itself answers alike for a port that is down, an empty slot of the GID table, and a peer that is not there.
func (c *Context) explainPath(err error, h *ib.AHAttr) error {
	var ce *CmdError
	if !errors.As(err, &ce) || errors.Is(err, driver.ErrDeviceRemoved) {
		return err
	}
	p, perr := c.QueryPort(h.Port)
	if perr != nil {
		return err
	}
	if text := remedy.PortDown(h.Port, &p, c.netDevs()); text != "" {
		ce.Hint = text
		return err
	}
	gids, gerr := c.GIDs(h.Port)
	if gerr != nil || c.Link == ib.LinkInfiniBand && h.DGID.IsZero() {
		return err
	}
	switch i := slices.IndexFunc(gids, func(g ib.GIDEntry) bool { return g.Index == h.SGIDIndex }); {
	case i < 0:
		ce.Hint = remedy.NoGIDAt(h.Port, h.SGIDIndex, gids, c.netDevs())
	case gids[i].GID.Addr().IsLinkLocalUnicast() && c.Link == ib.LinkEthernet && (ce.Errno == unix.EHOSTUNREACH || ce.Errno == unix.ENETUNREACH):
		ce.Hint = fmt.Sprintf("the GID at index %d is a link-local address, %s: does its net device have that? `ip address add ADDRESS/PREFIX dev %s` gives it another",
			h.SGIDIndex, gids[i].GID.Addr(), gids[i].NetDev)
	}
	return err
}

// explainNet does the same for the connection manager, whose addresses are the net device's.
func (c *Context) explainNet(err error) error {
	var oe *rdmacm.OpError
	if !errors.As(err, &oe) || !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EHOSTUNREACH) && !errors.Is(err, unix.ENETDOWN) {
		return err
	}
	if p, perr := c.QueryPort(1); perr == nil {
		if text := remedy.PortDown(1, &p, c.netDevs()); text != "" {
			return fmt.Errorf("%w (%s)", err, text)
		}
	}
	return err
}

// netDevs are the device's net devices, as far as the kernel tells them.
func (c *Context) netDevs() []string {
	list, _ := Devices()
	for _, d := range list {
		if d.Name == c.device {
			return d.NetDevs
		}
	}
	return nil
}
