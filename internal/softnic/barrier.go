package softnic

import (
	"os"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/ring"
)

// forceFences makes every store on the data path a full fence, as on systems without membarrier; for tests.
var forceFences = os.Getenv("RINGSIDE_SOFT_FENCES") == "1"

// publish32 stores v with release order, or, with full set, as a full fence: needed when the two sides of a link cannot both
// rely on heavyBarrier.
func publish32(full bool, p *uint32, v uint32) {
	if full {
		atomic.StoreUint32(p, v)
		return
	}
	ring.StoreRel32(p, v)
}

// publish64 is publish32 for 64 bits.
func publish64(full bool, p *uint64, v uint64) {
	if full {
		atomic.StoreUint64(p, v)
		return
	}
	ring.StoreRel64(p, v)
}
