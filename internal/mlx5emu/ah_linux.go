package mlx5emu

import (
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

// An ahKey is where datagrams go.
type ahKey struct {
	pd   *pd
	gid  ib.GID
	sgid uint8
	tc   uint8
	hop  uint8
	flow uint32
}

// addressHandles are the software NIC's, by destination; guarded by the device's mu.
type addressHandles struct {
	m map[ahKey]*softAH
	n uint64 // counts uses
}

type softAH struct {
	soft driver.AH
	refs int    // the client's handles
	used uint64 // when it was used last
}

// idleAHs bounds those that no handle of the client's keeps.
const idleAHs = 256

func (k *ahKey) attr(d *Device) ib.AHAttr {
	a := ib.AHAttr{DGID: k.gid, SGIDIndex: int(k.sgid), HopLimit: k.hop, TrafficClass: k.tc, FlowLabel: k.flow, Port: 1}
	d.reach(&a)
	return a
}

func writeCreateAH(w *writeCmd) (response, syscall.Errno) {
	c, q := w.c, structOf[abi.CreateAH](w.core)
	g := &q.Attr.GRH
	if q.Attr.PortNum != 1 || q.Attr.IsGlobal == 0 || g.SGIDIndex >= gidSlots {
		return response{}, unix.EINVAL
	}
	p, errno := c.getPD(q.PDHandle)
	if errno != 0 {
		return response{}, errno
	}
	k := ahKey{pd: p, gid: g.DGID, sgid: g.SGIDIndex, tc: g.TrafficClass, hop: g.HopLimit, flow: g.FlowLabel & (1<<20 - 1)}
	// What is on its way is waited for here, not when a datagram is sent.
	soft, err := p.soft.CreateAH(k.attr(c.dev))
	if err != nil {
		c.putPD(p)
		return response{}, modifyErrno(err)
	}
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	if e := c.ahs.m[k]; e != nil {
		soft.Close()
		e.refs++
	} else {
		c.ahs.keep(k, soft).refs++
	}
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
		e.refs--
	}
	return nil
}

func (h *addressHandles) keep(k ahKey, soft driver.AH) *softAH {
	if h.m == nil {
		h.m = map[ahKey]*softAH{}
	}
	if len(h.m) >= idleAHs {
		h.evict()
	}
	h.n++
	e := &softAH{soft: soft, used: h.n}
	h.m[k] = e
	return e
}

// evict gives up the one that was not used for longest, if no handle keeps it.
func (h *addressHandles) evict() {
	var oldest ahKey
	var e *softAH
	for k, v := range h.m {
		if v.refs == 0 && (e == nil || v.used < e.used) {
			oldest, e = k, v
		}
	}
	if e != nil {
		e.soft.Close()
		delete(h.m, oldest)
	}
}

// drop gives up those of a protection domain.
func (h *addressHandles) drop(p *pd) {
	for k, e := range h.m {
		if k.pd == p {
			e.soft.Close()
			delete(h.m, k)
		}
	}
}

// address returns the software NIC's handle for a datagram's address vector; false: there is no way there.
func (n *qp) address(a *avSeg) (ib.AHNum, bool) {
	h := &n.c.ahs
	k := ahKey{pd: n.pd, gid: a.gid, sgid: a.sgidIndex, tc: a.tclass, hop: a.hopLimit, flow: a.flowLabel}
	e := h.m[k]
	if e == nil {
		soft, err := n.pd.soft.CreateAH(k.attr(n.c.dev))
		if err != nil {
			return 0, false
		}
		e = h.keep(k, soft)
	}
	h.n++
	e.used = h.n
	return e.soft.Num(), true
}
