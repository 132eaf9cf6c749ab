//go:build linux

package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/ringside-rdma/ringside/internal/netlink"
	"golang.org/x/sys/unix"
)

// Requests to the kernel's network configuration (rtnetlink): only those that the wiring needs. Each is what the ip command
// named in its comment sends.

const create = unix.NLM_F_CREATE | unix.NLM_F_EXCL

// vethInfoPeer is VETH_INFO_PEER of include/uapi/linux/veth.h.
const vethInfoPeer = 1

func ifinfo(index int, flags, change uint32) []byte {
	b := make([]byte, 4, unix.SizeofIfInfomsg) // family, type
	b = binary.NativeEndian.AppendUint32(b, uint32(index))
	b = binary.NativeEndian.AppendUint32(b, flags)
	return binary.NativeEndian.AppendUint32(b, change)
}

// ip link add A address MAC type veth peer name B address MAC
func addVeth(a, b end) netlink.Message {
	one := func(m netlink.Message, e end) netlink.Message {
		return m.Text(unix.IFLA_IFNAME, e.netdev).Attr(unix.IFLA_ADDRESS, e.mac[:])
	}
	return one(netlink.NewMessage(unix.RTM_NEWLINK, create, ifinfo(0, 0, 0)), a).
		Nested(unix.IFLA_LINKINFO, func(m netlink.Message) netlink.Message {
			return m.Text(unix.IFLA_INFO_KIND, "veth").Nested(unix.IFLA_INFO_DATA, func(m netlink.Message) netlink.Message {
				return m.Nested(vethInfoPeer, func(m netlink.Message) netlink.Message { return one(append(m, ifinfo(0, 0, 0)...), b) })
			})
		})
}

// ip link del dev INDEX
func delNetdev(index int) netlink.Message {
	return netlink.NewMessage(unix.RTM_DELLINK, 0, ifinfo(index, 0, 0))
}

// ip link set INDEX up mtu MTU; an MTU of 0 stays as it is
func setUp(index int, mtu uint32) netlink.Message {
	m := netlink.NewMessage(unix.RTM_NEWLINK, 0, ifinfo(index, unix.IFF_UP, unix.IFF_UP))
	if mtu != 0 {
		m = m.U32(unix.IFLA_MTU, mtu)
	}
	return m
}

// ip addr add ADDRESS dev INDEX
func addAddress(index int, p netip.Prefix) netlink.Message {
	body := []byte{unix.AF_INET, byte(p.Bits()), 0, 0}
	body = binary.NativeEndian.AppendUint32(body, uint32(index))
	a := p.Addr().As4()
	return netlink.NewMessage(unix.RTM_NEWADDR, create, body).Attr(unix.IFA_LOCAL, a[:]).Attr(unix.IFA_ADDRESS, a[:])
}

// ip neigh replace ADDRESS lladdr MAC dev INDEX nud permanent
func setNeighbour(index int, addr netip.Addr, mac [6]byte) netlink.Message {
	body := binary.NativeEndian.AppendUint32([]byte{unix.AF_INET, 0, 0, 0}, uint32(index))
	body = binary.NativeEndian.AppendUint16(body, unix.NUD_PERMANENT)
	a := addr.As4()
	return netlink.NewMessage(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, append(body, 0, 0)).
		Attr(unix.NDA_DST, a[:]).Attr(unix.NDA_LLADDR, mac[:])
}

// ip route add TO/32 dev INDEX src FROM table TABLE
func addRoute(index int, from, to netip.Addr, table uint8) netlink.Message {
	body := []byte{unix.AF_INET, 32, 0, 0, table, unix.RTPROT_BOOT, unix.RT_SCOPE_LINK, unix.RTN_UNICAST, 0, 0, 0, 0}
	f, t := from.As4(), to.As4()
	return netlink.NewMessage(unix.RTM_NEWROUTE, create, body).
		Attr(unix.RTA_DST, t[:]).U32(unix.RTA_OIF, uint32(index)).Attr(unix.RTA_PREFSRC, f[:])
}

// A rule is a line of `ip rule`: traffic of this host from one address to another, or all if they are not valid, looks up
// its route in a table.
type rule struct {
	priority uint32
	from, to netip.Addr
	table    uint8
}

// ip rule add (RTM_NEWRULE) or del (RTM_DELRULE) pref PRIORITY iif lo from FROM to TO lookup TABLE
func (r rule) message(typ uint16, flags uint16) netlink.Message {
	body := []byte{unix.AF_INET, 0, 0, 0, r.table, 0, 0, unix.FR_ACT_TO_TBL, 0, 0, 0, 0}
	if r.from.IsValid() {
		body[1], body[2] = 32, 32
	}
	m := netlink.NewMessage(typ, flags, body).U32(unix.FRA_PRIORITY, r.priority)
	if r.from.IsValid() {
		f, t := r.from.As4(), r.to.As4()
		m = m.Text(unix.FRA_IIFNAME, "lo").Attr(unix.FRA_DST, t[:]).Attr(unix.FRA_SRC, f[:])
	}
	return m
}

func (r rule) add() netlink.Message    { return r.message(unix.RTM_NEWRULE, create) }
func (r rule) remove() netlink.Message { return r.message(unix.RTM_DELRULE, 0) }

// netdevIndex returns the index of a network device.
func netdevIndex(name string) (int, error) {
	text, err := os.ReadFile("/sys/class/net/" + name + "/ifindex")
	if err != nil {
		return 0, fmt.Errorf("no network device %s: %w", name, err)
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}
