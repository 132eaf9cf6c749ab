//go:build race

package softnic

// The same as sync/atomic's, but out of the race detector's sight: see dma.

//go:noescape
func add64(p *uint64, d uint64) uint64

//go:noescape
func cas64(p *uint64, o, n uint64) bool

//go:noescape
func load64(p *uint64) uint64
