//go:build amd64 || arm64

package mlx5

import (
	"math/bits"
	"sync/atomic"
	"unsafe"
)

// A ringOfCQEs is where the device writes completions: a power of two of them, which it writes over and over. The lowest bit of the
// last byte of each is the owner bit: it changes each time round, so that the poller sees which are new. Who writes what, and in
// which order, is in doorbell.go.
type ringOfCQEs struct {
	mem  []byte // nil: there is none
	base unsafe.Pointer
	mask uint32
	log  uint8 // of the number of completions
}

// newRing makes one of n completions, a power of two, none of which has been written.
func newRing(n uint32) (r ringOfCQEs, err error) {
	if r.mem, err = mapPages(int(n) * cqeBytes); err != nil {
		return r, err
	}
	r.base, r.mask, r.log = at(r.mem, 0, int(n)*cqeBytes), n-1, uint8(bits.TrailingZeros32(n))
	for i := range n {
		put[uint8](r.at(i), 63, cqeFresh)
	}
	return r, nil
}

func (r *ringOfCQEs) at(i uint32) cqe {
	// Safe: base is memory of mask+1 completions.
	return unsafe.Add(r.base, uintptr(i&r.mask)*cqeBytes)
}

// ready reports whether completion i has been written, and returns its last word.
func (r *ringOfCQEs) ready(i uint32) (e cqe, tail uint32, ok bool) {
	e = r.at(i)
	// Safe: the last four bytes of the completion, which are aligned. The load is before those of the rest: see fromDevice.
	tail = atomic.LoadUint32((*uint32)(unsafe.Add(e, 60)))
	return e, tail, uint8(tail>>28) != cqeNever && tail>>24&cqeOwner == i>>r.log&1
}

// own makes completion i, which was copied here, look as if the device had written it this time round.
func (r *ringOfCQEs) own(i uint32) {
	e := r.at(i)
	put(e, 63, get[uint8](e, 63)&^cqeOwner|uint8(i>>r.log&1))
}

// copyTo copies completion i to j of to.
func (r *ringOfCQEs) copyTo(i uint32, to *ringOfCQEs, j uint32) {
	// Safe: both are completions of rings that are there.
	*(*[cqeBytes]byte)(to.at(j)) = *(*[cqeBytes]byte)(r.at(i))
	to.own(j)
}

// A cqe is a completion that the device has written.
type cqe = unsafe.Pointer

// What a completion says. The fields of a last word: counter in bits 0 to 15, big-endian, opcode in 28 to 31.
func cqeCode(tail uint32) uint8     { return uint8(tail >> 28) }
func cqeFormat(tail uint32) uint8   { return uint8(tail>>24) & cqeFormatBits }
func cqeCounter(tail uint32) uint16 { return bits.ReverseBytes16(uint16(tail)) }
func cqeSLID(e cqe) uint16          { return bits.ReverseBytes16(get[uint16](e, 22)) }
func cqeFlagsAndQPN(e cqe) uint32   { return be32(get[uint32](e, 24)) }
func cqeHeaders(e cqe) uint16       { return get[uint16](e, 28) } // of a frame: in the lower byte what of it is right, in the upper one what it is
func cqeIndex(e cqe) uint32         { return be32(get[uint32](e, 32)) & number24 }
func cqeImm(e cqe) uint32           { return be32(get[uint32](e, 36)) }
func cqeLength(e cqe) uint32        { return be32(get[uint32](e, 44)) }
func cqeVendorSyndrome(e cqe) uint8 { return get[uint8](e, 54) }
func cqeSyndrome(e cqe) uint8       { return get[uint8](e, 55) }
func cqeOpcodeAndQPN(e cqe) uint32  { return be32(get[uint32](e, 56)) }
