package cycles

import "errors"

// Now returns the time-stamp counter. Like perftest's get_cycles it is not a barrier: the processor may read the
// counter some tens of cycles early or late, which cancels out between successive readings of one loop.
//
//go:noescape
func Now() uint64

// cpuid executes CPUID.
//
//go:noescape
func cpuid(leaf uint32) (eax, ebx, ecx, edx uint32)

func check() error {
	const extended = 0x80000000
	// Leaf 0x80000007, EDX bit 8: invariant TSC (Intel SDM vol. 3, 18.17.1; AMD APM vol. 3, appendix E).
	if top, _, _, _ := cpuid(extended); top < extended+7 {
		return errors.New("the processor does not say that its TSC is invariant")
	}
	if _, _, _, edx := cpuid(extended + 7); edx&(1<<8) == 0 {
		return errors.New("the processor's TSC is not invariant")
	}
	return checkKernel()
}
