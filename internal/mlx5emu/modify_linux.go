package mlx5emu

import (
	"context"
	"errors"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// MODIFY_QP and QUERY_QP.

func writeModifyQP(w *writeCmd) (response, syscall.Errno) {
	q := structOf[abi.ModifyQP](w.core)
	const standard = 1<<21 - 1
	if q.AttrMask&^standard != 0 {
		return response{}, unix.EOPNOTSUPP
	}
	return response{}, w.c.modifyQP(&q)
}

func writeModifyQPEx(w *writeCmd) (response, syscall.Errno) {
	q := structOf[abi.ExModifyQP](w.core)
	const standard, rateLimit = 1<<21 - 1, 1 << 25
	if q.Base.AttrMask&^(standard|rateLimit) != 0 || q.Reserved != 0 {
		return response{}, unix.EOPNOTSUPP
	}
	if errno := w.c.modifyQP(&q.Base); errno != 0 {
		return response{}, errno
	}
	return response{bytesOf(&abi.ExModifyQPResp{ResponseLength: 8}), bytesOf(&abi.Mlx5ModifyQPResp{ResponseLength: uint32(min(w.uhwRoom, 16))})}, 0
}

// modifyQP checks a change as the kernel does, and makes it.
func (c *Context) modifyQP(q *abi.ModifyQP) syscall.Errno {
	c.dev.mu.Lock()
	n, ok := get[*qp](c, uint64(q.QPHandle))
	c.dev.mu.Unlock()
	if !ok {
		return unix.EINVAL
	}
	n.modify.Lock()
	defer n.modify.Unlock()
	now, err := n.soft.Query()
	if err != nil {
		return unix.EINVAL
	}
	mask := ib.QPAttrMask(q.AttrMask)
	if errno := c.dev.checkModify(q, mask, &now); errno != 0 {
		return errno
	}
	to := now.State
	if mask&ib.AttrState != 0 {
		to = ib.QPState(q.QPState)
	}
	if mask&ib.AttrAV != 0 && mask&ib.AttrState == 0 && mask&ib.AttrPort == 0 {
		mask |= ib.AttrPort
		q.PortNum = q.Dest.PortNum
	}
	if !mayChange(n.typ, now.State, to, mask) {
		return unix.EINVAL
	}
	a := attrOf(q)
	if mask&ib.AttrAV != 0 {
		to := uint32(now.DestQPN)
		if mask&ib.AttrDestQPN != 0 {
			to = q.DestQPNum
		}
		if !c.dev.told.fill(&a.AH, to) {
			c.dev.owner(to).reach(&a.AH)
		}
		c.dev.route(&q.Dest, &a)
	}
	mask &^= attrAltPath | attrMigState
	if to == ib.Reset {
		return n.reset(&a, mask)
	}
	if n.typ == ib.UD && to == ib.RTR {
		c.dev.listen()
		longest := uint64(c.dev.activeMTU().Bytes())
		c.dev.mu.Lock()
		n.datagram = longest
		c.dev.mu.Unlock()
	}
	if err := n.soft.Modify(context.Background(), &a, mask); err != nil {
		return modifyErrno(err)
	}
	if mask&ib.AttrAV != 0 {
		c.dev.mu.Lock()
		n.dest = q.Dest
		if mask&ib.AttrDestQPN != 0 {
			n.destQPN = q.DestQPNum
		}
		c.dev.mu.Unlock()
	}
	if mask&ib.AttrRNRRetry != 0 && n.typ == ib.RC {
		c.dev.mu.Lock()
		n.hasty = a.RNRRetry != ib.RNRRetryForever
		c.dev.mu.Unlock()
	}
	return 0
}

// checkModify checks values, as far as the kernel's core does.
func (d *Device) checkModify(q *abi.ModifyQP, mask ib.QPAttrMask, now *ib.QPAttr) syscall.Errno {
	switch {
	case mask&ib.AttrPort != 0 && q.PortNum != 1:
		return unix.EINVAL
	case mask&attrAltPath != 0:
		return unix.EINVAL // RoCE has no alternate paths
	case mask&ib.AttrCurState != 0 && q.CurQPState > uint8(ib.Err), mask&ib.AttrState != 0 && q.QPState > uint8(ib.Err):
		return unix.EINVAL
	case mask&ib.AttrCurState != 0 && ib.QPState(q.CurQPState) != now.State:
		return unix.EINVAL
	case mask&ib.AttrMaxRdAtomic != 0 && q.MaxRdAtomic > maxRdAtomic, mask&ib.AttrMaxDestRdAtomic != 0 && q.MaxDestRdAtomic > maxRdAtomic:
		return unix.EINVAL
	case mask&ib.AttrAccess != 0 && ib.Access(q.QPAccessFlags)&^mrAccess != 0:
		return unix.EINVAL
	}
	if mask&ib.AttrAV == 0 {
		return 0
	}
	toRTR := mask&ib.AttrState != 0 && ib.QPState(q.QPState) == ib.RTR
	switch {
	case q.Dest.PortNum != 1, toRTR && q.Dest.PortNum != now.Port:
		return unix.EINVAL
	case mask&ib.AttrPort != 0 && q.PortNum != q.Dest.PortNum:
		return unix.EINVAL
	case q.Dest.IsGlobal != 0 && q.Dest.SGIDIndex >= gidSlots, q.Dest.IsGlobal == 0 && !d.cfg.InfiniBand:
		return unix.EINVAL
	}
	return 0
}

func attrOf(q *abi.ModifyQP) ib.QPAttr {
	d := &q.Dest
	return ib.QPAttr{
		State: ib.QPState(q.QPState), CurState: ib.QPState(q.CurQPState), PKeyIndex: q.PKeyIndex, Port: q.PortNum, QKey: ib.QKey(q.QKey),
		Access: ib.Access(q.QPAccessFlags), PathMTU: ib.MTU(q.PathMTU), DestQPN: ib.QPN(q.DestQPNum), RQPSN: ib.PSN(q.RQPSN) & ib.MaxPSN,
		SQPSN: ib.PSN(q.SQPSN) & ib.MaxPSN, MaxDestRdAtomic: q.MaxDestRdAtomic, MaxRdAtomic: q.MaxRdAtomic,
		MinRNRTimer: ib.RNRTimer(q.MinRNRTimer), AckTimeout: ib.AckTimeout(q.Timeout), RetryCount: q.RetryCnt, RNRRetry: q.RNRRetry,
		SQDNotify: q.EnSqdAsyncNotify != 0,
		AH: ib.AHAttr{DGID: d.DGID, SGIDIndex: int(d.SGIDIndex), HopLimit: routeHops, TrafficClass: d.TrafficClass, FlowLabel: d.FlowLabel,
			DLID: ib.LID(d.DLID), SL: d.SL, Port: d.PortNum},
	}
}

// routeHops is the hop limit of connections. The kernel takes it from the route, not from the program, and routes have the system's, which is this.
const routeHops = 64

// modifyErrno is why the software NIC has refused a change, as the kernel would say it.
func modifyErrno(err error) syscall.Errno {
	switch {
	case errors.Is(err, driver.ErrUnreachable), errors.Is(err, context.DeadlineExceeded):
		return unix.EHOSTUNREACH
	case errors.Is(err, driver.ErrClosed):
		return unix.EIO
	}
	return unix.EINVAL
}

// freeze has nothing be read from the queue pair's queues any more. Called with dev.mu held.
func (n *qp) freeze() {
	n.c.recvs.mu.Lock()
	n.frozen = true
	n.c.recvs.mu.Unlock()
}

// settle has a queue pair with a shared receive queue, which is to be reset or to go, receive no more, and completes what it has received.
// By its CQE the client's driver finds that a slot is free again, when it throws away what has completed; of a slot without one it never
// hears. A card has written it before the peer knows that the message was received. Called with n.modify held, and waits for peers.
func (n *qp) settle() {
	if n.srq == nil {
		return
	}
	d := n.c.dev
	d.mu.Lock()
	d.asyncEvents() // its last word, if it has ended by itself; that it ends here is none
	n.freeze()
	d.mu.Unlock()
	n.soft.Modify(context.Background(), &ib.QPAttr{State: ib.Err}, ib.AttrState)
	d.mu.Lock()
	d.collect()
	d.asyncEvents()
	d.mu.Unlock()
}

// reset takes the queue pair to RESET: nothing that was posted completes any more.
func (n *qp) reset(a *ib.QPAttr, mask ib.QPAttrMask) syscall.Errno {
	d := n.c.dev
	n.settle()
	d.mu.Lock()
	n.freeze()
	d.mu.Unlock()
	err := n.soft.Modify(context.Background(), a, mask)
	d.mu.Lock()
	defer d.mu.Unlock()
	n.c.recvs.mu.Lock()
	defer n.c.recvs.mu.Unlock()
	n.frozen = false
	if err != nil {
		return modifyErrno(err)
	}
	n.life++
	n.sendNext, n.sendDone, n.recvNext, n.recvDone, n.outstanding = 0, 0, 0, 0, 0
	n.rung, n.wrecked, n.hold, n.sendBad, n.recvBad = false, false, nil, false, false
	return 0
}

func writeQueryQP(w *writeCmd) (response, syscall.Errno) {
	c, q := w.c, structOf[abi.QueryQP](w.core)
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	n, ok := get[*qp](c, uint64(q.QPHandle))
	if !ok {
		return response{}, unix.EINVAL
	}
	a, err := n.soft.Query()
	if err != nil {
		return response{}, unix.EINVAL
	}
	// The kernel tells of receives what the client's ring has room for, and of sends nothing: these the client's driver knows.
	r := abi.QueryQPResp{
		MaxRecvWR: n.rqCount, QKey: uint32(a.QKey), RQPSN: uint32(a.RQPSN), SQPSN: uint32(a.SQPSN),
		DestQPNum: uint32(a.DestQPN), QPAccessFlags: uint32(a.Access), PKeyIndex: a.PKeyIndex, QPState: uint8(a.State),
		CurQPState: uint8(a.State), PathMTU: uint8(a.PathMTU), MaxRdAtomic: a.MaxRdAtomic, MaxDestRdAtomic: a.MaxDestRdAtomic,
		MinRNRTimer: uint8(a.MinRNRTimer), PortNum: a.Port, Timeout: uint8(a.AckTimeout), RetryCnt: a.RetryCount, RNRRetry: a.RNRRetry,
	}
	if n.soft.Draining() {
		r.SQDraining = 1
	}
	if n.rqCount > 0 {
		r.MaxRecvSGE = 1 << n.rqShift / segSize
	}
	if n.sigAll {
		r.SQSigAll = 1
	}
	if n.typ != ib.UD && !n.raw() && a.State >= ib.RTR {
		r.Dest = abi.QPDest{DGID: a.AH.DGID, FlowLabel: a.AH.FlowLabel, SGIDIndex: uint8(a.AH.SGIDIndex), HopLimit: a.AH.HopLimit,
			TrafficClass: a.AH.TrafficClass, SL: a.AH.SL, IsGlobal: 1, PortNum: a.AH.Port}
		if c.dev.cfg.InfiniBand {
			r.Dest, r.DestQPNum = n.dest, n.destQPN
		}
	}
	return response{core: bytesOf(&r)}, 0
}
