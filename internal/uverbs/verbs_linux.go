package uverbs

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The verbs as commands. Handles are the kernel's numbers of objects, which count for each File. Where a provider's driver
// takes or gives data of its own, that is uhwIn and uhwOut; nil if there is none.

// ContextInfo is what the kernel says when it makes a context.
type ContextInfo struct {
	AsyncFD       int // the caller owns it
	CompVectors   int
	OptionalFlags bool // access flags that the driver does not know are ignored, if they are optional ones
}

// GetContext makes the File's context; it must be the first command.
func (f *File) GetContext(uhwIn, uhwOut []byte) (ContextInfo, error) {
	var vectors [4]byte
	var support [8]byte
	attrs := []Attr{Out(abi.UVERBS_ATTR_GET_CONTEXT_NUM_COMP_VECTORS, vectors[:]), Out(abi.UVERBS_ATTR_GET_CONTEXT_CORE_SUPPORT, support[:])}
	if len(uhwIn) > 0 {
		attrs = append(attrs, In(abi.UVERBS_ATTR_UHW_IN, uhwIn))
	}
	if len(uhwOut) > 0 {
		attrs = append(attrs, Out(abi.UVERBS_ATTR_UHW_OUT, uhwOut))
	}
	err := f.Call("get_context", abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_GET_CONTEXT, attrs...)
	if noSuchMethod(err) {
		var resp abi.GetContextResp
		w := &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_GET_CONTEXT, In: Bytes(&abi.GetContext{}), Out: Bytes(&resp), UHWIn: uhwIn, UHWOut: uhwOut}
		if err := f.Write("get_context", w); err != nil {
			return ContextInfo{}, err
		}
		return ContextInfo{AsyncFD: int(resp.AsyncFD), CompVectors: int(resp.NumCompVectors)}, nil
	}
	if err != nil {
		return ContextInfo{}, err
	}
	info := ContextInfo{CompVectors: int(u32(vectors[:])), OptionalFlags: u64(support[:])&abi.IB_UVERBS_CORE_SUPPORT_OPTIONAL_MR_ACCESS != 0}
	err = f.Call("get_context", abi.UVERBS_OBJECT_ASYNC_EVENT, abi.UVERBS_METHOD_ASYNC_EVENT_ALLOC,
		NewFD(abi.UVERBS_ATTR_ASYNC_EVENT_ALLOC_FD_HANDLE, &info.AsyncFD))
	return info, err
}

// QueryDevice asks for the device's attributes. What this kernel does not tell is zero.
func (f *File) QueryDevice() (abi.ExQueryDeviceResp, error) {
	var resp abi.ExQueryDeviceResp
	err := f.Write("query_device", &WriteCmd{Cmd: abi.IB_USER_VERBS_EX_CMD_QUERY_DEVICE | abi.IB_USER_VERBS_CMD_FLAG_EXTENDED,
		In: Bytes(&abi.ExQueryDevice{}), Out: Bytes(&resp)})
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		resp = abi.ExQueryDeviceResp{}
		err = f.Write("query_device", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_QUERY_DEVICE, In: Bytes(&abi.QueryDevice{}), Out: Bytes(&resp.Base)})
	}
	return resp, err
}

// QueryPort asks for a port's attributes; ports count from 1.
func (f *File) QueryPort(port uint8) (abi.QueryPortResp, error) {
	var resp abi.QueryPortRespEx // its whole length: older kernels take no other
	err := f.Call("query_port", abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_QUERY_PORT,
		Const(abi.UVERBS_ATTR_QUERY_PORT_PORT_NUM, uint64(port)), Out(abi.UVERBS_ATTR_QUERY_PORT_RESP, Bytes(&resp)))
	if noSuchMethod(err) {
		err = f.Write("query_port", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_QUERY_PORT, In: Bytes(&abi.QueryPort{PortNum: port}), Out: Bytes(&resp.LegacyResp)})
	}
	return resp.LegacyResp, err
}

// QueryGIDTable returns the used entries of all ports' GID tables, of at most limit entries.
func (f *File) QueryGIDTable(limit int) ([]abi.GIDEntry, error) {
	const size = 32 // of an entry
	limit = min(limit, (bufferSize-1024)/size)
	raw := make([]byte, size*limit)
	var count [8]byte
	err := f.Call("query_gid", abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_QUERY_GID_TABLE,
		Const(abi.UVERBS_ATTR_QUERY_GID_TABLE_ENTRY_SIZE, size),
		Out(abi.UVERBS_ATTR_QUERY_GID_TABLE_RESP_ENTRIES, raw),
		Out(abi.UVERBS_ATTR_QUERY_GID_TABLE_RESP_NUM_ENTRIES, count[:]))
	if err != nil {
		return nil, err
	}
	n := u64(count[:])
	if n > uint64(limit) {
		return nil, f.errorf("query_gid", fmt.Errorf("the kernel says %d entries of at most %d", n, limit))
	}
	list := make([]abi.GIDEntry, n)
	for i := range list {
		copy(Bytes(&list[i]), raw[size*i:])
	}
	return list, nil
}

// AllocPD makes a protection domain.
func (f *File) AllocPD(uhwOut []byte) (handle uint32, err error) {
	var resp abi.AllocPDResp
	err = f.Write("alloc_pd", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_ALLOC_PD, In: Bytes(&abi.AllocPD{}), Out: Bytes(&resp), UHWOut: uhwOut})
	return resp.PDHandle, err
}

// DeallocPD ends a protection domain.
func (f *File) DeallocPD(handle uint32) error {
	return f.Write("dealloc_pd", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_DEALLOC_PD, In: Bytes(&abi.DeallocPD{PDHandle: handle})})
}

// MRInfo is a memory region as the kernel has made it.
type MRInfo struct {
	Handle uint32
	LKey   ib.LKey
	RKey   ib.RKey
}

// RegMR registers length bytes at address start, which the device and peers will know as iova. The two addresses must be
// equal modulo the page size.
func (f *File) RegMR(pd uint32, start, length, iova uint64, access ib.Access, uhwIn, uhwOut []byte) (MRInfo, error) {
	cmd := abi.RegMR{Start: start, Length: length, HCAVA: iova, PDHandle: pd, AccessFlags: uint32(access)}
	var resp abi.RegMRResp
	err := f.Write("reg_mr", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_REG_MR, In: Bytes(&cmd), Out: Bytes(&resp), UHWIn: uhwIn, UHWOut: uhwOut})
	var ce *CmdError
	if errors.As(err, &ce) && ce.Errno == unix.ENOMEM {
		ce.Hint = lockedHint(length)
	}
	return MRInfo{resp.MRHandle, ib.LKey(resp.LKey), ib.RKey(resp.RKey)}, err
}

// lockedHint says what the limit on locked memory has to do with a registration that failed for want of memory.
func lockedHint(need uint64) string {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &lim); err != nil {
		return ""
	}
	if lim.Cur == unix.RLIM_INFINITY {
		return fmt.Sprintf("%d bytes have to be pinned; locked memory has no limit (ulimit -l): %s Or is the device full (max_mr of `ringside devices -v`)?",
			need, shortOfMemory)
	}
	return fmt.Sprintf("%d bytes have to be pinned, on top of what this process has pinned already, and its limit on locked memory is %d: "+
		"raise it (ulimit -l unlimited; LimitMEMLOCK=infinity in a systemd unit; --ulimit memlock=-1 for a container) or give it CAP_IPC_LOCK",
		need, lim.Cur)
}

// RegDMABuf registers length bytes from offset on of the dma-buf fd, which the device and peers will know as iova. offset and
// iova must be equal modulo the page size. A device that works in memory of this system only is errors.ErrUnsupported.
func (f *File) RegDMABuf(pd uint32, fd int, offset, length, iova uint64, access ib.Access) (MRInfo, error) {
	var m MRInfo
	var lkey, rkey [4]byte
	fd32 := uint32(fd) // a number to this method, and not of the kind that FD passes
	err := f.Call("reg_mr", abi.UVERBS_OBJECT_MR, abi.UVERBS_METHOD_REG_DMABUF_MR,
		NewHandle(abi.UVERBS_ATTR_REG_DMABUF_MR_HANDLE, &m.Handle), Handle(abi.UVERBS_ATTR_REG_DMABUF_MR_PD_HANDLE, pd),
		In(abi.UVERBS_ATTR_REG_DMABUF_MR_OFFSET, Bytes(&offset)), In(abi.UVERBS_ATTR_REG_DMABUF_MR_LENGTH, Bytes(&length)),
		In(abi.UVERBS_ATTR_REG_DMABUF_MR_IOVA, Bytes(&iova)), In(abi.UVERBS_ATTR_REG_DMABUF_MR_FD, Bytes(&fd32)),
		Const(abi.UVERBS_ATTR_REG_DMABUF_MR_ACCESS_FLAGS, uint64(access)),
		Out(abi.UVERBS_ATTR_REG_DMABUF_MR_RESP_LKEY, lkey[:]), Out(abi.UVERBS_ATTR_REG_DMABUF_MR_RESP_RKEY, rkey[:]))
	if errors.Is(err, unix.EOPNOTSUPP) || noSuchMethod(err) {
		return MRInfo{}, f.errorf("reg_mr", fmt.Errorf("dma-buf: %w: this device's driver cannot work in memory of other devices (%w)", errors.ErrUnsupported, err))
	}
	m.LKey, m.RKey = ib.LKey(u32(lkey[:])), ib.RKey(u32(rkey[:]))
	return m, err
}

// DeregMR withdraws a region.
func (f *File) DeregMR(handle uint32) error {
	return f.Write("dereg_mr", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_DEREG_MR, In: Bytes(&abi.DeregMR{MRHandle: handle})})
}

// AllocMW makes a memory window of type 2.
func (f *File) AllocMW(pd uint32) (handle uint32, key ib.RKey, err error) {
	var resp abi.AllocMWResp
	err = f.Write("alloc_mw", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_ALLOC_MW, In: Bytes(&abi.AllocMW{PDHandle: pd, MWType: 2}), Out: Bytes(&resp)})
	return resp.MWHandle, ib.RKey(resp.RKey), err
}

// DeallocMW frees a memory window.
func (f *File) DeallocMW(handle uint32) error {
	return f.Write("dealloc_mw", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_DEALLOC_MW, In: Bytes(&abi.DeallocMW{MWHandle: handle})})
}

// CreateCompChannel opens the descriptor of a completion channel, which the caller owns.
func (f *File) CreateCompChannel() (fd int, err error) {
	var resp abi.CreateCompChannelResp
	err = f.Write("create_comp_channel", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_CREATE_COMP_CHANNEL, In: Bytes(&abi.CreateCompChannel{}), Out: Bytes(&resp)})
	return int(resp.FD), err
}

// CreateCQ makes a completion queue of at least entries entries, whose events go to channel (-1: none) with cookie.
func (f *File) CreateCQ(entries, channel int, cookie uint64, uhwIn, uhwOut []byte) (handle uint32, granted int, err error) {
	cmd := abi.CreateCQ{UserHandle: cookie, CQE: uint32(entries), CompChannel: int32(channel)}
	var resp abi.CreateCQResp
	err = f.Write("create_cq", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_CREATE_CQ, In: Bytes(&cmd), Out: Bytes(&resp), UHWIn: uhwIn, UHWOut: uhwOut})
	return resp.CQHandle, int(resp.CQE), err
}

// ResizeCQ changes a completion queue's capacity.
func (f *File) ResizeCQ(handle uint32, entries int, uhwIn, uhwOut []byte) (granted int, err error) {
	var resp abi.ResizeCQResp
	err = f.Write("resize_cq", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_RESIZE_CQ, In: Bytes(&abi.ResizeCQ{CQHandle: handle, CQE: uint32(entries)}),
		Out: Bytes(&resp), UHWIn: uhwIn, UHWOut: uhwOut})
	return int(resp.CQE), err
}

// ModerateCQ has events of a completion queue wait: for so many completions, or so many microseconds.
func (f *File) ModerateCQ(handle uint32, count, period uint16) error {
	const moderate = 1 // enum ib_cq_attr_mask, which is in no header for user space
	return f.Write("modify_cq", &WriteCmd{Cmd: abi.IB_USER_VERBS_EX_CMD_MODIFY_CQ | abi.IB_USER_VERBS_CMD_FLAG_EXTENDED,
		In: Bytes(&abi.ExModifyCQ{CQHandle: handle, AttrMask: moderate, Attr: abi.CQModeration{CQCount: count, CQPeriod: period}})})
}

// DestroyCQ ends a completion queue.
func (f *File) DestroyCQ(handle uint32) error {
	var resp abi.DestroyCQResp
	return f.Write("destroy_cq", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_DESTROY_CQ, In: Bytes(&abi.DestroyCQ{CQHandle: handle}), Out: Bytes(&resp)})
}

// PrepareArm is the command that arms a completion queue: one event at the next completion, or the next solicited one.
func (f *File) PrepareArm(cq uint32, solicitedOnly bool) (*Prepared, error) {
	cmd := abi.ReqNotifyCQ{CQHandle: cq}
	if solicitedOnly {
		cmd.SolicitedOnly = 1
	}
	return f.Prepare("req_notify_cq", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_REQ_NOTIFY_CQ, In: Bytes(&cmd)})
}

// QPInfo is a queue pair as the kernel has made it.
type QPInfo struct {
	Handle uint32
	QPN    ib.QPN
	Cap    ib.QPCap
}

// CreateQP makes a queue pair. cmd's handles and sizes are the caller's; the response's address is filled in.
func (f *File) CreateQP(cmd *abi.CreateQP, uhwIn, uhwOut []byte) (QPInfo, error) {
	var resp abi.CreateQPResp
	err := f.Write("create_qp", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_CREATE_QP, In: Bytes(cmd), Out: Bytes(&resp), UHWIn: uhwIn, UHWOut: uhwOut})
	if cmd.QPType == abi.IB_UVERBS_QPT_RAW_PACKET {
		hintNetRaw(err)
	}
	return QPInfo{resp.QPHandle, ib.QPN(resp.QPN), ib.QPCap{
		MaxSendWR: int(resp.MaxSendWR), MaxRecvWR: int(resp.MaxRecvWR),
		MaxSendSGE: int(resp.MaxSendSGE), MaxRecvSGE: int(resp.MaxRecvSGE), MaxInline: int(resp.MaxInlineData),
	}}, err
}

// ModifyQP changes a queue pair. On RoCE the step to RTR looks for the peer's MAC address, which may take seconds.
func (f *File) ModifyQP(handle uint32, a *ib.QPAttr, mask ib.QPAttrMask, link ib.LinkLayer) error {
	cmd := abi.ModifyQP{
		QPHandle: handle, AttrMask: uint32(mask), QKey: uint32(a.QKey), RQPSN: uint32(a.RQPSN), SQPSN: uint32(a.SQPSN),
		DestQPNum: uint32(a.DestQPN), QPAccessFlags: uint32(a.Access), PKeyIndex: a.PKeyIndex, QPState: uint8(a.State),
		CurQPState: uint8(a.CurState), PathMTU: uint8(a.PathMTU), MaxRdAtomic: a.MaxRdAtomic, MaxDestRdAtomic: a.MaxDestRdAtomic,
		MinRNRTimer: uint8(a.MinRNRTimer), PortNum: a.Port, Timeout: uint8(a.AckTimeout), RetryCnt: a.RetryCount, RNRRetry: a.RNRRetry,
	}
	if a.SQDNotify {
		cmd.EnSqdAsyncNotify = 1
	}
	if mask&ib.AttrAV != 0 {
		h := &a.AH
		cmd.Dest = abi.QPDest{DGID: h.DGID, FlowLabel: h.FlowLabel, DLID: uint16(h.DLID), SGIDIndex: uint8(h.SGIDIndex),
			HopLimit: h.HopLimit, TrafficClass: h.TrafficClass, SL: h.SL, IsGlobal: global(h, link), PortNum: h.Port}
	}
	err := f.Write("modify_qp", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_MODIFY_QP, In: Bytes(&cmd)})
	if mask&ib.AttrAV != 0 {
		aboutPath(err, &a.AH)
	}
	return err
}

// global is whether packets carry a global routing header: always on Ethernet, and beyond the subnet.
func global(h *ib.AHAttr, link ib.LinkLayer) uint8 {
	if link == ib.LinkEthernet || !h.DGID.IsZero() {
		return 1
	}
	return 0
}

// aboutPath completes the error of a command that had to find the way to h.
func aboutPath(err error, h *ib.AHAttr) {
	var ce *CmdError
	if errors.As(err, &ce) {
		ce.path = true
		if text := pathHint(ce.Errno, h); text != "" {
			ce.Hint = text
		}
	}
}

// pathHint says what may be wrong when the path to a peer cannot be set up.
func pathHint(errno syscall.Errno, h *ib.AHAttr) string {
	switch errno {
	case unix.EINVAL:
		return fmt.Sprintf("towards %s from the GID at index %d: is that index in use, and of the peer's kind (RoCE v2, the same IP version)?", h.DGID, h.SGIDIndex)
	case unix.ETIMEDOUT, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.ENODATA, unix.ENETDOWN, unix.ENODEV:
		return fmt.Sprintf("no neighbour answers for %s: is there a route (ip route get %s), and is the peer up?", h.DGID, h.DGID.Addr())
	}
	return ""
}

// QueryQP asks for a queue pair's attributes.
func (f *File) QueryQP(handle uint32) (ib.QPAttr, error) {
	const mask = uint32(ib.AttrDestQPN<<1-1) &^ uint32(ib.AttrDestQPN>>1|ib.AttrDestQPN>>2) // all but ALT_PATH's state and CAP
	var r abi.QueryQPResp
	err := f.Write("query_qp", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_QUERY_QP, In: Bytes(&abi.QueryQP{QPHandle: handle, AttrMask: mask}), Out: Bytes(&r)})
	if err != nil {
		return ib.QPAttr{}, err
	}
	d := &r.Dest
	return ib.QPAttr{
		State: ib.QPState(r.QPState), CurState: ib.QPState(r.CurQPState), PKeyIndex: r.PKeyIndex, Port: r.PortNum, QKey: ib.QKey(r.QKey),
		Access: ib.Access(r.QPAccessFlags), PathMTU: ib.MTU(r.PathMTU), DestQPN: ib.QPN(r.DestQPNum), RQPSN: ib.PSN(r.RQPSN),
		SQPSN: ib.PSN(r.SQPSN), MaxDestRdAtomic: r.MaxDestRdAtomic, MaxRdAtomic: r.MaxRdAtomic, MinRNRTimer: ib.RNRTimer(r.MinRNRTimer),
		AckTimeout: ib.AckTimeout(r.Timeout), RetryCount: r.RetryCnt, RNRRetry: r.RNRRetry,
		AH: ib.AHAttr{DGID: d.DGID, SGIDIndex: int(d.SGIDIndex), HopLimit: d.HopLimit, TrafficClass: d.TrafficClass,
			FlowLabel: d.FlowLabel, DLID: ib.LID(d.DLID), SL: d.SL, Port: d.PortNum},
	}, nil
}

// DestroyQP ends a queue pair.
func (f *File) DestroyQP(handle uint32) error {
	var resp abi.DestroyQPResp
	return f.Write("destroy_qp", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_DESTROY_QP, In: Bytes(&abi.DestroyQP{QPHandle: handle}), Out: Bytes(&resp)})
}

// sendWQESize is what the kernel wants to hear as the size of a work request, though there is none.
const sendWQESize = 56

// PrepareSendDoorbell is the command that makes the driver look at a send queue: POST_SEND without work requests.
func (f *File) PrepareSendDoorbell(qp uint32) (*Prepared, error) {
	return f.Prepare("post_send", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_POST_SEND, In: Bytes(&abi.PostSend{QPHandle: qp, WQESize: sendWQESize}), Out: make([]byte, 4)})
}

// CreateAH makes an address handle.
func (f *File) CreateAH(pd uint32, h *ib.AHAttr, link ib.LinkLayer, uhwOut []byte) (handle uint32, err error) {
	cmd := abi.CreateAH{PDHandle: pd, Attr: abi.AHAttr{
		GRH:  abi.GlobalRoute{DGID: h.DGID, FlowLabel: h.FlowLabel, SGIDIndex: uint8(h.SGIDIndex), HopLimit: h.HopLimit, TrafficClass: h.TrafficClass},
		DLID: uint16(h.DLID), SL: h.SL, IsGlobal: global(h, link), PortNum: h.Port,
	}}
	var resp abi.CreateAHResp
	err = f.Write("create_ah", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_CREATE_AH, In: Bytes(&cmd), Out: Bytes(&resp), UHWOut: uhwOut})
	aboutPath(err, h)
	return resp.AHHandle, err
}

// DestroyAH frees an address handle.
func (f *File) DestroyAH(handle uint32) error {
	return f.Write("destroy_ah", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_DESTROY_AH, In: Bytes(&abi.DestroyAH{AHHandle: handle})})
}

// CreateSRQ makes a shared receive queue of at least maxWR receives of maxSGE elements.
func (f *File) CreateSRQ(pd uint32, maxWR, maxSGE int, cookie uint64, uhwIn, uhwOut []byte) (handle uint32, wr, sge int, err error) {
	cmd := abi.CreateSRQ{UserHandle: cookie, PDHandle: pd, MaxWR: uint32(maxWR), MaxSGE: uint32(maxSGE)}
	var resp abi.CreateSRQResp
	err = f.Write("create_srq", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_CREATE_SRQ, In: Bytes(&cmd), Out: Bytes(&resp), UHWIn: uhwIn, UHWOut: uhwOut})
	return resp.SRQHandle, int(resp.MaxWR), int(resp.MaxSGE), err
}

// SetSRQLimit arms a shared receive queue's limit event; 0 disarms.
func (f *File) SetSRQLimit(handle uint32, limit int, uhwIn []byte) error {
	const srqLimit = 2 // IB_SRQ_LIMIT of enum ib_srq_attr_mask, which is in no header for user space
	cmd := abi.ModifySRQ{SRQHandle: handle, AttrMask: srqLimit, SRQLimit: uint32(limit)}
	return f.Write("modify_srq", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_MODIFY_SRQ, In: Bytes(&cmd), UHWIn: uhwIn})
}

// SRQLimit is the armed limit, or 0.
func (f *File) SRQLimit(handle uint32) (int, error) {
	var resp abi.QuerySRQResp
	err := f.Write("query_srq", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_QUERY_SRQ, In: Bytes(&abi.QuerySRQ{SRQHandle: handle}), Out: Bytes(&resp)})
	return int(resp.SRQLimit), err
}

// DestroySRQ ends a shared receive queue.
func (f *File) DestroySRQ(handle uint32) error {
	var resp abi.DestroySRQResp
	return f.Write("destroy_srq", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_DESTROY_SRQ, In: Bytes(&abi.DestroySRQ{SRQHandle: handle}), Out: Bytes(&resp)})
}

// busy turns the kernel's word for an object that others use into the driver's.
func busy(err error) error {
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%w: %w", driver.ErrBusy, err)
	}
	return err
}

// gone reports whether an object needs no destroying any more, as the kernel has done that with the device.
func gone(err error) bool { return errors.Is(err, unix.EIO) }
