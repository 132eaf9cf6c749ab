package siw

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A queue is an array that the driver and this process have mapped: a power of two of slots of equal size, and for completion
// queues a word behind them. Position i, counted from 0 for the life of the queue, is slot i modulo their number; each side
// counts for itself.
//
// Who writes what: a slot has a word of flags, with which its owner gives it away by a release store after it is done with
// the rest, and which the other side loads with acquire. Of a send or receive queue the process sets VALID and the kernel
// clears it; of a completion queue it is the other way around.
type queue struct {
	mem  []byte
	base unsafe.Pointer // of slot 0
	mask uint64
	size uintptr
}

const (
	sqeBytes  = unsafe.Sizeof(abi.SiwSQE{})
	rqeBytes  = unsafe.Sizeof(abi.SiwRQE{})
	cqeBytes  = unsafe.Sizeof(abi.SiwCQE{})
	ctrlBytes = unsafe.Sizeof(abi.SiwCQCtrl{})

	headAt   = unsafe.Offsetof(abi.SiwSQE{}.Flags) // of the word with the flags, in all elements
	inlineAt = unsafe.Offsetof(abi.SiwSQE{}.SGE) + unsafe.Sizeof(abi.SiwSGE{})
)

// The word with the flags is at the same place in all elements, and aligned.
var _ = [1]struct{}{}[headAt-unsafe.Offsetof(abi.SiwRQE{}.Flags)+headAt-unsafe.Offsetof(abi.SiwCQE{}.Flags)+headAt%4]

// newQueue looks at a mapping for n elements of size bytes, and tail bytes behind them. n is a power of two.
func newQueue(mem []byte, n uint32, size, tail uintptr) (queue, error) {
	if uint64(len(mem)) < uint64(n)*uint64(size)+uint64(tail) {
		return queue{}, fmt.Errorf("the kernel's queue of %d slots of %d bytes does not fit its %d bytes", n, size, len(mem))
	}
	// Safe: mem is a mapping, page aligned, and the slots are within it, as was just checked.
	return queue{mem: mem, base: unsafe.Pointer(unsafe.SliceData(mem)), mask: uint64(n) - 1, size: size}, nil
}

// len is the number of slots.
func (q *queue) len() int { return int(q.mask) + 1 }

// slot is where position i lies.
func (q *queue) slot(i uint64) unsafe.Pointer {
	// Safe: i is masked, and newQueue has checked that every masked slot lies in the mapping.
	return unsafe.Add(q.base, uintptr(i&q.mask)*q.size)
}

// behind is the word behind the slots of a completion queue, by which it is armed.
func (q *queue) behind() *uint32 {
	// Safe: newQueue has checked that the tail, which has at least this word, lies in the mapping.
	return (*uint32)(unsafe.Add(q.base, uintptr(q.mask+1)*q.size))
}

// view is the T at off in a slot.
func view[T any](slot unsafe.Pointer, off uintptr) *T {
	// Safe: a slot holds what its queue's elements are made of, as newQueue has checked; T and off are of that layout.
	return (*T)(unsafe.Add(slot, off))
}

// head loads the word with the flags of position i.
func (q *queue) head(i uint64) uint32 { return atomic.LoadUint32(view[uint32](q.slot(i), headAt)) }

// setHead stores it, after everything else of the slot.
func (q *queue) setHead(i uint64, w uint32) { ring.StoreRel32(view[uint32](q.slot(i), headAt), w) }

// wqeHead is the word with the flags of a send or receive element.
func wqeHead(flags uint16, sges, opcode uint8) uint32 {
	var b [4]byte
	binary.NativeEndian.PutUint16(b[:], flags)
	b[2], b[3] = sges, opcode
	return binary.NativeEndian.Uint32(b[:])
}

// wqeFree reports whether the kernel has taken a send or receive element: it clears the flags, and leaves the rest of the word.
func wqeFree(head uint32) bool { return head&wqeHead(0xffff, 0, 0) == 0 }

// cqeHead takes the word with the flags of a completion apart.
func cqeHead(head uint32) (flags, opcode uint8, status uint16) {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], head)
	return b[0], b[1], binary.NativeEndian.Uint16(b[2:])
}

// putSend writes all of a send element but the word with the flags, which it returns. id is what its completion will bear. The
// caller has checked that elements or inline data fit.
func (q *queue) putSend(i uint64, wr *ib.SendWR, opcode uint8, flags uint16) (head uint32) {
	slot := q.slot(i)
	w := view[abi.SiwSQE](slot, 0)
	w.ID, w.RAddr, w.RKey = i, wr.RemoteAddr, uint32(wr.RKey)
	if len(wr.Inline) > 0 {
		w.SGE[0] = abi.SiwSGE{Length: uint32(len(wr.Inline))}
		// Safe: the caller has checked that the inline data is not longer than what the elements from the second on have.
		copy(unsafe.Slice(view[byte](slot, inlineAt), len(wr.Inline)), wr.Inline)
		return wqeHead(flags|abi.SIW_WQE_INLINE, 1, opcode)
	}
	sges := putSGEs(&w.SGE, wr.SGEs)
	if n := w.SGE[0].Length; sges == 1 && n > 1 && n <= headerInline && opcode != abi.SIW_OP_READ {
		// A little payload in one element is copied from the caller's address, by the kernel's thread too if that takes over from a
		// doorbell that is not quite over (siw_try_1seg and in_syscall), and then the request fails. In two it is found by its region.
		w.SGE[1] = w.SGE[0]
		w.SGE[0].Length = n - 1
		w.SGE[1].LAddr += uint64(n - 1)
		w.SGE[1].Length = 1
		sges = 2
	}
	return wqeHead(flags, sges, opcode)
}

// headerInline is no less than what the kernel has room for beside a header (MAX_HDR_INLINE of siw_qp_tx.c).
const headerInline = 64

// putRecv writes a receive element likewise, with the completion's id.
func (q *queue) putRecv(i, id uint64, wr *ib.RecvWR) (head uint32) {
	w := view[abi.SiwRQE](q.slot(i), 0)
	w.ID = id
	return wqeHead(abi.SIW_WQE_VALID, putSGEs(&w.SGE, wr.SGEs), 0) // no other flag: the kernel compares
}

// putSGEs writes the elements that have bytes, and returns how many: on one without, the kernel stumbles over a region that it
// did not look up (siw_tx_hdt, Linux 6.1 to 6.12).
func putSGEs(to *[abi.SIW_MAX_SGE]abi.SiwSGE, sges []ib.SGE) (n uint8) {
	for i := range sges {
		if s := &sges[i]; s.Length > 0 {
			to[n] = abi.SiwSGE{LAddr: s.Addr, Length: s.Length, LKey: uint32(s.LKey)}
			n++
		}
	}
	return n
}

// cqe views a slot of a completion queue, until it is given back.
func (q *queue) cqe(i uint64) *abi.SiwCQE { return view[abi.SiwCQE](q.slot(i), 0) }
