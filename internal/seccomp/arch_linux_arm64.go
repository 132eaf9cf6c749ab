package seccomp

import "golang.org/x/sys/unix"

// arch is AUDIT_ARCH_* of this process, and of the programs that it can supervise.
const arch = unix.AUDIT_ARCH_AARCH64
