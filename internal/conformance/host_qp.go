package conformance

import (
	"time"

	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

type qpArgs struct {
	PD, SendCQ, RecvCQ, SRQ handle
	Config                  qp.Config // without the objects
}

type qpInfo struct {
	H   handle
	QPN ib.QPN
	Cap ib.QPCap
}

var opQP = newOp("create_qp", func(h *host, a qpArgs) (qpInfo, error) {
	pd, err := get[*verbs.PD](h, a.PD)
	if err != nil {
		return qpInfo{}, err
	}
	cfg := a.Config
	if cfg.SendCQ, err = get[*verbs.CQ](h, a.SendCQ); err != nil {
		return qpInfo{}, err
	}
	if cfg.RecvCQ, err = get[*verbs.CQ](h, a.RecvCQ); err != nil {
		return qpInfo{}, err
	}
	if a.SRQ != 0 {
		if cfg.SRQ, err = get[*qp.SRQ](h, a.SRQ); err != nil {
			return qpInfo{}, err
		}
	}
	q, err := qp.New(pd, &cfg)
	if err != nil {
		return qpInfo{}, err
	}
	return qpInfo{h.add(q), q.QPN(), q.Cap()}, nil
})

type modifyArgs struct {
	QP   handle
	Attr ib.QPAttr
	Mask ib.QPAttrMask
}

var opModify = newOp("modify_qp", func(h *host, a modifyArgs) (none, error) {
	return use(h, a.QP, func(q *qp.QP) (none, error) {
		ctx, cancel := h.timeout(patience)
		defer cancel()
		return none{}, q.Modify(ctx, &a.Attr, a.Mask)
	})
})

type qpStatus struct {
	Attr ib.QPAttr
	Path string
}

var opQuery = newOp("query_qp", func(h *host, n handle) (qpStatus, error) {
	return use(h, n, func(q *qp.QP) (qpStatus, error) {
		attr, err := q.Query()
		return qpStatus{attr, q.Path()}, err
	})
})

// opWaitState waits until the QP is in a state; it returns the last one seen.
type stateArgs struct {
	QP    handle
	State ib.QPState
	Wait  time.Duration
}

var opWaitState = newOp("wait for state", func(h *host, a stateArgs) (ib.QPState, error) {
	return use(h, a.QP, func(q *qp.QP) (s ib.QPState, err error) {
		h.waitFor(a.Wait, func() bool {
			var attr ib.QPAttr
			attr, err = q.Query()
			s = attr.State
			return err != nil || s == a.State
		})
		return s, err
	})
})

type sendArgs struct {
	QP  handle
	WRs []ib.SendWR
}

type recvArgs struct {
	H   handle
	WRs []ib.RecvWR
}

// A posted is a count that is valid with an error, too.
var opPostSend = newOp("post_send", func(h *host, a sendArgs) (int, error) {
	return use(h, a.QP, func(q *qp.QP) (int, error) { return q.PostSend(a.WRs) })
})

var opPostRecv = newOp("post_recv", func(h *host, a recvArgs) (int, error) {
	return use(h, a.H, func(q *qp.QP) (int, error) { return q.PostRecv(a.WRs) })
})

type srqArgs struct {
	PD         handle
	Depth, SGE int
}

var opSRQ = newOp("create_srq", func(h *host, a srqArgs) (handle, error) {
	return use(h, a.PD, func(pd *verbs.PD) (handle, error) {
		s, err := qp.NewSRQ(pd, qp.SRQConfig{Depth: a.Depth, SGE: a.SGE})
		if err != nil {
			return 0, err
		}
		return h.add(s), nil
	})
})

var opSRQPostRecv = newOp("post_srq_recv", func(h *host, a recvArgs) (int, error) {
	return use(h, a.H, func(s *qp.SRQ) (int, error) { return s.PostRecv(a.WRs) })
})

type limitArgs struct {
	SRQ   handle
	Limit int
}

var opSRQLimit = newOp("modify_srq", func(h *host, a limitArgs) (none, error) {
	return use(h, a.SRQ, func(s *qp.SRQ) (none, error) { return none{}, s.SetLimit(a.Limit) })
})

type ahArgs struct {
	PD   handle
	Attr ib.AHAttr
}

type ahInfo struct {
	H   handle
	Num ib.AHNum
}

var opAH = newOp("create_ah", func(h *host, a ahArgs) (ahInfo, error) {
	return use(h, a.PD, func(pd *verbs.PD) (ahInfo, error) {
		ah, err := pd.NewAH(a.Attr)
		if err != nil {
			return ahInfo{}, err
		}
		return ahInfo{h.add(ah), ah.Num()}, nil
	})
})
