//go:build amd64 || arm64

package mlx5

import (
	"fmt"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Memory windows of type 2. A window is a memory key of the device's that is bound, and freed, by requests of a kind of its own: a
// UMR. What it is bound to is named by the region's key, and the device looks at that key's rights only when the window is used;
// so whether the region is there for windows, and how large it is, is checked here.

var (
	errWindowSize = fmt.Errorf("%w: a memory window opens 1 byte to 2 GiB, all of them within the region", driver.ErrInvalidWR)
	errLocalWrite = fmt.Errorf("%w: a memory window for writes or atomics needs a region with AccessLocalWrite", driver.ErrInvalidWR)
)

// bind checks a bind request, and notes what it will do. It returns the window's key before that.
func (q *qp) bind(b *ib.BindMW) (current ib.RKey, err error) {
	w, r, err := q.c.windows.Lookup(&q.QP, b)
	switch {
	case err != nil:
		return 0, err
	case b.Length == 0 || b.Length > 1<<31 || b.Addr-r.Base > r.Len || b.Length > r.Len-(b.Addr-r.Base):
		return 0, errWindowSize
	case b.Access&(ib.AccessRemoteWrite|ib.AccessRemoteAtomic) != 0 && r.Access&ib.AccessLocalWrite == 0:
		return 0, errLocalWrite
	}
	return w.Bind(&q.QP, b.RKey, false, q.sq.head)
}
