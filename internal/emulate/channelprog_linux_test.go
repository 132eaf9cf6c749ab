package emulate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
)

// Programs that use the connection manager's file by system calls.

// A manager is an open file of it, with memory for a command and its response.
type cmFile struct {
	fd  int
	mem []byte
}

// openCM opens the node, with further flags.
func openCM(flags int) (*cmFile, error) {
	fd, err := unix.Open(cmNode, unix.O_RDWR|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	return &cmFile{fd, mem}, err
}

const responseAt = 1024

// command writes a command whose payload begins with zeros, into which fill writes.
func (f *cmFile) command(cmd uint32, payload, response int, fill func(b []byte)) error {
	b := f.mem[:8+payload]
	clear(b)
	le := binary.NativeEndian
	le.PutUint32(b, cmd)
	le.PutUint16(b[4:], uint16(payload))
	le.PutUint16(b[6:], uint16(response))
	fill(b[8:])
	n, err := unix.Write(f.fd, b)
	if err == nil && n != len(b) {
		err = fmt.Errorf("%d bytes of %d were taken", n, len(b))
	}
	return err
}

func (f *cmFile) responseVA() uint64 { return addressOf(f.mem) + responseAt }

// makeEvent has the manager make an event: that an address is resolved, or is not.
func (f *cmFile) makeEvent() error {
	le := binary.NativeEndian
	err := f.command(abi.RDMA_USER_CM_CMD_CREATE_ID, 24, 4, func(b []byte) {
		le.PutUint64(b, 77) // uid
		le.PutUint64(b[8:], f.responseVA())
		le.PutUint16(b[16:], abi.RDMA_PS_TCP)
	})
	if err != nil {
		return fmt.Errorf("create an id: %w", err)
	}
	id := le.Uint32(f.mem[responseAt:])
	err = f.command(abi.RDMA_USER_CM_CMD_RESOLVE_ADDR, 272, 0, func(b []byte) {
		le.PutUint32(b, id)
		le.PutUint32(b[4:], 2000) // ms
		le.PutUint16(b[10:], 16)
		le.PutUint16(b[144:], unix.AF_INET)
		copy(b[148:], net.IPv4(127, 0, 0, 1).To4())
	})
	if err != nil {
		return fmt.Errorf("resolve an address: %w", err)
	}
	return nil
}

func (f *cmFile) getEvent() error {
	clear(f.mem[responseAt : responseAt+336])
	err := f.command(abi.RDMA_USER_CM_CMD_GET_EVENT, 8, 336, func(b []byte) {
		binary.NativeEndian.PutUint64(b, f.responseVA())
	})
	if uid := binary.NativeEndian.Uint64(f.mem[responseAt:]); err == nil && uid != 77 {
		return fmt.Errorf("an event of %d", uid)
	}
	return err
}

// readable reports whether poll says that there are events, within a time (negative: any).
func (f *cmFile) readable(ms int) bool {
	p := []unix.PollFd{{Fd: int32(f.fd), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(p, ms); err != unix.EINTR {
			return p[0].Revents == unix.POLLIN
		}
	}
}

// channel looks at all that can be done with a file.
func channel([]string) error {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	f, err := openCM(unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	check(f.fd >= 64 && f.fd < 1024, "a file has the number %d", f.fd)
	var st unix.Stat_t
	err = unix.Fstat(f.fd, &st)
	check(err == nil && st.Mode == unix.S_IFCHR|0o666 && uint64(st.Rdev) == unix.Mkdev(10, cmMinor), "fstat: mode %#o, device %#x, %v", st.Mode, st.Rdev, err)
	flags, err := unix.FcntlInt(uintptr(f.fd), unix.F_GETFD, 0)
	check(flags == unix.FD_CLOEXEC, "F_GETFD: %d, %v", flags, err)
	for range 3 {
		check(!f.readable(0), "it is readable without an event")
		err = f.getEvent()
		check(err == unix.EAGAIN, "an event that is not there: %v", err)
		check(f.makeEvent() == nil && f.readable(-1), "it is not readable with an event")
		err = f.getEvent()
		check(err == nil, "an event: %v", err)
	}
	// Several events.
	check(errors.Join(f.makeEvent(), f.makeEvent()) == nil, "no events")
	for range 2 {
		check(f.readable(-1), "it is not readable with events")
		err = f.getEvent()
		check(err == nil, "an event of several: %v", err)
	}
	check(!f.readable(0), "it is readable without further events")

	// What the kernel refuses.
	for fd, want := range map[int]error{f.fd + 20: unix.ENOENT, unix.AT_FDCWD: unix.ENOENT, 1: unix.EINVAL} {
		err = f.command(abi.RDMA_USER_CM_CMD_MIGRATE_ID, 16, 4, func(b []byte) {
			binary.NativeEndian.PutUint64(b, f.responseVA())
			binary.NativeEndian.PutUint32(b[12:], uint32(int32(fd)))
		})
		check(err == want, "an id of the file %d, which is no channel: %v, want %v", fd, err, want)
	}
	_, err = unix.Write(f.fd, make([]byte, 7))
	check(err == unix.EINVAL, "half a header: %v", err)
	err = f.command(0xffff, 0, 0, func([]byte) {})
	check(err == unix.EINVAL, "an unknown command: %v", err)
	check(write(f.fd, 8, 8) == unix.EFAULT, "a command that nobody has written")
	_, err = unix.Read(f.fd, make([]byte, 1))
	check(err != nil, "something was read")
	dup, _ := unix.Dup(f.fd)
	_, err = unix.Write(dup, f.mem[:16])
	check(err == unix.EBADF, "a write to a number that is not looked at: %v", err)
	check(unix.Fstat(dup, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR, "a duplicate: mode %#o", st.Mode)
	check(unix.Dup3(f.fd, f.fd+9, unix.O_CLOEXEC) == nil, "dup3")
	err = (&cmFile{f.fd + 9, f.mem}).getEvent()
	check(err == unix.EAGAIN, "by a duplicate: %v", err)
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"program:usechannel"}
	cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(dup), "channel")}
	out, err := cmd.CombinedOutput()
	check(err == nil, "another process: %v: %s", err, out)

	// A file of the program's own that has a number of that kind.
	r, w, _ := os.Pipe()
	check(unix.Dup3(int(w.Fd()), f.fd+1, 0) == nil, "dup3")
	n, err := unix.Write(f.fd+1, []byte("hello"))
	check(n == 5 && err == nil, "a write to another file: %d, %v", n, err)
	n, err = r.Read(make([]byte, 10))
	check(n == 5 && err == nil, "what was written: %d, %v", n, err)
	g, err := openCM(0)
	check(err == nil && g.fd != f.fd+1, "another file: %+v, %v", g, err)
	n, err = unix.Write(f.fd+1, nil)
	check(n == 0 && err == nil, "the other file was replaced: %v", err)
	return errors.Join(errs...)
}

// useChannel uses the file that another process has opened.
func useChannel([]string) error {
	if err := unix.Dup3(3, 1000, 0); err != nil {
		return err
	}
	if n, err := unix.Write(1000, make([]byte, 16)); err != unix.EACCES {
		return fmt.Errorf("a command of another process: %d, %v", n, err)
	}
	return nil
}

// manyChannels opens more files than there can be, and many one after the other.
func manyChannels([]string) error {
	for i := range 300 {
		f, err := openCM(0)
		if err != nil {
			return fmt.Errorf("file %d: %w", i, err)
		}
		unix.Close(f.fd)
		unix.Munmap(f.mem)
	}
	var open []int
	for {
		fd, err := unix.Open(cmNode, unix.O_RDWR, 0)
		if err == unix.EMFILE {
			break
		}
		if err != nil {
			return err
		}
		open = append(open, fd)
	}
	if len(open) != maxChannels {
		return fmt.Errorf("%d files can be open", len(open))
	}
	unix.Close(open[100])
	fd, err := unix.Open(cmNode, unix.O_RDWR, 0)
	if err != nil || fd != open[100] {
		return fmt.Errorf("after a close: %d, %v", fd, err)
	}
	return nil
}

// fewNumbers is a program that may have few files.
func fewNumbers([]string) error {
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 100, Max: 100}); err != nil {
		return err
	}
	if fd, err := unix.Open(cmNode, unix.O_RDWR, 0); err != unix.EMFILE {
		return fmt.Errorf("open: %d, %v", fd, err)
	}
	return nil
}

// waitForEvent waits for an event while signals come, is stopped and goes on.
func waitForEvent([]string) error {
	f, err := openCM(0)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGUSR1)
	tid, got := make(chan int, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		tid <- unix.Gettid()
		got <- f.getEvent()
	}()
	thread := <-tid
	waiting := func() error {
		select {
		case err := <-got:
			return fmt.Errorf("the wait has ended with %v", err)
		case <-time.After(3 * signalPause):
			return nil
		}
	}
	if err := waiting(); err != nil {
		return err
	}
	unix.Tgkill(os.Getpid(), thread, unix.SIGUSR1)
	<-signals // the thread has handled it
	if err := waiting(); err != nil {
		return err
	}
	stopper := exec.Command("sh", "-c", `kill -STOP $1 || exit 1
		for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
			sleep 0.2
			grep -h ^State /proc/$1/task/*/status | grep -qv stopped || { kill -CONT $1; exit; }
		done
		grep -h ^State /proc/$1/task/*/status
		kill -CONT $1; exit 2`, "sh", fmt.Sprint(os.Getpid()))
	if out, err := stopper.CombinedOutput(); err != nil {
		return fmt.Errorf("a stop of all threads: %w: %s", err, out)
	}
	if err := waiting(); err != nil {
		return err
	}
	g := &cmFile{f.fd, make([]byte, 4096)}
	if g.mem, err = unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON); err != nil {
		return err
	}
	if err := g.makeEvent(); err != nil {
		return err
	}
	return <-got
}

// waitForNothing waits for an event that does not come, and ends, or closes the file before.
func waitForNothing(args []string) error {
	f, err := openCM(0)
	if err != nil {
		return err
	}
	got := make(chan error, 1)
	go func() { got <- f.getEvent() }()
	time.Sleep(3 * signalPause)
	if args[0] == "end" {
		return nil
	}
	unix.Close(f.fd)
	select {
	case err := <-got: // programs of librdmacm rely on it that it does not
		return fmt.Errorf("the wait for a file that was closed has ended with %v", err)
	case <-time.After(3 * signalPause):
		return nil
	}
}

// afterExec becomes another program, which has the file still.
func afterExec(args []string) error {
	if len(args) > 0 {
		f := &cmFile{fd: 3}
		if _, err := fmt.Sscan(args[0], &f.fd); err != nil {
			return err
		}
		if n, err := unix.Write(f.fd, make([]byte, 16)); err != unix.EACCES {
			return fmt.Errorf("a command after execve: %d, %v", n, err)
		}
		return nil
	}
	fd, err := unix.Open(cmNode, unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	return unix.Exec("/proc/self/exe", []string{"program:afterexec", fmt.Sprint(fd)}, os.Environ())
}
