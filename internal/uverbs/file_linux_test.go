package uverbs

import (
	"errors"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
)

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
	if !f.legacy.Load() {
		t.Error("no fallback")
	}
	d, err := f.PrepareSendDoorbell(7)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Run(); err != nil {
		t.Error(err)
	}
	if n := testing.AllocsPerRun(100, func() { d.Run() }); n != 0 {
		t.Errorf("a prepared command allocates %v times", n)
	}
	d.Free()
	f.legacy.Store(false)
	if d, err = f.PrepareSendDoorbell(7); err != nil {
		t.Fatal(err)
	}
	if err := d.Run(); !errors.Is(err, unix.ENOTTY) {
		t.Error(err)
	}
	d.Free()
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
