package uverbs

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
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
	if err := errors.Join(f.Close(), f.Close()); err != nil {
		t.Error(err)
	}
	if err := f.Call("query_port", 0, 0); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// A ringer is a kernel that keeps the prepared commands that it gets.
type ringer struct {
	listener
	rung  [][]byte
	errs  []syscall.Errno // of Ring, in order; then 0
	short bool
}

func (k *ringer) Ring(cmd []byte) (int, syscall.Errno) {
	k.rung = append(k.rung, bytes.Clone(cmd))
	if len(k.errs) > 0 {
		e := k.errs[0]
		k.errs = k.errs[1:]
		return 0, e
	}
	if k.short {
		return 4, 0
	}
	return len(cmd), 0
}

func TestPrepared(t *testing.T) {
	if !littleEndian() {
		t.Skip("the golden bytes are little-endian")
	}
	k := &ringer{}
	f := NewFile(k, "fake0", 1)
	defer f.Close()
	arm, err := f.PrepareArm(9, true)
	if err != nil {
		t.Fatal(err)
	}
	bell, err := f.PrepareSendDoorbell(7)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(arm.Run(), bell.Run()); err != nil {
		t.Fatal(err)
	}
	response := binary.LittleEndian.AppendUint64(nil, bell.wr.addr+32)
	for i, want := range []string{
		"17000000 0400 0000 09000000 01000000",
		"1c000000 0800 0100" + hex.EncodeToString(response) + "07000000 00000000 00000000 38000000",
	} {
		if !bytes.Equal(k.rung[i], unhex(t, want)) {
			t.Errorf("command %d is %x", i, k.rung[i])
		}
	}

	k.errs = []syscall.Errno{unix.EINTR, unix.ENOTCONN}
	var e *CmdError
	if err := bell.Run(); !errors.As(err, &e) || e.Errno != unix.ENOTCONN || e.Op != "post_send" || k.cmd != nil {
		t.Error(err, k.cmd)
	}
	k.short = true
	if err := bell.Run(); err == nil || !strings.Contains(err.Error(), "4 bytes of a command of 32") {
		t.Error(err)
	}
	k.short = false

	// A process that has changed its credentials goes on with the ioctl.
	k.errs, k.rung = []syscall.Errno{unix.EACCES}, nil
	if err := errors.Join(bell.Run(), bell.Run()); err != nil || len(k.rung) != 1 || binary.LittleEndian.Uint16(k.cmd[4:]) != abi.UVERBS_METHOD_INVOKE_WRITE {
		t.Errorf("%v, %d writes, ioctl %x", err, len(k.rung), k.cmd)
	}
	k.errno = unix.ENOMEM
	if err := bell.Run(); !errors.Is(err, unix.ENOMEM) {
		t.Error(err)
	}
	// Where there is no ioctl, it is told what is wrong.
	f.legacy.Store(true)
	if bell, err = f.PrepareSendDoorbell(7); err != nil {
		t.Fatal(err)
	}
	k.errs = []syscall.Errno{unix.EACCES}
	if err := bell.Run(); !errors.As(err, &e) || e.Hint == "" {
		t.Error(err)
	}
	bell.Free()
	arm.Free()
}

func TestRemoved(t *testing.T) {
	err := error(&CmdError{Device: "rxe0", Op: "reg_mr", Errno: unix.EIO})
	if !errors.Is(err, driver.ErrDeviceRemoved) || !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	if err := (&CmdError{Op: "modify_qp", Errno: unix.EHOSTUNREACH}); !errors.Is(err, driver.ErrUnreachable) || !errors.Is(err, unix.EHOSTUNREACH) {
		t.Error(err)
	}
	if errors.Is(&CmdError{Errno: unix.EINVAL}, driver.ErrDeviceRemoved) {
		t.Error("any error is a removed device")
	}
}

// What the kernel says when no neighbour answers, or the net device is down, is said of the path only by commands that look for one.
func TestUnreachable(t *testing.T) {
	k := &listener{}
	f := NewFile(k, "rxe0", 1)
	defer f.Close()
	h := &ib.AHAttr{Port: 1}
	for _, c := range []struct {
		errno syscall.Errno
		want  bool
	}{{unix.ETIMEDOUT, true}, {unix.ENETDOWN, true}, {unix.EHOSTUNREACH, true}, {unix.EINVAL, false}} {
		k.errno = c.errno
		err := f.ModifyQP(1, &ib.QPAttr{AH: *h}, ib.AttrAV, ib.LinkEthernet)
		if _, ahErr := f.CreateAH(1, h, ib.LinkEthernet, nil); errors.Is(err, driver.ErrUnreachable) != c.want || errors.Is(ahErr, driver.ErrUnreachable) != c.want ||
			!errors.Is(err, c.errno) {
			t.Errorf("%v, %v", err, ahErr)
		}
	}
	k.errno = unix.ETIMEDOUT // the device's firmware does not answer
	if err := f.ModifyQP(1, &ib.QPAttr{State: ib.RTS}, ib.AttrState, ib.LinkEthernet); errors.Is(err, driver.ErrUnreachable) {
		t.Error(err)
	}
}
