package rdmacm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/netlink"
)

// An opener is how the device is found; tests have their own.
type opener struct {
	node  string // the device node
	abi   string // the file with the version of the interface
	load  func() error
	pause time.Duration // between looks for the node, after the module was loaded
}

func openKernel() (kernel, error) {
	d, err := opener{
		node:  "/dev/infiniband/rdma_cm",
		abi:   "/sys/class/misc/rdma_cm/abi_version",
		load:  loadModule,
		pause: 20 * time.Millisecond,
	}.open()
	if err != nil {
		return nil, err
	}
	return d, nil
}

func (o opener) open() (*device, error) {
	fd, err := openNode(o.node)
	if missing(err) {
		// Only the module makes the node, and asking for it by netlink loads the module.
		loadErr := o.load()
		if loadErr != nil {
			return nil, fmt.Errorf("rdma_cm: %w: %w; load the module rdma_ucm (modprobe rdma_ucm), or run a kernel that has it",
				errors.ErrUnsupported, loadErr)
		}
		for range 25 {
			if fd, err = openNode(o.node); !missing(err) {
				break
			}
			time.Sleep(o.pause) // udev may have to make the node
		}
	}
	if err != nil {
		return nil, o.explain(err)
	}
	if b, err := os.ReadFile(o.abi); err == nil { // without sysfs there is only one version that it could be
		v, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil || v != abi.RDMA_USER_CM_ABI_VERSION {
			unix.Close(fd)
			return nil, fmt.Errorf("rdma_cm: %w: the kernel's interface has version %q, this package knows %d",
				errors.ErrUnsupported, strings.TrimSpace(string(b)), abi.RDMA_USER_CM_ABI_VERSION)
		}
	}
	return newDevice(fd, o.node)
}

func openNode(path string) (int, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

func missing(err error) bool {
	return err == unix.ENOENT || err == unix.ENXIO || err == unix.ENODEV
}

// explain says what to do about a node that cannot be opened.
func (o opener) explain(err error) error {
	switch {
	case missing(err):
		return fmt.Errorf("rdma_cm: %w: open %s: %w (the kernel has the module, but there is no such device node: is udev running, "+
			"or was %s passed to the container?)", errors.ErrUnsupported, o.node, err, filepath.Dir(o.node))
	case err == unix.EACCES:
		return fmt.Errorf("rdma_cm: open %s: %w (no permission: the node is usually 0666 or of the group rdma)", o.node, err)
	case err == unix.EPERM:
		return fmt.Errorf("rdma_cm: open %s: %w (a device cgroup forbids it: pass the device to the container)", o.node, err)
	}
	return fmt.Errorf("rdma_cm: open %s: %w", o.node, err)
}

// loadModule makes the kernel load rdma_ucm. An error says that there is no such device afterwards.
func loadModule() error {
	c, err := netlink.Dial(unix.NETLINK_RDMA)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return errors.New("this kernel has no RDMA subsystem: its module ib_core is not loaded or not built")
	}
	if err != nil {
		return err
	}
	defer c.Close()
	name := ""
	var bad error
	m := netlink.NewMessage(abi.RDMA_NL_NLDEV<<10|abi.RDMA_NLDEV_CMD_GET_CHARDEV, 0, nil).
		Text(abi.RDMA_NLDEV_ATTR_CHARDEV_TYPE, "rdma_cm")
	err = c.Get(m, func(body []byte) {
		bad = netlink.Attributes(body, func(typ uint16, v []byte) {
			if typ == abi.RDMA_NLDEV_ATTR_CHARDEV_NAME {
				name = strings.TrimRight(string(v), "\x00")
			}
		})
	})
	switch {
	case err != nil:
		return fmt.Errorf("the kernel has no connection manager for programs: %w", err)
	case bad != nil:
		return bad
	case name == "":
		return errors.New("the kernel has no connection manager for programs")
	}
	return nil
}
