package ring

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func rounds(n int) int {
	if testing.Short() {
		return n / 10
	}
	return n
}

// Many goroutines, more than cores, and holders that are preempted: the lock excludes, and nobody waits for ever.
func TestSpinLock(t *testing.T) {
	var l SpinLock
	var wg sync.WaitGroup
	counter := 0 // plain: the lock is what orders its accesses, for the race detector as well
	each := rounds(20000)
	for g := range 8 {
		wg.Go(func() {
			for i := range each {
				l.Lock()
				counter++
				if i%1000 == g {
					runtime.Gosched() // as if the holder lost its core
				}
				l.Unlock()
			}
		})
	}
	wg.Wait()
	if counter != 8*each {
		t.Errorf("%d increments are left of %d", counter, 8*each)
	}
}

// Whoever had to wait holds the lock as well.
func TestSpinLockSlow(t *testing.T) {
	var l SpinLock
	l.lockSlow()
	if l.v != 1 {
		t.Errorf("the lock is %d", l.v)
	}
	got := make(chan struct{})
	go func() { l.Lock(); close(got) }()
	select {
	case <-got:
		t.Error("two hold it")
	case <-time.After(10 * time.Millisecond):
	}
	l.Unlock()
	<-got
	if l.v != 1 {
		t.Errorf("the lock is %d", l.v)
	}
}

// What was written before a release store is seen by whoever sees the store: a ring of plain words behind an index.
func TestStoreRelOrders(t *testing.T) {
	t.Run("32", func(t *testing.T) {
		var tail, head uint32
		produce(t, func(v uint32) { StoreRel32(&tail, v) }, func() uint32 { return atomic.LoadUint32(&tail) },
			func(v uint32) { StoreRel32(&head, v) }, func() uint32 { return atomic.LoadUint32(&head) })
	})
	t.Run("64", func(t *testing.T) {
		var tail, head uint64
		produce(t, func(v uint32) { StoreRel64(&tail, uint64(v)) }, func() uint32 { return uint32(atomic.LoadUint64(&tail)) },
			func(v uint32) { StoreRel64(&head, uint64(v)) }, func() uint32 { return uint32(atomic.LoadUint64(&head)) })
	})
}

func produce(t *testing.T, setTail func(uint32), tail func() uint32, setHead func(uint32), head func() uint32) {
	const size = 64
	var slots [size][4]uint64 // plain words
	total := uint32(rounds(300000))
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := uint32(0); i != total; {
			if i-head() == size {
				runtime.Gosched()
				continue
			}
			s := &slots[i%size]
			for k := range s {
				s[k] = uint64(i) * uint64(k+1)
			}
			i++
			setTail(i)
		}
	})
	for i := uint32(0); i != total; {
		n := tail()
		if n == i {
			runtime.Gosched()
			continue
		}
		for ; i != n; i++ {
			for k, v := range slots[i%size] {
				if v != uint64(i)*uint64(k+1) {
					t.Errorf("entry %d, word %d: %d", i, k, v)
				}
			}
		}
		setHead(i)
	}
	wg.Wait()
}

func TestStoreRelValues(t *testing.T) {
	a := [3]uint32{1, 2, 3}
	StoreRel32(&a[1], 0xfedcba98)
	b := [3]uint64{1, 2, 3}
	StoreRel64(&b[1], 0xfedcba9876543210)
	AcquireFence()
	Pause()
	if a != [3]uint32{1, 0xfedcba98, 3} || b != [3]uint64{1, 0xfedcba9876543210, 3} {
		t.Errorf("%x %x", a, b)
	}
}
