//go:build unix && !linux

package mem

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// HugePageSize is 0: this system has no reserved huge pages that we know how to ask for.
func HugePageSize() int { return 0 }

func alloc(size int, opt Options) (*Region, error) {
	if opt.Huge == HugeRequire {
		return nil, fmt.Errorf("mem: huge pages required for %d bytes: %w on this system", size, errors.ErrUnsupported)
	}
	size = roundUp(size, os.Getpagesize())
	m, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("mem: map of %d bytes: %w", size, err)
	}
	if opt.Populate {
		for i := 0; i < size; i += os.Getpagesize() {
			m[i] = 0
		}
	}
	return &Region{mem: m, bytes: m, fd: -1, page: os.Getpagesize()}, nil
}

func (r *Region) unmap() error { return unix.Munmap(r.mem) }

func mapFD(int, int64, int, bool) (*Region, error) {
	return nil, fmt.Errorf("mem: sealed memory files: %w on this system: shared memory between processes needs Linux", errors.ErrUnsupported)
}
