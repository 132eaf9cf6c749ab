package emulate

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/mlx5emu"
	"github.com/ringside-rdma/ringside/internal/procmem"
)

// Open devices, and commands to them.

// A fileID is what tells files apart: of the memfd that the program has for a device.
type fileID struct{ dev, ino uint64 }

func idOf(st *unix.Stat_t) fileID { return fileID{uint64(st.Dev), st.Ino} }

// An openContext is a device that the program has open.
type openContext struct {
	stat   unix.Stat_t // of its file, when it was opened
	ctx    *mlx5emu.Context
	device int
	mem    *procmem.Memory
	tgid   int // the process that has opened it
	id     fileID
}

// openDevice answers the open of a device's node.
func (s *Session) openDevice(c call, device, flags int) error {
	m, err := c.Memory()
	if err != nil {
		return err
	}
	ctx, err := s.devices[device].Open(space{m})
	if err != nil {
		m.Close()
		s.complain("open %s: %v", s.devices[device].Name(), err)
		return c.Fail(unix.ENODEV)
	}
	o := &openContext{ctx: ctx, device: device, mem: m, tgid: m.PID()}
	// An open file of its own, not a duplicate of ours: its lock goes with the program's last reference to it.
	theirs, err := reopen(ctx.Pages())
	if err != nil {
		o.close()
		s.complain("open %s: %v", s.devices[device].Name(), err)
		return c.Fail(unix.EMFILE)
	}
	defer unix.Close(theirs)
	var st unix.Stat_t
	if err := unix.Fstat(theirs, &st); err != nil {
		o.close()
		return c.Fail(errnoOf(err))
	}
	o.id, o.stat = idOf(&st), st
	s.mu.Lock()
	s.contexts[o.id] = o
	s.mu.Unlock()
	s.living.Add(1)
	go s.watch(o)
	return c.ReturnFD(theirs, flags&unix.O_CLOEXEC != 0)
}

// reopen opens a file anew, and takes its lock.
func reopen(f *os.File) (int, error) {
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(int(f.Fd())), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("the pages' file: %w", err)
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("lock of the pages' file: %w", err)
	}
	return fd, nil
}

// watch ends a context when the program has let go of its file.
func (s *Session) watch(o *openContext) {
	defer s.living.Done()
	for {
		if err := unix.Flock(int(o.ctx.Pages().Fd()), unix.LOCK_EX); err != unix.EINTR {
			break
		}
	}
	s.mu.Lock()
	delete(s.contexts, o.id)
	s.mu.Unlock()
	o.close()
}

func (o *openContext) close() {
	o.ctx.Close()
	o.mem.Close()
}

// openOf returns the context or the channel that a descriptor of the program's is of, or neither. The name of a file says nothing, as
// the program can give it to files of its own.
func (s *Session) openOf(c call, fd uint64) (*openContext, *openChannel, error) {
	var st unix.Stat_t
	if err := unix.Stat(fdLink(c, fd), &st); err != nil {
		return nil, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.contexts[idOf(&st)], s.channels[idOf(&st)], nil
}

// processOf is the number of the process that a call comes from.
func processOf(c call) (int, error) {
	tgid, err := procmem.ProcessOf(c.TID)
	if !c.Valid() {
		return 0, errWithdrawn
	}
	return tgid, err
}

// passer gives the caller of an ioctl descriptors.
type passer struct{ call }

// Pass implements mlx5emu.FilePasser.
func (p passer) Pass(fd int) (int, error) { return p.AddFD(fd, true) }

// maxCommand is longer than any command that devices know.
const maxCommand = 4096

// ioctl answers RDMA_VERBS_IOCTL.
func (s *Session) ioctl(c call) error {
	o, _, err := s.openOf(c, c.Args[0])
	if err != nil || o == nil {
		return c.Continue()
	}
	tgid, err := processOf(c)
	if err != nil {
		return err
	}
	if tgid != o.tgid {
		s.complain("process %d uses %s, which process %d has opened: only that one can", tgid, s.devices[o.device].Name(), o.tgid)
		return c.Fail(unix.EPERM)
	}
	// The header begins with the length of the whole.
	var head [24]byte
	if o.mem.ReadAt(head[:], c.Args[2]) != nil {
		return c.Fail(unix.EFAULT)
	}
	n := int(head[0]) | int(head[1])<<8
	if n < len(head) || n > maxCommand {
		return c.Fail(unix.EINVAL)
	}
	cmd := make([]byte, n)
	if o.mem.ReadAt(cmd, c.Args[2]) != nil {
		return c.Fail(unix.EFAULT)
	}
	if !c.Valid() {
		return errWithdrawn
	}
	errno := o.ctx.Ioctl(cmd, passer{c})
	if !c.Valid() {
		return errWithdrawn
	}
	if o.mem.WriteAt(cmd[len(head):], c.Args[2]+uint64(len(head))) != nil {
		errno = unix.EFAULT
	}
	if errno != 0 {
		return c.Fail(errno)
	}
	return c.Return(0)
}
