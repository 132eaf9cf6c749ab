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
	slots
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

// slots is the memory of commands.
type slots struct {
	mu    sync.Mutex
	free  []slot
	pages [][]byte
}

// take takes memory for a command; there are as many as there ever were commands at the same time.
func (l *slots) take() (slot, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.free) == 0 {
		page, slots, err := mapSlots(os.Getpagesize())
		if err != nil {
			return slot{}, err
		}
		l.pages, l.free = append(l.pages, page), slots
	}
	s := l.free[len(l.free)-1]
	l.free = l.free[:len(l.free)-1]
	return s, nil
}

func (l *slots) put(s slot) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.free = append(l.free, s)
}

// unmap gives the memory back. No command is under way.
func (l *slots) unmap() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.pages {
		unix.Munmap(p)
	}
	l.pages, l.free = nil, nil
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
	s, err := d.take()
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
	d.unmap()
	return err
}

// A Kernel takes the commands of one open channel in place of the kernel's own, which is behind Open: an emulated one. Its methods may
// be called by several goroutines at a time.
type Kernel interface {
	// Write runs a command, which is what is written to the kernel's file; addresses in it are of this process. It does not wait:
	// without an event, GET_EVENT is EAGAIN.
	Write(cmd []byte) syscall.Errno
	// Wait waits until there may be an event. It ends with Close.
	Wait()
	// Close destroys all that was made, and ends Wait.
	Close() error
}

// OpenOn is Open, with another kernel, which the Channel closes.
func OpenOn(k Kernel) *Channel { return newChannel(&other{k: k}) }

// other is a Kernel as a Channel has it.
type other struct {
	k Kernel
	slots

	mu     sync.RWMutex // held for reading by commands, for writing by Close
	closed bool
}

func (o *other) do(c *command) error {
	o.mu.RLock()
	defer o.mu.RUnlock()
	if o.closed {
		return errClosed
	}
	s, err := o.take()
	if err != nil {
		return err
	}
	defer o.put(s)
	n, ref := s.marshal(c)
	if errno := o.k.Write(s.mem[:n]); errno != 0 {
		return errno
	}
	s.unmarshal(c, ref)
	return nil
}

func (o *other) event(b []byte) error {
	for {
		if err := o.do(getEvent(b)); err != unix.EAGAIN {
			return err
		}
		o.k.Wait()
	}
}

func (o *other) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	err := o.k.Close()
	o.unmap()
	return err
}
