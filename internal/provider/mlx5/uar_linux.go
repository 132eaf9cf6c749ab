//go:build amd64 || arm64

package mlx5

import (
	"errors"
	"fmt"
	"sync"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/internal/uverbs"
)

// User access regions: pages of the device that a process writes to ("rings"). A page has one or more UARs of 4 KiB. A UAR has a
// register that arms completion queues, and two that start send queues. These have two halves, which are written in turns, so that
// the second write does not have to wait until the first has left the core.

const (
	uarBytes     = 4096
	armRegister  = 0x20
	sendRegister = 0x800
	regsPerUAR   = 4 // of which the kernel uses two itself, or keeps them for faults
	usablePerUAR = 2
)

// How many registers a context takes for its queue pairs: so many that have only one of them, and so many that are shared by all
// others. On a kernel that hands out registers itself, what it is asked for.
const (
	dedicatedRegs = 8
	allRegs       = 16
)

// A uar is a mapped page.
type uar struct {
	mem     []byte
	handle  uint32 // of the kernel's object, if it is one
	page    uint32 // by which commands name its first UAR
	dynamic bool
}

// A sendReg is a doorbell register for send queues.
type sendReg struct {
	halves [2]*register
	most   int    // blocks that can be written to one half at once; 0: none
	page   uint32 // of its UAR
	shared bool   // several queue pairs have it

	lock ring.SpinLock // of shared ones
	turn uint32        // guarded by lock, or by the only queue pair's sendMu
	used int           // guarded by uars.mu
}

// ringOne starts a send queue at which blocks of a single new request begin at p; units is how long it is.
func (r *sendReg) ringOne(q *sendQueue, p wqe, units uint32) {
	if r.shared {
		r.lock.Lock()
	}
	half := r.halves[r.turn&1]
	r.turn++
	v := be32(q.cur & 0xffff)
	if blocks := int(units+3) / 4; blocks <= r.most && units > 1 {
		blueFlame(q.record, v, half, bytesOf(p), bytesOf(q.base), bytesOf(q.end), blocks)
	} else {
		doorbell(q.record, v, half, firstWord(p))
	}
	if r.shared {
		r.lock.Unlock()
	}
}

// ringLast starts a send queue whose last new request is at p.
func (r *sendReg) ringLast(q *sendQueue, p wqe) {
	if r.shared {
		r.lock.Lock()
	}
	half := r.halves[r.turn&1]
	r.turn++
	doorbell(q.record, be32(q.cur&0xffff), half, firstWord(p))
	if r.shared {
		r.lock.Unlock()
	}
}

// uars are a context's doorbell registers.
type uars struct {
	c     *uverbs.Context
	info  *deviceInfo
	arm   *register // of completion queues
	armAt uint32    // the page of that

	mu        sync.Mutex
	pages     []*uar     // guarded by mu
	dedicated []*sendReg // guarded by mu
	shared    []*sendReg // guarded by mu
	fixed     []*sendReg // by the kernel's number; nil if the kernel does not hand out registers
}

// open maps what the context needs from the beginning.
func (u *uars) open() error {
	if u.info.fixedRegs > 0 {
		return u.openFixed()
	}
	p, err := u.alloc(abi.MLX5_IB_UAPI_UAR_ALLOC_TYPE_NC)
	if err != nil {
		return fmt.Errorf("%w (completion queues are armed there)", err)
	}
	u.arm, u.armAt = registerAt(p.mem, armRegister), p.page
	if u.armAt > 0xffff {
		return fmt.Errorf("the kernel gave UAR %#x for arming completion queues, and commands have 16 bits for it", u.armAt)
	}
	if u.info.halfReg == 0 { // there is no BlueFlame: one register does for all, as it takes single words
		u.shared = append(u.shared, &sendReg{halves: [2]*register{registerAt(p.mem, sendRegister), registerAt(p.mem, sendRegister)}, page: p.page, shared: true})
	}
	return nil
}

// alloc makes the kernel's object for a page, and maps it.
func (u *uars) alloc(kind uint64) (*uar, error) {
	var offset uint64
	var length, page uint32
	p := &uar{dynamic: true}
	err := u.c.Call("alloc_uar", abi.MLX5_IB_OBJECT_UAR, abi.MLX5_IB_METHOD_UAR_OBJ_ALLOC,
		uverbs.NewHandle(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_HANDLE, &p.handle), uverbs.Const(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_TYPE, kind),
		uverbs.Out(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_MMAP_OFFSET, uverbs.Bytes(&offset)),
		uverbs.Out(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_MMAP_LENGTH, uverbs.Bytes(&length)),
		uverbs.Out(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_PAGE_ID, uverbs.Bytes(&page)))
	if err != nil {
		return nil, err
	}
	p.page = page
	if need := u.info.uarsPerPage * uarBytes; int64(length) < int64(need) || int(length) > pageBytes {
		err = fmt.Errorf("the kernel gave a UAR page of %d bytes: %d UARs have %d, and a page %d", length, u.info.uarsPerPage, need, pageBytes)
	} else if offset > 1<<62 || offset%uint64(pageBytes) != 0 {
		err = fmt.Errorf("the kernel gave the UAR offset %#x, which is no page's", offset)
	} else {
		p.mem, err = u.c.Mmap(int64(offset), int(length))
	}
	if err != nil {
		return nil, errors.Join(err, u.release(p))
	}
	u.pages = append(u.pages, p)
	return p, nil
}

// release unmaps a page, and gives it back.
func (u *uars) release(p *uar) (err error) {
	if p.mem != nil {
		err = u.c.Munmap(p.mem)
	}
	if p.dynamic {
		err = errors.Join(err, uverbs.Destroyed(u.c.Call("free_uar", abi.MLX5_IB_OBJECT_UAR, abi.MLX5_IB_METHOD_UAR_OBJ_DESTROY,
			uverbs.Handle(abi.MLX5_IB_ATTR_UAR_OBJ_DESTROY_HANDLE, p.handle))))
	}
	return err
}

// openFixed maps the registers that the kernel has set aside for the context, if it has no objects for them. It chooses one of them for each
// queue pair.
func (u *uars) openFixed() error {
	pages := u.info.fixedRegs / (u.info.uarsPerPage * usablePerUAR)
	for i := range pages {
		offset := int64(abi.MLX5_IB_MMAP_REGULAR_PAGE<<8|i) * int64(pageBytes)
		mem, err := u.c.Mmap(offset, pageBytes)
		if err != nil {
			return fmt.Errorf("UAR page %d of %d: %w", i, pages, err)
		}
		u.pages = append(u.pages, &uar{mem: mem})
		for j := range u.info.uarsPerPage {
			for k := range regsPerUAR {
				at := j*uarBytes + sendRegister + k*2*u.info.halfReg
				r := u.newReg(mem, at, 0)
				r.shared = true // the kernel does not say with whom
				if len(u.fixed) == 0 {
					r.halves[1], r.most = r.halves[0], 0 // the first one has no BlueFlame
				}
				u.fixed = append(u.fixed, r)
			}
		}
	}
	u.arm = registerAt(u.pages[0].mem, armRegister)
	return nil
}

func (u *uars) newReg(mem []byte, at int, page uint32) *sendReg {
	half := u.info.halfReg
	return &sendReg{halves: [2]*register{registerAt(mem, at), registerAt(mem, at+half)}, most: half / blockBytes, page: page}
}

// take returns a register for a queue pair, or nil where the kernel chooses one.
func (u *uars) take() (*sendReg, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.fixed != nil {
		return nil, nil
	}
	for _, r := range u.dedicated {
		if r.used == 0 {
			r.used = 1
			return r, nil
		}
	}
	if n := len(u.dedicated) + len(u.shared); u.info.halfReg > 0 && (n < allRegs || len(u.shared) == 0) {
		fresh, err := u.grow(len(u.dedicated) >= dedicatedRegs)
		if err == nil {
			fresh.used++
			return fresh, nil
		}
		if len(u.shared) == 0 {
			return nil, err
		}
	}
	best := u.shared[0]
	for _, r := range u.shared {
		if r.used < best.used {
			best = r
		}
	}
	best.used++
	return best, nil
}

// grow makes more registers, and returns one of them. Called with mu held.
func (u *uars) grow(shared bool) (*sendReg, error) {
	p, err := u.alloc(abi.MLX5_IB_UAPI_UAR_ALLOC_TYPE_BF)
	if err != nil {
		return nil, err
	}
	var first *sendReg
	for i := range u.info.uarsPerPage {
		for k := range usablePerUAR {
			r := u.newReg(p.mem, i*uarBytes+sendRegister+k*2*u.info.halfReg, p.page+uint32(i))
			if r.shared = shared; shared {
				u.shared = append(u.shared, r)
			} else {
				u.dedicated = append(u.dedicated, r)
			}
			if first == nil {
				first = r
			}
		}
	}
	return first, nil
}

// chosen is the register that the kernel has chosen for a queue pair.
func (u *uars) chosen(number uint32) (*sendReg, error) {
	if uint64(number) >= uint64(len(u.fixed)) {
		return nil, fmt.Errorf("the kernel chose doorbell register %d of %d", number, len(u.fixed))
	}
	return u.fixed[number], nil
}

// give takes a register back. nil is none.
func (u *uars) give(r *sendReg) {
	if r == nil || u.fixed != nil {
		return
	}
	u.mu.Lock()
	r.used--
	u.mu.Unlock()
}

// close unmaps all pages.
func (u *uars) close() (err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, p := range u.pages {
		err = errors.Join(err, u.release(p))
	}
	u.pages, u.dedicated, u.shared, u.fixed = nil, nil, nil, nil
	return err
}
