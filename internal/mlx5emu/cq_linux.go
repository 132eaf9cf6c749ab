package mlx5emu

import (
	"math/bits"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A cq is a completion queue in the client's memory.
type cq struct {
	counted // queue pairs
	c       *Context
	cqn     uint32
	soft    *softnic.CQ
	user    uint64 // the client's number, in events
	channel *eventFile
	uar     *uar // where it is armed

	// The queue. Only the device writes CQEs, only the client its doorbell record (but for neverArmed): word 0 is how many it has taken
	// (24 bits, big endian), word 1 what it has armed.
	buf, db uint64
	entries uint32 // a power of two
	cqeSize uint32
	pi      uint32 // how many were written
	ci      uint32 // how many the client had taken when it was last looked at

	armed     bool
	solicited bool   // only a solicited or failed completion fires
	arm       uint32 // the last value of the record's word 1; at first, what the device has written there
	urgentAt  uint32 // pi after the last solicited or failed completion
	urgent    bool   // there has been one
	moderation

	fired  uint32 // events on the channel
	events uint32 // asynchronous events
	dead   bool   // it has overrun, or its memory is gone

	pending []ib.WC // the engine's
}

// cqRequest is what makes a CQ, in whichever form it came.
type cqRequest struct {
	user    uint64
	cqe     uint32
	vector  uint32
	channel int64 // descriptor; -1: none
	flags   uint32
	uhw     []byte
}

const (
	cqeFormat64  = 64
	cqeFormat128 = 128
)

// createCQ makes a CQ.
func (c *Context) createCQ(q *cqRequest) (*cq, uint32, syscall.Errno) {
	u := structOf[abi.Mlx5CreateCQ](q.uhw)
	const knownFlags = abi.MLX5_IB_CREATE_CQ_FLAGS_UAR_PAGE_INDEX | abi.MLX5_IB_CREATE_CQ_FLAGS_REAL_TIME_TS
	switch {
	case len(q.uhw) < 24 || q.cqe == 0 || q.cqe > maxCQE || q.vector >= compVectors:
		return nil, 0, unix.EINVAL
	case q.flags&^3 != 0: // timestamps, and to ignore overruns
		return nil, 0, unix.EOPNOTSUPP
	case u.CQESize != cqeFormat64 && u.CQESize != cqeFormat128 || u.Flags&^knownFlags != 0 || u.CQECompEn != 0 || u.Reserved0 != 0 || u.Reserved1 != 0:
		return nil, 0, unix.EINVAL
	case u.BufAddr%pageSize != 0 || u.DBAddr%8 != 0:
		return nil, 0, unix.EINVAL
	}
	n := &cq{c: c, user: q.user, buf: u.BufAddr, db: u.DBAddr, entries: roundUpPow2(q.cqe + 1), cqeSize: u.CQESize}
	if !c.writable(n.buf, uint64(n.entries)*uint64(n.cqeSize)) || !c.present(n.db, 8) {
		return nil, 0, unix.EFAULT
	}
	if errno := c.room(objectCQ); errno != 0 {
		return nil, 0, errno
	}
	page := uint32(0)
	if u.Flags&abi.MLX5_IB_CREATE_CQ_FLAGS_UAR_PAGE_INDEX != 0 {
		page = uint32(u.UARPageIndex)
	}
	soft, err := c.dev.nic.CreateCQ(driver.CQConfig{Entries: maxCQE})
	if err != nil {
		return nil, 0, unix.ENOMEM
	}
	n.soft, n.arm = soft.(*softnic.CQ), neverArmed
	n.soft.MarkSolicited()
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	fail := func(errno syscall.Errno) (*cq, uint32, syscall.Errno) {
		soft.Close()
		return nil, 0, errno
	}
	if n.uar = c.uars[page]; n.uar == nil {
		return fail(unix.EINVAL)
	}
	if q.channel >= 0 {
		if n.channel = c.channel(q.channel); n.channel == nil {
			return fail(unix.EBADF)
		}
	}
	var mark [4]byte
	be.PutUint32(mark[:], neverArmed)
	if c.mem.WriteAt(mark[:], n.db+4) != nil {
		return fail(unix.EFAULT)
	}
	if n.channel != nil {
		n.channel.refs++
	}
	n.uar.n++
	c.dev.nextCQN++
	n.cqn = firstCQN + c.dev.nextCQN
	c.cqs = append(c.cqs, n)
	return n, c.add(n), 0
}

const (
	firstCQN = 0x400
	cqnMask  = 1<<24 - 1 // of numbers in doorbells
)

func roundUpPow2(n uint32) uint32 { return 1 << bits.Len32(n-1) }

// present reports whether the client has memory from va on: each page of it is touched, as when a kernel pins it.
func (c *Context) present(va, n uint64) bool {
	if n == 0 || va+n < va {
		return n == 0
	}
	var b [1]byte
	for at := va; ; at = (at | (pageSize - 1)) + 1 {
		if at-va >= n || at < va {
			return c.mem.ReadAt(b[:], va+n-1) == nil
		}
		if c.mem.ReadAt(b[:], at) != nil {
			return false
		}
	}
}

// writable is present for memory that the device writes to. A Memory may write to what the client cannot, as devices do.
func (c *Context) writable(va, n uint64) bool {
	return c.present(va, n) && c.mem.Check(va, n, true) == nil
}

func cqCreate(r *call) syscall.Errno {
	q := &cqRequest{user: r.num(abi.UVERBS_ATTR_CREATE_CQ_USER_HANDLE), cqe: uint32(r.num(abi.UVERBS_ATTR_CREATE_CQ_CQE)),
		vector: uint32(r.num(abi.UVERBS_ATTR_CREATE_CQ_COMP_VECTOR)), channel: -1,
		flags: uint32(r.num(abi.UVERBS_ATTR_CREATE_CQ_FLAGS)), uhw: r.in(abi.UVERBS_ATTR_UHW_IN)}
	if a := r.attr(abi.UVERBS_ATTR_CREATE_CQ_COMP_CHANNEL); a != nil {
		q.channel = int64(a.data)
	}
	n, h, errno := r.c.createCQ(q)
	if errno != 0 {
		return errno
	}
	r.newNumber(abi.UVERBS_ATTR_CREATE_CQ_HANDLE, uint64(h))
	return firstOf(r.out32(abi.UVERBS_ATTR_CREATE_CQ_RESP_CQE, n.entries-1),
		r.out(abi.UVERBS_ATTR_UHW_OUT, bytesOf(&abi.Mlx5CreateCQResp{CQN: n.cqn})))
}

func writeCreateCQ(w *writeCmd) (response, syscall.Errno) {
	q := structOf[abi.CreateCQ](w.core)
	n, h, errno := w.c.createCQ(&cqRequest{user: q.UserHandle, cqe: q.CQE, vector: q.CompVector, channel: int64(q.CompChannel), uhw: w.uhw})
	if errno != 0 {
		return response{}, errno
	}
	return response{bytesOf(&abi.CreateCQResp{CQHandle: h, CQE: n.entries - 1}), bytesOf(&abi.Mlx5CreateCQResp{CQN: n.cqn})}, 0
}

func writeCreateCQEx(w *writeCmd) (response, syscall.Errno) {
	q := structOf[abi.ExCreateCQ](w.core)
	if q.CompMask != 0 || q.Reserved != 0 {
		return response{}, unix.EINVAL
	}
	n, h, errno := w.c.createCQ(&cqRequest{user: q.UserHandle, cqe: q.CQE, vector: q.CompVector, channel: int64(q.CompChannel), flags: q.Flags, uhw: w.uhw})
	if errno != 0 {
		return response{}, errno
	}
	r := abi.ExCreateCQResp{Base: abi.CreateCQResp{CQHandle: h, CQE: n.entries - 1}, ResponseLength: 16}
	return response{bytesOf(&r), bytesOf(&abi.Mlx5CreateCQResp{CQN: n.cqn})}, 0
}

// writeResizeCQ moves a CQ to another buffer. The last CQE in the old one says so; the client takes what is in front of it
// along, and counts it.
func writeResizeCQ(w *writeCmd) (response, syscall.Errno) {
	c, q, u := w.c, structOf[abi.ResizeCQ](w.core), structOf[abi.Mlx5ResizeCQ](w.uhw)
	if len(w.uhw) < 16 || u.Reserved0 != 0 || u.Reserved1 != 0 || q.CQE == 0 || q.CQE > maxCQE || u.BufAddr%pageSize != 0 ||
		u.CQESize != cqeFormat64 && u.CQESize != cqeFormat128 {
		return response{}, unix.EINVAL
	}
	entries := roundUpPow2(q.CQE + 1)
	there := c.writable(u.BufAddr, uint64(entries)*uint64(u.CQESize))
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	n, ok := get[*cq](c, uint64(q.CQHandle))
	switch {
	case !ok || uint32(u.CQESize) != n.cqeSize:
		return response{}, unix.EINVAL
	case !there:
		return response{}, unix.EFAULT
	}
	if entries != n.entries { // of the same size it stays where it is
		n.look()
		if n.dead || n.pi-n.ci >= n.entries || n.pi-n.ci+1 > entries {
			return response{}, unix.EINVAL
		}
		var e cqe
		e.setOpcode(cqeResize)
		n.write(&e)
		n.buf, n.entries = u.BufAddr, entries
	}
	return response{core: bytesOf(&abi.ResizeCQResp{CQE: n.entries - 1})}, 0
}

// look reads how many CQEs the client has taken. A number that cannot be is not believed: the CQ then counts as full sooner.
func (n *cq) look() {
	var b [4]byte
	if n.c.mem.ReadAt(b[:], n.db) != nil {
		n.fail()
		return
	}
	const mask = 1<<24 - 1
	taken := (be32(b[:]) - n.ci) & mask
	if taken <= n.pi-n.ci {
		n.ci += taken
	}
}

// complete writes a CQE. urgent: it is solicited, or an error.
func (n *cq) complete(e *cqe, urgent bool) {
	if n.dead {
		return
	}
	if n.pi-n.ci >= n.entries {
		if n.look(); n.dead {
			return
		}
		if n.pi-n.ci >= n.entries {
			n.fail()
			return
		}
	}
	n.write(e)
	if urgent {
		n.urgentAt, n.urgent = n.pi, true
	}
	if n.armed && (urgent || !n.solicited) {
		n.await(1)
	}
}

// write puts a CQE where the next one goes. The client looks at the last byte, so that is written last.
func (n *cq) write(e *cqe) {
	e.setOwner(n.pi/n.entries&1 == 1)
	n.c.dev.traceCQE(n, e)
	va := n.buf + uint64(n.pi%n.entries)*uint64(n.cqeSize) + uint64(n.cqeSize-cqeFormat64)
	n.pi++
	if n.c.mem.WriteAt(e[:cqeOwner], va) != nil || n.c.mem.WriteAt(e[cqeOwner:], va+cqeOwner) != nil {
		n.fail()
	}
}

// doorbell takes note of what the client has armed. Several CQs share a register, and what is in the record stays there: so each is
// looked at whenever the register was written.
func (n *cq) doorbell() {
	var b [4]byte
	if n.dead || n.c.mem.ReadAt(b[:], n.db+4) != nil {
		return
	}
	v := be32(b[:])
	if v == n.arm {
		return
	}
	// What was armed for any completion stays so (IBA 11.4.2.2), until its event has been taken: the sequence number says that.
	stays := n.armed && !n.solicited && n.arm>>armSequence == v>>armSequence
	n.arm, n.armed, n.solicited = v, true, v&armSolicited != 0 && !stays
	n.c.dev.traceArm(n, v)
	// A CQE that the client had not seen when it armed fires as one that comes now.
	const mask = 1<<24 - 1
	seen := n.pi - (n.pi-v)&mask
	if n.pi-seen > n.entries {
		return // it says that it has seen what is still to come
	}
	n.waiting = 0
	if seen != n.pi && (!n.solicited || n.urgent && int32(n.urgentAt-seen) > 0) {
		n.await(n.pi - seen)
	}
}

const (
	armSolicited = 1 << 24
	armSequence  = 28 // above it: 2 bits, which the client counts with the events it has taken
	// neverArmed is what the device writes where clients arm, before they do: the first value that they write is usually 0, which
	// would look like nothing. Clients do not read it.
	neverArmed = 1<<32 - 1
)

// fire raises the event that was armed.
func (n *cq) fire() {
	n.armed, n.waiting = false, 0
	if n.channel == nil {
		return
	}
	b := make([]byte, 8)
	native.PutUint64(b, n.user)
	n.fired++
	n.channel.send(b, n)
}

// fail ends the CQ, and what completes on it (IBA 11.6.3.2).
func (n *cq) fail() {
	if n.dead {
		return
	}
	n.dead = true
	n.c.raise(n, n.user, &n.events, ib.EventCQErr)
	for _, q := range n.c.qps {
		if q.scq == n || q.rcq == n {
			q.fatal()
		}
	}
	if n.armed {
		n.fire()
	}
}
