package procmem

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrGone means that the process has ended, or runs another program since. It is an os.ErrProcessDone.
var ErrGone = fmt.Errorf("no memory is left: %w", os.ErrProcessDone)

// A Memory is the address space that a process had when it was opened. It is that one for ever: an execve of the process, or
// another process with the same number, make it unreachable, and are never mistaken for it. It is safe for concurrent use.
//
// Access is as a device's to pages that were registered: what the program itself may not write at present is written all the same,
// so who makes regions of it checks first (Check).
type Memory struct {
	pid int // the process', whichever thread it was opened by: threads end

	mu sync.RWMutex // held for reading during accesses, for writing by Close
	fd int          // /proc/PID/mem, which keeps the address space's structure, not its pages; -1 once closed
}

// Open opens the memory of a process (or of the process of a thread). It takes the right to trace it: its parents have that, and
// root.
func Open(pid int) (*Memory, error) {
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/mem", pid), unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch err {
	case nil:
		process, err := ProcessOf(pid)
		if err != nil {
			unix.Close(fd)
			return nil, ErrGone
		}
		return &Memory{pid: process, fd: fd}, nil
	case unix.ENOENT, unix.ESRCH:
		return nil, ErrGone
	case unix.EACCES, unix.EPERM:
		return nil, fmt.Errorf("memory of process %d: %w: it belongs to another user, or the system forbids tracing "+
			"(kernel.yama.ptrace_scope must be 0 or 1)", pid, err)
	}
	return nil, fmt.Errorf("memory of process %d: %w", pid, err)
}

// PID is the number of the process, also if it was opened by a thread's.
func (m *Memory) PID() int { return m.pid }

// ProcessOf is the number of the process that a thread is of.
func ProcessOf(tid int) (int, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(status), "\nTgid:")
	line, _, _ := strings.Cut(rest, "\n")
	return strconv.Atoi(strings.TrimSpace(line))
}

// ReadAt fills p from address va on. All of it, or an error: ErrGone, or that there is no memory (EFAULT).
func (m *Memory) ReadAt(p []byte, va uint64) error { return m.access(unix.Pread, "read", p, va) }

// WriteAt writes p from address va on. With an error, a part may have been written.
func (m *Memory) WriteAt(p []byte, va uint64) error { return m.access(unix.Pwrite, "write", p, va) }

func (m *Memory) access(call func(int, []byte, int64) (int, error), name string, p []byte, va uint64) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for len(p) > 0 {
		n, err := call(m.fd, p, int64(va))
		switch {
		case err == unix.EINTR:
		case err == unix.EIO || err == unix.EINVAL || err == unix.EFAULT: // no such address
			return fmt.Errorf("%s %d bytes at %#x of process %d: %w", name, len(p), va, m.pid, unix.EFAULT)
		case err == unix.EBADF:
			return ErrGone
		case err != nil:
			return fmt.Errorf("%s %d bytes at %#x of process %d: %w", name, len(p), va, m.pid, err)
		case n == 0:
			return ErrGone // no address space is left
		}
		p, va = p[max(n, 0):], va+uint64(max(n, 0))
	}
	return nil
}

// Close ends access: when it returns, nothing of the process is touched any more. Closing twice is no error.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fd < 0 {
		return nil
	}
	err := unix.Close(m.fd)
	m.fd = -1
	return err
}
