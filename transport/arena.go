package transport

import (
	"errors"
	"sync"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// poison makes slots that are given back unreadable: tests set it to find uses after the end of a loan.
var poison = false

const poisonByte = 0xdb

// slotStride is the size of a slot for payload bytes: whole cache lines, and never a multiple of a page alone, because
// then the headers of all slots would compete for the same few cache sets.
func slotStride(payload int) int {
	n := (payload + headerLen + 63) &^ 63
	if n%4096 == 0 {
		n += 64
	}
	return n
}

// An arena hands out slots of one size from registered slabs. Slabs are kept until close. It is safe for concurrent use.
type arena struct {
	pd     *verbs.PD
	stride int

	mu    sync.Mutex
	slabs []*mr.MR
	free  []slot
	out   int
}

// slot is a piece of registered memory.
type slot struct {
	mem []byte
	sge ib.SGE // all of it
}

const (
	firstSlab = 128 << 10
	laterSlab = 2 << 20
)

func (a *arena) get() (slot, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.free) == 0 {
		size := firstSlab
		if len(a.slabs) > 0 {
			size = min(laterSlab, firstSlab<<len(a.slabs))
		}
		n := max(size/a.stride, 2)
		m, err := mr.Alloc(a.pd, n*a.stride, ib.AccessLocalWrite)
		if err != nil {
			return slot{}, err
		}
		a.slabs = append(a.slabs, m)
		for i := n - 1; i >= 0; i-- {
			off := i * a.stride
			a.free = append(a.free, slot{m.Bytes()[off : off+a.stride : off+a.stride], m.SGE(off, a.stride)})
		}
	}
	s := a.free[len(a.free)-1]
	a.free = a.free[:len(a.free)-1]
	a.out++
	return s, nil
}

func (a *arena) put(s slot) {
	if poison {
		for i := range s.mem {
			s.mem[i] = poisonByte
		}
	}
	a.mu.Lock()
	a.free = append(a.free, s)
	a.out--
	a.mu.Unlock()
}

func (a *arena) close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	for _, m := range a.slabs {
		errs = append(errs, m.Close())
	}
	a.slabs, a.free = nil, nil
	return errors.Join(errs...)
}
