package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

const (
	// lockedEnough is a limit on locked memory below which programs of this library soon meet it: a connection's buffers are some
	// hundreds of KiB.
	lockedEnough = 64 << 20
	// filesEnough likewise: a connection has a socket and, through memory, a few descriptors.
	filesEnough = 4096
)

// limitFindings are about the limits of this process. Memory is locked for devices of the kernel only.
func limitFindings(kernelDevices bool) (all []finding) {
	var lim unix.Rlimit
	if kernelDevices && unix.Getrlimit(unix.RLIMIT_MEMLOCK, &lim) == nil && lim.Cur < lockedEnough {
		all = append(all, finding{true, fmt.Sprintf("the limit on locked memory is %d KiB, which bounds the memory that can be registered: "+
			"raise it (ulimit -l unlimited; LimitMEMLOCK=infinity in a systemd unit; --ulimit memlock=-1 for a container)", lim.Cur>>10)})
	}
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil && lim.Cur < filesEnough {
		all = append(all, finding{Text: fmt.Sprintf("the limit on open files is %d: thousands of connections need more (ulimit -n)", lim.Cur)})
	}
	return all
}
