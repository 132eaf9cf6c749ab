package emulate

import "golang.org/x/sys/unix"

// The calls that arm64 does not have: by path alone, without a folder to begin at.
var oldCalls = map[int]handler{
	unix.SYS_OPEN: func(s *Session, c call) error { return s.open(c, atCWD, c.Args[0], c.Args[1]) },
	unix.SYS_STAT: func(s *Session, c call) error { return s.stat(c, atCWD, c.Args[0], c.Args[1], 0) },
	unix.SYS_LSTAT: func(s *Session, c call) error {
		return s.stat(c, atCWD, c.Args[0], c.Args[1], unix.AT_SYMLINK_NOFOLLOW)
	},
	unix.SYS_ACCESS:   func(s *Session, c call) error { return s.access(c, atCWD, c.Args[0], c.Args[1]) },
	unix.SYS_READLINK: func(s *Session, c call) error { return s.readlink(c, atCWD, c.Args[0], c.Args[1], c.Args[2]) },
}
