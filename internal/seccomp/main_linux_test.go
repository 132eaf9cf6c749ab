package seccomp

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func TestMain(m *testing.M) {
	Main()
	if what, ok := strings.CutPrefix(os.Args[0], "program:"); ok {
		if err := programs[what](os.Args[1:]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testutil.Main(m)
}

// programs are what the tests supervise: this test binary, by argv[0].
var programs = map[string]func(args []string) error{
	"exit": func(args []string) error {
		n, _ := strconv.Atoi(args[0])
		os.Exit(n)
		return nil
	},
	"signal": func(args []string) error {
		n, _ := strconv.Atoi(args[0])
		setDefaultAction(syscall.Signal(n))
		unix.Kill(os.Getpid(), syscall.Signal(n))
		select {}
	},
	"endas": func(args []string) error {
		n, _ := strconv.Atoi(args[0])
		EndAs(syscall.WaitStatus(n))
		return nil
	},
	"open": func([]string) error { return open() },
	"opens": func(args []string) error {
		n, _ := strconv.Atoi(args[0])
		for i := range n {
			if err := open(); err != nil {
				return fmt.Errorf("open %d: %w", i, err)
			}
		}
		return nil
	},
	// have files at numbers that the test has chosen.
	"numbers": func(args []string) error {
		want, _ := strconv.Atoi(args[0])
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(want) + 2, Max: uint64(want) + 2}); err != nil {
			return err
		}
		for n := want; n < want+2; n++ {
			for range 2 {
				fd, err := unix.Open("/nowhere/message", unix.O_RDONLY|unix.O_CLOEXEC, 0)
				if fd != n || err != nil {
					return fmt.Errorf("open: %d, %v, want %d", fd, err, n)
				}
				flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
				if flags != unix.FD_CLOEXEC || err != nil {
					return fmt.Errorf("F_GETFD: %d, %v", flags, err)
				}
				unix.Close(fd)
			}
			if err := unix.Dup3(1, n, unix.O_CLOEXEC); err != nil { // of our own: to be kept
				return err
			}
		}
		if fd, err := unix.Open("/nowhere/message", unix.O_RDONLY, 0); err != unix.EMFILE {
			return fmt.Errorf("open with all taken: %d, %v", fd, err)
		}
		for n := want; n < want+2; n++ {
			if _, err := unix.Write(n, nil); err != nil {
				return fmt.Errorf("our own file: %w", err)
			}
		}
		return nil
	},
	// open in many threads, in processes of its own, which get signals as Go's preemption sends them.
	"family": func([]string) error {
		var wg sync.WaitGroup
		errs := make(chan error, 100)
		for range 8 {
			wg.Go(func() {
				runtime.LockOSThread()
				for range 10 {
					errs <- open()
				}
			})
		}
		for range 2 {
			wg.Go(func() {
				cmd := exec.Command("/proc/self/exe")
				cmd.Args = []string{"program:open"}
				out, err := cmd.CombinedOutput()
				if err != nil {
					err = fmt.Errorf("%w: %s", err, out)
				}
				errs <- err
			})
		}
		wg.Wait()
		close(errs)
		for err := range errs {
			if err != nil {
				return err
			}
		}
		return nil
	},
	// wait for ever in the call that the test never answers.
	"hang": func([]string) error { return open() },
	"storm": func([]string) error {
		signal.Ignore(unix.SIGUSR1)
		signal.Notify(make(chan os.Signal, 1), unix.SIGUSR1) // a handler: an ignored signal would interrupt nothing
		runtime.LockOSThread()
		stop := make(chan struct{})
		tid := unix.Gettid()
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					unix.Tgkill(os.Getpid(), tid, unix.SIGUSR1)
				}
			}
		})
		defer wg.Wait()
		defer close(stop)
		for range stormCalls {
			if err := open(); err != nil {
				return err
			}
		}
		return nil
	},
	// fails to supervise a program where calls of seccomp fail so, and prints why.
	"confined": func(args []string) error {
		n, _ := strconv.Atoi(args[0])
		f, err := compile(arch, []Rule{{Call: unix.SYS_SECCOMP, Errno: syscall.Errno(n)}})
		if err != nil {
			return err
		}
		runtime.LockOSThread() // the first thing is this thread's; the filter, which brings the others along, all threads'
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return err
		}
		if _, errno := install(f, unix.SECCOMP_FILTER_FLAG_TSYNC); errno != 0 {
			return errno
		}
		_, err = Start("/proc/self/exe", []string{"program:exit", "0"}, openRules)
		if !errors.Is(err, syscall.Errno(n)) {
			return fmt.Errorf("started, or not: %w", err)
		}
		fmt.Println("confined:", err)
		return nil
	},
	"socket": func([]string) error {
		if fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, 20); err != unix.ESOCKTNOSUPPORT {
			return fmt.Errorf("socket: %d, %v", fd, err)
		}
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("another socket: %w", err)
		}
		return unix.Close(fd)
	},
}

const stormCalls = 50

// open reads the file that only a supervised process sees, and one that is really there.
func open() error {
	if _, err := os.Open("/nowhere/refused"); err == nil || !strings.Contains(err.Error(), unix.EXDEV.Error()) {
		return fmt.Errorf("refused: %v", err)
	}
	if b, err := os.ReadFile("/nowhere/message"); err != nil || string(b) != "hello" {
		return fmt.Errorf("message: %q, %v", b, err)
	}
	if _, err := os.Stat("/proc/self/exe"); err != nil {
		return err
	}
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	return f.Close()
}
