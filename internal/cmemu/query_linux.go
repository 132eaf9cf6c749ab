package cmemu

import (
	"encoding/binary"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// QUERY and QUERY_ROUTE.

// noIndex is in the place of the device's index, which netlink has, and nothing else: libraries find the device by its GUID then.
const noIndex = ^uint32(0)

// beforeIndex is how much of an answer clients have to have room for: the index is younger.
const (
	addrBeforeIndex  = 272
	routeBeforeIndex = 200
)

// answer writes a response of which the client may have room for no more than least bytes.
func (w *call) answer(va uint64, b []byte, least int) syscall.Errno {
	if int(w.out) < least {
		return unix.ENOSPC
	}
	return w.write(va, b[:min(len(b), int(w.out))])
}

func query(w *call) syscall.Errno {
	q, ok := arg[abi.CMQuery](w)
	if !ok {
		return unix.EINVAL
	}
	return w.with(q.ID, func(x *id) syscall.Errno {
		switch q.Option {
		case abi.RDMA_USER_CM_QUERY_ADDR:
			return w.answer(q.Response, x.addrResp(), addrBeforeIndex)
		case abi.RDMA_USER_CM_QUERY_GID:
			return w.answer(q.Response, x.gidResp(), addrBeforeIndex)
		case abi.RDMA_USER_CM_QUERY_PATH:
			return w.answer(q.Response, x.pathResp(int(w.out)), 8)
		}
		return unix.ENOSYS
	})
}

// device fills in what an answer says of the device.
func (x *id) device(r *abi.CMQueryAddrResp) {
	r.IbdevIndex = noIndex
	if d := x.at.dev; d != nil {
		r.NodeGUID, r.PortNum, r.PKey = uint64(abi.ToBE64(uint64(d.GUID()))), 1, uint16(abi.ToBE16(roce.DefaultPKey))
	}
}

func (x *id) addrResp() []byte {
	var r abi.CMQueryAddrResp
	r.SrcSize, r.DstSize = uint16(x.src.put(bytesOf(&r.SrcAddr))), uint16(x.dst.put(bytesOf(&r.DstAddr)))
	x.device(&r)
	return bytesOf(&r)
}

// gidResp is the addresses as those of family AF_IB.
func (x *id) gidResp() []byte {
	var r abi.CMQueryAddrResp
	x.device(&r)
	put := func(b []byte, s *sockaddr) uint16 {
		if s.family == afIB {
			return uint16(s.put(b))
		}
		native.PutUint16(b, afIB)
		native.PutUint16(b[2:], r.PKey)
		if x.at.dev != nil {
			g := s.gid()
			copy(b[8:], g[:])
		}
		binary.BigEndian.PutUint64(b[24:], uint64(x.space)<<16|uint64(s.port))
		return sizeofSockaddrIB
	}
	r.SrcSize, r.DstSize = put(bytesOf(&r.SrcAddr), &x.src), put(bytesOf(&r.DstAddr), &x.dst)
	return bytesOf(&r)
}

// exactly is the selector of what a path has, IB_SA_EQ.
const exactly = 2

// pathResp is the path, if there is one and room for it, as the subnet administration's messages have it.
func (x *id) pathResp(room int) []byte {
	r := abi.CMQueryPathResp{}
	b := bytesOf(&r)
	if !x.path.known() {
		return b
	}
	r.NumPaths = 1
	d := abi.PathRecData{Flags: abi.IB_PATH_GMP | abi.IB_PATH_PRIMARY | abi.IB_PATH_BIDIRECTIONAL}
	if room <= len(b)+len(bytesOf(&d)) {
		return b
	}
	var rec [64]byte
	be, p := binary.BigEndian, &x.path
	dgid, sgid := x.dst.gid(), x.src.gid()
	copy(rec[8:], dgid[:])
	copy(rec[24:], sgid[:])
	be.PutUint32(rec[44:], p.flow<<8|uint32(p.hops))
	rec[48] = p.tclass
	rec[49] = 1 << 7 // reversible
	be.PutUint16(rec[50:], roce.DefaultPKey)
	be.PutUint16(rec[52:], uint16(p.sl))
	rec[54] = exactly<<6 | uint8(p.mtu)
	rec[55] = exactly << 6
	rec[56] = exactly<<6 | p.life
	copy(bytesOf(&d.PathRec), rec[:])
	return append(append([]byte(nil), b...), bytesOf(&d)...)
}

// known reports whether there is a path.
func (p *path) known() bool { return p.mtu != 0 }

func queryRoute(w *call) syscall.Errno {
	q, ok := arg[abi.CMQuery](w)
	if !ok {
		return unix.EINVAL
	}
	return w.with(q.ID, func(x *id) syscall.Errno { return w.answer(q.Response, x.routeResp(), routeBeforeIndex) })
}

func (x *id) routeResp() []byte {
	r := abi.CMQueryRouteResp{IbdevIndex: noIndex}
	if x.src.family != afIB {
		x.src.put(bytesOf(&r.SrcAddr))
		x.dst.put(bytesOf(&r.DstAddr))
	}
	d := x.at.dev
	if d == nil {
		return bytesOf(&r)
	}
	r.NodeGUID, r.PortNum = uint64(abi.ToBE64(uint64(d.GUID()))), 1
	rec := &r.IBRoute[0]
	rec.DGID, rec.SGID, rec.PKey = x.dst.gid(), x.src.gid(), abi.ToBE16(roce.DefaultPKey)
	if p := &x.path; p.known() {
		r.NumPaths = 1
		rec.FlowLabel, rec.Reversible, rec.MTU, rec.HopLimit, rec.TrafficClass, rec.SL = abi.ToBE32(p.flow), 1, uint32(p.mtu), p.hops, p.tclass, p.sl
		rec.MTUSelector, rec.RateSelector, rec.PacketLifeTimeSelector, rec.PacketLifeTime = exactly, exactly, exactly, p.life
	}
	return bytesOf(&r)
}

// initQPAttr says what the queue pair is to be modified with to come to a state.
func initQPAttr(w *call) syscall.Errno {
	var r abi.QPAttr
	if int(w.out) < len(bytesOf(&r)) {
		return unix.ENOSPC
	}
	q, ok := arg[abi.CMInitQPAttr](w)
	if !ok || q.QPState > uint32(ib.Err) {
		return unix.EINVAL
	}
	return w.withDevice(q.ID, func(x *id) syscall.Errno {
		r.QPState = q.QPState
		if errno := x.attributes(&r); errno != 0 {
			return errno
		}
		return w.write(q.Response, bytesOf(&r))
	})
}
