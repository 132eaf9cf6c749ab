package mr

import (
	"errors"
	"sync"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/life"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Window is a type 2 memory window (IBA 10.6.7.2.3): it gives peers access to a part of a region, with a key of its
// own that can be withdrawn without closing the region. Bind and invalidate are work requests, so they are ordered with
// the other requests of the queue pair that they are posted to:
//
//	wr := w.BindWR(m, off, n, ib.AccessRemoteRead)  // m has ib.AccessMWBind
//	q.PostSend([]ib.SendWR{wr})
//	... send w.Remote() to the peer, which may use it from then on ...
//	q.PostSend([]ib.SendWR{w.InvalidateWR()})       // or the peer's SEND_WITH_INV with the key
//
// A Window is safe for concurrent use, but one bind at a time: the request that BindWR returns is valid until the next
// BindWR of the same window.
type Window struct {
	life life.Node
	pd   *verbs.PD
	drv  driver.MW

	mu   sync.Mutex
	bind ib.BindMW
	key  ib.RKey // of the latest BindWR, or the window's first
	rem  RemoteKey
}

// NewWindow makes a window, which is not bound yet. It fails with errors.ErrUnsupported on devices without.
func NewWindow(pd *verbs.PD) (*Window, error) {
	dev := pd.Context().Name()
	a, ok := pd.Driver().(driver.MWAllocator)
	if !ok {
		return nil, opErr("alloc_mw", dev, errors.ErrUnsupported)
	}
	w := &Window{pd: pd}
	if err := w.life.Attach(pd.Life()); err != nil {
		return nil, opErr("alloc_mw", dev, err)
	}
	drv, err := a.AllocMW()
	if err != nil {
		w.life.Abandon()
		return nil, opErr("alloc_mw", dev, err)
	}
	w.drv, w.key = drv, drv.RKey()
	life.Watch(w, &w.life, "mr.Window", dev)
	return w, nil
}

// BindWR returns the work request that binds the window to n bytes at off of m, and lets peers do access to them: any of
// the remote rights, of which writes and atomics need ib.AccessLocalWrite on m. m must have ib.AccessMWBind; n must not
// be 0. It panics, as a slice expression does, if the bytes are not within m. The caller fills in ID and Flags.
//
// Each bind takes a new key, so that a peer's old one does not open the new range. The window must not be bound: a
// bound one is invalidated first.
func (w *Window) BindWR(m *MR, off, n int, access ib.Access) ib.SendWR {
	if off < 0 || n < 0 || off > m.n-n {
		panic(rangeError{off, n, m.n})
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.key = w.key&^0xff | (w.key+1)&0xff
	w.bind = ib.BindMW{Window: w.drv.Handle(), RKey: w.key, MRLKey: m.lkey, Addr: m.base + uint64(off), Length: uint64(n), Access: access}
	w.rem = RemoteKey{Addr: w.bind.Addr, Len: uint64(n), RKey: w.key, Access: access & ib.AccessRemote}
	return ib.SendWR{Opcode: ib.OpBindMW, Bind: &w.bind}
}

// InvalidateWR returns the work request that withdraws the key of the latest bind. The caller fills in ID and Flags.
func (w *Window) InvalidateWR() ib.SendWR {
	return ib.SendWR{Opcode: ib.OpLocalInv, InvalidateRKey: w.RKey()}
}

// RKey is the key that the latest BindWR gives to the window.
func (w *Window) RKey() ib.RKey {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.key
}

// Remote returns what a peer needs to reach the range of the latest BindWR, once that has completed.
func (w *Window) Remote() RemoteKey {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rem
}

// Close frees the window; if it is bound, peers lose their access.
func (w *Window) Close() error {
	return opErr("dealloc_mw", w.pd.Context().Name(), w.life.Close(w.drv.Close))
}
