// Package mem allocates the memory that devices and peers work in: outside the Go heap, page aligned, backed by huge
// pages where the system has them, and, on Linux, behind a sealed memory file that another process can map.
//
// About fork: a device's or a peer's view of memory is lost if the kernel gives the parent a copy-on-write page. That
// cannot happen here. Go programs do not fork without exec, os/exec clones with CLONE_VM, and the mappings are
// MAP_SHARED, which are never copied on write; so there is no MADV_DONTFORK. (Package uverbs has one, for what is registered with
// kernels before Linux 5.12.)
package mem

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
)

// HugePolicy says how hard Alloc tries to get huge pages.
type HugePolicy uint8

const (
	// HugeAuto takes reserved huge pages (hugetlbfs) for regions of at least one huge page if enough are free, else
	// asks for transparent ones, else takes ordinary pages.
	HugeAuto HugePolicy = iota
	// HugeNever takes ordinary pages.
	HugeNever
	// HugeRequire fails unless reserved huge pages back the whole region.
	HugeRequire
)

// Options describe an allocation. The zero value is good for most.
type Options struct {
	// Name is shown in /proc/PID/maps as /memfd:NAME. Default "ringside". At most 200 bytes count.
	Name string
	// Huge is the policy for huge pages.
	Huge HugePolicy
	// Populate touches every page now, so that later use takes no page faults and a shortage is an error here instead of
	// an out-of-memory kill there.
	Populate bool
	// OnNode asks for pages on NUMA node Node. A hint: other nodes are used when it is full, and systems without NUMA
	// ignore it.
	OnNode bool
	Node   int
}

// A Region is a piece of mapped memory. Its methods are safe for concurrent use; Close must come after the last use of
// Bytes, because touching unmapped memory kills the process.
type Region struct {
	mu     sync.Mutex
	mem    []byte // as mapped: whole pages
	bytes  []byte // what the caller sees
	fd     int
	page   int
	closed bool
}

// Bytes is the memory: as long as was asked for, rounded up to whole pages by Alloc. Nil after Close.
func (r *Region) Bytes() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.bytes
}

// FD is the sealed memory file that Bytes maps from offset 0, or -1 if there is none (other systems than Linux, and
// mappings made by MapFD). It belongs to the region.
func (r *Region) FD() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.fd
}

// PageSize is the size of the pages that the memory was asked for in: a huge page size only for reserved huge pages,
// since transparent ones come and go.
func (r *Region) PageSize() int { return r.page }

// Close unmaps the memory and closes the file. It may be called again.
func (r *Region) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	if err := r.unmap(); err != nil {
		return fmt.Errorf("mem: unmap %d bytes: %w", len(r.mem), err)
	}
	live.Add(-1)
	liveBytes.Add(-int64(len(r.mem)))
	r.closed, r.mem, r.bytes, r.fd = true, nil, nil, -1
	return nil
}

// ErrSize: the size is not positive or too large.
var ErrSize = errors.New("mem: invalid size")

var live, liveBytes atomic.Int64

// Live returns the number of regions that are open in this process and the bytes that they map, so that tests can
// count leaks.
func Live() (regions, bytes int64) { return live.Load(), liveBytes.Load() }

func count(r *Region) *Region {
	live.Add(1)
	liveBytes.Add(int64(len(r.mem)))
	return r
}

// PageSize is the system's ordinary page size.
func PageSize() int { return os.Getpagesize() }

// maxSize keeps rounding and pointer arithmetic free of overflow.
const maxSize = int(^uint(0)>>1) / 4

// roundUp rounds n up to a multiple of page, a power of two.
func roundUp(n, page int) int { return (n + page - 1) &^ (page - 1) }

// Alloc allocates at least size bytes of zeroed memory.
func Alloc(size int, opt Options) (*Region, error) {
	if size <= 0 || size > maxSize {
		return nil, fmt.Errorf("%w: %d bytes", ErrSize, size)
	}
	r, err := alloc(size, opt)
	if err != nil {
		return nil, err
	}
	return count(r), nil
}

// Errors of MapFD: what a peer's memory file lacks.
var (
	// ErrNotSealed: the file can still be shrunk by whoever holds it, which would make every access of ours a SIGBUS.
	ErrNotSealed = errors.New("mem: memory file is not sealed against shrinking")
	// ErrTooSmall: the file is smaller than was claimed.
	ErrTooSmall = errors.New("mem: memory file is smaller than claimed")
	// ErrNotMemory: the descriptor is no memory file.
	ErrNotMemory = errors.New("mem: descriptor is not a memory file")
)

// MapFD maps size bytes at offset off of a memory file that a peer has sent, which is not trusted: it is refused unless
// it is a memory file, sealed against shrinking, and as large as claimed. writable asks for write access, which a
// file that was opened or sealed read-only refuses. The descriptor stays the caller's, who may close it right away.
// off need not be page aligned.
//
// One hole cannot be closed here: whoever holds a file of reserved huge pages can punch holes into it, and touching one
// when no huge page is free is a SIGBUS. So take such files only from processes of the same user.
func MapFD(fd int, off int64, size int, writable bool) (*Region, error) {
	if size <= 0 || size > maxSize || off < 0 || off > int64(maxSize) {
		return nil, fmt.Errorf("%w: %d bytes at offset %d", ErrSize, size, off)
	}
	r, err := mapFD(fd, off, size, writable)
	if err != nil {
		return nil, err
	}
	return count(r), nil
}
