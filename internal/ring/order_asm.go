//go:build (amd64 || arm64) && !race

package ring

// StoreRel32 stores v in *p after every earlier load and store of this goroutine. Pairs with an atomic load.
//
//go:noescape
func StoreRel32(p *uint32, v uint32)

// StoreRel64 is StoreRel32 for 64 bits; p must be 8-byte aligned.
//
//go:noescape
func StoreRel64(p *uint64, v uint64)

// AcquireFence orders earlier loads before later loads and stores; needed after a bulk copy out of memory that a peer
// may be writing, since a copy's loads are plain ones.
func AcquireFence()

// Pause tells the core that this is a spin loop.
func Pause()

// Prefetch asks for the cache line of p, to be read soon. It never faults.
//
//go:noescape
func Prefetch(p *byte)
