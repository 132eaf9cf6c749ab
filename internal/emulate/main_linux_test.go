package emulate

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/seccomp"
	"github.com/ringside-rdma/ringside/internal/testutil"
)

// The first thread of some programs is that of main, and of nobody else.
func init() {
	switch os.Args[0] {
	case "program:openerends", "program:threewaiters":
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	seccomp.Main()
	if what, ok := strings.CutPrefix(os.Args[0], "program:"); ok {
		if err := programs[what](os.Args[1:]); err != nil {
			fmt.Printf("%s: %v\n", what, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testutil.Main(m)
}

// programs are what the tests emulate devices for: this test binary, by argv[0].
var programs = map[string]func(args []string) error{
	"files":          files,
	"verbs":          verbs,
	"steps":          steps,
	"golden":         golden,
	"fork":           fork,
	"openerends":     openerEnds,
	"use":            use,
	"refused":        refused,
	"orphans":        orphans,
	"channel":        channel,
	"usechannel":     useChannel,
	"manychannels":   manyChannels,
	"fewnumbers":     fewNumbers,
	"waitforevent":   waitForEvent,
	"waitfornothing": waitForNothing,
	"threewaiters":   threeWaiters,
	"afterexec":      afterExec,
	"channelsteps":   channelSteps,
	"exit":           func([]string) error { os.Exit(5); return nil },
}

const node0 = "/dev/infiniband/uverbs0"

func openNode() (int, error) { return unix.Open(node0, unix.O_RDWR|unix.O_CLOEXEC, 0) }

// refused opens a device until there is nobody any more who would let it.
func refused(args []string) error {
	s, err := newStepper(args[0])
	if err != nil {
		return err
	}
	if err := s.done("running"); err != nil {
		return err
	}
	for {
		fd, err := openNode()
		switch err {
		case nil:
			unix.Close(fd)
		case unix.ENOSYS:
			return nil
		default:
			return err
		}
	}
}

// orphans becomes the parent of what its child has left behind.
func orphans([]string) error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	s, err := Start(Config{Reap: true}, "/bin/sh", []string{"sh", "-c", "sleep 0 & sleep 0.1 & exit 7"})
	if err != nil {
		return err
	}
	if st, err := s.Wait(); err != nil || st.ExitStatus() != 7 {
		return fmt.Errorf("the program has ended with %#x, %w", st, err)
	}
	for range 1000 {
		reap() // the last one may not have been dead yet
		if err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); err == unix.ECHILD {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.New("there is a child that nobody has reaped")
}

// fork has another process use the device that this one has opened.
func fork([]string) error {
	fd, err := openNode()
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"program:use"}
	cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "device")}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	if errno := command(fd); errno != unix.ENOSPC {
		return fmt.Errorf("the opener's command: %v", errno)
	}
	return nil
}

func use([]string) error {
	if errno := command(3); errno != unix.EPERM {
		return fmt.Errorf("a command of another process: %v", errno)
	}
	return nil
}
