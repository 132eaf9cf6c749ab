// Package remedy has the words for what is wrong with a device's port, and what to do about it.
package remedy

import (
	"fmt"
	"strings"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// PortDown says that a port cannot be used for its state, and what to do; it is empty if the port is active. netDevs are the
// device's net devices, as far as they are known.
func PortDown(port uint8, a *ib.PortAttr, netDevs []string) string {
	if a.State == ib.PortActive {
		return ""
	}
	return fmt.Sprintf("port %d is %s: %s", port, a.State, PortRemedy(a.LinkLayer == ib.LinkInfiniBand, netDevs))
}

// PortRemedy is what makes a port active.
func PortRemedy(infiniBand bool, netDevs []string) string {
	if infiniBand {
		return "plug in its cable, or run a subnet manager"
	}
	return fmt.Sprintf("`ip link set %s up`, or plug in its cable", nameOf(netDevs))
}

// NoAddress is what gives a device a GID, or an address for its connection manager: netDevs are its net devices.
func NoAddress(netDevs []string) string {
	return fmt.Sprintf("`ip address add ADDRESS/PREFIX dev %s` gives it one", nameOf(netDevs))
}

// nameOf is a device's net device in a command: the first, or a word in its place.
func nameOf(netDevs []string) string {
	if len(netDevs) == 0 {
		return "NETDEV"
	}
	return netDevs[0]
}

// NoGIDAt says that a slot of a port's GID table is empty, and which are not.
func NoGIDAt(port uint8, index int, gids []ib.GIDEntry, netDevs []string) string {
	if len(gids) == 0 {
		return fmt.Sprintf("port %d has no GID: %s", port, NoAddress(netDevs))
	}
	const most = 4
	var has []string
	for i, g := range gids {
		if i == most {
			has = append(has, fmt.Sprintf("%d more", len(gids)-most))
			break
		}
		has = append(has, fmt.Sprintf("%d (%s, %v)", g.Index, g.GID.Addr(), g.Type))
	}
	return fmt.Sprintf("port %d has no GID at index %d: it has %s", port, index, strings.Join(has, ", "))
}
