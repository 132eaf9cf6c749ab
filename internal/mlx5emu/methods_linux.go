package mlx5emu

import (
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// The methods that the device knows, with their attributes. Numbers and lengths are those of rdma/ib_user_ioctl_cmds.h and
// rdma/mlx5_user_ioctl_cmds.h.

var methods map[uint32]*method

// An init function, because INVOKE_WRITE's handlers lead back to the table.
func init() {
	methods = map[uint32]*method{
		methodKey(abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_INVOKE_WRITE): {early: true, run: invokeWrite, attrs: []attrSpec{
			in(abi.UVERBS_ATTR_CORE_IN, 1, 1<<16-1), out(abi.UVERBS_ATTR_CORE_OUT, 0, 1<<16-1),
			need(number(abi.UVERBS_ATTR_WRITE_CMD)), uhwIn, uhwOut}},
		methodKey(abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_GET_CONTEXT): {early: true, run: getContext, attrs: []attrSpec{
			out(abi.UVERBS_ATTR_GET_CONTEXT_NUM_COMP_VECTORS, 4, 4), out(abi.UVERBS_ATTR_GET_CONTEXT_CORE_SUPPORT, 8, 8), uhwIn, uhwOut}},
		methodKey(abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_QUERY_CONTEXT): {run: queryContext, attrs: []attrSpec{
			out(abi.UVERBS_ATTR_QUERY_CONTEXT_NUM_COMP_VECTORS, 4, 4), out(abi.UVERBS_ATTR_QUERY_CONTEXT_CORE_SUPPORT, 8, 8),
			longer(out(abi.MLX5_IB_ATTR_QUERY_CONTEXT_RESP_UCTX, 44, 72))}},
		methodKey(abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_QUERY_PORT): {run: queryPort, attrs: []attrSpec{
			need(number(abi.UVERBS_ATTR_QUERY_PORT_PORT_NUM)), need(longer(out(abi.UVERBS_ATTR_QUERY_PORT_RESP, 40, 48)))}},
		methodKey(abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_QUERY_GID_TABLE): {run: queryGIDTable, attrs: []attrSpec{
			need(number(abi.UVERBS_ATTR_QUERY_GID_TABLE_ENTRY_SIZE)), in(abi.UVERBS_ATTR_QUERY_GID_TABLE_FLAGS, 4, 8),
			need(out(abi.UVERBS_ATTR_QUERY_GID_TABLE_RESP_ENTRIES, 0, 1<<16-1)),
			need(out(abi.UVERBS_ATTR_QUERY_GID_TABLE_RESP_NUM_ENTRIES, 8, 8))}},
		methodKey(abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_QUERY_GID_ENTRY): {run: queryGIDEntry, attrs: []attrSpec{
			need(number(abi.UVERBS_ATTR_QUERY_GID_ENTRY_PORT)), need(number(abi.UVERBS_ATTR_QUERY_GID_ENTRY_GID_INDEX)),
			need(in(abi.UVERBS_ATTR_QUERY_GID_ENTRY_FLAGS, 4, 8)), need(longer(out(abi.UVERBS_ATTR_QUERY_GID_ENTRY_RESP_ENTRY, 28, 32)))}},
		methodKey(abi.UVERBS_OBJECT_ASYNC_EVENT, abi.UVERBS_METHOD_ASYNC_EVENT_ALLOC): {run: asyncAlloc, attrs: []attrSpec{
			need(attrSpec{id: abi.UVERBS_ATTR_ASYNC_EVENT_ALLOC_FD_HANDLE, kind: kindNewFD})}},

		methodKey(abi.MLX5_IB_OBJECT_UAR, abi.MLX5_IB_METHOD_UAR_OBJ_ALLOC): {run: uarAlloc, attrs: []attrSpec{
			need(newHandle(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_HANDLE)), need(number(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_TYPE)),
			need(out(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_MMAP_OFFSET, 8, 8)), need(out(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_MMAP_LENGTH, 4, 4)),
			need(out(abi.MLX5_IB_ATTR_UAR_OBJ_ALLOC_PAGE_ID, 4, 4))}},
		methodKey(abi.MLX5_IB_OBJECT_UAR, abi.MLX5_IB_METHOD_UAR_OBJ_DESTROY): destroys[*uar](abi.MLX5_IB_ATTR_UAR_OBJ_DESTROY_HANDLE, 0),

		methodKey(abi.UVERBS_OBJECT_PD, abi.UVERBS_METHOD_PD_DESTROY): destroys[*pd](abi.UVERBS_ATTR_DESTROY_PD_HANDLE, 0),
		methodKey(abi.UVERBS_OBJECT_MR, abi.UVERBS_METHOD_MR_DESTROY): destroys[*mr](abi.UVERBS_ATTR_DESTROY_MR_HANDLE, 0),
		methodKey(abi.UVERBS_OBJECT_MR, abi.UVERBS_METHOD_QUERY_MR): {run: queryMR, attrs: []attrSpec{
			need(handle(abi.UVERBS_ATTR_QUERY_MR_HANDLE)), need(out(abi.UVERBS_ATTR_QUERY_MR_RESP_LKEY, 4, 4)),
			need(out(abi.UVERBS_ATTR_QUERY_MR_RESP_RKEY, 4, 4)), need(out(abi.UVERBS_ATTR_QUERY_MR_RESP_LENGTH, 8, 8)),
			out(abi.UVERBS_ATTR_QUERY_MR_RESP_IOVA, 8, 8)}},
		methodKey(abi.UVERBS_OBJECT_MW, abi.UVERBS_METHOD_MW_DESTROY): destroys[*mw](abi.UVERBS_ATTR_DESTROY_MW_HANDLE, 0),
		methodKey(abi.UVERBS_OBJECT_AH, abi.UVERBS_METHOD_AH_DESTROY): destroys[*ah](abi.UVERBS_ATTR_DESTROY_AH_HANDLE, 0),

		methodKey(abi.UVERBS_OBJECT_FLOW, abi.UVERBS_METHOD_FLOW_DESTROY): destroys[*flow](abi.UVERBS_ATTR_DESTROY_FLOW_HANDLE, 0),

		methodKey(abi.UVERBS_OBJECT_CQ, abi.UVERBS_METHOD_CQ_CREATE): {run: cqCreate, attrs: []attrSpec{
			need(newHandle(abi.UVERBS_ATTR_CREATE_CQ_HANDLE)), need(in(abi.UVERBS_ATTR_CREATE_CQ_CQE, 4, 4)),
			need(in(abi.UVERBS_ATTR_CREATE_CQ_USER_HANDLE, 8, 8)), fd(abi.UVERBS_ATTR_CREATE_CQ_COMP_CHANNEL),
			need(in(abi.UVERBS_ATTR_CREATE_CQ_COMP_VECTOR, 4, 4)), in(abi.UVERBS_ATTR_CREATE_CQ_FLAGS, 4, 8),
			need(out(abi.UVERBS_ATTR_CREATE_CQ_RESP_CQE, 4, 4)), fd(abi.UVERBS_ATTR_CREATE_CQ_EVENT_FD), uhwIn, uhwOut}},
		methodKey(abi.UVERBS_OBJECT_CQ, abi.UVERBS_METHOD_CQ_DESTROY): destroys[*cq](abi.UVERBS_ATTR_DESTROY_CQ_HANDLE, 8),

		methodKey(abi.UVERBS_OBJECT_QP, abi.UVERBS_METHOD_QP_CREATE): {run: qpCreate, attrs: []attrSpec{
			need(newHandle(abi.UVERBS_ATTR_CREATE_QP_HANDLE)), handle(abi.UVERBS_ATTR_CREATE_QP_PD_HANDLE),
			handle(abi.UVERBS_ATTR_CREATE_QP_SRQ_HANDLE), handle(abi.UVERBS_ATTR_CREATE_QP_SEND_CQ_HANDLE),
			handle(abi.UVERBS_ATTR_CREATE_QP_RECV_CQ_HANDLE), need(in(abi.UVERBS_ATTR_CREATE_QP_USER_HANDLE, 8, 8)),
			need(in(abi.UVERBS_ATTR_CREATE_QP_CAP, 20, 20)), need(number(abi.UVERBS_ATTR_CREATE_QP_TYPE)),
			in(abi.UVERBS_ATTR_CREATE_QP_FLAGS, 4, 8), in(abi.UVERBS_ATTR_CREATE_QP_SOURCE_QPN, 4, 4),
			fd(abi.UVERBS_ATTR_CREATE_QP_EVENT_FD), need(out(abi.UVERBS_ATTR_CREATE_QP_RESP_CAP, 20, 20)),
			need(out(abi.UVERBS_ATTR_CREATE_QP_RESP_QP_NUM, 4, 4)), uhwIn, uhwOut}},
		methodKey(abi.UVERBS_OBJECT_QP, abi.UVERBS_METHOD_QP_DESTROY): destroys[*qp](abi.UVERBS_ATTR_DESTROY_QP_HANDLE, 4),

		methodKey(abi.UVERBS_OBJECT_SRQ, abi.UVERBS_METHOD_SRQ_CREATE): {run: srqCreate, attrs: []attrSpec{
			need(newHandle(abi.UVERBS_ATTR_CREATE_SRQ_HANDLE)), need(handle(abi.UVERBS_ATTR_CREATE_SRQ_PD_HANDLE)),
			need(in(abi.UVERBS_ATTR_CREATE_SRQ_USER_HANDLE, 8, 8)), need(in(abi.UVERBS_ATTR_CREATE_SRQ_MAX_WR, 4, 4)),
			need(in(abi.UVERBS_ATTR_CREATE_SRQ_MAX_SGE, 4, 4)), need(in(abi.UVERBS_ATTR_CREATE_SRQ_LIMIT, 4, 4)),
			need(number(abi.UVERBS_ATTR_CREATE_SRQ_TYPE)), fd(abi.UVERBS_ATTR_CREATE_SRQ_EVENT_FD),
			need(out(abi.UVERBS_ATTR_CREATE_SRQ_RESP_MAX_WR, 4, 4)), need(out(abi.UVERBS_ATTR_CREATE_SRQ_RESP_MAX_SGE, 4, 4)),
			out(abi.UVERBS_ATTR_CREATE_SRQ_RESP_SRQ_NUM, 4, 4), uhwIn, uhwOut}},
		methodKey(abi.UVERBS_OBJECT_SRQ, abi.UVERBS_METHOD_SRQ_DESTROY): destroys[*srq](abi.UVERBS_ATTR_DESTROY_SRQ_HANDLE, 4),
	}
}

// The driver's parts of a command. What is behind the longest that is known is refused unless it is zero.
var (
	uhwIn  = attrSpec{id: abi.UVERBS_ATTR_UHW_IN, kind: kindIn, max: 256, longer: true}
	uhwOut = attrSpec{id: abi.UVERBS_ATTR_UHW_OUT, kind: kindOut, max: 256, longer: true}
)

func in(id uint16, least, most int) attrSpec {
	return attrSpec{id: id, kind: kindIn, min: least, max: most}
}
func out(id uint16, least, most int) attrSpec {
	return attrSpec{id: id, kind: kindOut, min: least, max: most}
}
func number(id uint16) attrSpec    { return attrSpec{id: id, kind: kindConst} }
func handle(id uint16) attrSpec    { return attrSpec{id: id, kind: kindHandle} }
func newHandle(id uint16) attrSpec { return attrSpec{id: id, kind: kindNewHandle} }
func fd(id uint16) attrSpec        { return attrSpec{id: id, kind: kindFD} }

func need(s attrSpec) attrSpec {
	s.need = true
	return s
}

func longer(s attrSpec) attrSpec {
	s.longer = true
	return s
}

// destroys is the method that ends an object; responseSize bytes of counts of events are answered as attribute 1.
func destroys[T object](id uint16, responseSize int) *method {
	m := &method{attrs: []attrSpec{need(handle(id))}}
	if responseSize > 0 {
		m.attrs = append(m.attrs, need(out(1, responseSize, responseSize)))
	}
	m.run = func(r *call) syscall.Errno {
		counts, errno := destroy[T](r.c, r.num(id))
		if errno != 0 || responseSize == 0 {
			return errno
		}
		return r.out(1, counts.bytes())
	}
	return m
}

// getContext is the first command of a client.
func getContext(r *call) syscall.Errno {
	c := r.c
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	if c.established {
		return unix.EINVAL
	}
	room := r.outSize(abi.UVERBS_ATTR_UHW_OUT)
	if errno := c.establish(r.in(abi.UVERBS_ATTR_UHW_IN)); errno != 0 {
		return errno
	}
	errno := firstOf(
		r.out32(abi.UVERBS_ATTR_GET_CONTEXT_NUM_COMP_VECTORS, compVectors),
		r.out64(abi.UVERBS_ATTR_GET_CONTEXT_CORE_SUPPORT, abi.IB_UVERBS_CORE_SUPPORT_OPTIONAL_MR_ACCESS),
		r.out(abi.UVERBS_ATTR_UHW_OUT, c.ucontext(room)))
	if errno != 0 {
		c.dismiss()
	}
	return errno
}

const compVectors = 1

// establish makes the context as the client's driver wants it. Called with dev.mu held.
func (c *Context) establish(req []byte) syscall.Errno {
	const v1 = 8 // struct mlx5_ib_alloc_ucontext_req
	if len(req) != v1 && len(req) < 16 {
		return unix.EINVAL
	}
	q := structOf[abi.Mlx5AllocUcontextReqV2](req)
	switch {
	case q.Flags&^abi.MLX5_IB_ALLOC_UCTX_DEVX != 0:
		return unix.EINVAL
	case q.CompMask != 0 || q.Reserved0 != 0 || q.Reserved1 != 0 || q.Reserved2 != 0:
		return unix.EOPNOTSUPP
	} // DEVX is granted, but has no methods: drivers do without what these would tell them
	c.cqeVersion = min(q.MaxCQEVersion, 1)
	c.devx = q.Flags&abi.MLX5_IB_ALLOC_UCTX_DEVX != 0
	c.dynamic = q.LibCaps&abi.MLX5_LIB_CAP_DYN_UAR != 0 && !c.dev.cfg.StaticUARs
	if !c.dynamic {
		if q.TotalNumBFRegs == 0 || q.NumLowLatencyBFRegs >= q.TotalNumBFRegs {
			return unix.EINVAL
		}
		if q.TotalNumBFRegs > maxBFRegs {
			return unix.ENOMEM
		}
		c.bfregs = (q.TotalNumBFRegs + bfregsPerUAR - 1) &^ (bfregsPerUAR - 1)
		c.inUse = make([]int, c.bfregs)
		for id := range c.bfregs / bfregsPerUAR {
			c.uars[id] = c.staticUAR(id)
		}
		c.uarIDs = len(c.uars)
	}
	c.established = true
	return 0
}

// dismiss takes back what establish has done.
func (c *Context) dismiss() {
	c.established, c.bfregs, c.inUse, c.uarIDs = false, 0, nil, 0
	clear(c.uars)
}

// queryContext tells the same again.
func queryContext(r *call) syscall.Errno {
	c := r.c
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	return firstOf(
		r.out32(abi.UVERBS_ATTR_QUERY_CONTEXT_NUM_COMP_VECTORS, compVectors),
		r.out64(abi.UVERBS_ATTR_QUERY_CONTEXT_CORE_SUPPORT, abi.IB_UVERBS_CORE_SUPPORT_OPTIONAL_MR_ACCESS),
		r.out(abi.MLX5_IB_ATTR_QUERY_CONTEXT_RESP_UCTX, c.ucontext(r.outSize(abi.MLX5_IB_ATTR_QUERY_CONTEXT_RESP_UCTX))))
}

// asyncAlloc opens the file of asynchronous events.
func asyncAlloc(r *call) syscall.Errno {
	c := r.c
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	e, err := newEventFile(r.files)
	if err != nil {
		return unix.EMFILE
	}
	if c.async != nil {
		c.async.close()
	}
	c.async = e
	r.newNumber(abi.UVERBS_ATTR_ASYNC_EVENT_ALLOC_FD_HANDLE, uint64(e.number))
	return 0
}
