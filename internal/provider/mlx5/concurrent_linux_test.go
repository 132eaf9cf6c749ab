//go:build amd64 || arm64

package mlx5

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Several post to queue pairs of one completion queue, one polls, a device works, and queue pairs come and go: nothing is lost, and
// the race detector looks on.
func TestConcurrentUse(t *testing.T) {
	b := bare(t)
	const each, queues = 300, 3
	var mu sync.Mutex // of the device: the test's queues have no other order
	devices := map[*fakeQP]bool{}
	var stop atomic.Bool
	var device, others sync.WaitGroup
	device.Go(func() {
		for !stop.Load() {
			mu.Lock()
			for q := range devices {
				q.complete()
			}
			mu.Unlock()
			runtime.Gosched()
		}
	})
	newQP := func() (*qp, *fakeQP) {
		q := b.newQP(ib.RC)
		b.k.Mu.Lock()
		k := b.k.qps[q.Handle]
		b.k.Mu.Unlock()
		mu.Lock()
		devices[k] = true
		mu.Unlock()
		return q, k
	}
	seen := map[ib.QPN]uint64{}
	total := atomic.Int64{}
	device.Go(func() {
		wcs := make([]ib.WC, 7)
		for !stop.Load() {
			n := b.cq.Poll(wcs)
			if n < 0 {
				t.Error(b.cq.Err())
				return
			}
			for _, wc := range wcs[:n] {
				if wc.ID != seen[wc.QPN] || wc.Status != ib.WCSuccess {
					t.Errorf("%+v, want ID %d", wc, seen[wc.QPN])
				}
				seen[wc.QPN]++
				total.Add(1)
			}
			if n == 0 {
				runtime.Gosched()
			}
		}
	})
	var list []*qp
	for range queues {
		q, _ := newQP()
		list = append(list, q)
		others.Go(func() {
			for i := 0; i < each; {
				n, err := q.PostSend([]ib.SendWR{{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled}})
				if i += n; n == 0 && err != driver.ErrQueueFull {
					t.Error(err)
					return
				}
				runtime.Gosched()
			}
		})
	}
	others.Go(func() {
		for range 20 {
			q, k := newQP()
			q.PostSend([]ib.SendWR{{Opcode: ib.OpLocalInv}, {Opcode: ib.OpSend}})
			mu.Lock()
			delete(devices, k)
			mu.Unlock()
			b.close(q)
		}
	})
	others.Wait()
	for total.Load() < each*queues && !t.Failed() {
		runtime.Gosched()
	}
	stop.Store(true)
	device.Wait()
	for _, q := range list {
		b.close(q)
	}
}
