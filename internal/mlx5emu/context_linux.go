package mlx5emu

import (
	"errors"
	"os"
	"slices"
	"sync"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// A Context is one open of the device: what an open /dev/infiniband/uverbsN is to its client. Ioctl may be called by several
// goroutines at a time; Close waits for calls in progress.
type Context struct {
	dev *Device
	mem Memory

	calls  sync.RWMutex // held for reading by every command, for writing by Close
	closed bool         // guarded by calls

	pages *pages // set up by Open, ended by Close

	recvs receiver

	// Guarded by dev.mu.
	established bool // GET_CONTEXT has been called
	cqeVersion  uint8
	devx        bool // the client hears the numbers of what a raw packet queue pair consists of
	dynamic     bool // the client makes UARs itself
	bfregs      uint32
	inUse       []int // QPs on each of the static bfregs
	handles     map[uint32]object
	counts      [objectKinds]int // of handles
	recvMemory  uint64           // bytes of receive queues
	nextHandle  uint32
	uars        map[uint32]*uar // by page id
	uarIDs      int             // all are below
	async       *eventFile      // nil: the client has not asked for it
	channels    []*eventFile    // those that CQs may use, in the order they were made
	cqs         []*cq           // in the order they were made
	qps         []*qp           // likewise
	srqs        []*srq          // likewise
	ahs         addressHandles
}

// An object is what a handle names.
type object interface {
	// users counts the objects that need this one.
	users() *int
}

// counted is the part that all objects have.
type counted struct{ n int }

func (c *counted) users() *int { return &c.n }

// ErrTooMany is the error of a device that has as many contexts as it can have.
var ErrTooMany = errors.New("mlx5emu: too many contexts")

// Open makes a context whose client's memory is mem. The context does not own it.
func (d *Device) Open(mem Memory) (*Context, error) {
	p, err := newPages(d.cfg.Name)
	if err != nil {
		return nil, err
	}
	p.tellClock(d.began)
	c := &Context{dev: d, mem: mem, pages: p, handles: map[uint32]object{}, uars: map[uint32]*uar{}}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		p.close()
		return nil, ErrClosed
	}
	if len(d.order) >= maxContexts {
		p.close()
		return nil, ErrTooMany
	}
	d.order = append(d.order, c)
	return c, nil
}

// Pages is the file that the client maps, where commands tell it to: UAR pages. It is the context's, and stays open until
// Close. A client that has it in the place of its device file can map it without further ado.
func (c *Context) Pages() *os.File { return c.pages.file }

// Close ends the context, with all objects that are left in it. It may be called again.
func (c *Context) Close() error {
	c.calls.Lock()
	defer c.calls.Unlock()
	if c.closed {
		return nil
	}
	c.closed = true
	c.dev.mu.Lock()
	c.dev.order = slices.DeleteFunc(slices.Clone(c.dev.order), func(o *Context) bool { return o == c })
	c.dev.mu.Unlock()
	c.destroyAll()
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	if c.async != nil {
		c.async.close()
	}
	for _, ch := range c.channels {
		ch.close()
	}
	return c.pages.close()
}

// ready reports whether GET_CONTEXT has been called.
func (c *Context) ready() bool {
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	return c.established
}

// add gives an object a handle. Called with dev.mu held, as those below.
func (c *Context) add(o object) uint32 {
	c.nextHandle++
	c.handles[c.nextHandle] = o
	c.counts[kindOf(o)]++
	return c.nextHandle
}

// get returns the object of that kind that a handle names.
func get[T object](c *Context, handle uint64) (T, bool) {
	var none T
	if handle > 1<<32-1 {
		return none, false
	}
	o, ok := c.handles[uint32(handle)].(T)
	return o, ok
}

// The limits that GET_CONTEXT tells. They are plausible values, not a card's.
const (
	pageSize     = 4096
	qpTableSize  = 1 << 17
	bfRegSize    = 512
	cacheLine    = 64
	maxSQDesc    = 1024
	maxRQDesc    = 512
	maxSendWQEBB = 1 << 15
	maxRecvWR    = 1 << 15
	maxSRQWR     = 1<<15 - 1
	bfregsPerUAR = 2   // that clients may use
	bfregStride  = 4   // of bfreg numbers: each UAR has four registers
	maxBFRegs    = 512 // static
)

// ucontext is the driver's part of GET_CONTEXT's answer, cut to what the client has room for.
func (c *Context) ucontext(room int) []byte {
	r := abi.Mlx5AllocUcontextResp{
		QPTabSize: qpTableSize, BFRegSize: bfRegSize, TotBFRegs: c.bfregs, CacheLineSize: cacheLine,
		MaxSQDescSz: maxSQDesc, MaxRQDescSz: maxRQDesc, MaxSendWQEBB: maxSendWQEBB, MaxRecvWR: maxRecvWR, MaxSRQRecvWR: maxSRQWR + 1,
		NumPorts: 1, CQEVersion: c.cqeVersion, CmdsSuppUHW: abi.MLX5_USER_CMDS_SUPP_UHW_QUERY_DEVICE | abi.MLX5_USER_CMDS_SUPP_UHW_CREATE_AH,
		ClockInfoVersions: 1 << abi.MLX5_IB_CLOCK_INFO_V1, EthMinInline: c.dev.inlineMode(), LogUARSize: 12, NumUARsPerPage: 1,
	}
	b := bytesOf(&r)
	r.ResponseLength = uint32(min(room, len(b)))
	return b[:r.ResponseLength]
}
