//go:build linux && !amd64 && !arm64

package seccomp

// arch 0: no program can be supervised on this architecture.
const arch = 0
