//go:build amd64 || arm64

package mlx5

import (
	"math/bits"
	"unsafe"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Both architectures are little-endian, and the device is not.
func be32(v uint32) uint32 { return bits.ReverseBytes32(v) }
func be64(v uint64) uint64 { return bits.ReverseBytes64(v) }

// put stores v at off from p.
func put[T uint8 | uint16 | uint32 | uint64](p unsafe.Pointer, off uintptr, v T) {
	// Safe: the caller writes within an element of its queue, aligned as the format has it.
	*(*T)(unsafe.Add(p, off)) = v
}

// get loads from off from p.
func get[T uint8 | uint16 | uint32 | uint64](p unsafe.Pointer, off uintptr) T {
	// Safe: the caller reads within an element of its queue, aligned as the format has it.
	return *(*T)(unsafe.Add(p, off))
}

// A sendQueue is where the device finds requests: a power of two of blocks. A request begins on a block, takes as many as it
// needs, and goes on at the beginning of the queue after the last one. Who writes what, and in which order, is in doorbell.go.
// Guarded by the queue pair's sendMu, but for what says otherwise.
type sendQueue struct {
	base unsafe.Pointer
	end  unsafe.Pointer
	mask uint32 // of blocks

	cur    uint32 // blocks written, ever
	head   uint32 // requests written, ever
	limit  uint32 // outstanding requests, at most
	record *recordWord

	sent []sent // by block; read by pollers for requests that posted tells of
}

// A wqe is where a request begins.
type wqe = unsafe.Pointer

// sent is what has to be known of a request when it is complete.
type sent struct {
	id    uint64
	head  uint32 // the queue's when it was posted
	block uint16 // where it begins, as the device counts
	op    ib.Opcode
}

// A cursor is where the next segment of a request goes that changes a memory key.
type cursor struct {
	p     unsafe.Pointer
	units uint32 // written so far
}

// block is where the request that begins at the cur-th block goes.
func (q *sendQueue) block(cur uint32) unsafe.Pointer {
	// Safe: base is memory of mask+1 blocks.
	return unsafe.Add(q.base, uintptr(cur&q.mask)*blockBytes)
}

// forward is n bytes behind p.
func forward(p unsafe.Pointer, n uintptr) unsafe.Pointer {
	// Safe: the caller stays within its queue, or looks for the queue's end before it goes on.
	return unsafe.Add(p, n)
}

// zero clears n units of a request, and returns where. They must not cross the end of the queue.
func (q *sendQueue) zero(c *cursor, n uint32) unsafe.Pointer {
	p := c.p
	for i := range uintptr(n) * 2 {
		put[uint64](p, 8*i, 0)
	}
	if c.p = forward(p, uintptr(n)*unitBytes); c.p == q.end {
		c.p = q.base
	}
	c.units += n
	return p
}

// putControl writes a request's first segment, which says how long it is, and so comes last.
func (q *sendQueue) putControl(p unsafe.Pointer, code uint8, qpn, units, flags, imm uint32) {
	put(p, 0, be64(uint64(q.cur&0xffff)<<40|uint64(code)<<32|uint64(qpn<<8|units)))
	put(p, 8, be64(uint64(flags)<<32|uint64(imm)))
}

// putEth writes the segment of a frame that is to have these checksums, and whose beginning is head. It returns how many units they take;
// what is behind head in the last one stays as it was.
func (q *sendQueue) putEth(p unsafe.Pointer, checksums uint8, head []byte) (n uint32) {
	put(p, 0, uint64(checksums)<<32)
	put(p, 8, uint64(bits.ReverseBytes16(uint16(len(head))))<<32)
	at := forward(p, ethHead)
	// Safe: up to the end of the queue, and of a request of the queue pair's MaxInline, which fits its blocks.
	to := unsafe.Slice((*byte)(at), min(len(head), int(uintptr(q.end)-uintptr(at))))
	if k := copy(to, head); k < len(head) {
		// Safe: likewise; the rest of such a request is at the beginning.
		copy(unsafe.Slice((*byte)(q.base), len(head)-k), head[k:])
	}
	return max(uint32(ethHead+len(head)+unitBytes-1)/unitBytes, 1)
}

// around is n units behind p, on from the beginning of the queue if that is past its end.
func (q *sendQueue) around(p unsafe.Pointer, n uint32) unsafe.Pointer {
	off := uintptr(p) - uintptr(q.base) + uintptr(n)*unitBytes
	if size := uintptr(q.end) - uintptr(q.base); off >= size {
		off -= size
	}
	// Safe: off is within the queue.
	return unsafe.Add(q.base, off)
}

// putRemote writes where in the peer's memory.
func putRemote(p unsafe.Pointer, addr uint64, key ib.RKey) {
	put(p, 0, be64(addr))
	put(p, 8, uint64(be32(uint32(key))))
}

// putOperands writes those of an atomic.
func putOperands(p unsafe.Pointer, wr *ib.SendWR) {
	if wr.Opcode == ib.OpAtomicCmpSwap {
		put(p, 0, be64(wr.Swap))
		put(p, 8, be64(wr.CompareAdd))
		return
	}
	put(p, 0, be64(wr.CompareAdd))
	put[uint64](p, 8, 0)
}

// putSGE writes a scatter/gather element.
func putSGE(p unsafe.Pointer, s *ib.SGE) {
	put(p, 0, be64(uint64(s.Length)<<32|uint64(s.LKey)))
	put(p, 8, be64(s.Addr))
}

// putEnd writes that there are no more elements.
func putEnd(p unsafe.Pointer) {
	put(p, 0, be64(endOfList))
	put[uint64](p, 8, 0)
}

// straight reports whether n bytes of inline data behind p end before the queue does.
func (q *sendQueue) straight(p unsafe.Pointer, n int) bool {
	return n+inlineHead <= int(uintptr(q.end)-uintptr(p))
}

// putData writes data into the request itself, where the queue is straight.
func putData(p unsafe.Pointer, data []byte) {
	put(p, 0, be32(inlineSegment|uint32(len(data))))
	at := forward(p, inlineHead)
	if n := len(data); n <= 32 && n >= 16 {
		// The usual sizes, without a call.
		// Safe: the first 16 of n bytes, for which there is room.
		*(*[16]byte)(at) = [16]byte(data)
		// Safe: the last 16 of them.
		*(*[16]byte)(unsafe.Add(at, n-16)) = [16]byte(data[n-16:])
		return
	}
	// Safe: the caller has looked for the room.
	copy(unsafe.Slice((*byte)(at), len(data)), data)
}

// putInline writes data into the request itself, and returns how many units they take. What is behind them in the last one stays as
// it was.
func (q *sendQueue) putInline(p unsafe.Pointer, data []byte) (n uint32) {
	if q.straight(p, len(data)) {
		putData(p, data)
		return inlineUnits(len(data))
	}
	put(p, 0, be32(inlineSegment|uint32(len(data))))
	at := forward(p, inlineHead)
	// Safe: up to the end of the queue.
	k := copy(unsafe.Slice((*byte)(at), uintptr(q.end)-uintptr(at)), data)
	// Safe: the request is of the queue pair's MaxInline, which fits its blocks; the rest of them is at the beginning.
	copy(unsafe.Slice((*byte)(q.base), len(data)-k), data[k:])
	return inlineUnits(len(data))
}

// inlineUnits is how many units n bytes of inline data take.
func inlineUnits(n int) uint32 { return uint32(inlineHead+n+unitBytes-1) / unitBytes }

// putAV writes where a datagram goes.
func putAV(p unsafe.Pointer, av *addressVector, qpn ib.QPN, key ib.QKey) {
	// Safe: 48 bytes behind the control segment's 16 end with the block.
	*(*[avBytes]byte)(p) = av.bytes
	put(p, 0, uint64(be32(uint32(key))))
	put(p, 8, be32(1<<31|uint32(qpn)&number24))
}

// putBind writes what makes a memory window open b's bytes to the peers of the queue pair qpn.
func (q *sendQueue) putBind(c *cursor, b *ib.BindMW, qpn uint32) {
	const (
		flags = 0x90 | 0x20 // inline, with an offset; only of a free key
		mask  = umrFree | umrKey | umrQPN | 1<<0 | 1<<6 | 1<<18 | 1<<19 | 1<<20 | 1<<21
		octos = 4 // KLMs are counted in half of 16 bytes, and rounded up to eight of them
	)
	p := q.zero(c, umrBytes/unitBytes)
	put[uint8](p, 0, flags)
	put(p, 4, bits.ReverseBytes16(octos))
	put(p, 8, be64(mask))
	p = q.zero(c, mkeyBytes/unitBytes)
	put(p, 2, keyRights(b.Access))
	put(p, 4, be32(qpn<<8|uint32(b.RKey)&0xff))
	if b.Access&ib.AccessZeroBased == 0 {
		put(p, 16, be64(b.Addr))
	}
	put(p, 24, be64(b.Length))
	p = q.zero(c, klmBytes/unitBytes)
	put(p, 0, be64(b.Length<<32|uint64(b.MRLKey))) // the length modulo 2^32, which is that of up to 2 GiB
	put(p, 8, be64(b.Addr))
}

// putInvalidate writes what makes a memory window open nothing.
func (q *sendQueue) putInvalidate(c *cursor) {
	const (
		flags = 0x90 | 0x08 // only of a key that is bound through this queue pair
		mask  = umrFree | umrKey | umrQPN
	)
	p := q.zero(c, umrBytes/unitBytes)
	put[uint8](p, 0, flags)
	put(p, 8, be64(uint64(mask)))
	p = q.zero(c, mkeyBytes/unitBytes)
	put[uint8](p, 0, 0x40) // free
	put(p, 4, be32(0xffffff00))
}

// What a UMR changes of a memory key, beside its length, start and rights.
const (
	umrFree = 1 << 29
	umrKey  = 1 << 13
	umrQPN  = 1 << 14
)

// keyRights are a memory key's.
func keyRights(a ib.Access) (r uint8) {
	for _, x := range [...]struct {
		a ib.Access
		r uint8
	}{{ib.AccessLocalWrite, 1 << 3}, {ib.AccessRemoteRead, 1 << 4}, {ib.AccessRemoteWrite, 1 << 5}, {ib.AccessRemoteAtomic, 1 << 6}} {
		if a&x.a != 0 {
			r |= x.r
		}
	}
	return r
}

// A recvQueue is where the device finds receives, in order: a power of two of slots of equal size. Guarded by recvMu.
type recvQueue struct {
	base   unsafe.Pointer
	mask   uint32
	limit  uint32 // slots; 0 of a queue pair with a shared queue
	shift  uint8
	record *recordWord
	head   uint32   // receives posted, ever
	ids    []uint64 // by slot; read by pollers for receives that posted tells of
}

func (q *recvQueue) slot(i uint32) unsafe.Pointer {
	// Safe: base is memory of mask+1 slots.
	return unsafe.Add(q.base, uintptr(i&q.mask)<<q.shift)
}

// putRecv writes a receive's elements into a slot with room for most of them.
func putRecv(p unsafe.Pointer, sges []ib.SGE, most int) error {
	if len(sges) > most {
		return driver.ErrTooManySGEs
	}
	n := uintptr(0)
	for i := range sges {
		s := &sges[i]
		if s.Length-1 >= maxSGELen {
			if s.Length == 0 {
				continue
			}
			return errSGELen
		}
		putSGE(forward(p, n), s)
		n += dataBytes
	}
	if n < uintptr(most)*dataBytes {
		putEnd(forward(p, n))
	}
	return nil
}
