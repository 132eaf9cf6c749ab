//go:build amd64 || arm64

package mlx5

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/uverbs"
)

// Memory that the device reads or writes on its own: anonymous, shared so that a fork does not part it from the pages that the
// kernel has pinned, and not of files, of which a process has only so many.

// mapPages returns zeroed memory of whole pages, for at least n bytes.
func mapPages(n int) ([]byte, error) {
	page := unix.Getpagesize()
	n = (n + page - 1) &^ (page - 1)
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("%d bytes of memory for a queue: %w", n, err)
	}
	return mem, nil
}

// unmapPages gives memory back. nil is none.
func unmapPages(mem []byte) error {
	if mem == nil {
		return nil
	}
	return unix.Munmap(mem)
}

// at points at off in mem, of which n bytes from there on are used.
func at(mem []byte, off, n int) unsafe.Pointer {
	_ = mem[off : off+n]
	// Safe: the bytes are within mem, which is mapped memory and stays until its queue is closed.
	return unsafe.Pointer(unsafe.SliceData(mem[off:]))
}

// records hands out doorbell records: two numbers of 32 bits, each in a cache line of its own.
type records struct {
	mu    sync.Mutex
	pages [][]byte  // guarded by mu
	free  []*record // guarded by mu
}

// A record is a pair of doorbell records, which the device may read at any time until its queue is destroyed.
type record struct {
	word [2]*recordWord
	addr uint64
}

// What the words of a record are, by the kind of its queue.
const (
	recvWord  = 0 // receives posted
	sendWord  = 1 // blocks of requests posted
	indexWord = 0 // completions polled
	armWord   = 1
)

const recordBytes = 64 // a cache line

// take returns a record of zeros.
func (r *records) take() (*record, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.free) == 0 {
		mem, err := mapPages(1)
		if err != nil {
			return nil, err
		}
		r.pages = append(r.pages, mem)
		addr := uverbs.AddrOf(mem)
		for off := 0; off < len(mem); off += recordBytes {
			// Safe: both words are within the page, and aligned.
			w := (*[2]recordWord)(at(mem, off, 8))
			r.free = append(r.free, &record{word: [2]*recordWord{&w[0], &w[1]}, addr: addr + uint64(off)})
		}
	}
	last := len(r.free) - 1
	rec := r.free[last]
	r.free = r.free[:last]
	rec.clear()
	return rec, nil
}

// clear makes both words 0.
func (r *record) clear() {
	publish(r.word[0], 0)
	publish(r.word[1], 0)
}

// give takes a record back, at which the device does not look any more. nil is none.
func (r *records) give(rec *record) {
	if rec == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.free = append(r.free, rec)
}

// close unmaps the records.
func (r *records) close() (err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.pages {
		err = errors.Join(err, unmapPages(p))
	}
	r.pages, r.free = nil, nil
	return err
}

// registerAt is a register at off in a mapping.
func registerAt(mem []byte, off int) *register {
	// Safe: at has checked that it is within the mapping; off is a multiple of 8. It is only written, by doorbell and blueFlame.
	return (*register)(at(mem, off, 8))
}

// bytesOf is p for blueFlame.
func bytesOf(p unsafe.Pointer) *byte {
	// Safe: only assembly reads it, which is told how much.
	return (*byte)(p)
}

// firstWord is what a send element begins with, as a doorbell register takes it.
func firstWord(p unsafe.Pointer) uint64 {
	return get[uint64](p, 0)
}

// pastEnd is where n bytes from p on end. It is compared with, and never read.
func pastEnd(p unsafe.Pointer, n int) unsafe.Pointer {
	// Safe: p is no memory of the garbage collector's.
	return unsafe.Add(p, n)
}
