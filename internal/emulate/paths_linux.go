package emulate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Calls by path.

// A where is what a path argument names, as far as it concerns us.
type where struct {
	path   string // absolute, as the program knows it
	at     string // in the tree
	device int    // whose node it is, or -1
}

// rdev is the number of the node that it is, or 0.
func (w *where) rdev() uint64 {
	switch {
	case w.device >= 0:
		return rdev(w.device)
	case w.path == cmNode:
		return cmRdev()
	}
	return 0
}

// find looks at a path argument. nil: it is the kernel's affair. Paths are taken as they are written: a symbolic link to one of ours is
// not followed.
func (s *Session) find(c call, dir, path uint64) (*where, error) {
	p, err := c.String(path)
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(p, "/") {
		if !strings.Contains(p, "infiniband") && !strings.Contains(p, "uverbs") && !strings.Contains(p, "rdma_cm") {
			return nil, nil
		}
		base, err := os.Readlink(fdLink(c, dir))
		if err != nil {
			return nil, nil // the kernel has an errno for it
		}
		p = s.tree.origin(base) + "/" + p
	}
	w := &where{path: filepath.Clean(p), device: -1}
	var ok bool
	if w.at, ok = s.tree.place(w.path); !ok {
		return nil, nil
	}
	if i, ok := deviceAt(w.path, len(s.devices)); ok {
		w.device = i
	}
	return w, nil
}

// fdLink is where /proc shows a folder argument, or a descriptor.
func fdLink(c call, fd uint64) string {
	if int32(fd) == unix.AT_FDCWD {
		return fmt.Sprintf("/proc/%d/cwd", c.TID)
	}
	return fmt.Sprintf("/proc/%d/fd/%d", c.TID, int32(fd))
}

func errnoOf(err error) syscall.Errno {
	var e syscall.Errno
	if errors.As(err, &e) {
		return e
	}
	return unix.EIO
}

func (s *Session) open(c call, dir, path, flags uint64) error {
	w, err := s.find(c, dir, path)
	switch {
	case err != nil:
		return err
	case w == nil:
		return c.Continue()
	case w.device >= 0 && flags&(unix.O_PATH|unix.O_DIRECTORY) == 0:
		return s.openDevice(c, w.device, int(flags))
	case w.path == cmNode && flags&(unix.O_PATH|unix.O_DIRECTORY) == 0:
		return s.openChannel(c, int(flags))
	case flags&(unix.O_ACCMODE|unix.O_CREAT|unix.O_TRUNC) != unix.O_RDONLY && flags&unix.O_PATH == 0:
		var st unix.Stat_t
		if err := unix.Stat(w.at, &st); err != nil {
			return c.Fail(errnoOf(err))
		}
		return c.Fail(unix.EACCES)
	}
	fd, err := unix.Open(w.at, int(flags)|unix.O_CLOEXEC, 0)
	if err != nil {
		return c.Fail(errnoOf(err))
	}
	defer unix.Close(fd)
	return c.ReturnFD(fd, flags&unix.O_CLOEXEC != 0)
}

// openat2 is open with its flags in memory. What it can forbid about the path's resolution does not apply to ours.
func (s *Session) openat2(c call) error {
	w, err := s.find(c, c.Args[0], c.Args[1])
	if err != nil || w == nil {
		return cmpErr(err, c)
	}
	m, err := c.Memory()
	if err != nil {
		return err
	}
	defer m.Close()
	var how [8]byte // the first field: the flags
	if m.ReadAt(how[:], c.Args[2]) != nil {
		return c.Fail(unix.EFAULT)
	}
	return s.open(c, c.Args[0], c.Args[1], binary.NativeEndian.Uint64(how[:]))
}

// cmpErr lets the kernel do a call that is none of ours, unless something went wrong.
func cmpErr(err error, c call) error {
	if err != nil {
		return err
	}
	return c.Continue()
}

// subject returns the number of the node that a stat is about, open or not, and what stat says of the file behind it; 0: it is an
// ordinary file in the tree. ok: it is about one of ours.
func (s *Session) subject(c call, dir, path, flags uint64) (st unix.Stat_t, node uint64, errno syscall.Errno, ok bool, err error) {
	w, err := s.find(c, dir, path)
	if err != nil {
		return st, 0, 0, false, err
	}
	if w == nil {
		if flags&unix.AT_EMPTY_PATH == 0 {
			return st, 0, 0, false, nil
		}
		if p, err := c.String(path); path != 0 && (err != nil || p != "") {
			return st, 0, 0, false, err
		}
		st, node, ok = s.openFile(c, dir)
		return st, node, 0, ok, nil
	}
	if flags&unix.AT_SYMLINK_NOFOLLOW != 0 {
		err = unix.Lstat(w.at, &st)
	} else {
		err = unix.Stat(w.at, &st)
	}
	if err != nil {
		return st, 0, errnoOf(err), true, nil
	}
	return st, w.rdev(), 0, true, nil
}

// openFile is subject for a descriptor.
func (s *Session) openFile(c call, fd uint64) (st unix.Stat_t, node uint64, ok bool) {
	o, ch, _ := s.openOf(c, fd)
	switch { // not of our descriptors, which watch may be closing
	case o != nil:
		return o.stat, rdev(o.device), true
	case ch != nil:
		return ch.stat, cmRdev(), true
	}
	return st, 0, false
}

// asNode makes the stat of a file that of a node, or leaves it as it is.
func asNode(st *unix.Stat_t, node uint64) {
	if node == 0 {
		return
	}
	st.Mode, st.Nlink, st.Rdev, st.Size, st.Blocks = unix.S_IFCHR|0o666, 1, node, 0, 0
}

func (s *Session) stat(c call, dir, path, buf, flags uint64) error {
	st, node, errno, ok, err := s.subject(c, dir, path, flags)
	if err != nil || !ok {
		return cmpErr(err, c)
	}
	return s.answerStat(c, &st, node, errno, buf)
}

func (s *Session) fstat(c call, fd, buf uint64) error {
	st, node, ok := s.openFile(c, fd)
	if !ok {
		return c.Continue()
	}
	return s.answerStat(c, &st, node, 0, buf)
}

func (s *Session) answerStat(c call, st *unix.Stat_t, node uint64, errno syscall.Errno, buf uint64) error {
	if errno != 0 {
		return c.Fail(errno)
	}
	asNode(st, node)
	return s.answerWith(c, statBytes(st), buf, 0)
}

// answerWith writes b to the program's memory and ends the call with n.
func (s *Session) answerWith(c call, b []byte, va uint64, n int64) error {
	m, err := c.Memory()
	if err != nil {
		return err
	}
	defer m.Close()
	if err := m.WriteAt(b, va); err != nil {
		return c.Fail(unix.EFAULT)
	}
	return c.Return(n)
}

func (s *Session) statx(c call) error {
	dir, path, flags, mask, buf := c.Args[0], c.Args[1], c.Args[2], c.Args[3], c.Args[4]
	st, node, errno, ok, err := s.subject(c, dir, path, flags)
	if err != nil || !ok {
		return cmpErr(err, c)
	}
	if errno != 0 {
		return c.Fail(errno)
	}
	asNode(&st, node)
	x := unix.Statx_t{
		Mask: uint32(mask) & unix.STATX_BASIC_STATS, Blksize: uint32(st.Blksize), Nlink: uint32(st.Nlink), Uid: st.Uid, Gid: st.Gid,
		Mode: uint16(st.Mode), Ino: st.Ino, Size: uint64(st.Size), Blocks: uint64(st.Blocks),
		Atime: statxTime(st.Atim), Mtime: statxTime(st.Mtim), Ctime: statxTime(st.Ctim),
		Rdev_major: unix.Major(uint64(st.Rdev)), Rdev_minor: unix.Minor(uint64(st.Rdev)),
		Dev_major: unix.Major(uint64(st.Dev)), Dev_minor: unix.Minor(uint64(st.Dev)),
	}
	return s.answerWith(c, statxBytes(&x), buf, 0)
}

func statxTime(t unix.Timespec) unix.StatxTimestamp {
	return unix.StatxTimestamp{Sec: int64(t.Sec), Nsec: uint32(t.Nsec)}
}

func (s *Session) access(c call, dir, path, mode uint64) error {
	w, err := s.find(c, dir, path)
	if err != nil || w == nil {
		return cmpErr(err, c)
	}
	if w.rdev() == 0 && mode&unix.W_OK != 0 {
		return c.Fail(unix.EACCES)
	}
	if err := unix.Access(w.at, uint32(mode)); err != nil {
		return c.Fail(errnoOf(err))
	}
	return c.Return(0)
}

func (s *Session) readlink(c call, dir, path, buf, size uint64) error {
	w, err := s.find(c, dir, path)
	if err != nil || w == nil {
		return cmpErr(err, c)
	}
	if int32(size) <= 0 {
		return c.Fail(unix.EINVAL)
	}
	b := make([]byte, min(size, unix.PathMax))
	n, err := unix.Readlink(w.at, b)
	if err != nil {
		return c.Fail(errnoOf(err))
	}
	return s.answerWith(c, b[:n], buf, int64(n))
}
