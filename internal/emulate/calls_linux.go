package emulate

import (
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/seccomp"
)

// A call is one that the program has made.
type call struct{ *seccomp.Call }

// A handler answers a call.
type handler func(*Session, call) error

// atCWD is a folder argument of the working directory.
const atCWD = ^uint64(0) - 99 // AT_FDCWD, -100

var calls = map[int]handler{
	unix.SYS_OPENAT:     func(s *Session, c call) error { return s.open(c, c.Args[0], c.Args[1], c.Args[2]) },
	unix.SYS_OPENAT2:    (*Session).openat2,
	unix.SYS_NEWFSTATAT: func(s *Session, c call) error { return s.stat(c, c.Args[0], c.Args[1], c.Args[2], c.Args[3]) },
	unix.SYS_FSTAT:      func(s *Session, c call) error { return s.fstat(c, c.Args[0], c.Args[1]) },
	unix.SYS_STATX:      (*Session).statx,
	unix.SYS_FACCESSAT:  func(s *Session, c call) error { return s.access(c, c.Args[0], c.Args[1], c.Args[2]) },
	unix.SYS_FACCESSAT2: func(s *Session, c call) error { return s.access(c, c.Args[0], c.Args[1], c.Args[2]) },
	unix.SYS_READLINKAT: func(s *Session, c call) error { return s.readlink(c, c.Args[0], c.Args[1], c.Args[2], c.Args[3]) },
	unix.SYS_IOCTL:      (*Session).ioctl,
	unix.SYS_WRITE:      (*Session).write,
}

func init() { maps.Copy(calls, oldCalls) }

// rules are the calls that come here. Writes do if they are to files whose numbers are of the channels'.
func rules(channels numbers) []seccomp.Rule {
	r := []seccomp.Rule{{Call: unix.SYS_SOCKET, Where: []seccomp.Arg{{Index: 0, Value: unix.AF_NETLINK}, {Index: 2, Value: unix.NETLINK_RDMA}},
		Errno: unix.EPROTONOSUPPORT}}
	for _, nr := range slices.Sorted(maps.Keys(calls)) {
		rule := seccomp.Rule{Call: nr}
		switch nr {
		case unix.SYS_IOCTL:
			rule.Where = []seccomp.Arg{{Index: 1, Value: uint32(abi.RDMA_VERBS_IOCTL)}}
		case unix.SYS_WRITE:
			rule.Where = []seccomp.Arg{{Index: 0, Value: uint32(channels.first), Last: uint32(channels.last)}}
		}
		r = append(r, rule)
	}
	return r
}
