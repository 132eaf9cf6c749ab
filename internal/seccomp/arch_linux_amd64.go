package seccomp

import "golang.org/x/sys/unix"

// arch is AUDIT_ARCH_* of this process, and of the programs that it can supervise. x32 calls, whose numbers differ, pass.
const arch = unix.AUDIT_ARCH_X86_64
