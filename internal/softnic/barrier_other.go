//go:build !linux

package softnic

// asymmetric: see barrier_linux.go; elsewhere both sides use full fences.
func asymmetric() bool { return false }

func heavyBarrier() {}
