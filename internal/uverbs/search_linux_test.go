package uverbs

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/nldev"
)

func kernelWith(s nldev.System, list ...Device) answers {
	return answers{func() ([]Device, error) { return list, nil }, func() (nldev.System, error) { return s, nil }}
}

var (
	rxe0 = Device{Name: "rxe0", Ports: 1, Chardev: "uverbs0", Major: 231, Minor: 192, DriverID: abi.RDMA_DRIVER_RXE, HasDriverID: true,
		Protocol: "roce", NetDevs: []string{"veth0"}}
	siw0 = Device{Name: "siw0", Ports: 1, Chardev: "uverbs2", Major: 231, Minor: 194, DriverID: abi.RDMA_DRIVER_SIW, HasDriverID: true,
		Protocol: "iw", NetDevs: []string{"veth0"}}
)

func TestDevicesOf(t *testing.T) {
	broken := errors.New("netlink is broken")
	exclusive := nldev.System{NetNSExclusive: true}
	two := map[string]string{"sys/class/infiniband_verbs/uverbs0/ibdev": "mlx5_0", "sys/class/infiniband_verbs/uverbs1/ibdev": "mlx5_1"}
	for _, c := range []struct {
		name   string
		files  map[string]string
		kernel answers
		err    error
		absent bool
		text   string
	}{
		{"found", nil, kernelWith(nldev.System{}, rxe0, siw0), nil, false, ""},
		{"no subsystem", nil, answers{devices: func() ([]Device, error) { return nil, ErrNoSubsystem }}, ErrNoSubsystem, true, "modprobe ib_core"},
		{"broken", nil, answers{devices: func() ([]Device, error) { return nil, broken }}, broken, false, ""},
		{"no devices", nil, kernelWith(exclusive), ErrNoDevices, true, "rdma link add"},
		{"shared", two, kernelWith(nldev.System{}), ErrNoDevices, true, "rdma link add"},
		{"elsewhere", two, kernelWith(exclusive), ErrOtherNetNS, false, "2 devices are"},
		{"others", nil, kernelWith(nldev.System{}, siw0), ErrNoDevices, true, "there are siw0"},
		{"no ib_uverbs", nil, kernelWith(nldev.System{}, Device{Name: "rxe0"}, Device{Name: "siw0"}), ErrNoUserAccess, false, "rxe0, siw0, without character devices: `modprobe ib_uverbs`"},
		{"old kernel", nil, kernelWith(nldev.System{}, Device{Name: "rxe0", Chardev: "uverbs0"}), ErrNoUserAccess, false, "Linux 5.3"},
	} {
		list, err := newHost(t, c.files).devicesOf(c.kernel, abi.RDMA_DRIVER_RXE)
		if !errors.Is(err, c.err) || errors.Is(err, driver.ErrAbsent) != c.absent || (err == nil) != (len(list) == 1) {
			t.Errorf("%s: %v, %v", c.name, list, err)
		}
		if err != nil && !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestExplainOpen(t *testing.T) {
	there := map[string]string{"sys/class/infiniband_verbs/uverbs0/dev": "231:192"}
	node := map[string]string{"sys/class/infiniband_verbs/uverbs0/dev": "231:192", "dev/infiniband/uverbs0": "x"}
	exclusive := nldev.System{NetNSExclusive: true}
	unnumbered := rxe0
	unnumbered.Major, unnumbered.Minor = 0, 0
	for _, c := range []struct {
		name   string
		files  map[string]string
		mode   os.FileMode
		kernel answers
		d      Device
		err    error
		reason error
		text   string
	}{
		{"no udev", there, 0, answers{}, rxe0, unix.ENOENT, ErrNoNode, "uverbs0 c 231 192`"},
		{"no udev, numbers of sysfs", there, 0, answers{}, unnumbered, unix.ENOENT, ErrNoNode, "uverbs0 c 231 192`"},
		{"no udev, no sysfs", nil, 0, answers{}, unnumbered, unix.ENOENT, ErrNoNode, "start udev"},
		{"removed", map[string]string{"sys/class/net/lo": ""}, 0, answers{}, rxe0, unix.ENOENT, driver.ErrDeviceRemoved, "removed"},
		{"removed, with a node", map[string]string{"sys/class/net/lo": "", "dev/infiniband/uverbs0": "x"}, 0, answers{}, rxe0, unix.ENXIO, driver.ErrDeviceRemoved, "removed"},
		{"stale", node, 0, answers{}, rxe0, unix.ENXIO, ErrNoNode, "what is there is the node of device 0:0: `rm "},
		{"group", node, 0o660, answers{}, rxe0, unix.EACCES, ErrNoPermission, "it is 0660 of user"},
		{"security module", node, 0o666, answers{}, rxe0, unix.EACCES, ErrNoPermission, "SELinux"},
		{"folder", there, 0, answers{}, rxe0, unix.EACCES, ErrNoPermission, "folder"},
		{"namespace", node, 0, kernelWith(exclusive, siw0), rxe0, unix.EPERM, ErrOtherNetNS, "rdma dev set rxe0 netns"},
		{"device controller", node, 0, kernelWith(exclusive, rxe0), rxe0, unix.EPERM, ErrCgroup, "--device"},
		{"device controller, shared", node, 0, kernelWith(nldev.System{}), rxe0, unix.EPERM, ErrCgroup, "DeviceAllow"},
		{"rdma controller", node, 0, answers{}, rxe0, &CmdError{Device: "rxe0", Op: "get_context", Errno: unix.EAGAIN}, ErrCgroup, "rdma.max"},
	} {
		h := newHost(t, c.files)
		if c.mode != 0 {
			if err := os.Chmod(filepath.Join(h.dev, "uverbs0"), c.mode); err != nil {
				t.Fatal(err)
			}
		}
		err := h.explainOpen(c.kernel, &c.d, c.err)
		var e *OpenError
		if !errors.As(err, &e) || !errors.Is(err, c.reason) || !errors.Is(err, e.Errno) || e.Device != "rxe0" || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", c.name, err)
		}
		if again := h.explainOpen(c.kernel, &c.d, err); again != err {
			t.Errorf("%s: explained twice: %v", c.name, again)
		}
	}
	h := newHost(t, nil)
	for _, err := range []error{unix.EMFILE, errors.New("something else")} {
		if got := h.explainOpen(answers{}, &rxe0, err); got != err {
			t.Errorf("%v: %v", err, got)
		}
	}
	if err := h.explainOpen(answers{}, &Device{Name: "rxe0"}, unix.ENOENT); !errors.Is(err, ErrNoUserAccess) {
		t.Error(err)
	}
}

// The node that has the device's name may be another's.
func TestCheckNode(t *testing.T) {
	h := newHost(t, map[string]string{"dev/infiniband": ""})
	if err := h.checkNode(&rxe0); err != nil {
		t.Errorf("none is open's to say: %v", err)
	}
	if err := os.Symlink("/dev/null", filepath.Join(h.dev, "uverbs0")); err != nil {
		t.Fatal(err)
	}
	if err := h.checkNode(&rxe0); !errors.Is(err, ErrNoNode) || !strings.Contains(err.Error(), "device 1:3") {
		t.Error(err)
	}
	null := rxe0
	null.Major, null.Minor = 1, 3
	unnumbered := rxe0
	unnumbered.Major, unnumbered.Minor = 0, 0
	for _, d := range []Device{null, unnumbered} {
		if err := h.checkNode(&d); err != nil {
			t.Error(err)
		}
	}
}

func TestDevicesOfNetDev(t *testing.T) {
	ipoib := Device{Name: "mlx5_0", Protocol: "ib"}
	elsewhere := Device{Name: "mlx5_1", Protocol: "roce"}
	list := func() ([]Device, error) { return []Device{ipoib, elsewhere, rxe0, siw0}, nil }
	byMap := func(name string, err error) func(string) (string, error) {
		return func(string) (string, error) { return name, err }
	}
	for _, c := range []struct {
		ifname string
		byMap  func(string) (string, error)
		want   string
	}{
		{"veth0", byMap("rxe0", nil), "rxe0 siw0"},
		{"veth0.5", byMap("rxe0", nil), "rxe0"},
		{"ib0", byMap("mlx5_0", nil), "mlx5_0"},
		{"eth0", byMap("mlx5_1", nil), ""}, // stands on the eth0 of another namespace
		{"eth0", byMap("gone", nil), ""},
		{"lo", byMap("", nil), ""},
		{"nonesuch", byMap("", errors.New("no link")), ""},
		{"ib1", func(string) (string, error) { var address []byte; return string(address[12:]), nil }, ""},
	} {
		names, err := devicesOfNetDev(c.ifname, list, c.byMap)
		if strings.Join(names, " ") != c.want || (c.want == "") != errors.Is(err, ErrNoDevices) {
			t.Errorf("%s: %q, %v", c.ifname, names, err)
		}
	}
	none := func() ([]Device, error) { return nil, ErrNoSubsystem }
	if _, err := devicesOfNetDev("eth0", none, nil); !errors.Is(err, ErrNoSubsystem) {
		t.Error(err)
	}
}

func TestCharDevices(t *testing.T) {
	h := newHost(t, map[string]string{
		"sys/class/infiniband_verbs/uverbs0/ibdev": "mlx5_0", "sys/class/infiniband_verbs/uverbs1/ibdev": "rxe0",
		"sys/class/infiniband_mad/umad0/ibdev": "mlx5_0", "sys/class/infiniband_mad/umad1/ibdev": "mlx5_0",
		"sys/class/infiniband_mad/issm0/ibdev": "mlx5_0", "sys/class/infiniband_mad/abi_version": "5",
	})
	h.dev = "/dev/infiniband"
	const dev = "/dev/infiniband/"
	byMap := func(string) []string { return []string{dev + "umad0", dev + "uverbs0", dev + "rdma_cm"} }
	want := strings.Join([]string{dev + "issm0", dev + "rdma_cm", dev + "umad0", dev + "umad1", dev + "uverbs0"}, " ")
	if got := strings.Join(h.charDevices("mlx5_0", byMap), " "); got != want {
		t.Error(got)
	}
	if got := h.charDevices("rxe0", func(string) []string { panic("slice bounds out of range") }); strings.Join(got, " ") != dev+"uverbs1" {
		t.Error(got)
	}
	if got := h.charDevices("siw0", byMap); got != nil {
		t.Error(got)
	}
}
