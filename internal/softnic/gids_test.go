package softnic

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// fakeNet is a host's net devices, as a gidTable sees them, and the events that follow.
type fakeNet struct {
	list   []gidSlot
	down   map[string]bool
	err    error
	events []ib.EventType
}

func (f *fakeNet) table() *gidTable {
	return &gidTable{system: func() ([]gidSlot, map[string]bool, error) { return slices.Clone(f.list), f.down, f.err },
		raise: func(e ib.EventType) { f.events = append(f.events, e) }}
}

func fakeAddr(addr, dev string, up, running bool) gidSlot {
	return gidSlot{addr: netip.MustParseAddr(addr), mtu: 1500, netDev: dev, there: up, running: up && running}
}

// An address that is local to a site looks like the GID of a NIC, but for the site.
func TestReachWithinSite(t *testing.T) {
	n := openNIC(t, false)
	n.gids.mu.Lock()
	n.gids.fixed, n.gids.slots = true, []gidSlot{fakeAddr("fd99:1234:5678:1::2", "eth0", true, true), fakeAddr("10.0.0.1", "eth0", true, true)}
	n.gids.mu.Unlock()
	for addr, path := range map[string]string{"fd99:1234:5678:1::1": pathUDP, "fd99:1234:5678:ffff::1": pathUDP, "2001:db8::1": pathUDP, "10.0.0.9": pathUDP,
		"fd99:1234:5679:1::1": "", "fd00::ffff:0a00:0001": ""} {
		got, err := n.CheckReach(t.Context(), ib.GIDFromAddr(netip.MustParseAddr(addr)))
		if got != path || (path == "") != errors.Is(err, driver.ErrUnreachable) {
			t.Errorf("%s: path %q, error %v; want %q", addr, got, err, path)
		}
	}
}

// What becomes of devices and addresses changes the table, the state of the port, and is told of, once.
func TestGIDEvents(t *testing.T) {
	const gidChange, portErr, portActive = ib.EventGIDChange, ib.EventPortErr, ib.EventPortActive
	lo := fakeAddr("127.0.0.1", "lo", true, true)
	eth := fakeAddr("10.0.0.1", "eth0", true, true)
	f := &fakeNet{list: []gidSlot{lo, eth}}
	tab := f.table()
	now := time.Now()
	look := func() {
		now = now.Add(time.Minute)
		tab.look(now)
	}
	look()
	if len(f.events) != 0 || tab.state() != ib.PortActive {
		t.Fatalf("at first: %v, %v", f.events, tab.state())
	}
	tab.slots[1].port = new(netPort) // in use
	for _, step := range []struct {
		what   string
		list   []gidSlot
		down   string
		err    error
		events []ib.EventType
		state  ib.PortState
		there  []int // indices
		gone   bool  // the address that is used
	}{
		{what: "nothing", list: []gidSlot{lo, eth}, state: ib.PortActive, there: []int{1, 2}},
		{what: "no carrier", list: []gidSlot{lo, fakeAddr("10.0.0.1", "eth0", true, false)}, events: []ib.EventType{portErr}, state: ib.PortDown, there: []int{1, 2}},
		{what: "carrier", list: []gidSlot{lo, eth}, events: []ib.EventType{portActive}, state: ib.PortActive, there: []int{1, 2}},
		{what: "down", list: []gidSlot{lo, fakeAddr("10.0.0.1", "eth0", false, false)}, down: "eth0", events: []ib.EventType{gidChange, portErr}, state: ib.PortDown, there: []int{1}},
		{what: "the system does not say", err: errors.New("no"), state: ib.PortDown, there: []int{1}},
		{what: "up", list: []gidSlot{lo, eth}, events: []ib.EventType{gidChange, portActive}, state: ib.PortActive, there: []int{1, 2}},
		{what: "down, without its addresses", list: []gidSlot{lo}, down: "eth0", events: []ib.EventType{gidChange, portErr}, state: ib.PortDown, there: []int{1}},
		{what: "up without them", list: []gidSlot{lo}, state: ib.PortDown, there: []int{1}, gone: true},
		{what: "with another", list: []gidSlot{fakeAddr("10.0.0.2", "eth0", true, true), lo}, events: []ib.EventType{gidChange}, state: ib.PortDown, there: []int{1, 3}, gone: true},
		{what: "with both", list: []gidSlot{fakeAddr("10.0.0.2", "eth0", true, true), lo, eth}, events: []ib.EventType{gidChange, portActive}, state: ib.PortActive, there: []int{1, 2, 3}},
		{what: "without the device", list: []gidSlot{lo}, events: []ib.EventType{gidChange, portErr}, state: ib.PortDown, there: []int{1}, gone: true},
	} {
		f.list, f.err, f.down, f.events = step.list, step.err, map[string]bool{step.down: true}, nil
		look()
		var there []int
		for i, s := range tab.slots {
			if s.there {
				there = append(there, i+1)
			}
		}
		if gone := !tab.slots[1].gone.IsZero(); !slices.Equal(f.events, step.events) || tab.state() != step.state || !slices.Equal(there, step.there) || gone != step.gone {
			t.Errorf("%s: events %v, want %v; %v, want %v; at %v, want %v; gone %v", step.what, f.events, step.events, tab.state(), step.state, there, step.there, gone)
		}
	}
	// A device that nobody uses concerns the table only.
	f.list, f.events = []gidSlot{lo, eth}, nil
	tab.slots[1].port = nil
	look()
	if fmt.Sprint(f.events) != fmt.Sprint([]ib.EventType{gidChange}) || tab.state() != ib.PortActive {
		t.Errorf("%v, %v", f.events, tab.state())
	}
}

// Of several devices that have an address, the one that can be used has it, in whatever order the system names them.
func TestAddressOfTwo(t *testing.T) {
	down, up, running := fakeAddr("10.0.0.1", "down", false, false), fakeAddr("10.0.0.1", "up", true, false), fakeAddr("10.0.0.1", "running", true, true)
	for _, c := range []struct {
		list []gidSlot
		want string
	}{
		{[]gidSlot{down}, "down"},
		{[]gidSlot{up, down}, "up"},
		{[]gidSlot{down, up}, "up"},
		{[]gidSlot{running, up, down}, "running"},
		{[]gidSlot{down, up, running}, "running"},
		{[]gidSlot{up, running}, "running"},
		{[]gidSlot{running, down}, "running"},
	} {
		f := &fakeNet{list: []gidSlot{running}}
		tab := f.table()
		now := time.Now()
		tab.look(now)
		tab.slots[0].port = new(netPort)
		f.list = c.list
		tab.look(now.Add(time.Minute))
		if s := tab.slots[0]; len(tab.slots) != 1 || s.netDev != c.want || s.there != (c.want != "down") || s.running != (c.want == "running") || s.port == nil || !s.gone.IsZero() {
			t.Errorf("%+v: %+v, want that of %s", c.list, tab.slots, c.want)
		}
	}
}

// If the system says of one device only which addresses it has, that is not the host's table.
func TestAddressesOfSome(t *testing.T) {
	ifs := []net.Interface{{Name: "lo", Flags: net.FlagUp | net.FlagRunning}, {Name: "eth0", Flags: net.FlagUp}, {Name: "eth1"}}
	no, failing := errors.New("no"), ""
	addrs := func(dev *net.Interface) ([]net.Addr, error) {
		if dev.Name == failing {
			return nil, no
		}
		return []net.Addr{&net.IPNet{IP: net.ParseIP(map[string]string{"lo": "127.0.0.1", "eth0": "10.0.0.1", "eth1": "10.0.0.2"}[dev.Name]).To4(), Mask: net.CIDRMask(8, 32)}}, nil
	}
	list, down, err := addrsOf(ifs, addrs)
	if err != nil || len(list) != 3 || list[1].addr.String() != "10.0.0.1" || !list[1].there || list[1].running || list[2].there || down["eth0"] || !down["eth1"] {
		t.Errorf("%+v, %v, %v", list, down, err)
	}
	failing = "eth0"
	if list, down, err := addrsOf(ifs, addrs); list != nil || down != nil || !errors.Is(err, no) {
		t.Errorf("%+v, %v, %v", list, down, err)
	}
}

// Connections from an address end when it has been gone for long enough, and not when it comes back before that.
func TestAddressGoes(t *testing.T) {
	x := newSimRestart(t, 1, true)
	b := x.open(1)
	ea, eb := x.pair(b)
	talk(x, ea, eb, 1, 1)
	ea.recv(7, ea.sge(0, 64))
	eth := fakeAddr("10.0.0.1", "eth0", true, true)
	f := &fakeNet{list: []gidSlot{eth}}
	tab := f.table()
	x.a.gids.fixed, x.a.gids.system, x.a.gids.raise = false, tab.system, tab.raise
	now := time.Now()
	const is, isNot, unknown = 0, 1, 2
	look := func(after time.Duration, there int) time.Duration {
		now = now.Add(after)
		switch f.list, f.err = nil, nil; there {
		case is:
			f.list = []gidSlot{eth}
		case unknown:
			f.err = errors.New("no")
		}
		next := x.a.lookAtNet(now)
		for x.net.Step() {
		}
		if next.IsZero() {
			return 0
		}
		return next.Sub(now)
	}
	state := func() ib.QPState {
		a, _ := ea.q.Query()
		return a.State
	}
	for i, step := range []struct {
		after time.Duration
		there int
		next  time.Duration
		state ib.QPState
	}{
		{0, is, 0, ib.RTS},
		{time.Hour, isNot, gidGrace, ib.RTS},
		{gidGrace / 2, isNot, gidGrace / 2, ib.RTS},
		{gidGrace / 4, is, 0, ib.RTS},
		{time.Hour, is, 0, ib.RTS},
		{time.Hour, unknown, gidAge, ib.RTS},
		{gidAge, unknown, gidAge, ib.RTS},
		{time.Hour, isNot, gidGrace, ib.RTS},
		{gidGrace, unknown, gidAge, ib.RTS},
		{gidAge, is, 0, ib.RTS},
		{time.Hour, isNot, gidGrace, ib.RTS},
		{gidGrace, isNot, 0, ib.Err},
	} {
		if next := look(step.after, step.there); next != step.next || state() != step.state {
			t.Fatalf("step %d: next after %v, want %v; %v, want %v", i, next, step.next, state(), step.state)
		}
	}
	if wc := ea.poll(); wc.ID != 7 || wc.Status != ib.WCFlushErr {
		t.Errorf("%+v", wc)
	}
	ea.send(ib.SendWR{ID: 8, Opcode: ib.OpSend, SGEs: ea.sge(0, 8)})
	over(t, ea, 1)
	x.a.gids.fixed = true
}
