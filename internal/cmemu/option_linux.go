package cmemu

import (
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Options, multicast groups, and IDs that go to another channel.

// maxOption is the longest value of an option that is read.
const maxOption = 1 << 12

func setOption(w *call) syscall.Errno {
	q, ok := arg[abi.CMSetOption](w)
	if !ok {
		return unix.EINVAL
	}
	return w.with(q.ID, func(x *id) syscall.Errno {
		if q.Optlen > maxOption {
			return unix.EINVAL
		}
		v := make([]byte, q.Optlen)
		if q.Optlen > 0 && w.c.mem.ReadAt(v, q.Optval) != nil {
			return unix.EFAULT
		}
		switch {
		case q.Level == abi.RDMA_OPTION_ID:
			return x.setIDOption(q.Optname, v)
		case q.Level == abi.RDMA_OPTION_IB && q.Optname == abi.RDMA_OPTION_IB_PATH:
			return x.setPath(v)
		}
		return unix.ENOSYS
	})
}

func (x *id) setIDOption(name uint32, v []byte) syscall.Errno {
	size := map[uint32]int{abi.RDMA_OPTION_ID_TOS: 1, abi.RDMA_OPTION_ID_REUSEADDR: 4, abi.RDMA_OPTION_ID_AFONLY: 4, abi.RDMA_OPTION_ID_ACK_TIMEOUT: 1}
	n, ok := size[name]
	if !ok {
		return unix.ENOSYS
	}
	if len(v) != n {
		return unix.EINVAL
	}
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	switch name {
	case abi.RDMA_OPTION_ID_TOS:
		x.tos = v[0]
	case abi.RDMA_OPTION_ID_ACK_TIMEOUT:
		if x.typ != ib.RC {
			return unix.EINVAL
		}
		x.ackTimeout = &v[0]
	case abi.RDMA_OPTION_ID_REUSEADDR:
		on := native.Uint32(v) != 0
		if x.state != idle && (!on || x.state == listening) {
			return unix.EINVAL
		}
		x.reuse = on
	case abi.RDMA_OPTION_ID_AFONLY:
		if x.state != idle && x.state != addrBound {
			return unix.EINVAL
		}
		x.afOnly, x.afOnlySet = native.Uint32(v) != 0, true
	}
	return 0
}

// setPath takes a path of the program's in the place of RESOLVE_ROUTE. There is one only, so it is that, whatever the program says.
func (x *id) setPath(v []byte) syscall.Errno {
	const size, usable = 72, abi.IB_PATH_GMP | abi.IB_PATH_PRIMARY | abi.IB_PATH_BIDIRECTIONAL
	if len(v)%size != 0 {
		return unix.EINVAL
	}
	for ; len(v) > 0; v = v[size:] {
		if native.Uint32(v) == usable {
			return x.takeRoute()
		}
	}
	return unix.EINVAL
}

// joinMulticast is for datagrams, as in the kernel, but not here.
func joinMulticast(w *call) syscall.Errno {
	q, ok := arg[abi.CMJoinMcast](w)
	if !ok || q.JoinFlags > abi.RDMA_MC_JOIN_FLAG_SENDONLY_FULLMEMBER {
		return unix.EINVAL
	}
	if _, errno := sizedSockaddr(bytesOf(&q.Addr), q.AddrSize); errno != 0 {
		return errno
	}
	return w.with(q.ID, func(x *id) syscall.Errno {
		if x.typ == ib.UD {
			return unix.ENOSYS
		}
		return unix.EINVAL
	})
}

func leaveMulticast(w *call) syscall.Errno {
	if int(w.out) < len(bytesOf(&abi.CMDestroyIDResp{})) {
		return unix.ENOSPC
	}
	if _, ok := arg[abi.CMDestroyID](w); !ok {
		return unix.EINVAL
	}
	return unix.ENOENT
}

// migrateID takes an ID of another channel, with its events.
func migrateID(w *call) syscall.Errno {
	var resp abi.CMMigrateResp
	q, errno := argFor[abi.CMMigrateID](w, len(bytesOf(&resp)))
	if errno != 0 {
		return errno
	}
	if w.file == nil {
		return unix.EBADF
	}
	from, open := w.file(int(int32(q.FD)))
	to, m := w.c, w.c.m
	switch {
	case !open:
		return unix.ENOENT
	case from == nil || from.m != m:
		return unix.EINVAL
	}
	m.mu.Lock()
	x, errno := from.find(q.ID)
	if errno == 0 && to.closed {
		errno = unix.EBADF
	}
	if errno == 0 && from != to && len(to.ids) >= maxChannelIDs {
		errno = unix.ENOMEM
	}
	if errno == 0 && from != to {
		m.migrate(x, from, to)
	}
	if errno == 0 {
		resp.EventsReported = x.reported
	}
	m.mu.Unlock()
	if errno != 0 {
		return errno
	}
	return w.write(q.Response, bytesOf(&resp))
}

// migrate takes an ID to another channel, and the requests that it has been asked and not told. Called with mu held.
func (m *Manager) migrate(x *id, from, to *Channel) {
	move := func(x *id) {
		delete(from.ids, x)
		to.ids[x] = true
		x.ch = to
	}
	move(x)
	var stay []*event
	moved := to.events
	for _, e := range from.events {
		if e.of != x {
			stay = append(stay, e)
			continue
		}
		moved = append(moved, e)
		if e.made != nil {
			move(e.made)
		}
	}
	from.setEvents(stay)
	to.setEvents(moved)
}
