package mlx5emu

import (
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A srq is a shared receive queue in the client's memory: slots of equal size, each of which begins with a segment that names the
// next one. The device follows these; the client puts slots back at the end of the list, and counts what it posts.
type srq struct {
	counted // queue pairs
	c       *Context
	pd      *pd
	soft    driver.SRQ
	srqn    uint32
	user    uint64
	maxWR   uint32
	maxSGE  uint32
	events  uint32

	// Only the client writes to the queue and to its doorbell record, whose word 0 is the number of receives posted (16 bits, big
	// endian). After the device has read a slot, the client does not touch it until its completion.
	buf, db uint64
	slots   uint32
	stride  uint32
	next    uint32 // the slot that is read next
	read    uint16 // how many were
	dead    bool
}

// srqRequest is what makes a shared receive queue, in whichever form it came. It has a limit, too, which mlx5 does not look at.
type srqRequest struct {
	user          uint64
	pd            uint32
	maxWR, maxSGE uint32
	typ           uint32
	uhw           []byte
}

const nextSegSize = 16

func (c *Context) createSRQ(q *srqRequest) (*srq, uint32, syscall.Errno) {
	u := structOf[abi.Mlx5CreateSRQ](q.uhw)
	switch {
	case q.typ != abi.IB_UVERBS_SRQT_BASIC:
		return nil, 0, unix.EOPNOTSUPP
	case len(q.uhw) < 20 || u.Flags != 0 || u.Reserved0 != 0 || u.Reserved1 != 0:
		return nil, 0, unix.EINVAL
	case q.maxWR == 0 || q.maxWR > maxSRQWR || q.maxSGE > maxSGE:
		return nil, 0, unix.EINVAL
	case u.BufAddr%pageSize != 0 || u.DBAddr%8 != 0:
		return nil, 0, unix.EINVAL
	}
	n := &srq{c: c, user: q.user, buf: u.BufAddr, db: u.DBAddr, slots: roundUpPow2(q.maxWR + 1),
		stride: roundUpPow2(max(nextSegSize+q.maxSGE*segSize, 32)), maxSGE: q.maxSGE}
	n.maxWR = n.slots - 1
	if !c.present(n.buf, uint64(n.slots)*uint64(n.stride)) || !c.present(n.db, 8) {
		return nil, 0, unix.EFAULT
	}
	if errno := c.room(objectSRQ); errno != 0 {
		return nil, 0, errno
	}
	p, errno := c.getPD(q.pd)
	if errno != 0 {
		return nil, 0, errno
	}
	if !c.takeRecvMemory(n.recvMemory()) {
		c.putPD(p)
		return nil, 0, unix.ENOMEM
	}
	soft, err := p.soft.CreateSRQ(driver.SRQConfig{MaxWR: int(n.slots), MaxSGE: min(int(n.stride-nextSegSize)/segSize, softMaxSGE)})
	if err != nil {
		c.putPD(p)
		c.putRecvMemory(n.recvMemory())
		return nil, 0, unix.ENOMEM
	}
	n.pd, n.soft = p, soft
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	c.dev.nextSRQN++
	n.srqn = c.dev.nextSRQN
	c.srqs = append(c.srqs, n)
	return n, c.add(n), 0
}

// recvMemory is what counts of it, in bytes.
func (n *srq) recvMemory() uint64 { return uint64(n.slots) * uint64(n.stride) }

func srqCreate(r *call) syscall.Errno {
	n, h, errno := r.c.createSRQ(&srqRequest{user: r.num(abi.UVERBS_ATTR_CREATE_SRQ_USER_HANDLE),
		pd: uint32(r.num(abi.UVERBS_ATTR_CREATE_SRQ_PD_HANDLE)), maxWR: uint32(r.num(abi.UVERBS_ATTR_CREATE_SRQ_MAX_WR)),
		maxSGE: uint32(r.num(abi.UVERBS_ATTR_CREATE_SRQ_MAX_SGE)), typ: uint32(r.num(abi.UVERBS_ATTR_CREATE_SRQ_TYPE)), uhw: r.in(abi.UVERBS_ATTR_UHW_IN)})
	if errno != 0 {
		return errno
	}
	r.newNumber(abi.UVERBS_ATTR_CREATE_SRQ_HANDLE, uint64(h))
	return firstOf(r.out32(abi.UVERBS_ATTR_CREATE_SRQ_RESP_MAX_WR, n.maxWR), r.out32(abi.UVERBS_ATTR_CREATE_SRQ_RESP_MAX_SGE, n.maxSGE),
		r.out32(abi.UVERBS_ATTR_CREATE_SRQ_RESP_SRQ_NUM, n.srqn), r.out(abi.UVERBS_ATTR_UHW_OUT, bytesOf(&abi.Mlx5CreateSRQResp{SRQN: n.srqn})))
}

func (w *writeCmd) createSRQ(q *srqRequest) (response, syscall.Errno) {
	n, h, errno := w.c.createSRQ(q)
	if errno != 0 {
		return response{}, errno
	}
	return response{bytesOf(&abi.CreateSRQResp{SRQHandle: h, MaxWR: n.maxWR, MaxSGE: n.maxSGE, SRQN: n.srqn}),
		bytesOf(&abi.Mlx5CreateSRQResp{SRQN: n.srqn})}, 0
}

func writeCreateSRQ(w *writeCmd) (response, syscall.Errno) {
	q := structOf[abi.CreateSRQ](w.core)
	return w.createSRQ(&srqRequest{user: q.UserHandle, pd: q.PDHandle, maxWR: q.MaxWR, maxSGE: q.MaxSGE, uhw: w.uhw})
}

func writeCreateXSRQ(w *writeCmd) (response, syscall.Errno) {
	q := structOf[abi.CreateXSRQ](w.core)
	return w.createSRQ(&srqRequest{user: q.UserHandle, pd: q.PDHandle, maxWR: q.MaxWR, maxSGE: q.MaxSGE, typ: q.SRQType, uhw: w.uhw})
}

func writeModifySRQ(w *writeCmd) (response, syscall.Errno) {
	const limit = 2 // IB_SRQ_LIMIT; IB_SRQ_MAX_WR, the other one, mlx5 refuses
	c, q := w.c, structOf[abi.ModifySRQ](w.core)
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	n, ok := get[*srq](c, uint64(q.SRQHandle))
	if !ok || q.AttrMask&^limit != 0 {
		return response{}, unix.EINVAL
	}
	if q.AttrMask&limit != 0 {
		if q.SRQLimit > n.maxWR {
			return response{}, unix.EINVAL
		}
		for n.fetch() { // all that is posted counts; it ends, as the software NIC's queue is no longer than the client's
		}
		if n.soft.SetLimit(int(q.SRQLimit)) != nil {
			return response{}, unix.EINVAL
		}
	}
	return response{}, 0
}

func writeQuerySRQ(w *writeCmd) (response, syscall.Errno) {
	c, q := w.c, structOf[abi.QuerySRQ](w.core)
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	n, ok := get[*srq](c, uint64(q.SRQHandle))
	if !ok {
		return response{}, unix.EINVAL
	}
	return response{core: bytesOf(&abi.QuerySRQResp{MaxWR: n.maxWR, MaxSGE: n.maxSGE, SRQLimit: uint32(n.soft.Limit())})}, 0
}

// fetch hands receives that the client has posted to the software NIC, and reports whether there were any. Called with dev.mu held.
func (n *srq) fetch() bool {
	some, lost := n.take()
	if lost {
		n.fail()
	}
	return some || lost
}

// take is fetch without consequences for a queue that cannot be read.
func (n *srq) take() (some, lost bool) {
	r := &n.c.recvs
	r.mu.Lock()
	defer r.mu.Unlock()
	if n.dead {
		return false, false
	}
	posted, ok := n.c.counter(n.db)
	if !ok || uint32(posted-n.read) > n.slots {
		return false, true
	}
	slot := r.slot[:n.stride]
	for range recvBudget {
		if n.read == posted {
			break
		}
		if n.c.mem.ReadAt(slot, n.buf+uint64(n.next)*uint64(n.stride)) != nil {
			return some, true
		}
		wr := r.request(n.c.dev, uint64(n.next), slot[nextSegSize:])
		if _, err := n.soft.PostRecv(wr); err != nil {
			if !retry(err) {
				return some, true
			}
			break // it is full: completions that were not taken yet make room
		}
		next := uint32(be.Uint16(slot[2:]))
		if next >= n.slots {
			return some, true
		}
		n.next = next
		n.read++
		some = true
	}
	return some, false
}

// fail ends the queue: it cannot be read.
func (n *srq) fail() {
	n.c.recvs.mu.Lock()
	n.dead = true
	n.c.recvs.mu.Unlock()
	n.c.raise(n, n.user, &n.events, ib.EventSRQErr)
}
