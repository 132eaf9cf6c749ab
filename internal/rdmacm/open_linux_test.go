package rdmacm

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What is missing is said, with what to do about it.
func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	node, version := filepath.Join(dir, "rdma_cm"), filepath.Join(dir, "abi_version")
	noModule := errors.New("no such module")
	fine := func() error { return nil }
	o := opener{node: node, abi: version, load: func() error { return noModule }}
	if _, err := o.open(); !errors.Is(err, noModule) || !errors.Is(err, errors.ErrUnsupported) ||
		!strings.Contains(err.Error(), "modprobe") {
		t.Error(err)
	}
	o.load = fine
	if _, err := o.open(); !errors.Is(err, os.ErrNotExist) || !errors.Is(err, errors.ErrUnsupported) ||
		!strings.Contains(err.Error(), "udev") {
		t.Error(err)
	}
	for _, x := range []struct {
		errno unix.Errno
		hint  string
	}{{unix.EACCES, "group rdma"}, {unix.EPERM, "cgroup"}, {unix.EMFILE, "rdma_cm"}} {
		if err := o.explain(x.errno); !errors.Is(err, x.errno) || !strings.Contains(err.Error(), x.hint) ||
			errors.Is(err, errors.ErrUnsupported) {
			t.Error(err)
		}
	}

	// The node appears when the module is loaded.
	o.load = func() error { return os.Symlink("/dev/null", node) }
	if err := os.WriteFile(version, []byte("5\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := o.open(); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), `"5"`) {
		t.Error(err)
	}
	if err := os.WriteFile(version, []byte("4\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	o.load = nil
	d, err := o.open()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.do(disconnect(1)), d.Close()); err != nil { // /dev/null takes every command
		t.Error(err)
	}
	if err := d.do(disconnect(1)); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if err := d.event(make([]byte, eventSize)); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// Commands at the same time each have memory of their own, which is used again.
func TestSlots(t *testing.T) {
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	d, err := newDevice(fd, "/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	var all []slot
	seen := map[uint64]bool{}
	for range 9 {
		s, err := d.take()
		if err != nil {
			t.Fatal(err)
		}
		if len(s.mem) != slotSize || s.addr%8 != 0 || seen[s.addr] {
			t.Errorf("%d bytes at %#x", len(s.mem), s.addr)
		}
		seen[s.addr] = true
		all = append(all, s)
	}
	for _, s := range all {
		d.put(s)
	}
	pages := len(d.pages)
	for range 20 {
		if err := d.do(listen(1, 1)); err != nil {
			t.Error(err)
		}
	}
	if len(d.pages) != pages {
		t.Errorf("%d pages, then %d", pages, len(d.pages))
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// A descriptor that is no device says so.
func TestCommandError(t *testing.T) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[1])
	d, err := newDevice(p[0], "pipe")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.do(listen(1, 1)); err != unix.EBADF {
		t.Error(err)
	}
}
