package uverbs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/nldev"
)

// DevicesOf lists the devices of one kernel driver (enum rdma_driver_id). It returns a device or an error. The error says
// why there is none and what to do: it matches ErrNoSubsystem, ErrNoDevices, ErrNoUserAccess or ErrOtherNetNS, or is what
// went wrong in the search.
func DevicesOf(driverID uint32) ([]Device, error) {
	return theHost.devicesOf(theKernel, driverID)
}

// OpenDevice is Open for a device of the list. Its errors are ExplainOpen's.
func OpenDevice(d *Device) (*File, error) {
	if err := theHost.checkNode(d); err != nil {
		return nil, err
	}
	f, err := Open(d.Path(), d.Name, d.DriverID)
	if err != nil {
		return nil, ExplainOpen(d, err)
	}
	return f, nil
}

// ExplainOpen says why d could not be opened, given the error of opening its node or of making its context: an *OpenError
// with a reason and a remedy if it is known, else err itself.
func ExplainOpen(d *Device, err error) error { return theHost.explainOpen(theKernel, d, err) }

// answers is what the kernel says over netlink. Tests have their own.
type answers struct {
	devices func() ([]Device, error)
	system  func() (nldev.System, error)
}

var theKernel = answers{Devices, system}

func (h *host) devicesOf(k answers, driverID uint32) ([]Device, error) {
	all, err := k.devices()
	if err != nil {
		return nil, err
	}
	var of []Device
	var names []string
	usable, told := false, false
	for _, d := range all {
		if d.HasDriverID && d.DriverID == driverID {
			of = append(of, d)
		}
		names = append(names, d.Name)
		usable, told = usable || d.Chardev != "", told || d.HasDriverID
	}
	switch {
	case len(of) > 0:
		return of, nil
	case len(all) == 0:
		if n := h.hidden(k); n > 0 {
			return nil, fmt.Errorf("%w (%d devices are): `rdma dev set NAME netns NAMESPACE` on the host moves one here, "+
				"`rdma system set netns shared` lets all namespaces use all", ErrOtherNetNS, n)
		}
		return nil, fmt.Errorf("%w: `rdma link add rxe0 type rxe netdev NAME` makes one of a net device, in software", ErrNoDevices)
	case !usable:
		return nil, fmt.Errorf("%w: %s, without character devices: `modprobe ib_uverbs` on the host adds them",
			ErrNoUserAccess, strings.Join(names, ", "))
	case !told:
		return nil, fmt.Errorf("%w: %s, of which this kernel does not name the driver (Linux 5.3 and later do)",
			ErrNoUserAccess, strings.Join(names, ", "))
	}
	return nil, fmt.Errorf("%w of this kind: there are %s", ErrNoDevices, strings.Join(names, ", "))
}

// hidden counts the devices that belong to other network namespaces: all that sysfs has, as the process's own has none.
// Their character devices are in sysfs in every namespace.
func (h *host) hidden(k answers) int {
	if s, err := k.system(); err != nil || !s.NetNSExclusive {
		return 0
	}
	there, _ := filepath.Glob(h.class(classVerbs, "*", "ibdev"))
	return len(there)
}

// path is where d's node is.
func (h *host) path(d *Device) string { return filepath.Join(h.dev, d.Chardev) }

// checkNode finds a node that is another device's: one that was made by hand, or is left from before. That it is not there
// at all is left to open.
func (h *host) checkNode(d *Device) error {
	var st unix.Stat_t
	if d.Chardev == "" || d.Major == 0 || unix.Stat(h.path(d), &st) != nil {
		return nil
	}
	if unix.Major(st.Rdev) == d.Major && unix.Minor(st.Rdev) == d.Minor {
		return nil
	}
	return &OpenError{Device: d.Name, Path: h.path(d), Errno: unix.ENXIO, Reason: ErrNoNode,
		Remedy: fmt.Sprintf("what is there is the node of device %d:%d: `rm %s`, then %s",
			unix.Major(st.Rdev), unix.Minor(st.Rdev), h.path(d), h.mknod(d))}
}

// mknod is the command that makes d's node.
func (h *host) mknod(d *Device) string {
	major, minor := d.Major, d.Minor
	if major == 0 {
		major, minor = h.numbers(d.Chardev)
	}
	if major == 0 {
		return "start udev"
	}
	return fmt.Sprintf("`mknod -m 666 %s c %d %d`", h.path(d), major, minor)
}

func (h *host) explainOpen(k answers, d *Device, err error) error {
	if d.Chardev == "" {
		return fmt.Errorf("%s: %w: `modprobe ib_uverbs` on the host adds the character device", d.Name, ErrNoUserAccess)
	}
	var errno syscall.Errno
	var explained *OpenError
	if errors.As(err, &explained) || !errors.As(err, &errno) {
		return err
	}
	e := &OpenError{Device: d.Name, Path: h.path(d), Errno: errno}
	switch errno {
	case unix.ENOENT, unix.ENOTDIR, unix.ENXIO, unix.ENODEV:
		var stale *OpenError
		switch {
		case h.gone(d):
			e.Reason = driver.ErrDeviceRemoved
		case errors.As(h.checkNode(d), &stale):
			e.Reason, e.Remedy = ErrNoNode, stale.Remedy
		default:
			e.Reason, e.Remedy = ErrNoNode, fmt.Sprintf("udev makes it, or `mkdir -p %s` and %s; a container is given it with --device %[1]s",
				h.dev, h.mknod(d))
		}
	case unix.EACCES:
		e.Reason, e.Remedy = ErrNoPermission, h.permission(d)
	case unix.EPERM:
		e.Remedy, e.Reason = h.forbidden(k, d)
	case unix.EAGAIN:
		// What opening charges to the rdma controller is one hca_handle.
		e.Reason, e.Remedy = ErrCgroup, "its limit of open RDMA devices or of objects in them is reached: rdma.max and rdma.current tell"
	default:
		return err
	}
	return e
}

// gone is whether the kernel has no such character device any more.
func (h *host) gone(d *Device) bool {
	if _, err := os.Stat(h.class()); err != nil {
		return false // no sysfs, no answer
	}
	_, err := os.Stat(h.class(classVerbs, d.Chardev))
	return errors.Is(err, os.ErrNotExist)
}

func (h *host) permission(d *Device) string {
	var st unix.Stat_t
	if err := unix.Stat(h.path(d), &st); err != nil {
		return "it is in a folder that this user may not enter"
	}
	if mode := st.Mode & 0o777; mode != 0o666 {
		return fmt.Sprintf("it is %#o of user %d, group %d, and is usually 0666: `chmod 666 %s`, or add the user to the group",
			mode, st.Uid, st.Gid, h.path(d))
	}
	return "its mode allows it, so a security module (SELinux, AppArmor) does not: see its log"
}

// forbidden tells apart what opens with EPERM.
func (h *host) forbidden(k answers, d *Device) (remedy string, reason error) {
	if s, err := k.system(); err == nil && s.NetNSExclusive {
		list, err := k.devices()
		here := false
		for i := range list {
			here = here || list[i].Name == d.Name
		}
		if err == nil && !here {
			return fmt.Sprintf("`rdma dev set %s netns NAMESPACE` on the host moves it here, "+
				"`rdma system set netns shared` lets all namespaces use it", d.Name), ErrOtherNetNS
		}
	}
	return fmt.Sprintf("its device controller has to let the device pass: --device %s for a container, "+
		"DeviceAllow=char-infiniband_verbs for a unit of systemd", h.path(d)), ErrCgroup
}
