package verbs

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/remedy"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// SourceGID returns the entry of a port's GID table to send from. near is an address that is to be reached, or from which
// the peer is reached by other means; it may be the zero Addr. The GID that is near's own address comes first, then RoCE v2
// before other types, near's IP version (IPv4 if it is unknown, or a loopback address) before the other, and addresses of
// wide reach before link-local ones: both ends of a connection must have the same type and IP version.
//
// A software NIC's GID for other software NICs of the same host comes before all; SourceGIDOf finds its others.
func (c *Context) SourceGID(port uint8, near netip.Addr) (ib.GIDEntry, error) {
	return c.sourceGID(port, near, nil)
}

// SourceGIDOf is SourceGID among the GIDs of one type.
func (c *Context) SourceGIDOf(port uint8, near netip.Addr, t ib.GIDType) (ib.GIDEntry, error) {
	return c.sourceGID(port, near, func(g ib.GIDEntry) bool { return g.Type != t })
}

func (c *Context) sourceGID(port uint8, near netip.Addr, skip func(ib.GIDEntry) bool) (ib.GIDEntry, error) {
	gids, err := c.GIDs(port)
	if err != nil {
		return ib.GIDEntry{}, err
	}
	if skip != nil {
		gids = slices.DeleteFunc(gids, skip)
	}
	i := bestGID(gids, near)
	if i < 0 {
		return ib.GIDEntry{}, c.err("query_gid", fmt.Errorf("port %d has no GID: %s", port, remedy.NoAddress(c.choice.Device.NetDevs)))
	}
	return gids[i], nil
}

// UDPPort returns the UDP port at which packets for a RoCEv2 GID are received: the standard one, 4791, but for a software NIC
// on a host where somebody else has it. A software NIC begins to receive from the network, at that GID's address, when it is
// asked, or when a queue pair is connected from the GID. Peers must be told (qp.Endpoint.UDPPort, ib.AHAttr.UDPPort).
func (c *Context) UDPPort(port uint8, gidIndex int) (uint16, error) {
	p, ok := c.drv.(driver.UDPPorter)
	if !ok {
		return 4791, nil
	}
	n, err := p.UDPPort(port, gidIndex)
	return n, c.err("query_gid", err)
}

// ProbePath finds out whether packets pass, both ways, between this device and a queue pair of a peer's device, and how long they
// may be: it returns the largest path MTU, up to most, that they have room for. The queue pair may be in any state; nothing of it
// changes. An error that matches ErrUnreachable says that nothing passes, and what to do about it; that takes 1.5 s at most. Only
// software NICs can probe, and only each other (to.UDPPort is set): all else answers errors.ErrUnsupported. Safe for concurrent use.
func (c *Context) ProbePath(ctx context.Context, to *ib.AHAttr, qpn ib.QPN, most ib.MTU) (ib.MTU, error) {
	p, ok := c.drv.(driver.PathProber)
	if !ok || to.UDPPort == 0 {
		return 0, c.err("probe_path", errors.ErrUnsupported)
	}
	m, err := p.ProbePath(ctx, to, qpn, most)
	return m, c.err("probe_path", err)
}

// bestGID returns the place of the best entry, or -1.
func bestGID(gids []ib.GIDEntry, near netip.Addr) int {
	near = near.Unmap()
	wantIPv6 := near.Is6() && !near.IsLoopback()
	best, score := -1, -1
	for i := range gids {
		g := &gids[i]
		if g.GID.IsZero() {
			continue
		}
		a := g.GID.Addr()
		n := 0
		if g.Type == ib.GIDSoft {
			n |= 16
		}
		if near.IsValid() && a == near.WithZone("") {
			n |= 8
		}
		if g.Type == ib.GIDRoCEv2 {
			n |= 4
		}
		if a.Is6() == wantIPv6 {
			n |= 2
		}
		if !a.IsLinkLocalUnicast() {
			n |= 1
		}
		if n > score {
			best, score = i, n
		}
	}
	return best
}
