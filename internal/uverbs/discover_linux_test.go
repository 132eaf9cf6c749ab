package uverbs

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/testutil"
)

// newHost has its own sysfs and /dev, with the files in the list: name and content, "" for a folder.
func newHost(t *testing.T, files map[string]string) *host {
	t.Helper()
	top := t.TempDir()
	for name, content := range files {
		name = filepath.Join(top, name)
		err := os.MkdirAll(filepath.Dir(name), 0o755)
		if content == "" {
			err = os.MkdirAll(name, 0o755)
		} else if err == nil {
			err = os.WriteFile(name, []byte(content+"\n"), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return &host{sysfs: filepath.Join(top, "sys"), dev: filepath.Join(top, "dev/infiniband")}
}

func TestChardevFromSysfs(t *testing.T) {
	h := newHost(t, map[string]string{
		"sys/class/infiniband_verbs/abi_version":         "6",
		"sys/class/infiniband_verbs/uverbs0/ibdev":       "mlx5_0",
		"sys/class/infiniband_verbs/uverbs1/ibdev":       "rxe0",
		"sys/class/infiniband_verbs/uverbs1/abi_version": "2",
		"sys/class/infiniband_verbs/uverbs1/dev":         "231:193",
	})
	d := Device{Name: "rxe0"}
	if h.chardev(&d); d.Chardev != "uverbs1" || d.ABI != 2 || d.Major != 231 || d.Minor != 193 {
		t.Errorf("%+v", d)
	}
	d = Device{Name: "rxe9"}
	if h.chardev(&d); d.Chardev != "" {
		t.Errorf("%+v", d)
	}
}

func TestNetDevsFromSysfs(t *testing.T) {
	const ports = "sys/class/infiniband/mlx5_0/ports/"
	h := newHost(t, map[string]string{
		"sys/class/infiniband/rxe0/parent": "eth1",
		ports + "1/gid_attrs/ndevs/0":      "eth0", ports + "1/gid_attrs/ndevs/1": "eth0.5", ports + "1/gid_attrs/ndevs/2": "eth0",
		ports + "1/gid_attrs/ndevs/3": " ", ports + "2/gid_attrs/ndevs/0": "elsewhere", ports + "3/gid_attrs/ndevs/0": "eth1",
		"sys/class/net/eth0": "", "sys/class/net/eth0.5": "", "sys/class/net/eth1": "",
	})
	for _, c := range []struct {
		d    Device
		want []string
	}{
		{Device{Name: "mlx5_0", Ports: 2}, []string{"eth0", "eth0.5"}},
		{Device{Name: "rxe0", Ports: 1}, []string{"eth1"}},
		{Device{Name: "siw0", Ports: 1}, nil},
	} {
		if h.netDevs(&c.d); !slices.Equal(c.d.NetDevs, c.want) {
			t.Errorf("%s: %q", c.d.Name, c.d.NetDevs)
		}
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
				f, err := OpenDevice(&d)
				if err != nil {
					t.Fatal(err)
				}
				f.legacy.Store(legacy)
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
				if f.legacy.Load() != legacy {
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
