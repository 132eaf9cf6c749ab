package procmem

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

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
	for line := range testutil.ChildInput() {
		switch line {
		case "show":
			fmt.Printf("memory %q\n", b[:8])
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

func FuzzCheckMaps(f *testing.F) {
	f.Add([]byte("1000-2000 rw-p 00000000 00:00 0\n2000-3000 r--p 00000000 00:00 0 [heap]\n"), uint64(0x1800), uint64(0x900), false)
	f.Add([]byte("1000-2000"), uint64(0), uint64(1), true)
	f.Add([]byte(strings.Repeat("x", 70000)), uint64(0), uint64(1), true)
	f.Fuzz(func(t *testing.T, maps []byte, va, n uint64, write bool) {
		if err := checkMaps(bytes.NewReader(maps), va, n, write); err == nil && n > 0 && len(maps) == 0 {
			t.Error("there is memory where there is none")
		}
	})
}
