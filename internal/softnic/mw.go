package softnic

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// MW is a type 2B memory window: bound by a work request on a QP, usable through that QP only (IBA 10.6.7.2.3).
type MW struct {
	nic *NIC
	pd  *PD
	id  uint32

	mu    sync.Mutex
	rkey  ib.RKey
	bound *region // nil: not bound
	under *region // the region it is bound to
	gone  bool
}

// AllocMW implements driver.MWAllocator.
func (pd *PD) AllocMW() (driver.MW, error) {
	if err := pd.addChild(); err != nil {
		return nil, err
	}
	w := &MW{nic: pd.nic, pd: pd, rkey: ib.RKey(pd.nic.regions.random() | 1<<8)}
	if err := pd.nic.addMW(w); err != nil {
		pd.dropChild()
		return nil, err
	}
	return w, nil
}

// Handle implements driver.MW.
func (w *MW) Handle() uint32 { return w.id }

// RKey implements driver.MW.
func (w *MW) RKey() ib.RKey {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rkey
}

// unbindLocked takes the window's binding away. The table slot is given back once nobody can be using it.
func (w *MW) unbindLocked() bool {
	r, under := w.bound, w.under
	if r == nil {
		return false
	}
	w.bound, w.under = nil, nil
	// Counted until its key is dead: closing the region waits for those who have seen the key alive, but not for those who will.
	revoked := w.nic.regions.revoke(r)
	under.windows.Add(-1)
	if revoked {
		w.nic.later(func() {
			w.nic.quiesce()
			if r.exported.Load() {
				w.nic.eachLink(func(l *link) { l.send(ctl{kind: ctlGone, a: r.handle}) })
			}
			w.nic.regions.freeSlot(r.handle)
		})
	}
	return true
}

// Close implements driver.MW.
func (w *MW) Close() error {
	w.mu.Lock()
	if w.gone {
		w.mu.Unlock()
		return driver.ErrClosed
	}
	w.gone = true
	was := w.unbindLocked()
	w.mu.Unlock()
	w.nic.dropMW(w)
	if was {
		w.nic.quiesce()
	}
	w.pd.dropChild()
	return nil
}

// bind executes a bind request. Called with sq held.
func (q *QP) bind(b *ib.BindMW) ib.WCStatus {
	w := q.nic.mw(b.Window)
	if w == nil || w.pd != q.pd {
		return ib.WCMWBindErr
	}
	r := q.nic.regions.lookup(uint32(b.MRLKey))
	if r == nil || r.pd != q.pd || r.qpn != 0 || r.access&ib.AccessMWBind == 0 {
		return ib.WCMWBindErr
	}
	// A window's rights need the region to be writable by the device, as a region's own remote rights do.
	if b.Access&^(ib.AccessRemote|ib.AccessZeroBased) != 0 ||
		b.Access&(ib.AccessRemoteWrite|ib.AccessRemoteAtomic) != 0 && r.access&ib.AccessLocalWrite == 0 {
		return ib.WCMWBindErr
	}
	if b.Length > r.length || b.Addr-r.base > r.length-b.Length {
		return ib.WCMWBindErr
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.gone || w.bound != nil || b.RKey>>8 != w.rkey>>8 {
		return ib.WCMWBindErr // a bound type 2 window must be invalidated before it is bound anew
	}
	if b.Length == 0 {
		return ib.WCSuccess
	}
	n := &region{nic: q.nic, pd: q.pd, rkey: b.RKey, mem: r.mem, memAt: r.memAt, base: b.Addr, length: b.Length,
		access: b.Access &^ ib.AccessZeroBased, fd: r.fd, fdOff: r.fdOff, qpn: q.qpn,
		foreign: r.foreign, foreignAt: r.foreignAt}
	if b.Access&ib.AccessZeroBased != 0 {
		n.memAt = r.memAt - b.Addr
		n.base = 0
	}
	if r.windows.Add(1) <= 0 { // the region was closed since it was looked up
		r.windows.Add(-1)
		return ib.WCMWBindErr
	}
	if err := q.nic.regions.insert(n); err != nil {
		r.windows.Add(-1)
		return ib.WCMWBindErr
	}
	w.bound, w.under, w.rkey = n, r, b.RKey
	return ib.WCSuccess
}

// localInv executes a local invalidate: when it completes, no peer uses the window any more. Called with sq held.
func (q *QP) localInv(k ib.RKey) ib.WCStatus {
	if !q.invalidate(k) {
		return ib.WCMWBindErr
	}
	heavyBarrier()
	if in := q.in.Load(); in != nil {
		in.waitIdle() // a window is used through its own QP only
	}
	return ib.WCSuccess
}

// invalidate ends the binding of the window that has the key and is bound through this QP.
func (q *QP) invalidate(k ib.RKey) bool {
	r := q.nic.regions.lookupRKey(k)
	if r == nil || r.qpn != q.qpn {
		return false
	}
	w := q.nic.mwByRKey(k)
	if w == nil {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.bound == r && w.unbindLocked()
}

// invalidateRemote is the receiver's part of SEND_WITH_INV. A key that is not a window of this QP is the peer's mistake, and
// ends the connection (IBA 9.4.1.1.3).
func (n *NIC) invalidateRemote(q *QP, k ib.RKey) {
	if !q.invalidate(k) {
		q.remoteFault(q.epoch.Load(), ib.EventQPAccessErr)
	}
}

func (n *NIC) addMW(w *MW) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return driver.ErrClosed
	}
	if len(n.mws) >= maxMRs {
		return fmt.Errorf("the software NIC has %d memory windows at most", maxMRs)
	}
	for {
		n.nextMW++
		if n.mws[n.nextMW] == nil && n.nextMW != 0 {
			break
		}
	}
	w.id = n.nextMW
	n.mws[w.id] = w
	return nil
}

func (n *NIC) dropMW(w *MW) {
	n.mu.Lock()
	delete(n.mws, w.id)
	n.mu.Unlock()
}

func (n *NIC) mw(id uint32) *MW {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.mws[id]
}

func (n *NIC) mwByRKey(k ib.RKey) *MW {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range n.mws {
		w.mu.Lock()
		hit := w.bound != nil && w.bound.rkey == k
		w.mu.Unlock()
		if hit {
			return w
		}
	}
	return nil
}

// putHost64 stores v in the order that the CPU has, as the device writes an atomic's old value.
func putHost64(b []byte, v uint64) { binary.NativeEndian.PutUint64(b, v) }

// host64 is what putHost64 has stored.
func host64(b []byte) uint64 { return binary.NativeEndian.Uint64(b) }
