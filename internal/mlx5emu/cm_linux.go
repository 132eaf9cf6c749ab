package mlx5emu

import (
	"fmt"
	"net/netip"
	"sync"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// CMPort returns the connection manager at an address of the device's; see softnic.NIC. What it connects are the device's queue pairs,
// once their owner has modified them as was agreed.
func (d *Device) CMPort(a netip.Addr) (softnic.CMPort, error) {
	if d.cfg.HostOnly {
		return softnic.CMPort{}, fmt.Errorf("mlx5emu: %w: %s has no addresses of the host", driver.ErrUnreachable, d.cfg.Name)
	}
	p, err := d.nic.CMPort(a)
	if err == nil && p.GIDIndex() >= gidSlots {
		err = fmt.Errorf("mlx5emu: %w: the GID table of %s has no room for %v", driver.ErrUnreachable, d.cfg.Name, a)
	}
	return p, err
}

// GIDsChanged returns a channel that has something when GIDs has, since it was looked at, or may have: for one who waits for that.
func (d *Device) GIDsChanged() <-chan struct{} { return d.gidsChanged }

// told is what connection managers have said of peers.
type told struct {
	sync.Mutex // a leaf
	of         map[toldKey]*uint16
}

// A toldKey is a queue pair of a peer.
type toldKey struct {
	gid ib.GID
	qpn uint32
}

// Meet says where a peer receives that queue pairs of the device are about to be connected to: a UDP port, as ib.AHAttr has it. Otherwise
// the device would guess whose the peer's queue pair is. It may be called with locks of the software NIC held, as forget, which undoes it.
func (d *Device) Meet(peer ib.GID, qpn ib.QPN, port uint16) (forget func()) {
	k := toldKey{peer, uint32(qpn)}
	t := &d.told
	t.Lock()
	defer t.Unlock()
	if t.of == nil {
		t.of = map[toldKey]*uint16{}
	}
	mine := &port
	t.of[k] = mine
	return func() {
		t.Lock()
		defer t.Unlock()
		if t.of[k] == mine {
			delete(t.of, k)
		}
	}
}

// fill fills in where the queue pair of that number at the destination receives, if that was told.
func (t *told) fill(a *ib.AHAttr, qpn uint32) bool {
	t.Lock()
	defer t.Unlock()
	p := t.of[toldKey{a.DGID, qpn}]
	if p == nil || a.SGIDIndex == 0 {
		return false
	}
	a.UDPPort = *p
	return true
}
