package rdmacm

import (
	"fmt"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// device is the kernel's connection manager, an open file. All of its commands are write()s, which no other command waits for.
type device struct {
	file *os.File // non-blocking, and with the runtime's poller
	raw  syscall.RawConn

	mu    sync.Mutex
	free  []slot
	pages [][]byte
}

// newDevice takes over fd, which is non-blocking.
func newDevice(fd int, path string) (*device, error) {
	f := os.NewFile(uintptr(fd), path)
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &device{file: f, raw: raw}, nil
}

// slot takes memory for a command; there are as many as there ever were commands at the same time.
func (d *device) slot() (slot, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.free) == 0 {
		page, slots, err := mapSlots(os.Getpagesize())
		if err != nil {
			return slot{}, err
		}
		d.pages, d.free = append(d.pages, page), slots
	}
	s := d.free[len(d.free)-1]
	d.free = d.free[:len(d.free)-1]
	return s, nil
}

func (d *device) put(s slot) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.free = append(d.free, s)
}

func (d *device) do(c *command) error {
	var err error
	// All of it within Control: Close waits for that before it unmaps the memory. Control takes no lock.
	if closed := d.raw.Control(func(fd uintptr) { err = d.write(int(fd), c) }); closed != nil {
		return errClosed
	}
	return err
}

// write runs the command, from its bytes to the response.
func (d *device) write(fd int, c *command) error {
	s, err := d.slot()
	if err != nil {
		return err
	}
	defer d.put(s)
	for {
		n, ref := s.marshal(c)
		k, err := unix.Write(fd, s.mem[:n])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case k != n:
			return fmt.Errorf("the kernel took %d bytes of a command of %d", k, n)
		}
		s.unmarshal(c, ref)
		return nil
	}
}

// event takes an event if there is one, and else lets the runtime's poller wait for the next.
func (d *device) event(b []byte) error {
	var err error
	closed := d.raw.Read(func(fd uintptr) bool {
		err = d.write(int(fd), getEvent(b))
		return err != unix.EAGAIN
	})
	if closed != nil {
		return errClosed
	}
	return err
}

// Close closes the file, on which the kernel destroys all IDs of it, and waits for calls in progress.
func (d *device) Close() error {
	err := d.file.Close() // returns when the last Control and Read have
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range d.pages {
		unix.Munmap(p)
	}
	d.pages, d.free = nil, nil
	return err
}
