package mlx5emu

import (
	"errors"
	"net"
	"slices"
	"sync"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// retry reports whether a request that was refused may be taken later: the queue is full, or the state not one to post in.
func retry(err error) bool {
	return errors.Is(err, driver.ErrQueueFull) || errors.Is(err, driver.ErrState)
}

// wcSolicited is the flag by which the software NIC's CQs mark what the sender wanted an event for.
const wcSolicited = softnic.WCSolicited

// Numbered devices.
const (
	firstQPN  = ib.QPN(0x100)
	keyFirst  = 0x18
	keyBottom = 0x42 // the byte of a key that its owner chooses
)

// openNIC opens the software NIC behind a device.
func openNIC(numbered bool) (*softnic.NIC, *keySource, error) {
	if !numbered {
		nic, err := softnic.Open()
		return nic, nil, err
	}
	keys := &keySource{next: keyFirst}
	nic, err := softnic.OpenNumbered(firstQPN, keys.take)
	return nic, keys, err
}

// A keySource counts keys.
type keySource struct{ next uint32 }

func (k *keySource) take() uint32 {
	v := k.next<<8 | keyBottom
	k.next++
	return v
}

// allocMW makes a memory window.
func (d *Device) allocMW(p *softnic.PD) (driver.MW, error) {
	if d.numbers != nil && d.numbers.next&1 == 0 {
		d.numbers.next++ // the software NIC makes keys of windows odd, and would take the next region's
	}
	return p.AllocMW()
}

// owners are the devices of this process, by the numbers of their queue pairs. Numbered devices have the same ones.
var owners = struct {
	sync.Mutex // a leaf
	of         map[uint32][]*Device
}{of: map[uint32][]*Device{}}

func (d *Device) own(qpn uint32) {
	owners.Lock()
	defer owners.Unlock()
	owners.of[qpn] = append(owners.of[qpn], d)
}

func (d *Device) disown(qpn uint32) {
	owners.Lock()
	defer owners.Unlock()
	l := owners.of[qpn]
	if l = slices.DeleteFunc(l, func(o *Device) bool { return o == d }); len(l) == 0 {
		delete(owners.of, qpn)
		return
	}
	owners.of[qpn] = l
}

// owner returns the device of this process that has a queue pair of that number, d rather than others; nil: none has.
func (d *Device) owner(qpn uint32) *Device {
	owners.Lock()
	defer owners.Unlock()
	l := owners.of[qpn]
	switch {
	case slices.Contains(l, d):
		return d
	case len(l) > 0:
		return l[0]
	}
	return nil
}

// reach fills in where packets for a queue pair of the device are received, if the destination is an address that it has: its software NIC
// may have another port than that for RoCEv2, which only one at each address of the host has. A nil device is somebody else's, who has
// that one.
func (d *Device) reach(a *ib.AHAttr) {
	if d == nil || a.SGIDIndex == 0 {
		return
	}
	l, err := d.nic.GIDs(1)
	if err != nil {
		return
	}
	for _, e := range l {
		if e.Index != 0 && e.GID == a.DGID {
			a.UDPPort, _ = d.nic.UDPPort(1, e.Index)
			return
		}
	}
}

// listen has the device receive at all addresses of the host, as datagrams may come to any of them. The software NIC by itself does so
// from when an address is first used, and a datagram that comes soon after that may still be lost.
func (d *Device) listen() {
	l, _ := d.GIDs()
	for _, e := range l {
		if e.Index != 0 {
			d.nic.UDPPort(1, e.Index) // if it fails, there is no receiving there
		}
	}
}

// ifIndex is the number of a net device, or 0.
func ifIndex(name string) uint32 {
	if name == "" {
		return 0
	}
	dev, err := net.InterfaceByName(name)
	if err != nil {
		return 0
	}
	return uint32(dev.Index)
}
