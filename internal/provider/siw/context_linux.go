package siw

import (
	"crypto/rand"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

type siwContext struct {
	*uverbs.Context

	qpMu    sync.Mutex     // held for moments only: the kernel may take minutes to destroy a queue pair that is being connected
	ending  map[uint32]*qp // guarded by qpMu: see settle
	settled sync.Cond      // on qpMu: one of them has gone

	tellsState bool // the kernel's driver does, of queue pairs
}

func newContext(c *uverbs.Context) *siwContext {
	s := &siwContext{Context: c, tellsState: tellsState(), ending: map[uint32]*qp{}}
	s.settled.L = &s.qpMu
	return s
}

// endNumber notes that the kernel is about to destroy q, until the result is called when q's completions are gone from the queues.
func (c *siwContext) endNumber(q *qp) (done func()) {
	number := uint32(q.QPN())
	c.qpMu.Lock()
	c.ending[number] = q
	c.qpMu.Unlock()
	return func() {
		c.qpMu.Lock()
		delete(c.ending, number)
		c.qpMu.Unlock()
		c.settled.Broadcast()
	}
}

// settle waits until what is left of the queue pair that had this number before has gone: the kernel gives the lowest number that is
// free to the next, at once. It is not for long, as the kernel is done with that one.
func (c *siwContext) settle(number uint32) {
	c.qpMu.Lock()
	for c.ending[number] != nil {
		c.settled.Wait()
	}
	c.qpMu.Unlock()
}

// tellsState reports whether this kernel's driver tells the state of a queue pair. Before Linux 6.8 siw_query_qp leaves it out, and
// what the kernel answers is what its memory had from before: another queue pair's state, for one.
var tellsState = sync.OnceValue(func() bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var major, minor int
	fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return major > 6 || major == 6 && minor >= 8
})

// QueryDevice implements driver.Context.
func (c *siwContext) QueryDevice() (ib.DeviceAttr, error) {
	a, err := c.Context.QueryDevice()
	a.MaxInline = abi.SIW_MAX_INLINE
	a.MaxCQE = max(a.MaxCQE-maxSpare, 0)
	a.Caps = a.Caps&^ib.CapImm | ib.CapCMOnly
	return a, err
}

// QueryPort implements driver.Context.
func (c *siwContext) QueryPort(port uint8) (ib.PortAttr, error) {
	p, err := c.Context.QueryPort(port)
	p.MaxMessage = min(p.MaxMessage, maxMessage)
	return p, err
}

// maxMessage is how many bytes the driver can count: it does in an int.
const maxMessage = 1<<31 - 1

// CreateCompChannel implements driver.Context.
func (c *siwContext) CreateCompChannel() (driver.CompChannel, error) { return c.CreateFiringChannel() }

// AllocPD implements driver.Context.
func (c *siwContext) AllocPD() (driver.PD, error) {
	p, err := c.Context.AllocPD(nil)
	if err != nil {
		return nil, err
	}
	return &pd{p, c}, nil
}

// mapQueue maps a queue of n elements of size bytes, of which at least want were asked for, with tail bytes behind them. key is
// where the driver says that it is.
func (c *siwContext) mapQueue(key uint64, n uint32, want int, size, tail uintptr) (queue, error) {
	const most = 1 << 24 // far above the driver's own limits
	page := uint64(os.Getpagesize())
	switch {
	case n == 0 || n > most || bits.OnesCount32(n) != 1:
		return queue{}, fmt.Errorf("the kernel's queue has %d slots, which is no power of two of at most %d", n, most)
	case int(n) < want:
		return queue{}, fmt.Errorf("the kernel's queue has %d slots, and %d were asked for", n, want)
	case key%page != 0 || key>>62 != 0: // SIW_INVAL_UOBJ_KEY is as good as any other by now: the kernel fails where it once gave that
		return queue{}, fmt.Errorf("the kernel's queue is at %#x, which cannot be mapped", key)
	}
	bytes := (uint64(n)*uint64(size) + uint64(tail) + page - 1) &^ (page - 1)
	mem, err := c.Mmap(int64(key), int(bytes))
	if err != nil {
		return queue{}, err
	}
	q, err := newQueue(mem, n, size, tail)
	if err != nil {
		c.Munmap(mem)
	}
	return q, err
}

// unmapQueue ends a mapping; the zero queue has none.
func (c *siwContext) unmapQueue(q *queue) {
	if q.mem != nil {
		c.Munmap(q.mem)
		*q = queue{}
	}
}

type pd struct {
	uverbs.PD
	c *siwContext
}

var (
	errZeroBased = fmt.Errorf("siw knows memory by its virtual addresses only: zero-based regions: %w", errors.ErrUnsupported)
	errNoAH      = fmt.Errorf("iWARP has no datagrams, and so no address handles: %w", errors.ErrUnsupported)
)

// RegisterMR implements driver.PD.
func (p *pd) RegisterMR(cfg driver.MRConfig) (driver.MR, error) {
	if cfg.Access&ib.AccessZeroBased != 0 {
		return nil, errZeroBased
	}
	var req abi.SiwUreqRegMR
	var resp abi.SiwUrespRegMR
	var key [1]byte
	rand.Read(key[:]) // never fails
	req.StagKey = key[0]
	m, err := p.PD.RegisterMR(cfg, uverbs.Bytes(&req), uverbs.Bytes(&resp))
	if err != nil {
		return nil, err
	}
	if stag := uint32(m.LKey()); stag != resp.Stag || uint32(m.RKey()) != stag || uint8(stag) != req.StagKey {
		return nil, errors.Join(fmt.Errorf("reg_mr: the kernel's keys %#x, %#x and %#x do not fit together", stag, uint32(m.RKey()), resp.Stag), m.Close())
	}
	return m, nil
}

// CreateAH implements driver.PD.
func (p *pd) CreateAH(ib.AHAttr) (driver.AH, error) { return nil, errNoAH }
