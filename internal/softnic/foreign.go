package softnic

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Foreign memory is another process', which this NIC works for without its help: no slice shows it, two functions reach it. With peers
// in other processes it is used as private memory is: receives are staged, one-sided operations are done by this NIC. Peers of this
// process call the functions themselves.

// ForeignMemory is the address space of another process. Its methods may be called by several goroutines at a time, with locks of
// the NIC held: they may take as long as a copy does, and do not call the NIC. An error that is os.ErrProcessDone says that there is
// no such address space any more.
type ForeignMemory interface {
	// ReadAt fills p from address va on.
	ReadAt(p []byte, va uint64) error
	// WriteAt writes p to address va on.
	WriteAt(p []byte, va uint64) error
}

// RegisterForeign registers length bytes at start of another process' memory. SGEs and peers know them by addresses from iova on.
//
// Where an access fails, a request of this NIC gets WCLocalProtErr, one of a peer WCRemoteOpErr. But nobody outlives a process to see
// what is wrong with its memory: what goes to an address space that has ended is dropped, as a device writes to pages that nobody looks
// at any more, and what a peer wants to have from it has no answer, as if its QP had ended already, which it is about to.
//
// Atomics are atomic with each other, whichever NIC of this process they come through, but not with what the other process'
// CPUs do meanwhile: as ConnectX has it, too (IBV_ATOMIC_HCA). Words are read and written by one copy of 8 bytes each, which
// usual kernels do not tear, though nothing promises that.
func (pd *PD) RegisterForeign(m ForeignMemory, start, length, iova uint64, access ib.Access) (driver.MR, error) {
	if err := access.Check(); err != nil {
		return nil, err
	}
	if a := access &^ (ib.AccessLocalWrite | ib.AccessRemote | ib.AccessMWBind | ib.AccessOnDemand | ib.AccessHugeTLB | ib.AccessRelaxedOrdering); a != 0 {
		return nil, fmt.Errorf("%v of another process' memory: %w", a, errors.ErrUnsupported)
	}
	if length == 0 || start+length < start || iova+length < iova {
		return nil, fmt.Errorf("a region of %d bytes at %#x, with addresses from %#x on, is none", length, start, iova)
	}
	return pd.register(&region{nic: pd.nic, pd: pd, foreign: m, foreignAt: start, memAt: iova, base: iova, length: length,
		access: access, fd: -1})
}

// load copies from the region to dst; contains has checked addr. A status other than WCSuccess is for the peer that wants it:
// WCRemoteOpErr, or WCRetryExceeded if it is to hear nothing.
func (r *region) load(dst []byte, addr uint64) ib.WCStatus {
	if r.foreign == nil {
		dma(dst, r.bytes(addr, uint32(len(dst))))
		return ib.WCSuccess
	}
	switch err := r.foreign.ReadAt(dst, r.foreignAt+(addr-r.memAt)); {
	case err == nil:
		return ib.WCSuccess
	case errors.Is(err, os.ErrProcessDone):
		return ib.WCRetryExceeded
	}
	return ib.WCRemoteOpErr
}

// store copies src to the region; contains has checked addr. false: the memory cannot be written.
func (r *region) store(addr uint64, src []byte) bool {
	if r.foreign != nil {
		err := r.foreign.WriteAt(src, r.foreignAt+(addr-r.memAt))
		return err == nil || errors.Is(err, os.ErrProcessDone)
	}
	dma(r.bytes(addr, uint32(len(src))), src)
	return true
}

// foreignAtomics makes atomics on foreign memory atomic with each other. It is one lock for all, since two regions, of two
// processes even, may be the same memory.
var foreignAtomics struct {
	sync.Mutex
	word [8]byte // a local array would be on the heap: foreign memory is behind an interface
}

// atomic executes an atomic, or an ATOMIC_WRITE of swap, on the 8 bytes at addr, which contains has checked, and returns the old value.
func (r *region) atomic(addr uint64, op ib.Opcode, compareAdd, swap uint64) (old uint64, st ib.WCStatus) {
	if r.foreign == nil {
		w := word64At(r.mem, addr-r.memAt)
		if w == nil {
			return 0, ib.WCRemoteInvalidReqErr
		}
		return doAtomic(w, op, compareAdd, swap), ib.WCSuccess
	}
	if (addr|(r.foreignAt+addr-r.memAt))&7 != 0 {
		return 0, ib.WCRemoteInvalidReqErr
	}
	foreignAtomics.Lock()
	defer foreignAtomics.Unlock()
	b := foreignAtomics.word[:]
	if st := r.load(b, addr); st != ib.WCSuccess {
		return 0, st
	}
	old = binary.NativeEndian.Uint64(b)
	next := swap
	switch {
	case op == ib.OpAtomicFetchAdd:
		next = old + compareAdd
	case op == ib.OpAtomicCmpSwap && old != compareAdd:
		return old, ib.WCSuccess
	}
	binary.NativeEndian.PutUint64(b, next)
	if !r.store(addr, b) {
		return 0, ib.WCRemoteOpErr
	}
	return old, ib.WCSuccess
}

// foreignPiece is how much of foreign memory is copied at a time where it takes a buffer between.
const foreignPiece = 1 << 20

// piece returns a buffer of n bytes, up to foreignPiece. Called with sq held, until which is let go it is the caller's.
func (q *QP) piece(n uint32) []byte {
	if uint32(len(q.between)) < n {
		q.between = make([]byte, max(n, 4096))
	}
	return q.between[:n]
}

// fetch reads the payload of a request, n bytes of which local has no slice, before anything of the peer's is touched. It returns
// nil if none of it is foreign, or it is long: then gather reads it where it goes. Called with sq held.
func (q *QP) fetch(wr *ib.SendWR, n uint32) ([]byte, ib.WCStatus) {
	if n == 0 || n > foreignPiece {
		return nil, ib.WCSuccess
	}
	for i := range wr.SGEs {
		if r := q.nic.regions.lookup(uint32(wr.SGEs[i].LKey)); r != nil && r.foreign != nil {
			b := q.piece(n)
			if !q.gather(b, wr, 0) {
				return nil, ib.WCLocalProtErr
			}
			return b, ib.WCSuccess
		}
	}
	return nil, ib.WCSuccess
}

// execForeign executes a one-sided operation of n bytes on foreign memory of a NIC of this process; b is the local memory if it is
// in one piece. Called between enter and leave.
func (q *QP) execForeign(v *peerView, r *region, wr *ib.SendWR, b []byte, n uint32) (ib.WCStatus, stallKind) {
	switch wr.Opcode {
	case ib.OpAtomicCmpSwap, ib.OpAtomicFetchAdd:
		old, st := r.atomic(wr.RemoteAddr, wr.Opcode, wr.CompareAdd, wr.Swap)
		if st != ib.WCSuccess {
			return q.foreignFault(v, st)
		}
		putHost64(q.result[:], old)
		if !q.scatter(wr, q.result[:], 0) {
			st = ib.WCLocalProtErr
		}
		return st, stallNone
	}
	read := wr.Opcode == ib.OpRDMARead
	for off := uint32(0); off < n; {
		k := min(n-off, foreignPiece)
		p := b
		if p != nil {
			p = p[off : off+k]
		} else if p = q.piece(k); !read && !q.gather(p, wr, off) {
			return ib.WCLocalProtErr, stallNone
		}
		st, addr := ib.WCSuccess, wr.RemoteAddr+uint64(off)
		if read {
			st = r.load(p, addr)
		} else if !r.store(addr, p) {
			st = ib.WCRemoteOpErr
		}
		switch {
		case st != ib.WCSuccess:
			return q.foreignFault(v, st)
		case read && b == nil && !q.scatter(wr, p, off):
			return ib.WCLocalProtErr, stallNone
		}
		off += k
	}
	return ib.WCSuccess, stallNone
}

// storePart copies n bytes of a request's payload, from byte skip on, to a region of the peer's, at addr. st is the peer's fault, ok
// false ours.
func (q *QP) storePart(r *remoteRegion, addr uint64, n uint32, wr *ib.SendWR, skip uint32) (st ib.WCStatus, ok bool) {
	if r.own == nil {
		return ib.WCSuccess, q.gather(r.bytes(addr, n), wr, skip)
	}
	for off := uint32(0); off < n; {
		p := q.piece(min(n-off, foreignPiece))
		switch {
		case !q.gather(p, wr, skip+off):
			return ib.WCSuccess, false
		case !r.own.store(addr+uint64(off), p):
			return ib.WCLocalProtErr, true
		}
		off += uint32(len(p))
	}
	return ib.WCSuccess, true
}

// foreignFault tells the responder what was wrong with its memory, if there is one still: else the request waits as for a QP that is
// not there.
func (q *QP) foreignFault(v *peerView, st ib.WCStatus) (ib.WCStatus, stallKind) {
	switch st {
	case ib.WCRetryExceeded:
		return 0, stallPeer
	case ib.WCRemoteInvalidReqErr:
		st = q.invalidFault(v)
	case ib.WCRemoteOpErr:
		q.fault(v, ib.EventQPFatal)
	}
	return st, stallNone
}
