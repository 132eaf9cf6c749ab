package seccomp

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// launcherName is argv[0] of the launcher.
const launcherName = "ringside-seccomp-launcher"

// The launcher's arguments are the number of a descriptor, the program's path, and its argv. The descriptor is the socket between launcher
// and supervisor. Messages, in their order: the filter; its listener, or the errno of a step that failed; one byte, when the
// supervisor is ready; after an execve that failed, its errno.

// Main becomes the program to be supervised, if this process was started as a launcher; else it returns. Call it first in main,
// and in TestMain.
func Main() {
	if len(os.Args) < 4 || os.Args[0] != launcherName {
		return
	}
	sock, e := strconv.Atoi(os.Args[1])
	if e != nil {
		return
	}
	runtime.LockOSThread() // the filter is this thread's, which execve keeps
	unix.CloseOnExec(sock)
	step, err := launch(sock, os.Args[2], os.Args[3:])
	unix.Sendto(sock, []byte{byte(step), byte(err)}, unix.MSG_NOSIGNAL, nil) // the supervisor reports it
	os.Exit(127)
}

// A launchStep is what a launcher could not do.
type launchStep byte

const (
	stepListener launchStep = iota // all is well: the message has the listener
	stepRead
	stepPrivs
	stepFilter
	stepSend
	stepExec
)

// launch returns only if a step fails.
func launch(sock int, path string, argv []string) (launchStep, syscall.Errno) {
	buf := make([]byte, 64<<10)
	n, err := unix.Read(sock, buf)
	if err != nil {
		return stepRead, errnoOf(err)
	}
	filter := bytesFilter(buf[:n])
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return stepPrivs, errnoOf(err)
	}
	env := os.Environ()
	// A call that the supervisor has taken is done once, whatever signals come (Linux 5.19 and later). Before that, it begins anew
	// after each.
	fd, errno := install(filter, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV)
	if errno == unix.EINVAL {
		fd, errno = install(filter, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER)
	}
	if errno != 0 {
		return stepFilter, errno
	}
	// From here on, this thread waits for the supervisor at every call that a rule names: none before it has the listener.
	if err := unix.Sendmsg(sock, []byte{byte(stepListener), 0}, unix.UnixRights(fd), nil, unix.MSG_NOSIGNAL); err != nil {
		return stepSend, errnoOf(err)
	}
	unix.Close(fd)
	if n, err := unix.Read(sock, buf[:1]); n != 1 {
		return stepRead, errnoOf(err)
	}
	return stepExec, errnoOf(syscall.Exec(path, argv, env))
}

func errnoOf(err error) syscall.Errno {
	if e, ok := err.(syscall.Errno); ok {
		return e
	}
	return unix.EIO
}

// err explains why there is no supervised program.
func (s launchStep) err(path string, errno syscall.Errno) error {
	switch s {
	case stepExec:
		return &ExecError{Path: path, Errno: errno}
	case stepPrivs, stepFilter:
		switch errno {
		case unix.ENOSYS, unix.EINVAL, unix.EOPNOTSUPP:
			return fmt.Errorf("this kernel has no seccomp filters with user notification: %w (Linux 5.14 or newer, with CONFIG_SECCOMP_FILTER)", errno)
		case unix.EBUSY:
			return fmt.Errorf("a filter with user notification supervises this process already, and there can be one: start this outside "+
				"of it, or of the container that has it: %w", errno)
		case unix.EPERM, unix.EACCES:
			return fmt.Errorf("installing a seccomp filter is forbidden here: %w: in a container, --security-opt seccomp=unconfined, or a "+
				"profile that allows the system call seccomp", errno)
		}
		return fmt.Errorf("installing a seccomp filter: %w", errno)
	}
	return fmt.Errorf("starting %s: step %d of its launcher: %w", path, s, errno)
}

// An ExecError says why a program cannot be executed.
type ExecError struct {
	Path  string
	Errno syscall.Errno
}

func (e *ExecError) Error() string { return fmt.Sprintf("exec %s: %v", e.Path, e.Errno) }
func (e *ExecError) Unwrap() error { return e.Errno }
