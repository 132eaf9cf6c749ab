package procmem

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Check reports, with EFAULT, whether the program may at present read [va, va+n), and write it, if write is set: what the kernel
// looks at when memory is registered. It is ErrGone if the memory is not the process' any more.
func (m *Memory) Check(va, n uint64, write bool) error {
	f, err := m.openMaps()
	if err != nil {
		return err
	}
	defer f.Close()
	// The list is that of whoever has the number now, and of the program that it runs now. If our memory is there after that, it is the
	// memory that the list is of.
	var b [1]byte
	if err := m.ReadAt(b[:], va); errors.Is(err, ErrGone) {
		return err
	}
	return checkMaps(f, va, n, write)
}

// openMaps opens the process' list of mappings. A thread that has ended has none, and the first one may end before the others.
func (m *Memory) openMaps() (*os.File, error) {
	if f := openFilled(fmt.Sprintf("/proc/%d/maps", m.pid)); f != nil {
		return f, nil
	}
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/maps", m.pid))
	for _, name := range lists {
		if f := openFilled(name); f != nil {
			return f, nil
		}
	}
	return nil, ErrGone
}

// openFilled opens a file, or returns nil if that cannot be, or it is empty.
func openFilled(name string) *os.File {
	f, err := os.Open(name)
	if err != nil {
		return nil
	}
	var b [1]byte
	if _, err := f.ReadAt(b[:], 0); err != nil {
		f.Close()
		return nil
	}
	return f
}

// checkMaps is Check for a list of mappings in the form of /proc/PID/maps.
func checkMaps(maps io.Reader, va, n uint64, write bool) error {
	if va+n < va {
		return fmt.Errorf("%d bytes at %#x reach beyond the last address: %w", n, va, unix.EFAULT)
	}
	end := va + n
	s := bufio.NewScanner(maps)
	for va < end && s.Scan() {
		var from, to uint64
		var rights string
		if k, _ := fmt.Sscanf(s.Text(), "%x-%x %s", &from, &to, &rights); k != 3 {
			return fmt.Errorf("a list of mappings has the line %q", s.Text())
		}
		if to <= va {
			continue
		}
		if from > va {
			break
		}
		if !strings.HasPrefix(rights, "r") || write && !strings.HasPrefix(rights, "rw") {
			return fmt.Errorf("memory at %#x has the rights %s: %w", max(from, va), rights, unix.EFAULT)
		}
		va = to
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("a list of mappings: %w", err)
	}
	if va < end {
		return fmt.Errorf("there is no memory at %#x: %w", va, unix.EFAULT)
	}
	return nil
}
