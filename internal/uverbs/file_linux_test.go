package uverbs

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
)

// Errors of the door itself name the device, and say what to do.
func TestOpenErrors(t *testing.T) {
	_, err := Open(filepath.Join(t.TempDir(), "uverbs0"), "rxe0", 14)
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "rxe0") || !strings.Contains(err.Error(), "udev") {
		t.Error(err)
	}
}

// A file that is no RDMA device refuses the ioctl, and then the write: here /dev/null takes the write.
func TestFallback(t *testing.T) {
	f, err := Open("/dev/null", "null0", 14)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Call("query_port", abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_QUERY_PORT); !errors.Is(err, unix.ENOTTY) {
		t.Error(err)
	}
	in := abi.AllocPD{}
	out := make([]byte, 4)
	if err := f.Write("alloc_pd", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_ALLOC_PD, In: Bytes(&in), Out: out}); err != nil {
		t.Error(err)
	}
	if !f.legacy {
		t.Error("no fallback")
	}
	mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	d, err := f.NewDoorbell(7, mem[:DoorbellSize])
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Ring(); err != nil {
		t.Error(err)
	}
	if n := testing.AllocsPerRun(100, func() { d.Ring() }); n != 0 {
		t.Errorf("ringing allocates %v times", n)
	}
	f.legacy = false
	if d, err = f.NewDoorbell(7, mem[:DoorbellSize]); err != nil {
		t.Fatal(err)
	}
	if err := d.Ring(); !errors.Is(err, unix.ENOTTY) {
		t.Error(err)
	}
	if err := errors.Join(f.Close(), f.Close()); err != nil {
		t.Error(err)
	}
	if err := f.Call("query_port", 0, 0); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

func TestRemoved(t *testing.T) {
	err := error(&CmdError{Device: "rxe0", Op: "reg_mr", Errno: unix.EIO})
	if !errors.Is(err, driver.ErrDeviceRemoved) || !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	if errors.Is(&CmdError{Errno: unix.EINVAL}, driver.ErrDeviceRemoved) {
		t.Error("any error is a removed device")
	}
}
