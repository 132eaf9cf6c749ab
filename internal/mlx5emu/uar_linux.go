package mlx5emu

import (
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// Where things lie in a UAR page.
const (
	uarArm      = 0x20          // a CQ's doorbell
	uarSend     = 0x800         // the first of the send registers
	sendRegStep = bfRegSize / 2 // each is two buffers, which take turns
	sendBuffers = 4             // what is looked at: both buffers of the two registers that clients may use
)

// The map of the file behind a context. Static UARs lie where the kernel's mmap commands put them: (command<<8 | page) pages.
// UAR objects are told their offset, which is the device's to choose.
const (
	mmapCommandPages = 256
	dynamicBase      = 0x900 // pages
	maxDynamic       = 1024
	filePages        = dynamicBase + maxDynamic
)

// pages is the memory that device and client share. Only the client writes to it, except that the device takes doorbells back
// by writing zero to where it has found them.
type pages struct {
	file *os.File
	mem  []byte
}

func newPages(name string) (*pages, error) {
	fd, err := unix.MemfdCreate("uverbs-"+name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("mlx5emu: memory for UAR pages: %w", err)
	}
	p := &pages{file: os.NewFile(uintptr(fd), "uverbs-"+name)}
	if err = p.setUp(fd); err != nil {
		p.file.Close()
		return nil, fmt.Errorf("mlx5emu: UAR pages: %w", err)
	}
	return p, nil
}

// setUp gives the file its length, for good, and maps it. The seals are against the client, which may write to the file: were it to
// become shorter, this process would die of SIGBUS at its next look at a register.
func (p *pages) setUp(fd int) error {
	if err := unix.Ftruncate(fd, filePages*pageSize); err != nil {
		return fmt.Errorf("their length: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return fmt.Errorf("seals: %w", err)
	}
	mem, err := unix.Mmap(fd, 0, filePages*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mapping: %w", err)
	}
	p.mem = mem
	return nil
}

// tellClock writes the page by which clients make times of the device's clock, which counts nanoseconds from then on.
func (p *pages) tellClock(began time.Time) {
	const page = abi.MLX5_IB_MMAP_CLOCK_INFO*mmapCommandPages + abi.MLX5_IB_CLOCK_INFO_V1
	copy(p.mem[page*pageSize:], bytesOf(&abi.Mlx5ClockInfo{Nsec: uint64(began.UnixNano()), Mult: 1, Mask: 1<<64 - 1}))
}

func (p *pages) close() error {
	if p.mem != nil {
		unix.Munmap(p.mem)
		p.mem = nil
	}
	return p.file.Close()
}

// A uar is a page of doorbells. A static one is seen at several places of the file, one for each mmap command.
type uar struct {
	counted
	id    uint32
	views []int // offsets in the file
}

func (c *Context) staticUAR(id uint32) *uar {
	u := &uar{id: id}
	for _, command := range []int{abi.MLX5_IB_MMAP_REGULAR_PAGE, abi.MLX5_IB_MMAP_WC_PAGE, abi.MLX5_IB_MMAP_NC_PAGE} {
		u.views = append(u.views, (command*mmapCommandPages+int(id))*pageSize)
	}
	return u
}

// uarAlloc is the method that makes a UAR object.
func uarAlloc(r *call) syscall.Errno {
	c := r.c
	switch r.num(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_TYPE) {
	case abi.MLX5_IB_UAPI_UAR_ALLOC_TYPE_BF, abi.MLX5_IB_UAPI_UAR_ALLOC_TYPE_NC:
	default:
		return unix.EOPNOTSUPP
	}
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	id := uint32(0)
	for ; c.uars[id] != nil; id++ {
	}
	if id >= maxDynamic {
		return unix.ENOMEM
	}
	u := &uar{id: id, views: []int{(dynamicBase + int(id)) * pageSize}}
	if errno := firstOf(
		r.out64(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_MMAP_OFFSET, uint64(u.views[0])),
		r.out32(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_MMAP_LENGTH, pageSize),
		r.out32(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_PAGE_ID, id),
	); errno != 0 {
		return errno
	}
	clear(c.pages.mem[u.views[0]:][:pageSize])
	c.uars[id] = u
	c.uarIDs = max(c.uarIDs, int(id)+1)
	r.newNumber(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_HANDLE, uint64(c.add(u)))
	return 0
}

// dropUAR ends a UAR object. Called with dev.mu held.
func (c *Context) dropUAR(u *uar) { delete(c.uars, u.id) }

// A doorbell is a write to a send register that the device has found.
type doorbell struct {
	offset int // in the UAR
	word   [8]byte
	bf     [56]byte // what lies behind it: the rest of the first 64 bytes, if it was a BlueFlame write
}

// arms takes what the client has written to u's CQ register, and looks at its CQs. A write that follows another one before the device has
// looked replaces it: so all that use the page are looked at, if it names one of them, and before that one goes. Called with dev.mu held.
func (c *Context) arms(u *uar) (some bool) {
	for _, view := range u.views {
		var word [8]byte
		native.PutUint64(word[:], takeWord(c.pages.mem[view:][:pageSize], uarArm))
		number := be32(word[4:]) & cqnMask
		some = some || slices.ContainsFunc(c.cqs, func(n *cq) bool { return n.uar == u && n.cqn == number })
	}
	if some {
		for _, n := range c.cqs {
			if n.uar == u {
				n.doorbell()
			}
		}
	}
	return some
}

// rings takes the doorbells that the client has written to u's send registers. A write that follows another one before the device has
// looked replaces it: so whoever uses the page has to be looked at.
func (c *Context) rings(u *uar, send func(*doorbell)) (sends bool) {
	for _, view := range u.views {
		page := c.pages.mem[view:][:pageSize]
		for k := range sendBuffers {
			at := uarSend + k*sendRegStep
			v := takeWord(page, at)
			if v == 0 {
				continue
			}
			sends = true
			if send != nil {
				d := doorbell{offset: at}
				native.PutUint64(d.word[:], v)
				copy(d.bf[:], page[at+8:])
				send(&d)
			}
		}
	}
	return sends
}

// takeWord takes what was written to a register of a page, and leaves zero, which is no doorbell.
func takeWord(page []byte, at int) uint64 {
	w := word64(page, at)
	for {
		v := atomic.LoadUint64(w)
		if v == 0 || atomic.CompareAndSwapUint64(w, v, 0) {
			return v
		}
	}
}
