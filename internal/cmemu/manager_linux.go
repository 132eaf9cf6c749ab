package cmemu

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mlx5emu"
	"github.com/ringside-rdma/ringside/internal/softnic"
)

// A Manager is the rdma_cm of a host whose devices are emulated. It is safe for concurrent use.
type Manager struct {
	devices []*mlx5emu.Device
	over    chan struct{} // closed by Close
	follows sync.WaitGroup

	// mu guards all that follows, and the channels and IDs but for what they say. It is taken where a software NIC calls us with its
	// locks held: no NIC is called with it.
	mu       sync.Mutex
	closed   bool
	follow   bool // the devices' addresses are followed
	channels map[*Channel]bool
	ids      map[uint32]*id // by number, which all channels share
	free     uint32         // all numbers below have an ID
	ports    map[portKey][]*id
	lastPort uint16 // that was given to one who does not care
}

// What there can be at a time.
const (
	maxIDs        = 1 << 16 // of a Manager: librdmacm knows no numbers beyond
	maxChannelIDs = 1 << 14
	maxEvents     = 1 << 14 // of a channel, that commands and requests add to; what becomes of connections comes on top
	maxChannels   = 1 << 12
	maxBacklog    = 1024 // the kernel's net.rdma_ucm.max_backlog
)

// ErrClosed is the error of a Manager that was closed.
var ErrClosed = driver.ErrClosed

// ErrTooMany is the error of a Manager that has as many channels as it can have.
var ErrTooMany = errors.New("cmemu: too many channels")

// New makes the manager of a host with these devices: of several at an address it takes the first that has the UDP port for it. The
// devices stay the caller's, and are closed after the Manager.
func New(devices []*mlx5emu.Device) *Manager {
	return &Manager{devices: slices.Clone(devices), over: make(chan struct{}), channels: map[*Channel]bool{}, ids: map[uint32]*id{}, ports: map[portKey][]*id{}}
}

// Open makes a channel whose client's memory is mem.
func (m *Manager) Open(mem Memory) (*Channel, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
		return nil, ErrClosed
	case len(m.channels) >= maxChannels:
		return nil, ErrTooMany
	}
	c := &Channel{m: m, mem: mem, ready: make(chan struct{}, 1), ids: map[*id]bool{}}
	m.channels[c] = true
	return c, nil
}

// Close closes all channels, and lets no new ones be opened. It may be called again.
func (m *Manager) Close() error {
	m.mu.Lock()
	if !m.closed {
		m.closed = true
		close(m.over)
	}
	open := make([]*Channel, 0, len(m.channels))
	for c := range m.channels {
		open = append(open, c)
	}
	m.mu.Unlock()
	for _, c := range open {
		c.Close()
	}
	m.follows.Wait()
	return nil
}

// followAddresses has those who listen at all addresses do so at new ones, too, from the first of them on.
func (m *Manager) followAddresses() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || m.follow {
		return
	}
	m.follow = true
	for _, d := range m.devices {
		m.follows.Go(func() {
			for {
				select {
				case <-d.GIDsChanged():
					m.listenAnew()
				case <-m.over:
					return
				}
			}
		})
	}
}

// listenAnew has who listens at all addresses look which there are.
func (m *Manager) listenAnew() {
	m.mu.Lock()
	var all []*id
	for _, x := range m.ids {
		if x.state == listening && x.at.dev == nil {
			all = append(all, x)
		}
	}
	m.mu.Unlock()
	for _, x := range all {
		x.run.Lock()
		m.mu.Lock()
		dead := x.dead
		m.mu.Unlock()
		if !dead {
			x.listenMore()
		}
		x.run.Unlock()
	}
}

// A place is an address of a device that connections are managed at. The zero value is none.
type place struct {
	dev *mlx5emu.Device
	softnic.CMPort
}

// placeAt returns the place of an address: of several, one that peers find. It calls NICs.
func (m *Manager) placeAt(a netip.Addr) (at place, errno syscall.Errno) {
	if a.Is4In6() { // of family AF_INET6: no net device has it
		return place{}, unix.ENODEV
	}
	for _, d := range m.devices {
		p, err := d.CMPort(a)
		if err != nil {
			continue
		}
		if p.Standard() {
			return place{d, p}, 0
		}
		if at.dev == nil {
			at = place{d, p}
		}
	}
	if at.dev == nil {
		return place{}, unix.ENODEV
	}
	return at, 0
}

// places returns the places of all addresses of a kind. It fails if there are addresses, and all are another's.
func (m *Manager) places(like func(netip.Addr) bool) ([]place, syscall.Errno) {
	var l []place
	var errno syscall.Errno
	seen := map[netip.Addr]bool{}
	for _, d := range m.devices {
		gids, err := d.GIDs()
		if err != nil {
			continue
		}
		for _, g := range gids {
			a := netip.AddrFrom16(g.GID).Unmap()
			if g.Index == 0 || seen[a] || !like(a) {
				continue
			}
			seen[a] = true
			p, failed := m.placeAt(a)
			switch {
			case failed != 0:
			case p.Standard():
				l = append(l, p)
			default:
				errno = unix.EADDRINUSE
			}
		}
	}
	if len(l) > 0 {
		errno = 0
	}
	return l, errno
}

// add gives an ID a number, and a channel. Called with mu held.
func (m *Manager) add(x *id, c *Channel) syscall.Errno {
	if c.closed {
		return unix.EBADF
	}
	if len(m.ids) >= maxIDs || len(c.ids) >= maxChannelIDs {
		return unix.ENOMEM
	}
	for m.ids[m.free] != nil {
		m.free++
	}
	x.num, x.ch = m.free, c
	m.ids[x.num] = x
	c.ids[x] = true
	return 0
}

// remove takes an ID out of the tables, so that no command finds it; false: it is in none any more. Called with mu held.
func (m *Manager) remove(x *id) bool {
	if m.ids[x.num] != x {
		return false
	}
	delete(m.ids, x.num)
	m.free = min(m.free, x.num)
	delete(x.ch.ids, x)
	return true
}
