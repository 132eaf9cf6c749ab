package mlx5emu

import (
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// The commands of the write() interface, which INVOKE_WRITE carries, too.

// A writeCmd is such a command: the core's request, and the driver's.
type writeCmd struct {
	c       *Context
	files   FilePasser
	core    []byte
	uhw     []byte
	room    int // for the core's part of the response
	uhwRoom int // for the driver's

	// answerable reports with EFAULT that there is no memory for the core's part of the response, for commands that must not fail
	// later.
	answerable func() syscall.Errno
}

// A response is what a command answers: the core's part and the driver's.
type response struct{ core, uhw []byte }

// A writeMethod is a command that the device knows. Requests and responses may be longer than what is known; they must not be shorter.
type writeMethod struct {
	in, out int
	early   bool // may come before there is a context
	run     func(*writeCmd) (response, syscall.Errno)
}

const extended = abi.IB_USER_VERBS_CMD_FLAG_EXTENDED

var writeMethods map[uint32]*writeMethod

func init() {
	writeMethods = map[uint32]*writeMethod{
		abi.IB_USER_VERBS_CMD_GET_CONTEXT:                {in: 8, out: 8, early: true, run: writeGetContext},
		abi.IB_USER_VERBS_CMD_QUERY_DEVICE:               {in: 8, out: 176, run: writeQueryDevice},
		extended | abi.IB_USER_VERBS_EX_CMD_QUERY_DEVICE: {in: 8, out: 184, run: writeQueryDeviceEx},
		abi.IB_USER_VERBS_CMD_QUERY_PORT:                 {in: 16, out: 40, run: writeQueryPort},
		abi.IB_USER_VERBS_CMD_ALLOC_PD:                   {in: 8, out: 4, run: writeAllocPD},
		abi.IB_USER_VERBS_CMD_DEALLOC_PD:                 {in: 4, run: writeDestroy[*pd](0, 0)},
		abi.IB_USER_VERBS_CMD_CREATE_AH:                  {in: 56, out: 4, run: writeCreateAH},
		abi.IB_USER_VERBS_CMD_DESTROY_AH:                 {in: 4, run: writeDestroy[*ah](0, 0)},
		abi.IB_USER_VERBS_CMD_REG_MR:                     {in: 40, out: 12, run: writeRegMR},
		abi.IB_USER_VERBS_CMD_REREG_MR:                   {in: 48, out: 8, run: writeReregMR},
		abi.IB_USER_VERBS_CMD_DEREG_MR:                   {in: 4, run: writeDestroy[*mr](0, 0)},
		abi.IB_USER_VERBS_CMD_ALLOC_MW:                   {in: 16, out: 8, run: writeAllocMW},
		abi.IB_USER_VERBS_CMD_DEALLOC_MW:                 {in: 4, run: writeDestroy[*mw](0, 0)},
		abi.IB_USER_VERBS_CMD_CREATE_COMP_CHANNEL:        {in: 8, out: 4, run: writeCreateChannel},
		abi.IB_USER_VERBS_CMD_CREATE_CQ:                  {in: 32, out: 8, run: writeCreateCQ},
		extended | abi.IB_USER_VERBS_EX_CMD_CREATE_CQ:    {in: 32, out: 16, run: writeCreateCQEx},
		abi.IB_USER_VERBS_CMD_RESIZE_CQ:                  {in: 16, out: 8, run: writeResizeCQ},
		extended | abi.IB_USER_VERBS_EX_CMD_MODIFY_CQ:    {in: 16, run: writeModifyCQ},
		abi.IB_USER_VERBS_CMD_DESTROY_CQ:                 {in: 16, out: 8, run: writeDestroy[*cq](8, 8)},
		abi.IB_USER_VERBS_CMD_CREATE_QP:                  {in: 56, out: 32, run: writeCreateQP},
		extended | abi.IB_USER_VERBS_EX_CMD_CREATE_QP:    {in: 52, out: 40, run: writeCreateQPEx},
		abi.IB_USER_VERBS_CMD_QUERY_QP:                   {in: 16, out: 128, run: writeQueryQP},
		abi.IB_USER_VERBS_CMD_MODIFY_QP:                  {in: 112, run: writeModifyQP},
		extended | abi.IB_USER_VERBS_EX_CMD_MODIFY_QP:    {in: 112, run: writeModifyQPEx},
		abi.IB_USER_VERBS_CMD_DESTROY_QP:                 {in: 16, out: 4, run: writeDestroy[*qp](8, 4)},
		extended | abi.IB_USER_VERBS_EX_CMD_CREATE_FLOW:  {in: 24, out: 8, run: writeCreateFlow},
		extended | abi.IB_USER_VERBS_EX_CMD_DESTROY_FLOW: {in: 8, run: writeDestroy[*flow](4, 0)},
		abi.IB_USER_VERBS_CMD_CREATE_SRQ:                 {in: 32, out: 16, run: writeCreateSRQ},
		abi.IB_USER_VERBS_CMD_CREATE_XSRQ:                {in: 48, out: 16, run: writeCreateXSRQ},
		abi.IB_USER_VERBS_CMD_MODIFY_SRQ:                 {in: 16, run: writeModifySRQ},
		abi.IB_USER_VERBS_CMD_QUERY_SRQ:                  {in: 16, out: 16, run: writeQuerySRQ},
		abi.IB_USER_VERBS_CMD_DESTROY_SRQ:                {in: 16, out: 4, run: writeDestroy[*srq](8, 4)},
	}
}

// do runs a command that has room for outRoom bytes of the core's response.
func (w *writeCmd) do(cmd uint32, outRoom int) (response, syscall.Errno) {
	m := writeMethods[cmd]
	if m == nil {
		return response{}, unix.EOPNOTSUPP
	}
	if len(w.core) < m.in || outRoom < m.out {
		return response{}, unix.ENOSPC
	}
	if !m.early && !w.c.ready() {
		return response{}, unix.EINVAL
	}
	w.room = outRoom
	return m.run(w)
}

// invokeWrite is the method that carries them.
func invokeWrite(r *call) syscall.Errno {
	cmd := r.num(abi.UVERBS_ATTR_WRITE_CMD)
	if cmd > 1<<32-1 {
		return unix.EOPNOTSUPP
	}
	w := &writeCmd{c: r.c, files: r.files, core: r.in(abi.UVERBS_ATTR_CORE_IN), uhw: r.in(abi.UVERBS_ATTR_UHW_IN),
		uhwRoom: r.outSize(abi.UVERBS_ATTR_UHW_OUT)}
	w.answerable = func() syscall.Errno { return r.out(abi.UVERBS_ATTR_CORE_OUT, nil) }
	resp, errno := w.do(uint32(cmd), r.outSize(abi.UVERBS_ATTR_CORE_OUT))
	if errno != 0 {
		return errno
	}
	if resp.core != nil {
		errno = r.out(abi.UVERBS_ATTR_CORE_OUT, resp.core)
	}
	if resp.uhw != nil {
		errno = firstOf(errno, r.out(abi.UVERBS_ATTR_UHW_OUT, resp.uhw))
	}
	return errno
}

// Write executes a command as write() on the device file takes it, and returns how many bytes of it were taken: all.
func (c *Context) Write(cmd []byte, files FilePasser) (int, syscall.Errno) {
	if len(cmd) < 8 {
		return 0, unix.EINVAL
	}
	id, inWords, outWords := native.Uint32(cmd), int(native.Uint16(cmd[4:])), int(native.Uint16(cmd[6:]))
	m := writeMethods[id]
	if m == nil {
		return 0, unix.EINVAL
	}
	c.calls.RLock()
	defer c.calls.RUnlock()
	if c.closed {
		return 0, unix.EBADF
	}
	w := &writeCmd{c: c, files: files}
	var to uint64 // where the response goes
	var room int
	if id&extended != 0 {
		if len(cmd) < 24 || native.Uint32(cmd[20:]) != 0 {
			return 0, unix.EINVAL
		}
		h := structOf[abi.ExCmdHdr](cmd[8:])
		if 24+8*(inWords+int(h.ProviderInWords)) != len(cmd) {
			return 0, unix.EINVAL
		}
		w.core, w.uhw = cmd[24:][:8*inWords], cmd[24+8*inWords:]
		to, room, w.uhwRoom = h.Response, 8*outWords, 8*int(h.ProviderOutWords)
	} else {
		if 4*inWords != len(cmd) || len(cmd)-8 < m.in {
			return 0, unix.EINVAL
		}
		w.core, w.uhw = cmd[8:][:m.in], cmd[8+m.in:]
		if m.out > 0 {
			if 4*outWords < m.out {
				return 0, unix.ENOSPC
			}
			to, room, w.uhwRoom = native.Uint64(cmd[8:]), m.out, 4*outWords-m.out
		}
	}
	w.answerable = func() syscall.Errno {
		if c.mem.WriteAt(make([]byte, room), to) != nil {
			return unix.EFAULT
		}
		return 0
	}
	resp, errno := w.do(id, room)
	if errno != 0 {
		return 0, errno
	}
	if resp.core != nil && c.mem.WriteAt(resp.core[:min(room, len(resp.core))], to) != nil ||
		resp.uhw != nil && w.uhwRoom > 0 && c.mem.WriteAt(resp.uhw[:min(w.uhwRoom, len(resp.uhw))], to+uint64(room)) != nil {
		return 0, unix.EFAULT
	}
	return len(cmd), 0
}

// writeDestroy ends the object whose handle is at that offset of the request.
func writeDestroy[T object](at, responseSize int) func(*writeCmd) (response, syscall.Errno) {
	return func(w *writeCmd) (response, syscall.Errno) {
		counts, errno := destroy[T](w.c, uint64(native.Uint32(w.core[at:])))
		if errno != 0 || responseSize == 0 {
			return response{}, errno
		}
		return response{core: counts.bytes()[:responseSize]}, 0
	}
}

func writeGetContext(w *writeCmd) (response, syscall.Errno) {
	c := w.c
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	if c.established {
		return response{}, unix.EINVAL
	}
	if errno := firstOf(w.answerable(), c.establish(w.uhw)); errno != 0 {
		c.dismiss()
		return response{}, errno
	}
	e, err := newEventFile(w.files)
	if err != nil {
		c.dismiss()
		return response{}, unix.EMFILE
	}
	c.async = e
	return response{bytesOf(&abi.GetContextResp{AsyncFD: uint32(e.number), NumCompVectors: compVectors}), c.ucontext(w.uhwRoom)}, 0
}

func writeQueryDevice(w *writeCmd) (response, syscall.Errno) {
	r := w.c.dev.deviceResp()
	return response{core: bytesOf(&r)}, 0
}

func writeQueryDeviceEx(w *writeCmd) (response, syscall.Errno) {
	if q := structOf[abi.ExQueryDevice](w.core); q.CompMask != 0 || q.Reserved != 0 {
		return response{}, unix.EINVAL
	}
	r := abi.ExQueryDeviceResp{Base: w.c.dev.deviceResp(), TimestampMask: 1<<64 - 1, HCACoreClock: 1e6,
		CQModerationCaps: abi.CQModerationCaps{MaxCQModerationCount: maxModerateCount, MaxCQModerationPeriod: maxModeratePeriod}}
	b := bytesOf(&r)
	r.ResponseLength = uint32(min(w.room, len(b)))
	u := abi.Mlx5QueryDeviceResp{}
	ub := bytesOf(&u)
	u.ResponseLength = uint32(min(w.uhwRoom, len(ub)))
	return response{b, ub}, 0
}

func writeQueryPort(w *writeCmd) (response, syscall.Errno) {
	if structOf[abi.QueryPort](w.core).PortNum != 1 {
		return response{}, unix.EINVAL
	}
	p := w.c.dev.portResp()
	return response{core: bytesOf(&p.LegacyResp)}, 0
}

func writeCreateChannel(w *writeCmd) (response, syscall.Errno) {
	c := w.c
	c.dev.mu.Lock()
	defer c.dev.mu.Unlock()
	c.sweepChannels()
	if len(c.channels) >= maxChannels {
		return response{}, unix.EMFILE
	}
	if errno := w.answerable(); errno != 0 {
		return response{}, errno
	}
	e, err := newEventFile(w.files)
	if err != nil {
		return response{}, unix.EMFILE
	}
	c.channels = append(c.channels, e)
	return response{core: bytesOf(&abi.CreateCompChannelResp{FD: uint32(e.number)})}, 0
}

// channel is the one that the client knows by that number, or nil. One whose number the client has closed, and used for another since,
// may still have a CQ. Called with dev.mu held.
func (c *Context) channel(number int64) *eventFile {
	for _, e := range slices.Backward(c.channels) {
		if int64(e.number) == number && !e.deserted() {
			return e
		}
	}
	return nil
}

// sweepChannels gives up the channels that the client has closed, and that no CQ uses. Called with dev.mu held.
func (c *Context) sweepChannels() {
	c.channels = slices.DeleteFunc(c.channels, func(e *eventFile) bool {
		gone := e.refs == 0 && e.deserted()
		if gone {
			e.close()
		}
		return gone
	})
}
