package emulate

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// files looks at what it finds, by every call that looks at files.
func files([]string) error {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	read := func(path, want string) {
		b, err := os.ReadFile(path)
		check(strings.TrimSpace(string(b)) == want, "%s: %q, %v, want %q", path, b, err, want)
	}
	names := func(dir string, want ...string) {
		l, err := os.ReadDir(dir)
		var s []string
		for _, e := range l {
			s = append(s, e.Name())
		}
		check(strings.Join(s, " ") == strings.Join(want, " "), "%s: %q, %v, want %q", dir, s, err, want)
	}
	const verbs = "/sys/class/infiniband_verbs"
	names("/dev/infiniband", "rdma_cm", "uverbs0", "uverbs1")
	names("/sys/class/infiniband", "mlx5_0", "mlx5_1")
	names(verbs, "abi_version", "uverbs0", "uverbs1")
	read(verbs+"/abi_version", "6")
	read(verbs+"/uverbs1/ibdev", "mlx5_1")
	read(verbs+"/uverbs1/dev", "231:193")
	read(verbs+"/uverbs1/device/vendor", "0x15b3")
	read("/sys/class/misc/rdma_cm/abi_version", "4")
	read("/sys/class/misc/rdma_cm/dev", fmt.Sprintf("10:%d", cmMinor))
	read("/sys/class/../class//infiniband/./mlx5_0/ports/1/state", "4: ACTIVE")
	read("/sys/class/infiniband/mlx5_0/ports/1/gids/200", "0000:0000:0000:0000:0000:0000:0000:0000")

	// From a folder.
	dir, err := unix.Open("/sys/class/infiniband", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	check(err == nil, "open a folder: %v", err)
	defer unix.Close(dir)
	fd, err := unix.Openat(dir, "mlx5_0/node_type", unix.O_RDONLY, 0)
	check(err == nil, "openat: %v", err)
	unix.Close(fd)
	dev, err := unix.Open("/dev/infiniband", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	check(err == nil, "open the nodes' folder: %v", err)
	defer unix.Close(dev)
	fd, err = unix.Openat(dev, "uverbs0", unix.O_RDWR|unix.O_CLOEXEC, 0)
	check(err == nil, "openat of a node: %v", err)
	how := unix.OpenHow{Flags: unix.O_RDWR | unix.O_CLOEXEC}
	fd2, err := unix.Openat2(unix.AT_FDCWD, "/dev/infiniband/uverbs1", &how)
	check(err == nil, "openat2: %v", err)

	// Nodes are character devices, open or not.
	node := func(what string, minor uint32, st unix.Stat_t, err error) {
		check(err == nil && st.Mode == unix.S_IFCHR|0o666 && uint64(st.Rdev) == unix.Mkdev(231, minor), "%s: mode %#o, device %#x, %v", what, st.Mode, st.Rdev, err)
	}
	var st unix.Stat_t
	err = unix.Stat(node0, &st)
	node("stat", 192, st, err)
	err = unix.Lstat("/dev/infiniband/uverbs1", &st)
	node("lstat", 193, st, err)
	err = unix.Fstatat(dev, "uverbs1", &st, 0)
	node("fstatat", 193, st, err)
	err = unix.Stat("/dev/infiniband/rdma_cm", &st)
	check(err == nil && st.Mode == unix.S_IFCHR|0o666 && uint64(st.Rdev) == unix.Mkdev(10, cmMinor), "stat of rdma_cm: mode %#o, device %#x, %v", st.Mode, st.Rdev, err)
	misc, _ := unix.Open("/sys/class/misc", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	fd3, err := unix.Openat(misc, "rdma_cm/abi_version", unix.O_RDONLY, 0)
	check(err == nil, "openat of the connection manager's folder: %v", err)
	unix.Close(fd3)
	for i, f := range []int{fd, fd2} {
		err = unix.Fstat(f, &st)
		node("fstat", 192+uint32(i), st, err)
		err = unix.Fstatat(f, "", &st, unix.AT_EMPTY_PATH)
		node("fstatat of a descriptor", 192+uint32(i), st, err)
		var x unix.Statx_t
		err = unix.Statx(f, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &x)
		check(err == nil && x.Mode == unix.S_IFCHR|0o666 && x.Rdev_major == 231 && x.Rdev_minor == 192+uint32(i), "statx: %+v, %v", x, err)
		flags, err := unix.FcntlInt(uintptr(f), unix.F_GETFD, 0)
		check(flags == unix.FD_CLOEXEC, "F_GETFD: %d, %v", flags, err)
		unix.Close(f)
	}
	fd, err = unix.Open(node0, unix.O_RDWR, 0)
	check(err == nil, "open: %v", err)
	flags, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	check(flags == 0, "F_GETFD without O_CLOEXEC: %d", flags)
	unix.Close(fd)
	var x unix.Statx_t
	err = unix.Statx(unix.AT_FDCWD, "/sys/class/infiniband/mlx5_0/node_guid", 0, unix.STATX_BASIC_STATS, &x)
	check(err == nil && x.Mode == unix.S_IFREG|0o444, "statx of a file: %#o, %v", x.Mode, err)

	for _, c := range []struct {
		path string
		mode uint32
		want error
	}{
		{node0, unix.R_OK | unix.W_OK, nil},
		{"/sys/class/infiniband/mlx5_0/node_guid", unix.R_OK, nil},
		{"/sys/class/infiniband/mlx5_0/node_guid", unix.W_OK, unix.EACCES},
		{"/sys/class/infiniband/mlx5_9", unix.F_OK, unix.ENOENT},
		{"/dev/infiniband/rdma_cm", unix.R_OK | unix.W_OK, nil},
		{"/dev/infiniband/umad0", unix.F_OK, unix.ENOENT},
		{"/proc/self/exe", unix.X_OK, nil},
	} {
		if err := unix.Access(c.path, c.mode); err != c.want {
			check(false, "access(%s, %#x): %v, want %v", c.path, c.mode, err, c.want)
		}
	}
	to, err := os.Readlink("/sys/class/infiniband/mlx5_1/device/driver")
	check(filepath.Base(to) == "mlx5_core", "readlink: %q, %v", to, err)
	_, err = os.Readlink(node0)
	check(errors.Is(err, unix.EINVAL), "readlink of no link: %v", err)
	_, err = unix.Open("/sys/class/infiniband/mlx5_0/node_guid", unix.O_RDWR, 0)
	check(err == unix.EACCES, "open to write: %v", err)
	_, err = unix.Open("/dev/infiniband/uverbs2", unix.O_RDWR, 0)
	check(err == unix.ENOENT, "no such node: %v", err)

	// What is not ours is the kernel's.
	_, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_RDMA)
	check(err == unix.EPROTONOSUPPORT, "netlink: %v", err)
	self, err := os.Executable()
	check(err == nil && !strings.Contains(self, "ringside-emulate"), "the program itself: %s, %v", self, err)
	_, err = os.ReadDir("/proc/self/fd")
	check(err == nil, "/proc: %v", err)
	// A name that looks like ours makes no device.
	mem, _ := unix.MemfdCreate("uverbs-mlx5_0", unix.MFD_CLOEXEC)
	check(unix.Fstat(mem, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG, "a memfd of the program's own: %#o", st.Mode)
	check(command(mem) == unix.ENOTTY, "a command to it is taken")
	return errors.Join(errs...)
}
