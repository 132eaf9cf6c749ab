//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A mount is one line of what would be the machine's fstab.
type mount struct {
	target, fstype, source string
	flags                  uintptr
	data                   string
	optional               bool
}

func (m mount) do() error {
	err := os.MkdirAll(m.target, 0o755)
	if err == nil {
		err = unix.Mount(m.source, m.target, m.fstype, m.flags, m.data)
	}
	if err != nil && !m.optional {
		return fmt.Errorf("mount %s (%s) at %s: %w", m.source, m.fstype, m.target, err)
	}
	return nil
}

// mountKernelFS mounts what comes from the machine's own kernel below root: "" is the initial root.
func mountKernelFS(root string) error {
	for _, m := range []mount{
		{target: "/proc", fstype: "proc"},
		{target: "/sys", fstype: "sysfs"},
		{target: "/sys/kernel/debug", fstype: "debugfs", optional: true},
		{target: "/sys/kernel/tracing", fstype: "tracefs", optional: true},
		{target: "/sys/kernel/config", fstype: "configfs", optional: true}, // once its module is there
		{target: guestCgroups, fstype: "cgroup2"},
		{target: "/dev", fstype: "devtmpfs"},
		{target: "/dev/pts", fstype: "devpts", data: "mode=620,ptmxmode=666", optional: true},
		{target: "/dev/shm", fstype: "tmpfs", data: "mode=1777"},
		{target: "/dev/mqueue", fstype: "mqueue", optional: true},
		{target: "/run", fstype: "tmpfs", data: "mode=755"},
	} {
		m.target, m.source = root+m.target, m.fstype
		if err := m.do(); err != nil {
			return err
		}
	}
	return nil
}

// share mounts a folder of the host, by its tag. Where both sides write, cache=mmap keeps what the machine writes from
// staying in its memory; where nobody does, cache=loose spares a round trip for each look at a file.
func share(tag, target string, writable bool) error {
	m := mount{target: target, fstype: "9p", source: tag, data: "trans=virtio,version=9p2000.L,msize=512000,cache="}
	if writable {
		m.data += "mmap"
	} else {
		m.flags = unix.MS_RDONLY
		m.data += "loose"
	}
	return m.do()
}

// mountRoot makes the root that commands see: the host's files at their own paths, the image's tools over them, and over
// both a layer in memory that takes what is written.
func mountRoot(config *guestConfig) error {
	if err := share("host", guestHost, false); err != nil {
		return err
	}
	const layer = "/layer"
	if err := (mount{target: layer, fstype: "tmpfs", source: "layer"}).do(); err != nil {
		return err
	}
	if err := errors.Join(os.MkdirAll(layer+"/upper", 0o755), os.MkdirAll(layer+"/work", 0o755)); err != nil {
		return err
	}
	overlay := mount{target: guestRoot, fstype: "overlay", source: "overlay",
		data: "lowerdir=" + guestTools + ":" + guestHides + ":" + guestHost + ",upperdir=" + layer + "/upper,workdir=" + layer + "/work"}
	if err := overlay.do(); err != nil {
		return err
	}
	if err := mountKernelFS(guestRoot); err != nil {
		return err
	}
	if err := addAccount(guestRoot); err != nil {
		return err
	}
	if err := share("work", guestRoot+config.Work, true); err != nil {
		return err
	}
	if config.Out {
		return share("out", guestRoot+"/out", true)
	}
	return nil
}

// unmountShares has the host's folders take what the machine has written.
func unmountShares(config *guestConfig) error {
	unix.Sync()
	if config.Out {
		return unix.Unmount(guestRoot+"/out", 0)
	}
	return nil
}

// addAccount adds the account that Debian's tcpdump changes to. A host without tcpdump has none.
func addAccount(root string) error {
	for file, line := range map[string]string{
		"passwd": "tcpdump:x:127:127::/nonexistent:/usr/sbin/nologin\n",
		"group":  "tcpdump:x:127:\n",
	} {
		name := filepath.Join(root, "etc", file)
		text, err := os.ReadFile(name)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if slices.ContainsFunc(strings.Split(string(text), "\n"), func(l string) bool { return strings.HasPrefix(l, "tcpdump:") }) {
			continue
		}
		if len(text) > 0 && text[len(text)-1] != '\n' {
			text = append(text, '\n')
		}
		if err := os.WriteFile(name, append(text, line...), 0o644); err != nil {
			return err
		}
	}
	return nil
}
