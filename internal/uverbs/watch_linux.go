package uverbs

import (
	"errors"
	"fmt"
	"os"
	"path"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// WatchRemoval calls fn once, on a goroutine of its own, when the character device (Device.Chardev, "uverbs0") goes: also
// if that has happened before. The drivers rxe and siw cannot take a device away from those who have it open, so deletion
// of such a device (`rdma link delete`, or its net device going) waits until all of them have closed it, and nothing at the
// open device says so: without a watch it waits for ever. Other drivers also report asynchronous events there.
//
// Start the watch before the device is opened: what had its name before and went in between is then noticed. stop ends the
// watch, and may be called again, from fn, too; fn does not begin after stop has returned, but may still be running.
// All watches of a process share a netlink socket and a goroutine, which are there while there are watches.
//
// The kernel tells nobody in a network namespace whose user namespace is not the initial one, which is so in containers
// without root. There, and where there is no such socket, sysfs is looked at once a second instead. An error means that
// there is no sysfs, so that nothing can be noticed. WatchRemoval may be called concurrently.
func WatchRemoval(chardev string, fn func()) (stop func(), err error) {
	return removals.watch(chardev, fn)
}

var removals = watcher{host: &theHost, open: openUevents, every: time.Second}

// A watcher looks after all watches of the process.
type watcher struct {
	host  *host
	open  func() (s source, deaf bool) // deaf: messages may not come
	every time.Duration                // between looks at sysfs, where messages may not come

	mu      sync.Mutex
	watches map[*watch]struct{} // those that may still fire
	source  source              // while there are any, with a goroutine that listens to it
}

type watch struct {
	chardev string
	inode   uint64 // of its folder in sysfs, where a number is not used again soon; the device's name and number are
	fn      func()
	stopped bool // guarded by watcher.mu
}

// A source has the kernel's messages about devices, one a call.
type source interface {
	// next waits for a message, up to the deadline if that is not zero. Its errors: os.ErrDeadlineExceeded, os.ErrClosed
	// after Close, unix.ENOBUFS if messages were lost. It is called by one goroutine.
	next(buf []byte, deadline time.Time) (n int, err error)
	// Close ends a call of next, now or later.
	Close() error
}

func (w *watcher) watch(chardev string, fn func()) (stop func(), err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, err := os.Stat(w.host.class()); err != nil {
		return nil, fmt.Errorf("removal of %s cannot be noticed: %w (is sysfs mounted?)", chardev, err)
	}
	// First listen, then look: a device that goes in between is noticed by one of the two.
	if w.source == nil {
		var deaf bool
		w.source, deaf = w.open()
		go w.listen(w.source, deaf)
	}
	x := &watch{chardev: chardev, inode: w.host.inode(chardev), fn: fn}
	if w.watches == nil {
		w.watches = map[*watch]struct{}{}
	}
	w.watches[x] = struct{}{}
	if x.inode == 0 {
		w.fireLocked(x)
	}
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		x.stopped = true
		w.dropLocked(x)
	}, nil
}

// inode is that of a character device's folder in sysfs, or 0 if there is no such device.
func (h *host) inode(chardev string) uint64 {
	info, err := os.Stat(h.class(classVerbs, chardev))
	if err != nil {
		return 0
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0
	}
	return st.Ino
}

func (w *watcher) fireLocked(x *watch) {
	w.dropLocked(x)
	go func() {
		w.mu.Lock()
		stopped := x.stopped
		w.mu.Unlock()
		if !stopped {
			x.fn()
		}
	}()
}

func (w *watcher) dropLocked(x *watch) {
	delete(w.watches, x)
	if len(w.watches) == 0 && w.source != nil {
		_ = w.source.Close() // nothing was written to it
		w.source = nil
	}
}

// check fires the watches of a character device that has gone, or of all that have if chardev is empty. It looks at sysfs
// in any case: a message may be about a device that had the name before. A device's entry in its class is gone before the
// kernel sends the message.
func (w *watcher) check(chardev string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for x := range w.watches {
		if (chardev == "" || chardev == x.chardev) && w.host.inode(x.chardev) != x.inode {
			w.fireLocked(x)
		}
	}
}

// listen is the goroutine. It ends when s is closed.
func (w *watcher) listen(s source, deaf bool) {
	buf := make([]byte, 8<<10) // the kernel's messages have at most 2 KiB of variables
	for {
		var deadline time.Time
		if deaf {
			deadline = time.Now().Add(w.every)
		}
		n, err := s.next(buf, deadline)
		switch {
		case err == nil:
			if e, err := parseUevent(buf[:n]); err == nil && e.action == "remove" && e.subsystem == classVerbs {
				w.check(path.Base(e.devname))
			}
		case errors.Is(err, os.ErrClosed):
			return
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.ENOBUFS):
			w.check("")
		default: // no socket any more: go on without
			if s = w.replace(s); s == nil {
				return
			}
			deaf = true
			w.check("")
		}
	}
}

// replace puts a clock in the place of a source that has failed, unless nobody wants it any more.
func (w *watcher) replace(failed source) source {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.source != failed {
		return nil
	}
	_ = failed.Close()
	w.source = newClock()
	return w.source
}

// openUevents subscribes to the kernel's messages about devices, or returns a clock if that cannot be.
func openUevents() (s source, deaf bool) {
	runtime.LockOSThread() // the socket is of this thread's network namespace
	defer runtime.UnlockOSThread()
	u, err := dialUevents()
	if err != nil {
		return newClock(), true
	}
	return u, !initialUserNS("/proc/thread-self/ns/net")
}

// A ueventSocket receives what the kernel multicasts about devices: NETLINK_KOBJECT_UEVENT, group 1. The messages that udev
// makes of them are group 2.
type ueventSocket struct {
	f      *os.File
	conn   syscall.RawConn
	closed chan struct{}
}

const ueventGroup = 1

func dialUevents() (*ueventSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("socket for messages about devices: %w", err)
	}
	f := os.NewFile(uintptr(fd), "uevents") // it waits by the netpoller, as the socket does not block
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: ueventGroup}); err != nil {
		f.Close()
		return nil, fmt.Errorf("subscribe to messages about devices: %w", err)
	}
	conn, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &ueventSocket{f: f, conn: conn, closed: make(chan struct{})}, nil
}

func (s *ueventSocket) next(buf []byte, deadline time.Time) (n int, err error) {
	if !deadline.IsZero() {
		if err := s.f.SetReadDeadline(deadline); err != nil {
			return 0, s.orClosed(err)
		}
	}
	for {
		var from unix.Sockaddr
		var failed error
		err := s.conn.Read(func(fd uintptr) bool {
			for {
				n, from, failed = unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT)
				if failed != unix.EINTR {
					return failed != unix.EAGAIN
				}
			}
		})
		if err != nil {
			return 0, s.orClosed(err)
		}
		if failed != nil {
			return 0, failed
		}
		if fromKernel(from) {
			return n, nil
		}
	}
}

// orClosed is os.ErrClosed instead of what reading a closed file says.
func (s *ueventSocket) orClosed(err error) error {
	select {
	case <-s.closed:
		return os.ErrClosed
	default:
		return err
	}
}

// Close closes the socket. The watcher calls it once.
func (s *ueventSocket) Close() error {
	close(s.closed)
	return s.f.Close()
}

// fromKernel is whether the kernel itself has sent a message: a process's socket has a port id other than 0.
func fromKernel(from unix.Sockaddr) bool {
	a, ok := from.(*unix.SockaddrNetlink)
	return ok && a.Pid == 0
}

// initialUserNSInode is PROC_USER_INIT_INO of include/linux/proc_ns.h.
const initialUserNSInode = 0xEFFFFFFD

// initialUserNS is whether a network namespace belongs to the initial user namespace, as far as this process may know:
// only then the kernel sends messages about devices there.
func initialUserNS(netns string) bool {
	f, err := os.Open(netns)
	if err != nil {
		return false
	}
	defer f.Close()
	fd, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Ino == initialUserNSInode
}

// A clock is a source without messages.
type clock struct{ closed chan struct{} }

func newClock() *clock { return &clock{make(chan struct{})} }

func (c *clock) next(_ []byte, deadline time.Time) (int, error) {
	t := time.NewTimer(time.Until(deadline))
	defer t.Stop()
	select {
	case <-c.closed:
		return 0, os.ErrClosed
	case <-t.C:
		return 0, os.ErrDeadlineExceeded
	}
}

// Close ends it. The watcher calls it once.
func (c *clock) Close() error {
	close(c.closed)
	return nil
}
