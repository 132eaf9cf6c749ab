//go:build !race || !amd64

package softnic

import "sync/atomic"

// add64 adds d to *p and returns the old value; cas64 stores n in *p if it holds o. They are atomic with the CPU's own atomics.
func add64(p *uint64, d uint64) uint64 { return atomic.AddUint64(p, d) - d }

func cas64(p *uint64, o, n uint64) bool { return atomic.CompareAndSwapUint64(p, o, n) }

func load64(p *uint64) uint64 { return atomic.LoadUint64(p) }
