package rxe

import (
	"fmt"
	"math/bits"
	"sync/atomic"
	"unsafe"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/ring"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A queue is a struct rxe_queue_buf that the driver and this process have mapped: a power of two of slots of equal size
// between two indices, which are kept masked; one slot is always unused.
//
// Who writes what: of a send, receive or shared receive queue this process writes slots and producer, the kernel consumer; of
// a completion queue the other way around. Each side publishes its index with a release store after it is done with the slot,
// and loads the other's with acquire before it touches one. Neither reads its own index back from memory.
type queue struct {
	mem    []byte
	base   unsafe.Pointer // of slot 0
	theirs *uint32        // the index that the kernel writes
	ours   *uint32        // the index that this process writes
	at     uint32         // the same, private: what was published last
	mask   uint32
	shift  uint8
}

// A direction is who writes the slots.
type direction bool

const (
	toKernel   direction = true
	fromKernel direction = false
)

// newQueue looks at a mapping, and believes the kernel's geometry only if it fits the mapping, and elements of size bytes.
func newQueue(mem []byte, size int, d direction) (queue, error) {
	const head = abi.RxeQueueBufDataOffset
	if len(mem) < head {
		return queue{}, fmt.Errorf("the kernel's queue has %d bytes, fewer than its head", len(mem))
	}
	// Safe: mem is a mapping of at least the head's size, page aligned.
	b := (*abi.RxeQueueBuf)(unsafe.Pointer(unsafe.SliceData(mem)))
	shift, mask := b.Log2ElemSize, b.IndexMask
	switch {
	case shift > 16 || 1<<shift < size:
		return queue{}, fmt.Errorf("the kernel's queue has elements of 2^%d bytes, and %d are needed", shift, size)
	case mask == 0 || mask&(mask+1) != 0:
		return queue{}, fmt.Errorf("the kernel's queue has %d slots, which is no power of two above 1", uint64(mask)+1)
	case bits.Len32(mask)+int(shift) > 40 || uint64(len(mem)-head)>>shift < uint64(mask)+1:
		return queue{}, fmt.Errorf("the kernel's queue of %d slots of 2^%d bytes does not fit its %d bytes", uint64(mask)+1, shift, len(mem))
	}
	// Safe: the slots are within mem, as was just checked.
	q := queue{mem: mem, base: unsafe.Pointer(&mem[head]), mask: mask, shift: uint8(shift)}
	if d == toKernel {
		q.ours, q.theirs = &b.ProducerIndex, &b.ConsumerIndex
	} else {
		q.ours, q.theirs = &b.ConsumerIndex, &b.ProducerIndex
	}
	q.at = atomic.LoadUint32(q.ours) & mask
	return q, nil
}

// slot is where element i lies.
func (q *queue) slot(i uint32) unsafe.Pointer {
	// Safe: i is masked, and newQueue has checked that every masked slot lies in the mapping.
	return unsafe.Add(q.base, uintptr(i&q.mask)<<q.shift)
}

// room is how many elements can be written; the queue is toKernel.
func (q *queue) room() uint32 { return (atomic.LoadUint32(q.theirs) - q.at - 1) & q.mask }

// filled is how many elements wait to be read; the queue is fromKernel.
func (q *queue) filled() uint32 { return (atomic.LoadUint32(q.theirs) - q.at) & q.mask }

// publish tells the kernel of n more elements written, or read.
func (q *queue) publish(n uint32) {
	q.at = (q.at + n) & q.mask
	ring.StoreRel32(q.ours, q.at)
}

// did reports whether the kernel has done the local operation in slot i of a send queue. The status says nothing: older kernels (6.1)
// write there that a request was flushed when the queue pair fails, also if it was done; what fails has another state.
func (q *queue) did(i uint32) bool { return q.state(i) == wqeDone }

// enum wqe_state of what is in a slot of a send queue; it is in no header for user space.
const (
	wqeDone  = 3
	wqeError = 4
)

func (q *queue) state(i uint32) uint32 {
	return atomic.LoadUint32(&view[abi.RxeSendWQE](q.slot(i), 0).State)
}

// waiting looks at the requests of a send queue that have not completed: where the first is, if there are some, and whether it is stuck: the
// kernel has failed one behind it, and not this.
func (q *queue) waiting() (head uint32, some, stuck bool) {
	head = atomic.LoadUint32(q.theirs) & q.mask
	for i := head; i != q.at; i = (i + 1) & q.mask {
		if q.state(i) == wqeError {
			return head, true, i != head
		}
	}
	return head, head != q.at, false
}

// forget drops what the kernel has not taken; it must not be looking.
func (q *queue) forget() {
	q.at = atomic.LoadUint32(q.theirs) & q.mask
	ring.StoreRel32(q.ours, q.at)
}

const (
	sendWQEBytes = unsafe.Sizeof(abi.RxeSendWQE{})
	recvWQEBytes = unsafe.Sizeof(abi.RxeRecvWQE{})
	sgeBytes     = unsafe.Sizeof(abi.RxeSGE{})
	wcBytes      = unsafe.Sizeof(abi.WC{})
)

// sendSize and recvSize are the bytes that an element with n scatter/gather elements, or n bytes of inline data, has.
func sendSize(sges, inline int) int { return int(sendWQEBytes) + max(sges*int(sgeBytes), inline) }
func recvSize(sges int) int         { return int(recvWQEBytes) + sges*int(sgeBytes) }

// view is the T at off in a slot.
func view[T any](slot unsafe.Pointer, off uintptr) *T {
	// Safe: a slot holds what its queue's elements are made of, as newQueue has checked; T and off are of that layout.
	return (*T)(unsafe.Add(slot, off))
}

// views is the n Ts at off in a slot.
func views[T any](slot unsafe.Pointer, off uintptr, n int) []T {
	// Safe: as in view; the caller has checked that n fit.
	return unsafe.Slice((*T)(unsafe.Add(slot, off)), n)
}

// extra is what a send work request needs besides what it says itself.
type extra struct {
	flags  uint32 // enum ib_send_flags
	ud     bool
	qkey   ib.QKey // UD only
	window ib.RKey // bind only: the window's current key
}

// putSend writes a send work request. Every field of the head is written: the kernel's of the slot's last use must not stay.
// The caller has checked that the elements, or the inline data, fit.
func putSend(slot unsafe.Pointer, wr *ib.SendWR, e extra) {
	w := view[abi.RxeSendWQE](slot, 0)
	*w = abi.RxeSendWQE{}
	w.WR.WRID, w.WR.Opcode = wr.ID, uint32(wr.Opcode)
	w.DMA.NumSGE = uint32(len(wr.SGEs))
	switch wr.Opcode {
	case ib.OpRDMAWriteWithImm, ib.OpRDMAWrite, ib.OpRDMARead:
		w.WR.Ex = uint32(abi.ToBE32(wr.Imm))
		r := view[abi.RxeSendWRRdma](slot, abi.RxeSendWRRdmaRemoteAddrOffset)
		r.RemoteAddr, r.RKey = wr.RemoteAddr, uint32(wr.RKey)
		w.IOVA = wr.RemoteAddr
	case ib.OpSendWithImm, ib.OpSend:
		w.WR.Ex = uint32(abi.ToBE32(wr.Imm))
		if e.ud {
			u := view[abi.RxeSendWRUD](slot, abi.RxeSendWRRdmaRemoteAddrOffset)
			u.RemoteQPN, u.RemoteQKey, u.AHNum = uint32(wr.RemoteQPN), uint32(e.qkey), uint32(wr.AH)
		}
	case ib.OpSendWithInv, ib.OpLocalInv:
		w.WR.Ex = uint32(wr.InvalidateRKey)
	case ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd:
		a := view[abi.RxeSendWRAtomic](slot, abi.RxeSendWRRdmaRemoteAddrOffset)
		a.RemoteAddr, a.CompareAdd, a.Swap, a.RKey = wr.RemoteAddr, wr.CompareAdd, wr.Swap, uint32(wr.RKey)
		w.IOVA = wr.RemoteAddr
	case ib.OpBindMW:
		m := view[abi.RxeSendWRMW](slot, abi.RxeSendWRRdmaRemoteAddrOffset)
		b := wr.Bind
		m.Addr, m.Length, m.MRLKey, m.MWRKey, m.RKey, m.Access = b.Addr, b.Length, uint32(b.MRLKey), uint32(e.window), uint32(b.RKey), uint32(b.Access)
	}
	w.WR.SendFlags = e.flags
	if len(wr.Inline) > 0 {
		copy(views[byte](slot, sendWQEBytes, len(wr.Inline)), wr.Inline)
		w.DMA.Length = uint32(len(wr.Inline))
	} else {
		w.DMA.Length = putSGEs(views[abi.RxeSGE](slot, sendWQEBytes, len(wr.SGEs)), wr.SGEs)
	}
	w.DMA.Resid = w.DMA.Length
}

// putFlush writes a FLUSH.
func putFlush(slot unsafe.Pointer, wr *ib.SendWR, flags uint32) {
	w := view[abi.RxeSendWQE](slot, 0)
	*w = abi.RxeSendWQE{}
	w.WR.WRID, w.WR.Opcode, w.WR.SendFlags = wr.ID, uint32(wr.Opcode), flags
	f := view[abi.RxeSendWRFlush](slot, abi.RxeSendWRFlushRemoteAddrOffset)
	f.RemoteAddr, f.Length, f.RKey, f.Type, f.Level = wr.RemoteAddr, wr.Flush.Length, uint32(wr.RKey), uint8(wr.Flush.Placement), uint8(wr.Flush.Level)
	w.IOVA = wr.RemoteAddr
	w.DMA.Length, w.DMA.Resid = wr.Flush.Length, wr.Flush.Length
}

// putAtomicWrite writes an ATOMIC_WRITE of word. The slot has room for it: of 16 bytes of elements or inline data at least.
func putAtomicWrite(slot unsafe.Pointer, wr *ib.SendWR, flags uint32, word [8]byte) {
	w := view[abi.RxeSendWQE](slot, 0)
	*w = abi.RxeSendWQE{}
	w.WR.WRID, w.WR.Opcode, w.WR.SendFlags = wr.ID, uint32(wr.Opcode), flags
	r := view[abi.RxeSendWRRdma](slot, abi.RxeSendWRRdmaRemoteAddrOffset)
	r.RemoteAddr, r.RKey = wr.RemoteAddr, uint32(wr.RKey)
	w.IOVA = wr.RemoteAddr
	*view[[8]byte](slot, sendWQEBytes) = word
	w.DMA.Length, w.DMA.Resid = 8, 8
}

// putSGEs writes scatter/gather elements, and returns the sum of their lengths.
func putSGEs(out []abi.RxeSGE, sges []ib.SGE) (length uint32) {
	for i := range out {
		s := &sges[i]
		out[i] = abi.RxeSGE{Addr: s.Addr, Length: s.Length, LKey: uint32(s.LKey)}
		length += s.Length
	}
	return length
}

// putRecv writes a receive work request. The caller has checked that the elements fit.
func putRecv(slot unsafe.Pointer, wr *ib.RecvWR) {
	w := view[abi.RxeRecvWQE](slot, 0)
	n := putSGEs(views[abi.RxeSGE](slot, recvWQEBytes, len(wr.SGEs)), wr.SGEs)
	*w = abi.RxeRecvWQE{WRID: wr.ID, DMA: abi.RxeDMAInfo{Length: n, Resid: n, NumSGE: uint32(len(wr.SGEs))}}
}

// wc views a slot of a completion queue, until it is given back.
func wc(slot unsafe.Pointer) *abi.WC { return view[abi.WC](slot, 0) }
