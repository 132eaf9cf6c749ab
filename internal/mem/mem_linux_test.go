package mem

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func alloced(t *testing.T, size int) *Region {
	t.Helper()
	r, err := Alloc(size, Options{Huge: HugeNever})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func TestSeals(t *testing.T) {
	r := alloced(t, 100)
	got, err := unix.FcntlInt(uintptr(r.FD()), unix.F_GET_SEALS, 0)
	if err != nil || got&seals != seals {
		t.Fatalf("seals %#x, %v", got, err)
	}
	for _, size := range []int64{0, 1 << 20} {
		if err := unix.Ftruncate(r.FD(), size); !errors.Is(err, unix.EPERM) {
			t.Errorf("resized to %d: %v", size, err)
		}
	}
	if _, err := unix.FcntlInt(uintptr(r.FD()), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); !errors.Is(err, unix.EPERM) {
		t.Errorf("another seal was added: %v", err)
	}
	if fl, err := unix.FcntlInt(uintptr(r.FD()), unix.F_GETFD, 0); err != nil || fl&unix.FD_CLOEXEC == 0 {
		t.Errorf("the file would be inherited: %#x, %v", fl, err)
	}
}

func TestMapFDSharesMemory(t *testing.T) {
	testutil.CheckLeaks(t)
	r := alloced(t, 3*PageSize())
	for _, c := range []struct {
		off  int64
		size int
	}{{0, 3 * PageSize()}, {int64(PageSize()), 10}, {100, PageSize()}, {int64(2*PageSize()) + 5, PageSize() - 5}} {
		m, err := MapFD(r.FD(), c.off, c.size, true)
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Bytes()) != c.size || m.FD() != -1 {
			t.Errorf("%d bytes of %d, fd %d", len(m.Bytes()), c.size, m.FD())
		}
		m.Bytes()[0], m.Bytes()[c.size-1] = 0x11, 0x22
		if r.Bytes()[int(c.off)+c.size-1] != 0x22 || c.size > 1 && r.Bytes()[c.off] != 0x11 {
			t.Errorf("%+v: not the same memory", c)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
	m, err := MapFD(r.FD(), 0, 10, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mprotect(m.mem, unix.PROT_READ); err != nil {
		t.Error(err)
	}
	m.Close()
}

// What a hostile peer may send instead of a sealed memory file.
func TestMapFDRefuses(t *testing.T) {
	testutil.CheckLeaks(t)
	memfd := func(size int64, add int) int {
		fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Ftruncate(fd, size); err != nil {
			t.Fatal(err)
		}
		if add != 0 {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, add); err != nil {
				t.Fatal(err)
			}
		}
		return fd
	}
	open := func(path string, flags int) int {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(path, err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(p[0]); unix.Close(p[1]) })
	page := int64(PageSize())
	for _, c := range []struct {
		name     string
		fd       int
		off      int64
		size     int
		writable bool
		want     error
	}{
		{"unsealed", memfd(page, 0), 0, 1, false, ErrNotSealed},
		{"sealed against growing only", memfd(page, unix.F_SEAL_GROW), 0, 1, false, ErrNotSealed},
		{"too small", memfd(page, unix.F_SEAL_SHRINK), 0, PageSize() + 1, false, ErrTooSmall},
		{"too small for the offset", memfd(page, unix.F_SEAL_SHRINK), 1, PageSize(), false, ErrTooSmall},
		{"empty", memfd(0, unix.F_SEAL_SHRINK), 0, 1, false, ErrTooSmall},
		{"write-sealed", memfd(page, unix.F_SEAL_SHRINK|unix.F_SEAL_WRITE), 0, 1, true, unix.EPERM},
		{"future-write-sealed", memfd(page, unix.F_SEAL_SHRINK|unix.F_SEAL_FUTURE_WRITE), 0, 1, true, unix.EPERM},
		{"ordinary file", open(file, unix.O_RDWR), 0, 1, false, ErrNotMemory},
		{"pipe", p[0], 0, 1, false, ErrNotMemory},
		{"directory", open("/", unix.O_RDONLY), 0, 1, false, ErrNotMemory},
		{"device", open("/dev/zero", unix.O_RDWR), 0, 1, false, ErrNotMemory},
		{"closed", 1 << 20, 0, 1, false, unix.EBADF},
		{"negative", -1, 0, 1, false, unix.EBADF},
	} {
		m, err := MapFD(c.fd, c.off, c.size, c.writable)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if err == nil {
			m.Close()
		}
	}
	// What is sealed against writing can be read.
	m, err := MapFD(memfd(page, unix.F_SEAL_SHRINK|unix.F_SEAL_WRITE), 0, 1, false)
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
}

func TestFailedAllocLeavesNothing(t *testing.T) {
	testutil.CheckLeaks(t)
	if _, err := Alloc(1<<56, Options{Huge: HugeNever}); err == nil { // more than there are addresses
		t.Fatal("64 PiB were allocated")
	}
	if HugePageSize() == 0 {
		if _, err := Alloc(1<<21, Options{Huge: HugeRequire}); err == nil || !strings.Contains(err.Error(), "huge pages") {
			t.Errorf("huge pages where there are none: %v", err)
		}
	}
}

func TestExplain(t *testing.T) {
	for _, c := range []struct {
		err  error
		huge bool
		want string
	}{
		{unix.EMFILE, false, "RLIMIT_NOFILE"},
		{unix.EMFILE, true, "RLIMIT_NOFILE"},
		{unix.ENFILE, false, "fs.file-max"},
		{unix.ENOMEM, false, "vm.max_map_count"},
		{unix.ENOMEM, true, "vm.nr_hugepages"},
		{unix.ENOSPC, false, "cgroup"},
		{unix.EPERM, false, "seccomp"},
	} {
		err := explain("map", 4096, c.huge, c.err)
		if !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "4096") {
			t.Errorf("%v does not name %s", err, c.want)
		}
	}
}

func TestDescriptorLimit(t *testing.T) {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	testutil.CheckLeaks(t)
	low := old
	low.Cur = uint64(testutil.OpenFDs() + 8)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Skip(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
	var regions []*Region
	defer func() {
		for _, r := range regions {
			r.Close()
		}
	}()
	for range 64 {
		r, err := Alloc(1, Options{})
		if err != nil {
			if !errors.Is(err, unix.EMFILE) || !strings.Contains(err.Error(), "ulimit -n") {
				t.Errorf("got %v", err)
			}
			return
		}
		regions = append(regions, r)
	}
	t.Error("the limit was not reached")
}

// Reserved huge pages are used where they fit, and another process can map any part of such a region. Reserve some to
// run it: sysctl vm.nr_hugepages=8.
func TestReservedHugePages(t *testing.T) {
	huge := HugePageSize()
	if huge == 0 {
		t.Skip("no huge pages are reserved on this machine")
	}
	testutil.CheckLeaks(t)
	r, err := Alloc(2*huge, Options{Huge: HugeRequire, Populate: true})
	if err != nil {
		t.Skip(err) // reserved, but used by others
	}
	defer r.Close()
	if r.PageSize() != huge || len(r.Bytes()) != 2*huge {
		t.Errorf("%d bytes in pages of %d", len(r.Bytes()), r.PageSize())
	}
	off := huge + 100
	m, err := MapFD(r.FD(), int64(off), 5000, true)
	if err != nil {
		t.Fatal(err)
	}
	m.Bytes()[0] = 7
	if r.Bytes()[off] != 7 {
		t.Error("not the same memory")
	}
	if err := m.Close(); err != nil { // unmaps whole huge pages
		t.Error(err)
	}
	// What would waste most of a huge page gets ordinary ones, and so does what is more than there is.
	for _, size := range []int{huge/2 + 1, huge + huge/2, 1 << 40} {
		r, err := Alloc(size, Options{})
		if err != nil {
			t.Error(err)
			continue
		}
		if r.PageSize() != PageSize() {
			t.Errorf("%d bytes in pages of %d", size, r.PageSize())
		}
		r.Close()
	}
}
