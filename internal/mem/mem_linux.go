package mem

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// seals of every file that Alloc makes: its size is settled for ever, and so are the seals.
const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

func alloc(size int, opt Options) (*Region, error) {
	if huge := HugePageSize(); opt.Huge == HugeRequire || opt.Huge == HugeAuto && huge != 0 && size >= huge {
		if huge == 0 {
			return nil, fmt.Errorf("mem: huge pages required for %d bytes: this kernel has none", size)
		}
		// Waste is bounded: a region of little more than n huge pages would take nearly one for nothing.
		if rounded := roundUp(size, huge); opt.Huge == HugeRequire || rounded-size <= size/8 {
			r, err := allocPages(size, huge, opt)
			if err == nil {
				return r, nil
			}
			if opt.Huge == HugeRequire {
				return nil, err
			}
		}
	}
	return allocPages(size, os.Getpagesize(), opt)
}

func allocPages(size, page int, opt Options) (*Region, error) {
	name := opt.Name
	if name == "" {
		name = "ringside"
	}
	if len(name) > 200 {
		name = name[:200]
	}
	size = roundUp(size, page)
	huge := page != os.Getpagesize()
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	if huge {
		flags |= unix.MFD_HUGETLB // of the default size, which is what HugePageSize reads
	}
	// MFD_NOEXEC_SEAL is what new kernels want to hear; old ones answer EINVAL.
	fd, err := unix.MemfdCreate(name, flags|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate(name, flags)
	}
	if err != nil {
		return nil, explain("create a memory file", size, huge, err)
	}
	r := &Region{fd: fd, page: page}
	if err := r.build(size, huge, opt); err != nil {
		if r.mem != nil {
			unix.Munmap(r.mem)
		}
		unix.Close(fd)
		return nil, err
	}
	r.bytes = r.mem[:size:size]
	return r, nil
}

func (r *Region) build(size int, huge bool, opt Options) error {
	if err := unix.Ftruncate(r.fd, int64(size)); err != nil {
		return explain("size a memory file", size, huge, err)
	}
	if _, err := unix.FcntlInt(uintptr(r.fd), unix.F_ADD_SEALS, seals); err != nil {
		return explain("seal a memory file", size, huge, err)
	}
	m, err := unix.Mmap(r.fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return explain("map", size, huge, err)
	}
	r.mem = m
	if opt.OnNode {
		bindNode(m, opt.Node) // a hint
	}
	if !huge && opt.Huge == HugeAuto && size >= 1<<21 {
		unix.Madvise(m, unix.MADV_HUGEPAGE) // a hint; works if /sys/kernel/mm/transparent_hugepage/shmem_enabled says advise
	}
	if opt.Populate {
		if err := populate(m); err != nil {
			return explain("populate", size, huge, err)
		}
	}
	return nil
}

// populate touches every page of m.
func populate(m []byte) error {
	for {
		err := unix.Madvise(m, unix.MADV_POPULATE_WRITE)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.EINVAL): // Linux before 5.14
			for i := 0; i < len(m); i += os.Getpagesize() {
				m[i] = 0 // fresh memory: nobody else has it yet
			}
			return nil
		}
		return err
	}
}

func (r *Region) unmap() error {
	if err := unix.Munmap(r.mem); err != nil {
		return err
	}
	if r.fd >= 0 {
		return unix.Close(r.fd)
	}
	return nil
}

// explain names the limit that an allocation ran into, and the remedy.
func explain(what string, size int, huge bool, err error) error {
	remedy := ""
	switch {
	case errors.Is(err, unix.EMFILE):
		var l unix.Rlimit
		unix.Getrlimit(unix.RLIMIT_NOFILE, &l)
		remedy = fmt.Sprintf(": each region takes one descriptor and the process may have %d (RLIMIT_NOFILE): raise it with "+
			"ulimit -n or LimitNOFILE=, or use fewer, larger regions", l.Cur)
	case errors.Is(err, unix.ENFILE):
		remedy = ": the system's file table is full: raise sysctl fs.file-max"
	case huge:
		remedy = ": not enough reserved huge pages are free: raise sysctl vm.nr_hugepages"
	case errors.Is(err, unix.ENOMEM):
		remedy = fmt.Sprintf(": out of memory, address space (RLIMIT_AS) or mappings (sysctl vm.max_map_count is %s)", readLine("/proc/sys/vm/max_map_count"))
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EFBIG):
		remedy = ": more than the kernel's shared memory can hold: see RLIMIT_FSIZE and the memory limit of the cgroup"
	case errors.Is(err, unix.EFAULT):
		remedy = ": pages could not be provided: see the memory limit of the cgroup"
	case errors.Is(err, unix.EPERM):
		remedy = ": forbidden by a security policy (seccomp, vm.memfd_noexec)"
	}
	return fmt.Errorf("mem: %s of %d bytes: %w%s", what, size, err, remedy)
}

func readLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}

// HugePageSize is the system's default huge page size in bytes, or 0 if it has no reserved huge pages, nor may take
// any on demand.
var HugePageSize = sync.OnceValue(func() int {
	var size, total, surplus int
	for line := range strings.Lines(readLine("/proc/meminfo")) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "Hugepagesize:":
			size, _ = strconv.Atoi(f[1])
		case "HugePages_Total:":
			total, _ = strconv.Atoi(f[1])
		}
	}
	surplus, _ = strconv.Atoi(readLine("/proc/sys/vm/nr_overcommit_hugepages"))
	size <<= 10
	if total+surplus == 0 || size <= 0 || size&(size-1) != 0 {
		return 0
	}
	return size
})

const hugetlbfsMagic = 0x958458f6

func mapFD(fd int, off int64, size int, writable bool) (*Region, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("mem: peer's memory file: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return nil, fmt.Errorf("mem: peer's memory file: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%w: mode %#o", ErrNotMemory, st.Mode)
	}
	page := os.Getpagesize()
	switch int64(fs.Type) & 0xffffffff {
	case unix.TMPFS_MAGIC:
	case hugetlbfsMagic:
		page = int(fs.Bsize)
		if page < os.Getpagesize() || page&(page-1) != 0 {
			return nil, fmt.Errorf("%w: page size %d", ErrNotMemory, page)
		}
	default: // a file system that could block or fail a page fault for reasons of its own
		return nil, fmt.Errorf("%w: file system type %#x", ErrNotMemory, fs.Type)
	}
	got, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotMemory, err)
	}
	if got&unix.F_SEAL_SHRINK == 0 {
		return nil, fmt.Errorf("%w (seals %#x)", ErrNotSealed, got)
	}
	// The size is read after the seal: from here on it can only grow.
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("mem: peer's memory file: %w", err)
	}
	if st.Size < off+int64(size) {
		return nil, fmt.Errorf("%w: it has %d bytes, %d at offset %d are needed", ErrTooSmall, st.Size, size, off)
	}
	start := off &^ int64(page-1)
	skip := int(off - start)
	prot := unix.PROT_READ
	if writable {
		prot |= unix.PROT_WRITE
	}
	m, err := unix.Mmap(fd, start, roundUp(skip+size, page), prot, unix.MAP_SHARED)
	if err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
			return nil, fmt.Errorf("mem: map a peer's memory file (writable=%t): %w: its owner did not grant that", writable, err)
		}
		return nil, explain("map a peer's memory file", size, page != os.Getpagesize(), err)
	}
	return &Region{mem: m, bytes: m[skip : skip+size : skip+size], fd: -1, page: page}, nil
}
