//go:build amd64 || arm64

package mlx5

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// An addressVector is what a datagram's request says of its destination; Q_Key and queue pair are filled in there. It never
// changes.
type addressVector struct{ bytes [avBytes]byte }

// ah is an address handle. On Ethernet the kernel has one too, as it has looked for the MAC address.
type ah struct {
	c      *mlx5Context
	num    ib.AHNum
	kernel driver.AH // nil on InfiniBand
}

// CreateAH implements driver.PD.
func (p *pd) CreateAH(attr ib.AHAttr) (driver.AH, error) {
	if err := p.c.Removed(); err != nil {
		return nil, err
	}
	port, err := p.c.QueryPort(attr.Port)
	if err != nil {
		return nil, err
	}
	a := &ah{c: p.c}
	var v addressVector
	switch port.LinkLayer {
	case ib.LinkEthernet:
		err = a.onEthernet(p, &attr, &v)
	case ib.LinkInfiniBand:
		if err = p.c.CheckAH(&attr); err == nil {
			v.onInfiniBand(&attr)
		}
	default:
		err = fmt.Errorf("%s: create_ah: port %d is neither Ethernet nor InfiniBand", p.c.Device(), attr.Port)
	}
	if err == nil {
		var n uint32
		n, err = p.c.ahs.add(&v)
		a.num = ib.AHNum(n)
	}
	if err != nil {
		if a.kernel != nil {
			err = errors.Join(err, a.kernel.Close())
		}
		return nil, err
	}
	return a, nil
}

// onEthernet lets the kernel find the MAC address.
func (a *ah) onEthernet(p *pd, attr *ib.AHAttr, v *addressVector) error {
	if !p.c.info.tellsMAC {
		return fmt.Errorf("%s: create_ah: %w: this kernel's mlx5 driver does not tell the MAC address of a destination, which datagrams need",
			p.c.Device(), errors.ErrUnsupported)
	}
	gids, err := p.c.GIDs(attr.Port)
	if err != nil {
		return err
	}
	port := uint16(0)
	found := false
	for i := range gids {
		if gids[i].Index == attr.SGIDIndex {
			found = true
			if gids[i].Type == ib.GIDRoCEv2 {
				port = udpSource(attr.FlowLabel)
			}
		}
	}
	if !found {
		return fmt.Errorf("%s: create_ah: there is no GID at index %d of port %d", p.c.Device(), attr.SGIDIndex, attr.Port)
	}
	var resp abi.Mlx5CreateAHResp
	a.kernel, err = p.NewAH(attr, uverbs.Bytes(&resp), func() (ib.AHNum, error) {
		if resp.DMAC == [6]byte{} {
			return 0, fmt.Errorf("%w: create_ah: the MAC address of %s is zero", ErrDevice, attr.DGID)
		}
		return 0, nil
	})
	if err != nil {
		return err
	}
	v.bytes[12] = attr.SL & 7 << 1
	binary.BigEndian.PutUint16(v.bytes[14:], port)
	copy(v.bytes[20:26], resp.DMAC[:])
	v.global(attr, 0)
	return nil
}

// onInfiniBand addresses by LID, and by GID beyond the subnet.
func (v *addressVector) onInfiniBand(attr *ib.AHAttr) {
	v.bytes[12] = attr.SL & 15
	binary.BigEndian.PutUint16(v.bytes[14:], uint16(attr.DLID))
	if !attr.DGID.IsZero() {
		v.global(attr, 1<<30)
	}
}

// global fills in the global route. present is the bit that says so on InfiniBand; Ethernet has nothing else.
func (v *addressVector) global(attr *ib.AHAttr, present uint32) {
	v.bytes[26] = attr.TrafficClass
	v.bytes[27] = attr.HopLimit
	binary.BigEndian.PutUint32(v.bytes[28:], present|uint32(attr.SGIDIndex)<<20|attr.FlowLabel&0xfffff)
	copy(v.bytes[32:], attr.DGID[:])
}

// udpSource is the source port of RoCEv2 packets of a flow label, by which switches spread them; without one it is any.
func udpSource(label uint32) uint16 {
	const first = 0xc000
	if label &= 0xfffff; label == 0 {
		return first | uint16(rand.IntN(1<<14))
	}
	return first | uint16(label&0x3fff^label>>14)
}

// Num implements driver.AH.
func (a *ah) Num() ib.AHNum { return a.num }

// Close implements driver.AH.
func (a *ah) Close() error {
	if a.kernel != nil {
		if err := a.kernel.Close(); err != nil {
			return err
		}
	}
	a.c.ahs.remove(uint32(a.num))
	return nil
}
