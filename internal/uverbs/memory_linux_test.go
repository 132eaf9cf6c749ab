package uverbs

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/uverbs/uverbstest"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A listener is a kernel that keeps the command that it gets.
type listener struct {
	cmd    []byte
	addr   uint64
	errno  syscall.Errno
	answer func(cmd []byte)
}

func (k *listener) Ioctl(cmd []byte, addr uint64) syscall.Errno {
	k.cmd, k.addr = bytes.Clone(cmd), addr
	if k.errno == 0 && k.answer != nil {
		k.answer(cmd)
	}
	return k.errno
}

func (k *listener) Write(cmd []byte) (int, syscall.Errno) { return 0, k.errno }
func (k *listener) Ring(cmd []byte) (int, syscall.Errno)  { return 0, k.errno }
func (k *listener) Mmap(int64, int) ([]byte, error)       { return nil, unix.EINVAL }
func (k *listener) Munmap([]byte) error                   { return nil }
func (k *listener) Close() error                          { return nil }

// The registration of a dma-buf, byte by byte: its descriptor is a number of 4 bytes, and no descriptor of the ioctl's kind.
func TestRegDMABufGolden(t *testing.T) {
	if !littleEndian() {
		t.Skip("the golden bytes are little-endian")
	}
	k := &listener{answer: func(cmd []byte) {
		copy(cmd[24+8:], []byte{0x15}) // the new handle
		copy(cmd[24+16*9:], []byte{1, 2, 3, 4, 0, 0, 0, 0, 5, 6, 7, 8})
	}}
	f := NewFile(k, "fake0", 1)
	defer f.Close()
	m, err := f.RegDMABuf(3, 9, 0x11000, 0x22000, 0x7f0000033000, ib.AccessLocalWrite|ib.AccessRemoteWrite|ib.AccessRelaxedOrdering)
	if err != nil || m != (MRInfo{0x15, 0x04030201, 0x08070605}) {
		t.Error(m, err)
	}
	response := fmt.Sprintf("%x", []byte{byte(k.addr + 24 + 16*9), byte((k.addr + 24 + 16*9) >> 8)})
	second := fmt.Sprintf("%x", []byte{byte(k.addr + 24 + 16*9 + 8), byte((k.addr + 24 + 16*9 + 8) >> 8)})
	want := unhex(t, `
		a800 0700 0400 0900 0000000000000000 01000000 00000000
		0000 0000 0100 0000 0000000000000000
		0100 0000 0100 0000 0300000000000000
		0200 0800 0100 0000 0010010000000000
		0300 0800 0100 0000 0020020000000000
		0400 0800 0100 0000 0030030000 7f0000
		0500 0400 0100 0000 0900000000000000
		0600 0800 0100 0000 0300100000000000
		0700 0400 0100 0000 `+response+`
		`)
	got := k.cmd[:len(want)]
	if !bytes.Equal(got, want) {
		t.Errorf("got\n%swant\n%s", hex.Dump(got), hex.Dump(want))
	}
	if got := hex.EncodeToString(k.cmd[24+16*8:][:10]); got != "0800040001000000"+second {
		t.Errorf("the rkey's attribute is %s", got)
	}
	for _, errno := range []syscall.Errno{unix.EOPNOTSUPP, unix.EPROTONOSUPPORT, unix.ENOTTY} {
		k.errno = errno
		if m, err := f.RegDMABuf(3, 9, 0, 4096, 0, 0); !errors.Is(err, errors.ErrUnsupported) || !errors.Is(err, errno) || m != (MRInfo{}) {
			t.Error(m, err)
		}
	}
	k.errno = unix.EINVAL
	if _, err := f.RegDMABuf(3, 9, 0, 4096, 0, 0); !errors.Is(err, unix.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
}

// What a region's rights become for a device that can do all, and for one that can do nothing.
func TestRegionAccess(t *testing.T) {
	c := &Context{File: NewFile(&listener{}, "fake0", 1), optional: true}
	c.caps.Store(uint64(ib.CapODP|ib.CapFlush|ib.CapFlushPersistent) | capsKnown)
	const all = ib.AccessOnDemand | ib.AccessHugeTLB | ib.AccessFlushGlobal | ib.AccessFlushPersistent | ib.AccessRelaxedOrdering
	if a, err := c.regionAccess(all); a != all || err != nil {
		t.Error(a, err)
	}
	c.caps.Store(capsKnown)
	c.optional = false
	for _, bit := range []ib.Access{ib.AccessOnDemand, ib.AccessFlushGlobal, ib.AccessFlushPersistent} {
		if _, err := c.regionAccess(ib.AccessLocalWrite | bit); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%v: %v", bit, err)
		}
	}
	if a, err := c.regionAccess(ib.AccessLocalWrite | ib.AccessHugeTLB | ib.AccessRelaxedOrdering); a != ib.AccessLocalWrite || err != nil {
		t.Error(a, err)
	}
	p := PD{C: c}
	c.gone.Store(true)
	if _, err := p.RegisterDMABuf(driver.DMABufConfig{}); !errors.Is(err, driver.ErrDeviceRemoved) {
		t.Error(err)
	}
	if _, err := p.RegisterMR(driver.MRConfig{}, nil, nil); !errors.Is(err, driver.ErrDeviceRemoved) {
		t.Error(err)
	}
}

func TestKeepFromChildren(t *testing.T) {
	for _, n := range []int{1, 4096, 5000, 64 << 10} {
		r, err := mem.Alloc(n, mem.Options{})
		if err != nil {
			t.Fatal(err)
		}
		b := r.Bytes()
		keepFromChildren(b[:n])
		if flags := vmFlags(t, AddrOf(b)); !strings.Contains(flags, " dc ") {
			t.Errorf("%d bytes: flags %q", n, flags)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	keepFromChildren(nil)
	keepFromChildren(make([]byte, 10)) // less than a page, of which the rest is another's: nothing happens
}

// Where the kernel does not copy pinned pages at once for a child, a registration keeps memory of mr.Alloc from children: all whole
// pages of it, and for as long as it is mapped, since other registrations may have some of it, too. Go memory, and what lies beside, it
// leaves to them.
func TestRegistrationKeepsFromChildren(t *testing.T) {
	was := forkSafe
	t.Cleanup(func() { forkSafe = was })
	k := &uverbstest.Kernel{Own: func(*uverbstest.Command) syscall.Errno { return uverbstest.AsUsual }}
	k.Init(t, 1)
	t.Cleanup(func() { unix.Close(k.Async[0]) })
	f := NewFile(k, "fake0", 1)
	t.Cleanup(func() { f.Close() })
	p := &WindowPD{PD: PD{C: &Context{File: f}}, W: NewWindows()}
	page := unix.Getpagesize()
	alloc := func(pages int) ([]byte, int) {
		r, err := mem.Alloc(pages*page, mem.Options{Huge: mem.HugeNever})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		return r.Bytes(), r.FD()
	}
	register := func(b []byte, fd int) driver.MR {
		m, err := p.RegisterMR(driver.MRConfig{Mem: b, FD: fd, Access: ib.AccessLocalWrite})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	kept := func(when string, b []byte, want ...bool) {
		t.Helper()
		for i, w := range want {
			if flags := vmFlags(t, AddrOf(b[i*page:])); flags == "" || strings.Contains(flags, " dc ") != w {
				t.Errorf("%s: page %d has the flags %q, want dc: %v", when, i, flags, w)
			}
		}
	}

	forkSafe = func() bool { return true }
	b, fd := alloc(4)
	if err := register(b, fd).Close(); err != nil {
		t.Error(err)
	}
	kept("the kernel copies pinned pages", b, false, false, false, false)

	forkSafe = func() bool { return false }
	kept("not registered", b, false, false, false, false)
	first := register(b[:2*page], fd)
	kept("registered", b, true, true, false, false)
	second := register(b[page:2*page+1], fd)
	kept("registered twice", b, true, true, true, false)
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	kept("the first is withdrawn", b, true, true, true, false)
	if err := second.Close(); err != nil {
		t.Error(err)
	}

	heap, _ := alloc(2) // as the Go heap is registered: without a memory file
	m := register(heap, -1)
	kept("Go memory", heap, false, false)
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// vmFlags are those of the mapping that addr lies in.
func vmFlags(t *testing.T, addr uint64) string {
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for line := range strings.Lines(string(text)) {
		var from, to uint64
		if n, _ := fmt.Sscanf(line, "%x-%x ", &from, &to); n == 2 {
			found = from <= addr && addr < to
		}
		if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok && found {
			return flags
		}
	}
	return ""
}
