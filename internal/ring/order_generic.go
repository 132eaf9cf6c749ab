//go:build (!amd64 && !arm64) || race

package ring

import (
	"runtime"
	"sync/atomic"
)

// StoreRel32 stores v in *p after every earlier load and store of this goroutine. Pairs with an atomic load.
func StoreRel32(p *uint32, v uint32) { atomic.StoreUint32(p, v) }

// StoreRel64 is StoreRel32 for 64 bits; p must be 8-byte aligned.
func StoreRel64(p *uint64, v uint64) { atomic.StoreUint64(p, v) }

var fence atomic.Uint32

// AcquireFence orders earlier loads before later loads and stores; needed after a bulk copy out of memory that a peer
// may be writing, since a copy's loads are plain ones.
func AcquireFence() { fence.Add(0) }

// Pause tells the core that this is a spin loop.
func Pause() { runtime.Gosched() }

// Prefetch asks for the cache line of p, to be read soon. It never faults.
func Prefetch(p *byte) {}
