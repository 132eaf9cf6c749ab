package softnic

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// region is a registered region, or a bound memory window on one. It is immutable; revoking it removes it from the table.
type region struct {
	nic    *NIC
	pd     *PD
	handle uint32 // slot in the region table and a generation; also the lkey
	rkey   ib.RKey
	mem    []byte // of the whole region, also for a window; nil for foreign memory
	memAt  uint64 // address of mem[0]
	base   uint64 // first address that the rkey covers
	length uint64
	access ib.Access
	fd     int // memfd that mem maps, -1 if peers cannot map it
	fdOff  int64
	qpn    ib.QPN // windows: the QP that may be used, else 0

	foreign   ForeignMemory // another process' memory instead of mem, or nil
	foreignAt uint64        // its address there that memAt stands for

	windows  atomic.Int32 // windows that are bound to the region, or about to be; closed: a large negative number
	exported atomic.Bool  // some peer was told about it
	receives atomic.Bool  // receives were posted from it: peers may map it by its handle
}

// A handle is the table slot in its lower bits and the slot's generation above, never 0 and never sgeList.
const (
	handleSlotBits = 16
	handleSlotMask = maxMRs - 1
)

// regionTable maps handles to regions. Look-ups take no lock.
type regionTable struct {
	random func() uint32 // makes rkeys

	slots []atomic.Pointer[region]
	// live is the same table as peers see it: live[slot] is the valid handle, or 0. Owner-written (atomic), mapped
	// read-only by peers, who load it with their busy word raised.
	live   []uint32
	liveFD int // memfd of live, -1 without shared memory

	mu     sync.Mutex
	gen    []uint16
	free   []uint32
	next   uint32
	byRKey map[ib.RKey]*region
}

func (t *regionTable) init(live []byte, fd int) {
	t.slots = make([]atomic.Pointer[region], maxMRs)
	t.live = words32(live)
	t.liveFD = fd
	t.gen = make([]uint16, maxMRs)
	t.byRKey = make(map[ib.RKey]*region)
	t.next = 1 // slot 0 stays empty: handle 0 is never valid
}

// lookup returns the live region of a handle or lkey, or nil.
func (t *regionTable) lookup(h uint32) *region {
	r := t.slots[h&handleSlotMask].Load()
	if r == nil || r.handle != h {
		return nil
	}
	return r
}

func (t *regionTable) lookupRKey(k ib.RKey) *region {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byRKey[k]
}

// insert gives r a handle (and a random rkey, unless it has one) and makes it live.
func (t *regionTable) insert(r *region) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.rkey != 0 && t.byRKey[r.rkey] != nil {
		return fmt.Errorf("rkey %#x is in use: choose another key for the window", uint32(r.rkey))
	}
	var slot uint32
	switch {
	case len(t.free) > 0:
		slot = t.free[0] // the longest unused: generations wrap as late as possible
		t.free = t.free[1:]
	case t.next < maxMRs:
		slot = t.next
		t.next++
	default:
		return fmt.Errorf("the software NIC has %d regions and windows at most: close some, or register larger ones", maxMRs-1)
	}
	t.gen[slot]++
	if t.gen[slot] == 0xffff { // sgeList
		t.gen[slot] = 0
	}
	r.handle = uint32(t.gen[slot])<<handleSlotBits | slot
	for r.rkey == 0 {
		k := ib.RKey(t.random())
		if _, taken := t.byRKey[k]; !taken {
			r.rkey = k
		}
	}
	t.byRKey[r.rkey] = r
	t.slots[slot].Store(r)
	atomic.StoreUint32(&t.live[slot], r.handle)
	return nil
}

// each calls f for every live region and window.
func (t *regionTable) each(f func(*region)) {
	t.mu.Lock()
	all := make([]*region, 0, len(t.byRKey))
	for _, r := range t.byRKey {
		all = append(all, r)
	}
	t.mu.Unlock()
	for _, r := range all {
		f(r)
	}
}

// revoke makes r's handle and rkey dead. Operations that had seen it alive may still be running: see NIC.quiesce.
// The slot is reusable only after freeSlot.
func (t *regionTable) revoke(r *region) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	slot := r.handle & handleSlotMask
	if t.slots[slot].Load() != r {
		return false
	}
	atomic.StoreUint32(&t.live[slot], 0)
	t.slots[slot].Store(nil)
	if t.byRKey[r.rkey] == r {
		delete(t.byRKey, r.rkey)
	}
	return true
}

func (t *regionTable) freeSlot(h uint32) {
	t.mu.Lock()
	t.free = append(t.free, h&handleSlotMask)
	t.mu.Unlock()
}

func random32() uint32 {
	var b [4]byte
	rand.Read(b[:])
	return binary.LittleEndian.Uint32(b[:])
}

// contains reports whether [addr, addr+n) lies in the region.
func (r *region) contains(addr uint64, n uint32) bool {
	off := addr - r.base // wraps for addr < base, and is then larger than any length
	return off <= r.length && uint64(n) <= r.length-off
}

// bytes returns the memory at addr, which contains has checked.
func (r *region) bytes(addr uint64, n uint32) []byte {
	off := addr - r.memAt
	return r.mem[off : off+uint64(n) : off+uint64(n)]
}

// MR is a memory region of the software NIC.
type MR struct {
	r *region
}

// RegisterMR implements driver.PD.
func (pd *PD) RegisterMR(cfg driver.MRConfig) (driver.MR, error) {
	at := addrOf(cfg.Mem)
	if cfg.Access&ib.AccessZeroBased != 0 {
		at = 0
	}
	return pd.RegisterMRAt(cfg, at)
}

// RegisterMRAt is RegisterMR of memory that SGEs and peers know by addresses from at on.
func (pd *PD) RegisterMRAt(cfg driver.MRConfig, at uint64) (driver.MR, error) {
	if err := cfg.Access.Check(); err != nil {
		return nil, err
	}
	if a := cfg.Access & ib.AccessFlushPersistent; a != 0 {
		return nil, fmt.Errorf("%v: the software NIC knows of no memory that outlives a loss of power: %w", a, errors.ErrUnsupported)
	}
	r := &region{nic: pd.nic, pd: pd, mem: cfg.Mem, memAt: at, base: at, length: uint64(len(cfg.Mem)),
		access: cfg.Access, fd: cfg.FD, fdOff: cfg.FDOffset}
	return pd.register(r)
}

func (pd *PD) register(r *region) (driver.MR, error) {
	if err := pd.addChild(); err != nil {
		return nil, err
	}
	if err := pd.nic.regions.insert(r); err != nil {
		pd.dropChild()
		return nil, err
	}
	if r.access&peerRights != 0 {
		pd.nic.eachLink(func(l *link) { l.push(r) })
	}
	return &MR{r: r}, nil
}

// LKey implements driver.MR.
func (m *MR) LKey() ib.LKey { return ib.LKey(m.r.handle) }

// RKey implements driver.MR.
func (m *MR) RKey() ib.RKey { return m.r.rkey }

const regionClosed = -1 << 30

// Close implements driver.MR.
func (m *MR) Close() error {
	if !m.r.windows.CompareAndSwap(0, regionClosed) {
		if m.r.windows.Load() < 0 {
			return driver.ErrClosed
		}
		return fmt.Errorf("%w: memory windows are bound to the region", driver.ErrBusy)
	}
	if !m.r.nic.revokeRegion(m.r) {
		return driver.ErrClosed
	}
	m.r.pd.dropChild()
	return nil
}

// revokeRegion takes a region or window away: when it returns, no operation of this process or of a cooperating peer uses it.
func (n *NIC) revokeRegion(r *region) bool {
	if !n.regions.revoke(r) {
		return false
	}
	n.quiesce()
	if r.exported.Load() {
		n.eachLink(func(l *link) { l.send(ctl{kind: ctlGone, a: r.handle}) })
	}
	n.regions.freeSlot(r.handle)
	return true
}

// quiesce waits until every operation that began before it, on either side of any link, has ended: the second half of
// taking something away. A peer that never lowers its busy word is cut off after busyLimit.
func (n *NIC) quiesce() {
	heavyBarrier()
	n.eachQP(func(q *QP) { // operations that this NIC initiates hold the lock
		q.sq.Lock()
		q.sq.Unlock() //lint:ignore SA2001 waiting for the holder is the point
	})
	n.eachCQ(func(c *CQ) { // polls copy staged receives
		c.mu.Lock()
		c.mu.Unlock() //lint:ignore SA2001 waiting for the holder is the point
	})
	n.eachInbound(func(in *inbound) { in.waitIdle() })
	n.regionUse.Lock()
	n.regionUse.Unlock() //lint:ignore SA2001 waiting for the readers is the point
}

// busyLimit is how long a peer may keep an operation running on something that is taken away from it. The longest honest
// operation is a copy of 2 GiB.
const busyLimit = 5 * time.Second
