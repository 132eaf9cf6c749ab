package testutil

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// holdings counts what the process holds, by kind and name.
func holdings() map[string]int {
	held := make(map[string]int)
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range fds {
		to, err := os.Readlink("/proc/self/fd/" + fd.Name())
		if err != nil || strings.HasSuffix(to, "/fd") && strings.HasPrefix(to, "/proc/") {
			continue // the descriptor of this very listing
		}
		held["fd "+kindOf(to)]++
	}
	maps, _ := os.ReadFile("/proc/self/maps")
	for line := range strings.Lines(string(maps)) {
		// 7f5c0000-7f5c1000 rw-s 00000000 00:01 1034    /memfd:name (deleted)
		f := strings.Fields(line)
		if len(f) < 6 || !strings.HasPrefix(f[5], "/") || strings.HasSuffix(f[5], ".so") || strings.Contains(f[5], ".so.") {
			continue // anonymous memory and [stack]: the Go runtime's; libraries: the C runtime's under -race
		}
		if strings.Contains(f[1], "s") {
			held["mapping "+f[5]]++
		}
	}
	shm, _ := os.ReadDir("/dev/shm")
	for _, e := range shm {
		info, err := e.Info()
		if err != nil {
			continue
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) == os.Getuid() && !strings.HasPrefix(e.Name(), "ucx_") {
			held["file "+filepath.Join("/dev/shm", e.Name())]++
		}
	}
	return held
}

// kindOf strips what differs between two descriptors of one kind: socket:[123] -> socket.
func kindOf(target string) string {
	for _, p := range []string{"socket:", "pipe:"} {
		if strings.HasPrefix(target, p) {
			return p[:len(p)-1]
		}
	}
	return target
}
