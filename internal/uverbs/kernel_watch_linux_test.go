package uverbs

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/netlink"
	"github.com/ringside-rdma/ringside/internal/nldev"
	"github.com/ringside-rdma/ringside/internal/testutil"
)

// vmOnly skips tests that add and remove devices of the machine that they run on.
func vmOnly(t *testing.T) {
	t.Helper()
	if os.Getenv("RINGSIDE_SOFT_ROCE") != "vm" {
		testutil.Skip(t, "go run ./test/soft-roce -- go test ./internal/uverbs has a kernel whose devices may be removed")
	}
}

// addRXE makes a pair of net devices with an rxe device on the first. All of it is gone when the test ends.
func addRXE(t *testing.T, netdev, name string) Device {
	t.Helper()
	route, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer route.Close()
	veth := netlink.NewMessage(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, make([]byte, unix.SizeofIfInfomsg)).
		Text(unix.IFLA_IFNAME, netdev).
		Nested(unix.IFLA_LINKINFO, func(m netlink.Message) netlink.Message { return m.Text(unix.IFLA_INFO_KIND, "veth") })
	if err := route.Do(veth); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := net.InterfaceByName(netdev); err == nil {
			if err := removeNetDev(netdev); err != nil {
				t.Error(err)
			}
		}
	})
	c := dialNLDev(t)
	if err := c.AddLink(name, "rxe", netdev); err != nil {
		t.Fatal(err)
	}
	list, err := Devices()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(list, func(d Device) bool { return d.Name == name })
	if i < 0 || !slices.Equal(list[i].NetDevs, []string{netdev}) {
		t.Fatalf("%+v", list)
	}
	return list[i]
}

func removeNetDev(name string) error {
	c, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.Close()
	i, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	body := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(body[4:], uint32(i.Index))
	return c.Do(netlink.NewMessage(unix.RTM_DELLINK, 0, body))
}

func dialNLDev(t *testing.T) *nldev.Conn {
	t.Helper()
	c, err := nldev.Dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// A device that is open is deleted: the watch says so, the deletion waits, and goes on when the device is closed.
func TestKernelRemoval(t *testing.T) {
	vmOnly(t)
	for _, c := range []struct {
		name   string
		remove func(*testing.T) error
		waits  bool // until the device is closed
		deaf   bool
	}{
		{"link", func(t *testing.T) error { return dialNLDev(t).RemoveLink("rxew") }, true, false},
		{"link, by sysfs", func(t *testing.T) error { return dialNLDev(t).RemoveLink("rxew") }, true, true},
		{"net device", func(*testing.T) error { return removeNetDev("vethw") }, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			testutil.CheckLeaks(t)
			d := addRXE(t, "vethw", "rxew")
			t.Logf("%+v", d)
			w := &watcher{host: removals.host, open: removals.open, every: removals.every}
			if c.deaf {
				w.open = func() (source, bool) { return newClock(), true }
			}
			fired := make(chan struct{})
			stop, err := w.watch(d.Chardev, func() { close(fired) })
			if err != nil {
				t.Fatal(err)
			}
			defer stop()
			other, err := WatchRemoval("uverbs0", func() { t.Error("the wrong device") })
			if err != nil {
				t.Fatal(err)
			}
			defer other()
			fd, err := unix.Open(d.Path(), unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			deleted := make(chan struct{})
			go func() {
				defer close(deleted)
				if err := c.remove(t); err != nil {
					t.Error(err)
				}
			}()
			wait(t, "removal of "+d.Chardev, fired)
			if list, err := Devices(); err != nil || slices.ContainsFunc(list, func(x Device) bool { return x.Name == d.Name }) {
				t.Errorf("still listed, or %v", err)
			}
			if err := ExplainOpen(&d, unix.ENOENT); !strings.Contains(err.Error(), "removed") {
				t.Error(err)
			}
			if c.waits {
				select {
				case <-deleted:
					t.Error("the deletion did not wait for the open device")
				default:
				}
			}
			if err := unix.Close(fd); err != nil {
				t.Error(err)
			}
			wait(t, "end of the deletion", deleted)
			// The name is free again once all of it is gone.
			testutil.Eventually(t, "the device is gone", func() bool {
				_, err := os.Stat("/sys/class/infiniband/" + d.Name)
				return errors.Is(err, os.ErrNotExist)
			})
		})
	}
}

// Which RDMA device stands on which net device, and what they need in a container. Both drivers' devices on one net device
// are there; rdmamap names one of them, and which one depends on the order of a folder.
func TestKernelNetDevs(t *testing.T) {
	vmOnly(t)
	list, err := Devices()
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"rxe0": "veth0", "rxe1": "veth1", "siw0": "veth2", "siw1": "veth3"}
	for _, d := range list {
		netdev, ok := want[d.Name]
		if !ok {
			continue // another package's tests may just be removing it
		}
		t.Logf("%s: %v; %v", d.Name, d.NetDevs, CharDevices(d.Name))
		if !slices.Equal(d.NetDevs, []string{netdev}) {
			t.Errorf("%+v", d)
		}
		if chardevs := CharDevices(d.Name); !slices.Contains(chardevs, d.Path()) || !slices.Contains(chardevs, "/dev/infiniband/rdma_cm") {
			t.Errorf("%s needs %q", d.Name, chardevs)
		}
		// What sysfs says alone is the same, but that siw says nothing there in Linux 6.1.
		s := Device{Name: d.Name, Ports: d.Ports}
		theHost.chardev(&s)
		theHost.netDevs(&s)
		if s.Chardev != d.Chardev || s.ABI != d.ABI || s.Major != d.Major || s.Minor != d.Minor || d.Protocol != "iw" && !slices.Equal(s.NetDevs, d.NetDevs) {
			t.Errorf("sysfs: %+v\nnetlink: %+v", s, d)
		}
	}
	for dev, ifname := range want {
		names, err := DevicesOfNetDev(ifname)
		if err != nil || !slices.Equal(names, []string{dev}) {
			t.Errorf("%s: %q, %v", ifname, names, err)
		}
	}
	for _, ifname := range []string{"lo", "nonesuch"} {
		if names, err := DevicesOfNetDev(ifname); !errors.Is(err, ErrNoDevices) {
			t.Errorf("%s: %q, %v", ifname, names, err)
		} else {
			t.Log(err)
		}
	}
	if CharDevices("nonesuch") != nil {
		t.Error("a device that does not exist has character devices")
	}
}

// Reasons of the real kernel: a driver that is not there, a node that is missing or another's.
func TestKernelReasons(t *testing.T) {
	vmOnly(t)
	if safe, err := ForkSafe(); err != nil || !safe {
		t.Error(safe, err) // since Linux 5.12
	}
	if list, err := DevicesOf(rxe0.DriverID); err != nil || len(list) < 2 {
		t.Error(list, err)
	}
	if list, err := DevicesOf(1); !errors.Is(err, ErrNoDevices) {
		t.Error(list, err)
	}
	d := addRXE(t, "vethr", "rxer")
	away := d.Path() + ".away"
	if err := os.Rename(d.Path(), away); err != nil {
		t.Fatal(err)
	}
	defer os.Rename(away, d.Path())
	_, err := OpenDevice(&d)
	t.Log(err)
	if !errors.Is(err, ErrNoNode) || !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "mknod -m 666") {
		t.Error(err)
	}
	if err := os.Symlink("/dev/null", d.Path()); err != nil {
		t.Fatal(err)
	}
	_, err = OpenDevice(&d)
	t.Log(err)
	if !errors.Is(err, ErrNoNode) || !strings.Contains(err.Error(), "device 1:3") {
		t.Error(err)
	}
	if err := os.Remove(d.Path()); err != nil {
		t.Fatal(err)
	}
	// What the error says to do helps.
	if err := unix.Mknod(d.Path(), unix.S_IFCHR|0o666, int(unix.Mkdev(d.Major, d.Minor))); err != nil {
		t.Fatal(err)
	}
	f, err := OpenDevice(&d)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}
