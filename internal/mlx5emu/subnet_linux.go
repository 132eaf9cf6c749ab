package mlx5emu

import (
	"fmt"
	"sync"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// InfiniBand devices (Config.InfiniBand). Their ports have a LID in the place of the host's addresses, and all of a process are on one
// subnet. Nobody manages it: there are no MADs, and no multicast. Packets with a global route go by the GID alone.

// subnet is who has which LID.
var subnet = struct {
	sync.Mutex // a leaf
	of         map[ib.LID]*Device
}{of: map[ib.LID]*Device{}}

// The LIDs of ports (IBA 4.1.3). Those above are of multicast groups.
const (
	firstLID = ib.LID(1)
	lastLID  = ib.LID(0xbfff)
)

// joinSubnet gives the device's port the first LID that is free.
func (d *Device) joinSubnet() error {
	l, err := d.nic.GIDs(1)
	if err != nil {
		return err
	}
	if len(l) == 0 {
		return fmt.Errorf("mlx5emu: %s has no GID", d.cfg.Name)
	}
	d.gid = l[0].GID
	subnet.Lock()
	defer subnet.Unlock()
	for lid := firstLID; lid <= lastLID; lid++ {
		if subnet.of[lid] == nil {
			d.lid, subnet.of[lid] = lid, d
			return nil
		}
	}
	return fmt.Errorf("mlx5emu: all %d LIDs are taken", lastLID)
}

func (d *Device) leaveSubnet() {
	subnet.Lock()
	defer subnet.Unlock()
	if subnet.of[d.lid] == d {
		delete(subnet.of, d.lid)
	}
}

// LID is that of the port; 0: it is no InfiniBand device.
func (d *Device) LID() ib.LID { return d.lid }

// gidAt returns the GID of the port that has a LID.
func gidAt(lid ib.LID) (ib.GID, bool) {
	subnet.Lock()
	defer subnet.Unlock()
	d := subnet.of[lid]
	if d == nil {
		return ib.GID{}, false
	}
	return d.gid, true
}

// nobody is the number of a queue pair that there is not: what goes to a LID that no port has is lost.
const nobody = uint32(ib.MaxQPN) - 1

// route makes the address of a connection, which may be a LID alone, one that the software NIC knows.
func (d *Device) route(dest *abi.QPDest, a *ib.QPAttr) {
	if !d.cfg.InfiniBand || dest.IsGlobal != 0 {
		return
	}
	var there bool
	if a.AH.DGID, there = gidAt(a.AH.DLID); !there {
		a.AH.DGID, a.DestQPN = d.gid, ib.QPN(nobody)
	}
	a.AH.SGIDIndex = 0
}

// source is the LID that a datagram from a queue pair has come from; 0: it was not of this subnet.
func (d *Device) source(qpn ib.QPN) ib.LID {
	if from := d.owner(uint32(qpn)); from != nil {
		return from.lid
	}
	return 0
}

// routeDatagram is route for a datagram.
func (d *Device) routeDatagram(a *avSeg) {
	if !d.cfg.InfiniBand || a.global {
		return
	}
	var there bool
	if a.gid, there = gidAt(a.lid); !there {
		a.gid, a.qpn = d.gid, nobody
	}
	a.sgidIndex = 0
}
