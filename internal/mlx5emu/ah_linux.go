package mlx5emu

import (
	"container/list"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Address handles. The device has none: the kernel's only tell whether the destination can be reached, and at which MAC address; the
// client puts the address itself into each datagram's WQE. The software NIC does have them, so those that WQEs name are kept.

// An ah is the client's.
type ah struct {
	counted
	c   *Context
	pd  *pd
	key ahKey
}

// An ahKey is where datagrams go. All devices have the addresses of the host: there, the queue pair says which of them is meant.
type ahKey struct {
	pd   *pd
	to   *Device // nil: none of this process, or it is not known, or the GID of a device
	gid  ib.GID
	sgid uint8
	tc   uint8
	hop  uint8
	flow uint32
}

// addressHandles are the software NIC's, by destination; guarded by the device's mu.
type addressHandles struct {
	m    map[ahKey]*softAH
	idle list.List // of *softAH that no handle of the client's keeps, the one that was not used for longest in front
}

type softAH struct {
	key  ahKey
	soft driver.AH
	refs int           // the client's handles
	idle *list.Element // nil: it has some
}

// idleAHs bounds those that no handle of the client's keeps. There are some because a client may destroy its handle while a WQE that
// names the destination has not been read.
const idleAHs = 256

func (k *ahKey) attr() ib.AHAttr {
	a := ib.AHAttr{DGID: k.gid, SGIDIndex: int(k.sgid), HopLimit: k.hop, TrafficClass: k.tc, FlowLabel: k.flow, Port: 1}
	k.to.reach(&a)
	return a
}

func writeCreateAH(w *writeCmd) (response, syscall.Errno) {
	c, q := w.c, structOf[abi.CreateAH](w.core)
	g := &q.Attr.GRH
	global := q.Attr.IsGlobal != 0
	if q.Attr.PortNum != 1 || global && g.SGIDIndex >= gidSlots || !global && !c.dev.cfg.InfiniBand {
		return response{}, unix.EINVAL
	}
	if !global {
		to := avSeg{lid: ib.LID(q.Attr.DLID)}
		c.dev.routeDatagram(&to)
		*g = abi.GlobalRoute{DGID: to.gid}
	}
	if errno := c.room(objectAH); errno != 0 {
		return response{}, errno
	}
	p, errno := c.getPD(q.PDHandle)
	if errno != 0 {
		return response{}, errno
	}
	k := ahKey{pd: p, gid: g.DGID, sgid: g.SGIDIndex, tc: g.TrafficClass, hop: g.HopLimit, flow: g.FlowLabel & (1<<20 - 1)}
	// What is on its way is waited for here, not when a datagram is sent.
	soft, err := p.soft.CreateAH(k.attr())
	if err != nil {
		c.putPD(p)
		return response{}, modifyErrno(err)
	}
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	e := c.ahs.m[k]
	if e != nil {
		soft.Close()
	} else {
		e = c.ahs.keep(k, soft)
	}
	c.ahs.hold(e)
	h := c.add(&ah{c: c, pd: p, key: k})
	r := abi.Mlx5CreateAHResp{ResponseLength: uint32(min(w.uhwRoom, 16)), DMAC: macOf(k.gid)}
	return response{bytesOf(&abi.CreateAHResp{AHHandle: h}), bytesOf(&r)}, 0
}

// macOf makes a MAC address of a GID: a locally administered one, which nobody looks at.
func macOf(g ib.GID) [6]byte { return [6]byte{2, g[11], g[12], g[13], g[14], g[15]} }

// close lets go of the client's handle.
func (a *ah) close() error {
	a.c.dev.mu.Lock()
	defer a.c.dev.mu.Unlock()
	if e := a.c.ahs.m[a.key]; e != nil {
		a.c.ahs.release(e)
	}
	return nil
}

// keep adds one, which is idle.
func (h *addressHandles) keep(k ahKey, soft driver.AH) *softAH {
	if h.m == nil {
		h.m = map[ahKey]*softAH{}
	}
	e := &softAH{key: k, soft: soft}
	h.m[k] = e
	h.rest(e)
	return e
}

// hold has a handle of the client's keep e.
func (h *addressHandles) hold(e *softAH) {
	if e.refs++; e.idle != nil {
		h.idle.Remove(e.idle)
		e.idle = nil
	}
}

// release is the end of a handle of the client's.
func (h *addressHandles) release(e *softAH) {
	if e.refs--; e.refs == 0 {
		h.rest(e)
	}
}

// rest makes e idle, and gives up the one that was not used for longest if there are too many.
func (h *addressHandles) rest(e *softAH) {
	e.idle = h.idle.PushBack(e)
	if h.idle.Len() > idleAHs {
		h.forget(h.idle.Front().Value.(*softAH))
	}
}

func (h *addressHandles) forget(e *softAH) {
	if e.idle != nil {
		h.idle.Remove(e.idle)
	}
	delete(h.m, e.key)
	e.soft.Close()
}

// drop gives up those of a protection domain.
func (h *addressHandles) drop(p *pd) {
	for k, e := range h.m {
		if k.pd == p {
			h.forget(e)
		}
	}
}

// address returns the software NIC's handle for a datagram's address vector; false: there is no way there. It never waits: a
// destination in another process is there if the client has made a handle for it, or another connection to that process.
func (n *qp) address(a *avSeg) (ib.AHNum, bool) {
	h := &n.c.ahs
	k := ahKey{pd: n.pd, gid: a.gid, sgid: a.sgidIndex, tc: a.tclass, hop: a.hopLimit, flow: a.flowLabel}
	if a.sgidIndex != 0 {
		k.to = n.c.dev.owner(a.qpn)
	}
	e := h.m[k]
	switch {
	case e == nil:
		soft, err := n.pd.soft.CreateAHNow(k.attr())
		if err != nil {
			return 0, false
		}
		e = h.keep(k, soft)
	case e.idle != nil:
		h.idle.MoveToBack(e.idle)
	}
	return e.soft.Num(), true
}
