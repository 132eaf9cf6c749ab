//go:build linux

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/ringside-rdma/ringside/internal/netlink"
	"github.com/ringside-rdma/ringside/internal/nldev"
	"golang.org/x/sys/unix"
)

// An end is one of the two network devices of a veth pair.
type end struct {
	netdev string
	mac    [6]byte
	addr   netip.Addr
	table  uint8 // the routing table with the way from this end to the other
}

// A pair is a veth pair with a device of one driver on each end.
type pair struct {
	driver string // rxe or siw
	ends   [2]end
}

// A wiring is a pair for each driver: rxe0 and rxe1 on the ends of the first, siw0 and siw1 on those of the second. They do not
// share one, because the connection manager takes the device of a network device that was made first, and no other.
//
// Both addresses of a pair belong to the same host, so its routing would keep what one sends to the other within itself, and rxe
// then refuses the address. Rules that precede the one for local addresses send it over the pair. rxe uses the routes and sockets
// of the initial network namespace only (Linux 6.1), so a namespace for each end is no way out.
type wiring [2]pair

const (
	wiringMTU   = 9000
	wiringBits  = 24
	localBefore = 0   // the priority of the rule for local addresses as the kernel sets it
	localAfter  = 100 // and while the wiring is up
)

// newWiring numbers the network devices, from 0 on, after prefix; it differs between machine and host so as not to meet
// another's veth0.
func newWiring(prefix string) wiring {
	var w wiring
	for i, driver := range []string{"rxe", "siw"} {
		w[i].driver = driver
		for j := range w[i].ends {
			n := byte(2*i + j)
			w[i].ends[j] = end{
				netdev: fmt.Sprintf("%s%d", prefix, n),
				mac:    [6]byte{2, 0, 0, 0, 0, n + 1},
				addr:   netip.AddrFrom4([4]byte{10, byte(77 + i), 0, byte(j + 1)}),
				table:  101 + n,
			}
		}
	}
	return w
}

func (w *wiring) links() []rdmaLink {
	var links []rdmaLink
	for _, p := range w {
		for i, e := range p.ends {
			links = append(links, rdmaLink{fmt.Sprintf("%s%d", p.driver, i), p.driver, e.netdev})
		}
	}
	return links
}

func (w *wiring) rules() []rule {
	var rules []rule
	for i, p := range w {
		a, b := p.ends[0], p.ends[1]
		rules = append(rules,
			rule{priority: uint32(10 + 2*i), from: a.addr, to: b.addr, table: a.table},
			rule{priority: uint32(11 + 2*i), from: b.addr, to: a.addr, table: b.table})
	}
	return rules
}

// left reports whether a network device of the wiring is there.
func (w *wiring) left() bool {
	for _, p := range w {
		if _, err := netdevIndex(p.ends[0].netdev); err == nil {
			return true
		}
	}
	return false
}

func localRule(priority uint32) rule { return rule{priority: priority, table: unix.RT_TABLE_LOCAL} }

// up makes the pairs, their addresses, their routes and the RDMA devices. What an error leaves, down removes.
func (w *wiring) up() error {
	c, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.Close()
	// The stricter of this and the device's own setting counts, and strict means that nothing of ours may come in.
	if all, _ := os.ReadFile("/proc/sys/net/ipv4/conf/all/rp_filter"); strings.TrimSpace(string(all)) == "1" {
		return errors.New("the host drops packets from its own addresses: `sysctl net.ipv4.conf.all.rp_filter=2` lets them pass")
	}
	for _, p := range w {
		if err := c.Do(addVeth(p.ends[0], p.ends[1])); err != nil {
			return fmt.Errorf("add the network devices %s and %s: %w", p.ends[0].netdev, p.ends[1].netdev, err)
		}
		for i, e := range p.ends {
			if err := e.up(c, p.ends[1-i]); err != nil {
				return fmt.Errorf("set up the network device %s: %w", e.netdev, err)
			}
		}
	}
	// The rule for local addresses is moved only once it has a second: traffic of the host never misses it.
	messages := []netlink.Message{localRule(localAfter).add()}
	for _, r := range w.rules() {
		messages = append(messages, r.add())
	}
	for _, m := range append(messages, localRule(localBefore).remove()) {
		if err := c.Do(m); err != nil {
			return fmt.Errorf("set up routing rules: %w", err)
		}
	}
	rdma, err := nldev.Dial()
	if err != nil {
		return fmt.Errorf("%w: the kernel has no RDMA, or the module ib_core is not loaded", err)
	}
	defer rdma.Close()
	for _, l := range w.links() {
		if err := l.add(rdma); err != nil {
			return err
		}
	}
	return nil
}

func (e *end) up(c *netlink.Conn, other end) error {
	index, err := netdevIndex(e.netdev)
	if err != nil {
		return err
	}
	for name, value := range map[string]string{
		"ipv4/conf/" + e.netdev + "/rp_filter":    "0", // what comes in here comes from an address of our own
		"ipv4/conf/" + e.netdev + "/accept_local": "1",
		"ipv6/conf/" + e.netdev + "/disable_ipv6": "1", // no autoconfiguration traffic, and the same GIDs every time
	} {
		if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	for _, m := range []netlink.Message{
		setUp(index, wiringMTU),
		addAddress(index, netip.PrefixFrom(e.addr, wiringBits)),
		setNeighbour(index, other.addr, other.mac),
		addRoute(index, e.addr, other.addr, e.table),
	} {
		if err := c.Do(m); err != nil {
			return err
		}
	}
	return nil
}

// down removes what up has made, as far as it is there: also what a run that was killed has left.
func (w *wiring) down() error {
	c, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.Close()
	var errs []error
	if rdma, err := nldev.Dial(); err == nil { // else there are no devices either
		defer rdma.Close()
		for _, l := range slices.Backward(w.links()) {
			here, err := ours(rdma, l)
			if here && err == nil {
				err = l.remove(rdma)
			}
			errs = append(errs, err)
		}
	}
	for _, p := range w {
		if index, err := netdevIndex(p.ends[0].netdev); err == nil {
			errs = append(errs, c.Do(delNetdev(index))) // takes the other end, addresses, neighbours and routes along
		}
	}
	absent := func(err error) error {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EAFNOSUPPORT) {
			return nil
		}
		return err
	}
	errs = append(errs, absent(c.Do(localRule(localBefore).add())))
	for _, r := range w.rules() {
		errs = append(errs, absent(c.Do(r.remove())))
	}
	errs = append(errs, absent(c.Do(localRule(localAfter).remove())))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove the RDMA links and their network devices: %w", err)
	}
	return nil
}

// ours is whether a device of the link's name stands on the link's network device, and not on another.
func ours(c *nldev.Conn, l rdmaLink) (bool, error) {
	list, err := c.Devices()
	if err != nil {
		return false, err
	}
	for i := range list {
		if list[i].Name == l.name {
			err := c.NetDevs(&list[i])
			return slices.Contains(list[i].NetDevs, l.netdev), err
		}
	}
	return false, nil
}
