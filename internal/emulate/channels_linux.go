package emulate

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/cmemu"
	"github.com/ringside-rdma/ringside/internal/procmem"
	"github.com/ringside-rdma/ringside/internal/seccomp"
)

// Open files of the connection manager, and commands to them, which are write()s.

// numbers are those that files of channels have, first to last, so that the filter need not send all writes of the program here.
type numbers struct{ first, last int }

const (
	maxChannels = 256  // of a process
	fdSetSize   = 1024 // what select has room for, and the usual limit of programs
	maxRW       = 0x7ffff000
)

// chooseNumbers chooses those that a program hardly uses itself: the last quarter of what it may have.
func chooseNumbers() (numbers, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return numbers{}, fmt.Errorf("the limit of open files: %w", err)
	}
	// Go has raised the soft limit of this process to the hard one. The program has it as it was, mostly fdSetSize.
	end := int(min(limit.Cur, fdSetSize))
	return numbers{end - max(1, min(end/4, maxChannels)), end - 1}, nil
}

// An openChannel is an open file of the connection manager: the read end of a pipe, of which this process keeps only the write end.
// While there are events for the program, a byte is in it, and so whatever waits for files waits for events.
type openChannel struct {
	stat unix.Stat_t // of its file, when it was opened
	ch   *cmemu.Channel
	mem  *procmem.Memory
	tgid int // the process that has opened it
	id   fileID

	mu   sync.Mutex
	pipe *os.File // the write end, with the runtime's poller
	fd   int      // of it; -1 once closed
	some bool     // there is a byte in it
}

// openChannel answers the open of the connection manager's node.
func (s *Session) openChannel(c call, flags int) error {
	m, err := c.Memory()
	if err != nil {
		return err
	}
	o := &openChannel{mem: m, tgid: m.PID(), fd: -1}
	theirs, err := o.makePipe(flags&unix.O_NONBLOCK != 0)
	if err != nil {
		m.Close()
		s.complain("open %s: %v", cmNode, err)
		return c.Fail(unix.EMFILE)
	}
	defer unix.Close(theirs)
	if o.ch, err = s.manager.Open(m); err != nil {
		o.close()
		s.complain("open %s: %v", cmNode, err)
		return c.Fail(unix.ENOMEM)
	}
	o.ch.SetNotify(o.notify)
	s.mu.Lock()
	s.channels[o.id] = o
	s.mu.Unlock()
	s.living.Add(1)
	go s.watchChannel(o)
	return s.place(c, theirs, flags&unix.O_CLOEXEC != 0)
}

// makePipe makes the pipe, and returns its read end.
func (o *openChannel) makePipe(nonblock bool) (theirs int, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return -1, fmt.Errorf("a pipe: %w", err)
	}
	if err = unix.Fstat(p[0], &o.stat); err == nil {
		err = unix.SetNonblock(p[0], nonblock)
	}
	if err != nil {
		unix.Close(p[0])
		unix.Close(p[1])
		return -1, fmt.Errorf("a pipe: %w", err)
	}
	o.id, o.fd, o.pipe = idOf(&o.stat), p[1], os.NewFile(uintptr(p[1]), "channel")
	return p[0], nil
}

// place ends an open with a file that has one of the numbers.
func (s *Session) place(c call, fd int, cloexec bool) error {
	s.placing.Lock()
	defer s.placing.Unlock()
	for n := s.numbers.first; n <= s.numbers.last; n++ {
		err := c.ReturnFDAt(fd, n, cloexec)
		switch {
		case errors.Is(err, seccomp.ErrLimit):
			s.once.Do(func() {
				s.complain("open %s: process %d may have no file with the number %d, as this has to have (ulimit -n)", cmNode, c.TID, n)
			})
			return c.Fail(unix.EMFILE)
		case !errors.Is(err, seccomp.ErrTaken):
			return err
		}
	}
	s.once.Do(func() {
		s.complain("open %s: process %d has files with all the numbers that this can have, %d to %d", cmNode, c.TID, s.numbers.first, s.numbers.last)
	})
	return c.Fail(unix.EMFILE)
}

// notify makes the program's file readable, or no longer so.
func (o *openChannel) notify(some bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.fd < 0 || some == o.some {
		return
	}
	if some {
		_, err := unix.Write(o.fd, []byte{1})
		o.some = err == nil // EPIPE: nobody has the file any more
		return
	}
	r, err := o.reader()
	if err != nil {
		return // the program looks for events in vain, until the next one
	}
	defer unix.Close(r)
	unix.Read(r, make([]byte, 1)) // the program may have done it itself
	o.some = false
}

// reader opens the read end, which is not seen to have gone until that is closed. Called with mu held.
func (o *openChannel) reader() (int, error) {
	return unix.Open("/proc/self/fd/"+strconv.Itoa(o.fd), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
}

// hold keeps the channel until let is called, as the kernel keeps a file for a call that waits, whoever closes it meanwhile.
func (o *openChannel) hold() (let func(), err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.fd < 0 {
		return nil, unix.EBADF
	}
	r, err := o.reader()
	if err != nil {
		return nil, err
	}
	return func() { unix.Close(r) }, nil
}

// watchChannel ends a channel when the program has let go of its file, in the way that the kernel tells it who writes to a pipe.
func (s *Session) watchChannel(o *openChannel) {
	defer s.living.Done()
	if raw, err := o.pipe.SyscallConn(); err == nil {
		raw.Write(func(fd uintptr) bool { return unread(int(fd)) })
	}
	s.mu.Lock()
	delete(s.channels, o.id)
	s.mu.Unlock()
	o.close()
}

// unread reports whether nobody has a pipe's read end.
func unread(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd)}}
	for {
		if _, err := unix.Poll(p, 0); err != unix.EINTR {
			return p[0].Revents&unix.POLLERR != 0
		}
	}
}

func (o *openChannel) close() {
	if o.ch != nil {
		o.ch.Close()
	}
	o.mu.Lock()
	o.fd = -1
	o.mu.Unlock()
	o.pipe.Close()
	o.mem.Close()
}

// write answers a write to a file with one of the numbers.
func (s *Session) write(c call) error {
	o := s.channelOf(c, c.Args[0])
	if o == nil {
		return c.Continue()
	}
	if !isThread(o.tgid, c.TID) {
		s.complain("process %d uses %s, which process %d has opened: only that one can", c.TID, cmNode, o.tgid)
		return c.Fail(unix.EACCES)
	}
	size := min(c.Args[2], maxRW)
	b := make([]byte, min(size, maxCommand))
	switch err := o.mem.ReadAt(b, c.Args[1]); {
	case errors.Is(err, procmem.ErrGone): // an execve
		return c.Fail(unix.EACCES)
	case err != nil:
		return c.Fail(unix.EFAULT)
	}
	file := func(fd int) (ch *cmemu.Channel, open bool) {
		_, o, err := s.openOf(c, uint64(fd))
		if o != nil {
			ch = o.ch
		}
		return ch, fd >= 0 && err != unix.ENOENT // below 0, there is AT_FDCWD
	}
	var w *waiter
	for {
		if !c.Valid() {
			return errWithdrawn
		}
		errno := o.ch.Write(b, file)
		switch {
		case errno == 0:
			return c.Return(int64(size))
		case errno != unix.EAGAIN:
			return c.Fail(errno)
		}
		if w == nil {
			if nonblock, err := isNonblock(c, c.Args[0]); nonblock || err != nil {
				return c.Fail(unix.EAGAIN)
			}
			w = &waiter{tgid: o.tgid, tid: c.TID, held: &s.held}
			let, err := o.hold()
			if err != nil {
				return c.Fail(errnoOf(err))
			}
			defer let()
		}
		select {
		case <-o.ch.Ready():
		case <-time.After(signalPause):
			if w.signalled() {
				return c.Restart()
			}
		}
	}
}

// channelOf returns the channel that a descriptor of the program's is of, or nil.
func (s *Session) channelOf(c call, fd uint64) *openChannel {
	_, o, _ := s.openOf(c, fd)
	return o
}

// isThread reports whether a thread is of a process.
func isThread(tgid, tid int) bool {
	return unix.Access(fmt.Sprintf("/proc/%d/task/%d", tgid, tid), unix.F_OK) == nil
}

// isNonblock reports whether a descriptor of the program's is of an open file with O_NONBLOCK.
func isNonblock(c call, fd uint64) (bool, error) {
	info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", c.TID, int32(fd)))
	if err != nil {
		return false, err
	}
	flags, err := strconv.ParseUint(field(info, "flags"), 8, 64)
	return flags&unix.O_NONBLOCK != 0, err
}

// field is what follows a name and a colon in one of the files of /proc.
func field(text []byte, name string) string {
	for line := range bytes.Lines(text) {
		if n, v, ok := bytes.Cut(line, []byte(":")); ok && string(n) == name {
			return string(bytes.TrimSpace(v))
		}
	}
	return ""
}
