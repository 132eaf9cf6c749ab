// Package mr is about memory that devices work in: regions, pools of buffers, memory windows, and the keys by which
// peers reach them.
//
// Memory made by Alloc, and by pools, lies outside the Go heap, in huge pages where the system has them, and can be
// shared with other processes of the host. Register makes a region of any Go slice.
package mr

import (
	"errors"
	"fmt"
	"math"
	"runtime"
	"sync"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/life"
	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// An MR is a registered memory region. It is safe for concurrent use; who may touch which bytes when is between its
// users and the work requests that name them.
type MR struct {
	life   life.Node
	pd     *verbs.PD
	drv    driver.MR
	buf    []byte // never changes, so that SGE needs no lock; not to be touched after Close. Nil: the memory is a dma-buf's
	n      int    // length in bytes
	base   uint64 // the device's address of the first byte
	lkey   ib.LKey
	rkey   ib.RKey
	access ib.Access
	region *mem.Region // of allocated memory, else nil
	pin    *pin        // of registered Go memory, else nil
	parent *MR         // of a part of another region, else nil

	withdrawn bool // from the device; guarded by life.Close
}

// Alloc allocates size bytes of zeroed memory and registers them. Close gives them back. Access is what may be done to
// them beyond local reading: zero is enough for the source of sends; receives and results of reads need
// ib.AccessLocalWrite, peers the remote rights.
func Alloc(pd *verbs.PD, size int, access ib.Access) (*MR, error) {
	return AllocOptions(pd, size, access, Options{})
}

// Options say what memory to allocate. Zero is the default.
type Options struct {
	// Populate touches every page now, so that first use takes no page faults, and a shortage is an error here.
	Populate bool
	// NoHuge asks for ordinary pages. Huge ones are the default where the system has them, and where little is wasted.
	NoHuge bool
	// OnNode asks for memory on NUMA node Node, as a hint.
	OnNode bool
	Node   int
	// Name is shown in /proc/PID/maps, for debugging.
	Name string
}

// AllocOptions is Alloc with options.
func AllocOptions(pd *verbs.PD, size int, access ib.Access, opt Options) (*MR, error) {
	dev := pd.Context().Name()
	if err := access.Check(); err != nil {
		return nil, opErr("reg_mr", dev, err)
	}
	mo := mem.Options{Name: opt.Name, Populate: opt.Populate, OnNode: opt.OnNode, Node: opt.Node}
	if opt.NoHuge {
		mo.Huge = mem.HugeNever
	}
	r, err := mem.Alloc(size, mo)
	if err != nil {
		return nil, opErr("reg_mr", dev, err)
	}
	m := &MR{pd: pd, buf: r.Bytes()[:size:size], n: size, access: access, region: r}
	if err := m.registerBytes(r.FD()); err != nil {
		r.Close()
		return nil, err
	}
	return m, nil
}

// Register makes a region of b, whose array stays pinned until Close. The array can be anything that b can point to;
// the rest of it is not part of the region.
func Register(pd *verbs.PD, b []byte, access ib.Access) (*MR, error) {
	dev := pd.Context().Name()
	if err := access.Check(); err != nil {
		return nil, opErr("reg_mr", dev, err)
	}
	if len(b) == 0 {
		return nil, opErr("reg_mr", dev, errors.New("an empty slice cannot be registered"))
	}
	m := &MR{pd: pd, buf: b[:len(b):len(b)], n: len(b), access: access, pin: newPin(b)}
	if err := m.registerBytes(-1); err != nil {
		m.pin.unpin()
		return nil, err
	}
	return m, nil
}

// RegisterDMABuf registers length bytes from offset on of a dma-buf, which is memory of another device, such as a GPU: peers
// and the device reach it without the CPU. fd is read during the call only, and stays the caller's; the region holds the memory
// itself until Close. iova is the region's address in scatter/gather elements and for peers: any number that equals offset
// modulo the page size, such as offset, or the address where the memory is mapped.
//
// Bytes of such a region is nil: where the memory can be seen by the CPU, if at all, is between the caller and the other
// device, and so is when each of the two has to look. It fails with errors.ErrUnsupported on devices that cannot reach the
// memory of others: the software ones.
func RegisterDMABuf(pd *verbs.PD, fd int, offset, length int64, iova uint64, access ib.Access) (*MR, error) {
	dev := pd.Context().Name()
	if err := access.Check(); err != nil {
		return nil, opErr("reg_mr", dev, err)
	}
	r, ok := pd.Driver().(driver.DMABufRegistrar)
	switch {
	case !ok:
		return nil, opErr("reg_mr", dev, fmt.Errorf("dma-buf: %w", errors.ErrUnsupported))
	case fd < 0 || offset < 0 || length <= 0 || length > math.MaxInt || offset > math.MaxInt64-length || iova > math.MaxUint64-uint64(length):
		return nil, opErr("reg_mr", dev, fmt.Errorf("dma-buf: no region of %d bytes at offset %d of descriptor %d, and address %#x", length, offset, fd, iova))
	case access&(ib.AccessZeroBased|ib.AccessOnDemand) != 0:
		return nil, opErr("reg_mr", dev, errors.New("dma-buf: AccessZeroBased and AccessOnDemand are for memory of this process; iova is the address"))
	}
	m := &MR{pd: pd, n: int(length), base: iova, access: access}
	err := m.register(func() (driver.MR, error) {
		return r.RegisterDMABuf(driver.DMABufConfig{FD: fd, Offset: uint64(offset), Length: uint64(length), IOVA: iova, Access: access})
	})
	if err != nil {
		return nil, err
	}
	return m, nil
}

// registerBytes registers m.buf, which fd is the file of, or -1.
func (m *MR) registerBytes(fd int) error {
	if m.access&ib.AccessZeroBased == 0 {
		m.base = addrOf(m.buf)
	}
	return m.register(func() (driver.MR, error) {
		return m.pd.Driver().RegisterMR(driver.MRConfig{Mem: m.buf, Access: m.access, FD: fd})
	})
}

func (m *MR) register(do func() (driver.MR, error)) error {
	dev := m.pd.Context().Name()
	parents := []*life.Node{m.pd.Life()}
	if m.parent != nil {
		parents = append(parents, &m.parent.life)
	}
	if err := m.life.Attach(parents...); err != nil {
		return opErr("reg_mr", dev, err)
	}
	drv, err := do()
	if err != nil {
		m.life.Abandon()
		return opErr("reg_mr", dev, fmt.Errorf("%d bytes, %s: %w", m.n, m.access, err))
	}
	m.drv, m.lkey, m.rkey = drv, drv.LKey(), drv.RKey()
	life.Watch(m, &m.life, "mr.MR", dev)
	return nil
}

// A pin keeps the array of a slice where it is.
type pin struct {
	p runtime.Pinner
	b []byte
}

// pins holds every pin: one that became garbage would let the array go while a device may still write to it (and the
// runtime would panic). A region that is dropped without Close leaks its array instead, and is reported.
var pins sync.Map // *pin -> struct{}

func newPin(b []byte) *pin {
	p := &pin{b: b}
	p.p.Pin(&b[0])
	pins.Store(p, struct{}{})
	return p
}

func (p *pin) unpin() {
	p.p.Unpin()
	pins.Delete(p)
}

// Bytes is the memory; nil for that of a dma-buf. For allocated regions it is nil after Close, and slices of it must not be touched any more: the
// memory is unmapped, and touching it kills the process.
func (m *MR) Bytes() []byte {
	if m.life.Closed() {
		return nil
	}
	return m.buf
}

// Len is the region's length in bytes.
func (m *MR) Len() int { return m.n }

// LKey is the key for local access, for scatter/gather elements.
func (m *MR) LKey() ib.LKey { return m.lkey }

// RKey is the key for access by peers.
func (m *MR) RKey() ib.RKey { return m.rkey }

// Addr is the region's address in scatter/gather elements and for peers: 0 with ib.AccessZeroBased, the iova of a dma-buf's
// region, else the virtual address of its first byte.
func (m *MR) Addr() uint64 { return m.base }

// Access is what may be done to the region.
func (m *MR) Access() ib.Access { return m.access }

// PD returns the protection domain that the region belongs to.
func (m *MR) PD() *verbs.PD { return m.pd }

// SGE returns the scatter/gather element of n bytes at off. It panics, as a slice expression does, if they are not
// within the region.
func (m *MR) SGE(off, n int) ib.SGE {
	checkRange(off, n, m.n)
	return ib.SGE{Addr: m.base + uint64(off), Length: uint32(n), LKey: m.lkey}
}

// Remote returns what a peer needs to reach the whole region.
func (m *MR) Remote() RemoteKey { return m.RemoteRange(0, m.n) }

// RemoteRange returns what a peer needs to reach n bytes at off. It panics, as a slice expression does, if they are not
// within the region. The key opens the whole region all the same: to grant less, use Sub or bind a Window.
func (m *MR) RemoteRange(off, n int) RemoteKey {
	if off < 0 || n < 0 || off > m.n-n {
		panic(rangeError{off, n, m.n})
	}
	return RemoteKey{Addr: m.base + uint64(off), Len: uint64(n), RKey: m.rkey, Access: m.access & ib.AccessRemote}
}

// Close withdraws the region from the device, then frees or unpins the memory: when it returns nil, neither the device
// nor a peer touches it any more. It fails with verbs.ErrBusy while a memory window is bound to the region.
func (m *MR) Close() error {
	return opErr("dereg_mr", m.pd.Context().Name(), m.life.Close(func() error {
		if !m.withdrawn {
			if err := m.drv.Close(); err != nil {
				return err
			}
			m.withdrawn = true
		}
		if m.pin != nil {
			m.pin.unpin()
		}
		if m.region != nil {
			return m.region.Close()
		}
		return nil
	}))
}

func checkRange(off, n, length int) {
	if off < 0 || n < 0 || off > length-n || uint64(n) > math.MaxUint32 {
		panic(rangeError{off, n, length})
	}
}

// rangeError is a panic's value; it is a runtime.Error, like that of a slice expression.
type rangeError struct{ off, n, length int }

// RuntimeError makes it a runtime.Error.
func (rangeError) RuntimeError() {}

func (e rangeError) Error() string {
	return fmt.Sprintf("mr: range of %d bytes at offset %d is not within %d bytes", e.n, e.off, e.length)
}

func opErr(op, device string, err error) error {
	if err == nil {
		return nil
	}
	return &verbs.OpError{Op: op, Device: device, Err: err}
}
