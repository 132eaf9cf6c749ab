package mlx5emu

import (
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What the device says of itself, by command and to those who make a sysfs tree of it.

const (
	numberedGUID = ib.GUID(0x0002c90300000001)
	vendorID     = 0x02c9 // Mellanox
	partID       = 0x101d // ConnectX-6 Dx
	maxSGE       = 30
	maxRdAtomic  = 16
	maxMTU       = ib.MTU4096
	portActive   = 4 // enum ib_port_state
	linkUp       = 5 // phys_state
	infiniband   = 1 // enum rdma_link_layer
	ethernet     = 2
)

// FirmwareVersion is what the device calls its firmware.
const FirmwareVersion = "22.31.1014"

// BoardID is what the device calls its board: none that exists.
const BoardID = "RSD0000000001"

// Modalias names the device to drivers, as its PCI function would.
const Modalias = "pci:v000015B3d0000101Dsv000015B3sd00000001bc02sc00i00"

// GUID is the device's node GUID.
func (d *Device) GUID() ib.GUID { return d.guid }

// GIDs is the GID table of the device's only port, as it is now: used entries, by index. Entry 0 is the address by which
// devices of the host find each other through memory; like all others it is told as RoCE v2, or, on InfiniBand, as that.
func (d *Device) GIDs() ([]ib.GIDEntry, error) {
	l, err := d.nic.GIDs(1)
	if d.cfg.HostOnly && len(l) > 0 {
		l = l[:1]
	}
	for i := range l {
		if l[i].Type = ib.GIDRoCEv2; d.cfg.InfiniBand {
			l[i].Type = ib.GIDInfiniBand
		}
	}
	return l, err
}

// GIDTableSize is the number of slots of the GID table.
func (d *Device) GIDTableSize() int { return gidSlots }

const gidSlots = 255 // sgid_index of an address handle is a byte

// activeMTU is the path MTU that all of the host's addresses have room for, if it knows any: programs take it for their connections.
// Through memory, the largest is always possible.
func (d *Device) activeMTU() ib.MTU {
	m := maxMTU
	l, _ := d.GIDs()
	for _, e := range l {
		if e.MTU != 0 {
			m = min(m, e.MTU)
		}
	}
	return m
}

func (d *Device) portResp() abi.QueryPortRespEx {
	p := abi.QueryPortResp{
		PortCapFlags: abi.IB_UVERBS_PCF_CM_SUP, MaxMsgSz: 1 << 30, GIDTblLen: gidSlots, PKeyTblLen: 1,
		State: portActive, MaxMTU: uint8(maxMTU), ActiveMTU: uint8(d.activeMTU()), MaxVLNum: 1, ActiveWidth: 2, ActiveSpeed: 64,
		PhysState: linkUp,
	}
	if d.cfg.InfiniBand {
		p.LinkLayer, p.LID, p.SMLID = infiniband, uint16(d.lid), uint16(firstLID)
	} else {
		p.LinkLayer, p.Flags = ethernet, abi.IB_UVERBS_QPF_GRH_REQUIRED
		p.PortCapFlags |= abi.IB_UVERBS_PCF_IP_BASED_GIDS
	}
	return abi.QueryPortRespEx{LegacyResp: p}
}

func queryPort(r *call) syscall.Errno {
	if r.num(abi.UVERBS_ATTR_QUERY_PORT_PORT_NUM) != 1 {
		return unix.EINVAL
	}
	p := r.c.dev.portResp()
	return r.out(abi.UVERBS_ATTR_QUERY_PORT_RESP, bytesOf(&p))
}

// gidEntries is the GID table as commands tell it.
func (d *Device) gidEntries() ([]abi.GIDEntry, syscall.Errno) {
	l, err := d.GIDs()
	if err != nil {
		return nil, unix.EIO
	}
	var t []abi.GIDEntry
	for _, e := range l {
		if e.Index < gidSlots {
			t = append(t, abi.GIDEntry{GID: e.GID, GIDIndex: uint32(e.Index), PortNum: 1, GIDType: abi.IB_UVERBS_GID_TYPE_ROCE_V2, NetdevIfindex: ifIndex(e.NetDev)})
			if d.cfg.InfiniBand {
				t[len(t)-1].GIDType = abi.IB_UVERBS_GID_TYPE_IB
			}
		}
	}
	return t, 0
}

func queryGIDTable(r *call) syscall.Errno {
	size := r.num(abi.UVERBS_ATTR_QUERY_GID_TABLE_ENTRY_SIZE)
	room := r.outSize(abi.UVERBS_ATTR_QUERY_GID_TABLE_RESP_ENTRIES)
	if size == 0 || size > 1<<16 || r.num(abi.UVERBS_ATTR_QUERY_GID_TABLE_FLAGS) != 0 || room < int(size) || room%int(size) != 0 {
		return unix.EINVAL
	}
	t, errno := r.c.dev.gidEntries()
	if errno != 0 {
		return errno
	}
	if len(t) > room/int(size) {
		return unix.EINVAL
	}
	b := make([]byte, len(t)*int(size))
	for i := range t {
		copy(b[i*int(size):][:size], bytesOf(&t[i]))
	}
	return firstOf(r.out(abi.UVERBS_ATTR_QUERY_GID_TABLE_RESP_ENTRIES, b),
		r.out64(abi.UVERBS_ATTR_QUERY_GID_TABLE_RESP_NUM_ENTRIES, uint64(len(t))))
}

func queryGIDEntry(r *call) syscall.Errno {
	if r.num(abi.UVERBS_ATTR_QUERY_GID_ENTRY_PORT) != 1 || r.num(abi.UVERBS_ATTR_QUERY_GID_ENTRY_FLAGS) != 0 {
		return unix.EINVAL
	}
	index := r.num(abi.UVERBS_ATTR_QUERY_GID_ENTRY_GID_INDEX)
	if index >= gidSlots {
		return unix.EINVAL
	}
	t, errno := r.c.dev.gidEntries()
	if errno != 0 {
		return errno
	}
	for i := range t {
		if uint64(t[i].GIDIndex) == index {
			return r.out(abi.UVERBS_ATTR_QUERY_GID_ENTRY_RESP_ENTRY, bytesOf(&t[i]))
		}
	}
	return unix.ENODATA
}

// deviceResp is QUERY_DEVICE's answer: what the software NIC can do for one client, as a ConnectX would say it.
func (d *Device) deviceResp() abi.QueryDeviceResp {
	const hcaAtomics = 1 // enum ib_atomic_cap: atomic among the device's own
	a := &d.attr
	ethernetCaps := uint32(abi.IB_UVERBS_DEVICE_RAW_IP_CSUM | abi.IB_UVERBS_DEVICE_MANAGED_FLOW_STEERING)
	if d.cfg.InfiniBand {
		ethernetCaps = 0
	}
	return abi.QueryDeviceResp{
		FWVer: 22<<32 | 31<<16 | 1014, NodeGUID: abi.ToBE64(uint64(d.guid)), SysImageGUID: abi.ToBE64(uint64(d.guid)),
		MaxMRSize: a.MaxMRSize, PageSizeCap: 0xfffff000, VendorID: vendorID, VendorPartID: partID,
		MaxQP: uint32(maxObjects[objectQP]), MaxQPWR: maxSendWQEBB, MaxSGE: maxSGE, MaxSGERd: maxSGE, MaxCQ: uint32(maxObjects[objectCQ]), MaxCQE: maxCQE,
		DeviceCapFlags: abi.IB_UVERBS_DEVICE_CHANGE_PHY_PORT | abi.IB_UVERBS_DEVICE_PORT_ACTIVE_EVENT | abi.IB_UVERBS_DEVICE_SYS_IMAGE_GUID |
			abi.IB_UVERBS_DEVICE_RC_RNR_NAK_GEN | abi.IB_UVERBS_DEVICE_MEM_WINDOW_TYPE_2B | ethernetCaps,
		MaxMR: uint32(maxObjects[objectMR]), MaxPD: uint32(maxObjects[objectPD]), MaxQPRdAtom: maxRdAtomic, MaxQPInitRdAtom: maxRdAtomic,
		MaxResRdAtom: uint32(maxObjects[objectQP]) * maxRdAtomic, AtomicCap: hcaAtomics, MaxMW: uint32(maxObjects[objectMW]), MaxAH: uint32(maxObjects[objectAH]),
		MaxSRQ: uint32(maxObjects[objectSRQ]), MaxSRQWR: maxSRQWR, MaxSRQSGE: maxSGE, MaxPKeys: 1, LocalCaAckDelay: 16, PhysPortCnt: 1,
	}
}

const maxCQE = 1<<22 - 1
