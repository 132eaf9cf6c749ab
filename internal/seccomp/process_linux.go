package seccomp

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Process is a supervised program. Its Listener gets the calls of it and of everything that it starts.
type Process struct {
	Listener *Listener
	PID      int

	p    *os.Process
	done chan struct{}
	st   *os.ProcessState
	err  error
}

// Start starts a program: path, with argv, whose first element is its name, and the environment and files of this process' own: its
// standard files, and those that this process was given without close-on-exec. The Listener is the caller's to serve, from now on: the program waits for it at the first call that a rule names. If this process ends, the program
// is killed.
func Start(path string, argv []string, rules []Rule) (*Process, error) {
	if arch == 0 {
		return nil, fmt.Errorf("supervising programs by seccomp: only on amd64 and arm64: %w", errors.ErrUnsupported)
	}
	filter, err := compile(arch, rules)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("sockets: %w", err)
	}
	defer unix.Close(pair[0])
	s := &Process{done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// The program is to die with this process, and the kernel takes the thread for it that has started it.
		runtime.LockOSThread()
		attr := &syscall.ProcAttr{Env: os.Environ(), Files: inherited(pair[1]), Sys: &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}}
		pid, _, err := syscall.StartProcess(self, append([]string{launcherName, strconv.Itoa(pair[1]), path}, argv...), attr)
		if err != nil {
			started <- err
			return
		}
		p, err := os.FindProcess(pid) // our child, of which there is something until it is waited for
		if err != nil {
			unix.Kill(pid, unix.SIGKILL)
			unix.Wait4(pid, nil, 0, nil)
			started <- err
			return
		}
		s.p, s.PID = p, p.Pid
		started <- nil
		s.st, s.err = p.Wait()
		close(s.done)
	}()
	err = <-started
	unix.Close(pair[1])
	if err != nil {
		return nil, fmt.Errorf("starting the launcher %s: %w", self, err)
	}
	fd, err := s.handshake(pair[0], path, filter)
	if err != nil {
		s.p.Kill()
		<-s.done
		return nil, err
	}
	if s.Listener, err = newListener(fd); err != nil {
		s.p.Kill()
		<-s.done
		return nil, err
	}
	return s, nil
}

// inherited are the files of a child that has the socket sock under the number that it has here, which is therefore none of those that
// this process was given, and that the program is to find as they are.
func inherited(sock int) []uintptr {
	files := make([]uintptr, sock+1)
	for fd := range files {
		files[fd] = uintptr(fd)
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); fd != sock && (err != nil || flags&unix.FD_CLOEXEC != 0) {
			files[fd] = ^uintptr(0) // of our own, or nothing
		}
	}
	return files
}

// handshake is the supervisor's side of the launcher's socket, up to the execve.
func (s *Process) handshake(sock int, path string, filter []unix.SockFilter) (listener int, err error) {
	if _, err := unix.Write(sock, filterBytes(filter)); err != nil {
		return -1, fmt.Errorf("to the launcher: %w", err)
	}
	fd, err := receiveListener(sock, path)
	if err != nil {
		return -1, err
	}
	if _, err := unix.Write(sock, []byte{1}); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("to the launcher: %w", err)
	}
	// The socket closes with the execve, which no rule may name, or says why there was none.
	var b [2]byte
	n, err := readRetry(sock, b[:])
	if err == nil && n == len(b) {
		unix.Close(fd)
		return -1, launchStep(b[0]).err(path, syscall.Errno(b[1]))
	}
	return fd, nil
}

func readRetry(fd int, b []byte) (int, error) {
	for {
		n, err := unix.Read(fd, b)
		if err != unix.EINTR {
			return n, err
		}
	}
}

func receiveListener(sock int, path string) (int, error) {
	var b [2]byte
	oob := make([]byte, unix.CmsgSpace(4))
	for {
		n, on, _, _, err := unix.Recvmsg(sock, b[:], oob, unix.MSG_CMSG_CLOEXEC)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return -1, fmt.Errorf("from the launcher: %w", err)
		case n != len(b):
			return -1, errors.New("the launcher has ended without a word: does the program's main call seccomp.Main first?")
		case launchStep(b[0]) != stepListener:
			return -1, launchStep(b[0]).err(path, syscall.Errno(b[1]))
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:on])
		if err == nil && len(msgs) == 1 {
			if fds, err := unix.ParseUnixRights(&msgs[0]); err == nil && len(fds) == 1 {
				return fds[0], nil
			}
		}
		return -1, errors.New("the launcher has sent no listener")
	}
}

// Signal sends the program a signal.
func (s *Process) Signal(sig os.Signal) error { return s.p.Signal(sig) }

// Wait waits for the end of the program and returns how it ended.
func (s *Process) Wait() (syscall.WaitStatus, error) {
	<-s.done
	if s.err != nil {
		return 0, s.err
	}
	return s.st.Sys().(syscall.WaitStatus), nil
}

// EndAs ends this process as another one has ended: with its exit status, or by the same signal, without a core file of its own. If
// the signal does not end this process (it may be ignored here), the status is 128 and its number, as shells say it.
func EndAs(st syscall.WaitStatus) {
	if !st.Signaled() {
		os.Exit(st.ExitStatus())
	}
	sig := st.Signal()
	unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	setDefaultAction(sig)
	// To this thread, which has it before the call returns. Another one might get it too late.
	runtime.LockOSThread()
	unix.Tgkill(unix.Getpid(), unix.Gettid(), sig)
	os.Exit(128 + int(sig))
}

// LookPath finds a program as a shell does, also one that this process' folder has, if it is named with a slash.
func LookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	if errors.Is(err, exec.ErrDot) {
		err = nil
	}
	return path, err
}
