package uverbs

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// everyOp are the commands that errors name.
var everyOp = []string{"get_context", "query_device", "query_port", "query_gid", "alloc_pd", "dealloc_pd", "reg_mr", "dereg_mr", "alloc_mw", "dealloc_mw",
	"create_comp_channel", "create_cq", "resize_cq", "modify_cq", "destroy_cq", "req_notify_cq", "create_qp", "modify_qp", "query_qp", "destroy_qp",
	"post_send", "create_ah", "destroy_ah", "create_srq", "modify_srq", "query_srq", "destroy_srq", "create_flow", "destroy_flow", "alloc_uar", "free_uar",
	"get_async_event", "get_cq_event"}

// Whatever the kernel answers to a command, the error names the device, the operation and what to do, and no limit that
// `ringside devices -v` does not show.
func TestHints(t *testing.T) {
	shown, err := os.ReadFile("../../cmd/ringside/testdata/devices_v.txt")
	if err != nil {
		t.Fatal(err)
	}
	limit := regexp.MustCompile(`\bmax_\w+`)
	for _, errno := range []syscall.Errno{unix.EINVAL, unix.ENOMEM, unix.EAGAIN, unix.EBUSY, unix.EFAULT, unix.EPERM, unix.EACCES, unix.ENOSPC, unix.EBADF,
		unix.ENOENT, unix.EOPNOTSUPP, unix.ENOSYS, unix.EPROTONOSUPPORT, unix.ENOTTY, unix.ETIMEDOUT, unix.EIO, unix.ENODEV, unix.ENXIO, unix.EMFILE,
		unix.ENFILE, unix.ENOTCONN} {
		for _, op := range everyOp {
			text := (&CmdError{Device: "rxe7", Op: op, Errno: errno}).Error()
			remedy, ok := strings.CutPrefix(text, fmt.Sprintf("rxe7: %s: %v (", op, errno))
			if !ok || len(remedy) < 20 || !strings.HasSuffix(remedy, ")") || strings.ContainsAny(remedy, "{}%") {
				t.Errorf("%s", text)
			}
			for _, name := range limit.FindAllString(remedy, -1) {
				if !strings.Contains(string(shown), "    "+name+" ") {
					t.Errorf("ringside devices -v shows no %s: %s", name, text)
				}
			}
			const specific = "something else"
			if text := (&CmdError{Device: "rxe7", Op: op, Errno: errno, Hint: specific}).Error(); !strings.HasSuffix(text, ": "+errno.Error()+" ("+specific+")") {
				t.Errorf("what is known better is not said: %s", text)
			}
		}
	}
	for op := range limits {
		if text := (&CmdError{Device: "rxe7", Op: op, Errno: unix.EINVAL}).Error(); op != "modify_srq" && op != "create_ah" &&
			!strings.Contains(text, "`ringside devices -v rxe7` shows them: "+limits[op]) {
			t.Errorf("no limits: %s", text)
		}
	}
	if text := (&CmdError{Device: "rxe7", Op: "create_cq", Errno: unix.EXDEV}).Error(); text != "rxe7: create_cq: "+unix.EXDEV.Error() {
		t.Errorf("something is known of an errno of which nothing is: %s", text)
	}
}

// The same, as it comes to who calls: of some commands more is known than their errno.
func TestHintsOfCommands(t *testing.T) {
	k := &listener{}
	f := NewFile(k, "rxe7", 1)
	defer f.Close()
	av := &ib.QPAttr{AH: ib.AHAttr{Port: 1, DGID: ib.GID{15: 1}}}
	for _, c := range []struct {
		errno syscall.Errno
		call  func() error
		wants []string
	}{
		{unix.EINVAL, func() error { _, _, err := f.CreateCQ(1, -1, 1, nil, nil); return err }, []string{"create_cq", "max_cqe"}},
		{unix.EINVAL, func() error { _, err := f.CreateQP(&abi.CreateQP{}, nil, nil); return err }, []string{"create_qp", "max_qp_wr", "max_inline_bytes"}},
		{unix.ENOMEM, func() error { _, _, _, err := f.CreateSRQ(1, 1, 1, 1, nil, nil); return err }, []string{"create_srq", "ulimit -l", "max_srq_wr"}},
		{unix.EAGAIN, func() error { _, err := f.AllocPD(nil); return err }, []string{"alloc_pd", "rdma.max"}},
		{unix.EBUSY, func() error { return f.DeallocPD(1) }, []string{"dealloc_pd", "first destroy"}},
		{unix.EBUSY, func() error { return f.DestroyCQ(1) }, []string{"destroy_cq", "first destroy the queue pairs"}},
		{unix.EFAULT, func() error { _, err := f.RegMR(1, 0, 1, 0, 0, nil, nil); return err }, []string{"reg_mr", "mapped", "ib.AccessLocalWrite"}},
		{unix.EINVAL, func() error { return f.ModifyQP(1, &ib.QPAttr{}, ib.AttrState, ib.LinkEthernet) }, []string{"modify_qp", "RESET, INIT, RTR, RTS"}},
		{unix.EOPNOTSUPP, func() error { return f.ModerateCQ(1, 1, 1) }, []string{"modify_cq", "driver", "newer kernel"}},
		{unix.ENOMEM, func() error { _, err := f.RegMR(1, 0, 54321, 0, 0, nil, nil); return err }, []string{"reg_mr", "54321 bytes have to be pinned"}},
		{unix.EINVAL, func() error { return f.ModifyQP(1, av, ib.AttrAV, ib.LinkEthernet) }, []string{"modify_qp", "is that index in use"}},
		{unix.ENOMEM, func() error { return f.ModifyQP(1, av, ib.AttrAV, ib.LinkEthernet) }, []string{"modify_qp", "short of memory"}},
		{unix.EPERM, func() error { _, err := f.CreateFlow(1, &ib.FlowRule{}); return err }, []string{"create_flow", "raw packet queue pairs and flow rules"}},
	} {
		k.errno = c.errno
		err := c.call()
		if !errors.Is(err, c.errno) {
			t.Errorf("%v, want %v", err, c.errno)
			continue
		}
		for _, want := range append(c.wants, "rxe7: ") {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q is not in: %v", want, err)
			}
		}
	}

	// By write() it is certain what EACCES means; that is not lost where a path is looked for.
	k.errno = unix.EACCES
	f.legacy.Store(true)
	if err := f.ModifyQP(1, av, ib.AttrAV, ib.LinkEthernet); err == nil || !strings.Contains(err.Error(), "this process has changed its user") {
		t.Error(err)
	}
}
