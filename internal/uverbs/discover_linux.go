package uverbs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/nldev"
)

// Devices lists the RDMA devices that this process's network namespace shows, sorted by name: by netlink, and by sysfs
// where netlink does not tell, or is not there. A kernel without the RDMA subsystem is ErrNoSubsystem. An empty list is no error; DevicesOf
// says why there is nothing.
func Devices() ([]Device, error) {
	c, err := dial()
	if err != nil {
		if list := theHost.devices(); len(list) > 0 {
			return list, nil
		}
		return nil, err
	}
	defer c.Close()
	list, err := c.Devices()
	if err != nil {
		return nil, err
	}
	for i := range list {
		d := &list[i]
		if err := c.Chardev(d); err != nil || d.Chardev == "" {
			theHost.chardev(d) // a device without a user interface has none there either
		}
		// Kernels that tell the driver tell the net devices, too: then none means none, in this namespace. What sysfs says
		// may be the name of a net device in another.
		if err := c.NetDevs(d); err != nil || len(d.NetDevs) == 0 && !d.HasDriverID {
			theHost.netDevs(d)
		}
	}
	return list, nil
}

// ForkSafe reports whether a child process may be forked while memory is registered: the kernel then copies such pages for
// the child at once, where it otherwise leaves them to whoever writes first, and the device works on with the other's. If
// not (Linux before 5.12), registered memory needs madvise(MADV_DONTFORK). Programs that os/exec starts are no danger.
// A kernel without the RDMA subsystem is ErrNoSubsystem.
func ForkSafe() (bool, error) {
	s, err := system()
	return s.CopyOnFork, err
}

func system() (nldev.System, error) {
	c, err := dial()
	if err != nil {
		return nldev.System{}, err
	}
	defer c.Close()
	return c.System()
}

func dial() (*nldev.Conn, error) {
	c, err := nldev.Dial()
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, ErrNoSubsystem
	}
	return c, err
}

// A host is where this package looks beside netlink. Tests have their own.
type host struct {
	sysfs string // where the kernel shows its devices: /sys
	dev   string // where the nodes of RDMA devices are: /dev/infiniband
}

var theHost = host{sysfs: "/sys", dev: "/dev/infiniband"}

// class is the folder of a class of devices, joined with the rest of a path.
func (h *host) class(path ...string) string {
	return filepath.Join(append([]string{h.sysfs, "class"}, path...)...)
}

// chardevsOf returns the names of an RDMA device's entries in a class of character devices.
func (h *host) chardevsOf(class, device string) (names []string) {
	entries, _ := os.ReadDir(h.class(class)) // no folder: the class's module is not loaded
	for _, e := range entries {
		if read(h.class(class, e.Name(), "ibdev")) == device {
			names = append(names, e.Name())
		}
	}
	return names
}

// chardev looks for the character device of d.
func (h *host) chardev(d *Device) {
	names := h.chardevsOf(classVerbs, d.Name)
	if len(names) == 0 {
		return
	}
	d.Chardev = names[0]
	d.ABI, _ = strconv.ParseUint(read(h.class(classVerbs, d.Chardev, "abi_version")), 10, 64)
	d.Major, d.Minor = h.numbers(d.Chardev)
}

// The classes of character devices of RDMA devices.
const (
	classVerbs = "infiniband_verbs" // uverbs0
	classMAD   = "infiniband_mad"   // umad0, issm0: for subnet management
	classCM    = "infiniband_cm"    // ucm0: before Linux 5.9, and without use
)

// numbers returns those of a character device, or 0, 0 if there is none.
func (h *host) numbers(chardev string) (major, minor uint32) {
	if n, _ := fmt.Sscanf(read(h.class(classVerbs, chardev, "dev")), "%d:%d", &major, &minor); n != 2 {
		return 0, 0
	}
	return major, minor
}

// netDevs looks for the net devices of d: those of its ports' GIDs, and what rxe says.
func (h *host) netDevs(d *Device) {
	names := []string{read(h.class("infiniband", d.Name, "parent"))}
	for port := uint32(1); port <= d.Ports; port++ {
		dir := h.class("infiniband", d.Name, "ports", strconv.Itoa(int(port)), "gid_attrs/ndevs")
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			names = append(names, read(filepath.Join(dir, e.Name()))) // an empty slot cannot be read
		}
	}
	for _, name := range names {
		if name == "" || slices.Contains(d.NetDevs, name) {
			continue
		}
		if _, err := os.Stat(h.class("net", name)); err == nil { // else it is in another network namespace
			d.NetDevs = append(d.NetDevs, name)
		}
	}
}

func read(path string) string {
	b, _ := os.ReadFile(path)
	return strings.TrimSpace(string(b))
}

// Numbers of the wrong length are zero: the kernel does not send them.
func u32(v []byte) uint32 {
	if len(v) != 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(v)
}

func u64(v []byte) uint64 {
	if len(v) != 8 {
		return 0
	}
	return binary.NativeEndian.Uint64(v)
}
