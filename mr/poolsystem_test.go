package mr

import (
	"context"
	"errors"
	"syscall"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver/drivertest"
	"github.com/ringside-rdma/ringside/internal/testutil"
)

// The system may have less than Limit allows: what one size has left is there for all others then, too.
func TestPoolSystemLimit(t *testing.T) {
	const memory = 256 << 10
	pd, dev := newPD(t, func(d *drivertest.Device) { d.Memory = memory })
	p := must(NewPool(pd, PoolConfig{MaxBuffer: memory, Poison: true}))
	ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
	defer cancel()
	for _, n := range []int{64, 64 << 10, 100, 5000, memory, 64, 1 << 10, 100_000, 20_000, memory, 1} {
		b, err := p.Get(n)
		if err != nil {
			t.Fatalf("%d bytes: %v, %+v", n, err, p.Stats())
		}
		b.Release()
		if s := p.Stats(); s.Bytes > memory {
			t.Fatalf("%d bytes: %+v", n, s)
		}
	}
	// A slab that would be larger than what is left is made as large as that.
	hold := []*Buffer{must(p.Get(128 << 10)), must(p.Get(64 << 10)), must(p.Get(32 << 10))}
	b := must(p.Get(64))
	b.Release()

	// While a buffer is in use, there may be more later.
	waited := make(chan error)
	go func() {
		b, err := p.GetContext(ctx, memory)
		if err == nil {
			b.Release()
		}
		waited <- err
	}()
	testutil.Eventually(t, "waiting", func() bool { return p.waiting.Load() == 1 })
	if _, err := p.Get(memory); !errors.Is(err, ErrPoolExhausted) || !errors.Is(err, syscall.ENOMEM) {
		t.Error(err)
	}
	for _, b := range hold {
		b.Release()
	}
	if err := <-waited; err != nil {
		t.Error(err, p.Stats())
	}

	// Not so when none is; and other errors than a shortage cost no slab.
	must(p.Get(64)).Release()
	dev.Fail("reg_mr", syscall.EIO)
	slabs := p.Stats().Slabs
	if _, err := p.Get(5000); !errors.Is(err, syscall.EIO) || errors.Is(err, ErrPoolExhausted) || p.Stats().Slabs != slabs {
		t.Errorf("%v, %+v", err, p.Stats())
	}
	dev.Fail("reg_mr", syscall.ENOMEM)
	if _, err := p.Get(memory); !errors.Is(err, syscall.ENOMEM) || errors.Is(err, ErrPoolExhausted) {
		t.Error(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}
