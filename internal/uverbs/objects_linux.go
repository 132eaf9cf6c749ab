package uverbs

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A PD is what protection domains of all kernel devices have in common.
type PD struct {
	C      *Context
	Handle uint32
}

// AllocPD makes a protection domain.
func (c *Context) AllocPD(uhwOut []byte) (PD, error) {
	if err := c.Removed(); err != nil {
		return PD{}, err
	}
	h, err := c.File.AllocPD(uhwOut)
	return PD{c, h}, err
}

// Close implements driver.PD.
func (p *PD) Close() error { return Destroyed(p.C.DeallocPD(p.Handle)) }

// Destroyed is the error of an object's destruction.
func Destroyed(err error) error {
	if gone(err) {
		return nil
	}
	return busy(err)
}

// A MR is a memory region.
type MR struct {
	MRInfo
	c      *Context
	access ib.Access
}

// RegisterMR registers memory, with what the provider's driver takes and gives.
//
// About fork: a child process and its parent share private pages until one of the two writes, and get a copy then; the device
// works on with the one that was pinned. Linux copies pinned pages at once since 5.12 (see ForkSafe). On older kernels memory of
// mr.Alloc is not given to children at all. That cannot be done to the Go heap, which a child of the runtime needs, and need
// not: os/exec's children borrow the parent's memory itself until they execute their program (CLONE_VM), and copy nothing.
// Only with SysProcAttr.Cloneflags CLONE_NEWUSER the runtime forks: on such a kernel, not while registered Go memory is in use.
func (p *PD) RegisterMR(cfg driver.MRConfig, uhwIn, uhwOut []byte) (*MR, error) {
	if err := p.C.Removed(); err != nil {
		return nil, err
	}
	start := AddrOf(cfg.Mem)
	iova, access := start, cfg.Access
	if access&ib.AccessZeroBased != 0 {
		// The kernel's own flag is for windows only; a region counts from whatever address it is given.
		access &^= ib.AccessZeroBased
		if iova = 0; start%uint64(unix.Getpagesize()) != 0 {
			return nil, p.C.errorf("reg_mr", errors.New("zero-based addresses need memory that begins on a page, as mr.Alloc makes it"))
		}
	}
	access, err := p.C.regionAccess(access)
	if err != nil {
		return nil, err
	}
	if cfg.FD >= 0 && !forkSafe() { // else it may be the Go heap
		keepFromChildren(cfg.Mem)
	}
	info, err := p.C.RegMR(p.Handle, start, uint64(len(cfg.Mem)), iova, access, uhwIn, uhwOut)
	if err != nil {
		return nil, err
	}
	return &MR{info, p.C, access}, nil
}

// regionAccess is what the kernel is to be asked for, or why this device cannot do it.
func (c *Context) regionAccess(a ib.Access) (ib.Access, error) {
	const flush = ib.AccessFlushGlobal | ib.AccessFlushPersistent
	if a&(ib.AccessOnDemand|flush) != 0 {
		caps, err := c.deviceCaps()
		switch {
		case err != nil:
			return 0, err
		case a&ib.AccessOnDemand != 0 && !caps.Has(ib.CapODP):
			return 0, c.errorf("reg_mr", fmt.Errorf("%w: this device has no on-demand paging: without ib.AccessOnDemand the memory is pinned",
				errors.ErrUnsupported))
		case a&ib.AccessFlushGlobal != 0 && !caps.Has(ib.CapFlush), a&ib.AccessFlushPersistent != 0 && !caps.Has(ib.CapFlushPersistent):
			return 0, c.errorf("reg_mr", fmt.Errorf("%w: this device has no FLUSH of that kind (%v)", errors.ErrUnsupported, a&flush))
		}
	}
	if a&ib.AccessOnDemand == 0 {
		a &^= ib.AccessHugeTLB // a hint for on-demand paging, which some drivers refuse without
	}
	if !c.optional {
		a &^= ib.AccessRelaxedOrdering
	}
	return a, nil
}

// deviceCaps is what the kernel says of the device's features. It is asked once.
func (c *Context) deviceCaps() (ib.DeviceCaps, error) {
	if v := c.caps.Load(); v != 0 {
		return ib.DeviceCaps(v &^ capsKnown), nil
	}
	a, err := c.QueryDevice()
	if err != nil {
		return 0, err
	}
	c.caps.Store(uint64(a.Caps) | capsKnown)
	return a.Caps, nil
}

const capsKnown = 1 << 63 // in Context.caps

// OptionalAccess reports whether access flags that are only wishes, as ib.AccessRelaxedOrdering, get to the kernel's driver.
func (c *Context) OptionalAccess() bool { return c.optional }

// forkSafe is ForkSafe, asked once. A kernel that does not answer is old.
var forkSafe = sync.OnceValue(func() bool {
	safe, err := ForkSafe()
	return safe && err == nil
})

// keepFromChildren keeps mapped memory out of processes that are forked. It is a hint: of huge pages only whole ones can be.
func keepFromChildren(mem []byte) {
	page := unix.Getpagesize()
	whole := (len(mem) + page - 1) &^ (page - 1) // a mapping has whole pages
	if whole > cap(mem) {
		whole = len(mem) &^ (page - 1)
	}
	if whole > 0 {
		unix.Madvise(mem[:whole], unix.MADV_DONTFORK)
	}
}

// RegisterDMABuf implements driver.DMABufRegistrar.
func (p *PD) RegisterDMABuf(cfg driver.DMABufConfig) (driver.MR, error) {
	m, err := p.registerDMABuf(cfg)
	if err != nil {
		return nil, err
	}
	return m, nil
}

func (p *PD) registerDMABuf(cfg driver.DMABufConfig) (*MR, error) {
	if err := p.C.Removed(); err != nil {
		return nil, err
	}
	access, err := p.C.regionAccess(cfg.Access)
	if err != nil {
		return nil, err
	}
	info, err := p.C.RegDMABuf(p.Handle, cfg.FD, cfg.Offset, cfg.Length, cfg.IOVA, access)
	if err != nil {
		return nil, err
	}
	return &MR{info, p.C, access}, nil
}

// TakesDMABufs reports whether the device's driver registers dma-bufs. It looks for one behind a descriptor that is none.
func (p *PD) TakesDMABufs() bool {
	_, err := p.C.RegDMABuf(p.Handle, -1, 0, uint64(unix.Getpagesize()), 0, ib.AccessLocalWrite)
	return errors.Is(err, unix.EBADF)
}

// LKey implements driver.MR.
func (m *MR) LKey() ib.LKey { return m.MRInfo.LKey }

// RKey implements driver.MR.
func (m *MR) RKey() ib.RKey { return m.MRInfo.RKey }

// Close implements driver.MR.
func (m *MR) Close() error {
	err := m.c.DeregMR(m.Handle)
	if errors.Is(err, unix.EINVAL) && m.access&ib.AccessMWBind != 0 {
		return fmt.Errorf("%w: a memory window is bound to the region: %w", driver.ErrBusy, err) // rxe's word for it
	}
	return Destroyed(err)
}

type ah struct {
	c      *Context
	handle uint32
	num    ib.AHNum
}

// NewAH makes an address handle, after CheckAH. num returns what work requests name it by, once the driver's data is there.
func (p *PD) NewAH(attr *ib.AHAttr, uhwOut []byte, num func() (ib.AHNum, error)) (driver.AH, error) {
	if err := p.C.CheckAH(attr); err != nil {
		return nil, err
	}
	h, err := p.C.CreateAH(p.Handle, attr, p.C.Link, uhwOut)
	if err != nil {
		return nil, p.C.explainPath(err, attr)
	}
	n, err := num()
	if err != nil {
		return nil, errors.Join(err, p.C.DestroyAH(h))
	}
	return &ah{p.C, h, n}, nil
}

func (a *ah) Num() ib.AHNum { return a.num }
func (a *ah) Close() error  { return Destroyed(a.c.DestroyAH(a.handle)) }

// A QP is what queue pairs of all kernel devices have in common.
type QP struct {
	QPInfo
	C   *Context
	PD  uint32
	typ ib.QPType

	// modify is a lock that can be waited for with a context, and is held when there is something in it: one change at a time, and none
	// beside Destroy. What is locked within a change must not be held by who destroys.
	modify chan struct{}
	handle sync.RWMutex  // held alone when the kernel is told to destroy it, and by who names it to the kernel otherwise
	ended  bool          // guarded by modify and handle: written with both
	port   uint8         // guarded by modify: the one that was set last, or 0
	state  atomic.Uint32 // as last heard, in the lowest 8 bits; errors change it without a word. Above: how often SetState was called

	windows WindowRequests
}

// Init makes the queue pair; cq and srq are handles, srq -1 for none. uhwIn and uhwOut are what the provider's driver takes and gives.
func (q *QP) Init(p *PD, cfg *driver.QPConfig, cookie uint64, sendCQ, recvCQ uint32, srq int, uhwIn, uhwOut []byte) error {
	cmd := abi.CreateQP{
		UserHandle: cookie, PDHandle: p.Handle, SendCQHandle: sendCQ, RecvCQHandle: recvCQ,
		MaxSendWR: uint32(cfg.Cap.MaxSendWR), MaxRecvWR: uint32(cfg.Cap.MaxRecvWR), MaxSendSGE: uint32(cfg.Cap.MaxSendSGE),
		MaxRecvSGE: uint32(cfg.Cap.MaxRecvSGE), MaxInlineData: uint32(cfg.Cap.MaxInline), QPType: uint8(cfg.Type),
	}
	if cfg.SignalAll {
		cmd.SQSigAll = 1
	}
	if srq >= 0 {
		cmd.IsSRQ, cmd.SRQHandle = 1, uint32(srq)
	}
	q.modify = make(chan struct{}, 1)
	info, err := p.C.CreateQP(&cmd, uhwIn, uhwOut)
	if err != nil {
		return err
	}
	q.QPInfo, q.C, q.PD, q.typ = info, p.C, p.Handle, cfg.Type
	return nil
}

// QPN implements driver.QP.
func (q *QP) QPN() ib.QPN { return q.QPInfo.QPN }

// Cap implements driver.QP.
func (q *QP) Cap() ib.QPCap { return q.QPInfo.Cap }

// Type is the transport service.
func (q *QP) Type() ib.QPType { return q.typ }

// State is the state as last heard. It costs one load.
func (q *QP) State() ib.QPState { return ib.QPState(q.state.Load() & stateBits) }

// SetState is for providers that learn of an error otherwise than by asking.
func (q *QP) SetState(s ib.QPState) {
	for was := q.state.Load(); !q.state.CompareAndSwap(was, was&^stateBits+(stateBits+1)|uint32(s)); {
		was = q.state.Load()
	}
}

const stateBits = 0xff // of QP.state

// Change modifies the queue pair and then, with no other change in between, calls then; that is also done if ctx ends
// before the kernel has answered, which cannot be stopped. A change that ctx ends before its turn is never made.
func (q *QP) Change(ctx context.Context, attr *ib.QPAttr, mask ib.QPAttrMask, then func()) error {
	return q.ChangeAround(ctx, attr, mask, func(change func() error) error {
		if err := change(); err != nil {
			return err
		}
		then()
		return nil
	})
}

// ChangeAround is Change for who has something to do before, too: around calls change, which modifies the queue pair.
func (q *QP) ChangeAround(ctx context.Context, attr *ib.QPAttr, mask ib.QPAttrMask, around func(change func() error) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := q.C.Removed(); err != nil {
		return err
	}
	select {
	case q.modify <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	a := *attr
	change := func() error {
		defer func() { <-q.modify }()
		if q.ended {
			return driver.ErrClosed
		}
		if err := q.check(&a, mask); err != nil {
			return err
		}
		return around(func() error {
			if err := q.C.ModifyQP(q.Handle, &a, mask, q.C.Link); err != nil {
				if mask&ib.AttrAV != 0 {
					err = q.C.explainPath(err, &a.AH)
				}
				return err
			}
			if mask&ib.AttrState != 0 {
				q.SetState(a.State)
			}
			if mask&ib.AttrPort != 0 {
				q.port = a.Port
			}
			return nil
		})
	}
	if mask&ib.AttrAV == 0 || ctx.Done() == nil {
		return change()
	}
	done := make(chan error, 1)
	go func() { done <- change() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// check finds values that a port does not have: the kernel's structures would cut them short, and some drivers do not look. The port is
// the one that is named, or else the one that was named last. Called with modify held.
func (q *QP) check(a *ib.QPAttr, mask ib.QPAttrMask) error {
	if mask&ib.AttrPathMTU != 0 && a.PathMTU.Bytes() == 0 {
		return q.C.errorf("modify_qp", fmt.Errorf("%d is no path MTU", uint8(a.PathMTU)))
	}
	if mask&(ib.AttrAV|ib.AttrPKeyIndex) == 0 {
		return nil
	}
	port := q.port
	switch {
	case mask&ib.AttrAV != 0:
		port = a.AH.Port
	case mask&ib.AttrPort != 0:
		port = a.Port
	}
	p, err := q.C.QueryPort(port)
	if err != nil {
		return err
	}
	if mask&ib.AttrPKeyIndex != 0 && int(a.PKeyIndex) >= p.PKeyTable {
		return q.C.errorf("modify_qp", fmt.Errorf("P_Key index %d: port %d has %d P_Keys", a.PKeyIndex, port, p.PKeyTable))
	}
	if mask&ib.AttrAV != 0 {
		return q.C.checkGIDIndex("modify_qp", &a.AH, &p)
	}
	return nil
}

// checkGIDIndex finds indices that a port does not have, or that commands and work requests have no bits for.
func (c *Context) checkGIDIndex(op string, h *ib.AHAttr, p *ib.PortAttr) error {
	const most = 256
	if h.SGIDIndex < 0 || h.SGIDIndex >= min(p.GIDTable, most) {
		return c.errorf(op, fmt.Errorf("GID index %d: port %d has %d slots, of which %d at most can be named", h.SGIDIndex, h.Port, p.GIDTable, most))
	}
	return nil
}

// CheckAH finds out whether an address handle's port is there, and has its GID index.
func (c *Context) CheckAH(attr *ib.AHAttr) error {
	p, err := c.QueryPort(attr.Port)
	if err != nil || global(attr, p.LinkLayer) == 0 { // without a global header the index is not looked at
		return err
	}
	return c.checkGIDIndex("create_ah", attr, &p)
}

// Ask asks for the attributes as they are now. Of a device that has gone there are none, also if the kernel still answers. If the state
// is set meanwhile, the answer's is not noted: it may be of before.
func (q *QP) Ask() (ib.QPAttr, error) {
	if err := q.C.Removed(); err != nil {
		return ib.QPAttr{}, err
	}
	var a ib.QPAttr
	was := q.state.Load()
	err := q.Named(func() (err error) {
		a, err = q.C.QueryQP(q.Handle)
		return err
	})
	if err == nil {
		q.state.CompareAndSwap(was, was&^stateBits|uint32(a.State)&stateBits)
	}
	return a, err
}

// Flush tells the kernel that the queue pair is in the error state, also if it knows: some drivers look for what is to be flushed only
// then. It does so also when the device is known to have gone: until the kernel has heard of it, that may work on. It does not wait for
// Destroy, see Named.
func (q *QP) Flush() error {
	return q.Named(func() error {
		return q.C.ModifyQP(q.Handle, &ib.QPAttr{State: ib.Err}, ib.AttrState, q.C.Link)
	})
}

// Named runs a command that names the queue pair, unless that is destroyed, or is being: the kernel gives its handle to another then.
// It does not wait, for it may be called by who polls.
func (q *QP) Named(command func() error) error {
	if !q.handle.TryRLock() {
		return driver.ErrClosed
	}
	defer q.handle.RUnlock()
	if q.ended {
		return driver.ErrClosed
	}
	return command()
}

// Destroy ends the queue pair; a change that is in progress ends first.
func (q *QP) Destroy() error {
	q.modify <- struct{}{}
	defer func() { <-q.modify }()
	if q.ended {
		return nil
	}
	q.handle.Lock()
	defer q.handle.Unlock()
	err := Destroyed(q.C.DestroyQP(q.Handle))
	q.ended = err == nil
	return err
}
