package rxe

import (
	"sync"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// maxInline is the driver's own limit: the bytes that its largest send element has for scatter/gather elements
// (RXE_MAX_INLINE_DATA of drivers/infiniband/sw/rxe/rxe_param.h). No command tells it.
const maxInline = 512

type rxeContext struct {
	*uverbs.Context

	windows   *uverbs.Windows
	placement bool // the driver has FLUSH and ATOMIC_WRITE

	mu  sync.RWMutex
	qps map[ib.QPN]*qp // guarded by mu
}

func newContext(c *uverbs.Context) *rxeContext {
	r := &rxeContext{Context: c, qps: map[ib.QPN]*qp{}, windows: uverbs.NewWindows()}
	if a, err := c.QueryDevice(); err == nil { // else it will say so again
		r.placement = a.Caps.Has(ib.CapFlush | ib.CapAtomicWrite)
	}
	return r
}

// QueryDevice implements driver.Context.
func (c *rxeContext) QueryDevice() (ib.DeviceAttr, error) {
	a, err := c.Context.QueryDevice()
	a.Caps &^= ib.CapMWBounds // see mw_linux.go
	a.MaxInline = maxInline
	a.Caps |= ib.CapUC | ib.CapUD | ib.CapResizeCQ
	return a, err
}

// AllocPD implements driver.Context.
func (c *rxeContext) AllocPD() (driver.PD, error) {
	p, err := c.Context.AllocPD(nil)
	if err != nil {
		return nil, err
	}
	return &pd{uverbs.WindowPD{PD: p, W: c.windows}, c}, nil
}

// qp returns the queue pair of that number, or nil if it is closed.
func (c *rxeContext) qp(n ib.QPN) *qp {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.qps[n]
}

// mapQueue maps the queue that a command has told of, whose elements must hold size bytes.
func (c *rxeContext) mapQueue(mi *abi.RxeMmapInfo, size int, d direction) (queue, error) {
	mem, err := c.Mmap(int64(mi.Offset), int(mi.Size))
	if err != nil {
		return queue{}, err
	}
	q, err := newQueue(mem, size, d)
	if err != nil {
		c.Munmap(mem)
	}
	return q, err
}

// unmapQueue ends a mapping; the zero queue has none.
func (c *rxeContext) unmapQueue(q *queue) {
	if q.mem != nil {
		c.Munmap(q.mem)
		*q = queue{}
	}
}

type pd struct {
	uverbs.WindowPD
	c *rxeContext
}

// CreateAH implements driver.PD.
func (p *pd) CreateAH(attr ib.AHAttr) (driver.AH, error) {
	var resp abi.RxeCreateAHResp
	return p.NewAH(&attr, uverbs.Bytes(&resp), func() (ib.AHNum, error) {
		if resp.AHNum == 0 {
			return 0, errOldAH
		}
		return ib.AHNum(resp.AHNum), nil
	})
}
