//go:build amd64 || arm64

package mlx5

import (
	"fmt"
	"sync"
	"sync/atomic"
)

// A table has objects by numbers of 24 bits: queue pairs, shared receive queues, address handles. Lookups take no lock.
type table[T any] struct {
	mu     sync.Mutex
	leaves [1 << (24 - leafBits)]atomic.Pointer[leaf[T]] // written under mu
	room   uint32                                        // guarded by mu: add's numbers are below
	last   uint32                                        // guarded by mu: the number that add gave last
	full   int                                           // guarded by mu: how many of add's are in use
}

const leafBits = 12

type leaf[T any] [1 << leafBits]atomic.Pointer[T]

// get returns the object of that number, or nil.
func (t *table[T]) get(n uint32) *T {
	if n > number24 {
		return nil
	}
	l := t.leaves[n>>leafBits].Load()
	if l == nil {
		return nil
	}
	return l[n%(1<<leafBits)].Load()
}

// set gives a number that somebody else has chosen to an object; nil takes it away.
func (t *table[T]) set(n uint32, v *T) {
	t.mu.Lock()
	t.setLocked(n, v)
	t.mu.Unlock()
}

func (t *table[T]) setLocked(n uint32, v *T) {
	at := &t.leaves[n>>leafBits]
	if at.Load() == nil {
		at.Store(new(leaf[T]))
	}
	at.Load()[n%(1<<leafBits)].Store(v)
}

// add gives an object a number from 1 on. What remove has freed is given again as late as may be.
func (t *table[T]) add(v *T) (uint32, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.full+1 >= int(t.room) {
		if t.room > number24-(1<<leafBits) {
			return 0, fmt.Errorf("all %d numbers are in use", t.full)
		}
		t.last = max(t.room, 1) - 1
		t.room += 1 << leafBits
	}
	for {
		if t.last++; t.last >= t.room {
			t.last = 1
		}
		if t.get(t.last) == nil {
			t.setLocked(t.last, v)
			t.full++
			return t.last, nil
		}
	}
}

// remove frees a number that add gave.
func (t *table[T]) remove(n uint32) {
	t.mu.Lock()
	t.setLocked(n, nil)
	t.full--
	t.mu.Unlock()
}
