package mlx5emu

import (
	"errors"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Protection domains, regions, windows, and the end of objects of all kinds.

// eventCounts is what the end of a CQ, QP or SRQ answers: how many of its events the client has read.
type eventCounts struct{ first, second uint32 }

func (e eventCounts) bytes() []byte {
	b := make([]byte, 8)
	native.PutUint32(b, e.first)
	native.PutUint32(b[4:], e.second)
	return b
}

type pd struct {
	counted
	soft *softnic.PD
}

type mr struct {
	counted
	pd     *pd
	soft   driver.MR
	key    uint32 // lkey and rkey
	start  uint64
	access ib.Access
	length uint64
	iova   uint64
}

// A keyTable has the regions of a device, by key. It has a lock of its own: see receiver.
type keyTable struct {
	mu sync.RWMutex
	m  map[uint32]*mr
}

func (t *keyTable) get(key uint32) *mr {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.m[key]
}

func (t *keyTable) add(m *mr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.m == nil {
		t.m = map[uint32]*mr{}
	}
	t.m[m.key] = m
}

func (t *keyTable) drop(m *mr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.m, m.key)
}

type mw struct {
	counted
	pd   *pd
	soft driver.MW
}

// destroy ends the object with that handle: first nobody finds it any more, then the software NIC lets go of it.
func destroy[T object](c *Context, handle uint64) (eventCounts, syscall.Errno) {
	c.dev.mu.Lock()
	o, ok := get[T](c, handle)
	if !ok {
		c.dev.mu.Unlock()
		return eventCounts{}, unix.ENOENT
	}
	if *o.users() > 0 {
		c.dev.mu.Unlock()
		return eventCounts{}, unix.EBUSY
	}
	delete(c.handles, uint32(handle))
	c.counts[kindOf(o)]--
	if n, ok := any(o).(*qp); ok && n.srq != nil {
		c.dev.mu.Unlock()
		n.modify.Lock()
		n.settle()
		n.modify.Unlock()
		c.dev.mu.Lock()
	}
	c.withdraw(o)
	c.dev.mu.Unlock()
	if errors.Is(release(o), driver.ErrBusy) { // a window is bound to the region
		c.dev.mu.Lock()
		c.handles[uint32(handle)] = o
		c.counts[kindOf(o)]++
		c.restore(o)
		c.dev.mu.Unlock()
		return eventCounts{}, unix.EBUSY
	}
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	return c.dropped(o), 0
}

// withdraw takes an object from where the data path finds it. Called with dev.mu held.
func (c *Context) withdraw(o object) {
	switch o := o.(type) {
	case *pd:
		c.ahs.drop(o)
	case *mr:
		c.dev.keys.drop(o)
	case *mw:
		delete(c.dev.windows, uint32(o.soft.RKey())>>8)
	case *cq:
		c.arms(o.uar)
		c.cqs = slices.DeleteFunc(c.cqs, func(q *cq) bool { return q == o })
	case *qp:
		o.freeze()
		c.qps = slices.DeleteFunc(c.qps, func(q *qp) bool { return q == o })
		if !o.raw() {
			delete(c.dev.qps, o.qpn)
			c.dev.disown(o.qpn)
		}
	case *srq:
		c.srqs = slices.DeleteFunc(c.srqs, func(q *srq) bool { return q == o })
	case *flow:
		c.dev.flows = slices.DeleteFunc(c.dev.flows, func(f *flow) bool { return f == o })
	}
}

// restore is the opposite of withdraw, for a region that is in use after all. Called with dev.mu held.
func (c *Context) restore(o object) {
	if m, ok := o.(*mr); ok {
		c.dev.keys.add(m)
	}
}

// release ends what the software NIC has of an object. It may wait, and is called with no lock held.
func release(o object) error {
	switch o := o.(type) {
	case *pd:
		return o.soft.Close()
	case *mr:
		return o.soft.Close()
	case *mw:
		return o.soft.Close()
	case *ah:
		return o.close()
	case *cq:
		return o.soft.Close()
	case *qp:
		return o.soft.Close()
	case *srq:
		return o.soft.Close()
	}
	return nil
}

// dropped lets go of what an object needed, and of its events. Called with dev.mu held.
func (c *Context) dropped(o object) (n eventCounts) {
	switch o := o.(type) {
	case *uar:
		c.dropUAR(o)
	case *mr:
		o.pd.n--
	case *mw:
		o.pd.n--
	case *ah:
		o.pd.n--
	case *cq:
		if o.uar != nil {
			o.uar.n--
		}
		if o.channel != nil {
			o.channel.refs--
			n.first = o.fired - uint32(o.channel.forget(o))
			c.sweepChannels()
		}
		n.second = c.eventsRead(o, o.events)
	case *qp:
		o.pd.n--
		o.scq.n--
		o.rcq.n--
		if o.srq != nil {
			o.srq.n--
		}
		c.putDoorbells(o)
		c.recvMemory -= o.recvMemory()
		n.first = c.eventsRead(o, o.events)
	case *flow:
		o.qp.n--
	case *srq:
		o.pd.n--
		c.recvMemory -= o.recvMemory()
		n.first = c.eventsRead(o, o.events)
	}
	return n
}

// eventsRead takes back the asynchronous events about o that the client has not read, and returns how many of all it has.
func (c *Context) eventsRead(o object, all uint32) uint32 {
	if c.async == nil {
		return all
	}
	return all - uint32(c.async.forget(o))
}

// destroyAll ends everything that is left in the context: queue pairs first, then what they use.
func (c *Context) destroyAll() {
	c.dev.mu.Lock()
	var all []object
	for _, o := range c.handles {
		all = append(all, o)
	}
	clear(c.handles)
	c.counts = [objectKinds]int{}
	for _, o := range all {
		c.withdraw(o)
	}
	c.dev.mu.Unlock()
	rank := func(o object) int {
		switch o.(type) {
		case *qp:
			return 0
		case *mw: // before the region that it is bound to
			return 1
		case *pd:
			return 3
		}
		return 2
	}
	slices.SortStableFunc(all, func(a, b object) int { return rank(a) - rank(b) })
	for _, o := range all {
		release(o)
		c.dev.mu.Lock()
		c.dropped(o)
		c.dev.mu.Unlock()
	}
}

func writeAllocPD(w *writeCmd) (response, syscall.Errno) {
	c := w.c
	if errno := c.room(objectPD); errno != 0 {
		return response{}, errno
	}
	soft, err := c.dev.nic.AllocPD()
	if err != nil {
		return response{}, unix.ENOMEM
	}
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	c.dev.nextPDN++
	h := c.add(&pd{soft: soft.(*softnic.PD)})
	return response{bytesOf(&abi.AllocPDResp{PDHandle: h}), bytesOf(&abi.Mlx5AllocPDResp{PDN: c.dev.nextPDN})}, 0
}

// getPD returns a protection domain, which counts one more user: whoever fails puts it back.
func (c *Context) getPD(handle uint32) (*pd, syscall.Errno) {
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	p, ok := get[*pd](c, uint64(handle))
	if !ok {
		return nil, unix.EINVAL
	}
	p.n++
	return p, 0
}

func (c *Context) putPD(p *pd) {
	c.dev.mu.Lock()
	p.n--
	c.dev.mu.Unlock()
}

// The access flags of regions that the device has; the optional ones are ignored.
const (
	mrAccess = ib.Access(abi.IB_UVERBS_ACCESS_LOCAL_WRITE | abi.IB_UVERBS_ACCESS_REMOTE_WRITE | abi.IB_UVERBS_ACCESS_REMOTE_READ |
		abi.IB_UVERBS_ACCESS_REMOTE_ATOMIC | abi.IB_UVERBS_ACCESS_MW_BIND)
	optionalAccess = abi.IB_UVERBS_ACCESS_OPTIONAL_RANGE
)

// checkAccess checks a region's access flags.
func checkAccess(flags uint32) (ib.Access, syscall.Errno) {
	a := ib.Access(flags &^ optionalAccess)
	switch {
	case a&ib.Access(abi.IB_UVERBS_ACCESS_ON_DEMAND) != 0:
		return 0, unix.EOPNOTSUPP
	case a&^(mrAccess|ib.Access(abi.IB_UVERBS_ACCESS_HUGETLB)) != 0:
		return 0, unix.EINVAL
	case a&(ib.AccessRemoteWrite|ib.AccessRemoteAtomic) != 0 && a&ib.AccessLocalWrite == 0:
		return 0, unix.EINVAL
	}
	return a & mrAccess, 0
}

func writeRegMR(w *writeCmd) (response, syscall.Errno) {
	c, q := w.c, structOf[abi.RegMR](w.core)
	access, errno := checkAccess(q.AccessFlags)
	if errno != 0 {
		return response{}, errno
	}
	if q.Start%pageSize != q.HCAVA%pageSize || q.Length == 0 || q.Length > c.dev.attr.MaxMRSize ||
		q.Start+q.Length < q.Start || q.HCAVA+q.Length < q.HCAVA {
		return response{}, unix.EINVAL
	}
	if errno := c.room(objectMR); errno != 0 {
		return response{}, errno
	}
	p, errno := c.getPD(q.PDHandle)
	if errno != 0 {
		return response{}, errno
	}
	soft, err := c.mem.Register(p.soft, q.Start, q.Length, q.HCAVA, access)
	if err != nil {
		c.putPD(p)
		if errors.As(err, &errno) {
			return response{}, errno
		}
		return response{}, unix.ENOMEM
	}
	m := &mr{pd: p, soft: soft, key: uint32(soft.RKey()), start: q.Start, access: access, length: q.Length, iova: q.HCAVA}
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	c.dev.keys.add(m)
	return response{core: bytesOf(&abi.RegMRResp{MRHandle: c.add(m), LKey: m.key, RKey: m.key})}, 0
}

// writeReregMR is refused: a region of the software NIC is what it is. Drivers register anew.
func writeReregMR(*writeCmd) (response, syscall.Errno) { return response{}, unix.EOPNOTSUPP }

func queryMR(r *call) syscall.Errno {
	c := r.c
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	m, ok := get[*mr](c, r.num(abi.UVERBS_ATTR_QUERY_MR_HANDLE))
	if !ok {
		return unix.ENOENT
	}
	return firstOf(r.out32(abi.UVERBS_ATTR_QUERY_MR_RESP_LKEY, m.key), r.out32(abi.UVERBS_ATTR_QUERY_MR_RESP_RKEY, m.key),
		r.out64(abi.UVERBS_ATTR_QUERY_MR_RESP_LENGTH, m.length), r.out64(abi.UVERBS_ATTR_QUERY_MR_RESP_IOVA, m.iova))
}

func writeAllocMW(w *writeCmd) (response, syscall.Errno) {
	const type2 = 2 // enum ib_mw_type
	c, q := w.c, structOf[abi.AllocMW](w.core)
	if q.Reserved != [3]byte{} || structOf[abi.Mlx5AllocMW](w.uhw).CompMask != 0 {
		return response{}, unix.EOPNOTSUPP
	}
	if q.MWType != type2 {
		return response{}, unix.EOPNOTSUPP // type 1 windows are bound by their own command of the library's, which the software NIC lacks
	}
	if errno := c.room(objectMW); errno != 0 {
		return response{}, errno
	}
	p, errno := c.getPD(q.PDHandle)
	if errno != 0 {
		return response{}, errno
	}
	soft, err := c.dev.allocMW(p.soft)
	if err != nil {
		c.putPD(p)
		return response{}, unix.ENOMEM
	}
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	m := &mw{pd: p, soft: soft}
	key := uint32(soft.RKey())
	c.dev.windows[key>>8] = m
	return response{core: bytesOf(&abi.AllocMWResp{MWHandle: c.add(m), RKey: key})}, 0
}
