//go:build !unix

package mem

import (
	"errors"
	"fmt"
	"os"
	"unsafe"
)

// HugePageSize is 0: this system has no reserved huge pages that we know how to ask for.
func HugePageSize() int { return 0 }

// alloc takes page-aligned memory from the Go heap, which does not move its objects.
func alloc(size int, opt Options) (*Region, error) {
	if opt.Huge == HugeRequire {
		return nil, fmt.Errorf("mem: huge pages required for %d bytes: %w on this system", size, errors.ErrUnsupported)
	}
	page := os.Getpagesize()
	size = roundUp(size, page)
	m := make([]byte, size+page)
	// Safe: only the number is used, to find the first page boundary.
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(m)))) & (page - 1)
	m = m[skip : skip+size : skip+size]
	return &Region{mem: m, bytes: m, fd: -1, page: page}, nil
}

func (r *Region) unmap() error { return nil }

func mapFD(int, int64, int, bool) (*Region, error) {
	return nil, fmt.Errorf("mem: sealed memory files: %w on this system: shared memory between processes needs Linux", errors.ErrUnsupported)
}
