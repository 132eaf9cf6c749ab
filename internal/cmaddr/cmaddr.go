// Package cmaddr finds the IP address at which a device's connection manager is reached.
package cmaddr

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/ringside-rdma/ringside/internal/remedy"
	"github.com/ringside-rdma/ringside/verbs"
)

// Of returns the address to be reached at by the connection manager: one of the device's network interfaces, near itself if
// it is one, then of near's IP version (IPv4 for loopback addresses).
func Of(v *verbs.Context, near netip.Addr) (netip.Addr, error) {
	near = near.Unmap().WithZone("")
	var best netip.Addr
	score := -1
	devs := v.Choice().Device.NetDevs
	for _, name := range devs {
		nif, err := net.InterfaceByName(name)
		if err != nil {
			continue
		}
		addrs, err := nif.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			ipnet, ok := a.(*net.IPNet)
			if !ok {
				continue
			}
			ip, ok := netip.AddrFromSlice(ipnet.IP)
			ip = ip.Unmap()
			if !ok || ip.IsLinkLocalUnicast() { // these would need a zone, which the peer cannot know
				continue
			}
			n := 0
			if ip == near {
				n |= 2
			}
			if ip.Is6() == (near.Is6() && !near.IsLoopback()) {
				n |= 1
			}
			if n > score {
				best, score = ip, n
			}
		}
	}
	if score < 0 {
		return best, fmt.Errorf("device %s stands on %v, and none of these has an IP address: %s", v.Name(), devs, remedy.NoAddress(devs))
	}
	return best, nil
}
