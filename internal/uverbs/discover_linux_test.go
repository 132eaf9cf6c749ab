package uverbs

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/netlink"
	"github.com/ringside-rdma/ringside/internal/testutil"
)

// What rxe0 looks like over netlink.
func TestParseDevice(t *testing.T) {
	body := netlink.Message(nil).U32(abi.RDMA_NLDEV_ATTR_DEV_INDEX, 3).Text(abi.RDMA_NLDEV_ATTR_DEV_NAME, "rxe0").
		U32(abi.RDMA_NLDEV_ATTR_PORT_INDEX, 1).Attr(abi.RDMA_NLDEV_ATTR_DEV_NODE_TYPE, []byte{1}).
		Attr(abi.RDMA_NLDEV_ATTR_NODE_GUID, []byte{1, 0, 0, 0, 0, 0, 0, 1}).Text(abi.RDMA_NLDEV_ATTR_DEV_PROTOCOL, "roce").
		U32(9999, 1)
	d, err := parseDevice(body)
	if err != nil {
		t.Fatal(err)
	}
	if d.Name != "rxe0" || d.Index != 3 || d.Ports != 1 || d.NodeType != 1 || d.NodeGUID != 0x0100000000000001 || d.Protocol != "roce" {
		t.Errorf("%+v", d)
	}
	body = netlink.Message(nil).Text(abi.RDMA_NLDEV_ATTR_CHARDEV_NAME, "uverbs2").
		Attr(abi.RDMA_NLDEV_ATTR_CHARDEV_ABI, []byte{2, 0, 0, 0, 0, 0, 0, 0}).U32(abi.RDMA_NLDEV_ATTR_UVERBS_DRIVER_ID, 14)
	if err := parseChardev(&d, body); err != nil {
		t.Fatal(err)
	}
	if d.Path() != "/dev/infiniband/uverbs2" || !d.HasDriverID || d.DriverID != 14 || littleEndian() && d.ABI != 2 {
		t.Errorf("%+v", d)
	}
	if _, err := parseDevice(netlink.Message(nil).U32(abi.RDMA_NLDEV_ATTR_DEV_INDEX, 3)); err == nil {
		t.Error("a device without a name")
	}
	if _, err := parseDevice([]byte{3, 0, 1, 0}); err == nil {
		t.Error("an attribute shorter than its header")
	}
}

func FuzzParseDevice(f *testing.F) {
	f.Add([]byte(netlink.Message(nil).U32(1, 3).Text(2, "rxe0")))
	f.Add([]byte{255, 255, 2, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		d, _ := parseDevice(b)
		parseChardev(&d, b)
	})
}

func TestChardevFromSysfs(t *testing.T) {
	sysfs = t.TempDir()
	defer func() { sysfs = "/sys" }()
	for name, ibdev := range map[string]string{"uverbs0": "mlx5_0", "uverbs1": "rxe0"} {
		dir := filepath.Join(sysfs, "class/infiniband_verbs", name)
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "ibdev"), []byte(ibdev+"\n"), 0o644),
			os.WriteFile(filepath.Join(dir, "abi_version"), []byte("2\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	d := Device{Name: "rxe0"}
	if chardevFromSysfs(&d); d.Chardev != "uverbs1" || d.ABI != 2 {
		t.Errorf("%+v", d)
	}
	d = Device{Name: "rxe9"}
	if chardevFromSysfs(&d); d.Chardev != "" {
		t.Errorf("%+v", d)
	}
}

// On a kernel with devices (test/soft-roce has them): what is listed can be opened, and answers through both doors.
func TestKernelDevices(t *testing.T) {
	list, err := Devices()
	if errors.Is(err, ErrNoSubsystem) || err == nil && len(list) == 0 {
		testutil.Skip(t, "no RDMA device in this kernel; go run ./test/soft-roce -- go test ./internal/uverbs has some")
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range list {
		t.Run(d.Name, func(t *testing.T) {
			t.Logf("%+v", d)
			if d.Chardev == "" || !d.HasDriverID {
				t.Skip("not for user space")
			}
			for _, legacy := range []bool{false, true} {
				f, err := Open(d.Path(), d.Name, d.DriverID)
				if err != nil {
					t.Fatal(err)
				}
				f.legacy = legacy
				if legacy {
					// The context, by write(): the response of siw's provider is mandatory.
					in, out, uhw := make([]byte, 8), make([]byte, 8), make([]byte, 8)
					if d.DriverID != abi.RDMA_DRIVER_SIW {
						uhw = nil
					}
					if err := f.Write("get_context", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_GET_CONTEXT, In: in, Out: out, UHWOut: uhw}); err != nil {
						t.Fatal(err)
					}
					unix.Close(int(u32(out[:4]))) // the async fd
				} else {
					var vectors [4]byte
					var support [8]byte
					attrs := []Attr{Out(abi.UVERBS_ATTR_GET_CONTEXT_NUM_COMP_VECTORS, vectors[:]), Out(abi.UVERBS_ATTR_GET_CONTEXT_CORE_SUPPORT, support[:])}
					var uhw [8]byte
					if d.DriverID == abi.RDMA_DRIVER_SIW {
						attrs = append(attrs, Out(abi.UVERBS_ATTR_UHW_OUT, uhw[:]))
					}
					if err := f.Call("get_context", abi.UVERBS_OBJECT_DEVICE, abi.UVERBS_METHOD_GET_CONTEXT, attrs...); err != nil {
						t.Fatal(err)
					}
					if u32(vectors[:]) == 0 {
						t.Error("no completion vectors")
					}
				}
				in := make([]byte, 8)
				var attr abi.QueryDeviceResp
				if err := f.Write("query_device", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_QUERY_DEVICE, In: in, Out: Bytes(&attr)}); err != nil {
					t.Fatal(err)
				}
				if attr.MaxQP == 0 || attr.MaxCQE == 0 || attr.PhysPortCnt != uint8(d.Ports) {
					t.Errorf("%+v", attr)
				}
				if f.legacy != legacy {
					t.Error("the ioctl does not know INVOKE_WRITE")
				}
				// A protection domain, made and destroyed; a second time is the kernel's error.
				var pd abi.AllocPDResp
				if err := f.Write("alloc_pd", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_ALLOC_PD, In: make([]byte, 8), Out: Bytes(&pd)}); err != nil {
					t.Fatal(err)
				}
				dealloc := &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_DEALLOC_PD, In: Bytes(&abi.DeallocPD{PDHandle: pd.PDHandle})}
				if err := f.Write("dealloc_pd", dealloc); err != nil {
					t.Fatal(err)
				}
				var ce *CmdError
				if err := f.Write("dealloc_pd", dealloc); !errors.As(err, &ce) || ce.Device != d.Name {
					t.Errorf("a protection domain was destroyed twice: %v", err)
				}
				if err := f.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
