package procmem

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// The first thread is that of main, and of nobody else.
func init() { runtime.LockOSThread() }

// target is a process with known memory: three pages, of which the second can only be read and the third not at all.
func target([]string) {
	const page = 4096
	b, err := unix.Mmap(-1, 0, 3*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	copy(b[page-4:], "acrosspages")
	unix.Mprotect(b[page:2*page], unix.PROT_READ)
	unix.Mprotect(b[2*page:], unix.PROT_NONE)
	fmt.Printf("at %#x\n", address(b))
	thread, end := make(chan int), make(chan struct{})
	go func() {
		runtime.LockOSThread() // it ends with this
		thread <- unix.Gettid()
		<-end
	}()
	fmt.Println("thread", <-thread)
	for line := range testutil.ChildInput() {
		switch line {
		case "show":
			fmt.Printf("memory %q\n", b[:8])
		case "end thread":
			close(end)
		case "end first":
			unix.Syscall(unix.SYS_EXIT, 0, 0, 0)
		case "exec":
			unix.Exec("/bin/sleep", []string{"sleep", "1000"}, nil)
		}
	}
}

func init() { testutil.RegisterChild("target", target) }

func open(t *testing.T) (*testutil.Child, *Memory, uint64) {
	c := testutil.StartChild(t, "target")
	at, err := strconv.ParseUint(c.Expect("at "), 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	m, err := Open(c.PID())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return c, m, at
}

func TestReadWrite(t *testing.T) {
	c, m, at := open(t)
	b := make([]byte, 11)
	if err := m.ReadAt(b, at+4092); err != nil || string(b) != "acrosspages" {
		t.Errorf("read %q, %v", b, err)
	}
	if err := m.WriteAt([]byte("written"), at); err != nil {
		t.Error(err)
	}
	c.Send("show")
	if s := c.Expect("memory "); s != strconv.Quote("written\x00") {
		t.Errorf("the process sees %s", s)
	}
	if err := m.ReadAt(nil, 1); err != nil {
		t.Errorf("nothing: %v", err)
	}
	for name, err := range map[string]error{
		"page 0":       m.ReadAt(b, 8),
		"write page 0": m.WriteAt(b, 8),
		"kernel":       m.ReadAt(b, 1<<63+4096),
		"last byte":    m.ReadAt(b, ^uint64(0)-1),
	} {
		if !errors.Is(err, unix.EFAULT) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for range 2 {
		if err := m.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if err := m.ReadAt(b, at); !errors.Is(err, ErrGone) {
		t.Errorf("after Close: %v", err)
	}
}

func TestCheck(t *testing.T) {
	_, m, at := open(t)
	for _, c := range []struct {
		off, n uint64
		write  bool
		ok     bool
	}{
		{0, 4096, true, true},
		{0, 8192, false, true},
		{1, 4096, true, false},
		{4096, 4096, true, false},
		{8191, 1, false, true},
		{8192, 1, false, false},
		{0, 8193, false, false},
		{-at, 1, false, false},
		{0, -at, false, false},
		{0, 1 - at, false, false},
	} {
		err := m.Check(at+c.off, c.n, c.write)
		if c.ok != (err == nil) || err != nil && !errors.Is(err, unix.EFAULT) {
			t.Errorf("%d bytes at +%d, to be written %v: %v", c.n, int64(c.off), c.write, err)
		}
	}
}

// Neither the program that a process becomes, nor what has its number later, is taken for it.
func TestGone(t *testing.T) {
	t.Run("exec", func(t *testing.T) {
		c, m, at := open(t)
		c.Send("exec")
		testutil.Eventually(t, "the memory is gone", func() bool { return errors.Is(m.ReadAt(make([]byte, 1), at), ErrGone) })
		if err := m.WriteAt([]byte{1}, at); !errors.Is(err, ErrGone) {
			t.Errorf("write: %v", err)
		}
		// What the new program has at an address says nothing about the old one's.
		if err := m.Check(firstMapping(t, c.PID()), 1, false); !errors.Is(err, ErrGone) {
			t.Errorf("check: %v", err)
		}
	})
	t.Run("killed", func(t *testing.T) {
		c, m, at := open(t)
		c.Kill()
		if err := m.ReadAt(make([]byte, 1), at); !errors.Is(err, ErrGone) {
			t.Errorf("read: %v", err)
		}
		if err := m.Check(at, 1, false); !errors.Is(err, ErrGone) {
			t.Errorf("check: %v", err)
		}
	})
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(cmd.Process.Pid); !errors.Is(err, ErrGone) {
		t.Errorf("open: %v", err)
	}
}

// The memory is the process', whichever of its threads have ended.
func TestThreadsEnd(t *testing.T) {
	accessible := func(t *testing.T, m *Memory, at uint64) {
		t.Helper()
		if err := m.ReadAt(make([]byte, 1), at); err != nil {
			t.Errorf("read: %v", err)
		}
		if err := m.Check(at, 4096, true); err != nil {
			t.Errorf("check: %v", err)
		}
		if err := m.Check(at, 4097, true); !errors.Is(err, unix.EFAULT) {
			t.Errorf("check of what may not be written: %v", err)
		}
	}
	t.Run("opened by", func(t *testing.T) {
		c, _, at := open(t)
		tid, err := strconv.Atoi(c.Expect("thread "))
		if err != nil {
			t.Fatal(err)
		}
		m, err := Open(tid)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		if m.PID() != c.PID() {
			t.Errorf("thread %d is said to be of process %d, not %d", tid, m.PID(), c.PID())
		}
		c.Send("end thread")
		testutil.Eventually(t, "the thread has ended", func() bool {
			_, err := os.Stat(fmt.Sprintf("/proc/%d", tid))
			return os.IsNotExist(err)
		})
		accessible(t, m, at)
	})
	t.Run("first", func(t *testing.T) {
		c, m, at := open(t)
		c.Send("end first")
		testutil.Eventually(t, "the first thread has ended", func() bool {
			status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.PID()))
			return strings.Contains(string(status), "\nState:\tZ")
		})
		accessible(t, m, at)
		c.Kill()
		if err := m.Check(at, 1, false); !errors.Is(err, ErrGone) {
			t.Errorf("check without a process: %v", err)
		}
	})
}

// firstMapping is an address at which a process has memory to read.
func firstMapping(t *testing.T, pid int) uint64 {
	t.Helper()
	var at uint64
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err == nil {
		_, err = fmt.Sscanf(string(maps), "%x-", &at)
	}
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// FuzzCheckMaps has a list of mappings that is made of what each page of a small address space is to allow, and asks the pages instead.
func FuzzCheckMaps(f *testing.F) {
	const page = 4096
	f.Add([]byte{8, 3, 1, 1, 8, 3}, uint64(page+100), uint64(2*page), false)
	f.Add([]byte{3, 3, 7, 8}, uint64(0), uint64(3*page), true)
	f.Add([]byte{1, 2}, uint64(page), uint64(0), true)
	f.Add([]byte{3}, uint64(5), ^uint64(0), false)
	f.Fuzz(func(t *testing.T, pages []byte, va, n uint64, write bool) {
		pages = pages[:min(len(pages), 64)]
		if va < 1<<63 && n < 1<<63 { // else they are for the ends of the address space
			va, n = va%(66*page), n%(66*page)
		}
		const readable, writable, alone, hole = 1, 2, 4, 8
		var maps strings.Builder
		for from := 0; from < len(pages); {
			p, to := pages[from], from+1
			for ; to < len(pages) && pages[to] == p && p&alone == 0; to++ { // pages that are alike are one mapping, or several
			}
			rights := []byte("---p")
			if p&readable != 0 {
				rights[0] = 'r'
			}
			if p&writable != 0 {
				rights[1] = 'w'
			}
			if p&hole == 0 {
				fmt.Fprintf(&maps, "%08x-%08x %s 00000000 00:00 0    [name of page %d]\n", from*page, to*page, rights, from)
			}
			from = to
		}
		ok := va+n >= va
		for at := va; ok && at < va+n; at = at/page*page + page {
			i := at / page
			ok = i < uint64(len(pages)) && pages[i]&(hole|readable) == readable && (!write || pages[i]&writable != 0)
		}
		err := checkMaps(strings.NewReader(maps.String()), va, n, write)
		if (err == nil) != ok || err != nil && !errors.Is(err, unix.EFAULT) {
			t.Errorf("%d bytes at %#x, to be written %t: %v, in\n%s", n, va, write, err, maps.String())
		}
	})
}

// FuzzBadMaps: a list that is none.
func FuzzBadMaps(f *testing.F) {
	f.Add([]byte("1000-2000"), uint64(0), uint64(1), true)
	f.Add([]byte(strings.Repeat("x", 70000)), uint64(0), uint64(1), true)
	f.Fuzz(func(t *testing.T, maps []byte, va, n uint64, write bool) {
		if err := checkMaps(bytes.NewReader(maps), va, n, write); err == nil && n > 0 && !bytes.Contains(maps, []byte("-")) {
			t.Error("there is memory where there is none")
		}
	})
}
