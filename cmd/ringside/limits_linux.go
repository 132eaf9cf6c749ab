package main

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// lockedEnough is a limit on locked memory below which programs of this library soon meet it: a connection's buffers are some
	// hundreds of KiB.
	lockedEnough = 64 << 20
	// filesEnough likewise: a connection has a socket and, through memory, a few descriptors.
	filesEnough = 4096
)

// limitFindings are about the limits of this process.
func limitFindings(devices []deviceJSON) (all []finding) {
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &lim) == nil {
		all = append(all, lockedFindings(devices, lim.Cur, mayLock())...)
	}
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil && lim.Cur < filesEnough {
		all = append(all, finding{Text: fmt.Sprintf("the limit on open files is %d: thousands of connections need more (ulimit -n)", lim.Cur)})
	}
	return all
}

// lockedFindings are about a limit on locked memory, in bytes. Memory is locked for devices of the kernel only, and who has
// CAP_IPC_LOCK may lock more (ib_umem_get), but not for siw, whose driver counted for itself before Linux 6.8 (siw_umem_get).
func lockedFindings(devices []deviceJSON, limit uint64, mayLock bool) []finding {
	if limit >= lockedEnough {
		return nil
	}
	has := func(f func(deviceJSON) bool) bool { return slices.ContainsFunc(devices, f) }
	siw := has(func(d deviceJSON) bool { return d.Provider == "siw" })
	if !has(func(d deviceJSON) bool { return d.Provider != "soft" }) || mayLock && !siw {
		return nil
	}
	const raise = "raise it (ulimit -l unlimited; LimitMEMLOCK=infinity in a systemd unit; --ulimit memlock=-1 for a container)"
	if mayLock {
		return []finding{{Text: fmt.Sprintf("the limit on locked memory is %d KiB, which bounds the memory that can be registered with siw before "+
			"Linux 6.8, although this process has CAP_IPC_LOCK: %s", limit>>10, raise)}}
	}
	return []finding{{true, fmt.Sprintf("the limit on locked memory is %d KiB, which bounds the memory that can be registered: "+
		"%s, or give programs CAP_IPC_LOCK", limit>>10, raise)}}
}

// mayLock reports whether the limit on locked memory is none for this process: CAP_IPC_LOCK counts in the initial user namespace only.
func mayLock() bool {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	ids, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && slices.Equal(strings.Fields(string(ids)), []string{"0", "0", "4294967295"}) &&
		unix.Capget(&head, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_IPC_LOCK) != 0
}
