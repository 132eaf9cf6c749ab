package verbs

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// SourceGID returns the entry of a port's GID table to send from. near is an address that is to be reached, or from which
// the peer is reached by other means; it may be the zero Addr. The GID that is near's own address comes first, then RoCE v2
// before other types, near's IP version (IPv4 if it is unknown, or a loopback address) before the other, and addresses of
// wide reach before link-local ones: both ends of a connection must have the same type and IP version.
func (c *Context) SourceGID(port uint8, near netip.Addr) (ib.GIDEntry, error) {
	gids, err := c.GIDs(port)
	if err != nil {
		return ib.GIDEntry{}, err
	}
	i := bestGID(gids, near)
	if i < 0 {
		return ib.GIDEntry{}, c.err("query_gid", fmt.Errorf("port %d: %w", port, errNoGID))
	}
	return gids[i], nil
}

var errNoGID = errors.New("the GID table is empty: does its net device have an address, and is it up?")

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
