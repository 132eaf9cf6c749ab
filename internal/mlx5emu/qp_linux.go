package mlx5emu

import (
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A softQP is a queue pair of the software NIC, or a rawQP.
type softQP interface {
	driver.QP
	State() ib.QPState
	Draining() bool
}

// A qp is a queue pair whose queues are in the client's memory.
type qp struct {
	counted  // flow rules
	c        *Context
	pd       *pd
	scq, rcq *cq
	srq      *srq
	typ      ib.QPType
	soft     softQP
	qpn      uint32 // of a raw packet queue pair, that of its send queue
	rqn      uint32 // of the receive queue of such a one
	selfUC   bool   // such a one gets what its own context sends
	selfMC   bool   // likewise, to groups
	user     uint64 // the client's number, in events
	index    uint32 // uidx
	cap      abi.QPCap
	sigAll   bool
	uar      *uar
	bfreg    uint32 // static UARs: the register, else noBFReg
	events   uint32 // asynchronous events

	// The queues: receives first, then sends, or these elsewhere. Only the client writes to them and to its doorbell record: word 0 is the number of
	// receives it has posted, word 1 that of basic blocks (16 bits, big endian).
	buf, db uint64
	rqCount uint32
	rqShift uint32
	sqCount uint32 // basic blocks
	sqBuf   uint64

	modify sync.Mutex // one change at a time
	// Of a connection, as the client has said it; guarded by the device's mu.
	dest    abi.QPDest
	destQPN uint32

	// The data path's.
	frozen      bool   // it is being reset, or has gone
	hasty       bool   // a message of it is lost, or may fail, where no receive is posted
	datagram    uint64 // bytes: the longest datagram, as the port's active MTU was when the queue pair got ready to receive
	rung        bool   // there was a doorbell
	life        uint16 // counts resets: completions of an earlier life are dropped
	sendNext    uint16 // the basic block that is read next
	recvNext    uint16 // the receive that is read next
	sendDone    uint16 // the basic block behind the last WQE that has a CQE: by that, the client knows all in front of it to be done with
	recvDone    uint16 // receives that have a CQE; not those of a shared receive queue
	outstanding int    // requests that the software NIC has
	sendBad     bool   // the send queue cannot be read any more
	recvBad     bool   // likewise the receive queue
	hold        *held
	wrecked     bool // it is to go to ERR, and does not read its queue before
}

const noBFReg = 1<<32 - 1

// A held is a request that completes without the software NIC, once everything in front of it has.
type held struct {
	id sendID
	st ib.WCStatus
}

// qpRequest is what makes a queue pair, in whichever form it came.
type qpRequest struct {
	user              uint64
	pd, scq, rcq, srq uint32
	hasSRQ            bool
	cap               abi.QPCap
	typ               ib.QPType
	sigAll            bool
	uhw               []byte
}

// Limits of what the software NIC is asked for. Deeper queues wait in the client's memory.
const (
	softSends    = 256
	softUDRecvs  = 4096
	softMaxSGE   = 32
	softInline   = maxWQE
	maxRQStride  = 9 // log2 of maxRQDesc
	uidxUnused   = 1<<24 - 1
	qpFlagsKnown = abi.MLX5_QP_FLAG_SCATTER_CQE | abi.MLX5_QP_FLAG_ALLOW_SCATTER_CQE | abi.MLX5_QP_FLAG_BFREG_INDEX |
		abi.MLX5_QP_FLAG_UAR_PAGE_INDEX | abi.MLX5_QP_FLAG_PACKET_BASED_CREDIT_MODE
	selfFlags = abi.MLX5_QP_FLAG_TIR_ALLOW_SELF_LB_UC | abi.MLX5_QP_FLAG_TIR_ALLOW_SELF_LB_MC
)

// createQP makes a queue pair.
func (c *Context) createQP(q *qpRequest) (*qp, uint32, syscall.Errno) {
	u := structOf[abi.Mlx5CreateQP](q.uhw)
	known := uint32(qpFlagsKnown)
	switch q.typ {
	case ib.RC, ib.UC, ib.UD:
	case ib.RawPacket:
		if c.dev.cfg.InfiniBand {
			return nil, 0, unix.EOPNOTSUPP
		}
		if known |= selfFlags; q.hasSRQ || len(q.uhw) < 48 || u.SQBufAddr%pageSize != 0 || c.cqeVersion == 0 {
			return nil, 0, unix.EINVAL
		}
	default:
		return nil, 0, unix.EOPNOTSUPP
	}
	switch {
	case len(q.uhw) < 36 || u.Flags&^known != 0:
		return nil, 0, unix.EINVAL
	case u.SQWQECount&(u.SQWQECount-1) != 0 || u.SQWQECount > maxSendWQEBB || u.RQWQECount&(u.RQWQECount-1) != 0 || u.RQWQECount > maxRecvWR:
		return nil, 0, unix.EINVAL
	case q.cap.MaxSendWR > 0 && u.SQWQECount == 0 || q.cap.MaxSendSGE > softMaxSGE || q.cap.MaxRecvSGE > softMaxSGE || q.cap.MaxInlineData > maxWQE:
		return nil, 0, unix.EINVAL
	case q.hasSRQ && (u.RQWQECount != 0 || q.typ == ib.UC), !q.hasSRQ && u.RQWQECount > 0 && (u.RQWQEShift < 4 || u.RQWQEShift > maxRQStride):
		return nil, 0, unix.EINVAL
	case u.BufAddr%pageSize != 0 || u.DBAddr%8 != 0:
		return nil, 0, unix.EINVAL
	case c.cqeVersion == 1 && u.Uidx >= uidxUnused, c.cqeVersion == 0 && u.Uidx != uidxUnused:
		return nil, 0, unix.EINVAL
	}
	n := &qp{c: c, typ: q.typ, user: q.user, index: u.Uidx, cap: q.cap, sigAll: q.sigAll, buf: u.BufAddr, db: u.DBAddr,
		rqCount: u.RQWQECount, rqShift: u.RQWQEShift, sqCount: u.SQWQECount, bfreg: noBFReg, hasty: q.typ == ib.UC || q.typ == ib.UD}
	n.selfUC, n.selfMC = u.Flags&abi.MLX5_QP_FLAG_TIR_ALLOW_SELF_LB_UC != 0, u.Flags&abi.MLX5_QP_FLAG_TIR_ALLOW_SELF_LB_MC != 0
	if n.sqBuf = n.buf + n.recvMemory(); n.raw() {
		n.sqBuf = u.SQBufAddr
	}
	if !c.present(n.buf, n.recvMemory()) || !c.present(n.sqBuf, uint64(n.sqCount)*bbSize) || !c.present(n.db, 8) {
		return nil, 0, unix.EFAULT
	}
	if errno := c.room(objectQP); errno != 0 {
		return nil, 0, errno
	}
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	if c.recvMemory+n.recvMemory() > maxRecvMemory {
		return nil, 0, unix.ENOMEM
	}
	var ok [4]bool
	n.pd, ok[0] = get[*pd](c, uint64(q.pd))
	n.scq, ok[1] = get[*cq](c, uint64(q.scq))
	n.rcq, ok[2] = get[*cq](c, uint64(q.rcq))
	ok[3] = true
	if q.hasSRQ {
		n.srq, ok[3] = get[*srq](c, uint64(q.srq))
	}
	if ok != [4]bool{true, true, true, true} {
		return nil, 0, unix.EINVAL
	}
	if errno := n.takeDoorbells(&u); errno != 0 {
		return nil, 0, errno
	}
	if errno := n.makeSoft(); errno != 0 {
		c.putDoorbells(n)
		return nil, 0, errno
	}
	c.recvMemory += n.recvMemory()
	n.pd.n++
	n.scq.n++
	n.rcq.n++
	if n.srq != nil {
		n.srq.n++
	}
	c.qps = append(c.qps, n)
	if !n.raw() {
		c.dev.qps[n.qpn] = n
		c.dev.own(n.qpn)
	}
	return n, c.add(n), 0
}

// recvMemory is what counts of its receive queue, in bytes.
func (n *qp) recvMemory() uint64 { return uint64(n.rqCount) << n.rqShift }

// makeSoft makes the software NIC's part.
func (n *qp) makeSoft() syscall.Errno {
	if n.raw() {
		n.makeRaw()
		return 0
	}
	recvs := min(int(n.rqCount), softUDRecvs)
	if n.typ != ib.UD {
		recvs = int(n.rqCount)
	}
	cfg := driver.QPConfig{Type: n.typ, SendCQ: n.scq.soft, RecvCQ: n.rcq.soft, SignalAll: true, Cap: ib.QPCap{
		MaxSendWR: min(max(int(n.sqCount), 1), softSends), MaxRecvWR: max(recvs, 1), MaxSendSGE: softMaxSGE,
		MaxRecvSGE: max(1<<n.rqShift/segSize, 1), MaxInline: softInline,
	}}
	if n.srq != nil {
		cfg.SRQ = n.srq.soft
	}
	soft, err := n.pd.soft.CreateQP(cfg)
	if err != nil {
		return unix.ENOMEM
	}
	s := soft.(*softnic.QP)
	s.OnEmpty(n.refill)
	n.soft = s
	n.qpn = uint32(n.soft.QPN())
	return 0
}

// takeDoorbells finds the UAR page, or static register, that the client will ring for this queue pair.
func (n *qp) takeDoorbells(u *abi.Mlx5CreateQP) syscall.Errno {
	c := n.c
	switch {
	case u.Flags&abi.MLX5_QP_FLAG_UAR_PAGE_INDEX != 0:
		if n.uar = c.uars[u.BFRegIndex]; n.uar == nil {
			return unix.EINVAL
		}
	case c.dynamic:
		return unix.EINVAL // it has no registers of its own
	case u.Flags&abi.MLX5_QP_FLAG_BFREG_INDEX != 0:
		if u.BFRegIndex >= c.bfregs {
			return unix.EINVAL
		}
		n.bfreg = u.BFRegIndex
	default:
		n.bfreg = 0 // is shared by those for whom there is none left
		for i := 1; i < len(c.inUse); i++ {
			if c.inUse[i] == 0 {
				n.bfreg = uint32(i)
				break
			}
		}
	}
	if n.bfreg != noBFReg {
		n.uar = c.uars[n.bfreg/bfregsPerUAR]
		c.inUse[n.bfreg]++
	}
	n.uar.n++
	return 0
}

// putDoorbells gives them back. Called with dev.mu held.
func (c *Context) putDoorbells(n *qp) {
	n.uar.n--
	if n.bfreg != noBFReg {
		c.inUse[n.bfreg]--
	}
}

// bfregIndex is the register as the client computes its address from it.
func (n *qp) bfregIndex() uint32 {
	if n.bfreg == noBFReg {
		return 0
	}
	return n.bfreg/bfregsPerUAR*bfregStride + n.bfreg%bfregsPerUAR
}

func (n *qp) uhwResponse() []byte {
	r := abi.Mlx5CreateQPResp{BFRegIndex: n.bfregIndex()}
	if n.raw() && n.c.devx {
		n.rawNumbers(&r)
	}
	return bytesOf(&r)
}

func qpCreate(r *call) syscall.Errno {
	const known = abi.IB_UVERBS_QP_CREATE_SQ_SIG_ALL
	flags := r.num(abi.UVERBS_ATTR_CREATE_QP_FLAGS)
	if flags&^known != 0 || r.attr(abi.UVERBS_ATTR_CREATE_QP_SOURCE_QPN) != nil {
		return unix.EOPNOTSUPP
	}
	for _, id := range []uint16{abi.UVERBS_ATTR_CREATE_QP_PD_HANDLE, abi.UVERBS_ATTR_CREATE_QP_SEND_CQ_HANDLE, abi.UVERBS_ATTR_CREATE_QP_RECV_CQ_HANDLE} {
		if r.attr(id) == nil {
			return unix.EINVAL
		}
	}
	q := &qpRequest{user: r.num(abi.UVERBS_ATTR_CREATE_QP_USER_HANDLE), pd: uint32(r.num(abi.UVERBS_ATTR_CREATE_QP_PD_HANDLE)),
		scq: uint32(r.num(abi.UVERBS_ATTR_CREATE_QP_SEND_CQ_HANDLE)), rcq: uint32(r.num(abi.UVERBS_ATTR_CREATE_QP_RECV_CQ_HANDLE)),
		srq: uint32(r.num(abi.UVERBS_ATTR_CREATE_QP_SRQ_HANDLE)), hasSRQ: r.attr(abi.UVERBS_ATTR_CREATE_QP_SRQ_HANDLE) != nil,
		cap: structOf[abi.QPCap](r.in(abi.UVERBS_ATTR_CREATE_QP_CAP)), typ: ib.QPType(r.num(abi.UVERBS_ATTR_CREATE_QP_TYPE)),
		sigAll: flags&abi.IB_UVERBS_QP_CREATE_SQ_SIG_ALL != 0, uhw: r.in(abi.UVERBS_ATTR_UHW_IN)}
	n, h, errno := r.c.createQP(q)
	if errno != 0 {
		return errno
	}
	r.newNumber(abi.UVERBS_ATTR_CREATE_QP_HANDLE, uint64(h))
	return firstOf(r.out(abi.UVERBS_ATTR_CREATE_QP_RESP_CAP, bytesOf(&n.cap)), r.out32(abi.UVERBS_ATTR_CREATE_QP_RESP_QP_NUM, n.qpn),
		r.out(abi.UVERBS_ATTR_UHW_OUT, n.uhwResponse()))
}

func (w *writeCmd) createQP(q *abi.ExCreateQP) (abi.CreateQPResp, []byte, syscall.Errno) {
	n, h, errno := w.c.createQP(&qpRequest{user: q.UserHandle, pd: q.PDHandle, scq: q.SendCQHandle, rcq: q.RecvCQHandle, srq: q.SRQHandle,
		hasSRQ: q.IsSRQ != 0, typ: ib.QPType(q.QPType), sigAll: q.SQSigAll != 0, uhw: w.uhw, cap: abi.QPCap{MaxSendWR: q.MaxSendWR,
			MaxRecvWR: q.MaxRecvWR, MaxSendSGE: q.MaxSendSGE, MaxRecvSGE: q.MaxRecvSGE, MaxInlineData: q.MaxInlineData}})
	if errno != 0 {
		return abi.CreateQPResp{}, nil, errno
	}
	return abi.CreateQPResp{QPHandle: h, QPN: n.qpn, MaxSendWR: n.cap.MaxSendWR, MaxRecvWR: n.cap.MaxRecvWR, MaxSendSGE: n.cap.MaxSendSGE,
		MaxRecvSGE: n.cap.MaxRecvSGE, MaxInlineData: n.cap.MaxInlineData}, n.uhwResponse(), 0
}

func writeCreateQP(w *writeCmd) (response, syscall.Errno) {
	q := structOf[abi.ExCreateQP](w.core[8:56]) // the same, but for the address of the response in front
	r, uhw, errno := w.createQP(&q)
	if errno != 0 {
		return response{}, errno
	}
	return response{bytesOf(&r), uhw}, 0
}

func writeCreateQPEx(w *writeCmd) (response, syscall.Errno) {
	q := structOf[abi.ExCreateQP](w.core)
	if q.CompMask != 0 || q.CreateFlags != 0 || q.SourceQPN != 0 {
		return response{}, unix.EOPNOTSUPP
	}
	r, uhw, errno := w.createQP(&q)
	if errno != 0 {
		return response{}, errno
	}
	return response{bytesOf(&abi.ExCreateQPResp{Base: r, ResponseLength: 40}), uhw}, 0
}
