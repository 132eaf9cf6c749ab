package emulate

import (
	"errors"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/seccomp"
	"github.com/ringside-rdma/ringside/internal/testutil"
)

// waitNumber is of no file: a write to it is the call that waits.
const waitNumber = 900

// threeWaiters has three threads, of which one is the first, in calls that wait, while a signal comes to the process.
func threeWaiters(args []string) error {
	var set unix.Sigset_t
	set.Val[0] = 1 << (unix.SIGUSR1 - 1)
	if len(args) == 0 { // others than the three are to block it, for whoever makes a thread takes what has come meanwhile
		if err := unix.PthreadSigmask(unix.SIG_BLOCK, &set, nil); err != nil {
			return err
		}
		return unix.Exec("/proc/self/exe", []string{"program:threewaiters", "blocked"}, os.Environ())
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGUSR1)
	wait := func() error {
		if err := unix.PthreadSigmask(unix.SIG_UNBLOCK, &set, nil); err != nil {
			return err
		}
		_, err := unix.Write(waitNumber, nil)
		return err
	}
	got := make(chan error, 2)
	for range 2 {
		go func() {
			runtime.LockOSThread()
			got <- wait()
		}()
	}
	err := wait()
	<-signals
	return errors.Join(err, <-got, <-got)
}

// Of several threads that wait, the one that the kernel has chosen begins anew for the sake of a signal to the process.
func TestSignalOfSeveralWaiters(t *testing.T) {
	if testutil.KernelBefore(t, 5, 19) {
		testutil.Skip(t, "before Linux 5.19, signals restart calls")
	}
	t.Setenv("GODEBUG", "asyncpreemptoff=1") // no other signals
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p, err := seccomp.Start(self, []string{"program:threewaiters"}, []seccomp.Rule{{Call: unix.SYS_WRITE, Where: []seccomp.Arg{{Value: waitNumber}}}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Wait()
	defer p.Signal(unix.SIGKILL)
	defer p.Listener.Close()
	receive := func() call {
		c, err := p.Listener.Receive()
		if c == nil || err != nil {
			t.Fatalf("instead of a call, %v", err)
		}
		return call{c}
	}
	h := &held{calls: map[int]call{}}
	all := []call{receive(), receive(), receive()}
	// The first thread, and then the others, in the order in which they were made.
	order := func(c call) int {
		if c.TID == p.PID {
			return 0
		}
		return c.TID
	}
	slices.SortFunc(all, func(a, b call) int { return order(a) - order(b) })
	var waiters []*waiter
	for _, c := range all {
		h.enter(c)
		waiters = append(waiters, &waiter{tgid: p.PID, tid: c.TID, held: h})
	}
	looks := func(what string, i int, want ...bool) {
		t.Helper()
		for k, want := range want {
			if got := waiters[i].signalled(); got != want {
				t.Errorf("%s: thread %d of three is to begin anew: %t at look %d", what, i, got, k)
			}
		}
	}
	looks("without a signal", 0, false, false)
	if err := unix.Kill(p.PID, unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	looks("the first is held", 1, false, false, false)
	looks("the first is held", 2, false, false, false)
	looks("the first is held", 0, false, true)
	h.leave(all[0])
	looks("the second is held", 2, false, false, false)
	looks("the first has gone", 1, false, true)
	h.leave(all[1])
	looks("both have gone", 2, false, true)

	// The kernel is of the same opinion.
	if err := all[0].Restart(); err != nil {
		t.Fatal(err)
	}
	if all[0] = receive(); all[0].TID != p.PID {
		t.Errorf("thread %d began anew, not the first one, %d", all[0].TID, p.PID)
	}
	for i, c := range all {
		looks("the signal was taken", i, false, false)
		if err := c.Return(0); err != nil {
			t.Error(err)
		}
	}
	if st, err := p.Wait(); err != nil || st != 0 {
		t.Errorf("the program has ended with %#x, %v; its output is above", st, err)
	}
}
