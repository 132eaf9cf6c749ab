package rdmacm

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A command is one request to the kernel.
type command struct {
	op   string // in errors
	code uint32 // RDMA_USER_CM_CMD_*
	in   []byte // what follows the header
	// ref is the memory beside the request that it has the address of, at the offset refAt: where the response goes, or
	// data. It is copied to where the kernel sees it, and back.
	ref     []byte
	refAt   int
	outSize int // what the header says of the response
}

// A kernel runs commands: the one below us, or one of a test.
type kernel interface {
	// do runs a command. The error is an errno, or net.ErrClosed after Close. It is safe for concurrent use.
	do(*command) error
	// event waits for the next event, and writes all of it to b. It ends with net.ErrClosed on Close.
	event(b []byte) error
	// Close destroys all that was made, and waits for calls in progress.
	Close() error
}

func withResponse(op string, code uint32, in, response []byte) *command {
	return &command{op: op, code: code, in: in, ref: response, outSize: len(response)}
}

func createID(uid uint64, ps PortSpace, resp *abi.CMCreateIDResp) *command {
	c := withResponse("create_id", abi.RDMA_USER_CM_CMD_CREATE_ID,
		bytesOf(&abi.CMCreateID{UID: uid, PS: uint16(ps), QPType: uint8(qpType(ps))}), bytesOf(resp))
	c.refAt = 8 // uid comes first
	return c
}

// qpType is what the kernel takes for the port space anyway.
func qpType(ps PortSpace) ib.QPType {
	if ps == UDP {
		return ib.UD
	}
	return ib.RC
}

func destroyID(id uint32) *command {
	return withResponse("destroy_id", abi.RDMA_USER_CM_CMD_DESTROY_ID, bytesOf(&abi.CMDestroyID{ID: id}),
		bytesOf(&abi.CMDestroyIDResp{}))
}

func bind(id uint32, a netip.AddrPort) (*command, error) {
	in := abi.CMBind{ID: id}
	var err error
	if in.AddrSize, err = putSockaddr(&in.Addr, a); err != nil {
		return nil, err
	}
	if in.AddrSize == 0 {
		return nil, errors.New("no address")
	}
	return &command{op: "bind", code: abi.RDMA_USER_CM_CMD_BIND, in: bytesOf(&in)}, nil
}

func resolveAddr(id uint32, src, dst netip.AddrPort, timeoutMs uint32) (*command, error) {
	in := abi.CMResolveAddr{ID: id, TimeoutMs: timeoutMs}
	var err error
	if in.SrcSize, err = putSockaddr(&in.SrcAddr, src); err != nil {
		return nil, err
	}
	if in.DstSize, err = putSockaddr(&in.DstAddr, dst); err != nil {
		return nil, err
	}
	switch {
	case in.DstSize == 0:
		return nil, errors.New("no destination address")
	case in.SrcSize != 0 && in.SrcAddr.SSFamily != in.DstAddr.SSFamily:
		return nil, fmt.Errorf("%v and %v are of two families", src, dst)
	}
	return &command{op: "resolve_addr", code: abi.RDMA_USER_CM_CMD_RESOLVE_ADDR, in: bytesOf(&in)}, nil
}

func resolveRoute(id, timeoutMs uint32) *command {
	return &command{op: "resolve_route", code: abi.RDMA_USER_CM_CMD_RESOLVE_ROUTE,
		in: bytesOf(&abi.CMResolveRoute{ID: id, TimeoutMs: timeoutMs})}
}

func listen(id, backlog uint32) *command {
	return &command{op: "listen", code: abi.RDMA_USER_CM_CMD_LISTEN, in: bytesOf(&abi.CMListen{ID: id, Backlog: backlog})}
}

func connect(id uint32, p *ConnParam, limit int) (*command, error) {
	in := abi.CMConnect{ID: id}
	if err := p.fill(&in.ConnParam, limit); err != nil {
		return nil, err
	}
	return &command{op: "connect", code: abi.RDMA_USER_CM_CMD_CONNECT, in: bytesOf(&in)}, nil
}

// accept answers a request with p, or, with nil, confirms a peer's answer.
func accept(id uint32, uid uint64, p *ConnParam, limit int) (*command, error) {
	in := abi.CMAccept{ID: id, UID: uid}
	op := "establish"
	if p != nil {
		op = "accept"
		if err := p.fill(&in.ConnParam, limit); err != nil {
			return nil, err
		}
	}
	return &command{op: op, code: abi.RDMA_USER_CM_CMD_ACCEPT, in: bytesOf(&in)}, nil
}

func reject(id uint32, data []byte, limit int) (*command, error) {
	if len(data) > limit {
		return nil, fmt.Errorf("private data of %d bytes: at most %d fit", len(data), limit)
	}
	// The reason is left to the kernel: it takes ReasonConsumer.
	in := abi.CMReject{ID: id, PrivateDataLen: uint8(len(data))}
	copy(in.PrivateData[:], data)
	return &command{op: "reject", code: abi.RDMA_USER_CM_CMD_REJECT, in: bytesOf(&in)}, nil
}

func disconnect(id uint32) *command {
	return &command{op: "disconnect", code: abi.RDMA_USER_CM_CMD_DISCONNECT, in: bytesOf(&abi.CMDisconnect{ID: id})}
}

func notify(id uint32, event ib.EventType) *command {
	return &command{op: "notify", code: abi.RDMA_USER_CM_CMD_NOTIFY, in: bytesOf(&abi.CMNotify{ID: id, Event: uint32(event)})}
}

// setOption sets an option of level RDMA_OPTION_ID.
func setOption(op string, id, name uint32, value []byte) *command {
	return &command{op: op, code: abi.RDMA_USER_CM_CMD_SET_OPTION, ref: value,
		in: bytesOf(&abi.CMSetOption{ID: id, Level: abi.RDMA_OPTION_ID, Optname: name, Optlen: uint32(len(value))})}
}

func getEvent(response []byte) *command {
	return withResponse("get_event", abi.RDMA_USER_CM_CMD_GET_EVENT, bytesOf(&abi.CMGetEvent{}), response)
}

func initQPAttr(id uint32, state ib.QPState, resp *abi.QPAttr) *command {
	return withResponse("init_qp_attr", abi.RDMA_USER_CM_CMD_INIT_QP_ATTR,
		bytesOf(&abi.CMInitQPAttr{ID: id, QPState: uint32(state)}), bytesOf(resp))
}

// attrKnown are the attributes that ib.QPAttr has. Others are left out of what the kernel answers: old kernels set bits of
// RoCE above 20 that MODIFY_QP refuses, and alternate paths, which nobody asks for here, would have no values.
const attrKnown = ib.AttrState | ib.AttrCurState | ib.AttrSQDNotify | ib.AttrAccess | ib.AttrPKeyIndex | ib.AttrPort |
	ib.AttrQKey | ib.AttrAV | ib.AttrPathMTU | ib.AttrAckTimeout | ib.AttrRetryCount | ib.AttrRNRRetry | ib.AttrRQPSN |
	ib.AttrMaxRdAtomic | ib.AttrMinRNRTimer | ib.AttrSQPSN | ib.AttrMaxDestRdAtomic | ib.AttrDestQPN

// qpAttr reads the answer to INIT_QP_ATTR for a state.
func qpAttr(r *abi.QPAttr, state ib.QPState) (ib.QPAttr, ib.QPAttrMask, error) {
	mask := ib.QPAttrMask(r.QPAttrMask) & attrKnown
	bad := func(what string, v uint32) (ib.QPAttr, ib.QPAttrMask, error) {
		return ib.QPAttr{}, 0, fmt.Errorf("the kernel gave the %s %#x for a QP", what, v)
	}
	switch {
	case r.QPState != uint32(state):
		return bad("state", r.QPState)
	case mask&ib.AttrPathMTU != 0 && (r.PathMTU > 0xff || ib.MTU(r.PathMTU).Bytes() == 0):
		return bad("path MTU", r.PathMTU)
	case mask&ib.AttrDestQPN != 0 && r.DestQPNum > uint32(ib.MaxQPN):
		return bad("peer's number", r.DestQPNum)
	case mask&ib.AttrRQPSN != 0 && r.RQPSN > uint32(ib.MaxPSN):
		return bad("receive PSN", r.RQPSN)
	case mask&ib.AttrSQPSN != 0 && r.SQPSN > uint32(ib.MaxPSN):
		return bad("send PSN", r.SQPSN)
	}
	a := ib.QPAttr{
		State:           state,
		PKeyIndex:       r.PKeyIndex,
		Port:            r.PortNum,
		QKey:            ib.QKey(r.QKey),
		Access:          ib.Access(r.QPAccessFlags),
		AH:              ahAttr(&r.AHAttr),
		PathMTU:         ib.MTU(r.PathMTU),
		DestQPN:         ib.QPN(r.DestQPNum),
		RQPSN:           ib.PSN(r.RQPSN),
		SQPSN:           ib.PSN(r.SQPSN),
		MaxDestRdAtomic: r.MaxDestRdAtomic,
		MaxRdAtomic:     r.MaxRdAtomic,
		MinRNRTimer:     ib.RNRTimer(r.MinRNRTimer),
		AckTimeout:      ib.AckTimeout(r.Timeout),
		RetryCount:      r.RetryCnt,
		RNRRetry:        r.RNRRetry,
		SQDNotify:       r.EnSqdAsyncNotify != 0,
	}
	if mask&ib.AttrCurState != 0 {
		a.CurState = ib.QPState(r.CurQPState)
	}
	return a, mask, nil
}

// noIndex is in the place of the device's index before a query: old kernels leave it there.
const noIndex = ^uint32(0)

func queryAddr(id uint32, resp *abi.CMQueryAddrResp) *command {
	*resp = abi.CMQueryAddrResp{IbdevIndex: noIndex}
	return withResponse("query_addr", abi.RDMA_USER_CM_CMD_QUERY,
		bytesOf(&abi.CMQuery{ID: id, Option: abi.RDMA_USER_CM_QUERY_ADDR}), bytesOf(resp))
}

// addrOf reads the answer to QUERY.
func addrOf(r *abi.CMQueryAddrResp) (Addr, error) {
	var a Addr
	var err1, err2 error
	a.Local, err1 = sockaddr(&r.SrcAddr, r.SrcSize)
	a.Remote, err2 = sockaddr(&r.DstAddr, r.DstSize)
	if err := errors.Join(err1, err2); err != nil {
		return Addr{}, err
	}
	if a.Bound = r.PortNum != 0; a.Bound {
		a.NodeGUID = ib.GUID(abi.FromBE64(abi.BE64(r.NodeGUID)))
		a.Port = r.PortNum
		a.PKey = ib.PKey(abi.FromBE16(abi.BE16(r.PKey)))
		if a.HasDeviceIndex = r.IbdevIndex != noIndex; a.HasDeviceIndex {
			a.DeviceIndex = r.IbdevIndex
		}
	}
	return a, nil
}
