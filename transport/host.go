package transport

import (
	"crypto/sha256"
	"os"
	"strconv"
	"strings"
	"sync"
)

// HostInfo identifies the host and process of a peer, as it says. It decides nothing by itself: a path through shared
// memory is checked by the device (Unix credentials), not by these claims.
type HostInfo struct {
	ID      [16]byte // equal for processes on the same running host
	PIDNS   uint64   // inode of the process id namespace; 0 if unknown
	MountNS uint64   // inode of the mount namespace; 0 if unknown
	UID     uint32
	PID     uint32
}

var thisHost = sync.OnceValue(func() HostInfo {
	h := HostInfo{UID: uint32(os.Getuid()), PID: uint32(os.Getpid())}
	// The boot id is the same in all containers of a host, and differs after a restart. Elsewhere than on Linux, the name
	// must do.
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		name, _ := os.Hostname()
		id = []byte("host " + name)
	}
	sum := sha256.Sum256(append([]byte("ringside host "), id...))
	copy(h.ID[:], sum[:])
	h.PIDNS = namespace("pid")
	h.MountNS = namespace("mnt")
	return h
})

// namespace returns the inode of one of the process's namespaces, or 0.
func namespace(kind string) uint64 {
	s, err := os.Readlink("/proc/self/ns/" + kind)
	if err != nil {
		return 0
	}
	s = strings.TrimSuffix(strings.TrimPrefix(s, kind+":["), "]")
	n, _ := strconv.ParseUint(s, 10, 64)
	return n
}
