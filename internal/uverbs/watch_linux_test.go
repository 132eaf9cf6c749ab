package uverbs

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// A fakeSource says what a test tells it to.
type fakeSource struct {
	says chan any // string: a message; error
	done chan struct{}
}

func (s *fakeSource) next(buf []byte, deadline time.Time) (int, error) {
	var expired <-chan time.Time
	if !deadline.IsZero() {
		expired = time.After(time.Until(deadline))
	}
	select {
	case <-s.done:
		return 0, os.ErrClosed
	case <-expired:
		return 0, os.ErrDeadlineExceeded
	case x := <-s.says:
		if err, ok := x.(error); ok {
			return 0, err
		}
		return copy(buf, x.(string)), nil
	}
}

func (s *fakeSource) Close() error { close(s.done); return nil }

// A fakeWatcher is a watcher of a folder instead of sysfs. Its sources are all that it has opened.
type fakeWatcher struct {
	watcher
	t       *testing.T
	sources []*fakeSource
}

func newFakeWatcher(t *testing.T, deaf bool) *fakeWatcher {
	f := &fakeWatcher{t: t}
	f.host = &host{sysfs: t.TempDir()}
	f.every = time.Millisecond
	f.open = func() (source, bool) {
		s := &fakeSource{says: make(chan any), done: make(chan struct{})}
		f.sources = append(f.sources, s)
		return s, deaf
	}
	f.add("uverbs0")
	f.add("uverbs4")
	return f
}

func (f *fakeWatcher) add(chardev string) {
	f.t.Helper()
	if err := os.MkdirAll(f.host.class(classVerbs, chardev), 0o755); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fakeWatcher) remove(chardev string) {
	f.t.Helper()
	// It keeps its inode elsewhere, so that the next of its name has another.
	if err := os.Rename(f.host.class(classVerbs, chardev), filepath.Join(f.t.TempDir(), chardev)); err != nil {
		f.t.Fatal(err)
	}
}

// begin starts a watch whose calls can be received.
func (f *fakeWatcher) begin(chardev string) (fired chan struct{}, stop func()) {
	f.t.Helper()
	fired = make(chan struct{}, 9)
	stop, err := f.watch(chardev, func() { fired <- struct{}{} })
	if err != nil {
		f.t.Fatal(err)
	}
	return fired, stop
}

func wait(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(testutil.Patience):
		t.Fatal("no sign of: " + what)
	}
}

func TestWatchRemoval(t *testing.T) {
	testutil.CheckLeaks(t)
	f := newFakeWatcher(t, false)
	fired, stop := f.begin("uverbs4")
	other, stopOther := f.begin("uverbs0")
	s := f.sources[0]
	// Nothing of this is a removal of uverbs4: it is still there.
	for _, says := range []string{removal, "", "garbage", strings.ReplaceAll(removal, "remove", "add")} {
		s.says <- says
	}
	f.remove("uverbs4")
	s.says <- strings.ReplaceAll(removal, "infiniband_verbs", "infiniband_mad")
	s.says <- strings.ReplaceAll(removal, "uverbs4", "uverbs0")
	s.says <- strings.ReplaceAll(removal, "uverbs4", "uverbs44")
	s.says <- "" // what came before has been judged
	if len(fired)+len(other) != 0 {
		t.Fatal("a watch fired too early")
	}
	s.says <- removal
	wait(t, "removal of uverbs4", fired)
	s.says <- removal
	s.says <- ""
	if len(fired)+len(other) != 0 {
		t.Error("a watch fired that should not")
	}
	stop()
	stopOther()
	stopOther()
	wait(t, "the source's end", s.done)
	if len(f.watches) != 0 || f.source != nil {
		t.Error("something is left of the watches")
	}
}

// A message about a device that had the name before, which was waiting in the socket when the watch began.
func TestWatchIgnoresPredecessors(t *testing.T) {
	testutil.CheckLeaks(t)
	f := newFakeWatcher(t, false)
	_, stopOther := f.begin("uverbs0")
	defer stopOther()
	f.remove("uverbs4")
	f.add("uverbs4")
	fired, stop := f.begin("uverbs4")
	defer stop()
	f.sources[0].says <- removal
	f.sources[0].says <- ""
	if len(fired) != 0 {
		t.Error("fired for its predecessor")
	}
	// A successor that is there by the time of the message is another device.
	f.remove("uverbs4")
	f.add("uverbs4")
	f.sources[0].says <- removal
	wait(t, "removal of uverbs4", fired)
}

func TestWatchOfWhatIsGone(t *testing.T) {
	testutil.CheckLeaks(t)
	f := newFakeWatcher(t, false)
	fired, stop := f.begin("uverbs7")
	wait(t, "removal before the watch", fired)
	stop()
	if len(f.sources) != 1 || f.source != nil {
		t.Error("the source is not opened once and closed")
	}
	if _, err := (&watcher{host: &host{sysfs: filepath.Join(t.TempDir(), "none")}}).watch("uverbs0", nil); err == nil || !strings.Contains(err.Error(), "sysfs") {
		t.Errorf("no sysfs: %v", err)
	}
}

// Messages are lost, never come, or the socket fails: sysfs tells.
func TestWatchWithoutMessages(t *testing.T) {
	for _, c := range []struct {
		name string
		deaf bool
		says error
	}{
		{"overrun", false, unix.ENOBUFS},
		{"deaf", true, nil},
		{"failure", false, unix.EBADF},
	} {
		t.Run(c.name, func(t *testing.T) {
			testutil.CheckLeaks(t)
			f := newFakeWatcher(t, c.deaf)
			fired, stop := f.begin("uverbs4")
			defer stop()
			other, stopOther := f.begin("uverbs0")
			defer stopOther()
			f.remove("uverbs4")
			if c.says != nil {
				f.sources[0].says <- c.says
			}
			wait(t, "removal of uverbs4", fired)
			if c.says == unix.EBADF { // from now on by the clock
				f.remove("uverbs0")
				wait(t, "removal of uverbs0", other)
			}
			if len(other) != 0 {
				t.Error("uverbs0 is still there")
			}
		})
	}
}

// A stop that comes first wins, even if the call was on its way.
func TestWatchStop(t *testing.T) {
	testutil.CheckLeaks(t)
	f := newFakeWatcher(t, false)
	fired, stop := f.begin("uverbs4")
	f.remove("uverbs4")
	f.mu.Lock()
	for x := range f.watches {
		f.fireLocked(x)
		x.stopped = true // as stop does under the lock
	}
	f.mu.Unlock()
	stop()
	again, stopAgain := f.begin("uverbs4") // fires at once
	wait(t, "removal of uverbs4", again)
	stopAgain()
	if len(fired) != 0 {
		t.Error("called after stop")
	}
	// From within fn.
	f.add("uverbs4")
	var inner func()
	var ready sync.WaitGroup
	ready.Add(1)
	done := make(chan struct{})
	inner, err := f.watch("uverbs4", func() { ready.Wait(); inner(); close(done) })
	if err != nil {
		t.Fatal(err)
	}
	ready.Done()
	f.remove("uverbs4")
	f.sources[len(f.sources)-1].says <- removal
	wait(t, "stop from within", done)
}

// Watches that come and go at once, beside removals.
func TestWatchConcurrently(t *testing.T) {
	testutil.CheckLeaks(t)
	f := newFakeWatcher(t, false)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20 {
				stop, err := f.watch("uverbs4", func() {})
				if err != nil {
					t.Error(err)
					return
				}
				stop()
			}
		})
	}
	f.remove("uverbs4")
	wg.Wait()
	if f.source != nil {
		t.Error("a source is left")
	}
}

// The real socket: it can be opened and closed while it is read, and reads only what the kernel says.
func TestUeventSocket(t *testing.T) {
	testutil.CheckLeaks(t)
	s, err := dialUevents()
	if err != nil {
		testutil.Skip(t, err.Error())
	}
	t.Log("messages come:", initialUserNS("/proc/thread-self/ns/net"))
	ended := make(chan error, 1)
	buf := make([]byte, 8<<10)
	if _, err := s.next(buf, time.Now().Add(-time.Second)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	s.f.SetReadDeadline(time.Time{})
	go func() {
		for {
			if _, err := s.next(buf, time.Time{}); err != nil && err != unix.ENOBUFS {
				ended <- err
				return
			}
		}
	}()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	select {
	case err := <-ended:
		if err != os.ErrClosed {
			t.Error(err)
		}
	case <-time.After(testutil.Patience):
		t.Fatal("Close does not end next")
	}
	if _, err := s.next(buf, time.Now()); err != os.ErrClosed {
		t.Error(err)
	}
	for from, want := range map[unix.Sockaddr]bool{
		&unix.SockaddrNetlink{Groups: ueventGroup}:           true,
		&unix.SockaddrNetlink{Groups: ueventGroup, Pid: 712}: false,
		&unix.SockaddrUnix{}:                                 false,
		nil:                                                  false,
	} {
		if fromKernel(from) != want {
			t.Errorf("%+v", from)
		}
	}
	if initialUserNS("/proc/no-such-file") || initialUserNS("/dev/null") {
		t.Error("a file that is no namespace belongs to the initial one")
	}
}

// In a container without root, the kernel's messages may not come, whether there is a socket or not.
func TestWatchInUserNamespace(t *testing.T) {
	const env = "RINGSIDE_TEST_USER_NAMESPACE"
	if os.Getenv(env) != "" {
		s, deaf := openUevents()
		if !deaf {
			t.Errorf("messages are said to come (%T)", s)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		return
	}
	if os.Getenv("RINGSIDE_SOFT_ROCE") == "vm" {
		t.Skip("programs have a root folder of their own there, and so no user namespaces: it runs outside")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, flags := range map[string]uintptr{"user": unix.CLONE_NEWUSER, "user and network": unix.CLONE_NEWUSER | unix.CLONE_NEWNET} {
		cmd := exec.Command(exe, "-test.run=^TestWatchInUserNamespace$")
		cmd.Env = append(os.Environ(), env+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		switch {
		case err != nil && !errors.As(err, &exit):
			testutil.Skip(t, "no user namespaces here: "+err.Error())
		case err != nil:
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}
