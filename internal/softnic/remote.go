package softnic

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// remoteRegion is a region or window of a peer, as this side of the link knows it: by rkey, for one-sided operations, or by
// handle, for receives that the peer has posted. Immutable but for dead.
type remoteRegion struct {
	rkey   ib.RKey
	handle uint32
	pd     uint32
	qpn    ib.QPN // windows: the peer's QP that it is bound to, else 0
	base   uint64
	length uint64
	access ib.Access
	memAt  uint64
	mem    []byte  // nil if assisted
	own    *region // of a NIC of this process, if it is foreign memory; it is assisted, too
	// live is the peer's word for the region: equal to handle as long as it is valid. Loaded with the busy word raised.
	live     *uint32
	reg      *mem.Region
	assisted bool        // nothing that could be mapped: the peer's NIC does the copying, or execForeign
	missing  bool        // the peer does not know it
	dead     atomic.Bool // the mapping is about to go
}

func (r *remoteRegion) unmap() {
	if r.reg != nil {
		r.reg.Close()
	}
}

// ok reports whether the region may be used now.
func (r *remoteRegion) ok() bool {
	return atomic.LoadUint32(r.live) == r.handle && !r.dead.Load()
}

// same reports whether r, which may be nil, describes the same live region as n.
func (r *remoteRegion) same(n *remoteRegion) bool {
	return r != nil && !r.missing && !n.missing && r.handle == n.handle && !r.dead.Load()
}

func (r *remoteRegion) contains(addr uint64, n uint32) bool {
	off := addr - r.base
	return off <= r.length && uint64(n) <= r.length-off
}

// bytes returns the memory at addr; contains was checked.
func (r *remoteRegion) bytes(addr uint64, n uint32) []byte {
	off := addr - r.memAt
	return r.mem[off : off+uint64(n) : off+uint64(n)]
}

// peerRights are the rights of a region, any of which makes it a peer's affair.
const peerRights = ib.AccessRemote | ib.AccessFlushGlobal

const (
	resolveByHandle uint16 = 1 << 0
	regionAssisted  uint16 = 1 << 1
	regionPushed    uint16 = 1 << 2
)

// pushLimit is how many regions a NIC tells a peer of before it asks. Those can be used although the peer's process is
// stopped; of more, the first use takes a round trip through the control channel.
const pushLimit = 256

// pushRegions tells a peer of the regions that the QP which connects to it makes reachable.
func (l *link) pushRegions(pd *PD) {
	l.mu.Lock()
	known := l.pds[pd]
	l.pds[pd] = true
	l.mu.Unlock()
	if known {
		return
	}
	l.nic.regions.each(func(r *region) {
		if r.pd == pd {
			l.push(r)
		}
	})
}

// push tells the peer of a region that it may use one-sided.
func (l *link) push(r *region) {
	if r.access&peerRights == 0 {
		return
	}
	l.mu.Lock()
	ok := l.pds[r.pd]
	l.mu.Unlock()
	if ok {
		l.pushAs(r, regionPushed)
	}
}

// pushRecv tells the peer of a region that a receive was posted from.
func (l *link) pushRecv(handle uint32) {
	r := l.nic.regions.lookup(handle)
	if r == nil {
		return
	}
	l.mu.Lock()
	known := l.told[handle]
	if !known && len(l.told) < pushLimit {
		l.told[handle] = true
	}
	l.mu.Unlock()
	if !known {
		l.pushAs(r, regionPushed|resolveByHandle)
	}
}

func (l *link) pushAs(r *region, flags uint16) {
	l.mu.Lock()
	ok := l.pushed < pushLimit && l.down == nil
	if ok {
		l.pushed++
	}
	l.mu.Unlock()
	if !ok {
		return
	}
	l.grant(r, ctl{kind: ctlRegion, flags: flags})
}

// grant sends the peer what it needs to use a region of ours, as m, and reports whether the region still lives. It cannot go
// meanwhile: its file is still the one that is passed on, and a ctlGone comes after.
func (l *link) grant(r *region, m ctl) bool {
	l.nic.regionUse.RLock()
	defer l.nic.regionUse.RUnlock()
	if l.nic.regions.lookup(r.handle) != r {
		return false
	}
	done := l.describe(r, &m)
	l.send(m)
	done()
	return true
}

// regionByRKey returns what is known of a peer's rkey, or nil after asking the peer: the QP is retried when it answers.
func (l *link) regionByRKey(k ib.RKey) *remoteRegion {
	l.regMu.RLock()
	r := l.byRKey[k]
	l.regMu.RUnlock()
	if r == nil {
		l.ask(uint64(k), ctl{kind: ctlResolve, b: uint32(k)})
	}
	return r
}

// regionByHandle is regionByRKey for the region of a receive buffer.
func (l *link) regionByHandle(h uint32) *remoteRegion {
	l.regMu.RLock()
	r := l.byHandle[h]
	l.regMu.RUnlock()
	if r == nil {
		l.ask(1<<32|uint64(h), ctl{kind: ctlResolve, a: h, flags: resolveByHandle})
	}
	return r
}

func (l *link) ask(key uint64, m ctl) {
	l.regMu.Lock()
	under := l.asked == nil || l.asked[key]
	if !under {
		l.asked[key] = true
	}
	l.regMu.Unlock()
	if !under {
		l.send(m)
	}
}

// forgetMissing drops a negative answer, once it has been acted on.
func (l *link) forgetMissing(r *remoteRegion) {
	l.regMu.Lock()
	defer l.regMu.Unlock()
	if l.byRKey[r.rkey] == r {
		delete(l.byRKey, r.rkey)
	}
	if l.byHandle[r.handle] == r {
		delete(l.byHandle, r.handle)
	}
}

// forgetStale drops a region that the peer has revoked, so that the next use asks again: an rkey can come back when a
// window is bound anew.
func (l *link) forgetStale(r *remoteRegion) { l.forget(r.handle) }

// forget drops every region with the handle and unmaps them.
func (l *link) forget(handle uint32) {
	var gone []*remoteRegion
	l.regMu.Lock()
	if r := l.byHandle[handle]; r != nil {
		gone = append(gone, r)
		delete(l.byHandle, handle)
	}
	for k, r := range l.byRKey {
		if r.handle == handle && !r.missing {
			gone = append(gone, r)
			delete(l.byRKey, k)
		}
	}
	l.regMu.Unlock()
	if len(gone) == 0 {
		return
	}
	for _, r := range gone {
		r.dead.Store(true)
	}
	unmap := func() {
		l.nic.drainSenders() // whoever saw it alive has ended
		for _, r := range gone {
			r.unmap()
		}
	}
	if l.nic.work.put(unmap) < 0 {
		unmap() // the NIC is closed: no QP is left whose lock this could wait for
	}
}

// handleResolve answers a peer that wants to use a region of ours.
func (l *link) handleResolve(m *ctl) error {
	var r *region
	answer := ctl{kind: ctlRegion, a: m.a, b: m.b, flags: m.flags & resolveByHandle}
	if m.flags&resolveByHandle != 0 {
		if r = l.nic.regions.lookup(m.a); r != nil && (r.access&ib.AccessLocalWrite == 0 || !r.receives.Load()) {
			r = nil // handles can be guessed: only receive buffers are given out by them
		}
	} else if r = l.nic.regions.lookupRKey(ib.RKey(m.b)); r != nil && r.access&peerRights == 0 {
		r = nil
	}
	if r == nil || !l.grant(r, answer) {
		l.send(answer)
	}
	return nil
}

// describe fills a ctlRegion. done frees what the message holds, once it was handed over.
func (l *link) describe(r *region, m *ctl) (done func()) {
	r.exported.Store(true)
	done = func() {}
	m.status = 1
	m.a, m.b, m.c, m.d, m.qpn = r.handle, uint32(r.rkey), uint32(r.access), r.pd.id, uint32(r.qpn)
	m.x, m.y, m.z = r.base, r.length, r.memAt
	switch {
	case l.path == pathInproc && r.foreign != nil:
		m.obj = r
		m.flags |= regionAssisted
	case l.path == pathInproc:
		m.obj = r.mem
	case r.fd >= 0:
		writable := m.flags&resolveByHandle != 0 || r.access&(ib.AccessRemoteWrite|ib.AccessRemoteAtomic) != 0
		fd, free, err := shareFD(r.fd, writable)
		if err != nil { // no descriptor is left: what can be done without one is done
			m.flags |= regionAssisted
			return done
		}
		m.fd, m.hasFD, done = fd, true, free
		m.data = binary.LittleEndian.AppendUint64(nil, uint64(r.fdOff))
		m.data = binary.LittleEndian.AppendUint64(m.data, uint64(len(r.mem)))
	default:
		m.flags |= regionAssisted
	}
	return done
}

// handleRegion takes the answer to a resolve.
func (l *link) handleRegion(m *ctl) error {
	byHandle := m.flags&resolveByHandle != 0
	r := &remoteRegion{rkey: ib.RKey(m.b), handle: m.a, missing: m.status == 0}
	if !r.missing {
		r.access, r.pd, r.qpn = ib.Access(m.c), m.d, ib.QPN(m.qpn)
		r.base, r.length, r.memAt = m.x, m.y, m.z
		r.live = &l.peerLive[m.a&handleSlotMask]
		switch {
		case l.path == pathInproc:
			r.mem, _ = m.obj.([]byte)
			r.own, r.assisted = m.obj.(*region)
		case m.flags&regionAssisted != 0:
			r.assisted = true
		default:
			if len(m.data) != 16 || !m.hasFD {
				return errCtl
			}
			off, size := binary.LittleEndian.Uint64(m.data), binary.LittleEndian.Uint64(m.data[8:])
			if off > 1<<50 || size == 0 || size > 1<<46 {
				return errCtl
			}
			writable := byHandle || r.access&(ib.AccessRemoteWrite|ib.AccessRemoteAtomic) != 0
			reg, err := l.mapFD(m.fd, int64(off), int(size), writable)
			if err != nil {
				return fmt.Errorf("region of the peer: %w", err)
			}
			r.reg, r.mem = reg, reg.Bytes()[:size]
		}
		if !r.assisted {
			// The difference wraps for zero-based windows, as the addresses of operations on them do.
			if o := r.base - r.memAt; o > uint64(len(r.mem)) || r.length > uint64(len(r.mem))-o {
				r.unmap()
				return errCtl
			}
		}
	}
	l.regMu.Lock()
	if l.asked == nil || l.byRKey == nil {
		l.regMu.Unlock()
		r.unmap()
		return nil
	}
	var old *remoteRegion
	var known bool // we were told while we asked, and a sender may hold on to what it was told
	if m.flags&regionPushed != 0 {
		l.taken++
		fits := l.taken <= pushLimit && !r.missing
		fresh := byHandle && l.byHandle[r.handle] == nil || !byHandle && l.byRKey[r.rkey] == nil // else we had asked meanwhile
		if fits && fresh {
			if byHandle {
				l.byHandle[r.handle] = r
			} else {
				l.byRKey[r.rkey] = r
			}
			l.regMu.Unlock()
			return nil
		}
		l.regMu.Unlock()
		r.unmap()
		if !fits {
			return errCtl
		}
		return nil
	}
	if byHandle {
		if !l.asked[1<<32|uint64(m.a)] {
			l.regMu.Unlock()
			r.unmap()
			return errCtl
		}
		delete(l.asked, 1<<32|uint64(m.a))
		old = l.byHandle[m.a]
		if known = old.same(r); !known {
			l.byHandle[m.a] = r
		}
	} else {
		if !l.asked[uint64(m.b)] {
			l.regMu.Unlock()
			r.unmap()
			return errCtl
		}
		delete(l.asked, uint64(m.b))
		old = l.byRKey[r.rkey]
		if known = old.same(r); !known {
			l.byRKey[r.rkey] = r
		}
	}
	l.regMu.Unlock()
	switch {
	case known:
		r.unmap()
	case old != nil:
		old.dead.Store(true)
		l.nic.drainSenders()
		old.unmap()
	}
	l.nic.progressStalled()
	return nil
}
