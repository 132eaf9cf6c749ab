//go:build amd64 || arm64

package mlx5

import (
	"fmt"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/uverbs"
)

// Resize implements driver.CQResizer. The device is given new memory. It writes one more completion to the old one, which says that
// it goes on in the new one, behind the place that belongs to that completion; what was queued before is moved there.
func (q *cq) Resize(entries int) error {
	q.changeMu.Lock()
	defer q.changeMu.Unlock()
	if err := q.Err(); err != nil {
		return err
	}
	n, err := q.c.cqes(entries)
	if err != nil {
		return q.c.cqError("resize_cq", err)
	}
	q.mu.Lock()
	same, queued := n == q.count, q.ready()
	q.mu.Unlock()
	switch {
	case same:
		return nil
	case queued > n-1:
		return q.c.cqError("resize_cq", fmt.Errorf("%d completions are queued: poll them first, or ask for more than %d entries", queued, entries))
	}
	fresh, err := newRing(n)
	if err != nil {
		return q.c.cqError("resize_cq", err)
	}
	old := q.take()
	cmd := abi.Mlx5ResizeCQ{BufAddr: uverbs.AddrOf(fresh.mem), CQESize: cqeBytes}
	granted, err := q.c.ResizeCQ(q.handle, int(n-1), uverbs.Bytes(&cmd), nil)
	if err != nil {
		q.put(old)
		unmapPages(fresh.mem)
		return err
	}
	if err = q.move(&old, &fresh); err == nil && granted != int(n-1) {
		err = fmt.Errorf("a ring of %d completions was given, and the kernel speaks of %d", n, granted+1)
	}
	q.put(fresh)
	if err != nil {
		err = fmt.Errorf("%w: completion queue %#x: %w", ErrDevice, q.number, err)
		q.fail(err)
	}
	unmapPages(old.mem)
	return err
}

// move copies what is queued to the place behind the one that it has. Nobody polls meanwhile.
func (q *cq) move(old, fresh *ringOfCQEs) error {
	for i := uint32(0); i <= min(old.mask, fresh.mask); i++ {
		_, tail, ok := old.ready(q.next + i)
		if !ok {
			return fmt.Errorf("the device has new memory for completions, and has not said so")
		}
		fromDevice()
		if cqeCode(tail) == cqeResize {
			q.next++
			return nil
		}
		old.copyTo(q.next+i, fresh, q.next+i+1)
	}
	return fmt.Errorf("the device has more completions queued than fit the new memory, of %d: %w", fresh.mask+1, driver.ErrBusy)
}
